"""Training and inference examples/s beside FuxiCTR's BST and DIN, on the CPU.

    python -m benchmarks.fuxictr_speed --fuxictr_repo=PATH [--fuxictr_python=PATH]

L=200, batch 1024, embedding 32 per field, vocabularies of MovieLens-1M's size, one candidate,
generated ids; two threads. Every model is a process of its own, kept alive and run in turns, so
that a machine that slows down slows all of them; a ratio is the median over the rounds of the
ratios within a round. "Length buckets": requests of the same kind, of like length together, as
config.length_buckets has them; FuxiCTR's classes have one length for all.

FuxiCTR is not installed by this. Its base classes and layers come from `pip install fuxictr torch`
(in an environment of its own, if you like: --fuxictr_python), its model classes from the folder
model_zoo/ of a clone of https://github.com/reczoo/FuxiCTR: --fuxictr_repo. Ours alone: --models.

Loops and batches are ours; classes, layers, initialisation, loss and optimizer step (Adam 1e-3,
gradients clipped at norm 10) are FuxiCTR's, with the hyperparameters of its templates: BST has one
layer, four heads and mean pooling, DIN an attention of 64 units with Dice; MLP [512, 256, 128].
Freed memory is kept by malloc on both sides: without that, torch spends its time on page faults.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "fuxictr_speed.json"
PHASES = ("train", "infer")
MALLOC = {
    "MALLOC_TOP_PAD_": str(2**28),
    "MALLOC_MMAP_THRESHOLD_": str(2**34),
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
}
SPARSECTR = {"side": "ours", "module": "sparsectr_jax.model"}
BST, DIN = "FuxiCTR BST", "FuxiCTR DIN"
MODELS = {
    BST: {"side": "fuxictr", "model": "BST", "hyperparameters": {"num_heads": 4}},
    DIN: {"side": "fuxictr", "model": "DIN", "hyperparameters": {}},
    "SparseCTR d=32 l=2": SPARSECTR
    | {"hyperparameters": {"width": 32, "num_layers": 2, "num_heads": 8}},
    "SparseCTR d=128 l=1": SPARSECTR
    | {"hyperparameters": {"width": 128, "num_layers": 1, "num_heads": 8}},
    "DIN": {"side": "ours", "module": "baselines_jax.din", "hyperparameters": {}},
}
# The same with config.length_buckets; enough batches that those of every bucket are many.
BUCKETS = {"length_buckets": [50, 100, 150, 200], "batches": 16}
MODELS |= {f"{name}, length buckets": MODELS[name] | BUCKETS for name in MODELS if "=" in name}


class Missing(RuntimeError):
    """FuxiCTR, or a part of it, is not there; the message says what and how to get it."""


def check_fuxictr(python: str, repo: str | None, models: list[str]) -> None:
    """Raises Missing, with one line, unless the classes and the interpreter are there."""
    if repo is None:
        raise Missing(
            "no FuxiCTR model classes: git clone https://github.com/reczoo/FuxiCTR and pass its "
            "path as --fuxictr_repo"
        )
    for model in models:
        path = Path(repo) / "model_zoo" / model / "src" / f"{model}.py"
        if not path.is_file():
            raise Missing(f"{path} is missing: --fuxictr_repo must be a clone of reczoo/FuxiCTR")
    try:
        command = [python, "-c", "import torch, fuxictr.pytorch.models"]
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise Missing(f"--fuxictr_python={python} does not run: {error}") from None
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it failed"])[-1]
        raise Missing(
            f"{python} cannot import FuxiCTR ({reason}): pip install fuxictr torch there, or pass "
            f"another interpreter as --fuxictr_python"
        )


class Worker:
    """One model in its own process (benchmarks/fuxictr_workers.py)."""

    def __init__(self, python: str, options: dict):
        self._options = options
        environment = os.environ | MALLOC | {"OMP_NUM_THREADS": str(options["threads"])}
        environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
        self._process = subprocess.Popen(
            [python, "-m", "benchmarks.fuxictr_workers", json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env=environment,
            text=True,
        )
        self.facts = self._answer()

    def run(self, phase: str, steps: int) -> dict:
        """Seconds and memory of `steps` steps, and "rate" in examples/s."""
        self._process.stdin.write(json.dumps({"phase": phase, "steps": steps}) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        if not answer["finite"]:
            raise RuntimeError(f"{phase} of {self._options} gave a value that is not finite")
        answer["rate"] = steps * self._options["rows"] / answer["seconds"]
        return answer

    def steps_for(self, phase: str, seconds: float) -> int:
        """Warms `phase` up and says how many steps fill about `seconds`: of batches that differ in
        length, whole rounds."""
        every = self.facts["batches"] if "length_buckets" in self._options else 1
        self.run(phase, every)
        return every * max(1, round(seconds / self.run(phase, every)["seconds"]))

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of {self._options} ended: {self._process.wait()}")
        return json.loads(line)


def measure(models: dict[str, dict], pythons: dict[str, str], shared: dict, rounds: int, seconds):
    """{model: facts and, per phase, the rates of all rounds}, the models taking turns."""
    workers, steps, results = {}, {}, {}
    try:
        for name, model in models.items():
            print(f"starting {name}", file=sys.stderr, flush=True)
            workers[name] = Worker(pythons[model["side"]], shared | model)
            results[name] = dict(workers[name].facts)
            results[name] |= {phase: {"rates": [], "cpu_rates": []} for phase in PHASES}
            for phase in PHASES:
                steps[name, phase] = workers[name].steps_for(phase, seconds)
        for i in range(rounds):
            print(f"round {i + 1} of {rounds}", file=sys.stderr, flush=True)
            for phase in PHASES:
                for name, worker in workers.items():
                    done = worker.run(phase, steps[name, phase])
                    examples = steps[name, phase] * shared["rows"]
                    results[name][phase]["rates"].append(done["rate"])
                    results[name][phase]["cpu_rates"].append(examples / done["cpu_seconds"])
                    results[name]["peak_mb"] = done["peak_mb"]
    finally:
        for worker in workers.values():
            worker.close()
    return results


def summarise(results: dict[str, dict], base: str) -> dict[str, dict]:
    """Adds to each phase the median rate and the median of the rounds' ratios to `base`.

    "cpu_ratio" is the same of examples per second of CPU time, all threads summed: it does not see
    threads that wait, but holds on a machine that others use too.
    """
    for result in results.values():
        for phase in PHASES:
            figures = result[phase]
            figures["rate"] = statistics.median(figures["rates"])
            for ratio, rates in (("ratio", "rates"), ("cpu_ratio", "cpu_rates")):
                if base in results:
                    pairs = zip(figures[rates], results[base][phase][rates], strict=True)
                    figures[ratio] = statistics.median(ours / theirs for ours, theirs in pairs)
    return results


def table(results: dict[str, dict], base: str) -> str:
    """Markdown rows: speeds, ratios to `base`, memory, parameters."""
    lines = [
        f"| model | parameters (and in tables) | train ex/s | x {base} (by CPU time) "
        f"| infer ex/s | x {base} (by CPU time) | peak RSS MB | of {base}'s "
        "| XLA temporaries MB, train / infer | compile s, train / infer |",
        "|---" * 10 + "|",
    ]

    def ratio(figures: dict) -> str:
        if "ratio" not in figures:
            return "n/a"
        return f"{figures['ratio']:.2f} ({figures['cpu_ratio']:.2f})"

    def pair(values: dict | None, scale: float) -> str:
        return " / ".join(f"{values[p] / scale:,.0f}" for p in PHASES) if values else ""

    for name, r in results.items():
        peak = r.get("peak_mb")
        share = peak / results[base]["peak_mb"] if peak and base in results else None
        cells = [
            name,
            f"{r['parameters']:,} (+ {r['table_parameters']:,})",
            *(x for p in PHASES for x in (f"{r[p]['rate']:,.0f}", ratio(r[p]))),
            f"{peak:,.0f}" if peak else "n/a",
            f"{share:.2f}" if share else "n/a",
            pair(r.get("temp_bytes"), 1e6),
            pair(r.get("compile_seconds"), 1),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def machine() -> dict:
    """Processor, cores this process may use, memory, load and Python."""
    processor, memory = platform.processor(), None
    if Path("/proc/cpuinfo").exists():
        names = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
        processor = names[0].split(":")[1].strip() if names else processor
        memory = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": processor,
        "cores": usable,
        "memory_gb": memory,
        "system": platform.platform(),
        "python": platform.python_version(),
        "load_average": [round(x, 2) for x in os.getloadavg()],
    }


def command_line(arguments: list[str]) -> str:
    """The command for the report: paths of the two places of FuxiCTR and of the report left out."""
    names = ("--fuxictr_repo", "--fuxictr_python", "--output")
    joined, words = " ".join(arguments), []
    for argument in re.split(r" (?=--)", joined) if joined else []:
        name = re.split("[= ]", argument)[0]
        words.append(f"{name}=PATH" if name in names else argument)
    return " ".join(["python -m benchmarks.fuxictr_speed", *words])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fuxictr_repo", help="a clone of reczoo/FuxiCTR")
    parser.add_argument("--fuxictr_python", default=sys.executable, help="has fuxictr and torch")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6, help="of a phase of a round, about")
    parser.add_argument("--batch_size", type=int, default=1024)
    parser.add_argument("--length", type=int, default=200)
    parser.add_argument("--zipf", type=float, default=1.0, help="exponent of the item ids")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--devices", type=int, default=1, help="ours: train.py's --cpu_devices")
    parser.add_argument(
        "--bst_heads", type=int, default=4, help="4 in its template, 2 in its class"
    )
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()

    models = {name: dict(MODELS[name]) for name in args.models}
    theirs = [model["model"] for model in models.values() if model["side"] == "fuxictr"]
    if theirs:
        try:
            check_fuxictr(args.fuxictr_python, args.fuxictr_repo, theirs)
        except Missing as missing:
            ours = " ".join(
                f'"{name}"' for name, model in MODELS.items() if model["side"] == "ours"
            )
            raise SystemExit(f"{missing}; to measure ours alone: --models {ours}") from None
    if BST in models:
        models[BST]["hyperparameters"] = {"num_heads": args.bst_heads}
    shared = {
        "rows": args.batch_size,
        "length": args.length,
        "width": 32,
        "zipf": args.zipf,
        "batches": 4,
        "threads": args.threads,
        "devices": args.devices,
        "repo": args.fuxictr_repo and str(Path(args.fuxictr_repo).resolve()),
    }
    pythons = {"fuxictr": args.fuxictr_python, "ours": sys.executable}
    began = time.strftime("%Y-%m-%d")
    results = summarise(measure(models, pythons, shared, args.rounds, args.seconds), BST)
    print(table(results, BST))
    report = {
        "command": command_line(sys.argv[1:]),
        "date": began,
        "machine": machine(),
        "options": {k: v for k, v in shared.items() if k != "repo"}
        | {"rounds": args.rounds, "seconds": args.seconds},
        "malloc": MALLOC,
        "models": models,
        "results": results,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {args.output}", file=sys.stderr)


if __name__ == "__main__":
    main()
