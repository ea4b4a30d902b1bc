"""PyTorch's attention, timed in a process of its own for benchmarks/gpu_suite.py.

    python -m benchmarks.gpu_torch cuda       # needs torch and numpy, none of this library's JAX

Reads a line of JSON and answers with one: {"make": name, "kind": "sdpa" or "flex", "bias",
"backward", "batch", "length", "heads", "width", "padded", "dtype"} -> {"seconds"} of compiling;
{"run": name, "repeats"} -> {"seconds"} of a call; {"drop"} forgets all. An error is an answer.

Causal attention; with the bias, RelTemporal's of the same generated times. SDPA is given bias and
mask as one tensor [B, H, L, L], made beforehand; FlexAttention computes the bias in its kernel.
Gradients are of q, k and v alone, not of the slopes.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time

import numpy as np
import torch
from torch.nn import functional
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.histories import burst_times


def clock(times: np.ndarray) -> list[np.ndarray]:
    """RelTemporal's rows of each time at UTC+8 (kernels/evo_attention/rel_temporal.py): the time,
    its hour, its second within the hour, whether it falls on a weekend."""
    hours = times // 3600
    day = ((times // 60 + 480) // 1440 + 4) % 7
    weekend = ((day == 0) | (day == 6)).astype(np.int32)
    return [times, hours % 24, times - hours * 3600, weekend]


def bias(query, key, slopes):
    """RelTemporal of clocks that broadcast together, the query's not before the key's, and three
    slopes; for tensors, and for the scalars of a score_mod."""
    t_i, hour_i, second_i, weekend_i = query
    t_j, hour_j, second_j, weekend_j = key
    distance = torch.clamp(t_i - t_j, min=1)
    # Without the bit below its highest, no rounding carries a number over the next power of two.
    highest = (distance & ~(distance >> 1)).to(torch.float32)
    bucket = torch.floor(torch.log2(highest) + 0.01)
    hours = torch.abs(hour_i - hour_j - (second_i < second_j).to(torch.int32))
    sine = torch.sin(hours.to(torch.float32) * (math.pi / 24))
    weekend = (weekend_i != weekend_j).to(torch.float32)
    return -(bucket * slopes[0] + sine * slopes[1] + weekend * slopes[2])


def causal(b, h, i, j):
    return i >= j


class Run:
    """One function and its arguments."""

    def __init__(self, device, kind, bias, backward, batch, length, heads, width, padded, dtype):
        self.device, self.backward, dtype = device, backward, getattr(torch, dtype)
        shape = (batch, heads, length, width)
        torch.manual_seed(0)

        def normal():
            return torch.randn(shape, dtype=dtype, device=device)

        pad = (0, padded - width)
        self.inputs = [functional.pad(normal(), pad).requires_grad_(backward) for _ in range(3)]
        self.d_out = functional.pad(normal(), pad)
        rows = [torch.tensor(row, device=device) for row in clock(burst_times(batch, length))]
        slopes = 2.0 ** (-8 / heads * torch.arange(heads, device=device))
        self.function = {"sdpa": self._sdpa, "flex": self._flex}[kind](
            width**-0.5, rows if bias else None, slopes, length, dtype
        )

    def _sdpa(self, scale, rows, slopes, length, dtype):
        if rows is None:
            return lambda *qkv: functional.scaled_dot_product_attention(
                *qkv, is_causal=True, scale=scale
            )
        mask = _biases(rows, slopes, length, dtype)
        return lambda *qkv: functional.scaled_dot_product_attention(*qkv, mask, scale=scale)

    def _flex(self, scale, rows, slopes, length, dtype):
        blocks = create_block_mask(causal, None, None, length, length, device=self.device)

        def score_mod(score, b, h, i, j):
            query, key = [row[b, i] for row in rows], [row[b, j] for row in rows]
            return score + bias(query, key, [slopes[h]] * 3)

        # On a CPU there is no compiled backward pass, and nothing to measure.
        function = torch.compile(flex_attention) if self.device == "cuda" else flex_attention
        how = dict(scale=scale, block_mask=blocks, score_mod=score_mod if rows else None)
        return lambda *qkv: function(*qkv, **how)

    def __call__(self):
        with torch.set_grad_enabled(self.backward):
            out = self.function(*self.inputs)
            return torch.autograd.grad(out, self.inputs, self.d_out) if self.backward else out

    def seconds(self, repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            self()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / repeats


def _biases(rows, slopes, length, dtype):
    """[B, H, L, L], -inf above the diagonal; one request at a time, so that it fits."""
    out = torch.empty(len(rows[0]), len(slopes), length, length, dtype=dtype, device=slopes.device)
    hidden = torch.ones(length, length, dtype=torch.bool, device=slopes.device).triu(1)
    for request, target in enumerate(out):
        own = [row[request] for row in rows]
        query, key = [x[:, None] for x in own], [x[None] for x in own]
        target[:] = bias(query, key, [slopes[:, None, None]] * 3).masked_fill(hidden, -math.inf)
    return out


def answer(question: dict, runs: dict[str, Run], device: str) -> dict:
    """`runs` is added to and emptied."""
    if "drop" in question:
        runs.clear()
        if device == "cuda":
            torch.cuda.empty_cache()
        return {}
    if "run" in question:
        return {"seconds": runs[question["run"]].seconds(question["repeats"])}
    name = question.pop("make")
    run = Run(device, **question)
    first = run.seconds(1)  # compiles
    runs[name] = run
    return {"seconds": first}


def main() -> None:
    device, runs = sys.argv[1], {}
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no reply
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("this torch sees no CUDA device")
    print(json.dumps({"torch": torch.__version__}), file=replies, flush=True)
    for line in sys.stdin:
        try:
            reply = answer(json.loads(line), runs, device)
        except Exception as error:
            reply = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:500]}
            if device == "cuda":
                torch.cuda.empty_cache()
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
