"""Lookups and their gradients against plain loops over rows, on one device and on meshes."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ctr_jax import embedding
from ctr_jax.batch import RequestBatch
from ctr_jax.deduplication import deduplicate
from ctr_jax.features import Column

SHAPES = {"item": (1000, 4), "item:second": (1000, 3), "gender": (5, 2)}
COLUMNS = (
    Column("behaviour", "item", "item", 4),
    Column("candidate", "item", "item", 4),
    Column("candidate", "item", "item:second", 3, name="item_again"),
    Column("user", "gender", "gender", 2),
    Column("context", "gender", "gender", 2),
    Column("candidate", "price"),
    Column("user", "age"),
)
MESHES = [
    pytest.param((1, 1), marks=pytest.mark.slow),
    pytest.param((8, 1), marks=pytest.mark.slow),
    (4, 2),
    (1, 8),
]


def make_batch(seed, b=8, length=6, c=3, vocabulary=1000):
    """Ids with duplicates, padding and OOV; dense columns with values even at padding."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, length + 1, b)
    behaviour_mask = np.arange(length) >= length - lengths[:, None]
    candidate_mask = np.arange(c) < rng.integers(0, c + 1, b)[:, None]
    popular = rng.integers(1, vocabulary, 7)
    popular[0], popular[1] = 1, vocabulary - 1  # OOV and the last row are in

    def ids(shape, mask):
        draw = np.where(rng.random(shape) < 0.5, rng.choice(popular, shape), 0)
        draw = np.where(draw == 0, rng.integers(1, vocabulary, shape), draw)
        return np.where(mask, draw, 0).astype(np.int32)

    zeros = np.zeros(b, np.int32)
    return RequestBatch(
        user_id=zeros,
        request_id=zeros,
        request_time=zeros,
        user={
            "gender": rng.integers(0, 5, b).astype(np.int32),
            "age": rng.normal(size=b).astype(np.float32),
        },
        context={"gender": rng.integers(0, 5, b).astype(np.int32)},
        behaviour={"item": ids((b, length), behaviour_mask)},
        behaviour_time=np.zeros((b, length), np.int32),
        behaviour_mask=behaviour_mask,
        candidate={
            "item": ids((b, c), candidate_mask),
            "price": rng.normal(size=(b, c)).astype(np.float32),
        },
        candidate_mask=candidate_mask,
        label=np.zeros((b, c), np.float32),
    )


def looked_up(tables, batch):
    """The reference: {key: vectors}, one Python lookup per id."""
    out = {}
    for column in COLUMNS:
        values = np.asarray(batch.values(column.group, column.source))
        if column.table:
            table = np.asarray(tables[column.table], np.float64)
            flat = [table[i] if i != 0 else np.zeros(column.width) for i in values.reshape(-1)]
            out[column.key] = np.array(flat).reshape(*values.shape, column.width)
        else:
            masks = {"behaviour": batch.behaviour_mask, "candidate": batch.candidate_mask}
            out[column.key] = (values * masks.get(column.group, 1))[..., None]
    return out


def table_gradients(batch, weights):
    """The reference: {table: {row: gradient}} of sum(weights * vectors), in float64."""
    out = {}
    for column in COLUMNS:
        if column.table:
            ids = np.asarray(batch.values(column.group, column.source)).reshape(-1)
            w = np.asarray(weights[column.key], np.float64).reshape(len(ids), column.width)
            rows = out.setdefault(column.table, {})
            for i, g in zip(ids.tolist(), w, strict=True):
                if i != 0:
                    rows[i] = rows.get(i, np.zeros(column.width)) + g
    return out


def draw_weights(batch, seed):
    rng = np.random.default_rng(seed)
    return {
        c.key: rng.normal(size=(*batch.values(c.group, c.source).shape, c.width)).astype(np.float32)
        for c in COLUMNS
    }


def forward_and_gradient(tables, batch, weights):
    """(vectors, row gradients, plan, squared norm) of sum(weights * vectors)."""

    plan = embedding.lookup_ids(COLUMNS, batch, tables)
    rows = embedding.gather_rows(tables, plan)

    def loss(rows):
        vectors = embedding.embed(rows, plan, COLUMNS, batch).vectors
        return sum(jnp.sum(weights[k] * vectors[k]) for k in vectors), vectors

    grads, vectors = jax.grad(loss, has_aux=True)(rows)
    return vectors, grads, plan, embedding.row_grad_squared_norm(grads, plan)


def spread(grads, part, shape):
    """Row gradients laid out over the table's rows."""
    if part.dense:
        return np.asarray(grads)
    counts, unique = np.asarray(part.count), np.asarray(part.unique)
    shards, capacity = len(counts), len(unique) // len(counts)
    out = np.zeros(shape, np.float32)
    for t in range(shards):
        mine = slice(t * capacity, t * capacity + counts[t])
        out[unique[mine] + t * (shape[0] // shards)] = np.asarray(grads)[mine]
        np.testing.assert_array_equal(grads[t * capacity + counts[t] : (t + 1) * capacity], 0)
    return out


def assert_matches_reference(tables, batch, weights, result):
    vectors, row_grads, plan, norm = result
    grads = {t: spread(row_grads[t], plan[t], tables[t].shape) for t in plan}
    for key, expected in looked_up(tables, batch).items():
        np.testing.assert_allclose(vectors[key], expected, rtol=1e-6, atol=1e-7, err_msg=key)
    expected_norm = 0.0
    for table, rows in table_gradients(batch, weights).items():
        dense = np.zeros(tables[table].shape)
        for i, g in rows.items():
            dense[i] = g
            expected_norm += np.sum(np.square(g))
        np.testing.assert_allclose(grads[table], dense, rtol=1e-5, atol=1e-5, err_msg=table)
        assert not grads[table][0].any()
    np.testing.assert_allclose(norm, expected_norm, rtol=1e-5)


PATHS = {
    "sparse": lambda rows, ids: False,
    "dense": lambda rows, ids: True,
    "mixed": lambda rows, ids: rows <= 256,  # gender dense, item sparse
}


def jitted_anew(function):
    """jax.jit without the traces of earlier calls, which may have taken the other path."""
    return jax.jit(lambda *arguments: function(*arguments))


@pytest.fixture(params=["sparse", "dense"])
def path(request, monkeypatch):
    """Each path forced, whatever the rule would say."""
    monkeypatch.setattr(embedding, "takes_dense_path", PATHS[request.param])
    return request.param


def test_lookup_and_gradient_equal_loops(path):
    tables = embedding.init_tables(jax.random.key(0), SHAPES, scale=1.0)
    compiled = jitted_anew(forward_and_gradient)
    for seed in range(4):
        batch, weights = make_batch(seed), draw_weights(make_batch(seed), seed)
        result = compiled(tables, batch, weights)
        assert_matches_reference(tables, batch, weights, result)
        if path == "dense":
            ids = {*batch.behaviour["item"].flat, *batch.candidate["item"].flat} - {0}
            assert set(np.flatnonzero(result[2]["item"].touched).tolist()) == ids


@pytest.mark.parametrize("mesh_shape", MESHES)
def test_meshes_equal_loops(mesh_shape, monkeypatch):
    monkeypatch.setattr(embedding, "takes_dense_path", PATHS["mixed"])
    mesh = jax.make_mesh(mesh_shape, ("data", "table"), axis_types=(AxisType.Auto,) * 2)
    plain = embedding.init_tables(jax.random.key(3), SHAPES, scale=1.0)
    with jax.set_mesh(mesh):
        tables = embedding.init_tables(jax.random.key(3), SHAPES, scale=1.0, mesh=mesh)
        jax.tree.map(np.testing.assert_array_equal, tables, plain)
        shard = tables["item"].addressable_shards[0].data
        assert shard.shape[0] == plain["item"].shape[0] // mesh_shape[1]
        compiled = jitted_anew(forward_and_gradient)
        for seed in range(2):
            batch, weights = make_batch(seed), draw_weights(make_batch(seed), seed)
            placed = jax.device_put((batch, weights), NamedSharding(mesh, P("data")))
            result = jax.device_get(compiled(tables, *placed))
            assert_matches_reference(plain, batch, weights, result)


def test_gradient_equals_dense_autodiff(path):
    tables = embedding.init_tables(jax.random.key(0), SHAPES, scale=1.0)
    batch = make_batch(5)
    weights = draw_weights(batch, 5)

    def score(vectors):
        return sum(jnp.sum(jnp.sin(vectors[k]) * weights[k]) for k in vectors)

    def plain(tables):
        vectors = {}
        for c in COLUMNS:
            ids = batch.values(c.group, c.source)
            if c.table:
                vectors[c.key] = jnp.where((ids != 0)[..., None], tables[c.table][ids], 0.0)
        return score(vectors)

    columns = [c for c in COLUMNS if c.table]

    @jax.jit
    def ours(tables):
        plan = embedding.lookup_ids(columns, batch, tables)
        rows = embedding.gather_rows(tables, plan)
        loss = lambda rows: score(embedding.embed(rows, plan, columns, batch).vectors)  # noqa: E731
        return jax.grad(loss)(rows), plan

    grads, plan = ours(tables)
    for table, expected in jax.jit(jax.grad(plain))(tables).items():
        got = spread(grads[table], plan[table], tables[table].shape)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", ["hash", "sort"])
@hypothesis.settings(derandomize=True, deadline=None, max_examples=30)
@hypothesis.given(data=st.data())
def test_deduplicate_equals_a_set(implementation, data):
    cases = [(1, 1), (64, 3), (64, 50), (64, 2**31 - 3), (3, 2**31 - 1)]
    n, biggest = data.draw(st.sampled_from(cases))
    ids = np.array(data.draw(st.lists(st.integers(0, biggest), min_size=n, max_size=n)), np.int32)
    unique, count, slots = jax.jit(deduplicate, static_argnums=(1, 2))(
        ids, min(n, biggest + 1), implementation
    )
    expected = {i for i in ids.tolist() if i}
    assert count == len(expected)
    assert set(np.asarray(unique[:count]).tolist()) == expected
    assert not np.asarray(unique[count:]).any()
    padded = np.append(unique, 0)  # the place past the end is padding
    np.testing.assert_array_equal(padded[slots], ids)


def test_deduplicate_many_and_colliding():
    """All distinct, and ids that all want one slot of the scratch table."""
    inverse = pow(0x9E3779B1, -1, 2**32)
    colliding = [i * inverse % 2**32 for i in range(1, 4000)]
    colliding = [i for i in colliding if i < 2**31][:1500]
    for ids in (np.arange(1, 20001), np.array(colliding)):
        unique, count, slots = jax.jit(deduplicate, static_argnums=1)(ids, ids.size)
        assert count == ids.size
        np.testing.assert_array_equal(np.asarray(unique)[slots], ids)
    with pytest.raises(ValueError, match="quick"):
        deduplicate(ids, ids.size, "quick")


BAD_IDS = [-1, -1000, 1024, 2**31 - 1]


def test_an_id_outside_its_table_reads_as_nan(path):
    tables = embedding.init_tables(jax.random.key(0), SHAPES, scale=1.0)
    assert_bad_ids_read_as_nan(tables)


def test_an_id_outside_its_table_reads_as_nan_on_a_mesh(monkeypatch):
    monkeypatch.setattr(embedding, "takes_dense_path", PATHS["mixed"])
    mesh = jax.make_mesh((4, 2), ("data", "table"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        tables = embedding.init_tables(jax.random.key(0), SHAPES, scale=1.0, mesh=mesh)
        assert_bad_ids_read_as_nan(tables)


def assert_bad_ids_read_as_nan(tables):
    columns = COLUMNS[:2]

    @jax.jit
    def lookup(tables, batch):
        plan = embedding.lookup_ids(columns, batch, tables)
        return embedding.embed(embedding.gather_rows(tables, plan), plan, columns, batch).vectors

    for bad in BAD_IDS:
        batch = make_batch(0)
        batch.candidate["item"][0, 0] = bad
        assert np.isnan(np.asarray(lookup(tables, batch)["candidate/item"])[0, 0]).all()


def test_a_table_of_histories_alone_may_meet_histories_of_length_zero():
    columns = (Column("behaviour", "item", "item", 4), Column("user", "gender", "gender", 2))
    tables = {"item": jnp.ones((9, 4)).at[0].set(0), "gender": jnp.ones((9, 2)).at[0].set(0)}
    batch = make_batch(0, length=0)
    plan = embedding.lookup_ids(columns, batch, tables)
    rows = embedding.gather_rows(tables, plan)
    vectors = embedding.embed(rows, plan, columns, batch).vectors
    assert vectors["behaviour/item"].shape == (8, 0, 4)
    grads = jax.grad(
        lambda rows: sum(
            x.sum() for x in embedding.embed(rows, plan, columns, batch).vectors.values()
        )
    )(rows)
    assert not np.asarray(grads["item"]).any()


def test_tables_fed_by_one_column_share_their_ids(monkeypatch):
    monkeypatch.setattr(embedding, "takes_dense_path", PATHS["sparse"])
    columns = (
        Column("candidate", "item", "item", 4),
        Column("candidate", "item", "item:second", 3, name="item_again"),
    )
    shared = []

    def trace(batch, tables):
        plan = embedding.lookup_ids(columns, batch, tables)
        shared.append(plan["item"].unique is plan["item:second"].unique)
        return plan

    tables = {t: jax.ShapeDtypeStruct((1024, w), jnp.float32) for t, (_, w) in SHAPES.items()}
    plan = jax.eval_shape(trace, make_batch(0), tables)
    assert shared == [True]
    assert list(plan["item:second"].slots) == ["candidate/item_again"]


def test_init_tables():
    tables = embedding.init_tables(jax.random.key(0), {"a": (300, 8), "b": (3, 2)}, scale=0.5)
    assert tables["a"].shape == (512, 8) and tables["b"].shape == (256, 2)
    assert not tables["a"][0].any() and not tables["a"][300:].any()
    assert np.all(np.any(np.asarray(tables["a"][1:300]) != 0, axis=1))
    np.testing.assert_allclose(np.std(tables["a"][1:300]), 0.5, rtol=0.1)
    alone = embedding.init_tables(jax.random.key(0), {"a": (300, 8)}, scale=0.5)
    np.testing.assert_array_equal(alone["a"], tables["a"])


def test_a_mesh_without_the_axes_is_refused():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="'data' and 'table'"):
        embedding.context_mesh()
