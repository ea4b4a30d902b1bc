"""Bytes that the kernels take on one TPU, as the TPU compiler counts them; no TPU is needed.

    python -m benchmarks.kernel_bytes [--slices=v5e,v5p,v6e] [--implementations=pallas_tpu]

Prints a Markdown table: per op and history length, memory beyond arguments and results
("temporaries") of the forward pass and of the backward pass, beside the arguments' and results'.
"""

from __future__ import annotations

import jax.numpy as jnp
from absl import app, flags

from kernels import ahead_of_time
from kernels.absorbed_target_attention import shapes as absorbed
from kernels.evo_attention import shapes as evo
from kernels.segmented_target_attention import shapes as segmented

OPS = {
    "evo_attention": evo,
    "segmented_target_attention": segmented,
    "absorbed_target_attention": absorbed,
}
LENGTHS = (50, 128, 1024, 4096, 16384)
SLICES = flags.DEFINE_list("slices", list(ahead_of_time.TPU_SLICES), "Of kernels.ahead_of_time.")
IMPLEMENTATIONS = flags.DEFINE_list("implementations", ["pallas_tpu"], "Of kernels.dispatch.")
DTYPES = flags.DEFINE_list("dtypes", ["float32", "bfloat16"], "Of arguments and results.")


def mib(size: int) -> str:
    """Of bytes, with a digit where it tells something."""
    value = size / (1 << 20)
    return "0" if size == 0 else f"{value:.1f}" if value < 10 else f"{value:,.0f}"


def main(argv) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    passes = ("forward", "backward")
    print("| op | dtype | L | implementation | arguments + results, forward; backward | "
          + " | ".join(f"{s} {p}" for s in SLICES.value for p in passes) + " |")  # fmt: skip
    print("|---" * (5 + 2 * len(SLICES.value)) + "|")
    for op, shapes in OPS.items():
        for dtype in DTYPES.value:
            for length in LENGTHS:
                shape = shapes.of_length(length)
                for implementation in IMPLEMENTATIONS.value:
                    calls = shapes.calls(shape, implementation, jnp.dtype(dtype))
                    needed = {
                        (name, way): ahead_of_time.tpu_bytes(
                            ahead_of_time.TPU_SLICES[name], function, *arguments
                        )
                        for name in SLICES.value
                        for way, (function, arguments) in calls.items()
                    }
                    own = [needed[SLICES.value[0], way] for way in passes]
                    own = "; ".join(mib(one.arguments + one.outputs) for one in own)
                    cells = [mib(needed[name, way].temporaries)
                             for name in SLICES.value for way in passes]  # fmt: skip
                    print(f"| {op} | {dtype} | {length} | {implementation} | {own} | "
                          + " | ".join(cells) + " |", flush=True)  # fmt: skip


if __name__ == "__main__":
    app.run(main)
