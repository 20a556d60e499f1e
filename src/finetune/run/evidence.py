"""What stages leave on disk, written and read back through one door. A file that is missing, damaged or of an unknown
schema is named, with what to do: nothing else in the package opens these files."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from finetune.core.errors import MissingError, StageError, first_line
from finetune.core.files import make_way, write_json, write_jsonl
from finetune.core.parsing import loads
from finetune.core.schemas import Schema
from finetune.run.layout import CHAT_TEMPLATE, EVENTS, MODEL, REPORTS, ROW_SCORES, TRAINED, Document, File, Rows, Text
from finetune.run.log import PREVIOUS
from finetune.run.records import evaluated, trained

if TYPE_CHECKING:
    from finetune.recipe import Recipe
    from finetune.run.directory import Run

R = TypeVar("R")
Step = trained.Step


class EvidenceError(StageError):
    """A file of a run that cannot be read as what it is; the text names it, and how to have it made again."""

    def __init__(self, path: Path, stage: str | None, why: str) -> None:
        again = f"finetune {stage} RECIPE" if stage else "finetune run RECIPE"
        super().__init__(f"{path} is damaged: {why}. Make it again with: {again}")
        self.path, self.stage, self.why = path, stage, why


# -- files ---------------------------------------------------------------------------------------------------------------


def write(run: Run, file: Document[R], value: R) -> Path:
    """Store a record. Raises StageError where it is none: a stage that writes what no check could read is broken."""
    _validated(run.path / file.path, file, file.record, value)
    make_way(run.path / file.path)
    write_json(run.path / file.path, value)
    return run.path / file.path


def write_rows(run: Run, file: Rows[R], rows: Iterable[R]) -> Path:
    """Store records, one a line; see `write`."""
    listed = list(rows)
    _validated(run.path / file.path, file, list[file.record], listed)  # type: ignore[name-defined]
    make_way(run.path / file.path)
    write_jsonl(run.path / file.path, listed)  # type: ignore[arg-type]
    return run.path / file.path


def read(run: Run, file: Document[R]) -> R:
    """The record in a file. Raises MissingError with the command that writes it, EvidenceError where it is damaged, NewerError
    where a later version wrote it."""
    path = required(run, file)
    value = raw(run, file)
    if file.schema is not None and isinstance(value, dict):
        value = _of_today(path, file, file.schema, value)
    found: R = _validated(path, file, file.record, value)
    return found


def raw(run: Run, file: Document[Any]) -> Any:
    """As `read`, to the letter: neither brought to today's schema nor held against its record."""
    path = required(run, file)
    return _parse(path, file, _bytes(path, file))


def rows(run: Run, file: Rows[R]) -> list[R]:
    """The records in a JSONL file; see `read`."""
    path = required(run, file)
    content = _bytes(path, file)
    if content and not content.endswith(b"\n"):
        raise EvidenceError(path, file.stage, "its last line is cut short")
    # Not splitlines(): it also breaks at U+2028 and its like, which JSON strings may hold.
    lines = content.split(b"\n")[:-1]
    values = [_parse(path, file, line, number) for number, line in enumerate(lines, 1)]
    found: list[R] = _validated(path, file, list[file.record], values)  # type: ignore[name-defined]
    return found


def text(run: Run, file: Text) -> str:
    """The text in a file; see `read`."""
    path = required(run, file)
    try:
        return _bytes(path, file).decode("utf-8")
    except UnicodeDecodeError as error:
        raise EvidenceError(path, file.stage, f"it is no text ({error.reason})") from None


def maybe(run: Run, file: Document[R]) -> R | None:
    """As `read`, or None where the file is not there."""
    return read(run, file) if there(run, file) else None


def maybe_rows(run: Run, file: Rows[R]) -> list[R]:
    """As `rows`, or nothing where the file is not there."""
    return rows(run, file) if there(run, file) else []


def there(run: Run, file: File) -> bool:
    """Whether a file (or folder) is there at all."""
    return (run.path / file.path).exists()


def required(run: Run, file: File) -> Path:
    """Where a file is. Raises MissingError with the command that writes it."""
    path = run.path / file.path
    if not path.exists():
        raise MissingError(f"{file.path} is not in {run.path}. Write it with: finetune {file.stage or 'run'} RECIPE")
    return path


def _bytes(path: Path, file: File) -> bytes:
    if path.exists() and not path.is_file():  # reading a pipe would wait for a writer
        raise EvidenceError(path, file.stage, "it is no file")
    try:
        return path.read_bytes()
    except OSError as error:
        raise EvidenceError(path, file.stage, error.strerror or str(error)) from None


def _parse(path: Path, file: File, content: bytes, line: int | None = None) -> Any:
    place = f"line {line} " if line else "it "
    try:
        return loads(content.decode("utf-8"))
    except ValueError as error:
        what = "is empty" if not content.strip() else f"is not JSON ({error})"
        raise EvidenceError(path, file.stage, place + what) from None


def _of_today(path: Path, file: File, schema: Schema, value: dict[str, Any]) -> dict[str, Any]:
    try:
        return schema.read(value, path)
    except (ValueError, TypeError, LookupError, AttributeError) as error:  # the last three: not what a step expects
        raise EvidenceError(path, file.stage, first_line(error)) from None


def _validated(path: Path, file: File, record: Any, value: Any) -> Any:
    from pydantic import ValidationError

    try:
        return _adapter(record).validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "the whole of it"
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise EvidenceError(path, file.stage, f"{place}: {first['msg'].lower()}{more}") from None


@functools.cache
def _adapter(record: Any) -> Any:
    from pydantic import ConfigDict, TypeAdapter
    from typing_extensions import is_typeddict

    # A record has a configuration of its own, and takes no other.
    return TypeAdapter(record, config=None if is_typeddict(record) else ConfigDict(strict=True))


# -- what is read by many -----------------------------------------------------------------------------------------------


def fetched(run: Run) -> trained.Fetched:
    """Where the model is (`fetch/model.json`)."""
    return read(run, MODEL)


def chat_template(run: Run) -> str:
    """The template that the run was prepared with."""
    return text(run, CHAT_TEMPLATE)


def steps(run: Run, stage: str) -> list[Step]:
    """The steps of the last training of a stage, one a step, in order.

    A training started anew drops what came before; a resumed one drops what came after its checkpoint. Raises
    EvidenceError where a step lacks what every step has.
    """
    found: list[dict[str, Any]] = []
    for line in run.log():
        event = line.event
        if event.get("stage") != stage:
            continue
        if event["event"] == "training":
            begin = event.get("resumed_from") or 0
            while found and found[-1]["step"] > begin:
                found.pop()
        elif event["event"] == "step":
            found.append({key: value for key, value in event.items() if key not in ("event", "stage", "prev")})
    checked: list[Step] = _validated(run.events_path, EVENTS, list[Step], found)
    return checked


def event_faults(run: Run) -> list[str]:
    """What is wrong with the events of a run, each with its line: a kind that is none, a key that is not there or not what
    it should be. Raises StageError for a line that is no event."""
    from finetune.run.records import Time
    from finetune.run.records.events import KINDS

    found = []
    for line in run.log():
        rest = {key: value for key, value in line.event.items() if key not in ("time", "event", PREVIOUS)}
        kind = line.event["event"]
        if kind == "step":
            rest = {"time": line.event["time"], **{key: value for key, value in rest.items() if key != "stage"}}
        record = trained.Step if kind == "step" else KINDS.get(kind)
        place = f"{EVENTS.path}:{line.number}"
        if record is None or ("stage" in line.event and line.event["stage"] not in REPORTS):
            found.append(f"{place} is of no known kind or stage ('{kind}', '{line.event.get('stage')}')")
            continue
        for wanted, value in ((record, rest), (Time, line.event["time"])):
            try:
                _adapter(wanted).validate_python(value)
            except ValueError as error:
                found.append(f"{place} is damaged: {first_line(error)}")
    return found


def row_scores(run: Run) -> tuple[Mapping[str, evaluated.RowScore], Mapping[str, evaluated.RowScore]] | None:
    """The training rows' scores before and after training (see stage evaluate); None unless every row has both."""
    scores = maybe(run, ROW_SCORES) or {}
    base, after = scores.get("base", {}), scores.get("trained", {})
    return (base, after) if base and set(base) <= set(after) else None


def tensor_bytes(file: Path) -> int:
    """Bytes of all tensors of a safetensors file: 8 bytes of length, a JSON header, tensors
    (https://huggingface.co/docs/safetensors)."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
    return file.stat().st_size - 8 - length


def model_settings(recipe: Recipe, *, merged: bool = False) -> dict[str, Any]:
    """How a backend shall load the model, as plain values; the base, or what was merged of it and is plain whatever held it."""
    wanted = {"dtype", "device", "attn_implementation", "trust_remote_code"}
    if recipe.model.quantization and not merged:
        wanted.add("quantization")
    return recipe.model.model_dump(include=wanted)


def final(run: Run, recipe: Recipe) -> tuple[Path, Path | None]:
    """The model directory and the adapter directory (or None) after the last training stage that ran."""
    base, adapter = _fetched_model(run)
    for stage, wanted in (("train", recipe.train), ("align", recipe.align)):
        if wanted is not None:
            base, adapter = _after(run, stage, (base, adapter))
    return base, adapter


def phases(run: Run, recipe: Recipe) -> dict[str, tuple[Path, Path | None]]:
    """`base`, `trained`, `aligned`: the model and adapter directories at each point of the run, as far as it came."""
    here = _fetched_model(run)
    result = {"base": here}
    for phase, stage, wanted in (("trained", "train", recipe.train), ("aligned", "align", recipe.align)):
        if wanted is not None and run.report(stage) is not None:
            here = _after(run, stage, here)
            result[phase] = here
    return result


def _fetched_model(run: Run) -> tuple[Path, Path | None]:
    found = fetched(run)
    return Path(found["base"]), Path(found["adapter"]) if found["adapter"] else None


def _after(run: Run, stage: str, before: tuple[Path, Path | None]) -> tuple[Path, Path | None]:
    """Model and adapter after a training stage: an adapter of its own on the model before, or a model of its own."""
    adapter, model = run.path / stage / Path(TRAINED.path).name, run.path / stage / "model"
    if adapter.is_dir():
        return before[0], adapter
    return (model, None) if model.is_dir() else before
