"""The tables of docs/sabotage.md, from the bench's own modules."""

from __future__ import annotations

import inspect
import re
from types import ModuleType

from sabotage import baseline, files, targets

NAMED = re.compile(r"^([A-Z_]+) = .*?(?:  # (.*))?$", re.MULTILINE)


def baselines() -> list[tuple[str, str]]:
    """What sabotages happen to: `name`, what it does."""
    return [(f"`{name}`", each.what) for name, each in baseline.BASELINES.items()]


def places(module: ModuleType = targets) -> list[tuple[str, str, str]]:
    """Every named place, where it is, and what its comment says."""
    said = dict(NAMED.findall(inspect.getsource(module)))
    return [(f"`{name}`", f"`{getattr(module, name)}`", said[name].replace("|", "\\|")) for name in said]


def helpers(module: ModuleType = files) -> list[tuple[str, str]]:
    """Every public function and class of a module with what it takes, and what its docstring says."""
    own = [(name, each) for name, each in vars(module).items() if getattr(each, "__module__", "") == module.__name__]
    return [
        (f"`{name}{_takes(each)}`", " ".join((each.__doc__ or "").split()))
        for name, each in own
        if not name.startswith("_") and callable(each)
    ]


def _takes(each: object) -> str:
    """The names of its arguments; of a class, those that it is made of."""
    assert callable(each)
    given = inspect.signature(each).parameters.values()
    return f"({', '.join(('**' if one.kind is one.VAR_KEYWORD else '') + one.name for one in given)})"
