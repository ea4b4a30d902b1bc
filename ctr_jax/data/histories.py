"""Behaviours -> the history store: sorted out of core, written once per user, in a stream."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

import seqvault
from ctr_jax.data.plan import Plan
from ctr_jax.data.vocabulary import Dense, encoded

BLOCK_ROWS = 1 << 18
ENDS = pa.schema([("seq", pa.int64()), ("end", pa.int32())])


def build_histories(
    con: duckdb.DuckDBPyConnection, plan: Plan, dense: dict[str, Dense], path: Path, ends: Path
) -> str:
    """Writes the snapshot `path`; with plan.ties = "order" also `ends`, a parquet of (seq, end).

    A user's behaviours are ordered by (order_time, seq). `end` of an event is the number of the
    user's behaviours before it in that order, itself excluded.

    Returns:
      The snapshot's content hash.
    """
    fields = plan.group("behaviour")
    num_users = con.execute("SELECT count(*) FROM user_ids").fetchone()[0]
    # Only the positions count events that enter no history; else they need not be sorted.
    needed = "TRUE" if plan.ties == "order" else "keep"
    total = con.execute(
        f"SELECT count(*) FROM behaviours SEMI JOIN user_ids USING (user_key) WHERE {needed}"
    ).fetchone()[0]
    select, joins = encoded(con, list(fields), "b")
    rows = con.cursor().sql(
        f"""
        SELECT u."user" AS "user", b.time AS time, b.seq AS seq, b.keep AS keep {select}
        FROM (SELECT * FROM behaviours WHERE {needed}) b JOIN user_ids u USING (user_key) {joins}
        ORDER BY u."user", b.order_time, b.seq
        """
    )
    positions = _Positions(ends) if plan.ties == "order" else None

    def blocks() -> Iterator[dict[str, np.ndarray]]:
        with tqdm(
            total=total, desc="histories", unit=" rows", disable=None, unit_scale=True
        ) as bar:
            for batch in rows.to_arrow_reader(BLOCK_ROWS):
                columns = {n: batch[n].to_numpy(zero_copy_only=False) for n in batch.schema.names}
                bar.update(len(columns["user"]))
                seq, keep = columns.pop("seq"), columns.pop("keep")
                if positions is not None:
                    positions.write(columns["user"], seq, keep)
                for field in fields:
                    if field.kind != "id":
                        columns[field.key] = dense[field.vocabulary].encode(columns[field.key])
                block = {n.removeprefix("behaviour/"): c for n, c in columns.items()}
                yield block if keep.all() else {n: c[keep] for n, c in block.items()}

    schema = seqvault.Schema({f.name: np.int32 for f in fields})
    try:
        return seqvault.bulk_build(path, schema, num_users, blocks())
    finally:
        if positions is not None:
            positions.close()


class _Positions:
    """Numbers the behaviours of each user across blocks that arrive sorted by user."""

    def __init__(self, path: Path):
        self._writer = pq.ParquetWriter(path, ENDS)
        self._user, self._count = -1, 0  # the last block's last user and his behaviours so far

    def write(self, users: np.ndarray, seq: np.ndarray, keep: np.ndarray) -> None:
        if not len(users):
            return
        before = np.cumsum(keep) - keep  # behaviours before each row, since the block's start
        first = np.concatenate([[True], users[1:] != users[:-1]])
        start = before[np.maximum.accumulate(np.where(first, np.arange(len(users)), 0))]
        carried = np.where(users == self._user, self._count, 0)
        end = (before - start + carried).astype(np.int32)
        self._writer.write_table(pa.table({"seq": seq, "end": end}, schema=ENDS))
        self._user, self._count = int(users[-1]), int(end[-1] + keep[-1])

    def close(self) -> None:
        self._writer.close()
