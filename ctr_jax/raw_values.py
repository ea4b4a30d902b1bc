"""Raw values <-> what a prepared data set holds in their place, by column.

A request to be scored comes with raw values: `RawValues(data).encode` gives the ids and floats that
`ctr_jax.serving.request_batch` takes, by the vocabularies, bucket edges and standardisation that
preparation fitted. `decode` goes the other way.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ctr_jax.data.errors import DataError
from ctr_jax.data.records import PreparedData
from ctr_jax.data.vocabulary import Dense, Vocabulary, standard
from ctr_jax.features import FIRST_KNOWN, MISSING, OOV, DataColumn


class Unknown(enum.Enum):
    """What a decoded id says of a value that it does not tell."""

    OUT_OF_VOCABULARY = "out of vocabulary"


OUT_OF_VOCABULARY = Unknown.OUT_OF_VOCABULARY
_SHOWN = 3  # values of a vocabulary that a message shows


class RawValues:
    """The encodings of a prepared data set's columns; each is read when it is first needed.

    Args:
      data: the prepared data set; its files are as they were written.
    """

    def __init__(self, data: PreparedData):
        self._data = data
        self._columns = {f"{c.group}/{c.name}": c for c in data.spec.columns}
        self._read: dict[str, pa.Table] = {}
        self._encoders: dict[str, Vocabulary | Dense] = {}

    def encode(self, columns: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Raw values -> what records hold.

        Args:
          columns: {"group/column": raw values of any shape}, numpy arrays or (nested) lists. None
            and NaN are missing, and among texts "" and "nan".
        Returns:
          {"group/column": ids, int32, or standardised values, float32, of that shape}. A value that
          the vocabulary lacks is 1, a missing one 2, or 0 where values are standardised.
        Raises:
          DataError: there is no such column, or its raw values are of another type; the message
            says how they look.
        """
        return {key: self._encode(key, values) for key, values in columns.items()}

    def decode(self, key: str, encoded: np.ndarray) -> np.ndarray:
        """What records hold -> raw values: [...] objects.

        Returns:
          None where the value is missing, OUT_OF_VOCABULARY, the value of an id, (low, high) of a
          bucket, which holds low <= x < high, or a standardised column's float (the mean where it
          was missing).
        Raises:
          DataError: there is no such column, or no such id in it.
        """
        encoded = np.asarray(encoded)
        encoder, column = self._encoder(key), self._columns[key]
        if column.kind == "dense":
            return (encoded.astype(np.float64) * encoder.scale + encoder.mean).astype(object)
        distinct, inverse = np.unique(encoded, return_inverse=True)
        known = self._table(column)["value"]
        last = FIRST_KNOWN + len(known) - 1
        if distinct.size and not OOV <= distinct[0] <= distinct[-1] <= last:
            raise DataError(f"{key} has ids {distinct[0]} to {distinct[-1]}; it knows 1 to {last}")
        raw = np.empty(len(distinct), object)
        for i, number in enumerate(distinct.tolist()):
            if number == MISSING:
                raw[i] = None
            elif number == OOV:
                raw[i] = OUT_OF_VOCABULARY
            elif isinstance(encoder, Dense):
                ends = [-np.inf, *encoder.edges.tolist(), np.inf]
                raw[i] = tuple(ends[number - FIRST_KNOWN : number - FIRST_KNOWN + 2])
            else:  # files are ordered by id
                raw[i] = known[number - FIRST_KNOWN].as_py()
        return raw[inverse].reshape(encoded.shape)

    def names(self, key: str, encoded: np.ndarray) -> list[str]:
        """`decode` for people: [N] encoded values -> N distinct texts where values are distinct."""
        return [_name(value) for value in self.decode(key, encoded).tolist()]

    def type(self, key: str) -> pa.DataType:
        """What the raw values of a column are: int64, string or float64.

        Raises:
          DataError: there is no such column.
        """
        encoder = self._encoder(key)
        if isinstance(encoder, Dense):
            return pa.float64()
        return pa.int64() if encoder.sql_type == "BIGINT" else pa.string()

    def _encode(self, key: str, values: Any) -> np.ndarray:
        encoder = self._encoder(key)
        array = values if isinstance(values, np.ndarray) else np.array(values, object)
        if isinstance(encoder, Dense):
            return encoder.encode(_numbers(array, lambda text: self._refuse(key, text)))
        if encoder.sql_type == "BIGINT":
            return encoder.encode(*_integers(array, lambda value: self._refuse(key, value)))
        return encoder.encode(*_texts(array, lambda value: self._refuse(key, value)))

    def _refuse(self, key: str, value: Any) -> None:
        encoder, column = self._encoder(key), self._columns[key]
        if isinstance(encoder, Dense):
            raise DataError(f"{key} holds numbers; {value!r} is none")
        shown = self._table(column)["value"].slice(0, _SHOWN).to_pylist()
        what = "integers" if encoder.sql_type == "BIGINT" else "texts"
        raise DataError(
            f"{key} holds {what}, such as {', '.join(map(repr, shown)) or 'none'}; {value!r} "
            f"({type(value).__name__}) is none"
        )

    def _encoder(self, key: str) -> Vocabulary | Dense:
        if key not in self._columns:
            raise DataError(
                f"{self._data.spec.name!r} has no column {key!r}; it has {', '.join(self._columns)}"
            )
        column = self._columns[key]
        name = key if column.kind == "dense" else column.vocabulary
        if name not in self._encoders:
            self._encoders[name] = self._made(key, column)
        return self._encoders[name]

    def _made(self, key: str, column: DataColumn) -> Vocabulary | Dense:
        if column.kind == "dense":
            return standard(self._data.path, key)
        if pa.types.is_floating(pq.read_schema(self._file(column)).field("value").type):
            return Dense(self._table(column)["value"].to_numpy()[1:])  # the first is -inf
        return Vocabulary.load(self._file(column))

    def _table(self, column: DataColumn) -> pa.Table:
        if column.vocabulary not in self._read:
            self._read[column.vocabulary] = pq.read_table(self._file(column), columns=["value"])
        return self._read[column.vocabulary]

    def _file(self, column: DataColumn):
        return self._data.path / "vocabularies" / f"{column.vocabulary}.parquet"


def _name(value: Any) -> str:
    if value is None:
        return "missing"
    if value is OUT_OF_VOCABULARY:
        return value.value
    if isinstance(value, tuple):
        return f"[{value[0]}, {value[1]})"
    # A value that reads like a name of ours stands in quotes, and so does one that begins so.
    ours = value in ("missing", "other", OUT_OF_VOCABULARY.value)
    return repr(value) if ours or str(value)[:1] in ("'", '"') else str(value)


def _numbers(values: np.ndarray, refuse: Callable[[Any], None]) -> np.ndarray:
    """[...] float64, NaN = missing."""
    if values.dtype.kind in "iuf":
        return values.astype(np.float64)
    missing = _is_missing(values)
    _check(values, missing, (int, float, np.integer, np.floating), refuse)
    return np.where(missing, np.nan, values).astype(np.float64)


def _integers(
    values: np.ndarray, refuse: Callable[[Any], None]
) -> tuple[np.ndarray, np.ndarray | None]:
    """[...] int64 and which are missing; floats must be whole."""
    if values.dtype.kind == "i":
        return values.astype(np.int64), None
    missing = _is_missing(values)
    if values.dtype.kind not in "uf":
        _check(values, missing, (int, float, np.integer, np.floating), refuse)
    for value in values[~missing].tolist():
        if value != value // 1 or not -(2**63) <= value < 2**63:
            refuse(value)
    return np.where(missing, 0, values).astype(np.int64), missing


def _texts(
    values: np.ndarray, refuse: Callable[[Any], None]
) -> tuple[np.ndarray, np.ndarray | None]:
    """[...] texts of any length and which are missing."""
    missing = _is_missing(values)
    if values.dtype.kind not in "UT":
        _check(values, missing, (str,), refuse)
    texts = np.where(missing, "", values).astype(np.dtypes.StringDType())
    return texts, missing | (texts == "") | (texts == "nan")  # as preparation reads them


def _is_missing(values: np.ndarray) -> np.ndarray:
    """[...] bool: None or NaN."""
    if values.dtype.kind == "O":
        return np.frompyfunc(lambda x: x is None or x != x, 1, 1)(values).astype(bool)
    return np.isnan(values) if values.dtype.kind == "f" else np.zeros(values.shape, bool)


def _check(
    values: np.ndarray, missing: np.ndarray, kinds: Sequence[type], refuse: Callable[[Any], None]
) -> None:
    """Calls `refuse` with the first value that is there and of none of `kinds`."""
    for value in values[~missing].reshape(-1).tolist():
        if not isinstance(value, tuple(kinds)) or isinstance(value, bool):
            refuse(value)
