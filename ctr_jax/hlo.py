"""What a compiled program says of itself: the arrays it makes, and what it sends between devices.

Read off the text of the optimised program (`compiled.as_text()`), which is that of one device: all
shapes and bytes are per device. Loops count as often as they run where the compiler knows how
often that is, once otherwise.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

_BYTES = {"pred": 1, "s4": 1, "u4": 1, "token": 0, "bf16": 2, "c64": 8, "c128": 16}
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"(?:^|\s)([a-z][a-z0-9\-]*)\(")
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_CALLED = re.compile(
    r"(calls|body|condition|to_apply|branch_computations|called_computations)="
    r"(\{[^}]*\}|%?[\w.\-]+)"
)
# Parts of an origin that name no module.
_TRACING = ("while", "body", "cond", "closed_call", "checkpoint", "rematted_computation")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all",
               "collective-permute", "collective-broadcast")  # fmt: skip
# They make no array of their own.
_VIEWS = ("parameter", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call",
          "constant", "optimization-barrier", "async-update", "partition-id", "after-all",
          "copy-start", "slice-start", "async-start")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program.

    Attributes:
      name, opcode: as in the text.
      arrays: [(shape as text, bytes)] of the result in device memory, padding of its layout
        included. everywhere: those that lie in a faster memory too, as a collective's may.
      operand_text: everything behind the opcode: operands, attributes, metadata.
      op_name: the path in the traced program that it comes from, "" where it has none.
      times: how often the program runs it.
      fused: it lies within another instruction, and its result nowhere in memory.
    """

    name: str
    opcode: str
    arrays: tuple[tuple[str, int], ...]
    everywhere: tuple[tuple[str, int], ...]
    operand_text: str
    op_name: str
    times: int
    fused: bool

    @property
    def bytes(self) -> int:
        return sum(size for _, size in self.arrays)


def instructions(text: str) -> list[Instruction]:
    """Every instruction of a compiled program, in the order of its text."""
    computations, entry = _computations(text)
    times, fused = _reached(computations, entry)
    found = []
    for computation, lines in computations.items():
        if times[computation]:
            for name, rest in lines:
                result, opcode, behind = _parts(rest)
                op_name = _OP_NAME.search(behind)
                found.append(
                    Instruction(
                        name,
                        opcode,
                        tuple(_arrays(result)),
                        tuple(_arrays(result, everywhere=True)),
                        behind,
                        op_name.group(1) if op_name else "",
                        times[computation],
                        computation in fused,
                    )
                )
    return found


def parameters(text: str) -> list[tuple[str, int]]:
    """[(name of the argument, bytes)] of the program's own arguments, as "state['tables']['x']"."""
    computations, entry = _computations(text)
    found = []
    for name, rest in computations[entry]:
        result, opcode, behind = _parts(rest)
        if opcode == "parameter":
            op_name = _OP_NAME.search(behind)
            size = sum(size for _, size in _arrays(result))
            found.append((op_name.group(1).replace("\\'", "'") if op_name else name, size))
    return found


def largest(text: str, number: int) -> list[tuple[int, str, str]]:
    """[(bytes, shape, where it comes from)] of the largest arrays that the program makes in memory,
    one for each (shape, origin)."""
    sizes = {}
    for each in instructions(text):
        if not each.fused and each.opcode not in _VIEWS:  # of "-start"s, the "-done" is counted
            for shape, size in each.arrays:
                sizes[shape, short(each.op_name) or each.name] = size
    ordered = sorted(sizes.items(), key=lambda item: -item[1])
    return [(size, shape, name) for (shape, name), size in ordered[:number]]


def short(op_name: str) -> str:
    """An origin without what tracing adds: "jit(f)/transpose(jvp(M))/while/body/closed_call/x" ->
    "backward: x"."""
    op_name = op_name.replace("\\'", "'")
    kept = [p for p in op_name.split("/") if "(" not in p and p not in _TRACING]
    way = "backward: " if "transpose(" in op_name else ""
    return way + "/".join(kept)


def traffic(text: str, devices: int) -> dict[str, tuple[int, int]]:
    """{collective: (how many run, bytes that one device sends)}.

    Bytes are those of ring algorithms over the n devices of a group, the least any algorithm sends:
    2 (n - 1) / n of an all-reduce's array, (n - 1) / n of an all-gather's result, of a
    reduce-scatter's operand and of an all-to-all's array, all of a permute's.
    """
    counts: collections.Counter = collections.Counter()
    sent: collections.Counter = collections.Counter()
    for each in instructions(text):
        opcode = each.opcode.removesuffix("-start")
        if opcode not in COLLECTIVES:
            continue
        n = _group_size(each.operand_text, devices)
        sizes = [size for _, size in each.everywhere]
        both = each.opcode.endswith("-start") and opcode in ("all-gather", "collective-permute")
        size = max(sizes) if both else sum(sizes)  # a started one's holds operand and result
        share = {
            "all-reduce": 2 * (n - 1) / n,
            "reduce-scatter": float(n - 1),
            "collective-permute": 1.0,
            "collective-broadcast": 1.0,
        }.get(opcode, (n - 1) / n)
        counts[opcode] += each.times
        sent[opcode] += round(each.times * size * share)
    return {name: (counts[name], sent[name]) for name in counts}


def _computations(text: str) -> tuple[dict[str, list[tuple[str, str]]], str]:
    """{computation: [(instruction, what is behind its "=")]}, and the entry's name."""
    computations: dict[str, list[tuple[str, str]]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if line.startswith((" ", "\t")):
            if current is not None and (match := _INSTRUCTION.match(line)):
                current.append((match.group(1), match.group(2)))
        elif match := _COMPUTATION.match(line):
            current = computations.setdefault(match.group(2), [])
            entry = match.group(2) if match.group(1) else entry
    if not entry:
        raise ValueError("no ENTRY computation: this is not the text of a compiled program")
    return computations, entry


def _reached(computations: dict, entry: str) -> tuple[collections.Counter, set[str]]:
    """How often each computation runs, and which of them are fused into an instruction."""
    times: collections.Counter = collections.Counter()
    fused: set[str] = set()

    def walk(name: str, rounds: int, inside: bool) -> None:
        times[name] += rounds
        if inside:
            fused.add(name)
        for _, rest in computations[name]:
            _, opcode, behind = _parts(rest)
            for kind, called in _CALLED.findall(behind):
                trips = _TRIPS.search(behind) if kind in ("body", "condition") else None
                within = inside or opcode == "fusion" or kind == "to_apply" and opcode != "call"
                for one in re.findall(r"[\w.\-]+", called):
                    if one in computations:
                        walk(one, rounds * (int(trips.group(1)) if trips else 1), within)

    walk(entry, 1, False)
    return times, fused


def _parts(rest: str) -> tuple[str, str, str]:
    """(result type, opcode, everything behind it) of an instruction."""
    if rest.startswith("("):  # a tuple's type has parentheses of its own
        depth, end = 1, 1
        while depth:
            depth += {"(": 1, ")": -1}.get(rest[end], 0)
            end += 1
        result, rest = rest[:end], rest[end:]
    else:
        result, _, rest = rest.partition(" ")
    match = _OPCODE.search(" " + rest)
    return (result, match.group(1), rest[match.end() - 1 :]) if match else (result, "", rest)


def _arrays(result: str, everywhere: bool = False) -> Iterator[tuple[str, int]]:
    """(shape, bytes) of every array in device memory of a result type, or in any memory."""
    for dtype, dims, order, layout in _SHAPE.findall(result):
        if not everywhere and re.search(r"S\([1-9]", layout):  # not in the main memory
            continue
        shape = [int(d) for d in dims.split(",") if d]
        tile = re.match(r"T\(([\d,]+)\)", layout)
        padded = list(shape)
        if tile and shape:
            tiles = [int(t) for t in tile.group(1).split(",")][::-1]
            minor = [int(i) for i in order.split(",")]
            for axis, size in zip(minor, tiles, strict=False):
                padded[axis] = -(-shape[axis] // size) * size
        yield f"{dtype}[{dims}]", math.prod(padded) * _bytes(dtype)


def _bytes(dtype: str) -> int:
    if dtype in _BYTES:
        return _BYTES[dtype]
    bits = re.match(r"[a-z]+(\d+)", dtype)
    return int(bits.group(1)) // 8 if bits else 1


def _group_size(behind: str, devices: int) -> int:
    """Devices of one group of a collective."""
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", behind):
        return int(match.group(1))
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", behind):
        return len(match.group(1).split(","))
    # From jax 0.12 on: the mesh, and which of its axes, or what part of one ('axis':(before)size).
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", behind):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", match.group(1)))
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", match.group(2))
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    return devices
