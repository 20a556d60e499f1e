"""Sabotage: things that silently go wrong in fine-tuning, done on purpose to the real pipeline, to see which check says so.

A sabotage is one function. It gets a `Context` and breaks one thing in it, as an ordinary mistake or a change upstream would:

    @sabotage("learning rate 0", imitates="https://github.com/.../issues/1")
    def learning_rate_0(context: Context) -> None:
        context.set("train.learning_rate", 0)

`context.set` changes the recipe, `context.wrap` hands calls of a function of any package on to one of its own, in every
process of the run, `context.after` changes what a stage left on disk, as if the stage itself had written it so. It happens
to the honest run of a baseline (`baseline.BASELINES`), in a copy: all stages from `since` on run again with the patches, and
those that a change concerns. Put it into a module that MODULES names. The pipeline runs by the real command line, and neither
it nor any check knows of this package.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sabotage.context import Context

MODULES = (
    "rows",
    "training",
    "optimizing",
    "alignment",
    "saving",
    "merging",
    "exporting",
    "evaluation",
    "serving",
    "invariances",
)


@dataclass(frozen=True, kw_only=True)
class Sabotage:
    """One row. `imitates` is a public issue or paper, `baseline` the recipe that it happens to (see `baseline`), `since` the
    first stage that its patches act in, `keep` says that what this and later stages left in the honest run stays, `fast`
    marks those that run on every change; `reference` is where the function is (`module:name`)."""

    name: str
    area: str
    imitates: str
    baseline: str
    since: str
    keep: bool
    fast: bool
    reference: str
    what: str
    apply: Callable[[Context], None]


_TABLE: dict[str, Sabotage] = {}


def sabotage(
    name: str,
    *,
    imitates: str = "",
    baseline: str = "lora",
    since: str = "fetch",
    keep: bool = False,
    fast: bool = False,
) -> Callable[[Callable[[Context], None]], Callable[[Context], None]]:
    """Put a function into the table; the first sentence of its docstring says what it does."""
    from finetune.run.plan import BY_NAME

    if since not in BY_NAME:
        raise ValueError(f"no stage '{since}', which '{name}' is to begin with; the stages: {', '.join(BY_NAME)}")

    def register(function: Callable[[Context], None]) -> Callable[[Context], None]:
        area = function.__module__.rpartition(".")[2]
        if name in _TABLE:
            raise ValueError(f"there are two sabotages called '{name}'")
        _TABLE[name] = Sabotage(
            name=name, area=area, imitates=imitates, baseline=baseline, since=since, keep=keep, fast=fast, apply=function,
            reference=f"{function.__module__}:{function.__name__}", what=(function.__doc__ or "").strip(),
        )  # fmt: skip
        return function

    return register


def table() -> dict[str, Sabotage]:
    """Every sabotage by its name, area by area."""
    for module in MODULES:
        importlib.import_module(f"{__name__}.{module}")
    return dict(_TABLE)
