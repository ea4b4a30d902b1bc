"""LREA's low-rank history: W_comp, W_decomp, the two paths, and when they agree.

E_s [L, d] holds the behaviours as rows, most recent last. W_c [L, r] and W_d [r, L] are learned,
shared by all users and tied to positions: row l of W_c belongs to the behaviour l from the end
whatever the length of the history, and padding (exact zero rows) contributes nothing.

    C     = W_c^T E_s = E_comp^T   [r, d]    eq. 4
    E_hat = W_d^T C                [L, d]    eq. 4, E_s^LREA
    E_aux^T = W_d E_s              [r, d]    3.1, after eq. 9

  training_path = "decompressed": score E_hat, sum E_s; what the paper trains (eq. 5).
  training_path = "absorbed": score C, sum E_aux; what it serves (eq. 9), trained directly.

Where the paper's equations disagree (docs/lrea.md has the long form):
  - The two sides of eq. 5 are different functions; `form` chooses one. Eq. 8 belongs to the right
    side (split), eq. 9 is written on the left one (joint).
  - Eq. 9 prints W_comp^T where shapes need E_comp^T = C.
  - Eq. 6, phi(A B) = A phi(B), holds only where `absorption_error` is 0; the penalty of eq. 10 is
    on the signs of W_d and C, while the condition is on those of C W2 + ...
  - The joint form needs sum_k W_d[k, l] = 1 as well, which the paper never says.

Axis letters: B requests, L history, r rank, d model width.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kernels.absorbed_target_attention import Memory

PATHS = ("decompressed", "absorbed")
PARAMETRISATIONS = ("free", "stochastic")
STARTS = ("segments", "normal")
PENALTIES = ("sum", "mean")
INSIDE = 0.9  # mass that a softmax column starts with on its own segment


class LowRank(nn.Module):
    """W_comp and W_decomp as the long part of ctr_jax.long_short.

    Attributes:
      length: L, of the matrices; longer histories lose their oldest behaviours.
      rank: r.
      path: which rows candidates attend to, "decompressed" or "absorbed".
      parametrisation: "free": the entries are the parameters. "stochastic": softmax of the
        parameters over the rows of each column, so both matrices are non-negative and every column
        sums to 1 (W_c: over positions; W_d: over ranks, which is what the joint form needs).
      start: "segments": rank k starts as the mean of the k-th of r equal parts of the history, and
        back, with a little noise; "normal": N(0, 1 / rows) entries, or N(0, 1) under the softmax.
      penalty: "sum" prints eq. 10; "mean" divides its terms by r L and r d, so that lambda means
        the same at every size.
    """

    length: int
    rank: int
    path: str = "decompressed"
    parametrisation: str = "free"
    start: str = "segments"
    penalty: str = "sum"

    def setup(self):
        shapes = (self.length, self.rank), (self.rank, self.length)
        self.comp, self.decomp = (
            self.param(name, _initialiser(self.parametrisation, self.start, name), shape)
            for name, shape in zip(("w_comp", "w_decomp"), shapes, strict=True)
        )

    def matrices(self, n: int | None = None) -> tuple[jax.Array, jax.Array]:
        """(W_c [n, r], W_d [r, n]) of the n most recent positions; all L by default."""
        comp, decomp = self.comp, self.decomp
        if self.parametrisation == "stochastic":
            comp, decomp = jax.nn.softmax(comp, 0), jax.nn.softmax(decomp, 0)
        first = 0 if n is None else self.length - n
        return comp[first:], decomp[:, first:]

    def memory(self, tokens: jax.Array, path: str | None = None) -> Memory:
        """tokens [B, n, d], right-aligned, zero at padding -> Memory of min(n, L) or r rows."""
        tokens = self._most_recent(tokens)
        comp, decomp = self.matrices(tokens.shape[1])
        total = tokens.sum(1)
        compressed = jnp.einsum("lr,bld->brd", comp, tokens)
        if (path or self.path) == "absorbed":
            return Memory(compressed, jnp.einsum("rl,bld->brd", decomp, tokens), total)
        return Memory(jnp.einsum("rl,brd->bld", decomp, compressed), tokens, total)

    def losses(self, tokens: jax.Array, rows: jax.Array) -> dict[str, jax.Array]:
        """{"non_negativity": eq. 10}, its second term averaged over the requests in `rows` [B].

        ||max(0, -W_d^T)||^2 + mean_b ||max(0, -W_c^T E_s)||^2, sums of squares.
        """
        tokens = self._most_recent(tokens)
        comp, _ = self.matrices(tokens.shape[1])
        compressed = jnp.einsum("lr,bld->brd", comp, tokens)
        exact = jnp.promote_types(tokens.dtype, jnp.float32)  # losses stay float32
        compressed, decomp = compressed.astype(exact), self.matrices()[1].astype(exact)
        of_matrix = jnp.sum(jnp.square(jnp.maximum(0, -decomp)))
        of_rows = jnp.sum(jnp.square(jnp.maximum(0, -compressed)), (1, 2))
        of_rows = jnp.sum(jnp.where(rows, of_rows, 0)) / jnp.maximum(jnp.sum(rows), 1)
        if self.penalty == "mean":
            of_matrix = of_matrix / (self.rank * self.length)
            of_rows = of_rows / (self.rank * tokens.shape[-1])
        return {"non_negativity": of_matrix + of_rows}

    def _most_recent(self, tokens: jax.Array) -> jax.Array:
        return tokens[:, max(tokens.shape[1] - self.length, 0) :]


def _initialiser(parametrisation: str, start: str, name: str):
    """(rng, shape, dtype) -> the parameter of W_c [L, r] or W_d [r, L]."""

    def make(rng, shape, dtype=jnp.float32):
        noise = jax.random.normal(rng, shape, dtype)
        rows = shape[0]
        if start == "normal":
            return noise if parametrisation == "stochastic" else noise * rows**-0.5
        length, rank = shape if name == "w_comp" else shape[::-1]
        own = np.arange(length)[:, None] * rank // length == np.arange(rank)  # [L, r]
        if name == "w_decomp":
            own = own.T
        size = np.maximum(own.sum(0), 1)  # rows of each column's segment
        if parametrisation == "free":
            return jnp.asarray(own / size, dtype) + 0.1 / rows * noise
        # softmax gives INSIDE to the segment, the rest to the other rows.
        outside = np.maximum(rows - size, 1)
        gain = np.log(INSIDE * outside / ((1 - INSIDE) * size))
        return jnp.asarray(np.where(own, gain, 0), dtype) + 0.1 * noise

    return make


def absorption_error(a: jax.Array, x: jax.Array, slope: float) -> jax.Array:
    """phi(A X) - A phi(X) in closed form: what eq. 6 neglects, entry by entry.

    For A >= 0 it is -(1 - slope) min(P, N), with P = A max(X, 0) and N = A max(-X, 0): zero where,
    and only where, each column of X has one sign on the support of each row of A, or slope = 1.
    In general it is (1 - slope) / 2 (|A X| - A |X|).

    Args:
      a: [L, r], W_d^T.
      x: [r, h], the pre-activation, such as C W2.
    Returns:
      [L, h].
    """
    return (1 - slope) / 2 * (jnp.abs(a @ x) - a @ jnp.abs(x))


def check(length: int, rank: int, **switches: str) -> None:
    """Raises ValueError for a switch or size that does not exist."""
    allowed = dict(path=PATHS, parametrisation=PARAMETRISATIONS, start=STARTS, penalty=PENALTIES)
    for name, value in switches.items():
        if value not in allowed[name]:
            raise ValueError(f"{name} must be one of {allowed[name]}, got {value!r}")
    if not 1 <= rank <= length:
        raise ValueError(f"rank must lie between 1 and long_length {length}, got {rank}")


def counted_flops(
    length: int, rank: int, width: int, hidden: int, candidates: int, what: str
) -> dict[str, int]:
    """Multiplications and additions of the long branch, two per product term.

    Args:
      what: "full" (DIN-long), "decompressed" or "absorbed".
    Returns:
      {"per_history": once per user (refresh), "per_request": once per request and history,
      "per_candidate": for each of `candidates`, "request": the last two for all candidates}.

    Table 1 prints O(BLrd) for training. W_d^T C does not depend on the candidate, so it costs
    O(Lrd) once and each candidate O(Ldh): O(Lrd + BLdh). Serving, which it prints as O(Brd), is
    O(Brdh); h is missing from all of its rows.
    """
    rows = rank if what == "absorbed" else length
    projections = 0 if what == "full" else 2 * 2 * length * rank * width
    # e W2 once per row; then per candidate and row (W1 + diag(e) W3) t, phi, W_o, and the sum.
    per_request = 2 * rows * width * hidden
    per_candidate = rows * (2 * width * hidden + 5 * hidden + 2 * width)
    return {
        "per_history": projections,
        "per_request": per_request,
        "per_candidate": per_candidate,
        "request": per_request + candidates * per_candidate,
    }


def cache_floats(rank: int, width: int, form: str) -> int:
    """Numbers kept per user for the long branch: C and E_aux, and sum_l e_l for the split form."""
    return 2 * rank * width + (width if form == "split" else 0)


def table_1(length: int, rank: int, width: int, candidates: int) -> dict[str, int]:
    """Table 1's serving column without its O(): {"DIN": B L d, "LREA": B r d}."""
    return {"DIN": candidates * length * width, "LREA": candidates * rank * width}
