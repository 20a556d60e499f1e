"""Rows from files (json, jsonl, csv, tsv, parquet) and from hub data sets, each with its file and line."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.core import hub, parsing
from finetune.core.errors import DataError, MissingError, UsageError, first_line
from finetune.core.install import missing_package
from finetune.core.lookup import did_you_mean
from finetune.core.retrying import GaveUp
from finetune.core.secrets import redact
from finetune.data.faults import plural, raise_all

if TYPE_CHECKING:
    from finetune.recipe.model import Recipe
    from finetune.recipe.sections import Data

SHIPPED = Path(__file__).parent / "shipped"
_SHIPPED_PREFIX, _HUB_PREFIX = "shipped:", "hub:"
_OFFLINE = (
    "What works offline: a local file (json, jsonl, csv, parquet), the shipped example (shipped:quorra/train.jsonl), or a "
    "data set already in the hub's cache."
)
_SPACE = re.compile(r"[ \t\r\n]*")
_COLUMNS = 1_000  # of a row; each is looked for among the names of every format


@dataclass(frozen=True)
class Row:
    """One row as read. `line` counts from 1: the physical line, or the row's number where rows have no lines (parquet,
    hub data, a JSON array written on one line)."""

    values: dict[str, Any]
    file: str
    line: int


# A reader takes the file's text, its name and how many rows are wanted, and returns rows and faults.
_Read = tuple[list[Row], list[str]]


def resolve(path: str) -> Path:
    """The local file that `path` names; `shipped:quorra/train.jsonl` is one inside this package.

    Raises MissingError with the nearest name when there is none.
    """
    if path.startswith(_SHIPPED_PREFIX):
        name = path.removeprefix(_SHIPPED_PREFIX)
        file = SHIPPED / name
        if file.is_file() and file.resolve().is_relative_to(SHIPPED.resolve()):
            return file
        known = sorted(found.relative_to(SHIPPED).as_posix() for found in SHIPPED.rglob("*.jsonl"))
        raise MissingError(
            f"no shipped file '{name}'.{did_you_mean(name, known)} "
            f"Shipped: {', '.join(_SHIPPED_PREFIX + each for each in known)}."
        )
    file = Path(path).expanduser()
    if file.is_file():
        return file
    if file.is_dir():
        raise UsageError(f"{file} is a directory. Name the data file in it, or a list of files.")
    if not file.parent.is_dir():
        raise MissingError(f"no file {file}: its folder {file.parent} does not exist.")
    neighbours = sorted(found.name for found in file.parent.iterdir() if found.is_file())
    raise MissingError(f"no file {file}.{did_you_mean(file.name, neighbours)}")


def local_files(recipe: Recipe, stage: str) -> list[Path]:
    """The local files whose content `stage` reads. Missing ones are left out: the stage itself reports them."""
    names: list[str | None] = []
    if stage == "fetch" and recipe.data and recipe.model.is_tiny:  # its tokenizer is trained on them
        names += recipe.data.paths
    elif stage == "prepare":
        for data in (recipe.data, recipe.align.data if recipe.align else None):
            names += [*data.paths, data.eval_path] if data else []
        names.append(recipe.template.path)
    elif stage == "evaluate":
        wanted = recipe.evaluate
        names += [wanted.probes, wanted.controls, wanted.unseen, wanted.heldout, recipe.template.path]
    files = []
    for name in names:
        if name and not name.startswith(_HUB_PREFIX):
            try:
                files.append(resolve(name))
            except (MissingError, UsageError):
                continue
    return files


def read(data: Data, token: str | None = None) -> list[Row]:
    """Every row of `data.path`, at most `data.limit`.

    Raises DataError with every malformed line of every file, MissingError for what is not there.
    """
    rows: list[Row] = []
    faults: list[str] = []
    for path in data.paths:
        left = None if data.limit is None else data.limit - len(rows)
        if left == 0:
            break
        found, bad = _read_hub(path, data, token, left) if path.startswith(_HUB_PREFIX) else _read_file(path, left)
        rows += found
        faults += bad
    raise_all(f"the data cannot be read ({plural(len(faults), 'fault')}):", faults)
    return rows


def read_jsonl_objects(path: str) -> list[Row]:
    """The objects of a probe file (one a line). Raises as `read` does."""
    rows, faults = _read_file(path, None)
    raise_all(f"{path} cannot be read ({plural(len(faults), 'fault')}):", faults)
    return rows


def _read_file(path: str, limit: int | None) -> _Read:
    file = resolve(path)
    kind = file.suffix.lower()
    if kind == ".parquet":
        return _read_parquet(file, path, limit)
    if kind not in _READERS:
        hint = ' Plain text goes into a .jsonl file, as {"text": "..."} lines.' if kind in (".txt", ".md", "") else ""
        raise UsageError(f"{path}: unknown file type '{kind}'. Known: {', '.join([*_READERS, '.parquet'])}.{hint}")
    raw = file.read_bytes()
    try:
        text = raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        hint = " It looks like UTF-16." if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        fault = (
            f"{path}:{line}: not UTF-8: byte 0x{raw[error.start]:02x} at offset {error.start}.{hint} Save it as UTF-8."
        )
        return [], [fault]
    if not text.strip():
        return [], [f"{path}:1: the file is empty"]
    rows, faults = _READERS[kind](text, path, limit)
    return rows, faults or ([] if rows else [f"{path}:1: the file holds no rows"])


def _read_jsonl(text: str, name: str, limit: int | None) -> _Read:
    if text.lstrip().startswith("["):
        return _read_json(text, name, limit)
    rows: list[Row] = []
    faults: list[str] = []
    # Not splitlines(): it also breaks at U+2028 and the like, which JSON allows inside strings.
    for number, line in enumerate(text.split("\n"), 1):
        if limit is not None and len(rows) >= limit:
            break
        if not line.strip():
            continue
        try:
            value = parsing.DECODER.decode(line)
        except (ValueError, RecursionError) as error:
            faults.append(f"{name}:{number}: {_json_problem(error)}")
            continue
        _take(value, name, number, rows, faults)
    return rows, faults


def _read_json(text: str, name: str, limit: int | None) -> _Read:
    try:
        whole = parsing.DECODER.decode(text)
    except RecursionError as error:
        line = text.count("\n", 0, parsing.too_deep(text) or 0) + 1
        return [], [f"{name}:{line}: {_json_problem(error)}"]
    except ValueError as error:
        first = text.lstrip().split("\n", 1)[0]
        if getattr(error, "msg", "") == "Extra data" and _is_object(first):
            return _read_jsonl(text, name, limit)  # a .json file with one object a line is common
        return [], [f"{name}:{getattr(error, 'lineno', 1)}: {_json_problem(error)}"]
    start = 0
    if isinstance(whole, parsing.Odd):
        return [], [f"{name}:1: {whole.why}"]
    if isinstance(whole, dict):
        if not isinstance(whole.get("data"), list):
            found = ", ".join(f"'{key}'" for key in list(whole)[:10]) or "nothing"
            return [], [f'{name}:1: expected an array of objects, or {{"data": [...]}}; found an object with {found}']
        start = _value_at(text, "data")
    elif not isinstance(whole, list):
        return [], [f"{name}:1: expected an array of objects, found {_type(whole)}"]
    rows: list[Row] = []
    faults: list[str] = []
    line, last = 1, 0
    one_line = "\n" not in text.strip()  # then every row is on line 1, and its number says more
    for number, (value, at) in enumerate(_elements(text, start), 1):
        if limit is not None and len(rows) >= limit:
            break
        line, last = line + text.count("\n", last, at), at
        _take(value, name, number if one_line else line, rows, faults)
    return rows, faults


def _elements(text: str, start: int) -> list[tuple[Any, int]]:
    """The elements of the array at `start` (text known to be valid JSON), each with its offset."""
    decoder, found = parsing.DECODER, []
    at = _skip(text, _skip(text, start) + 1)
    while text[at] != "]":
        value, end = decoder.raw_decode(text, at)
        found.append((value, at))
        at = _skip(text, end)
        if text[at] == ",":
            at = _skip(text, at + 1)
    return found


def _value_at(text: str, key: str) -> int:
    """Offset of the last value under `key` in the object that `text` (valid JSON) is."""
    decoder, place = parsing.DECODER, 0
    at = _skip(text, _skip(text, 0) + 1)
    while text[at] != "}":
        name, end = decoder.raw_decode(text, at)
        value = _skip(text, _skip(text, end) + 1)
        if name == key:
            place = value
        at = _skip(text, decoder.raw_decode(text, value)[1])
        if text[at] == ",":
            at = _skip(text, at + 1)
    return place


def _skip(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at


def _take(value: Any, name: str, line: int, rows: list[Row], faults: list[str]) -> None:
    if isinstance(value, parsing.Odd):
        faults.append(f"{name}:{line}: {value.why}")
    elif not isinstance(value, dict):
        faults.append(f"{name}:{line}: expected an object, found {_type(value)}")
    elif not value:
        faults.append(f"{name}:{line}: the object is empty")
    elif len(value) > _COLUMNS:
        faults.append(f"{name}:{line}: {_too_many(value)}")
    elif problem := parsing.odd(value):
        faults.append(f"{name}:{line}: {problem}")
    else:
        rows.append(Row(values=value, file=name, line=line))


def _too_many(columns: Collection[str]) -> str:
    return f"{len(columns):,} columns, and at most {_COLUMNS:,} are read"


def _is_object(text: str) -> bool:
    try:
        return isinstance(parsing.DECODER.decode(text), dict | parsing.Odd)
    except (ValueError, RecursionError):
        return False


def _json_problem(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON: {error.msg} (column {error.colno})"
    return f"not valid JSON: {'nested too deeply' if isinstance(error, RecursionError) else error}"


def _type(value: Any) -> str:
    if value is None:
        return "null"
    names = {
        str: "text",
        list: "an array",
        dict: "an object",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return names.get(type(value), type(value).__name__)


def _read_csv(text: str, name: str, limit: int | None, delimiter: str = ",") -> _Read:
    csv.field_size_limit(2**31 - 1)  # the default refuses long documents
    rows: list[Row] = []
    faults: list[str] = []
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    end = 0
    try:
        for cells in reader:
            start, end = end + 1, reader.line_num
            if limit is not None and len(rows) >= limit:
                break
            if not cells:
                continue
            if not header:
                header = [cell.strip() for cell in cells]
                twice = sorted(column for column, times in Counter(header).items() if times > 1)
                if len(header) > _COLUMNS:
                    return [], [f"{name}:{start}: {_too_many(header)}"]
                if twice or not all(header):
                    problem = f"column '{twice[0]}' is named twice" if twice else "a column has no name"
                    return [], [f"{name}:{start}: {problem}; the first line names the columns"]
            elif len(cells) != len(header):
                faults.append(
                    f"{name}:{start}: {plural(len(cells), 'value')} for {plural(len(header), 'column')} "
                    f"({', '.join(header)}). Put text that holds a delimiter between double quotes."
                )
            else:
                _take(dict(zip(header, cells, strict=True)), name, start, rows, faults)
    except csv.Error as error:
        faults.append(f"{name}:{end + 1}: not valid CSV: {error}")
    return rows, faults


def _read_tsv(text: str, name: str, limit: int | None) -> _Read:
    return _read_csv(text, name, limit, delimiter="\t")


_READERS: dict[str, Callable[[str, str, int | None], _Read]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
}


def _read_parquet(file: Path, name: str, limit: int | None) -> _Read:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ModuleNotFoundError as error:
        raise MissingError(missing_package(error.name or "pyarrow")) from error
    rows: list[Row] = []
    faults: list[str] = []
    try:
        with parquet.ParquetFile(file) as table:
            for batch in table.iter_batches():
                for values in batch.to_pylist():
                    if limit is not None and len(rows) >= limit:
                        return rows, faults
                    _take(values, name, len(rows) + len(faults) + 1, rows, faults)
    except (pyarrow.ArrowException, OSError) as error:
        return [], [f"{name}: not a readable parquet file: {str(error).splitlines()[0]}"]
    return rows, faults or ([] if rows else [f"{name}: the file holds no rows"])


def _read_hub(path: str, data: Data, token: str | None, limit: int | None) -> _Read:
    name = path.removeprefix(_HUB_PREFIX)
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise MissingError(missing_package(error.name or "datasets")) from error
    try:
        table = hub.again(name, lambda: datasets.load_dataset(name, data.subset, split=data.split, token=token))
    except GaveUp as given:
        problem = f"{given.why} ({given.tried}: {redact(first_line(given.error))})"
        raise MissingError(f"cannot get the hub data set '{name}': {problem}. {_OFFLINE}") from given.error
    except (OSError, ValueError) as error:
        problem = redact((str(error).splitlines() or [type(error).__name__])[0])
        if isinstance(error, ValueError):  # an unknown split or subset: the library lists those it has
            raise UsageError(f"{path}: {problem}") from error
        raise MissingError(f"cannot get the hub data set '{name}': {problem}. {_OFFLINE}") from error
    except Exception as error:  # the library has many kinds of its own
        raise DataError("the data cannot be read:", [f"{path}: {redact(str(error))}"]) from error
    rows: list[Row] = []
    faults: list[str] = []
    for number, values in enumerate(table, 1):
        if limit is not None and number > limit:
            break
        _take(dict(values), path, number, rows, faults)
    return rows, faults or ([] if rows else [f"{path}: the split '{data.split}' holds no rows"])
