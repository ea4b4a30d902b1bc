"""DIN and TWIN against FuxiCTR and LongCTR, weight for weight, in float32 on a CPU.

    pip install torch fuxictr
    git clone https://github.com/reczoo/LongCTR && export LONGCTR_PARITY_DIR=$PWD/LongCTR

FuxiCTR's layers are imported from its package and LongCTR's TWIN from that checkout; a test skips
where it does not find its own. Seen to pass with torch 2.13.0, fuxictr 2.3.10 and LongCTR 7e5bea3.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from baselines_jax.twin import TWIN
from ctr_jax.din_attention import DINAttention
from tests.baselines_jax.cases import D, tokens_of
from tests.baselines_jax.public_code import checkout, imported

LENGTHS, L = (9, 4, 1), 9  # no empty history: there the references differ, as a test below shows
TOLERANCE = dict(rtol=1e-5, atol=2e-6)


@pytest.fixture(scope="module")
def torch():
    return imported("torch")


@pytest.fixture(scope="module")
def fuxictr(torch):
    return imported("fuxictr.pytorch.layers.attentions.target_attention")


@pytest.fixture(scope="module")
def longctr(fuxictr):
    """LongCTR's TWIN.py as a module."""
    return checkout("LONGCTR_PARITY_DIR", "reczoo/LongCTR", "TWIN", "TWIN.py")


def pairs_of(tokens):
    """One row per candidate, as the references want them: q [N, d], x [N, L, d], mask [N, L]."""
    count = tokens.candidates.shape[1]
    return (
        tokens.candidates.reshape(-1, D),
        np.repeat(tokens.behaviours, count, 0),
        np.repeat(tokens.batch.behaviour_mask, count, 0),
    )


def applied_with_gradients(torch, layer, tokens):
    """(out [B, C, d], its gradients by q and x [B, C, ..., d]) of a torch layer, sum of sines."""
    q, x, mask = (torch.tensor(a) for a in pairs_of(tokens))
    q.requires_grad_(), x.requires_grad_()
    out = layer(q, x, mask)
    torch.sin(out).sum().backward()
    shape = tokens.candidates.shape[:2]
    return [a.detach().numpy().reshape(*shape, *a.shape[1:]) for a in (out, q.grad, x.grad)]


def check(ours, tokens, theirs):
    """`ours`(q, x) -> [B, C, d] has the values and the gradients of `applied_with_gradients`."""
    out, of_q, of_x = theirs
    arrays = tokens.candidates, tokens.behaviours
    np.testing.assert_allclose(ours(*arrays), out, **TOLERANCE)
    grads = jax.grad(lambda q, x: jnp.sum(jnp.sin(ours(q, x))), (0, 1))(*arrays)
    np.testing.assert_allclose(grads[0], of_q, **TOLERANCE)
    np.testing.assert_allclose(grads[1], of_x.sum(1), **TOLERANCE)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("activation", ["Dice", "ReLU"])
def test_din_is_fuxictrs(torch, fuxictr, activation, train):
    torch.manual_seed(0)
    hidden = [6, 5]
    theirs = fuxictr.DIN_Attention(D, hidden, hidden_activations=activation).train(train)
    linears = [m for m in theirs.modules() if isinstance(m, torch.nn.Linear)]
    params, state = {}, {}
    for i, linear in enumerate(linears):
        params[f"kernel_{i}"] = linear.weight.detach().numpy().T
        params[f"bias_{i}"] = linear.bias.detach().numpy()
    norms = [m for m in theirs.modules() if type(m).__name__ == "Dice"]
    for i, dice in enumerate(norms):
        with torch.no_grad():  # away from what they start at
            dice.alpha.uniform_(-1, 1)
            dice.bn.running_mean.normal_()
            dice.bn.running_var.uniform_(0.5, 2)
        params[f"alpha_{i}"] = dice.alpha.detach().numpy()
        state[f"mean_{i}"] = dice.bn.running_mean.numpy().copy()
        state[f"variance_{i}"] = dice.bn.running_var.numpy().copy()
    assert len(norms) == (2 if activation == "Dice" else 0)

    # FuxiCTR takes the moments of padding too, so that in training only whole histories agree.
    tokens = tokens_of((L, L, L) if train else LENGTHS, L, 2)
    unit = DINAttention(hidden, activation.lower())
    variables = jax.device_put({"params": params, "batch_stats": state})
    batch = tokens.batch

    def ours(q, x):
        return unit.apply(
            variables, q, x, batch.behaviour_mask, batch.candidate_mask, train,
            mutable=["batch_stats"],
        )[0]  # fmt: skip

    check(ours, tokens, applied_with_gradients(torch, theirs, tokens))


def twin_of(theirs, key, heads, top_k):
    """Our TWIN with the weights of theirs, whose key matrix is called `key`."""

    def kernel(name):
        return getattr(theirs, name).weight.detach().numpy().T

    params = {name: {"kernel": kernel(f"W_{name}")} for name in "q"}
    params["k"], params["out"] = {"kernel": kernel(key)}, {"kernel": kernel("W_o")}
    params["v"] = np.stack(np.split(kernel("W_v"), heads, 1))
    variables = jax.device_put({"params": params})
    module = TWIN(heads, top_k)

    def apply(tokens):
        def ours(q, x):
            return module.apply(variables, tokens.replace(candidates=q, behaviours=x), False)

        return ours

    return apply


@pytest.mark.parametrize("heads", [1, 2])
def test_twin_that_selects_all_is_fuxictrs_multi_head_target_attention(torch, fuxictr, heads):
    torch.manual_seed(0)
    theirs = fuxictr.MultiHeadTargetAttention(D, D, heads)
    tokens = tokens_of(LENGTHS, L, 2)
    ours = twin_of(theirs, "W_k", heads, L)(tokens)
    check(ours, tokens, applied_with_gradients(torch, theirs, tokens))


@pytest.mark.parametrize("top_k", [1, 3, 20])
@pytest.mark.parametrize("heads", [1, 2])
def test_twin_is_longctrs(torch, longctr, heads, top_k):
    torch.manual_seed(0)
    theirs = longctr.MultiHeadTopKAttention(D, attention_dim=D, topk=top_k, num_heads=heads)
    tokens = tokens_of(LENGTHS, L, 2)
    ours = twin_of(theirs, "W_h", heads, top_k)(tokens)
    check(ours, tokens, applied_with_gradients(torch, theirs, tokens))


def test_an_empty_history_gives_longctr_a_mean_of_its_padding_and_ours_zero(torch, longctr):
    torch.manual_seed(0)
    theirs = longctr.MultiHeadTopKAttention(D, attention_dim=D, topk=L, num_heads=2)
    tokens = tokens_of((0,), L, 1)
    noise = np.random.default_rng(0).normal(size=(1, L, D)).astype(np.float32)
    tokens = tokens.replace(behaviours=noise)
    out, *_ = applied_with_gradients(torch, theirs, tokens)
    mean = theirs.W_o(theirs.W_v(torch.tensor(noise[0].mean(0)))).detach().numpy()
    np.testing.assert_allclose(out[0, 0], mean, rtol=1e-4, atol=1e-6)
    ours = twin_of(theirs, "W_h", 2, L)(tokens)
    assert (np.asarray(ours(tokens.candidates, noise)) == 0).all()
