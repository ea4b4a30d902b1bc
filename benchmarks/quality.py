"""Quality over seeds: trains and evaluates the rows of a study by the commands a user would type.

    python -m benchmarks.quality --study=movielens --raw_dir=DIR [--seeds=0,1,2] [--jobs=2]
    python -m benchmarks.quality --study=movielens --table
    python -m benchmarks.quality --study=lrea_movielens --table --against="DIN-long"

A row is a config with a few fields changed; each (row, seed) is one `train.py` and one `eval.py`
in <workdir>/<study>/<row>/<seed>, on one core each. What is finished goes into
benchmarks/results/quality_<study>.json at once and is not run again; what was interrupted resumes
from its last checkpoint. Test figures are those of the last step: nothing is chosen by them.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import fcntl
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

from configs.baselines_alibaba import ROWS
from ctr_jax.data.synthetic import STUDIES

ROOT = Path(__file__).resolve().parents[1]
# 97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
KEPT = ("auc", "gauc_user", "logloss", "oracle_auc", "count")


def _row(config: str, **changes) -> dict:
    return {"config": f"configs/{config}", "changes": changes}


# What each effect of the generator is seen by, and so the change that must lose without it.
ABLATIONS = {
    "interest": {"model.use_global": False},
    "transition": {"model.use_transition": False},
    "local": {"model.use_local": False},
    "recency": {"model.rel_time": False},
    "hour": {"model.rel_hour": False},
    "weekend": {"model.rel_weekend": False},
}


# LASER's ablation table and its sizes (paper's summary).
LASER_ABLATIONS = {
    "LASER": {},
    "no recency embedding": {"model.recency": False},
    "tokens as they are": {"model.token_norm": False},
    "no fusion": {"model.fusion": "none"},
    "no FFN, no LayerNorm": {"model.ffn_multiplier": 0},
    "no LayerNorm": {"model.norm": False},
    "softmax for sigmoid": {"model.gate": "softmax"},
    "segments of 5": {"model.segment": 5},
    "segments of 20": {"model.segment": 20},
    **{f"{m} GSTA layers": {"model.num_layers": m} for m in (1, 3, 4)},
}


# SparseCTR's Figure 2: another attention with its encoding, or its attention with another encoding.
FIGURE_2 = {"SparseCTR": {}} | {
    name: {f"model.{k}": v for k, v in changes.items()}
    for name, changes in {
        "attention: full": dict(attention="full"),
        "attention: dilated": dict(attention="dilated"),
        "attention: NSA": dict(attention="nsa"),
        "attention: Linformer": dict(attention="kernel", encoding="none"),
        "encoding: HSTU's": dict(encoding="hstu"),
        "encoding: T5": dict(encoding="t5"),
        "encoding: ALiBi": dict(encoding="alibi"),
        "encoding: RoPE": dict(encoding="rope"),
        "encoding: none": dict(encoding="none"),
    }.items()
}


def _lrea_rows(variant: str) -> dict[str, dict]:
    """LREA on both paths between its neighbours (five seeds, paired)."""
    lrea, din = f"lrea_movielens.py:{variant}", f"din_long_movielens.py:{variant}"
    short = f"din_long_movielens.py:{','.join(['short', *filter(None, [variant])])}"
    return {
        "DIN-short": _row(short),
        "LREA, absorbed": _row(lrea, **{"model.training_path": "absorbed"}),
        "DIN-long": _row(din),
        "LREA, decompressed": _row(lrea, **{"model.training_path": "decompressed"}),
    }


# An epoch at L = 10,064 takes a core 40 minutes: an eighth of one, in more and larger steps. The
# rate was chosen on the validation split, of .01 and .03.
BEGINNING = {"batch_size": 32, "total_epochs": 0, "total_steps": 400,
             "optimizer.learning_rate": 0.03, "table_optimizer.learning_rate": 0.03}  # fmt: skip


def _table_3(config: str, **changes) -> dict[str, dict]:
    """The paper's Table 3 of LREA: ranks at lambda = .3, then lambdas at r = 128."""
    ranks = {f"r={r}": _row(config, **changes, **{"model.rank": r}) for r in (32, 64, 128)}
    return ranks | {
        f"lambda={x}": _row(
            config, **changes, **{"model.rank": 128, "loss.weights.non_negativity": x}
        )
        for x in (0.05, 0.1, 0.5, 0.8)
    }


def studies() -> dict[str, dict[str, dict]]:
    """{study: {row: {"config", "changes"}}}."""
    movielens, kuairand = "sparsectr_movielens.py", "sparsectr_kuairand.py"
    demo = "sparsectr_alibaba.py:demo"
    effects = {}
    for effect in STUDIES:
        for on in ("on", "off"):
            config = f"sparsectr_alibaba.py:{effect}_{on}"
            effects[f"{effect} {on}"] = _row(config)
            effects[f"{effect} {on}, ablated"] = _row(config, **ABLATIONS[effect])
    effects["transition on, fixed chunks"] = _row(
        "sparsectr_alibaba.py:transition_on", **{"model.chunking": "fixed"}
    )
    return {
        "movielens": {
            "SparseCTR, L=200": _row(movielens),
            "SparseCTR, L=20": _row(movielens, history_length=20),
            "SparseCTR, L=200, length buckets": _row(movielens, length_buckets=(64, 128, 200)),
            "SparseCTR, L=200, fixed chunks": _row(movielens, **{"model.chunking": "fixed"}),
            "SparseCTR, L=200, sim chunks": _row(movielens, **{"model.chunking": "sim"}),
            "DIN, L=200": _row("din_movielens.py"),
        },
        "movielens_v1": {
            "SparseCTR, L=200": _row(movielens + ":v1"),
            "SparseCTR, L=20": _row(movielens + ":v1", history_length=20),
            "DIN, L=200": _row("din_movielens.py:v1"),
        },
        "kuairand": {"SparseCTR": _row(kuairand), "DIN": _row("din_kuairand.py")},
        "lengths": {
            "no history": _row(demo, history_length=0),
            "last 20": _row(demo, history_length=20),
            "full": _row(demo),
            "DIN, full": _row("din_alibaba.py:demo"),
        },
        "effects": effects,
        "laser_movielens": {
            name: _row(f"laser_movielens.py:{row}")
            for name, row in (
                ("Base, L=50", "base"),
                ("DIN", "din"),
                ("TWIN", "twin"),
                ("HSTU", "hstu"),
                ("Transformer", "transformer"),
                ("LASER", "laser"),
            )
        },
        "baselines_movielens": {r: _row(f"baselines_movielens.py:{r}") for r in ROWS},
        "baselines_demo": {r: _row(f"baselines_alibaba.py:{r},demo") for r in ROWS},
        "figure_2": {name: _row(demo, **changes) for name, changes in FIGURE_2.items()},
        "figure_2_movielens": {name: _row(movielens, **c) for name, c in FIGURE_2.items()},
        "laser_ablations": {
            name: _row("laser_alibaba.py:long", **changes)
            for name, changes in LASER_ABLATIONS.items()
        },
        "lrea_movielens": _lrea_rows(""),
        "lrea_movielens_500": _lrea_rows("L500"),
        "lrea_table_3": _table_3("lrea_movielens.py"),
        "lrea_table_3_industrial": _table_3("lrea_industrial.py", **BEGINNING),
        "laser_lengths": {
            f"L={n}": _row("laser_alibaba.py:long", history_length=n)
            for n in (20, 100, 250, 500, 1000)
        },
    }


def run(study: str, row: str, seed: int, core: int, args) -> None:
    """One (row, seed), from the raw files to a line in the results."""
    what = studies()[study][row]
    workdir = Path(args.workdir) / study / re.sub(r"[^\w=.-]+", "_", row) / str(seed)
    flags = [f"--config={what['config']}", f"--workdir={workdir}", "--cpu_devices=1"]
    flags += [f"--config.{k}={v}" for k, v in what["changes"].items()]
    flags += [f"--config.seed={seed}"]
    if args.raw_dir:
        flags += [f"--config.data.raw_dir={args.raw_dir}"]
    workdir.mkdir(parents=True, exist_ok=True)
    began = time.time()
    with open(workdir / "log.txt", "ab") as log:
        for command in ("train.py", "eval.py"):
            extra = [f"--step={_last_step(workdir)}"] if command == "eval.py" else []
            subprocess.run(
                [sys.executable, command, *flags, *extra],
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                check=True,
                preexec_fn=lambda: os.sched_setaffinity(0, {core}),
            )
    done = json.loads((workdir / "train_done.json").read_text())
    result = {}
    for split in ("valid", "test"):
        measured = json.loads((workdir / "evaluation" / split / "results.json").read_text())
        result[split] = {k: measured[k] for k in KEPT if measured.get(k) is not None}
        result["data_hash"] = measured.get("data_hash")
    result |= {"step": done["step"], "examples_per_second": done["examples_per_second"]}
    result |= {"seconds": round(time.time() - began), "changes": what["changes"]}
    _add(_results_path(study), row, seed, result)
    print(f"{study} | {row} | seed {seed} | test {result['test']}", flush=True)


def _last_step(workdir: Path) -> int:
    return json.loads((workdir / "train_done.json").read_text())["step"]


def _results_path(study: str) -> Path:
    return ROOT / "benchmarks" / "results" / f"quality_{study}.json"


def _add(path: Path, row: str, seed: int, result: dict) -> None:
    """Adds one result to the file, safely beside other processes that do."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        results = json.loads(path.read_text()) if path.exists() else {"rows": {}}
        results["machine"] = f"{platform.machine()}, {os.cpu_count()} cores, CPU"
        results["rows"].setdefault(row, {})[str(seed)] = result
        temporary = path.with_suffix(".new")
        temporary.write_text(json.dumps(results, indent=1) + "\n")
        os.replace(temporary, path)


def table(study: str) -> str:
    """The study's results: mean and standard deviation over seeds, as a markdown table."""
    rows = json.loads(_results_path(study).read_text())["rows"]
    lines = [
        "| | seeds | AUC | GAUC | logloss | of the oracle | ex/s, one core |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in [r for r in studies()[study] if r in rows]:
        runs = list(rows[row].values())

        def spread(values: list[float]) -> str:
            values = [v for v in values if v is not None]
            if not values:
                return ""
            sd = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
            return f"{statistics.mean(values):.4f}{sd}"

        tests = [r["test"] for r in runs]
        share = [
            (t["auc"] - 0.5) / (t["oracle_auc"] - 0.5) if "oracle_auc" in t else None for t in tests
        ]
        cells = [spread([t.get(k) for t in tests]) for k in ("auc", "gauc_user", "logloss")]
        timed = [r["examples_per_second"] for r in runs if r["examples_per_second"]] or [0]
        speed = statistics.median(timed)
        lines.append(
            f"| {row} | {len(runs)} | {' | '.join(cells)} | {spread(share)} | {speed:,.0f} |"
        )
    return "\n".join(lines)


def paired(study: str, against: str) -> str:
    """Differences to the row `against`, seed by seed: mean and 95 % interval (Student's t)."""
    rows = json.loads(_results_path(study).read_text())["rows"]
    lines = [f"| less {against} | seeds | AUC | GAUC |", "|---|---|---|---|"]
    for row in [r for r in studies()[study] if r in rows and r != against]:
        seeds = sorted(set(rows[row]) & set(rows[against]))
        cells = []
        for key in ("auc", "gauc_user"):
            differences = [rows[row][s]["test"][key] - rows[against][s]["test"][key] for s in seeds]
            cell = f"{statistics.mean(differences):+.4f}" if differences else ""
            if 1 < len(differences) <= len(STUDENT) + 1:
                error = statistics.stdev(differences) / len(differences) ** 0.5
                cell += f" ± {STUDENT[len(differences) - 2] * error:.4f}"
            cells.append(cell)
        lines.append(f"| {row} | {len(seeds)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--study", required=True, choices=studies())
    parser.add_argument("--rows", nargs="+", help="only these")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--raw_dir", help="of real data; generated data needs none")
    parser.add_argument("--workdir", default="runs/quality")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, a core each")
    parser.add_argument("--table", action="store_true", help="print what is there, run nothing")
    parser.add_argument("--against", help="a row: print paired differences to it as well")
    args = parser.parse_args()
    path, known = _results_path(args.study), list(studies()[args.study])
    for row in (*(args.rows or ()), *filter(None, [args.against])):
        if row not in known:
            sys.exit(f"{args.study} has no row {row!r}; there are: {'; '.join(known)}")
    have = json.loads(path.read_text())["rows"] if path.exists() else {}
    if args.table and not have:
        sys.exit(f"{args.study} has no results yet: {path} is not there; run it without --table")
    if not args.table:
        wanted = args.rows or list(studies()[args.study])
        todo = [
            (row, int(seed))
            for seed in args.seeds.split(",")
            for row in wanted
            if seed not in have.get(row, {})
        ]
        cores = sorted(os.sched_getaffinity(0))
        with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
            free = list(cores[: args.jobs]) or cores

            def one(item):
                core = free.pop()
                try:
                    run(args.study, *item, core, args)
                finally:
                    free.append(core)

            for _ in pool.map(one, todo):
                pass
    print(table(args.study))
    if args.against:
        have = json.loads(path.read_text())["rows"]
        if args.against not in have:
            there = "; ".join(have)
            sys.exit(f"{args.study} has no results of {args.against!r} yet; there are: {there}")
        print("\n" + paired(args.study, args.against))


if __name__ == "__main__":
    main()
