"""Tables of the docs from the benchmarks' JSON files.

    python -m benchmarks.report [FILES] [--write]

Without --write the tables are printed; with it each takes its place in README.md and docs/*.md,
between `<!-- report:NAME -->` and `<!-- /report -->`. FILES: all of benchmarks/results by default;
where some are named, tables that none of them is for are left alone. Files of
`python -m benchmarks.gpu_suite` say which implementation is to be a kernel's default (`PREFERRED`
of its api.py): one that does not beat the XLA path on a device is not the default there.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import re
import sys
from pathlib import Path

from kernels.evo_attention.shapes import SHAPES

RESULTS, PAGES = Path("benchmarks/results"), ("README.md", "docs/*.md")
MARKED = re.compile(r"(<!-- report:(\w+) -->)(.*?)(<!-- /report -->)", re.DOTALL)
NOT_MEASURED = "not measured"
OPS = ("evo_attention", "segmented_target_attention", "absorbed_target_attention")
OLD = " †"  # after the name of a row
PLATFORMS = {"gpu": "pallas_gpu", "tpu": "pallas_tpu"}


def tables(records: list[dict], every: bool = True) -> dict[str, str]:
    """Name -> Markdown.

    Args:
      records: files' contents. every: tables without a file too.
    """
    device = [r for r in records if r.get("measures")]  # not those of --small
    cpu = [r for r in records if "floor_at_1024" in r]
    out = {}
    if device or every:
        of_devices = "\n\n".join(map(device_table, device))
        out["gpu"] = of_devices or f"| kernels on a GPU or TPU |\n|---|\n| {NOT_MEASURED} |"
        out["blocks"] = "\n".join(line for r in device for line in block_lines(r)) or NOT_MEASURED
        out["preferred"] = preferred_table(device)
        out["headline"] = "; ".join(filter(None, map(headline, device))) or NOT_MEASURED
    if cpu or every:
        out["evo_attention"] = evo_table(cpu[-1]) if cpu else NOT_MEASURED
        out["evo_lengths"] = evo_lengths(cpu[-1]) if cpu else NOT_MEASURED
    return out


# ---- devices -----------------------------------------------------------------------------------


def of_kind(record: dict, kind: str) -> list[dict]:
    """Entries of a kind that ran, or of that name that failed."""
    word = {"sweep": "blocks"}.get(kind, kind)
    return [e for e in record["entries"] if e["name"].split()[0] == word]


def device_table(record: dict) -> str:
    """What a device's file says of checks and speeds."""
    v = record["versions"]
    out = [
        f"**{record['device']}**, driver {record['driver']}, jax {v['jax']}, jaxlib {v['jaxlib']}, "
        f"{record['date']}; `{'`, `'.join(record['commands'])}`. {checks(record)}",
        "",
        "| op, shape, dtype, pass | kernel, ms | compiling, s | x XLA path "
        "| x full attention, same bias | the same, its bias made beforehand "
        "| x full attention, no bias | of a copy | GFLOP/s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    apart = {"Without a figure": [], "Of the others": [], "Not compared with": []}
    for entry in of_kind(record, "speed"):
        name, rows = entry["name"].removeprefix("speed "), entry.get("rows", [entry])
        for row in rows[1:]:
            if "ms" not in row:
                apart["Not compared with"].append(f"{row['name']} ({reason(row)})")
            elif row["note"]:
                apart["Of the others"].append(f"{row['name']}: {row['note']}")
        kernel = rows[0]
        if "ms" not in kernel:
            name = " ".join(name.split()[:2])  # its dtypes and passes mostly share their reason
            apart["Without a figure"].append(f"{name} ({reason(kernel)})")
            continue
        cells = [name + OLD * has_changed(entry, record), number(kernel["ms"])]
        cells.append(f"{kernel['compile_s']:.1f}")
        for role in ("xla", "same bias", "given bias", "no bias", "copy"):
            cells.append(compared(entry["ratios"].get(role), role))
        operations = kernel.get("operations")
        cells.append(number(operations / kernel["ms"] / 1e6) if operations else "")
        out.append("| " + " | ".join(cells) + " |")
    if record.get("changed"):
        what = "; ".join(dict.fromkeys(record["changed"].values()))
        out += ["", f"{OLD.strip()} Measured before the kernel changed: {what}."]
    for what, said in apart.items():
        if said:
            out += ["", f"{what}: {'; '.join(dict.fromkeys(said))}."]
    return "\n".join(out)


def has_changed(entry: dict, record: dict) -> bool:
    """Whether its kernel has since it ran: "changed" of a file maps parts of names to what."""
    return any(part in entry["name"] for part in record.get("changed", {}))


def reason(row: dict) -> str:
    """Why an entry or one of its rows has no figure."""
    return row.get("error") or row["left out"]


def checks(record: dict) -> str:
    """One sentence."""
    every = {e["name"].removeprefix("check "): e for e in of_kind(record, "check")}
    done = {name: e for name, e in every.items() if e["status"] != "left out"}
    wrong = [name for name, e in done.items() if not e.get("ok", False)]
    old = sum(has_changed(e, record) for e in done.values())
    missing = [name for name in every if name not in done]
    return (
        f"Checks: {len(done) - len(wrong)} of {len(done)} that ran passed"
        + (f"; not {', '.join(wrong)}" if wrong else "")
        + (f"; {old} of them were of kernels that have changed since{OLD}" if old else "")
        + (f"; not run: {', '.join(missing)}." if missing else ".")
    )


def number(x: float) -> str:
    """Three digits or more."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def compared(found: dict | None, role: str) -> str:
    """A ratio, bold where its goal is met, with the goal where there is one."""
    if not found:
        return ""
    text = f"{found['ratio']:.0%}" if role == "copy" else number(found["ratio"])
    if "goal" in found:
        goal = f"{found['goal']:.0%}" if role == "copy" else f"{found['goal']:.0f}"
        text = f"**{text}** (goal {goal})" if found["met"] else f"{text} (goal {goal}: missed)"
    elif role == "copy" and found.get("waits_for") == "operations":
        text += " (waits for operations)"
    name = found["against"].removesuffix(f", {role}")
    return text if role in ("xla", "copy") else f"{text}, {name}"


def headline(record: dict) -> str:
    """EvoAttention at the goals' shape in bfloat16: forward; forward and backward."""
    entries = [e for e in of_kind(record, "speed") if e.get("is_goal") and e["dtype"] == "bfloat16"]
    found = {e["pass"]: e["ratios"] for e in entries}
    parts = []
    for role, what in (("xla", "XLA path"), ("same bias", "full attention with the same bias"),
                       ("no bias", "without bias")):  # fmt: skip
        both = [number(r[role]["ratio"]) + "x" for r in found.values() if role in r]
        if both:
            parts.append(f"{'; '.join(both)} {what}")
    return f"{record['device']}: " + ", ".join(parts) if parts else ""


def block_lines(record: dict) -> list[str]:
    """The fastest block sizes of each sweep, and how much faster than the slowest they are."""
    out = []
    for entry in of_kind(record, "sweep"):
        rows = sorted((r for r in entry.get("rows", []) if "ms" in r), key=lambda r: r["ms"])
        if rows:
            name = entry["name"].removeprefix("blocks ")
            best, worst = rows[0], rows[-1]
            gain = f"{worst['ms'] / best['ms']:.2f}x as fast as {worst['name']}"
            out.append(
                f"- {record['device']}, {name}: {best['name']}, {number(best['ms'])} ms, {gain}"
            )
    return out


def judged(
    records: list[dict],
    op: str,
    device: str,
    least_candidates: int = 1,
    most_slots: float = math.inf,
) -> tuple[bool, str]:
    """Whether the kernel is to be the default of the device, and why: for so many candidates and,
    of evo_attention, slots."""
    compared_with, against, why_not = [], [], NOT_MEASURED
    for record in [r for r in records if r["device"] == device]:
        for entry in record["entries"]:
            if entry["name"].split()[1:2] != [op] or entry["name"].startswith("blocks"):
                continue
            name = entry["name"]
            rows = entry.get("rows", [])
            made = any(row["role"] == "kernel" and "ms" in row for row in rows)
            if entry["status"] == "left out" or any("left out" in row for row in rows[:2]):
                continue
            if has_changed(entry, record):
                why_not = "not measured since it changed"
                continue
            if entry["status"] == "failed" or (rows and not made):
                against.append(f"does not run: {name}")
            elif entry.get("ok") is False or entry.get("agrees") is False:
                against.append(f"is wrong: {name}")
            elif "xla" in entry.get("ratios", {}):
                shape = entry["shape"]
                slots = shape.get("chunks", 0) * (1 + shape.get("transition", 0))
                if shape["candidates"] < least_candidates or slots > most_slots:
                    continue
                compared_with.append((entry["ratios"]["xla"]["ratio"], entry["pass"], name))
    passes = {way for _, way, _ in compared_with}
    if not compared_with and not against:
        return False, why_not
    if against:
        return False, against[0]
    if passes != {"forward", "forward+backward"}:
        return False, f"measured {', '.join(sorted(passes))} only"
    least, _, name = min(compared_with)
    return least > 1, f"{number(least)}x the XLA path at its worst: {name}"


def preferred_table(records: list[dict]) -> str:
    """The default of each op and device, by measurement and in the code."""
    out = ["| op | device | default by measurement | `PREFERRED` in its api.py |",
           "|---|---|---|---|"]  # fmt: skip
    for op in OPS:
        api = importlib.import_module(f"kernels.{op}.api")
        in_code, least_candidates = api.PREFERRED, getattr(api, "PREFERRED_FROM", 1)
        most_slots = getattr(api, "PREFERRED_TO", math.inf)
        name = op if least_candidates == 1 else f"{op}, from {least_candidates} candidates"
        name += f", up to {most_slots} slots" if most_slots < math.inf else ""
        platforms = {record["device"]: record["platform"] for record in records}
        for device in sorted({*platforms, *in_code}):
            is_kernel, why = judged(records, op, device, least_candidates, most_slots)
            says = next(iter(in_code.get(device, ())), "xla")
            wanted = PLATFORMS[platforms[device]] if is_kernel else "xla"
            differs = "" if says == wanted else ": **to be changed**"
            out.append(f"| {name} | {device} | {wanted} ({why}) | {says}{differs} |")
        out.append(f"| {op} | every other | xla ({NOT_MEASURED}) | xla |")
    return "\n".join(out)


# ---- CPU ---------------------------------------------------------------------------------------


# Dense forms that are not the op's own loop over tiles.
PLAIN = ("dense: n x n", "dense: skip 64", "dense: skip 256")


def evo_table(record: dict) -> str:
    """EvoAttention against dense attention at L = 1024, d = 32 (benchmarks/evo_attention.py)."""
    speed_up: dict[tuple, dict] = {}
    for result in record["results"]:
        if (result["L"], result["d"]) == (1024, 32):
            for row in result["rows"]:
                speed_up[row["name"], result["backward"]] = row
    without_tiles = [
        min(row["ms"] for (name, b), row in speed_up.items() if b == backward and name in PLAIN)
        for backward in (False, True)
    ]
    out = ["| | goal (0.75 of the ratio of keys) | paper, whole model on an A100 | forward "
           "| forward + backward | against n x n and causal blocks, the better, both |",
           "|---|---|---|---|---|---|"]  # fmt: skip
    for level, goal in record["goal_at_1024"].items():
        shape = SHAPES[f"sparsity_{level}"]
        both = [speed_up[f"Sparsity-{level}", backward] for backward in (False, True)]
        cells = [f"{row['speedup']:.1f}" for row in both]
        cells = [
            f"**{cell}**" if row["speedup"] >= goal else cell
            for cell, row in zip(cells, both, strict=True)
        ]
        plain = "; ".join(f"{without_tiles[b] / row['ms']:.0f}" for b, row in enumerate(both))
        name = f"Sparsity-{level} ({shape.chunks}, {shape.transition}, {shape.window})"
        floor = record["floor_at_1024"][level]
        out.append(f"| {name} | {goal:.2g} | {floor} | {' | '.join(cells)} | {plain} |")
    return "\n".join(out)


def evo_lengths(record: dict) -> str:
    """Milliseconds of a request, and how many times as fast as the fastest dense form it is."""
    lengths = sorted({result["L"] for result in record["results"]})
    cells: dict[tuple, dict[int, str]] = {}
    for result in record["results"]:
        what = "forward + backward" if result["backward"] else "forward"
        for row in result["rows"]:
            if "speedup" in row:
                key = result["d"], what, row["name"]
                text = f"{number(row['ms'])} ({number(row['speedup'])}x)"
                cells.setdefault(key, {})[result["L"]] = text
    out = [
        "| d | | | " + " | ".join(f"L={n:,}" for n in lengths) + " |",
        "|---" * 3 + "|---" * len(lengths) + "|",
    ]
    for (d, what, name), found in cells.items():
        out.append(
            f"| {d} | {what} | {name} | " + " | ".join(found.get(n, "") for n in lengths) + " |"
        )
    return "\n".join(out)


# ---- pages -------------------------------------------------------------------------------------


def replaced(page: str, blocks: dict[str, str], known: set[str]) -> str:
    """The page with each marked block's text; one that stands in a line stays in it.

    Raises:
      ValueError: a marker of no table.
    """

    def text(match: re.Match) -> str:
        begin, name, old, end = match.groups()
        if name not in known:
            raise ValueError(f"there is no table {name!r}; there are {', '.join(sorted(known))}")
        if name not in blocks:
            return match[0]
        edge = "\n" if old.startswith("\n") else ""
        return f"{begin}{edge}{blocks[name]}{edge}{end}"

    return MARKED.sub(text, page)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, help="default: benchmarks/results/*.json")
    parser.add_argument("--write", action="store_true", help="into README.md and docs/*.md")
    parser.add_argument("--root", type=Path, default=Path("."), help="where README.md and docs are")
    args = parser.parse_args(argv)
    records = [
        json.loads(path.read_text()) for path in args.files or sorted(RESULTS.glob("*.json"))
    ]
    blocks = tables([r for r in records if isinstance(r, dict)], every=not args.files)
    if not args.write:
        for name, text in blocks.items():
            print(f"<!-- report:{name} -->\n{text}\n<!-- /report -->\n")
        return
    for pattern in PAGES:
        for path in sorted(args.root.glob(pattern)):
            page = path.read_text()
            try:
                new = replaced(page, blocks, set(tables([])))
            except ValueError as error:
                sys.exit(f"{path}: {error}")
            if new != page:
                path.write_text(new)
                print(f"wrote {path}")


if __name__ == "__main__":
    main()
