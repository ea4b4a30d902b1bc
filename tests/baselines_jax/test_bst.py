"""BST against its formulas in float64, against FuxiCTR's, and its dropout.

    pip install torch fuxictr
    git clone https://github.com/reczoo/FuxiCTR && export FUXICTR_PARITY_DIR=$PWD/FuxiCTR

BST is not in FuxiCTR's package but in that checkout; its test skips without. Seen to pass with
torch 2.13.0, fuxictr 2.3.10 and FuxiCTR 0245987.
"""

import functools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from baselines_jax import bst
from baselines_jax.bst import BST
from tests.baselines_jax.cases import LENGTH, D, tokens_of
from tests.baselines_jax.invariances import Checks, names
from tests.baselines_jax.public_code import checkout, imported
from tests.baselines_jax.references import requests, softmax
from tests.lrea_jax.cases import SPEC


def layer_norm(x, scale, bias):
    return (x - x.mean()) / math.sqrt(x.var() + 1e-5) * scale + bias


def layer(p, rows, heads=2):
    """A post-LN layer in which every row sees every row."""
    d = len(rows[0])
    q, k, v = (np.array(rows) @ p[name] for name in "qkv")
    attended = np.zeros((len(rows), d))
    for h in range(heads):
        part = slice(h * d // heads, (h + 1) * d // heads)
        for i in range(len(rows)):
            scores = k[:, part] @ q[i, part] / math.sqrt(d // heads)
            attended[i, part] = softmax(scores) @ v[:, part]
    out = []
    for x, update in zip(rows, attended @ p["out"], strict=True):
        s = layer_norm(x + update, p["norm_scale"], p["norm_bias"])
        hidden = s @ p["up"] + p["up_bias"]
        hidden = np.where(hidden > 0, hidden, 0.01 * hidden)
        x = s + hidden @ p["down"] + p["down_bias"]
        out.append(layer_norm(x, p["ffn_norm_scale"], p["ffn_norm_bias"]))
    return out


def reference(p, tokens, layers, position, pooling):
    """Each candidate in a sequence of its own."""
    out = []
    for behaviours, size, candidates, request_time in requests(tokens):

        def at(place, time, size=size, request_time=request_time):
            if position == "index":
                return p["position"][LENGTH - size + place]
            seconds = max(abs(request_time - time), 1)
            return p["position"][min(int(math.log(seconds) / 0.301), 128)]

        out.append([])
        for c in candidates:
            rows = [x + at(place, time) for place, time, x in behaviours]
            rows.append(c + at(size, request_time))
            for i in range(layers):
                rows = layer(p[f"layer_{i}"], rows)
            if pooling == "target":
                out[-1].append(rows[-1])
            elif pooling == "mean":
                out[-1].append(np.mean(rows, 0))
            else:
                whole = np.zeros((LENGTH + 1, D))
                places = [LENGTH - size + place for place, _, _ in behaviours] + [LENGTH]
                whole[places] = rows
                out[-1].append(whole.reshape(-1))
    return out


def module(layers, position, pooling, tile_bytes=0, **kwargs):
    return BST(
        layers=layers, heads=2, ffn=2, position=position, pooling=pooling, length=LENGTH,
        tile_bytes=tile_bytes, **kwargs,
    )  # fmt: skip


@functools.cache
def checks(*variant):
    return Checks(
        functools.partial(module, *variant),
        lambda p, tokens: reference(p, tokens, *variant),
        fields=(),
    )


@pytest.mark.parametrize("name", names())
def test_two_layers_of_which_all_rows_are_read(name):
    getattr(checks(2, "index", "mean"), name)()


@pytest.mark.parametrize("name", ["values", "gradients"])
def test_one_layer_of_the_candidates_rows(name):
    getattr(checks(1, "time", "target"), name)()


@pytest.mark.parametrize("name", ["values", "isolation"])
def test_two_layers_the_second_of_the_candidates_rows(name):
    getattr(checks(2, "time", "target"), name)()


@pytest.mark.parametrize("name", ["values", "padding"])
def test_outputs_side_by_side(name):
    getattr(checks(1, "time", "concat"), name)()


@pytest.mark.parametrize("variant", [(1, "index", "mean"), (1, "time", "concat")], ids=str)
def test_a_history_longer_than_the_config_says_is_refused(variant):
    with pytest.raises(ValueError, match="config.model.length=13"):
        module(*variant).init(jax.random.key(0), tokens_of((3,), LENGTH + 1, 1), False)


CHANGES = [
    dict(num_layers=0), dict(num_heads=3), dict(ffn_multiplier=0), dict(position="place"),
    dict(pooling="sum"), dict(dropout=1.0),
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_what_cannot_be_built_is_refused(change):
    config = bst.default_config()
    config.update(change)
    with pytest.raises(ValueError, match=next(iter(change))):
        bst.build(config, SPEC)


# ---- dropout ----


def test_dropout_acts_in_training_only_and_on_each_candidate_by_itself():
    plain = checks(2, "time", "target")
    dropping = module(2, "time", "target", dropout=0.3)
    # All candidates the same.
    tokens = plain.tokens
    tokens = tokens.replace(candidates=np.repeat(tokens.candidates[:, :1], 3, 1))
    seeds = np.arange(tokens.candidates[..., 0].size, dtype=np.uint32).reshape(-1, 3)
    out = plain.applied(plain.variables, tokens)

    @jax.jit
    def training(seed):
        return dropping.apply(plain.variables, tokens.replace(seeds=seeds + seed), True)

    def run(seed):
        return np.asarray(training(np.uint32(seed)))

    same = jax.jit(lambda: dropping.apply(plain.variables, tokens, False))
    np.testing.assert_allclose(same(), out, rtol=1e-5, atol=1e-5)

    dropped = run(0)
    np.testing.assert_array_equal(dropped, run(0))
    assert np.abs(dropped - run(100)).max() > 1e-2
    assert np.abs(dropped - out).max() > 1e-2
    assert np.abs(dropped[:, 0] - dropped[:, 1]).max() > 1e-2


# ---- FuxiCTR ----


@pytest.fixture(scope="module")
def fuxictr():
    """torch, and FuxiCTR's BST.py as a module."""
    torch = imported("torch")
    imported("fuxictr.pytorch.models")
    parts = ("model_zoo", "BST", "src", "BST.py")
    return torch, checkout("FUXICTR_PARITY_DIR", "reczoo/FuxiCTR", *parts)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("pooling", ["target", "mean", "concat"])
def test_equal_to_fuxictrs(fuxictr, pooling, layers, heads):
    """Weight for weight, values and gradients; positions aside, which FuxiCTR concatenates, and the
    attention's biases, which start at 0 there and do not exist here."""
    torch, found = fuxictr
    torch.manual_seed(0)
    theirs = found.BehaviorTransformer(
        model_dim=D, num_heads=heads, stacked_transformer_layers=layers, use_position_emb=False
    )
    params = {"position": np.zeros((129, D), np.float32)}
    for i, block in enumerate(theirs.transformer_blocks):
        with torch.no_grad():  # away from what they start at
            for norm in (block.layer_norm1, block.layer_norm2):
                norm.weight.uniform_(0.5, 1.5), norm.bias.normal_()
        q, k, v = np.split(block.attention.in_proj_weight.detach().numpy().T, 3, 1)
        assert not block.attention.in_proj_bias.any()
        params[f"layer_{i}"] = dict(
            q=q, k=k, v=v, out=block.attention.out_proj.weight.detach().numpy().T,
            up=block.ffn[0].weight.detach().numpy().T, up_bias=block.ffn[0].bias.detach().numpy(),
            down=block.ffn[2].weight.detach().numpy().T,
            down_bias=block.ffn[2].bias.detach().numpy(),
            norm_scale=block.layer_norm1.weight.detach().numpy(),
            norm_bias=block.layer_norm1.bias.detach().numpy(),
            ffn_norm_scale=block.layer_norm2.weight.detach().numpy(),
            ffn_norm_bias=block.layer_norm2.bias.detach().numpy(),
        )  # fmt: skip
    length, count = 9, 2
    tokens = tokens_of((9, 4, 1, 0), length, count)
    ids = torch.tensor(np.repeat(tokens.batch.behaviour_mask, count, 0).astype(np.int64))
    x = torch.tensor(np.repeat(tokens.behaviours, count, 0), requires_grad=True)
    c = torch.tensor(tokens.candidates.reshape(-1, D), requires_grad=True)
    model = types.SimpleNamespace(num_heads=heads, use_causal_mask=False, seq_pooling_type=pooling)
    padding, mask = found.BST.get_mask(model, ids)
    out = theirs(torch.cat([x, c[:, None]], 1), mask)
    if pooling == "concat":  # theirs has what padding attends to; ours zeros
        out = out * (~padding)[..., None]
    out = found.BST.sequence_pooling(model, out, padding)
    torch.sin(out).sum().backward()

    unit = BST(layers=layers, heads=heads, ffn=1, pooling=pooling, length=length)
    variables = jax.device_put({"params": params})

    def ours(candidates, behaviours):
        given = tokens.replace(candidates=candidates, behaviours=behaviours)
        return unit.apply(variables, given, False)

    tolerance = dict(rtol=1e-5, atol=5e-6)
    compiled = jax.jit
    values = compiled(ours)(tokens.candidates, tokens.behaviours)
    np.testing.assert_allclose(values.reshape(-1, values.shape[-1]), out.detach(), **tolerance)
    loss = compiled(jax.grad(lambda *given: jnp.sum(jnp.sin(ours(*given))), (0, 1)))
    of_c, of_x = loss(tokens.candidates, tokens.behaviours)
    np.testing.assert_allclose(of_c.reshape(-1, D), c.grad, **tolerance)
    theirs_x = x.grad.numpy().reshape(-1, count, length, D).sum(1)
    np.testing.assert_allclose(of_x, theirs_x, rtol=1e-4, atol=2e-5)
