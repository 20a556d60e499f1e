"""Jinja's sandbox with bounds: a chat template comes with a model, and one line of it can fill the memory or run for years.

What it renders is what jinja2's own sandbox renders (tests compare them), up to the bounds of `budget`. Every loop counts
its rounds, every call, operator and filter what it makes; comparisons, tests and items, which make nothing, take a step each.
See `amplifiers` for those that are refused before they begin.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from jinja2 import nodes
from jinja2.environment import Template
from jinja2.exceptions import TemplateSyntaxError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedEscapeFormatter, SandboxedFormatter
from jinja2.visitor import NodeTransformer
from markupsafe import Markup

from finetune.data import amplifiers, budget
from finetune.data.budget import TooMuch

SOURCE = 131_072  # characters of a template; the largest that a known model has are some 30,000
_N = TypeVar("_N", bound=nodes.Node)
_CONCATENATE, _BUILT, _COUNTED = " concatenate", " built", " counted"  # names of filters that no template can write


class BoundedTemplate(Template):
    """A template, each of whose renderings has a budget of its own."""

    def render(self, *args: Any, **kwargs: Any) -> str:
        token = budget.current.set(budget.Budget())
        try:
            return super().render(*args, **kwargs)
        except RecursionError:
            raise TooMuch("it calls itself without end, or nests too deeply") from None
        except MemoryError:
            raise TooMuch("it asks for more memory than there is") from None
        except OverflowError as error:  # a range that jinja2's sandbox refuses, a float
            raise TooMuch(str(error)) from None
        finally:
            budget.current.reset(token)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """See the module. It takes the place of its parent wherever a model's or a recipe's template is rendered."""

    intercepted_binops = frozenset({"+", "-", "*", "**", "%"})
    template_class = BoundedTemplate

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.filters = _Filters(self.filters)
        self.tests = _Tests(self.tests)  # type: ignore[assignment, arg-type]
        self.finalize = _output
        self.step = _step

    def compile(self, source: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(source, str) and len(source) > SOURCE:
            raise TemplateSyntaxError(f"{len(source):,} characters, and at most {SOURCE:,} are read", 1)
        # What jinja2 computes beforehand stands in the code that it makes, so far less of it is enough.
        token = budget.current.set(budget.Budget(made=budget.LARGEST))
        try:
            return super().compile(source, *args, **kwargs)
        except (RecursionError, MemoryError, SyntaxError) as error:  # also of the Python that jinja2 makes of it
            why = error.msg if isinstance(error, SyntaxError) else "nested too deeply"
            raise TemplateSyntaxError(why, 1) from None
        finally:
            budget.current.reset(token)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        if super().wrap_str_format(value) is None:
            return None
        form = value.__self__
        is_markup = isinstance(form, Markup)

        def formatted(*args: Any, **kwargs: Any) -> str:
            formatter = _EscapeFormatter(self, escape=form.escape) if is_markup else _Formatter(self)
            given = ((), *args) if value.__name__ == "format_map" else (args, kwargs)
            made: str = type(form)(formatter.vformat(form, *given))
            return made

        return functools.update_wrapper(formatted, value)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        found: nodes.Template = _Counted().visit(tree)
        found.set_environment(self)
        return found

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        if __obj is _step:
            return _step(*args)
        _tick()
        args = tuple(amplifiers.call(__obj, args, kwargs))
        return budget.made(super().call(__context, __obj, *args, **kwargs), "a call")

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _tick()
        amplifiers.operator(operator, left, right)
        return budget.made(super().call_binop(context, operator, left, right), f"the operator {operator}")


class _Fields:
    """Part of a formatter, which knows the width of each field (`{:>{w}}`) only when it comes to it."""

    _size = 0

    def format_field(self, value: Any, format_spec: str) -> Any:
        amplifiers.field(format_spec)
        found = super().format_field(value, format_spec)  # type: ignore[misc]
        self._size = budget.check(self._size + len(found), "a format")
        return found


class _Formatter(_Fields, SandboxedFormatter):
    pass


class _EscapeFormatter(_Fields, SandboxedEscapeFormatter):
    pass


def _tick() -> None:
    """A step that may take long by itself, after which the clock is looked at."""
    if found := budget.current.get():
        found.step()
        found.look_at_clock()


def _step(text: int) -> bool:
    """A round of a loop, which writes so many characters of the template's own."""
    if found := budget.current.get():
        found.step()
        found.make(text)
    return True


def _output(value: Any) -> Any:
    """What `{{ }}` writes, paid for."""
    return budget.made(value, "an output")


def _concatenate(values: tuple[Any, ...]) -> str:
    """The operator `~`, as `jinja2.runtime.str_join`."""
    budget.check(sum(budget.weight(value) for value in values), "the operator ~")
    return str(budget.made("".join(map(str, values)), "the operator ~"))


def _built(value: Any) -> Any:
    """A list, tuple or mapping written in the template."""
    return budget.made(value, "a list or mapping")


def _counted(value: Any) -> Any:
    """A part of a comparison, or what was taken out of a value: long texts make either slow."""
    _tick()
    return value


_OURS: dict[str, Callable[..., Any]] = {_CONCATENATE: _concatenate, _BUILT: _built, _COUNTED: _counted}


class _Filters(dict[str, Callable[..., Any]]):
    """Filters by name, each behind its bounds, also those that are put in later."""

    def __getitem__(self, name: str) -> Callable[..., Any]:
        return _OURS.get(name) or _guarded(name, super().__getitem__(name))

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in _OURS or name in self else default


class _Tests(dict[str, Callable[..., Any]]):
    """Tests (`is`, `select`) by name, each a step."""

    def __getitem__(self, name: str) -> Callable[..., Any]:
        return _stepping(super().__getitem__(name))

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default  # noqa: SIM401 (dict's own would pass by)


@functools.lru_cache(maxsize=128)
def _stepping(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)  # with jinja2's marks
    def stepping(*args: Any, **kwargs: Any) -> Any:
        _tick()
        return function(*args, **kwargs)

    return stepping


@functools.lru_cache(maxsize=512)
def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    first = int(hasattr(function, "jinja_pass_arg"))  # the environment or context that jinja2 gives it before the value

    @functools.wraps(function)  # with jinja2's marks
    def guarded(*args: Any, **kwargs: Any) -> Any:
        _tick()
        given = amplifiers.filtered(name, args[first:], kwargs)
        return budget.made(function(*args[:first], *given, **kwargs), f"the filter '{name}'")

    return guarded


class _Counted(NodeTransformer):
    """The syntax tree with what its bounds need: loops count, `~` and lists go through functions of ours."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        text = sum(len(each.data) for part in node.body for each in _texts(part))
        self.generic_visit(node)
        step = nodes.Call(nodes.EnvironmentAttribute("step"), [nodes.Const(text)], [], None, None)
        node.body.insert(0, nodes.ExprStmt(step))
        if node.test is not None:  # what it leaves out is a round too
            node.test = nodes.And(step, node.test)
        return _placed(node, node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _through(_CONCATENATE, _placed(nodes.Tuple(node.nodes, "load"), node))

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        for operand in node.ops:
            operand.expr = _through(_COUNTED, operand.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _through(_COUNTED, node)

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return _bounded(node, node.items)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return _bounded(node, [part for pair in node.items for part in (pair.key, pair.value)])

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return node if node.ctx != "load" else _bounded(node, node.items)


def _texts(node: nodes.Node) -> list[nodes.TemplateData]:
    own = [node] if isinstance(node, nodes.TemplateData) else []
    return own + list(node.find_all(nodes.TemplateData))


def _bounded(node: nodes.Expr, parts: list[nodes.Expr]) -> nodes.Node:
    """Constants are as large as the template writes them."""
    if all(isinstance(part, nodes.Const) for part in parts):
        return node
    return _through(_BUILT, node)


def _through(name: str, node: nodes.Expr) -> nodes.Expr:
    """What the filter `name` makes of a value."""
    return _placed(nodes.Filter(node, name, [], [], None, None), node)


def _placed(node: _N, at: nodes.Node) -> _N:
    node.set_lineno(at.lineno)
    return node
