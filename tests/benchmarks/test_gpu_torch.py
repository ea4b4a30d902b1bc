"""PyTorch's side of the suite for a GPU computes the attention that ours is compared with."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.dense_attention import NO_BIAS, bias_terms, dense_blocks, dense_tiled, library
from benchmarks.histories import burst_times
from kernels.evo_attention import RelTemporal

L, H, K = 48, 2, 4
SLOPES = 2.0 ** (-8 / H * np.arange(H, dtype="float32"))


@pytest.mark.parametrize("rel", [RelTemporal(), NO_BIAS])
def test_all_forms_of_full_attention_are_one(rel):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, L, H, K)), "float32") for _ in range(3))
    arguments = q, k, v, jnp.tile(SLOPES, (3, 1)), jnp.asarray(burst_times(2, L))
    forms = [partial(dense_blocks, L, rel), partial(dense_blocks, 20, rel),
             partial(dense_tiled, 0, rel), partial(library, "xla", rel, K),
             partial(library, "xla", rel, 16)]  # fmt: skip
    expected, *others = jax.jit(lambda *x: [form(*x) for form in forms])(*arguments)
    for out in others:
        np.testing.assert_allclose(out, expected, atol=2e-6)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_torchs_forms_are_that_one_too():
    torch = pytest.importorskip("torch")
    from benchmarks import gpu_torch

    rng = np.random.default_rng(0)
    times = np.sort(rng.integers(0, 2**31 - 1, (2, L)).astype("int32"), 1)
    times[:, L // 2 :] = times[:, L // 2 : L // 2 + 1] + np.arange(L - L // 2) ** 3
    slopes = torch.tensor(SLOPES)
    rows = [torch.tensor(row) for row in gpu_torch.clock(times)]
    bias = gpu_torch._biases(rows, slopes, L, torch.float32).numpy()
    wanted = bias_terms(RelTemporal(), np.tile(SLOPES, (3, 1)), times, times)
    lower = np.tril(np.ones((L, L), bool))
    np.testing.assert_allclose(bias[:, :, lower], np.asarray(wanted)[:, :, lower], atol=4e-6)
    for with_bias in (True, False):
        how = dict(backward=False, batch=2, length=L, heads=H, width=K, dtype="float32")
        runs = [gpu_torch.Run("cpu", kind, with_bias, padded=padded, **how)
                for kind, padded in (("sdpa", 8), ("flex", 16))]  # fmt: skip
        q, k, v = (x.numpy()[..., :K].transpose(0, 2, 1, 3) for x in runs[0].inputs)
        rel = RelTemporal() if with_bias else NO_BIAS
        expected = dense_blocks(L, rel, q, k, v, np.tile(SLOPES, (3, 1)), burst_times(2, L))
        runs[1].inputs = [torch.nn.functional.pad(x[..., :K], (0, 12)) for x in runs[0].inputs]
        for run in runs:
            got = run().numpy()[..., :K].transpose(0, 2, 1, 3)
            np.testing.assert_allclose(got, expected, atol=2e-6)
