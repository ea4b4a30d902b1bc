"""Live requests, whose history a store has just read: scored as evaluation scores, or refused."""

import dataclasses

import jax
import numpy as np
import pytest

import laser_jax.model
import seqvault
from ctr_jax import micro_batches, serving, sharding, steps
from ctr_jax.checkpoints import Checkpoints
from ctr_jax.config import identity
from ctr_jax.data import open_data, pipeline
from ctr_jax.data.errors import DataError
from tests.lrea_jax.cases import SPEC


def saved(config, workdir):
    """A checkpoint of a run of `config`, without training it; its prepared data set."""
    data, mesh = open_data(config), sharding.make_mesh(data=1, table=1)
    with jax.set_mesh(mesh):
        shapes = steps.state_shapes(steps.bind(config, data.spec, mesh, 1))
    rng = np.random.default_rng(0)

    def leaf(path, x):
        values = rng.normal(size=x.shape) * 0.4 + 0.2
        values = abs(values) + 0.5 if "variance" in jax.tree_util.keystr(path) else values
        return jax.device_put(values.astype(x.dtype), x.sharding)

    state = jax.tree_util.tree_map_with_path(leaf, shapes)
    checkpoints = Checkpoints(workdir)
    checkpoints.save(state, identity(config, data.spec.content_hash))
    checkpoints.close()
    return data


def first_batch(config, data):
    """The first of what evaluation scores of the test split."""
    how = dict(batch_size=config.eval_batch_size, history_length=config.history_length)
    return next(iter(pipeline.eval_batches(data.split("test"), **how)))


@pytest.mark.parametrize("model", ["laser", "din"])
def test_live_requests_are_scored_as_evaluation_scores_them(small_config, model, tmp_path):
    """Evaluation goes in three micro-batches: two requests do not divide into them."""
    if model == "laser":
        small_config.model = laser_jax.model.default_config()
        small_config.model.update(
            dict(embedding_width=4, width=8, segment=5, key_width=4, head_hidden=(6,),
                 num_layers=1, fusion_blocks=1)
        )  # fmt: skip
    small_config.micro_batch = 16
    data = saved(small_config, tmp_path / "run")
    experiment, weights, _ = serving.restore(small_config, tmp_path / "run")
    score, records = steps.score_step(experiment), data.split("test").records(np.arange(2))

    def columns(group):
        return {c.name: records[f"{group}/{c.name}"] for c in data.spec.group(group)}

    histories = serving.history_store(data)
    with seqvault.Vault.create(tmp_path / "vault", histories.schema) as vault:
        vault.bulk_load(histories.scan())
        live = serving.request_batch(
            data.spec,
            vault.last_n(
                records["user"], small_config.history_length, before=records["request_time"]
            ),
            time=records["request_time"],
            **{group: columns(group) for group in ("user", "context", "candidate")},
        )
    with jax.set_mesh(experiment.mesh):
        expected = np.asarray(score(weights, first_batch(small_config, data)))[:2]
        np.testing.assert_allclose(score(weights, live), expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(DataError, match="histories lie in its records"):
        serving.history_store(dataclasses.replace(data, histories=None))
    assert live.behaviour_mask.any() and len(np.unique(expected)) == 2


def test_parts_of_a_batch_of_any_size():
    sizes = {0: 1, 1: 1, 16: 1, 24: 1, 32: 2, 48: 3}
    assert {n: micro_batches.parts_of_any(n, 16, 1) for n in sizes} == sizes
    assert {n: micro_batches.parts_of_any(n, 8, 2) for n in sizes} == sizes
    assert micro_batches.parts_of_any(48, 0, 2) == 1


def request(**changes):
    """request_batch of three requests of SPEC; "group/name" or an argument's name is changed."""
    ids = np.arange(2, 8).reshape(3, 2)
    given = dict(
        history=dict(item=ids, type=ids, time=ids, mask=ids > 2),
        time=np.array([100, 200, 300]),
        user=dict(age=np.array([2, 3, 4])),
        context=dict(slot=np.array([2, 3, 4])),
        candidate=dict(item=np.tile(ids, 2), price=np.ones((3, 4))),
    )
    for name, values in changes.items():
        group, _, column = name.partition("/")
        if column:
            given[group][column] = np.asarray(values)
        else:
            given[group] = values
    return serving.request_batch(SPEC, **given)


def test_ids_of_any_integers_arrive_as_int32():
    for dtype in (np.int32, np.int64, np.uint8):
        batch = request(**{"candidate/item": np.array([[0, 8, 1]] * 3, dtype),
                           "candidate/price": np.ones((3, 3))})  # fmt: skip
        assert batch.candidate["item"].dtype == batch.request_time.dtype == np.int32
        assert batch.candidate["item"].tolist() == [[0, 8, 1]] * 3
        assert batch.shape == (3, 2, 3) and batch.request_time.tolist() == [100, 200, 300]
    assert request(time=np.array([-(2**31), 0, 2**31 - 1])).request_time[0] == -(2**31)
    no_history = {f"history/{name}": np.zeros((3, 0), int) for name in ("item", "type", "time")}
    assert request(**no_history, **{"history/mask": np.zeros((3, 0), bool)}).shape == (3, 0, 4)


OF_ITEM = "ids of vocabulary 'item' are 0 to 8, and 1 is unknown"
REFUSED = {
    "above": ({"candidate/item": [[2] * 4, [2, 2, 9, 2], [2] * 4]},
              rf"candidate/item\[1, 2\] is 9: {OF_ITEM}"),
    "int64": ({"candidate/item": [[2] * 4, [2] * 4, [2**32 + 5, 2, 2, 2]]},
              rf"candidate/item\[2, 0\] is 4294967301: {OF_ITEM}"),
    "negative": ({"history/item": [[2, 2], [2, -1], [2, 2]]}, r"behaviour/item\[1, 1\] is -1: ids"),
    "of users": ({"user/age": [2, 2, 90]}, r"user/age\[2\] is 90: ids of vocabulary 'age'"),
    "floats": ({"candidate/item": np.full((3, 4), 2.9)}, f"candidate/item is float64: {OF_ITEM}"),
    "no number": ({"candidate/price": np.where(np.eye(3, 4) == 1, np.nan, 1.0)},
                  r"candidate/price\[0, 0\] is nan: standardised values are finite numbers"),
    "texts": ({"candidate/price": np.full((3, 4), "1")}, "candidate/price is <U1: standardised"),
    "milliseconds": ({"time": np.array([100, 200, 1_700_000_000_000])},
                     r"time\[2\] is 1700000000000: times are seconds, as int32"),
    "milliseconds of behaviours": ({"history/time": [[0, 2**31]] * 3},
                                   r"history's time\[0, 1\] is 2147483648: times are seconds"),
    "float times": ({"time": np.array([1.0, 2, 3])}, "time is float64: times are seconds"),
    "one time": ({"time": np.array([100])}, r"shape \(3, 2\), not \(1, 2\)"),
    "a number": ({"time": 100}, r"time has shape \(\), not \[B\]"),
    "one user": ({"user/age": [2]}, r"user/age has shape \(1,\), not \(3,\)"),
    "one request": ({"candidate/price": np.ones((1, 4))},
                    r"candidate/price has shape \(1, 4\), not \(3, 4\)"),
    "flat candidates": ({"candidate/item": [2, 2, 2]},
                        r"candidate/item has shape \(3,\), not \[B, C\]"),
    "other length": ({"history/type": [[2]] * 3},
                     r"behaviour/type has shape \(3, 1\), not \(3, 2\)"),
    "left-aligned": ({"history/mask": [[False, True], [True, False], [True, True]]},
                     r"history's mask\[1, 0\] is True: a history stands at the right"),
    "mask of numbers": ({"history/mask": np.ones((3, 2), np.int8)}, "must be bool, not int8"),
    "no column": ({"candidate": dict(item=np.ones((3, 4), int))}, r"columns \['price'\] of 'test'"),
    "no mask": ({"history": dict(item=np.ones((3, 2), int), type=np.ones((3, 2), int))},
                r"the history has no \['time', 'mask'\]"),
}  # fmt: skip


@pytest.mark.parametrize("changes, match", REFUSED.values(), ids=REFUSED)
def test_what_a_model_would_misread_is_refused(changes, match):
    with pytest.raises(ValueError, match=match) as error:
        request(**changes)
    assert "\n" not in str(error.value)
