"""Layers that several models use. Norms and softmax compute in float32 whatever the activations.

Axis letters: B requests, L history, d model width, H heads, K head width.
"""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels.softmax import accumulation_dtype

ACTIVATIONS = {"relu": nn.relu, "swish": nn.swish, "gelu": nn.gelu, "tanh": jnp.tanh}

WEIGHT_PARTS = 8


@jax.custom_vjp
def _token_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return x @ kernel


def _token_product_forward(x, kernel):
    return x @ kernel, (x, kernel)


def _token_product_backward(residuals, g):
    x, kernel = residuals
    rows, cols = (a.reshape(WEIGHT_PARTS, -1, a.shape[-1]) for a in (x, g))
    # A sum of partial products: as one product, XLA on a CPU transposes the long operand first,
    # together with the elementwise work before it, at a cost above that of the product.
    parts = jnp.einsum(
        "pni,pno->pio", rows, cols, preferred_element_type=accumulation_dtype(x.dtype)
    )
    return g @ kernel.T, parts.sum(0).astype(kernel.dtype)


_token_product.defvjp(_token_product_forward, _token_product_backward)


def token_dot_general(x, kernel, dimension_numbers, precision=None, **kwargs):
    """`dot_general` for nn.Dense over many tokens: [B, L, i] x [i, o], a faster kernel gradient.

    Falls back to lax.dot_general for other shapes; values are those of lax.dot_general.
    """
    plain = dimension_numbers == (((x.ndim - 1,), (0,)), ((), ()))
    tokens = x.size // x.shape[-1] if x.ndim == 3 else 0
    if plain and precision is None and not kwargs and tokens and tokens % WEIGHT_PARTS == 0:
        return _token_product(x, kernel)
    return jax.lax.dot_general(x, kernel, dimension_numbers, precision=precision, **kwargs)


def token_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """[B, L, i] x [i, o] -> [B, L, o], by `token_dot_general`."""
    return token_dot_general(x, kernel, (((2,), (0,)), ((), ())))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * scale over the last axis (Zhang & Sennrich 2019).

    Attributes:
      eps: added to the mean square, or to its root where `eps_outside_root` (SUAN's habit).
      dtype: of the result, x's where None; the mean square is taken in float32.
    """

    eps: float = 1e-6
    eps_outside_root: bool = False
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x32 = x.astype(accumulation_dtype(x.dtype))
        square = jnp.mean(x32 * x32, -1, keepdims=True)
        if self.eps_outside_root:
            # The inner where keeps d sqrt(0) out of the gradient of an all-zero row.
            root = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
            inverse = 1 / (root + self.eps)
        else:
            inverse = jax.lax.rsqrt(square + self.eps)
        return (x32 * inverse * scale).astype(self.dtype or x.dtype)


class SwiGLU(nn.Module):
    """(swish(x W1) * (x W2)) W3 (SparseCTR eq. 2; Shazeer 2020).

    Attributes:
      hidden: width of W1 and W2.
      use_bias: the paper writes none; SUAN has them.
    """

    hidden: int
    use_bias: bool = False
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., d] -> [..., d]."""

        def dense(width: int, name: str) -> nn.Dense:
            return nn.Dense(
                width,
                use_bias=self.use_bias,
                dtype=self.dtype,
                dot_general=token_dot_general,
                name=name,
            )

        gate = nn.swish(dense(self.hidden, "w1")(x)) * dense(self.hidden, "w2")(x)
        return dense(x.shape[-1], "w3")(gate)


class MLP(nn.Module):
    """Dense layers of the given widths, `activation` between them and none after the last."""

    widths: Sequence[int]
    activation: str = "relu"
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., d] -> [..., widths[-1]]."""
        for i, width in enumerate(self.widths):
            if i:
                x = ACTIVATIONS[self.activation](x)
            x = nn.Dense(width, dtype=self.dtype, name=f"dense_{i}")(x)
        return x


def dropped(rate: float, seeds: jax.Array | None, place: int, x: jax.Array) -> jax.Array:
    """Dropout in which every row draws for itself: what it drops depends on its seed alone, not on
    what goes through together with it.

    Args:
      rate: share of entries that become 0; the others are divided by 1 - rate.
      seeds: [N] uint32; None drops nothing.
      place: a number for each of the places where a model drops, so that none draws as another.
      x: [N, ...].
    """
    if seeds is None:
        return x

    def kept(seed: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), place)
        return jax.random.bernoulli(key, 1 - rate, x.shape[1:])

    return jnp.where(jax.vmap(kept)(seeds), x / (1 - rate), 0)


def check_dropout(rate: float) -> None:
    """Raises ValueError unless `rate` is a share that leaves something."""
    if not 0 <= rate < 1:
        raise ValueError(f"dropout must be in [0, 1), got {rate}")
