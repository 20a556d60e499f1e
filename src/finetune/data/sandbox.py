"""Jinja's sandbox with bounds: a chat template comes with a model, and one line of it can fill the memory or run for years.

What it renders is what jinja2's own sandbox renders (tests compare them), up to the bounds of `budget`. Every loop counts
its rounds, every call, operator and filter what it makes; see `amplifiers` for those that are refused before they begin.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from jinja2 import nodes
from jinja2.environment import Template
from jinja2.exceptions import TemplateSyntaxError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from finetune.data import amplifiers, budget
from finetune.data.budget import TooMuch

SOURCE = 131_072  # characters of a template; the largest that a known model has are some 30,000
_CONCATENATE, _BUILT = " concatenate", " built"  # names of filters that no template can write


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

    intercepted_binops = frozenset({"+", "*", "**", "%"})
    template_class = BoundedTemplate

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.filters = _Filters(self.filters)
        self.finalize = _output
        self.step = _step

    def compile(self, source: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(source, str) and len(source) > SOURCE:
            raise TemplateSyntaxError(f"{len(source):,} characters, and at most {SOURCE:,} are read", 1)
        try:
            return super().compile(source, *args, **kwargs)
        except (RecursionError, MemoryError, SyntaxError) as error:  # also of the Python that jinja2 makes of it
            why = error.msg if isinstance(error, SyntaxError) else "nested too deeply"
            raise TemplateSyntaxError(why, 1) from None

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


class _Filters(dict[str, Callable[..., Any]]):
    """Filters by name, each behind its bounds, also those that are put in later."""

    def __getitem__(self, name: str) -> Callable[..., Any]:
        if name == _CONCATENATE:
            return _concatenate
        return _built if name == _BUILT else _guarded(name, super().__getitem__(name))

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in (_CONCATENATE, _BUILT) or name in self else default


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
        values = nodes.Tuple(node.nodes, "load")
        return _placed(nodes.Filter(values, _CONCATENATE, [], [], None, None), node)

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
    return _placed(nodes.Filter(node, _BUILT, [], [], None, None), node)


def _placed(node: nodes.Node, at: nodes.Node) -> nodes.Node:
    node.set_lineno(at.lineno)
    return node
