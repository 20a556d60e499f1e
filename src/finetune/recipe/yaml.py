"""YAML 1.2 in and out, with the line of every key. (In YAML 1.2 `3e-4` is a number and `no` is a word.)"""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError
from ruamel.yaml.representer import SafeRepresenter

from finetune.core.errors import RecipeError, UsageError, first_line
from finetune.core.text import HIDDEN
from finetune.recipe import limits

Keys = tuple[str | int, ...]
_UNSAFE = re.compile(f"[\x09\x0a\x0d{HIDDEN}]")


def read(file: Path, what: str = "recipe") -> tuple[Any, dict[Keys, int]]:
    """As `parse`, of a file. Raises RecipeError also where it is too large or not UTF-8 text."""
    size = file.stat().st_size
    # Before it is read: a file may be larger than the memory.
    content = file.read_bytes() if limits.check_size(size) is None else b""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"{file} is not a {what}:", [f"{file}:{line}: not UTF-8 text"]) from None
    return parse(text, str(file), what, size=size)


def parse(text: str, source: str, what: str = "recipe", *, size: int | None = None) -> tuple[Any, dict[Keys, int]]:
    """The value in `text`, and the line (from 1) of every path in it. Raises RecipeError with file and line."""
    if problem := limits.check_size(len(text) if size is None else size):
        raise RecipeError(f"{source} is not a {what}:", [f"{source}:1: {problem}"])
    try:
        node, value = _compose(text)
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        # The message about a repeated key quotes both values, and one may be a token.
        problem = (error.problem or error.context or "not valid YAML").splitlines()[0].partition(" with value ")[0]
        raise RecipeError(f"{source} is not valid YAML:", [f"{source}:{line}: {problem}"]) from None
    except (YAMLError, ValueError, OverflowError) as error:
        line = text.count("\n", 0, error.position) + 1 if isinstance(error, ReaderError) else 1
        raise RecipeError(f"{source} is not valid YAML:", [f"{source}:{line}: {first_line(error)}"]) from None
    lines: dict[Keys, int] = {}
    if node is not None:
        _index(node, (), lines)
    return value, lines


def _compose(text: str) -> tuple[Node | None, Any]:
    """The document's node, and what it stands for. Raises what ruamel.yaml raises, also beyond a limit."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Parser = limits.BoundedParser
    node: Node | None = yaml.compose(io.StringIO(text))
    if node is None:
        return None, None
    limits.check_values(node, yaml.constructor)
    return node, yaml.constructor.construct_document(node)


def _index(node: Node, path: Keys, lines: dict[Keys, int]) -> None:
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, MappingNode):
        for key, child in node.value:
            here = (*path, key.value if isinstance(key, ScalarNode) else str(key.value))
            lines[here] = key.start_mark.line + 1
            _index(child, here, lines)
    elif isinstance(node, SequenceNode):
        for index, child in enumerate(node.value):
            _index(child, (*path, index), lines)


def scalar(text: str, option: str) -> Any:
    """One value as the user typed it after `option`. Raises UsageError where it is no YAML."""
    try:
        return parse(text, option)[0] if text else ""
    except RecipeError as error:
        why = error.faults[0].removeprefix(f"{option}:1: ")
        told = "" if "'" in why or '"' in why else f" ({why})"  # what it quotes may be a token
        hint = "put it in double quotes inside the shell's"
        raise UsageError(f"{option}: the value is not valid YAML{told}; {hint}") from None


class _Representer(SafeRepresenter):
    """Quotes and escapes what the library writes plainly and then reads as a line break or not at all."""

    def represent_str(self, data: str) -> ScalarNode:
        style = '"' if _UNSAFE.search(data) else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Representer.add_representer(str, _Representer.represent_str)


def write(value: Any) -> str:
    """`value` as block-style YAML that `parse` reads back unchanged."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Representer = _Representer
    yaml.default_flow_style = False
    yaml.allow_unicode = True
    yaml.width = 2**31
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    stream = io.StringIO()
    yaml.dump(value, stream)
    return stream.getvalue()
