"""What the kernels for GPUs share: sizes, gates and their gradients, how a kernel is started.

Axis letters: B requests, C candidates, L history length.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from kernels import triton
from kernels.segmented_target_attention.blocks import Static

HIDDEN = -1e30  # a logit that is not visible


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of the arguments, as every kernel knows them when it is traced."""

    candidates: int  # C
    segment: int  # w
    segments: int  # S
    heads: int
    value_heads: int
    key_width: int
    value_width: int
    tied: bool  # one head of keys, which are the values
    softmax: bool
    scale: float

    @property
    def sharing(self) -> int:
        """Heads per head of values."""
        return self.heads // self.value_heads


def sizes_of(static: Static, q, k, v) -> dict[str, Any]:
    """The fields of Sizes."""
    _, candidates, heads, key_width = q.shape
    length, value_heads, value_width = (k if v is None else v).shape[1:]
    return dict(
        candidates=candidates,
        segment=static.segment,
        segments=length // static.segment,
        heads=heads,
        value_heads=value_heads,
        key_width=key_width,
        value_width=value_width,
        tied=v is None,
        softmax=static.softmax,
        scale=static.scale,
    )


def gates_of(logits, visible, axis: int, softmax: bool):
    """Gates of logits, which a softmax takes along `axis`, and their derivative over them: what the
    gradient of a gate is multiplied with, beside the gate, to be that of its logit."""
    if not softmax:
        sigmoid = triton.sigmoid(logits)
        return jnp.where(visible, sigmoid, 0.0), 1 - sigmoid
    logits = jnp.where(visible, logits * triton.LOG2_E, HIDDEN)
    peak = jnp.expand_dims(jnp.max(logits, axis), axis)
    weights = jnp.where(visible, triton.exp2(logits - peak), 0.0)
    total = jnp.sum(weights, axis)
    return weights * jnp.expand_dims(1 / jnp.where(total > 0, total, 1.0), axis), 1.0


def gradient_of_logits(gates, slope, of_gates, axis: int, softmax: bool) -> jax.Array:
    """The gradient of the logits; gates and slope are those of gates_of."""
    if softmax:
        of_gates -= jnp.expand_dims(jnp.sum(gates * of_gates, axis), axis)
    return of_gates * gates * slope


def call(kernel, shape, grid, outputs, static, name: str, warps: int, stages: int):
    """The kernel, told of `shape`, as a function of arrays."""
    kernel = functools.partial(kernel, shape=shape)
    name = f"segmented_target_attention_{name}"
    return triton.call(kernel, outputs, name, static.interpret, warps, stages, grid=grid)


def like(*arrays) -> list[Any]:
    """Outputs of the shapes and dtypes of those arrays that are there."""
    return [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays if x is not None]
