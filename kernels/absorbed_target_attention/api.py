"""DIN's target attention in the form that LREA prints it (eqs. 3, 5, 9), at any rank.

A candidate t [1, d] scores K rows `keys` and sums K rows `values`; phi is leaky ReLU, and
W_in = [W1; W2; W3]. The two sides of eq. 5 are different functions, so both are here:

    joint  s = phi(1 t W1 + keys W2 + (1 t * keys) W3) W_o                    (eq. 5, left; eq. 9)
    split  s = [1 phi(t W1) + phi(keys W2) + phi((1 t * keys) W3)] W_o        (eq. 5, right; eq. 8)
    out = values^T s                                                          (eq. 3)

Who uses which rows:

    full rank (DIN)     keys = E_s            values = E_s        K = L
    LREA, decompressed  keys = W_d^T W_c^T E  values = E_s        K = L
    LREA, absorbed      keys = W_c^T E        values = W_d E_s    K = r

The first term of the split form does not go through the rows: it weighs `total`, the sum of the
behaviours, in all three. (phi(t W1) W_o is a number, and sum_l e_l times it is exact at any rank.)
No softmax, no biases. A padding behaviour is an exact zero row of E_s, so it adds nothing.

No [B, C, K, h] array is made by any implementation; but by the gradient of "hidden" tiles, which
are for serving.

Axis letters: B requests, C candidates, K rows, d model width, h hidden units.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from kernels import dispatch, meshes
from kernels.absorbed_target_attention import pallas_gpu, pallas_tpu, reference, row_tiles
from kernels.absorbed_target_attention.blocks import Blocks, blocks_for
from kernels.absorbed_target_attention.reference import Weights, leaky_relu

OP = "absorbed_target_attention"
FORMS = ("joint", "split")
TILINGS = ("keys", "hidden")
KERNELS = {"pallas_tpu": pallas_tpu, "pallas_gpu": pallas_gpu}
TRAINED_BY = {"xla": row_tiles} | KERNELS
# By device kind, as benchmarks/report.py judges measurements; XLA elsewhere (docs/kernels.md).
PREFERRED: dict[str, tuple[str, ...]] = {}


@flax.struct.dataclass
class Memory:
    """What candidates attend to.

    Attributes:
      keys: [B, K, d].
      values: [B, K, d].
      total: [B, d], the sum of the behaviours themselves; used by the split form.
    """

    keys: jax.Array
    values: jax.Array
    total: jax.Array


def absorbed_target_attention(
    query: jax.Array,
    memory: Memory,
    weights: Weights,
    *,
    form: str = "joint",
    slope: float = 0.01,
    tiling: str = "keys",
    tile_bytes: int = 0,
    implementation: str | None = None,
    interpret: Any = False,
    blocks: Blocks | None = None,
) -> jax.Array:
    """sum_k s_k values_k of every candidate (module docstring): [B, C, d].

    Args:
      query: [B, C, d] candidates.
      memory: K rows; K = 0 gives zeros.
      slope: a of phi, 0 or more.
      tiling: of "xla": "keys" for training (row_tiles.py), "hidden" for serving (reference.py).
      tile_bytes: of "xla": size of the largest temporary of a tile; 0 = 1 MiB on a CPU and 64 MiB
        elsewhere ("keys"), 128 KiB ("hidden").
      implementation: None or one of dispatch.IMPLEMENTATIONS.
      interpret: of a Pallas implementation: run anywhere; for pallas_tpu a pltpu.InterpretParams
        too.
      blocks: of a Pallas implementation: None takes those of the table in blocks.py.
    Raises:
      ValueError: an unknown form or tiling, shapes that do not fit, or an implementation that
        cannot run here.
    """
    _check(query, memory, weights, form, tiling, slope)
    refusals = dispatch.cannot_run_here(interpret, len(query)) | _refusals(query)
    chosen = dispatch.choose(OP, implementation, refusals, PREFERRED)
    if 0 in memory.keys.shape[:2] or query.shape[1] == 0:
        return jnp.zeros_like(query)
    arguments = (query, memory.keys, memory.values, weights)
    joint, slope = form == "joint", float(slope)
    if chosen == "xla" and tiling == "hidden":
        out = reference.attend(*arguments, joint=joint, slope=slope, tile_bytes=tile_bytes)
    elif chosen == "xla":
        together = not dispatch.requests_are_local(len(query))
        axes = () if together else dispatch.request_axes()
        options = dict(tile_bytes=tile_bytes, together=together)
        out = _mapped(_How(axes, chosen, joint, slope, tuple(options.items())), *arguments)
    else:
        of_table = blocks_for(chosen, query.dtype, memory.keys.shape[1])
        blocks = dispatch.checked_blocks(OP, blocks or of_table)
        options = dict(blocks=blocks, interpret=interpret)
        how = _How(dispatch.request_axes(), chosen, joint, slope, tuple(options.items()))
        out = _mapped(how, *arguments)
    if form == "split":
        of_query = leaky_relu(query @ weights.of_query, slope) @ weights.out
        out = out + (of_query[..., None] * memory.total[:, None]).astype(out.dtype)
    return out


@dataclasses.dataclass(frozen=True)
class _How:
    """Mesh axes to map over, and the arguments of an implementation that are no arrays."""

    axes: tuple[str, ...]
    implementation: str
    joint: bool
    slope: float
    options: tuple[tuple[str, Any], ...]

    def arguments(self) -> dict[str, Any]:
        return dict(joint=self.joint, slope=self.slope, **dict(self.options))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mapped(how: _How, query, keys, values, weights):
    """Each device runs the implementation on its own requests (kernels/meshes.py)."""
    run = TRAINED_BY[how.implementation].forward

    def forward(rows, weights):
        return run(*rows, weights, **how.arguments()), ()

    return meshes.over_requests(how.axes, forward, (query, keys, values), weights)[0]


def _mapped_forward(how, *arguments):
    return _mapped(how, *arguments), arguments


def _mapped_backward(how, arguments, dout):
    *rows, weights = arguments
    run = TRAINED_BY[how.implementation].backward

    def backward(requests, weights):
        rows, dout = requests
        *gradients, dweights = run(*rows, weights, dout, **how.arguments())
        return gradients, dweights

    gradients, dweights = meshes.over_requests(how.axes, backward, (rows, dout), weights)
    return jax.tree.map(lambda x, g: g.astype(x.dtype), arguments, (*gradients, dweights))


_mapped.defvjp(_mapped_forward, _mapped_backward)


def _refusals(query) -> dict[str, str]:
    """What the kernels cannot do of what the XLA path can."""
    found = {name: kernel.refusal(query.shape[1], query.dtype) for name, kernel in KERNELS.items()}
    return {name: reason for name, reason in found.items() if reason}


def _check(query, memory, weights, form, tiling, slope):
    if form not in FORMS or tiling not in TILINGS:
        raise ValueError(
            f"{OP}: form must be one of {FORMS} and tiling one of {TILINGS}, got {form!r} and "
            f"{tiling!r}"
        )
    if slope < 0:
        raise ValueError(f"{OP}: slope must be 0 or more, got {slope}")
    if query.ndim != 3 or memory.keys.ndim != 3 or weights.of_query.ndim != 2:
        raise ValueError(
            f"{OP}: query, keys and values need 3 axes and W1 2, got {query.shape}, "
            f"{memory.keys.shape} and {weights.of_query.shape}"
        )
    batch, _, width = query.shape
    rows, hidden = memory.keys.shape[1], weights.of_query.shape[1]
    wanted = {
        "keys": (memory.keys, (batch, rows, width)),
        "values": (memory.values, (batch, rows, width)),
        "total": (memory.total, (batch, width)),
        "W1": (weights.of_query, (width, hidden)),
        "W2": (weights.of_key, (width, hidden)),
        "W3": (weights.of_product, (width, hidden)),
        "W_o": (weights.out, (hidden,)),
    }
    for name, (x, expected) in wanted.items():
        if x.shape != expected:
            raise ValueError(
                f"{OP}: {name} must be {expected} for query {query.shape}, got {x.shape}"
            )
    dtypes = {x.dtype for x in (query, memory.keys, memory.values)}
    if len(dtypes) > 1 or not jnp.issubdtype(query.dtype, jnp.floating):
        raise ValueError(
            f"{OP}: query, keys and values must share a dtype, a float, got {query.dtype}, "
            f"{memory.keys.dtype} and {memory.values.dtype}"
        )
