"""Reading compiled programs: hand-written text whose answers are known, and real programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ctr_jax import embedding, hlo, sharding
from ctr_jax.batch import RequestBatch
from ctr_jax.features import Column
from ctr_jax.table_optimizers import table_optimizer, touched_squared_norm

TEXT = """HloModule step, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%inside (p: f32[16,4]) -> f32[16,4] {
  %p = f32[16,4]{1,0:T(8,128)} parameter(0)
  ROOT %huge = f32[9999,9999]{1,0} multiply(%p, %p)
}

%body (t: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %t = (s32[], f32[8,8]{1,0}) parameter(0)
  %x = f32[8,8]{1,0} get-tuple-element(%t), index=1
  %reduced = f32[8,8]{1,0} all-reduce(%x), replica_groups=[2,4]<=[8], to_apply=%sum
  ROOT %next = (s32[], f32[8,8]{1,0}) tuple(%t, %reduced)
}

%condition (t.1: (s32[], f32[8,8])) -> pred[] {
  %t.1 = (s32[], f32[8,8]{1,0}) parameter(0)
  ROOT %less = pred[] compare(%t.1, %t.1), direction=LT
}

ENTRY %main (w: f32[16,4], v: bf16[30,3]) -> f32[16,4] {
  %w = f32[16,4]{1,0:T(8,128)} parameter(0), metadata={op_name="state[\\'tables\\'][\\'item\\']"}
  %v = bf16[30,3]{0,1:T(8,128)(2,1)} parameter(1), metadata={op_name="batch.x"}
  %near = f32[16,4]{1,0:T(8,128)S(1)} copy(%w)
  %quick = f32[8,8]{1,0:S(1)} all-reduce(%near), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%sum
  %loop = (s32[], f32[8,8]{1,0}) while(%w), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"5"}}
  %all = (f32[2,4]{1,0}, f32[16,4]{1,0}) all-gather-start(%w), replica_groups={{0,1,2,3,4,5,6,7}}
  %fused = f32[16,4]{1,0:T(8,128)} fusion(%w), kind=kLoop, calls=%inside, \
metadata={op_name="jit(f)/transpose(jvp(Model))/while/body/closed_call/block/add"}
  ROOT %out = f32[16,4]{1,0} add(%fused, %fused)
}
"""


def test_arguments_with_the_padding_of_their_layout():
    # [16, 4] in tiles of 8 x 128: 16 x 128. [30, 3], the first axis minor: 3 -> 8, 30 -> 128.
    assert hlo.parameters(TEXT) == [
        ("state['tables']['item']", 16 * 128 * 4),
        ("batch.x", 8 * 128 * 2),
    ]


def test_what_is_sent_counts_loops_groups_and_faster_memory():
    assert hlo.traffic(TEXT, devices=8) == {
        "all-reduce": (6, 5 * round(2 * 3 / 4 * 8 * 8 * 4) + round(2 * 7 / 8 * 8 * 8 * 4)),
        "all-gather": (1, round(7 / 8 * 16 * 4 * 4)),
    }


@pytest.mark.parametrize(
    "groups, size",
    [
        ("{{0,2,4,6},{1,3,5,7}}", 4),
        ("[4,2]<=[8]", 2),
        ("mesh['data'=4,'table'=2] {'table'}", 2),
        ("mesh['data'=4,'table'=2] {'data','table'}", 8),
        ("mesh['data'=4,'table'=2] {'data':(1)2}", 2),
        ("{}", 8),
    ],
)
def test_the_sizes_of_groups(groups, size):
    text = TEXT.replace("{{0,1,2,3,4,5,6,7}}", groups)
    sent = round((size - 1) / size * 16 * 4 * 4)
    assert hlo.traffic(text, devices=8)["all-gather"] == (1, sent)


def test_the_largest_arrays_are_those_in_memory():
    found = hlo.largest(TEXT, 1)
    assert found == [(16 * 128 * 4, "f32[16,4]", "backward: block/add")]
    assert not any("9999" in shape for _, shape, _ in hlo.largest(TEXT, 100))


def test_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.instructions("module { }")


def test_what_real_collectives_send():
    mesh = sharding.make_mesh(data=8, table=1)
    x = jax.ShapeDtypeStruct((64, 16), np.float32, sharding=NamedSharding(mesh, P("data")))

    def gathered(x):
        return jax.lax.all_gather(x, "data", tiled=True)

    def compiled(body, out):
        f = jax.shard_map(body, mesh=mesh, in_specs=P("data"), out_specs=out, check_vma=False)
        return jax.jit(f).lower(x).compile().as_text()

    total = 64 * 16 * 4
    assert hlo.traffic(compiled(gathered, P()), 8) == {"all-gather": (1, total * 7 // 8)}
    summed = compiled(lambda x: jax.lax.psum(x, "data"), P())
    assert hlo.traffic(summed, 8) == {"all-reduce": (1, 2 * (total // 8) * 7 // 8)}


ROWS, WIDTH = 1 << 16, 8


def _step_on_a_mesh(data, table):
    """The text of lookup, gradient and update of one table on a mesh."""
    mesh = sharding.make_mesh(data=data, table=table)
    columns = (Column("behaviour", "item", "item", WIDTH),)
    optimizer = table_optimizer("lazy_adam", learning_rate=lambda step: 0.1)
    by_row = NamedSharding(mesh, P("table"))
    by_request = NamedSharding(mesh, P("data"))

    def step(tables, state, ids, step):
        none = jnp.zeros(ids.shape[:1], jnp.int32)
        batch = RequestBatch(
            user_id=none, request_id=none, request_time=none, user={}, context={},
            behaviour={"item": ids}, behaviour_time=ids, behaviour_mask=ids > 0, candidate={},
            candidate_mask=ids[:, :1] > 0, label=none[:, None],
        )  # fmt: skip
        plan = embedding.lookup_ids(columns, batch, tables)
        rows = embedding.gather_rows(tables, plan)

        def loss(rows):
            return sum(
                jnp.square(x).sum()
                for x in embedding.embed(rows, plan, columns, batch).vectors.values()
            )

        moved, state = optimizer.update(jax.grad(loss)(rows), state, tables, plan, step)
        return (moved, state), touched_squared_norm(moved, plan)

    with jax.set_mesh(mesh):
        tables = {"item": jnp.zeros((ROWS, WIDTH))}
        shapes = jax.eval_shape(lambda: (tables, optimizer.init(tables)))
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=by_row), shapes
        )
        ids = jax.ShapeDtypeStruct((16, 10), np.int32, sharding=by_request)
        number = jax.ShapeDtypeStruct((), np.int32)
        return jax.jit(step, donate_argnums=(0, 1)).lower(*shapes, ids, number).compile().as_text()


@pytest.mark.parametrize("data, table", [(1, 8), (2, 4), (8, 1)])
def test_no_device_holds_a_table_or_a_gradient_of_its_size(data, table):
    text = _step_on_a_mesh(data, table)
    shard = ROWS // table
    made = [
        [int(n) for n in shape[shape.index("[") + 1 : -1].split(",") if n]
        for each in hlo.instructions(text)
        for shape, _ in each.arrays
    ]
    rows = [max(shape) for shape in made if shape]
    assert max(rows) == shard  # the updated shard itself, in the place of the old one
    ids = 16 * 10  # in all; what travels is theirs
    for each in hlo.instructions(text):
        if each.opcode.removesuffix("-start") in hlo.COLLECTIVES:
            assert each.bytes <= ids * (WIDTH + 1) * 4, each
        if table == 8 and each.opcode in ("copy", "multiply", "sqrt", "divide") and not each.fused:
            assert each.bytes < shard * WIDTH * 4, each
