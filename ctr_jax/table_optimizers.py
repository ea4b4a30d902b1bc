"""Optimizers for embedding tables: only rows that occur in the batch move, and only their moments.

Optax updates every row at every step; these take gradients with respect to the touched rows
(`embedding.gather_rows`) and write into the donated tables in place. A touched row whose gradient
is zero is touched all the same: lazy Adam decays its moments. The padding row is never touched.

Donation: JAX pairs donated arguments with results of the same shape in order. A step that returns
tables and state in the order it takes them, as one state pytree does, writes in place; one that
takes (state, tables) and returns (tables, state) copies both.

Axis letters: N distinct ids (capacity), V rows of a table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from ctr_jax.embedding import TABLE_AXIS, Plan, TablePlan, context_mesh

Schedule = Callable[[jax.Array], jax.Array]
State = dict[str, dict[str, jax.Array]]
# Rows updated at a time: the work follows the number of distinct ids, not the capacity for them.
BLOCK = 8192


class TableOptimizer(NamedTuple):
    """A pair of pure functions.

    Attributes:
      init: (tables) -> state {table: {slot: [V, width] or [V]}}.
      update: (row_grads, state, tables, plan, step, earlier = 0) -> (tables, state); `step` is the
        number of updates that this run has made before this one, `earlier` those that the state saw
        in runs before. `jax.grad` with respect to the result of `gather_rows` has duplicates summed
        already.
    """

    init: Callable[[Mapping[str, jax.Array]], State]
    update: Callable[..., tuple[dict[str, jax.Array], State]]


class _Rule(NamedTuple):
    """An optimizer of a block of rows: init(table) -> slots; step(grad, slots, t) -> (move, slots).

    The row changes by -learning_rate * move. Every slot's first axis is the table's.
    """

    init: Callable[[jax.Array], dict[str, jax.Array]]
    step: Callable[..., tuple[jax.Array, dict[str, jax.Array]]]


def table_optimizer(
    name: str,
    learning_rate: float | Schedule,
    *,
    eps: float | None = None,
    initial_accumulator: float = 0.1,
    b1: float = 0.9,
    b2: float = 0.999,
    weight_decay: float = 0.0,
) -> TableOptimizer:
    """The optimizer of all tables.

    "sgd": row -= lr g.
    "adagrad" (Duchi et al. 2011, diagonal): s += g^2; row -= lr g / sqrt(s + eps); optax's form.
    "rowwise_adagrad" (Gupta et al. 2014; FBGEMM): one s a row, s += mean(g^2) over the width.
    "lazy_adam": m = b1 m + (1 - b1) g, v = b2 v + (1 - b2) g^2 on touched rows only;
      row -= lr m' / (sqrt(v') + eps), m' = m / (1 - b1^t), v' = v / (1 - b2^t),
      t = earlier + step + 1.

    Args:
      learning_rate: a number, or a function of the step.
      eps: 1e-7 for Adagrad, 1e-8 for lazy Adam unless given.
      initial_accumulator: Adagrad's s before the first step.
      weight_decay: adds weight_decay * row to the gradient of touched rows (L2 on rows in use).

    Raises:
      ValueError: unknown name.
    """
    rules = {
        "sgd": _sgd,
        "adagrad": lambda: _adagrad(1e-7 if eps is None else eps, initial_accumulator, False),
        "rowwise_adagrad": lambda: _adagrad(
            1e-7 if eps is None else eps, initial_accumulator, True
        ),
        "lazy_adam": lambda: _lazy_adam(1e-8 if eps is None else eps, b1, b2),
    }
    if name not in rules:
        raise ValueError(f"table optimizer {name!r} is not one of {sorted(rules)}")
    rule = rules[name]()

    def init(tables):
        return {table: rule.init(values) for table, values in tables.items()}

    def update(row_grads, state, tables, plan: Plan, step, earlier: int = 0):
        rate = learning_rate(step) if callable(learning_rate) else learning_rate
        scalars = jnp.asarray(rate, jnp.float32), jnp.asarray(step, jnp.float32) + (1 + earlier)

        def move(rows, grads, slots, rate, t):
            grads = grads + weight_decay * rows if weight_decay else grads
            direction, slots = rule.step(grads, slots, t)
            return rows - rate * direction, slots

        tables, state = dict(tables), dict(state)
        for table, part in plan.items():
            tables[table], state[table] = _update_table(
                move, scalars, tables[table], state[table], row_grads[table], part
            )
        return tables, state

    return TableOptimizer(init, update)


def touched_squared_norm(tables: Mapping[str, jax.Array], plan: Plan) -> jax.Array:
    """[] float32: the squared norm of the rows of a batch after their update, not finite where one
    of them no longer is. Of the rows, not of what was added: reading both costs a copy of a table.
    """
    squares = [_touched_square(tables[name], part) for name, part in plan.items()]
    return sum(squares, start=jnp.zeros((), jnp.float32))


def _touched_square(table, part: TablePlan):
    if part.dense:
        return jnp.sum(jnp.square(jnp.where(part.touched[:, None], table, 0.0)))
    if context_mesh() is None:
        return _square_in_place(table, part.unique, part.count)
    by_row = P(TABLE_AXIS)
    return jax.shard_map(
        lambda *arrays: lax.psum(_square_in_place(*arrays), TABLE_AXIS),
        in_specs=(by_row, by_row, by_row),
        out_specs=P(),
        check_vma=False,
    )(table, part.unique, part.count)


def _square_in_place(table, unique, count):
    """Of rows `unique[:count]`, block by block as they were updated."""

    def add_block(start, in_use, row, total):
        values = jnp.where(in_use[:, None], table.at[row].get(mode="clip"), 0.0)
        return total + jnp.sum(jnp.square(values))

    return _over_blocks(add_block, jnp.zeros((), jnp.float32), unique, count)


def _sgd() -> _Rule:
    return _Rule(lambda table: {}, lambda grad, slots, t: (grad, slots))


def _adagrad(eps, initial, rowwise) -> _Rule:
    def init(table):
        shape = table.shape[:1] if rowwise else table.shape
        return {"sum_of_squares": jnp.full(shape, initial, jnp.float32)}

    def step(grad, slots, t):
        square = jnp.square(grad)
        total = slots["sum_of_squares"] + (jnp.mean(square, axis=1) if rowwise else square)
        scale = jnp.where(total > 0, lax.rsqrt(total + eps), 0.0)
        return grad * (scale[:, None] if rowwise else scale), {"sum_of_squares": total}

    return _Rule(init, step)


def _lazy_adam(eps, b1, b2) -> _Rule:
    def init(table):
        return {
            "mu": jnp.zeros(table.shape, jnp.float32),
            "nu": jnp.zeros(table.shape, jnp.float32),
        }

    def step(grad, slots, t):
        mu = b1 * slots["mu"] + (1 - b1) * grad
        nu = b2 * slots["nu"] + (1 - b2) * jnp.square(grad)
        unbiased = jnp.sqrt(nu / (1 - b2**t)) + eps
        return mu / (1 - b1**t) / unbiased, {"mu": mu, "nu": nu}

    return _Rule(init, step)


def _update_table(move, scalars, table, slots, grads, part: TablePlan):
    if part.dense:
        moved = move(table, grads, slots, *scalars)
        return jax.tree.map(
            lambda new, old: jnp.where(_like(part.touched, new), new, old), moved, (table, slots)
        )
    if context_mesh() is None:
        return _update_in_place(move, scalars, table, slots, grads, part.unique, part.count)
    by_row = P(TABLE_AXIS)
    # Each table shard updates its own rows; shards of "data" hold the same and do the same.
    return jax.shard_map(
        lambda *arrays: _update_in_place(move, *arrays),
        in_specs=(P(), by_row, by_row, by_row, by_row, by_row),
        out_specs=(by_row, by_row),
        check_vma=False,
    )(scalars, table, slots, grads, part.unique, part.count)


def _update_in_place(move, scalars, table, slots, grads, unique, count):
    """Moves rows `unique[:count]`, a block at a time: time follows count, memory the block."""

    def update_block(start, in_use, row, carry):
        # Places not in use write past the end, where a write is dropped; all are distinct.
        row = jnp.where(in_use, row, table.shape[0] + jnp.arange(len(row)))
        old = jax.tree.map(lambda x: x.at[row].get(mode="clip"), carry)
        grad = lax.dynamic_slice_in_dim(grads, start, len(row))
        new = move(old[0], grad, old[1], *scalars)
        return jax.tree.map(
            lambda x, y: x.at[row].set(y, mode="drop", unique_indices=True), carry, new
        )

    return _over_blocks(update_block, (table, slots), unique, count)


def _over_blocks(body, carry, unique, count):
    """carry after body(start, in_use, unique[start : start + block], carry) of each block of the
    first `count`; in_use says which of a block are among these and in no block before."""
    capacity, count = unique.shape[0], count[0]
    block = min(BLOCK, capacity)

    def of_block(i, carry):
        start = jnp.minimum(
            i * block, capacity - block
        )  # the last block may overlap the one before
        position = start + jnp.arange(block)
        in_use = (position >= i * block) & (position < count)
        return body(start, in_use, lax.dynamic_slice_in_dim(unique, start, block), carry)

    if block == capacity:
        return of_block(0, carry)
    return lax.fori_loop(0, (count + block - 1) // block, of_block, carry)


def _like(mask: jax.Array, x: Any) -> jax.Array:
    return mask.reshape(mask.shape + (1,) * (x.ndim - 1))
