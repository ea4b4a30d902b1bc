"""LONGER against its formulas in float64: R as printed, newest first, anew for every candidate."""

import functools
import math

import jax
import numpy as np
import pytest

from baselines_jax import longer
from baselines_jax.longer import Longer
from tests.baselines_jax.cases import LENGTH, tokens_of
from tests.baselines_jax.invariances import FIELDS, Checks, names
from tests.baselines_jax.references import layer_norm, requests, softmax
from tests.lrea_jax.cases import SPEC


def gelu(x):
    return np.vectorize(lambda v: v * (1 + math.erf(v / math.sqrt(2))) / 2)(x)


def layer(p, queries, keys, visible, heads=2):
    """Pre-LN rows of `queries`, of which row i sees keys[j] where visible[i, j]."""
    d, out = keys.shape[1], []
    normed = np.array([layer_norm(x, p["norm"]) for x in keys])
    for x, seen in zip(queries, visible, strict=True):
        k, v = np.split(normed[seen] @ p["kv"]["kernel"], 2, 1)
        q, attended = layer_norm(x, p["norm"]) @ p["q"]["kernel"], np.zeros(d)
        for h in range(heads):
            part = slice(h * d // heads, (h + 1) * d // heads)
            weights = softmax(k[:, part] @ q[part] / math.sqrt(d // heads))
            attended[part] = weights @ v[:, part]
        x = x + attended @ p["out"]["kernel"]
        hidden = gelu(layer_norm(x, p["ffn_norm"]) @ p["up"]["kernel"] + p["up"]["bias"])
        out.append(x + hidden @ p["down"]["kernel"] + p["down"]["bias"])
    return np.array(out)


def inner(p, group):
    """InnerTrans of the valid behaviours of a group."""
    q, k, v = np.split(p["qkv"]["kernel"], 3, 1)
    p = p | {"q": {"kernel": q}, "kv": {"kernel": np.concatenate([k, v], 1)}}
    rows = np.array(group)
    return list(layer(p, rows, rows, np.ones((len(rows), len(rows)), bool)))


def reference(p, tokens, layers, merge, has_inner, recent):
    out = []
    for index, (behaviours, size, candidates, request_time) in enumerate(requests(tokens)):
        newest_first = []
        for place, time, x in behaviours[::-1]:
            seconds = max(abs(request_time - time), 1)
            by_time = p["time"][min(int(math.log(seconds) / 0.301), 128)]
            newest_first.append(x + p["position"][LENGTH - size + place] + by_time)
        merged = []
        for start in range(0, len(newest_first), merge):
            group = newest_first[start : start + merge][::-1]  # oldest first within a token
            if has_inner:
                group = inner(p["inner"], group)
            group = [np.zeros_like(group[0])] * (merge - len(group)) + list(group)
            merged.append(np.concatenate(group))
        others = [p["cls"]]
        if tokens.profile.shape[1]:
            others.append(tokens.profile[index].astype(np.float64) @ p["user"]["kernel"])
        out.append([])
        for c in candidates:
            m = 1 + len(others)
            r = np.array([c @ p["candidate"]["kernel"], *others, *merged])
            for i in range(layers):
                o = r[: m + recent]
                visible = np.arange(len(r)) >= np.arange(len(o))[:, None]
                r = layer(p[f"layer_{i}"], o, r, visible)
            g = [layer_norm(x, p["norm"]) for x in r[:m]]
            # Ours are in the order candidate, user, CLS.
            out[-1].append(np.concatenate([g[0], *g[:0:-1]]))
    return out


def module(layers, merge, has_inner, recent, tile_bytes=0):
    return Longer(
        layers=layers, heads=2, merge=merge, inner=has_inner, recent=recent, length=LENGTH,
        tile_bytes=tile_bytes,
    )  # fmt: skip


@functools.cache
def checks(variant, fields=FIELDS):
    return Checks(
        functools.partial(module, *variant),
        lambda p, tokens: reference(p, tokens, *variant),
        fields,
    )


# 11 behaviours are 6 groups of 2, the oldest half full, of which the newest 3 are queries.
@pytest.mark.parametrize("name", names("gradients"))
def test_groups_through_a_transformer(name):
    getattr(checks((2, 2, True, 3)), name)()


@pytest.mark.parametrize("name", ["values", pytest.param("padding", marks=pytest.mark.slow)])
def test_groups_as_they_are(name):
    getattr(checks((3, 4, False, 2), ()), name)()


@pytest.mark.slow
def test_more_queries_than_groups_are_all_of_them():
    few, many = (module(2, 4, False, recent) for recent in (3, 50))
    of = checks((2, 4, False, 3))
    out = [m.apply(of.variables, of.tokens, False) for m in (few, many)]
    np.testing.assert_allclose(*out, rtol=1e-6, atol=1e-6)


def test_the_history_is_encoded_without_the_candidate():
    """What may be kept between candidates: the rows of user and CLS, and so all before them."""
    of = checks((2, 2, True, 3))
    out = np.asarray(of.applied(of.variables, of.tokens))
    others = of.tokens.replace(candidates=of.tokens.candidates + 1.0)
    again = np.asarray(of.applied(of.variables, others))
    width = out.shape[-1] // 3
    np.testing.assert_array_equal(again[..., width:], out[..., width:])
    assert np.abs(again[..., :width] - out[..., :width]).max() > 1e-2


def test_a_history_longer_than_the_config_says_is_refused():
    with pytest.raises(ValueError, match="config.model.length=13"):
        module(1, 2, False, 3).init(jax.random.key(0), tokens_of((3,), LENGTH + 1, 1), False)


CHANGES = [
    dict(num_layers=0), dict(num_heads=3), dict(merge=0), dict(recent=0), dict(length=0),
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_what_cannot_be_built_is_refused(change):
    config = longer.default_config()
    config.update(change)
    with pytest.raises(ValueError, match=next(iter(change))):
        longer.build(config, SPEC)
