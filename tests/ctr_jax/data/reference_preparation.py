"""An independent preparation of small logs: plain Python lists, dicts and loops.

Rows are dicts {"user", "order", "time", "seq", "range", "label", "request", columns...}; columns
are named "<group>/<name>". None is a missing value.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict


def prepare(
    impressions: list[dict],
    behaviours: list[dict],
    users: dict,
    columns: dict[str, tuple[str, str]],
    *,
    candidates: int,
    ties: str,
    valid_fraction: float,
    min_count: int = 2,
    buckets: int = 32,
    own_valid: bool = False,
    add_groups: bool = False,
    fit_behaviour=None,
) -> tuple[dict[str, list[dict]], dict[str, dict], dict[int, list[dict]]]:
    """(records of each split, {vocabulary: {value: id}}, {user row: encoded behaviours}).

    Args:
      impressions: targets only; `request` is anything that, with user and range, names a request.
      users: {user: {column: value}}.
      columns: {"<group>/<name>": (kind, vocabulary)}.
      add_groups: count behaviours and impressions as different sightings of a value.
    """
    impressions = [dict(row) for row in impressions]
    first: dict = {}
    for row in impressions:
        key = (row["range"], row["user"], row["request"])
        if key not in first or row["order"] < first[key]["order"]:
            first[key] = row
    for row in impressions:
        head = first[row["range"], row["user"], row["request"]]
        row["request_order"], row["request_time"] = head["order"], head["time"]
        row["split"] = row["range"]
    if not own_valid:
        start = tail_start([r for r in impressions if r["range"] == "train"], valid_fraction)
        for row in impressions:
            if row["range"] == "train" and row["request_order"] >= start:
                row["split"] = "valid"

    user_rows = {u: i for i, u in enumerate(sorted({r["user"] for r in impressions}))}
    bound = min(r["order"] for r in impressions if r["split"] != "train")
    train = [r for r in impressions if r["split"] == "train"]
    fit_behaviour = fit_behaviour or (lambda b: b["order"] < bound)
    seen = [b for b in behaviours if b["user"] in user_rows and b["keep"] and fit_behaviour(b)]

    def raw_values(key: str) -> list:
        group = key.split("/")[0]
        if group == "behaviour":
            return [b[key] for b in seen]
        if group == "user":
            return [users.get(r["user"], {}).get(key) for r in train]
        return [r[key] for r in train]

    encode = {}
    vocabularies: dict[str, dict] = {}
    for name in {v for _, v in columns.values()}:
        keys = [k for k, (_, v) in columns.items() if v == name]
        kind = columns[keys[0]][0]
        if kind == "id":
            sources = [Counter(), Counter()]
            for key in keys:
                sources[key.startswith("behaviour/")].update(
                    v for v in raw_values(key) if v is not None
                )
            count = {
                v: sources[0][v] + sources[1][v]
                if add_groups
                else max(sources[0][v], sources[1][v])
                for v in set(sources[0]) | set(sources[1])
            }
            known = sorted(
                (v for v in count if count[v] >= min_count), key=lambda v: (-count[v], v)
            )
            ids = {v: 3 + i for i, v in enumerate(known)}
            vocabularies[name] = ids
            encoder = lambda v, ids=ids: 2 if v is None else ids.get(v, 1)  # noqa: E731
        elif kind == "quantile":
            values = sorted(v for k in keys for v in raw_values(k) if v is not None)
            edges = []
            for k in range(1, buckets):
                for value in sorted(set(values)):
                    if sum(x < value for x in values) >= k * len(values) / buckets:
                        if value not in edges:
                            edges.append(value)
                        break
            vocabularies[name] = dict(enumerate(edges))
            encoder = lambda v, e=edges: 2 if v is None else 3 + sum(x <= v for x in e)  # noqa: E731
        else:
            values = [v for v in raw_values(keys[0]) if v is not None]
            mean = sum(values) / len(values)
            scale = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values)) or 1.0
            encoder = lambda v, m=mean, s=scale: 0.0 if v is None else (v - m) / s  # noqa: E731
        encode.update(dict.fromkeys(keys, encoder))

    histories: dict[int, list[dict]] = defaultdict(list)
    for b in sorted(behaviours, key=lambda b: (b["order"], b["seq"])):
        if b["user"] in user_rows and b["keep"]:
            row = {k: encode[k](b[k]) for k in columns if k.startswith("behaviour/")}
            histories[user_rows[b["user"]]].append(
                {**row, "time": b["time"], "at": (b["order"], b["seq"])}
            )

    records: dict[str, list[dict]] = {}
    number = 0
    for split in ("train", "valid", "test"):
        grouped: dict = defaultdict(list)
        for r in sorted((r for r in impressions if r["split"] == split), key=lambda r: r["seq"]):
            order = r["request"] if ties != "order" else r["seq"]
            grouped[r["request_order"], user_rows[r["user"]], order].append(r)
        records[split] = []
        for (_, user, _), rows in sorted(grouped.items()):
            contexts: dict = defaultdict(list)
            for r in rows:
                contexts[tuple(str(r[k]) for k in columns if k.startswith("context/"))].append(r)
            for _, group in sorted(contexts.items()):
                for i in range(0, len(group), candidates):
                    piece = group[i : i + candidates]
                    head = piece[0]
                    if ties == "order":
                        end = sum(h["at"] < (head["order"], head["seq"]) for h in histories[user])
                    else:
                        end = sum(h["time"] < head["request_time"] for h in histories[user])
                    record = {
                        "user": user,
                        "end": end,
                        "request_id": number,
                        "request_time": head["request_time"],
                        "label": [r["label"] for r in piece],
                        **(
                            {"weight": [r["weight"] for r in piece]} if "weight" in piece[0] else {}
                        ),
                    }
                    for key in columns:
                        if key.startswith("user/"):
                            record[key] = encode[key](users.get(head["user"], {}).get(key))
                        elif key.startswith("context/"):
                            record[key] = encode[key](head[key])
                        elif key.startswith("candidate/"):
                            record[key] = [encode[key](r[key]) for r in piece]
                    records[split].append(record)
            number += 1
    return records, vocabularies, dict(histories)


def tail_start(train: list[dict], fraction: float) -> float:
    """The earliest moment from which at most `fraction` of the rows lie (at least one moment)."""
    moments = Counter(r["request_order"] for r in train)
    start = max(moments)
    tail = 0
    for moment in sorted(moments, reverse=True):
        tail += moments[moment]
        if tail > fraction * len(train):
            break
        start = moment
    return start
