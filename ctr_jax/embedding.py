"""Embedding tables outside the models: lookup, and gradients with respect to touched rows only.

One train step reads

    plan = lookup_ids(columns, batch, tables)     # distinct ids of every table
    rows = gather_rows(tables, plan)              # {table: [N, width]}
    embedded = embed(rows, plan, columns, batch)  # differentiable in rows, and in nothing larger
    tables, state = optimizer.update(row_grads, state, tables, plan, step)

so no array of the size of a table is ever made: not its gradient, not a mask over its rows.

Row 0 of a table is padding. Its vector is exactly zero because padding points past the end of
`rows`, where a lookup fills with zero and a gradient is dropped; it has no place in `rows` at all.

Two paths give equal values. A table with few rows for the number of ids (`takes_dense_path`)
is its own `rows`: ids index it directly, and a [V] mask says which rows were touched. Any other
table goes through its distinct ids, at most `N = min(number of ids, V)` of them.

On a mesh with axes ("data", "table"), set with `jax.set_mesh` and of Auto type, tables are split by
rows over "table" and batches over "data". Ids are made distinct on each data shard before they
travel; each table shard reads and updates the rows it owns; no device holds a table of the sparse
path, or its gradient. One device, or a 1x1 mesh, takes the plain path.

Axis letters: B requests, L history, N distinct ids (capacity), V rows of a table.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ctr_jax.batch import EmbeddedBatch, RequestBatch
from ctr_jax.deduplication import deduplicate
from ctr_jax.features import PADDING, Column
from kernels import dispatch
from kernels.softmax import accumulation_dtype

DATA_AXIS, TABLE_AXIS = "data", "table"
# Rows are rounded up to this whatever the mesh, so that a checkpoint fits any "table" axis that
# divides it and initial values do not depend on the number of devices.
ROW_MULTIPLE = 256
DENSE_ROWS_PER_ID = 0.25  # measured with benchmarks/embedding_step.py --dense-rule


@flax.struct.dataclass
class TablePlan:
    """How the ids of one batch reach the rows of one table.

    Attributes:
      slots: {Column.key: int32 of the ids' shape}, the place in `rows`; past its end at padding.
        On the sparse path of a mesh, the place among the distinct ids of the data shard.
      unique: [N] int32, the distinct rows in use, 0 beyond `count`. On a mesh [T * N], sharded over
        "table": each table shard's own rows, counted from its first. None on the dense path.
      count: [1] int32 ([T] on a mesh), how many of `unique` are in use. None on the dense path.
      route: on a mesh [T, n] int32, for every distinct id of every data shard its place among the
        rows that table shard t owns, past their end where another shard owns it. None elsewhere.
      touched: [V] bool, the rows that occur in the batch. None off the dense path.
      valid: [] bool, all ids lie in the table. None off the dense path.
    """

    slots: dict[str, jax.Array]
    unique: jax.Array | None = None
    count: jax.Array | None = None
    route: jax.Array | None = None
    touched: jax.Array | None = None
    valid: jax.Array | None = None

    @property
    def dense(self) -> bool:
        return self.touched is not None


Plan = dict[str, TablePlan]


def takes_dense_path(rows: int, ids: int) -> bool:
    """The one rule: True where updating all rows costs less than finding the distinct ids.

    Both sizes are static, so the choice is made at trace time; `ids` counts those of a data shard.
    """
    return rows <= DENSE_ROWS_PER_ID * ids


def context_mesh() -> jax.sharding.AbstractMesh | None:
    """The mesh set by `jax.set_mesh`, or None where the plain path is to be taken.

    Raises:
      ValueError: a mesh of several devices lacks the axes "data" and "table".
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return None
    if not {DATA_AXIS, TABLE_AXIS} <= set(mesh.axis_names):
        raise ValueError(f"embedding needs mesh axes 'data' and 'table', not {mesh.axis_names}")
    return mesh


def row_sharding(mesh: jax.sharding.Mesh, tree: Any) -> Any:
    """Shardings for tables and table optimizer state: rows, the first axis, over "table"."""
    return jax.tree.map(
        lambda x: NamedSharding(mesh, P(TABLE_AXIS, *[None] * (len(x.shape) - 1))), tree
    )


def init_tables(
    rng: jax.Array,
    shapes: Mapping[str, tuple[int, int]],
    scale: float | Mapping[str, float] = 0.01,
    mesh: jax.sharding.Mesh | None = None,
) -> dict[str, jax.Array]:
    """Normal(0, scale) tables {name: [rows, width] float32}; row 0 and the rows added are zero.

    A table's values depend on `rng`, its name and shape alone: not on other tables, nor the mesh.

    Args:
      shapes: {table: (rows, width)}, see `features.table_shapes`; rows are rounded up to a
        multiple of ROW_MULTIPLE.
      scale: of all tables, or {table: scale}.
      mesh: where given, tables are made in place, split by rows over its axis "table".
    """
    multiple = math.lcm(ROW_MULTIPLE, mesh.shape[TABLE_AXIS]) if mesh is not None else ROW_MULTIPLE

    def make(rng):
        tables = {}
        for name, (rows, width) in shapes.items():
            padded = -(-rows // multiple) * multiple
            key = jax.random.fold_in(rng, zlib.crc32(name.encode()))
            row = jnp.arange(padded)[:, None]
            std = scale[name] if isinstance(scale, Mapping) else scale
            values = std * jax.random.normal(key, (padded, width), jnp.float32)
            tables[name] = jnp.where((row != PADDING) & (row < rows), values, 0.0)
        return tables

    if mesh is None:
        return jax.jit(make)(rng)
    return jax.jit(make, out_shardings=row_sharding(mesh, jax.eval_shape(make, rng)))(rng)


def lookup_ids(
    columns: Iterable[Column], batch: RequestBatch, tables: Mapping[str, jax.Array]
) -> Plan:
    """The distinct ids of every table, and the place of every id of every column among them.

    Tables fed by the same columns share the work. A pure function of ids and table shapes.

    Args:
      columns: the model's columns; those without a table are passed over.
      batch: with B divisible by the size of the mesh's "data" axis.
      tables: {table: [V, width]}; only shapes are used.
    """
    fed: dict[str, dict[str, tuple[str, str]]] = {}
    for column in columns:
        if column.table:
            fed.setdefault(column.table, {})[column.key] = (column.group, column.source)
    mesh = context_mesh()
    plan, done = {}, {}
    for table, sources in fed.items():
        rows = tables[table].shape[0]
        distinct_sources = tuple(sorted(set(sources.values())))
        if (rows, distinct_sources) not in done:
            ids = {s: jnp.asarray(batch.values(*s), jnp.int32) for s in distinct_sources}
            done[rows, distinct_sources] = _plan_table(ids, rows, mesh)
        shared = done[rows, distinct_sources]
        plan[table] = shared.replace(slots={key: shared.slots[s] for key, s in sources.items()})
    return plan


def _plan_table(ids, rows, mesh) -> TablePlan:
    """TablePlan of one table, with slots keyed as `ids` is."""
    number = sum(x.size for x in ids.values())
    shards = 1 if mesh is None else mesh.shape[DATA_AXIS]
    dense = takes_dense_path(rows, number // shards)
    if mesh is None:
        return _plan_dense(ids, rows) if dense else _plan_sparse(ids, rows)
    body = _plan_dense if dense else _plan_sparse_shard
    by_data, by_table = P(DATA_AXIS), P(TABLE_AXIS)
    slots = {source: by_data for source in ids}
    if dense:
        specs = TablePlan(slots, touched=P(), valid=P())
    else:
        specs = TablePlan(slots, by_table, by_table, P(TABLE_AXIS, DATA_AXIS))
    sharded = jax.shard_map(
        lambda x: body(x, rows, mesh), in_specs=(slots,), out_specs=specs, check_vma=False
    )
    return sharded(ids)


def _plan_dense(ids, rows, mesh=None) -> TablePlan:
    flat = _flatten(ids)
    touched = jnp.zeros((rows,), jnp.int32).at[flat].set(1, mode="drop").at[PADDING].set(0)
    wrong = jnp.any((flat < 0) | (flat >= rows)).astype(jnp.int32)
    if mesh is not None:
        touched, wrong = lax.psum((touched, wrong), DATA_AXIS)
    # A bad id reads row 0, which `gather_rows` makes NaN.
    slots = {
        s: jnp.where((x < 0) | (x >= rows), 0, jnp.where(x == PADDING, rows, x))
        for s, x in ids.items()
    }
    return TablePlan(slots, touched=touched > 0, valid=wrong == 0)


def _plan_sparse(ids, rows) -> TablePlan:
    flat = _flatten(ids)
    unique, count, slots = deduplicate(flat, min(flat.size, rows))
    return TablePlan(_unflatten(slots, ids), unique, count[None])


def _plan_sparse_shard(ids, rows, mesh) -> TablePlan:
    """Inside shard_map: this data shard's ids, this table shard's rows."""
    flat = _flatten(ids)
    unique, _, slots = deduplicate(flat, min(flat.size, rows))
    everyone = lax.all_gather(unique, DATA_AXIS, tiled=True)
    rows_here = rows // mesh.shape[TABLE_AXIS]
    # A bad id is nobody's row: it goes to the last shard, past its end, and reads as NaN there.
    last = lax.axis_index(TABLE_AXIS) == mesh.shape[TABLE_AXIS] - 1
    local = everyone - lax.axis_index(TABLE_AXIS) * rows_here
    mine = (everyone != PADDING) & (local >= 0) & ((local < rows_here) | last)
    # Shifted by one: a shard's first row may be in use, and 0 means "not mine" here.
    owned, count, route = deduplicate(
        jnp.where(mine, local + 1, PADDING), min(everyone.size, rows_here)
    )
    place = lax.axis_index(DATA_AXIS) * unique.size
    route = lax.dynamic_slice(route, (place,), (unique.size,))
    return TablePlan(_unflatten(slots, ids), jnp.maximum(owned - 1, 0), count[None], route[None])


def gather_rows(tables: Mapping[str, jax.Array], plan: Plan) -> dict[str, jax.Array]:
    """{table: [N, width]}: the touched rows, what gradients are taken with respect to.

    On the dense path this is the table itself, [V, width]. On a mesh, [T * N, width] sharded over
    "table" (dense path: a copy on every device). An id outside its table reads as NaN, so that
    training stops at the loss rather than learn from a wrong row.
    """
    mesh = context_mesh()
    rows = {}
    for name, part in plan.items():
        table = tables[name]
        if part.dense:
            rows[name] = jnp.where(part.valid, table, jnp.nan)
            if mesh is not None:
                rows[name] = lax.with_sharding_constraint(rows[name], P())
        elif mesh is None:
            rows[name] = _take(table, part.unique)
        else:
            specs = (P(TABLE_AXIS, None), P(TABLE_AXIS))
            rows[name] = jax.shard_map(_take, in_specs=specs, out_specs=specs[0])(
                table, part.unique
            )
    return rows


def _take(table, unique):
    return table.at[unique].get(mode="fill", fill_value=jnp.nan)


def reads_rows(part: TablePlan) -> bool:
    """Whether behaviours are given as rows and slots where a model takes them so: on a CPU, of a
    table on the dense path. A product for each row is then a quarter of the work or less, and the
    gradient adds up at the model's width. On an accelerator the product costs next to nothing, and
    wider additions into few rows cost much."""
    return part.dense and dispatch.platform() == "cpu"


def embed(
    rows: Mapping[str, jax.Array],
    plan: Plan,
    columns: Iterable[Column],
    batch: RequestBatch,
    *,
    as_rows: bool = False,
) -> EmbeddedBatch:
    """The vectors of every column: exactly zero at padding, differentiable in `rows`.

    Args:
      rows: from `gather_rows` with the same plan.
      columns: as given to `lookup_ids`, or a part of them.
      as_rows: for models that read behaviours by `ctr_jax.tokens`: columns for which `reads_rows`
        holds stay rows and slots.

    Returns:
      EmbeddedBatch with float32 vectors {column.key: [B, width], [B, L, width] or [B, C, width]};
      a dense column's vector is its value, width 1, zero where its group's mask is False.
    """
    columns = tuple(columns)
    vectors, kept, slots = {}, {}, {}
    for column in columns:
        if not column.table:
            value = jnp.asarray(batch.values(column.group, column.source), jnp.float32)
            if column.group in ("behaviour", "candidate"):
                value = jnp.where(getattr(batch, f"{column.group}_mask"), value, 0.0)
            vectors[column.key] = value[..., None]
    for table in {c.table: None for c in columns if c.table}:
        part, read = plan[table], {}
        for column in (c for c in columns if c.table == table):
            if as_rows and column.group == "behaviour" and reads_rows(part):
                kept[column.key], slots[column.key] = rows[table], part.slots[column.key]
            else:
                read[column.key] = part.slots[column.key]
        if read:
            vectors |= _expand(rows[table], read, part)
    return EmbeddedBatch(batch, vectors, kept, slots)


def _expand(rows, slots, part):
    """{key: rows[slots[key]]}, zero where a slot lies past the end."""
    if context_mesh() is None:
        return _read_all(rows, slots)
    by_data = {key: P(DATA_AXIS) for key in slots}
    if part.dense:

        def body(rows, slots):
            return _read_all(lax.pcast(rows, DATA_AXIS, to="varying"), slots)

        return jax.shard_map(body, in_specs=(P(), by_data), out_specs=by_data)(rows, slots)

    def body(rows, slots, route):
        # Each distinct id of this data shard is owned by one table shard; the others add zero.
        local = lax.psum(_read(rows, route[0]), TABLE_AXIS)
        return _read_all(local, slots)

    specs = (P(TABLE_AXIS, None), by_data, P(TABLE_AXIS, DATA_AXIS))
    return jax.shard_map(body, in_specs=specs, out_specs=by_data)(rows, slots, part.route)


def _read(rows, slots):
    return rows.at[slots].get(mode="fill", fill_value=0.0)


@jax.custom_vjp
def _read_all(rows, slots):
    return {key: _read(rows, x) for key, x in slots.items()}


def _read_all_forward(rows, slots):
    return _read_all(rows, slots), (rows, slots)


def _read_all_backward(saved, cotangents):
    # One buffer for all columns; autodiff would make one for each, and add them.
    rows, slots = saved
    total = jnp.zeros_like(rows)
    for key, x in slots.items():
        total = total.at[x].add(cotangents[key], mode="drop")
    return total, None


_read_all.defvjp(_read_all_forward, _read_all_backward)


def sum_of_rows(
    rows: dict[str, jax.Array], slots: dict[str, jax.Array], bias: jax.Array | None = None
) -> jax.Array:
    """bias + sum over keys of rows[key][slots[key]], zero where a slot lies past the end: rows
    [V, d] and slots [B, L] of every key, bias [d] -> [B, L, d].

    Made for a CPU. A loop over requests: what is read and added stays in cache, and the result is
    made once, where XLA would otherwise read and add again in every consumer; the bias added
    outside is one more pass over all of it, and one more array. On a mesh every device has all
    rows, and the slots of its own requests.
    """
    if context_mesh() is None:
        return _sum_of_rows(rows, slots, bias)

    def body(rows, slots, bias):
        rows, bias = lax.pcast((rows, bias), DATA_AXIS, to="varying")
        return _sum_of_rows(rows, slots, bias)

    by_data = P(DATA_AXIS)
    specs = dict(in_specs=(P(), by_data, P()), out_specs=by_data)
    return jax.shard_map(body, **specs)(rows, slots, bias)


@jax.custom_vjp
def _sum_of_rows(rows, slots, bias):
    def of_request(at):
        terms = [_read(x, at[key]) for key, x in rows.items()]
        return sum(terms if bias is None else [*terms, bias])

    return lax.map(of_request, slots)


def _sum_of_rows_forward(rows, slots, bias):
    return _sum_of_rows(rows, slots, bias), (rows, slots, bias)


def _sum_of_rows_backward(saved, cotangent):
    rows, slots, bias = saved
    dbias = None if bias is None else jnp.sum(cotangent, (0, 1))

    def add(x, at):
        # As wide as sums are: in bfloat16 256 and 1 are 256.
        total = jnp.zeros(x.shape, accumulation_dtype(x.dtype))
        return total.at[at].add(cotangent.astype(total.dtype), mode="drop").astype(x.dtype)

    return {key: add(x, slots[key]) for key, x in rows.items()}, None, dbias


_sum_of_rows.defvjp(_sum_of_rows_forward, _sum_of_rows_backward)


def row_grad_squared_norm(row_grads: Mapping[str, jax.Array], plan: Plan) -> jax.Array:
    """[] float32: the squared norm of the table gradients, duplicates summed first.

    Rows beyond the distinct ids in use, and padding, receive no gradient, so this is a plain sum.
    """
    squares = [jnp.sum(jnp.square(row_grads[name])) for name in plan]
    return sum(squares, start=jnp.zeros((), jnp.float32))


def _flatten(ids):
    flat = jnp.concatenate([x.reshape(-1) for x in ids.values()])
    # A table that only histories use, and histories of length 0: one padding id, as ever.
    return flat if flat.size else jnp.zeros((1,), flat.dtype)


def _unflatten(flat, like):
    out, start = {}, 0
    for key, x in like.items():
        out[key] = flat[start : start + x.size].reshape(x.shape)
        start += x.size
    return out
