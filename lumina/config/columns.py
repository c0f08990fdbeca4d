"""Column mapping as a setting: {field of a data format: column of a file}, or `prompt=question,response=answer`."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator


def _column_pairs(value: Any) -> Any:
    """`prompt=question,response=answer`, as the command line has it, as a mapping."""
    if not isinstance(value, str):
        return value
    pairs = [part.split("=") for part in value.split(",") if part.strip()]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(
            "columns are given as FIELD=COLUMN, several separated by commas: prompt=question,response=answer"
        )
    if len({pair[0].strip() for pair in pairs}) < len(pairs):
        raise ValueError("a field is given two columns")
    return {field.strip(): column.strip() for field, column in pairs}


def _columns_apart(columns: dict[str, str]) -> dict[str, str]:
    if not all(field and column for field, column in columns.items()):
        raise ValueError("a field or a column without a name")
    if len(set(columns.values())) < len(columns):
        raise ValueError("a column is given to two fields")
    return columns


Columns = Annotated[dict[str, str], BeforeValidator(_column_pairs), AfterValidator(_columns_apart)]
