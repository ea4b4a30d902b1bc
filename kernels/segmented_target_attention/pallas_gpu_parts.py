"""What the kernels for GPUs share: gates and their gradients, and how a kernel is started.

Axis letters: B requests, C candidates, L history length.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

HIDDEN = -1e30  # a logit that is not visible


def gates_of(logits, visible, axis: int, softmax: bool):
    """Gates of logits, which a softmax takes along `axis`, and their derivative over them: what the
    gradient of a gate is multiplied with, beside the gate, to be that of its logit."""
    if not softmax:
        sigmoid = jax.nn.sigmoid(logits)
        return jnp.where(visible, sigmoid, 0.0), 1 - sigmoid
    logits = jnp.where(visible, logits, HIDDEN)
    peak = jnp.expand_dims(jnp.max(logits, axis), axis)
    weights = jnp.where(visible, jnp.exp(logits - peak), 0.0)
    total = jnp.sum(weights, axis)
    return weights / jnp.expand_dims(jnp.where(total > 0, total, 1.0), axis), 1.0


def gradient_of_logits(gates, slope, of_gates, axis: int, softmax: bool) -> jax.Array:
    """The gradient of the logits; gates and slope are those of gates_of."""
    if softmax:
        of_gates -= jnp.expand_dims(jnp.sum(gates * of_gates, axis), axis)
    return of_gates * gates * slope


def call(kernel, shape, grid, outputs, static, name: str, warps: int = 4):
    """The kernel, told of `shape`, as a function of arrays."""
    # The lowering, which a caller may start long after this line, warns that it will be replaced.
    warnings.filterwarnings("ignore", "The Pallas Triton backend", DeprecationWarning)
    return pl.pallas_call(
        functools.partial(kernel, shape=shape),
        grid=grid,
        out_shape=outputs,
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=2),
        interpret=static.interpret,
        name=f"segmented_target_attention_{name}",
    )


def like(*arrays) -> list[Any]:
    """Outputs of the shapes and dtypes of those arrays that are there."""
    return [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays if x is not None]
