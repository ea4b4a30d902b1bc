"""What whole train steps need on TPU slices: `train.py --plan` for several pages and slices.

    JAX_PLATFORMS=cpu python -m benchmarks.plans [--slices v5e:2x2 v5e:4x4 v5e:16x16]
        [--configs sparsectr_alibaba lrea_taobao ...] [--kernels auto pallas]

Compiled by the real TPU compiler on this host; no TPU is needed and nothing is timed.
Each plan is written to benchmarks/results/plans.json as it is made; what is there is not made
again. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import math
from pathlib import Path

import jax

from ctr_jax import planner
from ctr_jax.data.expected import expected_spec
from kernels import dispatch

RESULTS = Path(__file__).parent / "results" / "plans.json"
CONFIGS = ("sparsectr_alibaba", "lrea_taobao", "lrea_industrial", "laser_alibaba")
SLICES = ("v5e:2x2", "v5e:4x4", "v5e:16x16")
MIB = 1 << 20


def make(name: str, target: str, kernels: str) -> dict:
    """One plan as JSON: sizes in bytes of one device."""
    config = importlib.import_module(f"configs.{name}").get_config()
    config.kernels = kernels
    number = math.prod(int(n) for n in target.split(":")[1].split("x"))
    # A batch that the smallest page's does not divide grows with the slice.
    config.batch_size = max(config.batch_size, number)
    config.eval_batch_size = max(config.eval_batch_size, number)
    spec, source = expected_spec(config, {})
    plan = planner.make_plan(config, spec, target)
    return {
        "kernels": kernels,
        "mesh": dict(plan.mesh),
        "batch": config.batch_size,
        "length": config.history_length,
        "held": dict(plan.held),
        "temporaries": plan.temporaries,
        "code": plan.code,
        "total": plan.total,
        "memory": plan.memory,
        "fits": plan.fits,
        "refused": plan.refused,
        "operations": plan.operations,
        "sent": {name: list(n) for name, n in plan.traffic.items()},
        "compile_seconds": round(plan.compile_seconds),
        "rows": source,
        "jax": jax.__version__,
    }


def table(plans: dict) -> str:
    lines = [
        "| page | slice | batch, L | tables + optimizer | model + optimizer | batch | temporaries "
        "| program | all, of 16,384 | sent a step | GFLOP a step |",
        "|---" * 11 + "|",
    ]
    for key, one in plans.items():
        name, target, *kernels = key.split(" ")
        held = one["held"]
        cells = [
            sum(held.get(k, 0) for k in ("tables", "table_opt")),
            sum(held.get(k, 0) for k in ("model", "model_state", "opt")),
            held.get("batch", 0),
            one["temporaries"],
            one["code"],
            one["total"],
            sum(size for _, size in one["sent"].values()),
        ]
        sizes = " | ".join(f"{size / MIB:,.1f}" for size in cells)
        says = sizes if not one["refused"] else one["refused"]
        lines.append(
            f"| {' '.join([name, *kernels])} | {target} | {one['batch']}, {one['length']:,} "
            f"| {says} | {one['operations'] / 1e9:,.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--configs", nargs="*", default=CONFIGS)
    parser.add_argument("--slices", nargs="*", default=SLICES)
    parser.add_argument("--kernels", nargs="*", default=["auto"], choices=dispatch.CHOICES)
    args = parser.parse_args()
    plans = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in args.configs:
        for target, kernels in itertools.product(args.slices, args.kernels):
            key = f"{name} {target}" + (f" {kernels}" if kernels != "auto" else "")
            if key not in plans:
                plans[key] = make(name, target, kernels)
                RESULTS.write_text(json.dumps(plans, indent=1) + "\n")
    print(table(plans))


if __name__ == "__main__":
    main()
