"""Vocabularies: raw values -> ids, fitted on the training range only.

Ids: 0 padding, 1 out-of-vocabulary (seen fewer than `min_count` times in training), 2 missing, and
known values from 3, most frequent first and equal counts in the order of their values, so that the
same log always gives the same ids. Dense columns become quantile buckets (ids as well) or
standardised float32 values.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ctr_jax.data.errors import DataError
from ctr_jax.data.plan import Field, Plan
from ctr_jax.data.raw_types import FLOATS, INTEGERS
from ctr_jax.features import FIRST_KNOWN, MISSING, OOV

_BATCH_ROWS = 1 << 16
_VIEWS = {"user": "users", "behaviour": "behaviours"}


def view_of(plan: Plan, group: str) -> str:
    """The view that holds a group's raw values; with inline histories users vary by impression."""
    views = {"behaviour": "behaviours"} if plan.inline_history else _VIEWS
    return views.get(group, "placed")


def column_types(con: duckdb.DuckDBPyConnection, view: str) -> dict[str, str]:
    """{column: DuckDB type} of a table or view."""
    return {row[0]: row[1] for row in con.execute(f"DESCRIBE {view}").fetchall()}


def id_type(con: duckdb.DuckDBPyConnection, plan: Plan, fields: list[Field]) -> str:
    """BIGINT if every field of a vocabulary is an integer, else VARCHAR.

    Floats beside integers are whole numbers: column_checks refuses others.
    """
    types = {column_types(con, view_of(plan, f.group))[f.key] for f in fields}
    whole = types <= {*INTEGERS, *FLOATS} and types & set(INTEGERS)
    return "BIGINT" if whole else "VARCHAR"


def raw_value(field: Field, type_name: str, alias: str = "") -> str:
    """SQL of a field's raw value in its vocabulary's type; NaN and '' are missing."""
    column = f'{alias}."{field.key}"' if alias else f'"{field.key}"'
    if type_name == "BIGINT":
        return f"TRY_CAST({column} AS BIGINT)"  # NaN gives NULL
    return f"NULLIF(NULLIF(CAST({column} AS VARCHAR), ''), 'nan')"


def table_name(vocabulary: str) -> str:
    return f'"vocabulary {vocabulary}"'


def counts(con: duckdb.DuckDBPyConnection, plan: Plan, fields: list[Field]) -> str:
    """SQL of what a vocabulary, or one standardised column, is fitted on; adds up over users."""
    if fields[0].kind == "id":
        return id_counts(con, plan, fields)
    return value_counts(plan, fields)


def id_counts(con: duckdb.DuckDBPyConnection, plan: Plan, fields: list[Field]) -> str:
    """SQL of (value, source, n) of one vocabulary; adds up over users.

    Counts the training impressions (user columns once per impression) and the behaviours that
    `behaviours_fit` holds.
    """
    type_name = id_type(con, plan, fields)
    parts = " UNION ALL ".join(_counts(plan, f, type_name) for f in fields)
    return f"""
        SELECT value, source, CAST(sum(n) AS BIGINT) AS n FROM ({parts})
        WHERE value IS NOT NULL GROUP BY ALL"""


def fit(
    con: duckdb.DuckDBPyConnection,
    plan: Plan,
    directory: Path,
    counts: Callable[[list[Field]], str],
) -> tuple[dict[str, int], dict[str, Dense]]:
    """Fits every vocabulary and writes it to `directory`.

    Args:
      counts: gives the SQL of `counts` of fields.
    Returns:
      {vocabulary: its rows, reserved ids included}, and the encodings of the dense columns: by
      vocabulary of "quantile" columns, by key of "standard" ones.
    """
    sizes, dense = {}, {}
    for name, fields in plan.vocabularies("id").items():
        sizes[name] = FIRST_KNOWN + fit_ids(con, plan, name, counts(fields))
        write_ids(con, name, directory)
    for name, fields in plan.vocabularies("quantile").items():
        dense[name], filled = fit_quantiles(con, plan, counts(fields))
        sizes[name] = FIRST_KNOWN + len(filled)
        write_buckets(dense[name], filled, name, directory)
    for field in plan.fields:
        if field.kind == "standard":
            dense[field.key] = fit_standard(con, counts([field]))
    return sizes, dense


def fit_ids(con: duckdb.DuckDBPyConnection, plan: Plan, name: str, counts: str) -> int:
    """Creates the table (value, id, count) of one vocabulary; returns its number of known values.

    Args:
      counts: SQL of its (value, source, n).
    """
    con.execute(
        f"""
        CREATE OR REPLACE TABLE {table_name(name)} AS
        SELECT value, n AS count,
               CAST(row_number() OVER (ORDER BY n DESC, value) + {FIRST_KNOWN - 1} AS INTEGER) AS id
        FROM ({totals(plan, counts)}) WHERE n >= {plan.min_count}
        """
    )
    return con.execute(f"SELECT count(*) FROM {table_name(name)}").fetchone()[0]


def totals(plan: Plan, counts: str) -> str:
    """SQL of (value, n) of one vocabulary; see Plan.impressions_are_behaviours for how the two
    sources of `counts` are joined."""
    joined = "max(n)" if plan.impressions_are_behaviours else "sum(n)"
    return f"SELECT value, CAST({joined} AS BIGINT) AS n FROM ({counts}) GROUP BY value"


def _counts(plan: Plan, field: Field, type_name: str) -> str:
    value, view = raw_value(field, type_name), view_of(plan, field.group)
    if view == "users":
        return f"""
            SELECT {value} AS value, 'impressions' AS source, sum(t.n) AS n
            FROM users JOIN user_training t USING (user_key) GROUP BY 1"""
    if view == "behaviours":
        return f"""
            SELECT {value} AS value, 'behaviours' AS source, count(*) AS n
            FROM behaviours_fit GROUP BY 1"""
    return f"""
        SELECT {value} AS value, 'impressions' AS source, count(*) AS n
        FROM placed WHERE split = 'train' GROUP BY 1"""


def encoded(con: duckdb.DuckDBPyConnection, fields: list[Field], alias: str) -> tuple[str, str]:
    """SQL that turns id columns into ids: (select list, joins). Dense columns pass as DOUBLE."""
    select, joins = [], []
    for i, field in enumerate(fields):
        if field.kind != "id":
            select.append(f'CAST({alias}."{field.key}" AS DOUBLE) AS "{field.key}"')
            continue
        table = table_name(field.vocabulary)
        type_name = column_types(con, table)["value"]
        value = raw_value(field, type_name, alias)
        select.append(
            f"CAST(CASE WHEN {value} IS NULL THEN {MISSING} "
            f'ELSE coalesce(v{alias}{i}.id, {OOV}) END AS INTEGER) AS "{field.key}"'
        )
        joins.append(f"LEFT JOIN {table} v{alias}{i} ON v{alias}{i}.value = {value}")
    return "".join(f", {s}" for s in select), "\n".join(joins)


class Dense:
    """The encoding of one dense column: quantile buckets or standardisation.

    Attributes:
      edges: [buckets - 1] float64, ascending and distinct, of a "quantile" column. Bucket b holds
        edges[b - 1] <= x < edges[b]; its id is 3 + b, a missing value's 2.
      mean, scale: of a "standard" column.
    """

    def __init__(self, edges: np.ndarray | None, mean: float = 0.0, scale: float = 1.0):
        self.edges, self.mean, self.scale = edges, mean, scale

    def encode(self, values: np.ndarray) -> np.ndarray:
        """[N] float64, NaN = missing -> [N] int32 bucket ids or float32 standardised values."""
        if self.edges is not None:
            ids = FIRST_KNOWN + np.searchsorted(self.edges, values, side="right")
            return np.where(np.isnan(values), MISSING, ids).astype(np.int32)
        known = np.isfinite(values)  # as in the fit
        standard = (np.where(known, values, self.mean) - self.mean) / self.scale
        return np.where(known, standard, 0).astype(np.float32)


def fit_quantiles(
    con: duckdb.DuckDBPyConnection, plan: Plan, counts: str
) -> tuple[Dense, list[int]]:
    """Edges at the k / buckets quantiles of the training rows, equal edges merged; bucket counts.

    The edges are values of the data (the smallest value with at least a share k / buckets of the
    rows below it), found in one pass over the sorted distinct values, so memory is constant.

    Args:
      counts: SQL of the values and their counts, as of `value_counts`.
    """
    total = sum(int(n.sum()) for _, n in _sorted_values(con, counts))
    targets = [k * total / plan.buckets for k in range(1, plan.buckets)]
    edges: list[float] = []
    below, k = 0, 0
    for values, n in _sorted_values(con, counts):
        ends = below + np.cumsum(n)
        starts = ends - n
        while k < len(targets) and targets[k] <= starts[-1]:
            edge = float(values[np.searchsorted(starts, targets[k])])
            if not edges or edge > edges[-1]:
                edges.append(edge)
            k += 1
        below = int(ends[-1])
    dense = Dense(np.asarray(edges, np.float64))
    filled = np.zeros(len(edges) + 1, np.int64)
    for values, n in _sorted_values(con, counts):
        np.add.at(filled, np.searchsorted(dense.edges, values, side="right"), n)
    return dense, filled.tolist()


def fit_standard(con: duckdb.DuckDBPyConnection, counts: str) -> Dense:
    """Mean and standard deviation over the training rows, summed exactly (math.fsum)."""

    def total(term) -> float:
        return math.fsum(x for v, n in _sorted_values(con, counts) for x in term(v, n).tolist())

    rows = total(lambda v, n: n.astype(np.float64))
    if not rows:
        return Dense(None)
    mean = total(lambda v, n: v * n) / rows
    variance = total(lambda v, n: (v - mean) ** 2 * n) / rows
    return Dense(None, mean, math.sqrt(variance) or 1.0)


def standard(path: Path, key: str) -> Dense:
    """The mean and scale of a standardised column of the prepared data set in `path`."""
    report = json.loads((path / "report.json").read_text())
    return Dense(None, *report["standardised (mean, scale)"][key])


def value_counts(plan: Plan, fields: list[Field]) -> str:
    """SQL of the distinct finite training values with counts (value, n); adds up over users."""
    parts = []
    for field in fields:
        view = view_of(plan, field.group)
        where = "WHERE split = 'train'" if view == "placed" else ""
        count, join = "count(*)", ""
        if view == "users":
            count, join = "sum(t.n)", "JOIN user_training t USING (user_key)"
        view = "behaviours_fit" if view == "behaviours" else view
        parts.append(
            f'SELECT CAST("{field.key}" AS DOUBLE) AS value, {count} AS n FROM {view} {join} '
            f"{where} GROUP BY 1"
        )
    return f"""
        SELECT value, CAST(sum(n) AS BIGINT) AS n FROM ({" UNION ALL ".join(parts)})
        WHERE isfinite(value) GROUP BY value"""


def _sorted_values(
    con: duckdb.DuckDBPyConnection, counts: str
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Values in ascending order with their counts, in batches."""
    query = f"SELECT value, n FROM ({counts}) ORDER BY value"
    for batch in con.cursor().sql(query).to_arrow_reader(_BATCH_ROWS):
        if batch.num_rows:
            yield batch["value"].to_numpy(), batch["n"].to_numpy()


def write_ids(con: duckdb.DuckDBPyConnection, name: str, directory: Path) -> Path:
    """Writes vocabularies/<name>.parquet (value, id, count), ordered by id."""
    path = directory / f"{name}.parquet"
    query = f"SELECT value, id, count FROM {table_name(name)} ORDER BY id"
    reader = con.cursor().sql(query).to_arrow_reader(_BATCH_ROWS)
    with pq.ParquetWriter(path, reader.schema) as writer:
        for batch in reader:
            writer.write_batch(batch)
    return path


def write_buckets(dense: Dense, counts: list[int], name: str, directory: Path) -> Path:
    """Writes a quantile vocabulary: value = the bucket's lower edge, the first one's -inf."""
    path = directory / f"{name}.parquet"
    ids = np.arange(FIRST_KNOWN, FIRST_KNOWN + len(counts), dtype=np.int32)
    lower = np.concatenate([[-np.inf], dense.edges])
    pq.write_table(
        pa.table({"value": lower, "id": ids, "count": pa.array(counts, pa.int64())}), path
    )
    return path


def _texts(values: list[str]) -> np.ndarray:
    """[N] texts of any length; an array of np.str_ is everywhere as wide as its longest text."""
    return np.array(values, np.dtypes.StringDType())


def _lower_bounds(values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """np.searchsorted(values, wanted), of texts too: [...] int64.

    NumPy's own, to 2.4 at least, reads texts of more than 15 bytes that lie in two arrays from the
    memory of one of them; its element-wise comparisons do not.
    """
    if values.dtype.kind != "T":
        return np.searchsorted(values, wanted)
    below = np.zeros(wanted.shape, np.int64)  # so many values are known to be less than the wanted
    step = 1 << len(values).bit_length()
    while step := step >> 1:
        at = np.minimum(below + step, len(values))
        below = np.where(values[at - 1] < wanted, at, below)
    return below


class Vocabulary:
    """A fitted vocabulary in memory, for encoding outside the database and at serving time."""

    def __init__(self, values: np.ndarray, ids: np.ndarray):
        order = np.argsort(values, kind="stable")
        self._values, self._ids = values[order], ids[order].astype(np.int32)

    @classmethod
    def load(cls, path: Path) -> Vocabulary:
        """Reads vocabularies/<name>.parquet.

        Raises:
          DataError: there is no such vocabulary, or it holds buckets rather than values.
        """
        if not Path(path).exists():
            raise DataError(f"{path}: no such vocabulary")
        table = pq.read_table(path)
        values = table["value"]
        if pa.types.is_floating(values.type):
            raise DataError(f"{path} holds the edges of quantile buckets; use Dense")
        whole = pa.types.is_integer(values.type)
        return cls(
            values.to_numpy() if whole else _texts(values.to_pylist()), table["id"].to_numpy()
        )

    @property
    def sql_type(self) -> str:
        return "BIGINT" if self._values.dtype.kind == "i" else "VARCHAR"

    def encode(self, values: np.ndarray, missing: np.ndarray | None = None) -> np.ndarray:
        """Ids of values of any shape: [...] int32; unknown values are 1, those of `missing` 2."""
        if self.sql_type == "VARCHAR":
            values = values.astype(self._values.dtype, copy=False)
        ids = np.full(values.shape, OOV, np.int32)
        if len(self._values):
            at = np.minimum(_lower_bounds(self._values, values), len(self._values) - 1)
            ids = np.where(self._values[at] == values, self._ids[at], OOV).astype(np.int32)
        return ids if missing is None else np.where(missing, MISSING, ids).astype(np.int32)

    def encode_column(self, column: pa.Array) -> np.ndarray:
        """Ids of an Arrow column of integers or texts, null = missing: [N] int32."""
        missing = column.is_null().to_numpy(zero_copy_only=False)
        if pa.types.is_integer(column.type):
            return self.encode(column.fill_null(0).to_numpy(), missing)
        distinct = column.dictionary_encode()
        ids = self.encode(_texts(distinct.dictionary.to_pylist() or [""]))
        return np.where(missing, MISSING, ids[distinct.indices.fill_null(0).to_numpy()])


class Encoder:
    """Turns raw Arrow columns of one field into what records hold.

    Beside the database because a dozen hash joins in one query need a dozen hash tables at once; a
    sorted array is a tenth of that.
    """

    def __init__(self, field: Field, directory: Path, dense: dict[str, Dense]):
        self.field = field
        self._vocabulary = self._dense = None
        if field.kind == "id":
            self._vocabulary = Vocabulary.load(directory / f"{field.vocabulary}.parquet")
        else:
            self._dense = dense[field.vocabulary if field.kind == "quantile" else field.key]

    def sql(self, alias: str) -> str:
        """The raw column in the type that `encode` wants."""
        if self._dense is not None:
            return f'CAST({alias}."{self.field.key}" AS DOUBLE) AS "{self.field.key}"'
        value = raw_value(self.field, self._vocabulary.sql_type, alias)
        return f'{value} AS "{self.field.key}"'

    def encode(self, column: pa.Array) -> np.ndarray:
        """[N] int32 ids or float32 values."""
        if self._dense is not None:
            return self._dense.encode(column.to_numpy(zero_copy_only=False))
        return self._vocabulary.encode_column(column)
