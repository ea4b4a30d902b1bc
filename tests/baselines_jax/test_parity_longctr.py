"""SIM, ETA and SDIM against LongCTR's classes, weight for weight, in float32 on a CPU.

    pip install torch fuxictr
    git clone https://github.com/reczoo/LongCTR && export LONGCTR_PARITY_DIR=$PWD/LongCTR

The classes are read from that checkout, their layers from the package; a test skips where it does
not find its own. Seen to pass with torch 2.13.0, fuxictr 2.3.10 and LongCTR 7e5bea3. What they do
that ours do not is asserted too: the tests that say so in their names.
"""

import math
from collections import OrderedDict

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from baselines_jax import eta, sdim, sim
from tests.baselines_jax.cases import D, tokens_of
from tests.baselines_jax.public_code import checkout, imported

L, HEADS = 9, 2
RAGGED, FULL, NONE = (9, 4, 1, 6), (9, 9), (0,)
TOLERANCE = dict(rtol=1e-5, atol=2e-6)
# Shorter than histories: else theirs fails, as the mask of the short attention is.
PARITY = dict(
    attention_dim=D, num_heads=HEADS, dnn_hidden_units=[6], embedding_dim=D, short_seq_len=4
)
LOOP = dict(optimizer="adam", loss="binary_crossentropy", metrics=[], verbose=0)


@pytest.fixture(scope="module")
def torch():
    return imported("torch")


@pytest.fixture(scope="module")
def longctr(torch, tmp_path_factory):
    """(name, behaviours, **options) -> a model of LongCTR that knows items 0 to n - 1."""
    imported("pandas")
    features = imported("fuxictr.features")
    checkout("LONGCTR_PARITY_DIR", "reczoo/LongCTR", "SIM", "SIM.py")

    def model(name, items, **options):
        module = checkout("LONGCTR_PARITY_DIR", "reczoo/LongCTR", name, f"{name}.py")
        feature_map = features.FeatureMap("parity", str(tmp_path_factory.mktemp("longctr")))
        item = dict(type="categorical", source="item", vocab_size=items, embedding_dim=D)
        feature_map.features = OrderedDict(item=item)
        feature_map.num_fields = 1
        torch.manual_seed(0)
        root = str(tmp_path_factory.mktemp("models"))
        return getattr(module, name)(feature_map, model_root=root, **PARITY, **LOOP, **options)

    return model


class Theirs:
    """A model of LongCTR run on `tokens` of one candidate each.

    Attributes:
      model: the model; `given`: what its short attention was given.
      interest: [B, d], what it finds in the long history. aux: loss of its `y_aux`, or None.
      of_q, of_x: gradients of the sum of sines of interest, plus aux: [B, d] and [B, L, d].
    """

    def __init__(self, torch, longctr, name, tokens, **options):
        b = len(tokens.candidates)
        vectors = np.concatenate([tokens.behaviours, tokens.candidates], 1).reshape(-1, D)
        self.model = model = longctr(name, len(vectors), **options)
        table = model.embedding_layer.embedding_layer.embedding_layers["item"].weight
        with torch.no_grad():
            table.copy_(torch.tensor(vectors))
            for parameter in model.parameters():  # away from what they start at
                if parameter.requires_grad and parameter is not table:
                    parameter.normal_(0, 0.3)
        found = []
        keep = lambda module, args, out: found.append(out)  # noqa: E731
        short = lambda module, args: setattr(self, "given", args)  # noqa: E731
        model.short_attention.register_forward_pre_hook(short)
        if name == "SDIM":
            of_long = model.lsh_attentioin
            model.lsh_attentioin = lambda *args: (found.append(of_long(*args)), found[-1])[1]
        else:
            model.long_attention.register_forward_hook(keep)
        out = model(({}, {"item": torch.arange(len(vectors))}, torch.tensor(self.mask(tokens))))
        loss, self.aux = torch.sin(found[-1]).sum(), None
        if "y_aux" in out:
            label = torch.tensor(tokens.batch.label)
            self.aux = model.loss_fn(out["y_aux"], label, reduction="mean")
            loss, self.aux = loss + self.aux, self.aux.item()
        loss.backward()
        self.interest = found[-1].detach().numpy()
        grads = table.grad.numpy().reshape(b, L + 1, D)
        self.of_q, self.of_x = grads[:, -1], grads[:, :-1]

    @staticmethod
    def mask(tokens):
        return tokens.batch.behaviour_mask.astype(np.float32)

    def kernel(self, name):
        return self.model.get_submodule(name).weight.detach().numpy().T

    def attention(self):
        """Parameters of ctr_jax.selected_attention."""
        params = {
            of: {"kernel": self.kernel(f"long_attention.W_{name}")}
            for of, name in (("q", "q"), ("k", "k"), ("out", "o"))
        }
        return params | {"v": np.stack(np.split(self.kernel("long_attention.W_v"), HEADS, 1))}

    def hashes(self):
        """Collection of ctr_jax.hashing."""
        rotations = self.model.random_rotations.detach().numpy()
        return {"hash": {"projections": rotations.reshape(D, -1)}}


def ours(theirs, tokens, **options):
    """(interest [B, d], aux, gradients as those of Theirs) of our module with the same weights."""
    variables = {}
    name = type(theirs.model).__name__
    if name == "SIM":
        module = sim.SoftSIM(sim.Second(HEADS, False), options["topk"], (6,))
        linears = [m for m in theirs.model.dnn_aux.modules() if hasattr(m, "weight")]
        head = {}
        for key, linear in zip(("dense_0", "logit"), linears, strict=True):
            weight, bias = linear.weight.detach().numpy().T.copy(), linear.bias.detach().numpy()
            head[key] = {"kernel": weight, "bias": bias}
        head["dense_0"]["kernel"][D:] /= sim.SUM_SCALE / math.sqrt(D)  # ours sums in other units
        variables["params"] = {
            "second": {"attention": theirs.attention()},
            "search_q": {"kernel": theirs.kernel("W_a")},
            "search_k": {"kernel": theirs.kernel("W_b")},
            "search_head": head,
        }
    elif name == "ETA":
        module = eta.ETA(HEADS, options["topk"], options["hash_bits"])
        variables = {"params": {"attention": theirs.attention()}, "hashes": theirs.hashes()}
    else:
        module = sdim.SDIM(options["num_hashes"], options["hash_bits"], options["l2_norm"])
        variables = {"hashes": theirs.hashes()}

    def loss(q, x):
        given = tokens.replace(candidates=q, behaviours=x, common=(q, x))
        out = module.apply(variables, given, True)
        out, losses = out if isinstance(out, tuple) else (out, {})
        return jnp.sum(jnp.sin(out)) + sum(losses.values()), (out[:, 0], losses.get("search"))

    run = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
    (of_q, of_x), (interest, aux) = run(tokens.candidates, tokens.behaviours)
    return interest, aux, of_q[:, 0], of_x


def case(lengths, seed=0):
    tokens = tokens_of(lengths, L, 1, seed)
    label = np.random.default_rng(seed).integers(0, 2, (len(lengths), 1)).astype(np.float32)
    return tokens.replace(batch=tokens.batch.replace(label=label))


def check(torch, longctr, name, lengths, **options):
    tokens = case(lengths)
    theirs = Theirs(torch, longctr, name, tokens, **options)
    interest, aux, of_q, of_x = ours(theirs, tokens, **options)
    np.testing.assert_allclose(interest, theirs.interest, **TOLERANCE)
    np.testing.assert_allclose(of_q, theirs.of_q, **TOLERANCE)
    np.testing.assert_allclose(of_x, theirs.of_x, **TOLERANCE)
    assert (aux is None) == (theirs.aux is None)
    if aux is not None:
        np.testing.assert_allclose(aux, theirs.aux, **TOLERANCE)


# Histories with padding agree where all of them is selected: else a test below says what happens.
@pytest.mark.parametrize("lengths, topk", [(FULL, 1), (FULL, 4), (FULL, 20), (RAGGED, L)])
def test_sim_is_longctrs(torch, longctr, lengths, topk):
    check(torch, longctr, "SIM", lengths, topk=topk)


@pytest.mark.parametrize("topk", [1, 3, 20])
def test_eta_is_longctrs(torch, longctr, topk):
    """With so many bits that no distances are equal."""
    tokens = case(RAGGED)
    options = dict(topk=topk, hash_bits=512)
    theirs = Theirs(torch, longctr, "ETA", tokens, **options)
    rotations = theirs.hashes()["hash"]["projections"]
    for q, x, mask in zip(
        tokens.candidates, tokens.behaviours, tokens.batch.behaviour_mask, strict=True
    ):
        distances = ((q @ rotations > 0) != (x[mask] @ rotations > 0)).sum(-1)
        assert len(set(distances)) == len(distances)
    check(torch, longctr, "ETA", RAGGED, **options)


@pytest.mark.parametrize("l2_norm", [False, True])
def test_sdim_is_longctrs(torch, longctr, l2_norm):
    lengths = (*RAGGED, *NONE)
    check(torch, longctr, "SDIM", lengths, num_hashes=3, hash_bits=2, l2_norm=l2_norm)


def test_longctrs_sim_selects_padding_before_negative_scores_and_ours_does_not(torch, longctr):
    tokens, options = case((3,)), dict(topk=6)
    theirs = Theirs(torch, longctr, "SIM", tokens, **options)
    x, q = tokens.behaviours[0], tokens.candidates[0, 0]
    r = (x @ theirs.kernel("W_b")) @ (q @ theirs.kernel("W_a"))
    if r[-1] >= 0:  # turn the newest behaviour round
        x[-1] *= -1
        r[-1] *= -1
        theirs = Theirs(torch, longctr, "SIM", tokens, **options)
    assert r[-1] < 0 and (r[:-3] == 0).all()
    # Six places, six of padding: of the behaviours only those with a positive score get one.
    assert (theirs.of_x[0, -3:] != 0).any(1).sum() == 3  # the loss of the sum reads them all
    hidden = tokens.replace(batch=tokens.batch.replace(
        behaviour_mask=tokens.batch.behaviour_mask & (np.append(np.zeros(6), r[-3:]) > 0)
    ))  # fmt: skip
    as_theirs, *_ = ours(theirs, hidden, **options)
    np.testing.assert_allclose(as_theirs, theirs.interest, **TOLERANCE)
    all_three, *_ = ours(theirs, tokens, **options)
    assert np.abs(all_three - theirs.interest).max() > 1e-3


@pytest.mark.parametrize("name, options", [("SIM", {}), ("ETA", dict(hash_bits=4))])
def test_an_empty_history_gives_longctr_a_mean_of_its_padding_and_ours_zero(
    torch, longctr, name, options
):
    tokens, options = case(NONE), dict(options, topk=L)
    noise = np.random.default_rng(0).normal(size=(1, L, D)).astype(np.float32)
    tokens = tokens.replace(behaviours=noise)
    theirs = Theirs(torch, longctr, name, tokens, **options)
    mean = noise[0].mean(0) @ theirs.kernel("long_attention.W_v")
    mean = mean @ theirs.kernel("long_attention.W_o")
    np.testing.assert_allclose(theirs.interest[0], mean, rtol=1e-4, atol=1e-6)
    interest, *_ = ours(theirs, tokens, **options)
    assert (np.asarray(interest) == 0).all()


@pytest.mark.parametrize("name", ["SIM", "ETA", "SDIM"])
def test_longctrs_short_attention_reads_the_mask_of_the_behaviour_before(torch, longctr, name):
    """Of n - 1 items; ours has all short_length, under their own mask (ctr_jax.history_model)."""
    tokens = case(RAGGED)
    theirs = Theirs(torch, longctr, name, tokens)
    _, items, mask = theirs.given
    np.testing.assert_array_equal(items.detach(), tokens.behaviours[:, -3:])
    np.testing.assert_array_equal(mask, Theirs.mask(tokens)[:, -4:-1])
    assert not np.array_equal(mask, Theirs.mask(tokens)[:, -3:])
