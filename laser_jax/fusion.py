"""Multi-resolution fusion: global context, salient and recent segments, target and profile.

The paper's summary names global context, salient signals and recency; a reading note: max pooling
over segments, the r most recent segments, RankMixer. Decided here: r = 4, T = 8 tokens

    [u_M; max_j z_j; z_{S-r+1} .. z_S; target; profile tokens to fill T]

and RankMixer blocks (Zhu et al., arXiv 2507.15551), averaged over tokens:

    S = LN(TokenMix(X) + X);  X' = LN(PFFN(S) + S)

TokenMix cuts each of T tokens into T slices and gives the t-th slices of all to token t; PFFN is an
MLP of its own for each token.

Axis letters: B requests, C candidates, S segments, T tokens, r recent segments, d model width.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

KINDS = ("rankmixer", "mlp", "none")


def token_mix(x: jax.Array) -> jax.Array:
    """[T, ..., d] -> [T, ..., d]; d is a multiple of T. Its own inverse."""
    t, *middle, d = x.shape
    return jnp.swapaxes(x.reshape(t, *middle, t, d // t), 0, -2).reshape(x.shape)


@jax.custom_vjp
def masked_max(segments: jax.Array, mask: jax.Array) -> jax.Array:
    """Max pooling over the segments that hold something: [B, C, S, d], [B, S] -> [B, C, d]; none
    gives 0."""
    seen = mask[:, None, :, None]
    largest = jnp.max(jnp.where(seen, segments, -jnp.inf), 2)
    return jnp.where(mask.any(1)[:, None, None], largest, 0)


def _masked_max_backward(saved, cotangent):
    # By position: the gradient of max looks for the entries that equal it, and finds none where the
    # compiler computed them twice with different rounding.
    segments, mask = saved
    seen = mask[:, None, :, None]
    where = jnp.argmax(jnp.where(seen, segments, -jnp.inf), 2)
    chosen = seen & (where[:, :, None] == jnp.arange(segments.shape[2])[:, None])
    return jnp.where(chosen, cotangent[:, :, None], 0).astype(segments.dtype), None


masked_max.defvjp(lambda *args: (masked_max(*args), args), _masked_max_backward)


@jax.custom_vjp
def per_token_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """[T, n, i] x [T, i, o] -> [T, n, o]: a matrix for each token."""
    return jnp.einsum("tni,tio->tno", x, kernel)


def _per_token_backward(saved, g):
    # As the kernel lies: JAX's own gradient makes it transposed, and XLA on a CPU copies that.
    x, kernel = saved
    dx, dkernel = jnp.einsum("tno,tio->tni", g, kernel), jnp.einsum("tni,tno->tio", x, g)
    return dx.astype(x.dtype), dkernel.astype(kernel.dtype)


per_token_product.defvjp(lambda *args: (per_token_product(*args), args), _per_token_backward)


class RankMixerBlock(nn.Module):
    """One block; `multiplier` is the hidden width of each token's MLP over d."""

    multiplier: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[T, ..., d] -> [T, ..., d]: tokens lead, so that their MLPs are one product each."""
        t, d = x.shape[0], x.shape[-1]
        init = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform", batch_axis=0)
        x = nn.LayerNorm(name="mix_norm")(token_mix(x) + x)
        hidden = self._per_token(x, "in", init, (t, d, self.multiplier * d))
        out = self._per_token(nn.gelu(hidden), "out", init, (t, self.multiplier * d, d))
        return nn.LayerNorm(name="ffn_norm")(out + x)

    def _per_token(self, x, name, init, shape):
        kernel = self.param(f"{name}_kernel", init, shape)
        bias = self.param(f"{name}_bias", nn.initializers.zeros, (shape[0], shape[2]))
        rows = per_token_product(x.reshape(shape[0], -1, shape[1]), kernel)
        return (rows + bias[:, None]).reshape(*x.shape[:-1], shape[2])


class Fusion(nn.Module):
    """Tokens and what fuses them.

    Attributes:
      kind: one of KINDS; "none" is the refined target alone (ablation).
      num_tokens: T, at least recent + 4. recent: r.
      num_blocks, multiplier: of RankMixer.
    """

    kind: str = "rankmixer"
    num_tokens: int = 8
    recent: int = 4
    num_blocks: int = 2
    multiplier: int = 1

    @nn.compact
    def __call__(
        self,
        refined: jax.Array,
        segments: jax.Array,
        mask: jax.Array,
        candidates: jax.Array,
        profile: jax.Array,
    ) -> jax.Array:
        """refined u_M and candidates [B, C, d], segments [B, C, S, d], mask [B, S] bool, profile
        [B, p] -> [B, C, d]."""
        if self.kind == "none":
            return refined
        x = self.tokens(refined, segments, mask, candidates, profile)
        if self.kind == "mlp":
            d = refined.shape[-1]
            joined = jnp.moveaxis(x, 0, 2).reshape(*refined.shape[:2], -1)
            hidden = nn.gelu(nn.Dense(2 * d, name="mlp_in")(joined))
            return nn.Dense(d, name="mlp_out")(hidden)
        for i in range(self.num_blocks):
            x = RankMixerBlock(self.multiplier, name=f"block_{i}")(x)
        return x.mean(0)

    def tokens(self, refined, segments, mask, candidates, profile) -> jax.Array:
        """[T, B, C, d]; the slots of segments that hold nothing are zero."""
        b, c, s, d = segments.shape
        recent = jnp.where(mask[:, None, :, None], segments, 0)[:, :, max(s - self.recent, 0) :]
        recent = jnp.pad(recent, ((0, 0), (0, 0), (self.recent - recent.shape[2], 0), (0, 0)))
        free = self.num_tokens - self.recent - 3
        groups = nn.Dense(free * d, name="profile")(profile).reshape(b, 1, free, d)
        groups = jnp.broadcast_to(groups, (b, c, free, d))
        of_one = jnp.stack([refined, masked_max(segments, mask), candidates])
        return jnp.concatenate(
            [of_one[:2], jnp.moveaxis(recent, 2, 0), of_one[2:], jnp.moveaxis(groups, 2, 0)]
        )
