"""Behaviours as tokens: the vectors of their columns side by side, times one matrix.

Where an EmbeddedBatch holds a column as the rows of its table and the places in them, the rows are
projected and then read: one product for each row of a small table, not for each behaviour, and the
vectors of the behaviours are never made (embedding.py says when).

Axis letters: B requests, L history, V rows, w width of a column, d model width.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ctr_jax.batch import EmbeddedBatch
from ctr_jax.embedding import sum_of_rows
from ctr_jax.layers import token_product
from kernels.softmax import accumulation_dtype


class BehaviourToken(nn.Module):
    """x W + b for the behaviours of a batch; parameters as of nn.Dense.

    Attributes:
      width: d.
      keys: of the columns, in the order of W's rows.
      use_bias: padding's token is b, or exactly zero without it.
    """

    width: int
    keys: tuple[str, ...]
    use_bias: bool = False

    @nn.compact
    def __call__(self, embedded: EmbeddedBatch, mask: jax.Array | None = None) -> jax.Array:
        """EmbeddedBatch -> [B, L, d], in the type of its vectors.

        mask: [B, L] bool; where it is not set the token is b (without a bias exactly zero),
          whatever stands in the columns.
        """
        found = {k: embedded.rows.get(k, embedded.vectors.get(k)) for k in self.keys}
        widths = [x.shape[-1] for x in found.values()]
        dtype = jnp.result_type(*found.values())
        init = nn.initializers.lecun_normal()
        kernel = self.param("kernel", init, (sum(widths), self.width)).astype(dtype)
        parts = dict(zip(self.keys, jnp.split(kernel, np.cumsum(widths)[:-1]), strict=True))

        terms = []
        direct = [key for key in self.keys if key not in embedded.rows]
        if direct:
            vectors = jnp.concatenate([found[key] for key in direct], -1)
            term = token_product(vectors, jnp.concatenate([parts[key] for key in direct]))
            terms.append(term if mask is None else jnp.where(mask[..., None], term, 0))
        projected = {
            key: jnp.matmul(rows, parts[key], preferred_element_type=accumulation_dtype(rows.dtype))
            for key, rows in found.items()
            if key in embedded.rows
        }
        bias = None
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.width,)).astype(dtype)
        if projected:
            slots = {key: embedded.slots[key] for key in projected}
            if mask is not None:  # to a slot past the end
                slots = {k: jnp.where(mask, x, len(projected[k])) for k, x in slots.items()}
            terms.append(sum_of_rows(projected, slots, bias))
        elif self.use_bias:
            terms.append(bias)
        return sum(terms[1:], start=terms[0]).astype(dtype)
