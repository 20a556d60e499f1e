"""Patches for modules that are not imported yet, in processes that know nothing of them.

`install` is called when Python starts, in the run's own process and in every one that the run starts: see `starting`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from finetune.run.plan import STAGES
from sabotage.calls import Counter
from sabotage.context import Context, Patch

RUN_STAGE = "finetune.stages.runner:run_stage"
STAGE = "FT_SABOTAGE_STAGE"  # the stage that began last; what a stage starts, a process too, has it in its environment
ORDER = [stage.name for stage in STAGES]
MISSING = object()


def install(reference: str, since: str = "", calls: str = "") -> None:
    """Patch what is imported, and arrange for the rest to be patched as soon as it is. The patches act from the beginning
    of the stage `since` on, and count their calls in the folder `calls`."""
    module, _, name = reference.partition(":")
    reach = Reach(since)
    if reach.since:  # before the sabotage's own module, which may import what is patched here
        _arrange([Patch(RUN_STAGE, reach.begin)], Reach())
    context = Context()
    getattr(importlib.import_module(module), name)(context)
    if calls:
        reach.count(Counter(Path(calls), len(context.patches)).add)
    _arrange(context.patches, reach)


class Reach:
    """When patches act: always, or from the beginning of the stage `since` on, that is, in it, in later ones, and in what
    comes after all of them. Before that stage it is as if they were not there."""

    def __init__(self, since: str = "") -> None:
        self.since = ORDER.index(since) if since else 0
        self.called: Callable[[int], None] = lambda number: None
        self._values: list[Callable[[], None]] = []

    @property
    def acts(self) -> bool:
        return not self.since or ORDER.index(os.environ.get(STAGE, ORDER[0])) >= self.since

    def count(self, called: Callable[[int], None]) -> None:
        """Have `called(number)` told each call of the patch of that number."""
        self.called = called

    def begin(self, original: Any, stage: Any, *arguments: Any, **named: Any) -> Any:
        """Carry out a stage, which is then the one that began last. Values change places first."""
        os.environ[STAGE] = stage.name
        for settle in self._values:
            settle()
        return original(stage, *arguments, **named)

    def value(self, settle: Callable[[], None]) -> None:
        """Call `settle()` now, and whenever it may have changed whether patches act."""
        self._values.append(settle)
        settle()


def _arrange(patches: Sequence[Patch], reach: Reach) -> None:
    wanted: dict[str, list[tuple[int, Patch]]] = {}
    for number, each in enumerate(patches):
        wanted.setdefault(each.target.partition(":")[0], []).append((number, each))
    for target in [target for target in wanted if target in sys.modules]:
        patch(sys.modules[target], wanted.pop(target), reach)
    if wanted:
        sys.meta_path.insert(0, Finder(wanted, reach))


def patch(module: ModuleType, patches: Iterable[tuple[int, Patch]], reach: Reach) -> None:
    """Put what each patch asks for in the place of what it names. Raises AttributeError where that is not there, TypeError
    where calls are to be handed on and it takes none."""
    for number, each in patches:
        *above, last = each.target.partition(":")[2].split(".")
        place: Any = module
        for part in above:
            place = getattr(place, part)
        # A class is asked for what it holds, not for what that gives: its static methods stay static.
        held = inspect.getattr_static(place, last) if isinstance(place, type) else getattr(place, last)
        if each.makes:
            reach.value(_exchange(each, number, place, last, reach))
        else:
            setattr(place, last, handed_on(each, number, held, reach))


def handed_on(patch: Patch, number: int, original: Any, reach: Reach) -> Any:
    """A function in the place of `original` that calls the patch, which is handed `original` first."""
    if isinstance(original, staticmethod | classmethod):
        return type(original)(handed_on(patch, number, original.__func__, reach))
    if not callable(original):
        raise TypeError(f"{patch.target} is no function; `put` takes the place of what is none")
    attributes = functools.WRAPPER_UPDATES if isinstance(original, FunctionType) else ()

    @functools.wraps(original, updated=attributes)
    def call(*arguments: Any, **named: Any) -> Any:
        if not reach.acts:
            return original(*arguments, **named)
        reach.called(number)
        return patch.function(original, *arguments, **named)

    return call


def _exchange(patch: Patch, number: int, place: Any, name: str, reach: Reach) -> Callable[[], None]:
    """A function that puts the value that is made where it belongs while patches act, and the original back otherwise."""
    original, own = getattr(place, name), vars(place).get(name, MISSING)
    made: list[Any] = []

    def settle() -> None:
        if reach.acts and not made:
            made.append(patch.function(original))
            reach.called(number)
            setattr(place, name, made[0])
        elif not reach.acts and made:
            made.clear()
            if own is MISSING:
                delattr(place, name)
            else:
                setattr(place, name, own)

    return settle


class Finder(MetaPathFinder):
    """Finds the modules to be patched as everybody does, and patches them when they have been executed."""

    def __init__(self, wanted: dict[str, list[tuple[int, Patch]]], reach: Reach) -> None:
        self.wanted, self.reach = wanted, reach
        self.asked: set[str] = set()

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname not in self.wanted or fullname in self.asked:
            return None
        self.asked.add(fullname)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.asked.discard(fullname)  # who only asks whether a module is there must not use up its patches
        if spec is None or spec.loader is None:
            return None
        spec.loader = Patching(spec.loader, self.wanted[fullname], self.reach)
        return spec


class Patching(Loader):
    """A loader that patches what another one has loaded."""

    def __init__(self, loader: Loader, patches: list[tuple[int, Patch]], reach: Reach) -> None:
        self.loader, self.patches, self.reach = loader, patches, reach

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        patch(module, self.patches, self.reach)

    def __getattr__(self, name: str) -> Any:  # what else a loader offers: get_source, get_filename, ...
        return getattr(self.loader, name)
