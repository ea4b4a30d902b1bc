"""What a prepared data set offers (DataSpec) and what a model asks of it (Column).

Ids: 0 is padding (its vector is exactly zero and never trained), 1 is out-of-vocabulary, 2 is
"missing", known values follow. Vocabularies come from the training range only.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PADDING, OOV, MISSING, FIRST_KNOWN = 0, 1, 2, 3
GROUPS = ("user", "context", "behaviour", "candidate")


@dataclasses.dataclass(frozen=True)
class DataColumn:
    """A column of a prepared data set.

    Attributes:
      group: one of GROUPS.
      name: unique within its group.
      kind: "id" (int32, rows of `vocabulary`) or "dense" (float32, standardised on training rows).
      vocabulary: the vocabulary's name for ids; columns that mean the same thing share one.
    """

    group: str
    name: str
    kind: str = "id"
    vocabulary: str = ""


@dataclasses.dataclass(frozen=True)
class DataSpec:
    """Everything a model or trainer needs to know of a prepared data set.

    Attributes:
      name: the builder's name, for messages.
      columns: the columns, in record order.
      vocabularies: {name: number of rows, reserved ids included}.
      max_candidates: C of a record.
      inline_history: L of histories kept inside the records; 0 = they live in the history store.
      weighted: whether candidates have weights (RequestBatch.weight).
      content_hash: sha256 of everything the data set holds; checkpoints and results record it.
      splits: {split: number of records}.
      encoding: what ids and dense values mean: {"columns": ["group/name kind vocabulary", ...],
        "vocabularies": {name: hash}, "standardised": {column: [mean, scale]}}. A model scores any
        data set of an equal one. {} in data sets prepared before it was recorded.
    """

    name: str
    columns: tuple[DataColumn, ...]
    vocabularies: dict[str, int]
    max_candidates: int
    inline_history: int = 0
    content_hash: str = ""
    splits: dict[str, int] = dataclasses.field(default_factory=dict)
    encoding: dict[str, Any] = dataclasses.field(default_factory=dict)
    weighted: bool = False

    @property
    def encoding_hash(self) -> str:
        """sha256 of the encoding; "" where it is not recorded."""
        text = json.dumps(self.encoding, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest() if self.encoding else ""

    def group(self, group: str) -> tuple[DataColumn, ...]:
        return tuple(c for c in self.columns if c.group == group)

    def save(self, path: Path) -> None:
        Path(path).write_text(json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True))

    @classmethod
    def load(cls, path: Path) -> DataSpec:
        fields = json.loads(Path(path).read_text())
        fields["columns"] = tuple(DataColumn(**c) for c in fields["columns"])
        return cls(**fields)


@dataclasses.dataclass(frozen=True)
class Column:
    """One embedded input of a model: the ids of `source` looked up in `table`.

    An id column may feed several tables (CAN): give each its own `name`. A dense column has no
    table; its vector is the value itself, width 1.

    Attributes:
      init_scale: standard deviation of the table's initial values, the same in all columns that
        share it; None = config.table_optimizer.init_scale.
    """

    group: str
    source: str
    table: str = ""
    width: int = 1
    name: str = ""
    init_scale: float | None = None

    @property
    def key(self) -> str:
        """The key of this column's vectors in EmbeddedBatch.vectors."""
        return f"{self.group}/{self.name or self.source}"


def default_columns(
    spec: DataSpec, width: int, exclude: Iterable[str] = (), groups: Iterable[str] = GROUPS
) -> tuple[Column, ...]:
    """Every column of the data set at one width, columns of one vocabulary sharing one table.

    Args:
      exclude: "group/name" keys to leave out, such as "user/user_id".
    Raises:
      ValueError: `exclude` names a column that the data set does not have.
    """
    have = {f"{c.group}/{c.name}" for c in spec.columns}
    unknown = sorted(set(exclude) - have)
    if unknown:
        raise ValueError(
            f"no such column {unknown} in data set {spec.name!r}; it has {sorted(have)}"
        )
    return tuple(
        Column(c.group, c.name, c.vocabulary, width) if c.kind == "id" else Column(c.group, c.name)
        for c in spec.columns
        if c.group in tuple(groups) and f"{c.group}/{c.name}" not in set(exclude)
    )


def require(columns: Iterable[Column], spec: DataSpec, model: str) -> None:
    """Raises ValueError unless `columns` hold some of behaviours and some of candidates."""
    groups = {c.group for c in columns}
    for group in ("behaviour", "candidate"):
        if group not in groups:
            raise ValueError(f"{model} needs at least one {group} column of {spec.name!r}")


def table_shapes(columns: Iterable[Column], spec: DataSpec) -> dict[str, tuple[int, int]]:
    """{table: (rows, width)} of the tables that `columns` use.

    A table is named after its vocabulary, or "<vocabulary>:<anything>" where a model needs
    several tables over one vocabulary.
    """
    shapes: dict[str, tuple[int, int]] = {}
    for column in columns:
        if not column.table:
            continue
        shape = (spec.vocabularies[column.table.split(":")[0]], column.width)
        if shapes.setdefault(column.table, shape) != shape:
            raise ValueError(
                f"table {column.table!r} is asked for with widths {shapes[column.table][1]} and "
                f"{column.width}; give one of the columns a table of its own"
            )
    return shapes


def table_scales(columns: Iterable[Column], default: float) -> dict[str, float]:
    """{table: standard deviation of its initial values}."""
    return {c.table: default if c.init_scale is None else c.init_scale for c in columns if c.table}
