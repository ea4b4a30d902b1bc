"""MovieLens 1M as GroupLens publishes it -> the raw files of the MovieLens pages.

    curl -O https://files.grouplens.org/datasets/movielens/ml-1m.zip && unzip ml-1m.zip
    python examples/movielens_1m.py ml-1m DIR
    python train.py --config=configs/sparsectr_movielens.py --config.data.raw_dir=DIR

Writes DIR/events.parquet (user, item, genres, rating, ts) in time order within each user, equal
times in the order of ratings.dat, and DIR/users.parquet (user, gender, age, occupation). The
figures of this project are of another copy of the log, of 999,508 of its 1,000,209 ratings and with
some seconds interpolated; the protocol floors times to the hour. Research use: see ml-1m/README.
"""

import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def rows(path: Path, *kinds: type) -> list[tuple]:
    """The lines of a .dat file, split at "::". Raises SystemExit at one with other fields."""
    if not path.exists():
        raise SystemExit(f"{path}: no such file; unzip ml-1m.zip there")
    found = []
    with open(path, encoding="latin-1") as file:
        for number, line in enumerate(file, 1):
            row = line.rstrip("\r\n").split("::")
            if len(row) != len(kinds):
                raise SystemExit(f"{path}:{number}: {len(row)} fields, not {len(kinds)}: {line!r}")
            try:
                found.append(tuple(kind(text) for kind, text in zip(kinds, row, strict=True)))
            except ValueError as error:
                raise SystemExit(f"{path}:{number}: {error}") from None
    return found


def convert(source: Path, out: Path) -> tuple[int, int]:
    """Writes both files; returns the numbers of ratings and of users."""
    genres = {item: names for item, _, names in rows(source / "movies.dat", int, str, str)}
    ratings = rows(source / "ratings.dat", int, int, int, int)
    ratings.sort(key=lambda row: (row[0], row[3]))  # stable
    if unknown := sorted({row[1] for row in ratings} - set(genres)):
        raise SystemExit(f"{source / 'ratings.dat'}: movies.dat lacks {unknown[:5]}")
    user, item, rating, ts = map(list, zip(*ratings, strict=True))
    events = {"user": user, "item": item, "genres": [genres[i] for i in item], "rating": rating,
              "ts": ts}  # fmt: skip
    users = rows(source / "users.dat", int, str, int, int, str)
    columns = map(list, zip(*users, strict=True))
    of_users = dict(zip(("user", "gender", "age", "occupation"), columns, strict=False))
    out.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(events), out / "events.parquet")
    pq.write_table(pa.table(of_users), out / "users.parquet")
    return len(ratings), len(users)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    counts = convert(Path(sys.argv[1]), Path(sys.argv[2]))
    print(f"{counts[0]:,} ratings of {counts[1]:,} users in {sys.argv[2]}")
