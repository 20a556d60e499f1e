"""One source file over its syntax tree: a digest of what it does, and the names that it can import."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator

from finetune.run.fingerprint.scans import Scan, short


def scan(source: bytes, module: str, *, is_package: bool, is_door: bool) -> Scan:
    """Read one module. Comments, blank lines, docstrings and what stands under TYPE_CHECKING change nothing.

    A text that names a module of the same package, with or without `:attr`, is a call: `lookup.load` and `python -m` take
    such. In a door, those outside functions are not: whoever uses its table says what was chosen from it.
    """
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # it cannot be imported either, and importing it says why
        return Scan(short(source))
    reader = _Reader(module, is_package=is_package, is_door=is_door)
    reader.read(tree, within=False)
    # After `read`, which takes the docstrings and the types' imports out.
    text = ast.dump(tree).encode("utf-8", "surrogatepass")
    runs, calls = (tuple(dict.fromkeys(names)) for names in (reader.runs, reader.calls))
    return Scan(short(text), runs, calls)


class _Reader:
    """One walk over a tree, in the order of the source."""

    def __init__(self, module: str, *, is_package: bool, is_door: bool) -> None:
        self.package = module.partition(".")[0]
        self.folder = module.split(".")[: None if is_package else -1]
        self.is_door = is_door
        self.reference = re.compile(rf"{re.escape(self.package)}(\.\w+)+(:\w+)?")
        self.beginning = re.compile(rf"({re.escape(self.package)}(?:\.\w+)+)([.:])")
        self.runs: list[str] = []
        self.calls: list[str] = []

    def read(self, node: ast.AST, *, within: bool) -> None:
        """Take in what a node names, `within` a function or not, and drop what changes nothing from it."""
        if isinstance(node, ast.Import | ast.ImportFrom):
            (self.calls if within else self.runs).extend(self._imported(node))
            return
        if isinstance(node, ast.Constant):
            if isinstance(node.value, str) and (within or not self.is_door) and self.reference.fullmatch(node.value):
                self.calls.append(node.value)
            return
        if isinstance(node, ast.JoinedStr):
            self._formatted(node)
        within = within or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for name in node._fields:
            value = getattr(node, name, None)
            if isinstance(value, list):
                if value and isinstance(value[0], ast.stmt):
                    value[:] = [each for each in value if not _is_text(each) and not _is_for_types(each)]
                for each in value:
                    if isinstance(each, ast.AST):
                        self.read(each, within=within)
            elif isinstance(value, ast.AST):
                self.read(value, within=within)

    def _imported(self, node: ast.Import | ast.ImportFrom) -> Iterator[str]:
        if isinstance(node, ast.Import):
            names = [above for alias in node.names for above in _and_above(alias.name)]
        elif node.level or node.module:
            above = self.folder[: len(self.folder) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            names = [source if alias.name == "*" else f"{source}:{alias.name}" for alias in node.names]
        for name in names:
            top = name.partition(":")[0].partition(".")[0]
            if top == self.package:
                yield name
            elif top not in sys.stdlib_module_names:
                yield top

    def _formatted(self, node: ast.JoinedStr) -> None:
        """`f"finetune.backends.torch.merging:{name}"` is that module, `f"finetune.backends.mlx.{name}"` all of them."""
        first = node.values[0] if node.values else None
        if isinstance(first, ast.Constant) and (found := self.beginning.match(str(first.value))):
            self.calls.append(found[1] if found[2] == ":" else f"{found[1]}.*")


def _and_above(name: str) -> Iterator[str]:
    """`import a.b` lets a module use everything in `a`, too."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def _is_text(statement: ast.stmt) -> bool:
    """Whether a statement is a text and nothing else: a docstring."""
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def _is_for_types(statement: ast.stmt) -> bool:
    """Whether a statement is `if TYPE_CHECKING:` (or `typing.TYPE_CHECKING`); it is emptied, for it may have an `else`."""
    if not isinstance(statement, ast.If):
        return False
    if getattr(statement.test, "id", getattr(statement.test, "attr", None)) != "TYPE_CHECKING":
        return False
    statement.body.clear()
    return not statement.orelse
