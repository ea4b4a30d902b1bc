"""What a vault must hold, kept in Python lists: the slow reference of every test here."""

from __future__ import annotations

import numpy as np

import seqvault

SCHEMA = seqvault.Schema({"item": np.int32, "kind": np.uint8, "seen": bool, "weight": np.float32})
NAMES = ("time", *SCHEMA.columns)


class Oracle:
    """{(stream, user): [row, ...]} in the order of arrival; a row is a tuple of NAMES."""

    def __init__(self, names=NAMES, event_id=None):
        self.names = names
        self.event_id = event_id and names.index(event_id)
        self.rows = {}

    def append(self, users, columns, stream="default"):
        """Returns how many rows were new."""
        new = 0
        values = [np.asarray(columns[name]).tolist() for name in self.names]
        for user, *row in zip(np.asarray(users).tolist(), *values, strict=True):
            mine = self.rows.setdefault((stream, user), [])
            if self.event_id is not None and any(
                r[self.event_id] == row[self.event_id] for r in mine
            ):
                continue
            mine.append(tuple(row))
            new += 1
        return new

    def history(self, user, stream="default"):
        """By time; ties in the order of arrival."""
        return sorted(self.rows.get((stream, user), []), key=lambda row: row[0])

    def users(self, stream="default"):
        return sorted(user for s, user in self.rows if s == stream)

    def last_n(self, user, n, before=None, end=None, stream="default"):
        history = self.history(user, stream)
        if before is not None:
            history = [row for row in history if row[0] < before]
        if end is not None:
            history = history[:end]
        return history[max(0, len(history) - n) :]

    def check(self, store, users, rng, stream="default", sizes=(0, 1, 3, 20)):
        """Every kind of read of `store` (a Vault) equals the lists."""
        users = np.asarray(users)
        named = {"stream": stream} if isinstance(store, seqvault.Vault) else {}
        lengths = [len(self.history(u, stream)) for u in users.tolist()]
        assert store.lengths(users, **named).tolist() == lengths
        before = rng.integers(-1, 40, len(users))
        earlier = [
            sum(row[0] < b for row in self.history(u, stream))
            for u, b in zip(users.tolist(), before.tolist(), strict=True)
        ]
        assert store.resolve(users, before, **named).tolist() == earlier
        end = np.array([rng.integers(0, length + 1) for length in lengths], np.int64)
        for n in sizes:
            for arguments in ({}, {"before": before}, {"end": end}):
                found = store.last_n(users, n, **arguments, **named)
                assert set(found) == {"mask", *self.names}
                for i, user in enumerate(users.tolist()):
                    cut = {key: value[i] for key, value in arguments.items()}
                    wanted = self.last_n(user, n, stream=stream, **cut)
                    pad = n - len(wanted)
                    assert found["mask"][i].tolist() == [False] * pad + [True] * len(wanted)
                    for j, name in enumerate(self.names):
                        values = [0] * pad + [row[j] for row in wanted]
                        assert found[name][i].tolist() == values, (user, n, arguments, name)

    def check_scan(self, vault, stream="default", **options):
        rows = []
        for block in vault.scan(stream=stream, **options):
            rows += zip(*(block[name].tolist() for name in ("user", *self.names)), strict=True)
        wanted = [(user, *row) for user in self.users(stream) for row in self.history(user, stream)]
        assert rows == wanted


def draw(rng, rows, users=8, late=True):
    """(users [rows], columns) to append; times from a handful of values, so that ties abound."""
    columns = {
        "time": rng.integers(0, 40, rows) if late else np.sort(rng.integers(0, 40, rows)),
        "item": rng.integers(-70_000, 70_000, rows) // rng.choice([1, 1000]),
        "kind": rng.integers(0, 256, rows),
        "seen": rng.integers(0, 2, rows).astype(bool),
        "weight": rng.normal(size=rows).astype(np.float32),
    }
    return rng.integers(0, users, rows), columns
