"""What benchmarks/gpu_suite.py runs on a device: checks, then speeds, most important first.

A speed is of a whole named shape; there kernel and XLA path are compared once more, loosely, as
both round.

Axis letters: B requests, L history, H heads, K head width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import dense_attention
from benchmarks.gpu_checks import (
    ABSORBED,
    DTYPES,
    EVO,
    STA,
    call_of,
    check,
    draw,
    length_of,
    slopes_of,
)
from benchmarks.gpu_timing import Bench, Way, measure
from benchmarks.histories import burst_times
from benchmarks.kernel_bytes import OPS
from ctr_jax import flops
from kernels.absorbed_target_attention import shapes as absorbed
from kernels.absorbed_target_attention.blocks import Blocks as AbsorbedBlocks
from kernels.evo_attention import RelTemporal
from kernels.evo_attention import shapes as evo
from kernels.segmented_target_attention import shapes as segmented
from kernels.segmented_target_attention.blocks import Blocks as SegmentedBlocks
from sparsectr_jax.aggregate import Aggregate, chunk_mean
from sparsectr_jax.chunking import time_chunks, transition_slots
from sparsectr_jax.evo_attention import gather_rows

# Of kernel against XLA path at full size: norm of the difference by the norm. Both round, float32
# products of the XLA path to TF32 too: what it catches is a wrong kernel.
LOOSE = {"float32": 2e-2, "bfloat16": 1e-1}
# Of a call one or the other, which an H200 takes 0.1 ms or more for.
LEAST_BYTES, LEAST_OPERATIONS = 1 << 29, 1 << 34
EVERY_RIVAL = ("",)
FASTEST = ("keys", "cudnn", "SDPA", "blocks")  # of those with a bias, and without one
FLASH = ("keys", "cudnn")  # what full attention has fast kernels for
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)


class Entry(NamedTuple):
    """run: of a Bench; gives what goes into the file."""

    name: str
    run: Callable[[Bench], dict]


def entries(small: bool) -> list[Entry]:
    """All there is to run, most important first."""
    if small:
        tiny = {
            EVO: evo.Shape(4, 19, 2, 2, 4, 3, 1, 3),
            STA: segmented.Shape(4, 3, 12, 4, 2, 4, 8, False),
            ABSORBED: absorbed.Shape(4, 3, 7, 4, 5),
        }
        return [
            Entry("device", device),
            _check(STA, "ragged", tiny[STA], True),
            _check(ABSORBED, "tiny", tiny[ABSORBED], False),
            _speed(EVO, "wide", tiny[EVO], "bfloat16", True, EVERY_RIVAL, True),
            *[_speed(op, "tiny", tiny[op], "float32", False) for op in (STA, ABSORBED)],
            _sweep(STA, "tiny", tiny[STA], "float32"),
        ]
    ragged = {
        EVO: evo.Shape(4, 129, 5, 3, 4, 5, 2, 4),
        STA: segmented.Shape(4, 19, 130, 10, 2, 16, 64, False),
        ABSORBED: absorbed.Shape(4, 19, 257, 16, 11),
    }
    shapes = {op: module.SHAPES for op, module in OPS.items()}
    first = {EVO: "wide", STA: "paper", ABSORBED: "paper_training"}
    wide = shapes[EVO]["wide"]
    passes = {dtype: [(dtype, both) for both in (False, True)] for dtype in DTYPES}
    both_dtypes = [how for dtype in DTYPES for how in passes[dtype]]
    out = [Entry("device", device)]
    for op, name in first.items():
        out += [_check(op, "ragged", ragged[op], True), _check(op, name, shapes[op][name], False)]
    for dtype in DTYPES:
        out += [_speed(EVO, "wide", wide, *how, EVERY_RIVAL, True) for how in passes[dtype]]
        for op in (STA, ABSORBED):
            out += [_speed(op, first[op], shapes[op][first[op]], *how) for how in passes[dtype]]
    for op in (STA, ABSORBED):
        shape = shapes[op]["paper_serving"]
        out.append(_check(op, "paper_serving", shape, False))
        out += [_speed(op, "paper_serving", shape, *how) for how in both_dtypes]
    # The paper's head width, as many behaviours.
    narrow = shapes[EVO]["sparsity_2"]
    out.append(_check(EVO, "sparsity_2", narrow, False))
    narrow = narrow._replace(batch=wide.batch)
    out += [_speed(EVO, "sparsity_2", narrow, *how, FASTEST) for how in both_dtypes]
    for op, name in first.items():
        out += [_speed(op, f"{name}_ragged", shapes[op][name], *how) for how in passes["bfloat16"]]
    for level in (1, 3, 4):
        shape = shapes[EVO][f"sparsity_{level}"]
        out.append(_check(EVO, f"sparsity_{level}", shape, False))
        shape = shape._replace(batch=wide.batch, width=wide.width)
        out += [_speed(EVO, f"sparsity_{level}_wide", shape, *how, FLASH) for how in both_dtypes]
    for length in LENGTHS:
        shape = evo.of_length(length, "wide")
        shape = shape._replace(batch=shape.batch // 4)
        out.append(_speed(EVO, f"wide_{length}", shape, "bfloat16", True, FLASH))
    done = {entry.name.split()[2] for entry in out if entry.name.startswith("check")}
    for op in OPS:
        for name in [name for name in shapes[op] if name not in done]:
            out.append(_check(op, name, shapes[op][name], False))
            out += [_speed(op, name, shapes[op][name], *how) for how in both_dtypes]
    for op, name in first.items():
        out += [_sweep(op, name, shapes[op][name], dtype) for dtype in DTYPES]
    return out


def _check(op: str, name: str, shape: Any, exact: bool) -> Entry:
    shape = shape._replace(batch=min(shape.batch, 4))
    return Entry(f"check {op} {name}", functools.partial(check, op, shape, exact))


def _speed(op, name, shape, dtype, both, rivals=(), is_goal=False) -> Entry:
    way = "forward+backward" if both else "forward"
    ragged = name.endswith("_ragged")
    run = functools.partial(speed, op, shape, dtype, both, rivals, is_goal, ragged)
    return Entry(f"speed {op} {name} {dtype} {way}", run)


def _sweep(op: str, name: str, shape: Any, dtype: str) -> Entry:
    return Entry(f"blocks {op} {name} {dtype}", functools.partial(sweep, op, shape, dtype))


def device(bench: Bench) -> dict:
    """What the device gives: bytes of a copy, operations of a product."""
    copied, side = (1 << 20, 64) if bench.small else (1 << 31, 8192)

    def copy(batch):  # reads half of the bytes and writes as many
        return jnp.negative, (jnp.ones(copied // 8, jnp.float32),)

    ways = [Way("copy", "copy", 1, 1, copy, work={"bytes": copied})]
    for dtype in DTYPES:

        def make(batch, dtype=dtype):
            x = jax.random.normal(jax.random.key(0), (side, side)).astype(dtype)
            return jnp.matmul, (x, x)

        work = {"operations": 2 * side**3}
        ways.append(Way(f"product, {dtype}", "product", 1, 1, make, work=work))
    return {"kind": "device", "rows": measure(bench, ways)[0]}


def speed(
    op: str,
    shape: Any,
    dtype: str,
    both: bool,
    rivals: tuple[str, ...],
    is_goal: bool,
    ragged: bool,
    bench: Bench,
) -> dict:
    """Kernel against XLA path and, of evo_attention, full attention.

    Args:
      both: forward and backward pass. rivals: words that the rivals' names must hold one of.
      is_goal: whether the goals (gpu_suite.GOALS) are of this shape. ragged: with histories full,
        half, empty and of one behaviour, in place of full ones.
    """
    if op != EVO and not bench.small:
        shape = _filling(op, shape, dtype, both)
    arguments = bench.once(
        lambda batch: draw(op, shape._replace(batch=batch), dtype, ragged=ragged)[
            : None if both else -1
        ]
    )

    def ours(name: str, role: str, **options) -> Way:
        def make(batch):
            of_batch = shape._replace(batch=batch)
            return call_of(op, of_batch, name, dtype, both, **options), arguments(batch)

        return Way(name, role, shape.batch, length_of(op, shape), make, work=work)

    work = {} if op == EVO else _work(op, shape, dtype, both)
    ways = [ours(bench.kernel, "kernel", interpret=bench.interpret), ours("xla", "xla")]
    if op == EVO:
        every = [_keys(shape, dtype, both), *_full_attention(shape, dtype, both, bench)]
        ways += [way for way in every if any(word in way.name for word in rivals)]
    else:
        if op == ABSORBED and shape.candidates > 1:  # the tiles that serving has on a CPU
            ways.append(ours("xla", "xla", tiling="hidden")._replace(name="xla, hidden tiles"))
    rows, runs = measure(bench, ways)
    result = {
        "kind": "speed",
        "op": op,
        "shape": shape._asdict(),
        "dtype": dtype,
        "pass": "forward+backward" if both else "forward",
        "is_goal": is_goal,
        "rows": rows,
    }
    if bench.kernel in runs and "xla" in runs and rows[0]["batch"] == rows[1]["batch"]:
        result["differences"] = _differences(runs[bench.kernel].outputs(), runs["xla"].outputs())
        result["agrees"] = all(x <= LOOSE[dtype] for x in result["differences"].values())
    return result


def _filling(op, shape, dtype, both):
    """The shape with as many requests as make a call longer than what starting one takes."""
    work = _work(op, shape, dtype, both)
    least = min(LEAST_BYTES / work["bytes"], LEAST_OPERATIONS / work["operations"])
    return shape._replace(batch=shape.batch * max(1, round(least)))


def _work(op, shape, dtype, both) -> dict:
    """Bytes of arguments and results, each once in each pass (a training step has the loss between
    them, so both read the history), and operations as the XLA path has them."""
    call = call_of(op, shape, "xla", dtype, both)
    calls = OPS[op].calls(shape, "xla", jnp.dtype(dtype))
    passes = [calls[way] for way in ("forward", "backward")[: 1 + both]]
    arrays = jax.tree.leaves([(x, jax.eval_shape(function, *x)) for function, x in passes])
    moved = sum(x.size * x.dtype.itemsize for x in arrays)
    return {"bytes": moved, "operations": sum(flops.count(call, *passes[-1][1]).values())}


@jax.jit
def _differences_of(ours, theirs):
    def difference(x, y):
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
        return jnp.linalg.norm((x - y).ravel()) / jnp.maximum(jnp.linalg.norm(y.ravel()), 1e-6)

    return jax.tree.map(difference, ours, theirs)


def _differences(ours, theirs) -> dict[str, float]:
    return {name: float(x) for name, x in _differences_of(ours, theirs).items()}


def _keys(shape: evo.Shape, dtype: str, both: bool) -> Way:
    """What full attention has no need of, as sparsectr_jax/block.py makes it: chunks, the means of
    their behaviours x [B, L, d], projected and aggregated; rows of k and v gathered."""
    aggregate = Aggregate("mean_mlp", dtype=jnp.dtype(dtype))
    heads = shape.heads, shape.width
    d = shape.heads * shape.width

    def keys(x, k, v, weights, times, mask):
        chunks = time_chunks(times, mask, shape.chunks)
        index = transition_slots(chunks, shape.transition)[0].reshape(len(k), -1)
        means = chunk_mean(x, chunks)
        of_means = ((means @ w).reshape(*means.shape[:2], *heads) for w in weights["project"])
        pooled = aggregate.apply(weights["aggregate"], *of_means, chunks, True)
        return *pooled, gather_rows(k, index), gather_rows(v, index)

    def make(batch):
        x, k, v, _, times = _qkv(shape._replace(batch=batch), dtype)
        mask = jnp.ones(times.shape, bool)
        few = (k[:1], v[:1], time_chunks(times[:1], mask[:1], shape.chunks))
        weights = {
            "project": (jnp.eye(d, dtype=dtype),) * 2,
            "aggregate": aggregate.init(jax.random.key(0), *few),
        }
        return _pulled(keys, 4 * both, (x.reshape(batch, -1, d), k, v, weights, times, mask))

    return Way("keys", "keys", shape.batch, shape.length, make)


def _pulled(function: Callable, number: int, arguments: tuple) -> tuple[Callable, tuple]:
    """The function with the gradients of its first `number` arguments, if any, and its arguments,
    to which cotangents are added: as arguments, so that a compiler does not know them."""
    if not number:
        return function, arguments

    def both(*arguments):
        *arguments, cotangents = arguments
        rest = arguments[number:]
        out, pull = jax.vjp(lambda *x: function(*x, *rest), *arguments[:number])
        return out, pull(cotangents)

    cotangents = jax.tree.map(
        lambda x: jnp.ones(x.shape, x.dtype), jax.eval_shape(function, *arguments)
    )
    return both, (*arguments, cotangents)


def _qkv(shape: evo.Shape, dtype: str):
    """q, k, v [B, L, H, K], slopes [3, H] and times [B, L] of full histories."""
    b, length, _, heads, width, *_ = shape
    keys = jax.random.split(jax.random.key(1, impl="rbg"), 3)
    qkv = (jax.random.normal(key, (b, length, heads, width)).astype(dtype) for key in keys)
    return *qkv, slopes_of(heads), jnp.asarray(burst_times(b, length))


def _full_attention(shape: evo.Shape, dtype: str, both: bool, bench: Bench) -> list[Way]:
    """Causal attention over every behaviour. Forms that keep [B, H, L, L] take fewer requests."""
    of_request = 4 * shape.heads * shape.length**2 * (9 if both else 4)
    few = shape.batch
    while few > 1 and few * of_request > 0.3 * bench.memory:
        few //= 2
    arguments = bench.once(lambda batch: _qkv(shape._replace(batch=batch), dtype))
    library, blocks = dense_attention.library, dense_attention.dense_blocks
    tiled = dense_attention.dense_tiled

    def way(name: str, bias: bool, batch: int, least: int, ask: Any, *notes: str) -> Way:
        """ask: (rel, head width) -> form, or torch's kind; least: of head widths it can take."""
        rel = RelTemporal() if bias else dense_attention.NO_BIAS
        width = max(least, shape.width)
        notes += (f"{batch} of {shape.batch} requests",) * (batch < shape.batch)
        notes += (f"heads padded to {width}",) * (width > shape.width)
        given = bias and "bias made beforehand" in notes
        role = "given bias" if given else "same bias" if bias else "no bias"
        shared = (f"{name}, {role}", role, batch, shape.length)
        if isinstance(ask, str):
            torch = dict(kind=ask, bias=bias, backward=both, heads=shape.heads, dtype=dtype,
                         width=shape.width, padded=width)  # fmt: skip
            notes += ("no gradient of the slopes",) * (bias and both)
            return Way(*shared, torch=torch, note="; ".join(notes))

        def make(batch):
            return _pulled(ask(rel, width), (3 + bias) * both, arguments(batch))

        return Way(*shared, make, note="; ".join(notes))

    def of_library(implementation):
        return lambda rel, width: functools.partial(library, implementation, rel, width)

    of_blocks = lambda rel, _: functools.partial(blocks, min(256, shape.length), rel)  # noqa: E731
    of_tiles = lambda rel, _: functools.partial(tiled, 0, rel)  # noqa: E731
    return [
        way("jax.nn cudnn", False, shape.batch, 8, of_library("cudnn")),
        way("jax.nn cudnn", True, few, 8, of_library("cudnn")),
        way("torch SDPA", False, shape.batch, 8, "sdpa"),
        way("torch FlexAttention", True, shape.batch, 16, "flex"),
        way("torch SDPA", True, few, 8, "sdpa", "bias made beforehand"),
        way("jax.nn xla", True, few, 1, of_library("xla")),
        way("blocks of 256", True, few, 1, of_blocks),
        way("tiled", True, few, 1, of_tiles),
        way("jax.nn xla", False, few, 1, of_library("xla")),
    ]


def sweep(op: str, shape: Any, dtype: str, bench: Bench) -> dict:
    """The kernel, forward and backward, in block sizes that the tables may take."""
    arguments = bench.once(lambda batch: draw(op, shape._replace(batch=batch), dtype))
    of_tpu, key = bench.kernel == "pallas_tpu", "block" if op == EVO else "blocks"
    if op == EVO:
        candidates = (128, 256, 512) if of_tpu else (16, 32, 64)
    else:
        kind = SegmentedBlocks if op == STA else AbsorbedBlocks
        rows = (128, 256, 512, 1024) if of_tpu else (64, 128) if op == STA else (64, 128, 256)
        queries = (128,) if of_tpu else (16, 32, 64) if op == STA else (4, 8, 16)
        candidates = [kind(c, r) for c in queries for r in rows]
    candidates = candidates[:1] if bench.small else candidates

    def way(size) -> Way:
        def make(batch):
            options = {key: size, "interpret": bench.interpret}
            call = call_of(op, shape._replace(batch=batch), bench.kernel, dtype, True, **options)
            return call, arguments(batch)

        name = str(size if op == EVO else tuple(size))
        return Way(name, "blocks", shape.batch, length_of(op, shape), make)

    rows, _ = measure(bench, [way(size) for size in candidates])
    return {"kind": "sweep", "op": op, "shape": shape._asdict(), "dtype": dtype, "rows": rows}
