"""YAML 1.2 in and out, with the line of every key. (In YAML 1.2 `3e-4` is a number and `no` is a word.)"""

from __future__ import annotations

import io
import re
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.representer import SafeRepresenter

from finetune.errors import RecipeError, UsageError

Path = tuple[str | int, ...]
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ufeff]")


def parse(text: str, source: str) -> tuple[Any, dict[Path, int]]:
    """The value in `text`, and the line (from 1) of every path in it. Raises RecipeError with file and line."""
    try:
        value = YAML(typ="safe", pure=True).load(text)
        node = YAML(typ="safe", pure=True).compose(io.StringIO(text))
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        # The message about a repeated key quotes both values, and one may be a token.
        problem = (error.problem or error.context or "not valid YAML").splitlines()[0].partition(" with value ")[0]
        raise RecipeError(f"{source} is not valid YAML:", [f"{source}:{line}: {problem}"]) from None
    except (YAMLError, ValueError) as error:
        raise RecipeError(f"{source} is not valid YAML:", [f"{source}: {str(error).splitlines()[0]}"]) from None
    lines: dict[Path, int] = {}
    try:
        if node is not None:
            _index(node, (), lines)
    except RecursionError:
        raise RecipeError(
            f"{source} is not a recipe:", [f"{source}: a value that contains itself (&name, *name)"]
        ) from None
    return value, lines


def _index(node: Node, path: Path, lines: dict[Path, int]) -> None:
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
        return YAML(typ="safe", pure=True).load(text) if text else ""
    except (YAMLError, ValueError):
        raise UsageError(f"{option}: the value is not valid YAML; put it in double quotes inside the shell's") from None


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
