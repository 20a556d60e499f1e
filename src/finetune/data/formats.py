"""What a row holds: a conversation, plain text, or a preference pair; told from its columns, or as the recipe says."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from finetune.core.errors import RecipeError
from finetune.core.lookup import did_you_mean
from finetune.data.faults import plural, raise_all
from finetune.data.sources import Row

if TYPE_CHECKING:
    from finetune.recipe.sections import Data

Message = dict[str, str]
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
ALLOWED = ("system", "user", "assistant")


@dataclass(frozen=True)
class Example:
    """One row, understood. `messages` is the whole conversation, ending in the assistant (chat), or the prompt
    (preference, with `chosen` and `rejected`); `text` is set for plain text. An instruction with an input keeps both
    apart in its message (`instruction`, `input`) beside the joined `content`, for Alpaca's own wording."""

    kind: Literal["chat", "text", "preference"]
    messages: tuple[Message, ...]
    text: str | None
    chosen: str | None
    rejected: str | None
    file: str
    line: int


class _Wrong(Exception):
    """A fault of one row; the caller adds file and line."""


Values = dict[str, Any]


@dataclass(frozen=True)
class _Shape:
    """A set of columns that makes a format recognisable; `build` turns a row's values into an Example's fields."""

    format: str
    columns: tuple[str, ...]
    build: Callable[[Values, tuple[str, ...]], Values]


def _text(values: Values, column: str) -> str:
    value = values[column]
    if not isinstance(value, str):
        raise _Wrong(f"'{column}' is {_type(value)}, expected text")
    return value


def _answer(values: Values, column: str) -> str:
    value = _text(values, column)
    if not value.strip():
        raise _Wrong(f"'{column}' is empty: there is nothing to learn")
    return value


def _question(values: Values, column: str) -> str:
    value = _text(values, column)
    if not value.strip():
        raise _Wrong(f"'{column}' is empty")
    return value


def _type(value: Any) -> str:
    if value is None:
        return "missing"
    names = {str: "text", list: "a list", dict: "an object", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), type(value).__name__)


def _messages(value: Any, column: str) -> list[Message]:
    """A list of messages in OpenAI's (`role`, `content`) or ShareGPT's (`from`, `value`) names; roles as ours."""
    if not isinstance(value, list) or not value:
        raise _Wrong(f"'{column}' is {_type(value) if value != [] else 'empty'}, expected a list of messages")
    return [_message(item, f"{column}[{index}]") for index, item in enumerate(value)]


def _message(item: Any, place: str) -> Message:
    if not isinstance(item, dict):
        raise _Wrong(f"{place} is {_type(item)}, expected an object with 'role' and 'content'")
    for key in ("tool_calls", "function_call", "weight", "train"):
        if item.get(key) not in (None, [], {}, 1, True):
            raise _Wrong(f"{place}: the key '{key}' is not supported; it would change what is trained")
    said, content = item.get("role", item.get("from")), item.get("content", item.get("value"))
    if not isinstance(said, str):
        raise _Wrong(f"{place} has no 'role'; it has {_listed(item)}")
    role = ROLES.get(said, said)
    if role not in ALLOWED:
        raise _Wrong(f"{place}: unknown role '{said}'.{did_you_mean(said, ALLOWED)} Allowed: {', '.join(ALLOWED)}.")
    if isinstance(content, list) and content and all(_is_text_part(part) for part in content):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise _Wrong(f"{place}: the content is {_type(content)}, expected text")
    if not content.strip():
        raise _Wrong(f"{place}: the {role} message is empty{': nothing to learn' if role == 'assistant' else ''}")
    return {"role": role, "content": content}


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _in_order(messages: list[Message], column: str, *, last: str) -> tuple[Message, ...]:
    """The messages, when they are: an optional system message, then user and assistant in turn, ending with `last`."""
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    offset = len(messages) - len(turns)
    for index, message in enumerate(turns):
        expected = ("user", "assistant")[index % 2]
        if message["role"] != expected:
            where = f"{column}[{index + offset}]"
            raise _Wrong(f"{where}: roles out of order: '{message['role']}' where '{expected}' belongs")
    if not turns or turns[-1]["role"] != last:
        found = messages[-1]["role"]
        raise _Wrong(f"'{column}' ends with '{found}', but must end with '{last}'")
    return tuple(messages)


def _prompt(values: Values, column: str) -> list[Message]:
    """The messages before the answer, from text or from a list of messages."""
    value = values[column]
    if isinstance(value, list):
        return _messages(value, column)
    return [*_system(values), {"role": "user", "content": _question(values, column)}]


def _system(values: Values) -> list[Message]:
    system = values.get("system")
    if system is None or system == "":
        return []
    return [{"role": "system", "content": _question(values, "system")}]


def _chat(values: Values, columns: tuple[str, ...]) -> Values:
    (column,) = columns
    messages = _messages(values[column], column)
    if messages[0]["role"] != "system":
        messages = [*_system(values), *messages]
    return {"kind": "chat", "messages": _in_order(messages, column, last="assistant")}


def _prompt_completion(values: Values, columns: tuple[str, ...]) -> Values:
    prompt, completion = columns
    before = _prompt(values, prompt)
    if isinstance(values[completion], list):
        after = _messages(values[completion], completion)
    else:
        after = [{"role": "assistant", "content": _answer(values, completion)}]
    return {"kind": "chat", "messages": _in_order([*before, *after], f"{prompt} + {completion}", last="assistant")}


def _instruction(values: Values, columns: tuple[str, ...]) -> Values:
    instruction, output = columns
    ask = _question(values, instruction)
    user = {"role": "user", "content": ask}
    for column in ("input", "context"):
        if values.get(column) is not None and _text(values, column).strip():
            given = _text(values, column)
            user = {"role": "user", "content": f"{ask}\n\n{given}", "instruction": ask, "input": given}
            break
    answer = {"role": "assistant", "content": _answer(values, output)}
    return {"kind": "chat", "messages": (*_system(values), user, answer)}


def _plain(values: Values, columns: tuple[str, ...]) -> Values:
    return {"kind": "text", "messages": (), "text": _answer(values, columns[0])}


def _preference(values: Values, columns: tuple[str, ...]) -> Values:
    before = _prompt(values, columns[0]) if len(columns) == 3 else []
    answers: list[str] = []
    prompts: list[list[Message]] = []
    for column in columns[-2:]:
        value = values[column]
        if isinstance(value, list):
            messages = _messages(value, column)
            if messages[-1]["role"] != "assistant":
                raise _Wrong(f"'{column}' ends with '{messages[-1]['role']}', but must end with 'assistant'")
            prompts.append(messages[:-1])
            answers.append(messages[-1]["content"])
        elif not before:
            raise _Wrong(f"'{column}' is {_type(value)}; without a 'prompt' column it must be a list of messages")
        else:
            prompts.append([])
            answers.append(_answer(values, column))
    if prompts[0] != prompts[1]:
        raise _Wrong("'chosen' and 'rejected' answer different conversations")
    if before and prompts[0] and prompts[0] != before:
        raise _Wrong("'chosen' and 'rejected' hold a conversation that differs from 'prompt'")
    before = before or prompts[0]
    if not before:
        raise _Wrong("the pair has no prompt")
    if answers[0] == answers[1]:
        raise _Wrong("'chosen' and 'rejected' are the same: there is nothing to prefer")
    messages_before = _in_order(before, columns[0], last="user")
    return {"kind": "preference", "messages": messages_before, "chosen": answers[0], "rejected": answers[1]}


# The first shape whose columns are all there wins, so the more telling ones stand first.
SHAPES: tuple[_Shape, ...] = (
    _Shape("chat", ("messages",), _chat),
    _Shape("chat", ("conversations",), _chat),
    _Shape("chat", ("conversation",), _chat),
    _Shape("preference", ("prompt", "chosen", "rejected"), _preference),
    _Shape("preference", ("question", "chosen", "rejected"), _preference),
    _Shape("preference", ("chosen", "rejected"), _preference),
    _Shape("prompt_completion", ("prompt", "completion"), _prompt_completion),
    _Shape("prompt_completion", ("question", "answer"), _prompt_completion),
    _Shape("prompt_completion", ("prompt", "response"), _prompt_completion),
    _Shape("prompt_completion", ("prompt", "answer"), _prompt_completion),
    _Shape("prompt_completion", ("question", "response"), _prompt_completion),
    _Shape("instruction", ("instruction", "output"), _instruction),
    _Shape("instruction", ("instruction", "response"), _instruction),
    _Shape("text", ("text",), _plain),
)
FIELDS = tuple(dict.fromkeys([*(column for shape in SHAPES for column in shape.columns), "input", "context", "system"]))


def to_examples(rows: list[Row], data: Data) -> list[Example]:
    """The rows, understood by `data.format` (or each by its columns) after `data.fields` has renamed them.

    Raises DataError with the faults of all rows, RecipeError for a mapping that names no field of ours.
    """
    unknown = [name for name in data.fields if name not in FIELDS]
    if unknown:
        known = ", ".join(FIELDS)
        raise RecipeError(
            "data.fields maps our field name to your column name (fields: {prompt: my_column}):",
            [f"unknown field '{name}'.{did_you_mean(name, FIELDS)} Known: {known}." for name in unknown],
        )
    shapes = [shape for shape in SHAPES if data.format in ("auto", shape.format)]
    examples: list[Example] = []
    faults: list[str] = []
    for row in rows:
        try:
            values = _mapped(row.values, data.fields)
            shape = _shape_of(values, shapes, data, _listed(row.values))
            fields = {"text": None, "chosen": None, "rejected": None, **shape.build(values, shape.columns)}
            examples.append(Example(**fields, file=row.file, line=row.line))
        except _Wrong as wrong:
            faults.append(f"{row.file}:{row.line}: {wrong}")
    pairs = [example for example in examples if example.kind == "preference"]
    if pairs and len(pairs) < len(examples):
        other = next(example for example in examples if example.kind != "preference")
        faults.append(
            f"{pairs[0].file}:{pairs[0].line} is a preference pair, {other.file}:{other.line} is not; "
            "pairs go under align.data, the rest under data"
        )
    raise_all(f"the data cannot be used ({plural(len(faults), 'fault')} in {plural(len(rows), 'row')}):", faults)
    return examples


def _mapped(values: Values, fields: dict[str, str]) -> Values:
    """The values under our names. A column that stands in for a field is no longer there under its own name."""
    for ours, column in fields.items():
        if column not in values and ours not in ("input", "context", "system"):
            hint = did_you_mean(column, values)
            raise _Wrong(
                f"no column '{column}', which data.fields gives for '{ours}'.{hint} Columns: {_listed(values)}."
            )
    rest = {key: value for key, value in values.items() if key not in fields.values()}
    return {**rest, **{ours: values.get(column) for ours, column in fields.items()}}


def _shape_of(values: Values, shapes: Iterable[_Shape], data: Data, listed: str) -> _Shape:
    shapes = list(shapes)
    there = {key for key, value in values.items() if value is not None}
    # Columns that the recipe names decide before columns that merely happen to be there.
    for columns in (there & data.fields.keys(), there):
        for shape in shapes:
            if columns.issuperset(shape.columns):
                return shape
    nearest = max(shapes, key=lambda shape: _likeness(shape.columns, there))
    lacking = ", ".join(f"'{column}'" for column in nearest.columns if column not in there)
    what = "cannot tell the format" if data.format == "auto" else f"not a row of the format '{data.format}'"
    raise _Wrong(
        f"{what}: the columns are {listed}. Nearest: {nearest.format} ({' + '.join(nearest.columns)}), "
        f"which lacks {lacking}. Fix the row, or map your columns with data.fields."
    )


def _likeness(columns: tuple[str, ...], there: set[str]) -> float:
    """How near a row's columns come to a shape's: 1 when all are there, less for names merely alike."""

    def best(column: str) -> float:
        return max((difflib.SequenceMatcher(None, column, name.lower()).ratio() for name in there), default=0.0)

    return sum(1.0 if column in there else 0.9 * best(column) for column in columns) / len(columns)


def _listed(values: Values) -> str:
    names = [f"'{name}'" for name in values]
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "") or "none"
