"""Files of one JSON object per line -> DuckDB tables, with every bad line named or counted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import duckdb

from ctr_jax.data.errors import DataError
from ctr_jax.data.raw import RawTable
from ctr_jax.data.sql import sql_name, sql_path, sql_text

LONGEST_LINE = 4 << 20  # bytes, of a line; DuckDB takes 16 of these at once


class JsonLinesTable(RawTable):
    """A RawTable whose rowid is the line number less one: blank lines are rows too."""

    def place(self, rowid: int) -> str:
        return f"{self.files[0]}: line {rowid + 1}"


def load(
    con: duckdb.DuckDBPyConnection,
    name: str,
    path: Path,
    fields: Mapping[str, str],
    report: dict[str, Any],
) -> JsonLinesTable:
    """Creates the table `name` (the fields as VARCHAR, is_json) from a .json or .json.gz file.

    Only the fields are kept, so the table is small where texts are long. `is_json` is NULL for a
    blank line and False for a line that is not JSON, which `BAD_LINE` finds.

    Args:
      fields: {column: JSON path}, such as {"user": "$.reviewerID"}; a missing one is NULL.
      report: the number of lines that are not blank is added to it.
    Raises:
      DataError: the file is truncated or corrupt.
    """
    paths = ", ".join(sql_text(p) for p in fields.values())
    columns = ", ".join(f"found[{i + 1}] AS {sql_name(c)}" for i, c in enumerate(fields))
    # One column of whole lines: the delimiter is a character that JSON writes as an escape.
    lines = (
        f"read_csv({sql_path(path)}, columns = {{'line': 'VARCHAR'}}, header = false, "
        f"auto_detect = false, delim = chr(1), quote = '', escape = '', "
        f"max_line_size = {LONGEST_LINE})"
    )
    try:
        con.execute(
            f"""
            CREATE OR REPLACE TABLE {name} AS
            SELECT {columns}, is_json FROM (
                SELECT CASE WHEN is_json THEN json_extract_string(line, [{paths}]) END AS found,
                       is_json
                FROM (SELECT line, json_valid(line) AS is_json FROM {lines}))"""
        )
    except duckdb.Error as error:
        what = str(error).strip().splitlines()[0]
        raise DataError(f"{path}: cannot be read, truncated or corrupt: {what}") from error
    rows = con.execute(f"SELECT count(*) FROM {name} WHERE is_json IS NOT NULL").fetchone()[0]
    report["rows"][path.name] = rows
    return JsonLinesTable(name, [path], [0], dict.fromkeys(fields, "VARCHAR"))


BAD_LINE = {"line that is not JSON": ("NOT is_json", "'not JSON'")}
