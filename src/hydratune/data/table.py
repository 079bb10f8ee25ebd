"""Rows in Python to an in-memory table, whose faults are told by the row that is odd."""

from __future__ import annotations

import json
from typing import Any

import datasets
import pyarrow as pa

from hydratune.data.read import ORIGIN
from hydratune.errors import UserError, Violation


def as_json_text(value: Any) -> str | None:
    """Free-form values (`tools`) as JSON text, so that one column can hold them; text and null are left as they are."""
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def to_dataset(rows: list[dict[str, Any]]) -> datasets.Dataset:
    """Rows as an in-memory data set; a column whose values do not share one type is told with its first odd row.

    `tools` and `chat_template_kwargs` are kept as JSON text, because their values are free-form.

    Raises:
        UserError: for each column of mixed types.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns, wrong = {}, []
    for name in names:
        values = [row.get(name) for row in rows]
        if name in ("tools", "chat_template_kwargs"):
            values = [as_json_text(value) for value in values]
        try:
            columns[name] = pa.array(values)
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError) as error:
            wrong.append(_odd_row(rows, values, name, error))
    if wrong:
        raise UserError(wrong)
    return datasets.Dataset(pa.table(columns))


def _odd_row(rows: list[dict[str, Any]], values: list[Any], name: str, error: Exception) -> Violation:
    low, high = 0, len(values)  # the shortest prefix that fails ends at the odd row
    while high - low > 1:
        middle = (low + high) // 2
        try:
            pa.array(values[:middle])
            low = middle
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError):
            high = middle
    where = rows[high - 1].get(ORIGIN, f"row {high}")
    if isinstance(error, UnicodeEncodeError):
        return Violation(
            f"{where}, column {name}",
            None,
            "holds half of a surrogate pair, which is no text",
            "repair the escape",
        )
    said = str(error).splitlines()[0]
    return Violation(
        f"{where}, column {name}",
        None,
        f"has another type than the rows before it ({said})",
        "give the column one type in all rows",
    )
