"""The published files of MovieLens 1M become the raw files of the pages."""

import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from examples import movielens_1m

ROOT = Path(__file__).resolve().parents[2]
FILES = {
    "movies.dat": "1::Toy Story (1995)::Animation|Children's\n2::Am\xe9lie (2001)::Comedy\n",
    "ratings.dat": "2::1::5::9\n1::2::3::30\n1::1::4::20\n1::2::1::20\n",
    "users.dat": "1::F::1::10::48067\n2::M::56::16::70072\n",
}


def convert(source, out):
    script = ROOT / "examples" / "movielens_1m.py"
    return subprocess.run([sys.executable, script, source, out], capture_output=True, text=True)


def test_events_are_in_time_order_within_users(tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, encoding="latin-1")
    assert "4 ratings of 2 users" in convert(tmp_path, tmp_path / "out").stdout
    events = pq.read_table(tmp_path / "out" / "events.parquet").to_pydict()
    assert events == {
        "user": [1, 1, 1, 2],
        "item": [1, 2, 2, 1],  # of equal times the first of the file is first
        "genres": ["Animation|Children's", "Comedy", "Comedy", "Animation|Children's"],
        "rating": [4, 1, 3, 5],
        "ts": [20, 20, 30, 9],
    }
    users = pq.read_table(tmp_path / "out" / "users.parquet").to_pydict()
    assert users == {"user": [1, 2], "gender": ["F", "M"], "age": [1, 56], "occupation": [10, 16]}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("ratings.dat", "1::1::4\n", "ratings.dat:1: 3 fields, not 4"),
        ("ratings.dat", "1::1::4::9\n1::1::4::soon\n", "ratings.dat:2: invalid literal.*'soon'"),
        ("ratings.dat", "1::7::4::9\n", r"ratings.dat: movies.dat lacks \[7\]"),
        ("users.dat", None, "users.dat: no such file"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, name, text, message):
    for file, content in {**FILES, name: text}.items():
        if content is not None:
            (tmp_path / file).write_text(content, encoding="latin-1")
    with pytest.raises(SystemExit, match=message):
        movielens_1m.convert(tmp_path, tmp_path / "out")
