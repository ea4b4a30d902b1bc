"""RelTemporal: relative time, hour and weekend biases of attention logits (SparseCTR 3.5).

bias(i, j, h) = -(floor(log2 D) s1_h + sin(pi hours(D) / 24) s2_h + 1[W_i != W_j] s3_h) with
D = |t_i - t_j| seconds (eqs. 12-15). The factors of the slopes ("terms") depend on times only:
they are computed once per (query, key) pair and shared by all heads.

Differences are int32: right below 2^31 s (68 years), as between any two times from 1970 to 2038.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp


def floor_log2(x: jax.Array) -> jax.Array:
    """floor(log2(max(x, 1))) of int32 by its bit length, exact at powers of two (eq. 12)."""
    return 31 - jax.lax.clz(jnp.maximum(x, 1))


def half_sine(hours: jax.Array, dtype=jnp.float32) -> jax.Array:
    """sin(pi h / 24) for integer h in 0..24 (eq. 13), exactly symmetric under h -> 24 - h.

    Taylor's cosine about h = 12 to rounding error: no table look-up and no libm call per pair.
    """
    u = (hours - 12).astype(dtype)
    u = u * u
    degree = 11 if dtype == jnp.float64 else 6
    result = jnp.zeros_like(u)
    for n in range(degree, -1, -1):
        result = result * u + dtype((-1) ** n * (math.pi / 24) ** (2 * n) / math.factorial(2 * n))
    return result


@dataclasses.dataclass(frozen=True)
class RelTemporal:
    """Which parts of the bias are on, and how they read the clock.

    Attributes:
      time, hour, weekend: parts that are on (ablations B2, B3, B4; all off is B1).
      timezone_hours: local time minus UTC, for weekend and for the clock form of the hour.
      hour_form: "delta", floor(D / 3600) mod 24 (eq. 13); "clock", the difference between the
        hours of day of the two times (the paper's prose). They differ by at most an hour.
      bucket: "log2", floor(log2(max(D, 1))) exactly; "suan", int(ln(max(D, 1)) / 0.301).
    """

    time: bool = True
    hour: bool = True
    weekend: bool = True
    timezone_hours: float = 8.0
    hour_form: str = "delta"
    bucket: str = "log2"

    def __post_init__(self):
        if self.hour_form not in ("delta", "clock"):
            raise ValueError(f"hour_form must be 'delta' or 'clock', got {self.hour_form!r}")
        if self.bucket not in ("log2", "suan"):
            raise ValueError(f"time_bucket must be 'log2' or 'suan', got {self.bucket!r}")

    @property
    def parts(self) -> tuple[int, ...]:
        """Rows of the slopes [3, H] that are in use."""
        return tuple(i for i, on in enumerate((self.time, self.hour, self.weekend)) if on)

    def clock(self, time: jax.Array) -> tuple[jax.Array, ...]:
        """What `terms` needs of each time, four int32 arrays of the shape of `time`, int32 seconds:
        the time; its hour (since the epoch mod 24, or of the local day for the clock form); its
        second within the hour; whether it falls on a weekend.

        The divisions by hours and days are done here, once per time and not once per pair. Not one
        array: XLA on a CPU makes no vector loop of terms that read rows of a slice of it.
        """
        hours = time // 3600
        hour = hours % 24 if self.hour_form == "delta" else self.hour_of_day(time)
        weekend = self.is_weekend(time).astype(jnp.int32)
        return time, hour, time - hours * 3600, weekend

    def terms(self, query, key, dtype=jnp.float32, hour_term=half_sine) -> list[jax.Array]:
        """The factors of the slopes in use: elementwise, so that kernels call it too.

        Args:
          query, key: a clock each, in shapes that broadcast together.
          hour_term: what takes `half_sine`'s arguments, for a target with a better one.
        """
        t_i, hour_i, second_i, weekend_i = query
        t_j, hour_j, second_j, weekend_j = key
        out = []
        if self.time:
            # int32 before any cast: float32 has steps of 128 s at today's seconds.
            out.append(self._bucket(jnp.abs(t_i - t_j)).astype(dtype))
        if self.hour:
            hours = hour_i - hour_j
            if self.hour_form == "delta":
                # floor(|t_i - t_j| / 3600) mod 24, from t = 3600 hour + second. mod 24 is left
                # out: a negative h stands for h + 24, whose half sine is that of |h|.
                late = hours - (second_i < second_j)
                hours = jnp.where(t_i >= t_j, late, hours + (second_j < second_i))
            out.append(hour_term(jnp.abs(hours), dtype))
        if self.weekend:
            out.append((weekend_i != weekend_j).astype(dtype))
        return out

    def _bucket(self, distance: jax.Array) -> jax.Array:
        if self.bucket == "log2":
            return floor_log2(distance)
        return jnp.floor(jnp.log(jnp.maximum(distance, 1).astype(jnp.float32)) / 0.301)

    def pair_terms(self, t_i: jax.Array, t_j: jax.Array, dtype=jnp.float32) -> list[jax.Array]:
        """`terms` of int32 seconds [B, ...] whose shapes broadcast together."""
        return self.terms(self.clock(t_i), self.clock(t_j), dtype)

    def hour_of_day(self, time: jax.Array) -> jax.Array:
        """int32 local hour, 0..23."""
        return (self._local_minutes(time) // 60) % 24

    def is_weekend(self, time: jax.Array) -> jax.Array:
        """bool, Saturday or Sunday in local time."""
        day = (self._local_minutes(time) // 1440 + 4) % 7  # 1970-01-01, day 0, was a Thursday
        return (day == 0) | (day == 6)

    def _local_minutes(self, time: jax.Array) -> jax.Array:
        # Minutes, so that the shift by the time zone cannot overflow int32 near 2038.
        return time // 60 + round(self.timezone_hours * 60)
