import json

from ctr_jax.writers import MetricWriter, write_json


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_resuming_drops_later_lines_and_a_torn_one(tmp_path):
    writer = MetricWriter(tmp_path)
    for step in (10, 20, 30):
        writer.write(step, {"loss": 1.0 / step})
    writer.close()
    log = tmp_path / "train.jsonl"
    with log.open("a") as file:
        file.write('{"step": 40, "lo')
    writer = MetricWriter(tmp_path, start_step=20)
    writer.write(30, {"loss": 7.0})
    writer.close()
    assert [(r["step"], r["loss"]) for r in read(log)] == [(10, 0.1), (20, 0.05), (30, 7.0)]


def test_json_is_replaced_whole(tmp_path):
    path = tmp_path / "a" / "x.json"
    write_json(path, {"b": 1})
    write_json(path, {"b": 2})
    assert json.loads(path.read_text()) == {"b": 2}
    assert list(path.parent.iterdir()) == [path]
