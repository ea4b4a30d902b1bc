"""Compiles every kernel at every named shape for a GPU that need not be there.

    make check-cuda        # makes an environment of its own: about 4 GB of wheels, jax >= 0.11

The compiler itself refuses what does not fit the device's registers and shared memory. Prints, per
op, shape, dtype and pass, the bytes of one device and the seconds that the compile took; exits with
1 where one failed.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import jax.numpy as jnp
from absl import app, flags

from benchmarks.kernel_bytes import OPS, mib
from kernels import ahead_of_time

TARGET = flags.DEFINE_string(
    "target", "benchmarks/targets/h200.txtpb", "XLA's description of a GPU, text format."
)
KIND = flags.DEFINE_string("device_kind", "NVIDIA H200", "How JAX names it.")


def main(argv) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    target, failed = Path(TARGET.value).read_text(), 0
    for op, shapes in OPS.items():
        for name, shape in shapes.SHAPES.items():
            for dtype in (jnp.float32, jnp.bfloat16):
                for way, (function, arguments) in shapes.calls(shape, "pallas_gpu", dtype).items():
                    start, what = time.perf_counter(), f"{op} {name} {jnp.dtype(dtype).name} {way}"
                    try:
                        needed = ahead_of_time.cuda_bytes(
                            target, function, *arguments, device_kind=KIND.value
                        )
                    except Exception as error:  # the compiler's, of any kind; all are to be seen
                        failed += 1
                        print(f"{what}: FAILED {type(error).__name__}: {error}", flush=True)
                        continue
                    seconds = time.perf_counter() - start
                    print(
                        f"{what}: {mib(needed.arguments)} MiB in, {mib(needed.outputs)} out, "
                        f"{mib(needed.temporaries)} temporary, compiled in {seconds:.1f} s",
                        flush=True,
                    )
    sys.exit(bool(failed))


if __name__ == "__main__":
    app.run(main)
