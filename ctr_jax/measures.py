"""What measures of checkpoints decide: which is the best, which are kept.

`metrics` is {step: {split: {name: value}}}, of a workdir's metrics/<step>.json.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping


def steps_to_delete(
    steps: Collection[int],
    metrics: Mapping[int, Mapping],
    being_evaluated: Collection[int],
    *,
    keep_last: int,
    best_metric: str,
) -> list[int]:
    """The steps outside the last `keep_last`, the best measured one, and those being evaluated.

    While a step is not yet measured it may still turn out the best, but it is not held for that:
    an evaluator that lags far behind must not fill the disk.
    """
    steps = sorted(steps)
    keep = {*steps[-keep_last:], *being_evaluated, best_step(steps, metrics, best_metric)}
    return [s for s in steps if s not in keep]


def best_step(
    steps: Collection[int], metrics: Mapping[int, Mapping], best_metric: str
) -> int | None:
    """The step whose "split/metric" is highest (lowest after a "-"), the first in `steps` of equal
    ones, or None."""
    split, name = best_metric.lstrip("-").split("/")
    measured = {s: metrics.get(s, {}).get(split, {}).get(name) for s in steps}
    measured = {s: v for s, v in measured.items() if isinstance(v, int | float)}
    if not measured:
        return None
    return (min if best_metric.startswith("-") else max)(measured, key=lambda s: measured[s])
