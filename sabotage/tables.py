"""Measured results as CSV: a row for each, numbers to their last digit, lists as words, nothing where there is no value."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from finetune.core.files import write_text

Columns = Mapping[str, Callable[[str], Any]]  # by name, what makes a value of a cell


def words(cell: str) -> list[str]:
    return cell.split()


def numbers(cell: str) -> list[int]:
    return [int(word) for word in cell.split()]


def number(cell: str) -> float | None:
    return float(cell) if cell else None


def write(file: Path, columns: Columns, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write the rows. Text loses its line breaks, so that a row is a line."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(columns)
    table.writerows([_cell(row[name]) for name in columns] for row in rows)
    write_text(file, text.getvalue())


def read(file: Path, columns: Columns) -> list[dict[str, Any]]:
    """The rows as they were written. Raises KeyError where a column is missing."""
    with file.open(encoding="utf-8", newline="") as text:
        return [{name: made(row[name]) for name, made in columns.items()} for row in csv.DictReader(text)]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return " ".join(map(str, value)) if isinstance(value, list) else " ".join(str(value).split())
