"""Relative encodings: closed forms and properties."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctr_jax.time_buckets import bucket
from kernels.evo_attention import RelTemporal
from sparsectr_jax.encodings import Encoding, Places, alibi_slopes, rotate, t5_buckets


def places(time, at):
    return Places(jnp.asarray(time, jnp.int32), jnp.asarray(at, jnp.int32))


def test_t5_buckets_are_those_of_the_published_rule():
    # In integers: d >= 16 is in the last bucket 16 + k with 16 * 8^(k / 16) <= d.
    expected = []
    for d in range(201):
        if d < 16:
            expected.append(d)
        else:
            k = max(k for k in range(16) if d**16 >= 16**16 * 8**k)
            expected.append(16 + k)
    np.testing.assert_array_equal(t5_buckets(200), expected)
    assert expected[15:20] == [15, 16, 16, 16, 17] and expected[112] == 30 and expected[113] == 31
    # T5X's and T5's own float32 arithmetic.
    d = np.arange(201)
    log = np.log(d.astype(np.float32).clip(1) / 16 + np.finfo(np.float32).eps) / np.log(128 / 16)
    large = np.minimum(16 + (log * 16).astype(np.int32), 31)
    np.testing.assert_array_equal(t5_buckets(200), np.where(d < 16, d, large))


def test_t5_reads_each_head_s_row_and_gives_it_gradients():
    rng = np.random.default_rng(0)
    table = rng.normal(size=(2, 32)).astype(np.float32)
    at = np.arange(300)

    def bias(table):
        encoding = Encoding("t5", 2, RelTemporal(), by_distance=table[:, t5_buckets(128)])
        zeros = np.zeros((1, 1, 300))
        query, key = places(zeros, at[None, None]), places(zeros[..., :1], [[[0]]])
        return encoding.bias(query, key, jnp.float32)

    got = bias(table)
    assert got.shape == (2, 1, 300)
    for distance in (0, 15, 16, 40, 127, 128, 299):
        np.testing.assert_array_equal(got[:, 0, distance], table[:, t5_buckets(299)[distance]])
    grads = jax.grad(lambda t: bias(t).sum())(table)
    np.testing.assert_array_equal(grads[0], np.bincount(t5_buckets(299), minlength=32))


@pytest.mark.parametrize("heads", [2, 8, 12])
def test_alibi_is_its_closed_form(heads):
    slopes = alibi_slopes(heads)
    assert slopes.shape == (heads,) and slopes[-1] == 2.0**-8
    np.testing.assert_allclose(slopes[1:] / slopes[:-1], slopes[0])
    if heads == 8:  # the paper's own example: 1/2, 1/4 .. 1/256
        np.testing.assert_array_equal(slopes, [0.5**h for h in range(1, 9)])
    encoding = Encoding("alibi", heads, RelTemporal())
    query, key = places([[[0]]], [[[9]]]), places([[[0], [0]]], [[[9], [2]]])
    got = encoding.bias(query, key, jnp.float32)
    np.testing.assert_allclose(got[:, :, 0], np.stack([0 * slopes, -7 * slopes], 1), rtol=1e-6)


def test_hstu_reads_the_distance_and_the_exact_time():
    rng = np.random.default_rng(0)
    p, w = rng.normal(size=11).astype(np.float32), rng.normal(size=129).astype(np.float32)
    encoding = Encoding("hstu", 2, RelTemporal(), by_distance=p, by_time=w)
    now = 1_700_000_000  # float32 has steps of 128 s there
    seconds = np.array([0, 1, 2, 3, 60, 86_400, 10**9])
    query, key = places([[[now]]], [[[10]]]), places(now - seconds[:, None], np.arange(7)[:, None])
    got = encoding.bias(query, Places(key.time[None], key.at[None]), jnp.float32)
    buckets = [min(128, int(math.log(max(s, 1)) / 0.301)) for s in seconds]
    np.testing.assert_allclose(got[0, :, 0], p[10 - np.arange(7)] + w[buckets], rtol=1e-6)
    times, request = np.array([[5, 7, 9]], np.int32), np.array([20], np.int32)
    np.testing.assert_array_equal(encoding.query_times(times, request)[0], [[7, 9, 20]])


def test_time_buckets_are_symmetric_and_bounded():
    seconds = np.array([0, 1, 2, 5, 2**31 - 1], np.int32)
    np.testing.assert_array_equal(bucket(seconds), [0, 0, 2, 5, 71])
    np.testing.assert_array_equal(bucket(-seconds), bucket(seconds))


def test_rope_products_depend_on_the_distance_only():
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 3, 4)).astype(np.float32)
    with jax.enable_x64(True):
        q, k = q.astype(np.float64), k.astype(np.float64)

        def dot(i, j):
            return np.sum(rotate(q, jnp.array(i)) * rotate(k, jnp.array(j)), -1)

        for shift in (-1000, -7, 5000):
            np.testing.assert_allclose(dot(9 + shift, 4 + shift), dot(9, 4), atol=1e-10)
        assert np.abs(dot(9, 4) - dot(9, 5)).min() > 1e-3
        np.testing.assert_array_equal(rotate(q, jnp.array(0)), q)
        # With K = 4: the first pair by i, the second by i / 100.
        turned = np.asarray(rotate(q, jnp.array(3)))
        for pair, angle in ((0, 3.0), (1, 0.03)):
            z = (q[:, 2 * pair] + 1j * q[:, 2 * pair + 1]) * np.exp(1j * angle)
            np.testing.assert_allclose(turned[:, 2 * pair], z.real, atol=1e-12)
            np.testing.assert_allclose(turned[:, 2 * pair + 1], z.imag, atol=1e-12)


def test_rope_keeps_the_dtype_and_the_length():
    x = np.random.default_rng(0).normal(size=(5, 2, 8))
    at = jnp.arange(-5, 0)
    assert rotate(jnp.asarray(x, jnp.bfloat16), at).dtype == jnp.bfloat16
    turned = rotate(jnp.asarray(x, jnp.float32), at)
    np.testing.assert_allclose((turned**2).sum(-1), (x**2).sum(-1), rtol=1e-5)
