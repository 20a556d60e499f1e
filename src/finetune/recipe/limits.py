"""What a YAML file may ask of this machine: its size, its nesting, its values with every alias written out, its numbers.

Few lines of YAML can stand for billions of values (https://en.wikipedia.org/wiki/Billion_laughs_attack), and ruamel.yaml
scans a megabyte in seconds. Each limit is far above what a recipe or a spec needs (the largest shipped one has 80 values).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, ScalarEvent
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.parser import Parser

BYTES = 262_144
DEPTH = 50
VALUES = 10_000
INTEGER = 2**63  # what other programs and the libraries take, either way
_DIGITS = 40  # an integer with more is not even read: Python refuses those of 4300 digits, and takes long before that
_NOT_TEXT = re.compile("[\0\ud800-\udfff]")
_INT = "tag:yaml.org,2002:int"
_VALUES: dict[str, Callable[[SafeConstructor, ScalarNode], Any]] = {  # where a tag may stand before what is none
    _INT: SafeConstructor.construct_yaml_int,
    "tag:yaml.org,2002:float": SafeConstructor.construct_yaml_float,
    "tag:yaml.org,2002:bool": SafeConstructor.construct_yaml_bool,
}


class BoundedParser(Parser):
    """ruamel.yaml's parser, which refuses a file as soon as its events go beyond a limit, before anything is built."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._values = 0
        self._open: list[tuple[str | None, int]] = []  # anchor of each collection around, values before it
        self._sizes: dict[str, int] = {}  # values that an alias to each anchor stands for

    def get_event(self) -> Any:
        event = super().get_event()
        if isinstance(event, AliasEvent):
            if event.anchor in [anchor for anchor, _ in self._open]:
                raise _refusal(f"a value that contains itself (&{event.anchor}, *{event.anchor})", event)
            self._values += self._sizes.get(str(event.anchor), 0)
        elif isinstance(event, ScalarEvent):
            self._values += 1
            if event.anchor is not None:
                self._sizes[event.anchor] = 1
        elif isinstance(event, CollectionStartEvent):
            self._open.append((event.anchor, self._values))
            self._values += 1
            if len(self._open) > DEPTH:
                raise _refusal(f"nested more than {DEPTH} deep", event)
        elif isinstance(event, CollectionEndEvent):
            anchor, before = self._open.pop()
            if anchor is not None:
                self._sizes[anchor] = self._values - before
        if self._values > VALUES:
            raise _refusal(f"more than {VALUES:,} keys and values, counting what each alias (*name) stands for", event)
        return event


def _refusal(problem: str, event: Any) -> MarkedYAMLError:
    return MarkedYAMLError(problem=problem, problem_mark=event.start_mark)


def check_size(size: int) -> str | None:
    """What is wrong with a file of so many bytes, if anything."""
    return f"{size:,} bytes, and at most {BYTES:,} are read" if size > BYTES else None


def check_values(root: Node, constructor: SafeConstructor) -> None:
    """Raise MarkedYAMLError for a text or a number in a document that nothing could hold."""
    for node in _scalars(root):
        problem = _problem(node, constructor)
        if problem:
            raise MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def _scalars(root: Node) -> Iterator[ScalarNode]:
    """Every scalar, as often as aliases lead to it: the parser has counted them."""
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ScalarNode):
            yield node
        elif isinstance(node, SequenceNode):
            waiting += reversed(node.value)
        elif isinstance(node, MappingNode):
            waiting += [each for pair in reversed(node.value) for each in reversed(pair)]


def _problem(node: ScalarNode, constructor: SafeConstructor) -> str | None:
    text = str(node.value)
    if found := _NOT_TEXT.search(text):
        return f"the character U+{ord(found.group()):04X} cannot be in a text"
    if node.tag not in _VALUES:
        return None
    digits = text.replace("_", "").lstrip("+-")
    if node.tag == _INT and len(digits) > _DIGITS:
        return f"a whole number of {len(digits)} digits is too large"
    try:
        value = _VALUES[node.tag](constructor, node)
    except (ValueError, LookupError):
        return f"what stands here is no !!{node.tag.rpartition(':')[2]}"
    if node.tag == _INT and abs(value) >= INTEGER:
        return f"a whole number of {len(digits)} digits is too large"
    if math.isinf(value) and "inf" not in text.lower():
        return "the number is too large"
    return None
