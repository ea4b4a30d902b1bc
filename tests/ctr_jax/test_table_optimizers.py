"""Table optimizers against float64 dictionaries of rows, one Python loop per row and step."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ctr_jax import embedding, table_optimizers
from ctr_jax.batch import RequestBatch
from ctr_jax.features import Column
from ctr_jax.table_optimizers import table_optimizer, touched_squared_norm
from tests.compiling import compiled_as_usual

V, WIDTH, B, L = 40, 3, 8, 5
NAMES = ["sgd", "adagrad", "rowwise_adagrad", "lazy_adam"]
COLUMNS = (Column("behaviour", "item", "item", WIDTH), Column("candidate", "item", "item", WIDTH))


def make_batch(ids):
    """ids [B, L + 1] -> a batch: L behaviours and one candidate."""
    zeros, ones = np.zeros(B, np.int32), np.ones((B, 1), bool)
    return RequestBatch(
        user_id=zeros,
        request_id=zeros,
        request_time=zeros,
        user={},
        context={},
        behaviour={"item": ids[:, :L]},
        behaviour_time=np.zeros((B, L), np.int32),
        behaviour_mask=ids[:, :L] != 0,
        candidate={"item": ids[:, L:]},
        candidate_mask=ones,
        label=np.zeros((B, 1), np.float32),
    )


def draw_step(rng, vocabulary=V):
    """Ids with padding, duplicates and rows of their own; weights whose sum is zero for one row."""
    ids = rng.choice(np.r_[0, 0, 1, rng.integers(1, vocabulary, 12)], (B, L + 1)).astype(np.int32)
    weights = rng.normal(size=(B, L + 1, WIDTH)).astype(np.float32)
    weights[ids == ids[0, L]] = 0.0  # a touched row with zero gradient
    return ids, weights


def step_function(optimizer, measured=False):
    """(tables, state), and with `measured` the norm of the rows that moved beside it."""

    def step(tables, state, ids, weights, number):
        batch = make_batch(ids)
        plan = embedding.lookup_ids(COLUMNS, batch, tables)

        def loss(rows):
            v = embedding.embed(rows, plan, COLUMNS, batch).vectors
            vectors = jnp.concatenate([v["behaviour/item"], v["candidate/item"]], 1)
            return jnp.sum(weights * vectors)

        rows = embedding.gather_rows(tables, plan)
        moved, state = optimizer.update(jax.grad(loss)(rows), state, tables, plan, number)
        if measured:
            return (moved, state), jnp.sqrt(touched_squared_norm(moved, plan))
        return moved, state

    return jax.jit(step, donate_argnums=(0, 1))


class Reference:
    """Rows in a dictionary; the update rules as the papers write them."""

    def __init__(self, name, table, rate, eps, b1=0.9, b2=0.999, initial=0.1, weight_decay=0.0):
        self.name, self.rate, self.eps, self.b1, self.b2 = name, rate, eps, b1, b2
        self.initial, self.weight_decay = initial, weight_decay
        self.rows = {i: row for i, row in enumerate(np.asarray(table, np.float64))}
        self.s, self.m, self.v = {}, {}, {}

    def step(self, ids, weights, t):
        grads = {}
        for i, g in zip(ids.reshape(-1).tolist(), weights.reshape(-1, WIDTH), strict=True):
            if i:
                grads[i] = grads.get(i, np.zeros(WIDTH)) + np.asarray(g, np.float64)
        rate = self.rate(t - 1) if callable(self.rate) else self.rate
        for i, g in grads.items():
            g = g + self.weight_decay * self.rows[i]
            if self.name == "sgd":
                move = g
            elif self.name == "lazy_adam":
                self.m[i] = self.b1 * self.m.get(i, 0) + (1 - self.b1) * g
                self.v[i] = self.b2 * self.v.get(i, 0) + (1 - self.b2) * g**2
                m, v = self.m[i] / (1 - self.b1**t), self.v[i] / (1 - self.b2**t)
                move = m / (np.sqrt(v) + self.eps)
            else:
                square = g**2 if self.name == "adagrad" else np.mean(g**2)
                self.s[i] = self.s.get(i, self.initial) + square
                move = g / np.sqrt(self.s[i] + self.eps)
            self.rows[i] = self.rows[i] - rate * move

    def table(self):
        return np.stack([self.rows[i] for i in range(len(self.rows))])


def fresh_tables():
    values = np.random.default_rng(0).normal(size=(V, WIDTH)).astype(np.float32)
    values[0] = 0.0
    return {"item": jnp.array(values)}


@pytest.fixture(params=["sparse", "dense"])
def path(request, monkeypatch):
    choice = request.param == "dense"
    monkeypatch.setattr(embedding, "takes_dense_path", lambda rows, ids: choice)
    return request.param


@pytest.mark.parametrize("name", NAMES)
def test_steps_equal_a_loop_over_rows(name, path, monkeypatch):
    monkeypatch.setattr(table_optimizers, "BLOCK", 7)  # several blocks, the last one ragged
    rate, eps, decay = (lambda step: 0.1 / (1 + step)), 1e-3, 0.01
    optimizer = table_optimizer(name, rate, eps=eps, weight_decay=decay)
    tables = fresh_tables()
    state = optimizer.init(tables)
    reference = Reference(name, tables["item"], rate, eps, weight_decay=decay)
    step, rng = step_function(optimizer), np.random.default_rng(1)
    for t in range(6):
        ids, weights = draw_step(rng)
        if t == 3:  # more distinct ids than whole blocks: the last block overlaps the one before
            ids = (np.arange(ids.size, dtype=np.int32) % (V - 2) + 1).reshape(ids.shape)
        before = jax.tree.map(np.array, (tables, state))
        tables, state = step(tables, state, ids, weights, t)
        reference.step(ids, weights, t + 1)
        np.testing.assert_allclose(tables["item"], reference.table(), rtol=2e-5, atol=2e-6)
        untouched = np.setdiff1d(np.arange(len(tables["item"])), ids[ids != 0])
        assert 0 in untouched
        for old, new in zip(jax.tree.leaves(before), jax.tree.leaves((tables, state)), strict=True):
            np.testing.assert_array_equal(np.asarray(new)[untouched], old[untouched])
    assert not tables["item"][0].any()


@pytest.mark.parametrize("mesh_shape", [(1, 1), (4, 2), (1, 8)])
def test_the_norm_of_the_rows_that_moved(path, mesh_shape, monkeypatch):
    monkeypatch.setattr(table_optimizers, "BLOCK", 7)
    mesh = jax.make_mesh(mesh_shape, ("data", "table"), axis_types=(AxisType.Auto,) * 2)
    rng, optimizer = np.random.default_rng(3), table_optimizer("sgd", 0.1, weight_decay=0.5)
    with jax.set_mesh(mesh):
        place = lambda x: jax.device_put(x, embedding.row_sharding(mesh, x))  # noqa: E731
        step, tables = step_function(optimizer, measured=True), place(fresh_tables())
        for t in range(3):
            ids, weights = draw_step(rng)
            (tables, _), norm = step(tables, optimizer.init(tables), ids, weights, t)
            want = np.linalg.norm(np.asarray(tables["item"])[np.unique(ids[ids > 0])])
            np.testing.assert_allclose(norm, want, rtol=1e-5)
        poisoned = np.array(tables["item"])
        poisoned[ids[ids > 0][0]] = np.nan
        tables = place({"item": jnp.array(poisoned)})
        assert not np.isfinite(step(tables, optimizer.init(tables), ids, weights, t)[1])


@pytest.mark.parametrize("name", ["adagrad", "lazy_adam"])
def test_every_row_touched_at_every_step_equals_optax(name):
    """Lazy Adam is Adam, and Adagrad optax's Adagrad, where no row is ever left out."""
    tables = fresh_tables()
    table, ids = tables["item"], np.arange(1, B * (L + 1) + 1, dtype=np.int32).reshape(B, L + 1)
    ids = (ids - 1) % (V - 1) + 1
    ours = table_optimizer(name, 0.1)
    theirs = {"adagrad": optax.adagrad(0.1), "lazy_adam": optax.adam(0.1)}[name]
    state, their_state = ours.init(tables), theirs.init(table)
    step, rng, expected = step_function(ours), np.random.default_rng(0), jnp.array(table)
    for t in range(5):
        weights = rng.normal(size=(B, L + 1, WIDTH)).astype(np.float32)
        grads = np.zeros(table.shape, np.float32)
        np.add.at(grads, ids.reshape(-1), weights.reshape(-1, WIDTH))
        updates, their_state = theirs.update(grads, their_state)
        expected = optax.apply_updates(expected, updates)
        tables, state = step(tables, state, ids, weights, t)
        np.testing.assert_allclose(tables["item"], expected, rtol=1e-5, atol=1e-6)


def test_zero_gradient_touches():
    """Lazy Adam: a row in the batch moves on by its decayed moments though its gradient is 0."""
    optimizer = table_optimizer("lazy_adam", 0.1)
    step, tables = step_function(optimizer), fresh_tables()
    state = optimizer.init(tables)
    ids = np.full((B, L + 1), 5, np.int32)
    tables, state = step(tables, state, ids, np.ones((B, L + 1, WIDTH), np.float32), 0)
    row, mu = np.array(tables["item"][5]), np.array(state["item"]["mu"][5])
    tables, state = step(tables, state, ids, np.zeros((B, L + 1, WIDTH), np.float32), 1)
    np.testing.assert_allclose(state["item"]["mu"][5], 0.9 * mu, rtol=1e-6)
    assert np.all(tables["item"][5] < row)


@hypothesis.settings(derandomize=True, deadline=None, max_examples=15)
@hypothesis.given(data=st.data())
def test_paths_agree_on_any_ids(data):
    """Sparse and dense give one result; ids with duplicates, padding and OOV."""
    ids = data.draw(
        st.lists(
            st.sampled_from([0, 1, 2, 3, 17, V - 1]), min_size=B * (L + 1), max_size=B * (L + 1)
        )
    )
    ids = np.array(ids, np.int32).reshape(B, L + 1)
    weights = np.random.default_rng(len(set(ids.flat))).normal(size=(*ids.shape, WIDTH))
    results = []
    for step, optimizer in compiled_paths():
        tables = fresh_tables()
        state = optimizer.init(tables)
        for t in range(2):
            tables, state = step(tables, state, ids, weights.astype(np.float32), t)
        results.append((tables, state))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), results[0], results[1]
    )


_COMPILED = []


def compiled_paths():
    """Steps of lazy Adam on both paths, compiled once for all examples."""
    if not _COMPILED:
        for dense in (False, True):
            optimizer = table_optimizer("lazy_adam", 0.1)
            step = step_function(optimizer)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(embedding, "takes_dense_path", lambda rows, ids, d=dense: d)
                tables = fresh_tables()
                ids = np.ones((B, L + 1), np.int32)
                weights = np.ones((B, L + 1, WIDTH), np.float32)
                step(tables, optimizer.init(tables), ids, weights, 0)
            _COMPILED.append((step, optimizer))
    return _COMPILED


@pytest.mark.parametrize("mesh_shape", [(8, 1), (4, 2), (1, 8)])
def test_meshes_equal_a_loop_over_rows(mesh_shape, monkeypatch):
    dense = mesh_shape == (8, 1)
    monkeypatch.setattr(embedding, "takes_dense_path", lambda rows, ids: dense)
    mesh = jax.make_mesh(mesh_shape, ("data", "table"), axis_types=(AxisType.Auto,) * 2)
    optimizer = table_optimizer("lazy_adam", 0.1, eps=1e-3)
    reference = Reference("lazy_adam", fresh_tables()["item"], 0.1, 1e-3)
    rng = np.random.default_rng(2)
    with jax.set_mesh(mesh):
        tables = jax.device_put(fresh_tables(), embedding.row_sharding(mesh, fresh_tables()))
        state = jax.device_put(
            optimizer.init(tables), embedding.row_sharding(mesh, optimizer.init(tables))
        )
        step = step_function(optimizer)
        for t in range(3):
            ids, weights = draw_step(rng, vocabulary=V)
            placed = jax.device_put((ids, weights), NamedSharding(mesh, P("data")))
            tables, state = step(tables, state, *placed, t)
            reference.step(ids, weights, t + 1)
    np.testing.assert_allclose(tables["item"], reference.table(), rtol=2e-5, atol=2e-6)
    assert not np.any(tables["item"][0])


def step_shapes(rows, optimizer, mesh=None):
    """Abstract arguments of a step on one table of `rows`."""
    tables = {"item": jax.ShapeDtypeStruct((rows, WIDTH), jnp.float32)}
    state = jax.eval_shape(optimizer.init, tables)
    batch = [
        jax.ShapeDtypeStruct((B, L + 1), jnp.int32),
        jax.ShapeDtypeStruct((B, L + 1, WIDTH), jnp.float32),
    ]
    if mesh is not None:

        def place(tree, shardings):
            return jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
            )

        tables = place(tables, embedding.row_sharding(mesh, tables))
        state = place(state, embedding.row_sharding(mesh, state))
        batch = place(batch, [NamedSharding(mesh, P("data"))] * 2)
    return tables, state, *batch, jax.ShapeDtypeStruct((), jnp.int32)


@pytest.mark.parametrize("name", ["adagrad", "lazy_adam"])
def test_nothing_grows_with_the_table(name):
    """No temporary, and no instruction but parameters and in-place writes, of the table's size."""
    optimizer, sizes = table_optimizer(name, 0.1), []
    for rows in (1 << 16, 1 << 24):
        step = step_function(optimizer, measured=True)
        compiled = compiled_as_usual(step.lower(*step_shapes(rows, optimizer)))
        sizes.append(compiled.memory_analysis().temp_size_in_bytes)
        made = made_arrays(compiled.as_text(), f"f32[{rows},{WIDTH}]")
        assert made <= {"parameter", "get-tuple-element", "scatter", "fusion", "while", "tuple"}
    assert sizes[0] == sizes[1] < 1 << 20


def made_arrays(hlo, shape):
    """The opcodes of instructions whose result is `shape`."""
    lines = [line.split(" = ", 1)[1] for line in hlo.splitlines() if f" = {shape}" in line]
    return {line.split(" ", 1)[1].split("(")[0] for line in lines}


@pytest.mark.parametrize("mesh_shape", [(4, 2), (1, 8)])
def test_no_device_holds_a_table(mesh_shape):
    """In the partitioned program nothing has more rows than a device's share of the table."""
    rows = 1 << 20
    mesh = jax.make_mesh(mesh_shape, ("data", "table"), axis_types=(AxisType.Auto,) * 2)
    optimizer = table_optimizer("adagrad", 0.1)
    with jax.set_mesh(mesh):
        arguments = step_shapes(rows, optimizer, mesh)
        compiled = compiled_as_usual(step_function(optimizer, measured=True).lower(*arguments))
    hlo = compiled.as_text()
    share = f"f32[{rows // mesh_shape[1]},{WIDTH}]"
    assert share in hlo and f"[{rows}" not in hlo
    assert made_arrays(hlo, share) <= {"parameter", "get-tuple-element", "scatter", "fusion"}
    assert compiled.memory_analysis().temp_size_in_bytes < 1 << 20


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="'adam'.*lazy_adam"):
        table_optimizer("adam", 0.1)
