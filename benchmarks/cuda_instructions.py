"""What a GPU kernel is made of, counted without a GPU: instructions, registers, bytes spilled.

    make check-cuda        # once: its environment has the compilers
    JAX_PLATFORMS=cpu .venv-cuda/bin/python -m benchmarks.cuda_instructions
        [--op evo_attention] [--shape wide] [--dtype bfloat16] [--way backward]

Compiles an op's pallas_gpu calls at a named shape for the GPU of --gpu, and takes the PTX that
XLA writes through ptxas and nvdisasm. A kernel's instructions are those of one warp: outside of
loops, and of a turn of each loop (innermost only). EvoAttention's loops are over heads, so that of
its kernels the sum is given too.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from absl import app, flags

OP = flags.DEFINE_string("op", "evo_attention", "A folder of kernels/.")
SHAPE = flags.DEFINE_string("shape", "wide", "One of its named shapes.")
DTYPE = flags.DEFINE_string("dtype", "bfloat16", "Of the shape's arrays.")
WAY = flags.DEFINE_string("way", "backward", "forward, or backward, which makes both.")
TARGET = flags.DEFINE_string("gpu", "benchmarks/targets/h200.txtpb", "XLA's description of a GPU.")
ARCHITECTURE = flags.DEFINE_string("architecture", "sm_90a", "The same, as ptxas names it.")
KIND = flags.DEFINE_string("kind", "NVIDIA H200", "The same, as JAX names it.")


class Counts(NamedTuple):
    """Instructions of a program: outside of loops, and of a turn of each innermost loop."""

    outside: int
    loops: list[int]


def count(assembly: str) -> Counts:
    """Of what nvdisasm says of one kernel. A loop is what a branch jumps back over."""
    at, labels, branches = 0, {}, []
    for line in assembly.splitlines():
        label = re.match(r"\s*(\.L_x_\d+):", line)
        if label:
            labels[label[1]] = at
        elif re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+\S", line):
            branch = re.search(r"\bBRA\b.*?(\.L_x_\d+)", line)
            if branch:
                branches.append((at, branch[1]))
            at += 1
    spans = sorted((labels[to], i + 1) for i, to in branches if to in labels and labels[to] < i)
    inner = [x for x in spans if not any(x != y and x[0] <= y[0] and y[1] <= x[1] for y in spans)]
    return Counts(at - sum(b - a for a, b in inner), [b - a for a, b in inner])


def tool(name: str) -> str:
    """A program of NVIDIA's wheels.

    Raises:
      SystemExit: they are not installed.
    """
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations if spec else ():
        for path in Path(folder).glob(f"**/bin/{name}"):
            path.chmod(path.stat().st_mode | 0o100)  # a wheel may forget that it can be run
            return str(path)
    sys.exit(f"{name} is not installed: pip install 'jax[cuda13]' nvidia-cuda-nvdisasm")


def kernels(folder: Path, prefix: str) -> Iterator[tuple[str, int, int, int, Counts]]:
    """(name, threads, registers, bytes spilled, counts) of the PTX files of the folder."""
    for path in sorted(folder.glob("*.ptx")):
        text = path.read_text()
        name = re.search(rf"\.entry ({prefix}\w*)", text)
        if not name:
            continue
        binary = path.with_suffix(".cubin")
        command = [tool("ptxas"), "-v", f"-arch={ARCHITECTURE.value}", str(path), "-o", str(binary)]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
        command = [tool("nvdisasm"), "-c", str(binary)]
        assembly = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        registers, spilled = re.search(r"Used (\d+) registers", said), "0"
        if found := re.search(r"(\d+) bytes spill stores", said):
            spilled = found[1]
        threads = re.search(r"\.reqntid (\d+)", text)
        yield name[1], int(threads[1]), int(registers[1]), int(spilled), count(assembly)


def main(argv) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    with tempfile.TemporaryDirectory() as folder:
        # XLA reads it when JAX is first used, which is here.
        os.environ["XLA_FLAGS"] = f"--xla_dump_to={folder} --xla_dump_emitter_re=ptx"
        from benchmarks.kernel_bytes import OPS
        from kernels import ahead_of_time

        shapes = OPS[OP.value]
        shape = shapes.SHAPES[SHAPE.value]
        function, arguments = shapes.calls(shape, "pallas_gpu", DTYPE.value)[WAY.value]
        target = Path(TARGET.value).read_text()
        ahead_of_time.cuda_bytes(target, function, *arguments, device_kind=KIND.value)
        print("| kernel | warps | registers | bytes spilled | outside of loops | loops | all |")
        print("|---|---|---|---|---|---|---|")
        turns = shape.heads if OP.value == "evo_attention" else 0
        for name, threads, registers, spilled, (outside, loops) in kernels(Path(folder), OP.value):
            total = outside + turns * sum(loops) if turns else ""
            of_loops = ", ".join(map(str, loops))
            print(
                f"| {name} | {threads // 32} | {registers} | {spilled} | {outside} | {of_loops} | "
                f"{total} |"
            )


if __name__ == "__main__":
    app.run(main)
