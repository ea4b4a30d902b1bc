"""SUAN against its formulas in float64, a row and a pair at a time."""

import functools
import math

import jax
import numpy as np
import pytest

from baselines_jax import suan
from baselines_jax.suan import SUAN
from tests.baselines_jax.cases import LENGTH, tokens_of
from tests.baselines_jax.invariances import FIELDS, Checks, names
from tests.baselines_jax.references import requests, silu, softmax
from tests.lrea_jax.cases import SPEC


def rms(x, p):
    return x / (math.sqrt(np.mean(x * x)) + 1e-6) * p["scale"]


def dense(x, p):
    return x @ p["kernel"] + p.get("bias", 0)


def attention(p, x, keys, biases, heads=2):
    """Row x over `keys`."""
    d = len(x)
    q, k, v = dense(x, p["q"]), dense(keys, p["k"]), dense(keys, p["v"])
    attended = np.zeros(d)
    for h in range(heads):
        part = slice(h * d // heads, (h + 1) * d // heads)
        scores = k[:, part] @ q[part] / math.sqrt(d // heads) + biases
        attended[part] = softmax(scores) @ v[:, part]
    return dense(attended, p["out"])


def block(p, history, targets, user):
    """Rows are (place, time, vector); a target sees the history and itself."""
    history, targets = (
        [(place, time, rms(x, p["norm_1"])) for place, time, x in rows]
        for rows in (history, targets)
    )

    def attended(row, visible):
        place, time, x = row
        biases = []
        for other, other_time, _ in visible:
            seconds = max(abs(time - other_time), 1)
            by_time = p["self"]["time"][min(int(math.log(seconds) / 0.301), 128)]
            biases.append(p["self"]["position"][place - other] + by_time)
        update = attention(p["self"], x, np.array([y for *_, y in visible]), np.array(biases))
        return rms(x + update, p["norm_2"])

    z = [attended(row, history[: i + 1]) for i, row in enumerate(history)]
    z_targets = [attended(row, [*history, row]) for row in targets]
    if user is not None:
        crossed, crossed_targets = (
            [attention(p["cross"], x, user, 0) for x in rows] for rows in (z, z_targets)
        )
        d = user.shape[1]
        mean = np.mean(np.add(z, crossed), 0) if z else np.zeros(d)
        gate = dense(np.maximum(dense(mean, p["squeeze"]), 0), p["excite"])
        gate = np.exp(gate.reshape(2, d))
        a, b = gate / gate.sum(0)
        z = [a * x + b * c for x, c in zip(z, crossed, strict=True)]
        z_targets = [a * x + b * c for x, c in zip(z_targets, crossed_targets, strict=True)]

    def finish(rows, new):
        ffn, out = p["ffn"], []
        for (place, time, _), x in zip(rows, new, strict=True):
            hidden = silu(dense(x, ffn["w1"])) * dense(x, ffn["w2"])
            out.append((place, time, x + dense(hidden, ffn["w3"])))
        return out

    return finish(history, z), finish(targets, z_targets)


def reference(p, tokens, layers=2, fields=FIELDS):
    out = []
    for index, (history, size, candidates, request_time) in enumerate(requests(tokens)):
        user, start = [], 0
        for i, width in enumerate(fields):
            column = tokens.profile[index, start : start + width].astype(np.float64)
            user.append(rms(dense(column, p[f"field_{i}"]), p["user_norm"]))
            start += width
        user = np.array(user) if user else None
        targets = [(size, request_time, c) for c in candidates]
        for i in range(layers):
            history, targets = block(p[f"block_{i}"], history, targets, user)
        out.append([x for *_, x in targets])
    return out


def module(layers, fields, tile_bytes=0):
    return SUAN(layers=layers, heads=2, ffn=3, length=LENGTH, fields=fields, tile_bytes=tile_bytes)


@functools.cache
def checks(*variant):
    return Checks(
        functools.partial(module, *variant),
        lambda p, tokens: reference(p, tokens, *variant),
        variant[1],
    )


@pytest.mark.parametrize("name", names("gradients"))
def test_two_blocks(name):
    getattr(checks(2, FIELDS), name)()


@pytest.mark.parametrize("name", ["values"])
def test_a_user_of_whom_nothing_is_known(name):
    getattr(checks(2, ()), name)()


def test_a_history_longer_than_the_config_says_is_refused():
    with pytest.raises(ValueError, match="config.model.length=13"):
        module(1, ()).init(jax.random.key(0), tokens_of((3,), LENGTH + 1, 1), False)


@pytest.mark.parametrize(
    "change", [dict(num_layers=0), dict(num_heads=3), dict(ffn_multiplier=0), dict(length=0)]
)
def test_what_cannot_be_built_is_refused(change):
    config = suan.default_config()
    config.update(change)
    with pytest.raises(ValueError, match=next(iter(change))):
        suan.build(config, SPEC)


def test_the_users_fields_are_the_columns_of_user_and_context():
    config = suan.default_config()
    config.embedding_width = 3
    model, columns = suan.build(config, SPEC)
    assert model.interest.fields == (3, 3)
    config.exclude = ("user/age", "context/slot")
    assert suan.build(config, SPEC)[0].interest.fields == ()
