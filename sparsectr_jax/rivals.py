"""What stands in EvoAttention's place: full attention (A1) and the attentions of 4.4.1.

Each is given the block's projections and gives what W_O is applied to; none has the user key, the
chunks or the fusion gate. The last block forms no queries of behaviours, and with "dilated" no keys
that a candidate does not see.

Axis letters: B requests, C candidates, L history, d model width, H heads, K head width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from sparsectr_jax import dilated_attention
from sparsectr_jax.encodings import Encoding, check_length
from sparsectr_jax.evo_attention import History
from sparsectr_jax.full_attention import full_attention
from sparsectr_jax.kernel_attention import KernelAttention
from sparsectr_jax.native_sparse_attention import BRANCHES, NativeSparseAttention, NSASpec

ATTENTIONS = ("evo", "full", "dilated", "nsa", "kernel")
Pair = tuple[jax.Array | None, jax.Array]


def check(config: ConfigDict) -> None:
    """Raises ValueError where config.attention does not exist, its sizes do not fit, or a switch of
    EvoAttention would do nothing."""
    if config.attention not in ATTENTIONS:
        raise ValueError(f"attention must be one of {ATTENTIONS}, got {config.attention!r}")
    if config.attention != "evo":
        for branch in ("use_global", "use_transition", "use_local"):
            if not config[branch]:
                raise ValueError(
                    f"{branch}=False takes a branch from EvoAttention; attention="
                    f"{config.attention!r} has none"
                )
    if config.attention == "dilated" and config.dilated_stride < 1:
        raise ValueError(f"dilated_stride must be >= 1, got {config.dilated_stride}")
    if config.attention == "kernel" and config.kernel_rows < 1:
        raise ValueError(f"kernel_rows must be >= 1, got {config.kernel_rows}")
    if config.attention == "nsa":
        nsa_spec(config, None)


def projections(config: ConfigDict) -> tuple[str, ...]:
    """Names of the projections that make keys and values."""
    if config.attention == "nsa":
        return tuple(f"{branch}_{of}" for branch in BRANCHES for of in ("key", "value"))
    return "key", "value"


def nsa_spec(config: ConfigDict, scale: float | None) -> NSASpec:
    """Raises ValueError where the sizes do not fit."""
    sizes = config.nsa_block, config.nsa_stride, config.nsa_top, config.local_window
    return NSASpec(*sizes, scale)


@dataclasses.dataclass
class Rival:
    """One layer's attention, called within the module that has its parameters.

    Attributes:
      scale: of the logits; None is K^-1/2.
      project: (one of `projections`, tokens [B, n, d]) -> [B, n, H, K].
    """

    config: ConfigDict
    scale: float | None
    project: Callable[[str, jax.Array], jax.Array]
    encoding: Encoding
    history: History
    dtype: jnp.dtype

    def __call__(self, queries: Pair, streams: Pair) -> Pair:
        """Of behaviours and candidates, [B, L, H, K] and [B, C, H, K].

        Args:
          queries: their queries in that form; None for the behaviours in the last block.
          streams: their normalised tokens [B, L, d], [B, C, d].
        Returns:
          What the queries find, as `queries`.
        Raises:
          ValueError: the history is longer than a table that has a row per behaviour.
        """
        return getattr(self, f"_{self.config.attention}")(queries, streams)

    def _keys(self, behaviours: jax.Array, of: str = "") -> tuple[jax.Array, jax.Array]:
        return self.project(of + "key", behaviours), self.project(of + "value", behaviours)

    def _full(self, queries, streams):
        times = self.history.times, self.history.mask, self.history.request_time
        how = *times, self.encoding, self.scale, queries[0] is not None
        return self._together(queries, lambda q: full_attention(q, *self._keys(streams[0]), *how))

    def _kernel(self, queries, streams):
        length = streams[0].shape[1]
        check_length(self.config, length)
        sizes = self.config.kernel_rows, self.config.length, self.scale
        attend = KernelAttention(*sizes, name="kernel")
        keys = self._keys(streams[0])
        return self._together(queries, lambda q: attend(q, *keys, self.history.mask))

    def _together(self, queries, attend) -> Pair:
        """Behaviours and candidates by one call."""
        q_b, q_c = queries
        if q_b is None:
            return None, attend(q_c)
        out = attend(jnp.concatenate([q_b, q_c], 1))
        return out[:, : q_b.shape[1]], out[:, q_b.shape[1] :]

    def _dilated(self, queries, streams):
        (q_b, q_c), (x_b, _) = queries, streams
        length = x_b.shape[1]  # beyond which neither reaches
        sizes = (
            min(self.config.local_window, length),
            min(self.config.dilated_stride, length + 1),
        )
        at = self.history, self.encoding
        rows = dilated_attention.candidate_rows(length, *sizes)
        if q_b is None:
            out_b, keys = None, self._keys(x_b[:, rows])
        else:
            k, v = self._keys(x_b)
            out_b = dilated_attention.behaviours(q_b, k, v, *at, *sizes, self.scale)
            keys = k[:, rows], v[:, rows]
        return out_b, dilated_attention.candidates(q_c, *keys, *at, rows, self.scale)

    def _nsa(self, queries, streams):
        spec = nsa_spec(self.config, self.scale)
        attend = NativeSparseAttention(spec, self.dtype, name="nsa")
        keys = {branch: self._keys(streams[0], f"{branch}_") for branch in BRANCHES}
        return attend(queries, streams, keys, self.history, self.encoding)
