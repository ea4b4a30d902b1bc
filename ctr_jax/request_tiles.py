"""A function of requests, a few of them at a time.

Requests do not see each other, so what a few need fits a cache, and memory does not grow with the
batch. `in_tiles` gives results, and makes anew what the backward pass needs of a tile;
`loss_in_tiles`, of a function that ends at the loss, makes gradients with it, and nothing twice. On
a mesh every device goes through its own requests, and the gradients of what all requests share are
summed over the devices once, not for every tile (kernels/meshes.py).

Axis letter: B requests.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels import dispatch, meshes
from kernels.request_groups import cut, size_of_groups, whole


def in_tiles(
    function: Callable[[Any, Any, Any], Any], requests: Any, fixed: Any, shared: Any, most: int
) -> Any:
    """`function(requests, fixed, shared)`, at most `most` requests at a time.

    Args:
      function: closes over no arrays; (requests [b, ...], fixed [b, ...], shared) -> [b, ...] for
        any b. A request of zeros, with zeros in `fixed`, has to be harmless: groups are filled up.
      requests: a tree of [B, ...], which gradients go to.
      fixed: a tree of [B, ...] without gradients, such as masks.
      shared: a tree with gradients that is the same for all requests, such as weights.
    Returns:
      A tree of [B, ...].
    """
    b = len(jax.tree.leaves(requests)[0])
    if most >= b or not dispatch.requests_are_local(b):
        return function(requests, fixed, shared)
    how = _How(function, dispatch.request_axes(), max(1, most))
    return _tiled(how, requests, fixed, shared)


def loss_in_tiles(
    function: Callable[[Any, Any, Any], jax.Array],
    requests: Any,
    fixed: Any,
    shared: Any,
    most: int,
) -> jax.Array:
    """The sum of the scalars that `function` gives of at most `most` requests at a time.

    Arguments are those of `in_tiles`, but that what groups are filled up with has to add 0. What
    the whole batch's loss is divided by belongs into `shared`.
    """
    b = len(jax.tree.leaves(requests)[0])
    if not dispatch.requests_are_local(b):
        return function(requests, fixed, shared)
    how = _How(function, dispatch.request_axes(), max(1, most))
    return _summed(how, requests, fixed, shared)


@dataclasses.dataclass(frozen=True)
class _How:
    function: Callable
    axes: tuple[str, ...]
    most: int


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tiled(how, requests, fixed, shared):
    def forward(inputs, shared):
        requests, fixed = inputs
        b = len(jax.tree.leaves(requests)[0])
        groups = cut((requests, fixed), size_of_groups(b, how.most))
        out = jax.lax.map(lambda x: how.function(*x, shared), groups)
        return whole(out, b), ()

    return meshes.over_requests(how.axes, forward, (requests, fixed), shared)[0]


def _tiled_forward(how, *arguments):
    return _tiled(how, *arguments), arguments


def _tiled_backward(how, arguments, dout):
    def backward(inputs, shared):
        requests, fixed, dout = inputs
        b = len(jax.tree.leaves(requests)[0])

        def step(dshared, tile):
            requests, fixed, dout = tile
            back = jax.vjp(lambda x, y: how.function(x, fixed, y), requests, shared)[1]
            drequests, dshared_here = back(dout)
            return jax.tree.map(jnp.add, dshared, dshared_here), drequests

        groups = cut((requests, fixed, dout), size_of_groups(b, how.most))
        dshared, drequests = jax.lax.scan(step, _no_sums(shared), groups)
        return whole(drequests, b), dshared

    requests, fixed, shared = arguments
    drequests, dshared = meshes.over_requests(how.axes, backward, (requests, fixed, dout), shared)
    dshared = jax.tree.map(lambda x, g: g.astype(x.dtype), shared, dshared)
    return drequests, jax.tree.map(lambda x: None, fixed), dshared


_tiled.defvjp(_tiled_forward, _tiled_backward)


def _no_sums(shared):
    """Of sums over many tiles: in float32 at least, whatever the weights were rounded to."""
    return jax.tree.map(
        lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), shared
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(how, requests, fixed, shared):
    def forward(inputs, shared):
        groups = cut(inputs, size_of_groups(len(jax.tree.leaves(inputs)[0]), how.most))
        return (), jnp.sum(jax.lax.map(lambda x: how.function(*x, shared), groups))

    return meshes.over_requests(how.axes, forward, (requests, fixed), shared)[1]


def _summed_forward(how, requests, fixed, shared):
    def forward(inputs, shared):
        b = len(jax.tree.leaves(inputs)[0])

        def step(sums, tile):
            with_gradients = jax.value_and_grad(how.function, (0, 2))
            loss, (drequests, dshared) = with_gradients(*tile, shared)
            return jax.tree.map(jnp.add, sums, (loss, dshared)), drequests

        groups = cut(inputs, size_of_groups(b, how.most))
        loss = jax.eval_shape(
            lambda x: how.function(*jax.tree.map(lambda y: y[0], x), shared), groups
        )
        start = _no_sums((loss, shared))
        sums, drequests = jax.lax.scan(step, start, groups)
        return whole(drequests, b), sums

    drequests, (loss, dshared) = meshes.over_requests(how.axes, forward, (requests, fixed), shared)
    dshared = jax.tree.map(lambda x, g: g.astype(x.dtype), shared, dshared)
    return loss, (drequests, jax.tree.map(lambda x: None, fixed), dshared)


def _summed_backward(how, gradients, dloss):
    return jax.tree.map(lambda g: (dloss * g).astype(g.dtype), gradients)


_summed.defvjp(_summed_forward, _summed_backward)
