"""Generated logs in the raw layouts of Amazon Books (2018) and Tianchi 649 (Taobao).

Planted: a user has a few tastes (categories) and lives through phases, each of one taste; his last
event is of the present phase or, as likely, of any other of his tastes. The short history shows the
present phase, only the long one shows all tastes. Within a category items follow a Zipf law, and a
share of events is noise.

The files have the quirks of the real ones. Amazon: gzip, days as times, metadata lines that repeat
an item or lack its category, fields nobody reads. Taobao: no header, rows by user, carts and
purchases between the clicks, times outside the nine days.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ctr_jax.data import amazon, taobao
from ctr_jax.data.errors import DataError

MARKER = "synthetic.json"
DAY = 86400
NOISE, TASTES, PHASE = 0.15, 3, 25  # share of noise; tastes of a user; mean events of a phase
FIRST_REVIEW = 1_356_998_400  # 2013-01-01 UTC
BAD_STAMPS = 1e-3  # share of Taobao rows outside the nine days


@dataclasses.dataclass(frozen=True)
class LastEventLog:
    """Size of a generated log.

    Attributes:
      users: number of users.
      behaviours: mean events of a user (log-normal, at least 5).
      items, categories: of the catalogue; an item has one category.
      seed: same seed, same files.
    """

    users: int = 3000
    behaviours: float = 100.0
    items: int = 2000
    categories: int = 40
    seed: int = 0

    def __post_init__(self):
        if self.users < 1 or self.behaviours < 5 or not 4 <= self.categories <= self.items:
            raise DataError(
                f"users={self.users}, behaviours={self.behaviours}, items={self.items}, "
                f"categories={self.categories}: want at least 1 user, 5 behaviours, 4 categories "
                "and an item for each"
            )

    @property
    def hash(self) -> str:
        """Of the fields and of this version of the generator."""
        text = json.dumps(["last-event-1", dataclasses.asdict(self)])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def generate(builder: str, out_dir: str | Path, log: LastEventLog) -> None:
    """Writes the raw files of `builder` ("amazon" or "taobao") unless they are there already.

    Raises:
      DataError: the directory holds files that are not of this generator.
    """
    out = Path(out_dir)
    names = {"amazon": (f"{amazon.REVIEWS}.gz", f"{amazon.ITEMS}.gz"), "taobao": (taobao.FILE,)}
    marker = out / MARKER
    if marker.exists():
        known = json.loads(marker.read_text())["hash"]
        if known == log.hash and all((out / name).exists() for name in names[builder]):
            return
    elif strangers := [name for name in names[builder] if (out / name).exists()]:
        raise DataError(f"{out / strangers[0]}: not made by this generator; name another directory")
    out.mkdir(parents=True, exist_ok=True)
    # Without a hash the marker says: ours, but not whole.
    marker.write_text(json.dumps({"hash": ""}))
    write = {"amazon": _write_amazon, "taobao": _write_taobao}[builder]
    for name, lines in zip(names[builder], write(log), strict=True):
        partial = out / (name + ".partial")
        opened = gzip.open(partial, "wt") if name.endswith(".gz") else open(partial, "w")
        with opened as file:
            file.writelines(line + "\n" for line in lines)
        os.replace(partial, out / name)
    marker.write_text(json.dumps({"hash": log.hash, "log": dataclasses.asdict(log)}))


def categories_of(log: LastEventLog) -> np.ndarray:
    """[items] the category of each item."""
    return np.arange(log.items) % log.categories


def histories(log: LastEventLog) -> Iterator[tuple[int, np.ndarray]]:
    """(user, [n] items in order of time, the last one being the target) of every user."""
    per_category = -(-log.items // log.categories)
    zipf = 1 / np.arange(1, per_category + 1)
    for user in range(log.users):
        rng = np.random.default_rng([log.seed, user])
        n = max(5, int(log.behaviours * np.exp(0.6 * rng.normal() - 0.18)))
        tastes = rng.choice(log.categories, TASTES, replace=False)
        phase = np.cumsum(rng.random(n) < 1 / PHASE)
        now = rng.integers(0, TASTES, phase[-1] + 1)[phase]
        if rng.random() < 0.5:
            now[-1] = rng.integers(0, TASTES)
        category = tastes[now]
        noise = rng.random(n) < NOISE
        noise[-1] = False
        category = np.where(noise, rng.integers(0, log.categories, n), category)
        sizes = (log.items - 1 - category) // log.categories + 1  # items of each event's category
        cumulative = np.cumsum(zipf)
        rank = np.searchsorted(cumulative, rng.random(n) * cumulative[sizes - 1])
        yield user, np.minimum(rank, sizes - 1) * log.categories + category


def _write_amazon(log: LastEventLog) -> tuple[Iterator[str], Iterator[str]]:
    def reviews():
        for user, items in histories(log):
            rng = np.random.default_rng([log.seed, user, 1])
            days = np.sort(rng.integers(0, 365 * 5, len(items)))
            stars = rng.integers(3, 6, len(items))
            for item, day, overall in zip(items, days, stars, strict=True):
                yield json.dumps(
                    {
                        "overall": float(overall),
                        "verified": True,
                        "reviewTime": "",
                        "reviewerID": f"A{user:09d}",
                        "asin": f"{item:010d}",
                        "style": {"Format:": " Paperback"},
                        "reviewText": 'a "good", long\tread',
                        "unixReviewTime": int(FIRST_REVIEW + day * DAY),
                    }
                )

    def metadata():
        for item, category in enumerate(categories_of(log)):
            shelf = [] if item % 50 == 49 else ["Books", "Genre", f"Shelf {category}"]
            line = json.dumps({"asin": f"{item:010d}", "category": shelf, "title": f"Book {item}"})
            yield line
            if item % 40 == 7:
                yield line.replace("Book ", "Book again ")

    return reviews(), metadata()


def _write_taobao(log: LastEventLog) -> tuple[Iterator[str]]:
    def rows():
        categories = categories_of(log)
        span = taobao.END_TIME - taobao.FIRST_TIME
        for user, items in histories(log):
            rng = np.random.default_rng([log.seed, user, 1])
            times = taobao.FIRST_TIME + np.sort(rng.integers(0, span, len(items)))
            bought = rng.random(len(items)) < 0.1
            kinds = rng.choice(taobao.BEHAVIOURS[1:], len(items))
            for i, (item, time) in enumerate(zip(items, times, strict=True)):
                if rng.random() < BAD_STAMPS:
                    yield f"{user + 1},{item + 1},{categories[item] + 1},pv,{time - 10 * DAY * 365}"
                yield f"{user + 1},{item + 1},{categories[item] + 1},pv,{time}"
                if bought[i] and i + 1 < len(items):
                    yield f"{user + 1},{item + 1},{categories[item] + 1},{kinds[i]},{time + 1}"

    return (rows(),)
