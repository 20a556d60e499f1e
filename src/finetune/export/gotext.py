"""Go's text/template, as much of it as the templates of `finetune.export.gotemplate` use, run as Ollama runs it.

Spec: https://pkg.go.dev/text/template. Here are `if`, `else if`, `range` over a list, `define`, `template`, variables,
string and integer literals, `- ` trimming, and FUNCTIONS; anything else raises UsageError. As in Go, a string is
bytes: `len` and `slice` count them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from finetune.core.errors import UsageError

_ACTION = re.compile(r'\{\{(- )?((?:"(?:\\.|[^"\\\n])*"|[^"])*?)( -)?\}\}')
_TOKEN = re.compile(
    r'\s*(?:(?P<string>"(?:\\.|[^"\\\n])*")|(?P<number>-?\d+)|(?P<path>\$\w*(?:\.[A-Za-z_]\w*)*|(?:\.[A-Za-z_]\w*)+|\.)'
    r"|(?P<word>[A-Za-z_]\w*)|(?P<mark>:=|[(),]))"
)
_ESCAPE = re.compile(r'\\(u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|[ntr"\\])')
_NAMED = {"n": "\n", "t": "\t", "r": "\r", '"': '"', "\\": "\\"}
_NAMES = {character: name for name, character in _NAMED.items()}

Node = tuple[Any, ...]


def quote(text: str) -> str:
    """A Go string literal in plain ASCII."""
    return '"' + "".join(map(_escape, text)) + '"'


def _escape(character: str) -> str:
    if character in _NAMES:
        return "\\" + _NAMES[character]
    if " " <= character <= "~":
        return character
    code = ord(character)
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


def _unquote(literal: str) -> bytes:
    plain = _ESCAPE.sub(lambda found: _NAMED.get(found[1]) or chr(int(found[1][1:], 16)), literal[1:-1])
    return plain.encode()


class GoError(UsageError):
    """A template that Go would refuse, or that stops while it runs; the text is like Go's own."""


@dataclass
class _Scope:
    """Where the dot and the variables stand. `root` is what `$` means."""

    dot: Any
    root: Any
    variables: dict[str, Any] = field(default_factory=dict)

    def inner(self, dot: Any = ...) -> _Scope:
        return _Scope(self.dot if dot is ... else dot, self.root, dict(self.variables))


class Template:
    """A parsed template. `execute(data)` gives its text; `data` maps field names to str, int, lists and such maps."""

    def __init__(self, source: str) -> None:
        self.defined: dict[str, list[Node]] = {}
        self.pieces = _split(source)
        self.place = 0
        self.root, end = self._list()
        if end:
            raise GoError(f"unexpected {{{{{end}}}}}")

    # -- parsing --------------------------------------------------------------------------------------------------

    def _list(self) -> tuple[list[Node], str]:
        """Nodes up to an `else` or `end`, and that action's text (empty at the end of the source)."""
        nodes: list[Node] = []
        while self.place < len(self.pieces):
            kind, text = self.pieces[self.place]
            self.place += 1
            if kind == "text":
                nodes.append(("text", text.encode()))
                continue
            word = text.partition(" ")[0]
            if word in ("else", "end"):
                return nodes, text
            nodes += self._action(word, text.removeprefix(word).strip() if word in _BLOCKS else text)
        return nodes, ""

    def _action(self, word: str, text: str) -> list[Node]:
        if word in ("if", "range"):
            return [(word, self._head(word, text), *self._branches(word))]
        if word == "define":
            body, end = self._list()
            if end != "end":
                raise GoError(f"define {text} is not closed")
            self.defined[_unquote(text).decode()] = body
            return []
        if word == "template":
            tokens = _Tokens(text)
            name = tokens.next("string")
            return [("template", _unquote(name).decode(), tokens.pipeline())]
        return [("set", *_assignment(text)) if ":=" in _marks(text) else ("print", _Tokens(text).pipeline())]

    def _head(self, word: str, text: str) -> Node:
        if word == "range" and ":=" in _marks(text):
            tokens = _Tokens(text)
            names = [tokens.next("path")]
            while tokens.peek() == ("mark", ","):
                tokens.next("mark")
                names.append(tokens.next("path"))
            tokens.next("mark")
            return ("names", names, tokens.pipeline())
        return _Tokens(text).pipeline() if word == "if" else ("names", [], _Tokens(text).pipeline())

    def _branches(self, word: str) -> tuple[list[Node], list[Node]]:
        body, end = self._list()
        if end.startswith("else if"):
            text = end.removeprefix("else if").strip()
            return body, [("if", self._head("if", text), *self._branches("if"))]
        if end == "else":
            other, end = self._list()
            if end != "end":
                raise GoError(f"{word} is not closed")
            return body, other
        if end != "end":
            raise GoError(f"{word} is not closed")
        return body, []

    # -- running --------------------------------------------------------------------------------------------------

    def execute(self, data: Any) -> str:
        """The text. Raises GoError where Go would stop."""
        root = _bytes(data)
        done: list[bytes] = []
        # A stack of its own: templates that call themselves go deeper than Python does.
        stack = [(iter(self.root), _Scope(root, root))]
        while stack:
            nodes, scope = stack[-1]
            node = next(nodes, None)
            if node is None:
                stack.pop()
            elif node[0] == "text":
                done.append(node[1])
            elif node[0] == "print":
                done.append(_printed(_value(node[1], scope)))
            elif node[0] == "set":
                scope.variables[node[1]] = _value(node[2], scope)
            elif node[0] == "if":
                stack.append((iter(node[2] if _value(node[1], scope) else node[3]), scope.inner()))
            elif node[0] == "range":
                stack += reversed(list(_turns(node, scope)))
            else:
                stack.append(self._called(node, scope))
        return b"".join(done).decode("utf-8", "replace")

    def _called(self, node: Node, scope: _Scope) -> tuple[Iterator[Node], _Scope]:
        _, name, pipeline = node
        if name not in self.defined:
            raise GoError(f"template {quote(name)} not defined")
        dot = _value(pipeline, scope)
        return iter(self.defined[name]), _Scope(dot, dot)


def _turns(node: Node, scope: _Scope) -> Iterator[tuple[Iterator[Node], _Scope]]:
    """What a `range` runs, in order."""
    _, names, pipeline = node[1]
    items = _value(pipeline, scope) or []
    for index, item in enumerate(items):
        inner = scope.inner(item)
        inner.variables.update(zip(reversed(names), (item, index), strict=False))
        yield iter(node[2]), inner
    if not items:
        yield iter(node[3]), scope.inner()


_BLOCKS = ("if", "range", "define", "template")


def _split(source: str) -> list[tuple[str, str]]:
    """("text" or "action", content), trimmed where `{{- ` or ` -}}` says so."""
    pieces: list[tuple[str, str]] = []
    place, strip = 0, False
    for found in _ACTION.finditer(source):
        text = source[place : found.start()]
        text = text.lstrip(" \t\r\n") if strip else text
        text = text.rstrip(" \t\r\n") if found[1] else text
        pieces += [("text", text)] if text else []
        pieces.append(("action", found[2].strip()))
        place, strip = found.end(), bool(found[3])
    rest = source[place:]
    if "{{" in rest:
        raise GoError("unclosed action")
    rest = rest.lstrip(" \t\r\n") if strip else rest
    return pieces + ([("text", rest)] if rest else [])


def _marks(text: str) -> list[str]:
    return [found["mark"] for found in _TOKEN.finditer(text) if found["mark"]]


def _assignment(text: str) -> tuple[str, Node]:
    tokens = _Tokens(text)
    name = tokens.next("path")
    tokens.next("mark")
    return name, tokens.pipeline()


class _Tokens:
    """The words of one action."""

    def __init__(self, text: str) -> None:
        self.items: list[tuple[str, str]] = []
        self.glued: set[int] = set()  # words with no space before them
        place = 0
        while place < len(text.rstrip()):
            found = _TOKEN.match(text, place)
            if not found or not found.lastgroup:
                raise GoError(f"unexpected {text[place:]!r} in {{{{{text}}}}}")
            if found.start(found.lastgroup) == place:
                self.glued.add(len(self.items))
            self.items.append((found.lastgroup, found[found.lastgroup]))
            place = found.end()
        self.text, self.place = text, 0

    def peek(self) -> tuple[str, str] | None:
        return self.items[self.place] if self.place < len(self.items) else None

    def next(self, kind: str) -> str:
        item = self.peek()
        if item is None or item[0] != kind:
            raise GoError(f"expected a {kind} in {{{{{self.text}}}}}")
        self.place += 1
        return item[1]

    def pipeline(self) -> Node:
        """One command, to the end of the action or a closing parenthesis."""
        terms = []
        while self.peek() not in (None, ("mark", ")")):
            terms.append(self._term())
        if not terms:
            raise GoError(f"missing value in {{{{{self.text}}}}}")
        if terms[0][0] == "word":
            if terms[0][1] not in FUNCTIONS and terms[0][1] not in ("and", "or"):
                raise GoError(f'function "{terms[0][1]}" not defined')
            return ("call", terms[0][1], terms[1:])
        if len(terms) > 1:
            raise GoError(f"cannot give an argument to a value in {{{{{self.text}}}}}")
        return terms[0]

    def _term(self) -> Node:
        kind, text = self.peek() or ("", "")
        self.place += 1
        if kind == "mark" and text == "(":
            inner = self.pipeline()
            self.next("mark")
            after = self.peek()
            if after and after[0] == "path" and self.place in self.glued:  # (index ...).Role
                self.place += 1
                return ("fields", inner, after[1].split(".")[1:])
            return inner
        if kind == "string":
            return ("value", _unquote(text))
        if kind == "number":
            return ("value", int(text))
        if kind == "word":
            return ("value", text == "true") if text in ("true", "false") else ("word", text)
        if kind != "path":
            raise GoError(f"unexpected {text!r} in {{{{{self.text}}}}}")
        name, *fields = text.split(".")
        start: Node = ("variable", name) if name else ("dot",)
        return ("fields", start, [each for each in fields if each]) if any(fields) else start


def _value(node: Node, scope: _Scope) -> Any:
    kind = node[0]
    if kind == "value":
        return node[1]
    if kind == "dot":
        return scope.dot
    if kind == "variable":
        if node[1] == "$":
            return scope.root
        if node[1] not in scope.variables:
            raise GoError(f'undefined variable "{node[1]}"')
        return scope.variables[node[1]]
    if kind == "fields":
        value = _value(node[1], scope)
        for name in node[2]:
            if not isinstance(value, Mapping) or name not in value:
                raise GoError(f"can't evaluate field {name}")
            value = value[name]
        return value
    if kind != "call":
        raise GoError(f"cannot evaluate {node!r}")
    name, terms = node[1], node[2]
    if name in ("and", "or"):
        value = None
        for term in terms:
            value = _value(term, scope)
            if bool(value) == (name == "or"):
                break
        return value
    try:
        return FUNCTIONS[name](*(_value(term, scope) for term in terms))
    except (IndexError, TypeError) as error:
        raise GoError(f"error calling {name}: {error}") from None


def _equal(first: Any, *rest: Any) -> bool:
    """Whether the first is one of the rest."""
    if any(type(first) is not type(each) for each in rest):
        raise TypeError("incompatible types for comparison")
    return first in rest


def _index(value: Any, *places: Any) -> Any:
    for place in places:
        if not 0 <= place < len(value):
            raise IndexError(f"index out of range: {place}")
        value = value[place]
    return value


def _slice(value: Any, start: int = 0, end: int | None = None) -> Any:
    stop = len(value) if end is None else end
    if not 0 <= start <= stop <= len(value):
        raise IndexError(f"index out of range: {stop if stop > len(value) else start}")
    return value[start:stop]


def _print(*values: Any) -> bytes:
    """fmt.Sprint: a space between two operands when neither is a string."""
    done = b""
    for place, value in enumerate(values):
        between = place and not isinstance(value, bytes) and not isinstance(values[place - 1], bytes)
        done += (b" " if between else b"") + _printed(value)
    return done


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "eq": _equal,
    "ne": lambda first, second: not _equal(first, second),
    "ge": lambda first, second: first >= second,
    "not": lambda value: not value,
    "len": len,
    "index": _index,
    "slice": _slice,
    "print": _print,
}


def _printed(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, bool):
        return b"true" if value else b"false"
    if isinstance(value, int):
        return str(value).encode()
    raise GoError(f"cannot print {type(value).__name__}")


def _bytes(value: Any) -> Any:
    """Strings as Go has them."""
    if isinstance(value, str):
        return value.encode("utf-8", "surrogatepass")
    if isinstance(value, Mapping):
        return {key: _bytes(each) for key, each in value.items()}
    return [_bytes(each) for each in value] if isinstance(value, list | tuple) else value


def render(source: str, messages: Sequence[Mapping[str, str]], *, system: str | None = None) -> str:
    """The prompt that Ollama makes of `/api/chat`'s messages with this TEMPLATE and SYSTEM (`system`).

    As its server does: SYSTEM goes first where the first message is none, neighbours of one role are joined with an
    empty line, and all system messages together are `.System`. Source: ollama's server/routes.go, template/template.go.
    """
    given = [dict(message) for message in messages]
    if system and given and given[0]["role"] != "system":
        given.insert(0, {"role": "system", "content": system})
    joined: list[dict[str, str]] = []
    for message in given:
        if joined and joined[-1]["Role"] == message["role"] != "tool":
            joined[-1]["Content"] += "\n\n" + message["content"]
        else:
            joined.append({"Role": message["role"], "Content": message["content"]})
    both = "\n\n".join(message["content"] for message in given if message["role"] == "system")
    return Template(source).execute({"Messages": joined, "System": both, "Response": ""})
