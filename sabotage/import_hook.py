"""Patches for modules that are not imported yet, in processes that know nothing of them.

`install` is called when Python starts, in the run's own process and in every one that the run starts: see `starting`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import FunctionType, ModuleType
from typing import Any

from sabotage.context import Patch, Scene


def install(reference: str) -> None:
    """Patch what is imported, and arrange for the rest to be patched as soon as it is."""
    module, _, name = reference.partition(":")
    scene = Scene()
    getattr(importlib.import_module(module), name)(scene)
    wanted: dict[str, list[Patch]] = {}
    for each in scene.patches:
        wanted.setdefault(each.target.partition(":")[0], []).append(each)
    for target in [target for target in wanted if target in sys.modules]:
        patch(sys.modules[target], wanted.pop(target))
    if wanted:
        sys.meta_path.insert(0, Finder(wanted))


def patch(module: ModuleType, patches: Sequence[Patch]) -> None:
    """Put what each patch asks for in the place of what it names. Raises AttributeError where that is not there, TypeError
    where calls are to be handed on and it takes none."""
    for each in patches:
        *above, last = each.target.partition(":")[2].split(".")
        place: Any = module
        for part in above:
            place = getattr(place, part)
        # A class is asked for what it holds, not for what that gives: its static methods stay static.
        held = inspect.getattr_static(place, last) if isinstance(place, type) else getattr(place, last)
        setattr(place, last, each.function(getattr(place, last)) if each.makes else handed_on(each, held))


def handed_on(patch: Patch, original: Any) -> Any:
    """A function in the place of `original` that calls the patch, which is handed `original` first."""
    if isinstance(original, staticmethod | classmethod):
        return type(original)(handed_on(patch, original.__func__))
    if not callable(original):
        raise TypeError(f"{patch.target} is no function; `put` takes the place of what is none")
    attributes = functools.WRAPPER_UPDATES if isinstance(original, FunctionType) else ()

    @functools.wraps(original, updated=attributes)
    def call(*arguments: Any, **named: Any) -> Any:
        return patch.function(original, *arguments, **named)

    return call


class Finder(MetaPathFinder):
    """Finds the modules to be patched as everybody does, and patches them when they have been executed."""

    def __init__(self, wanted: dict[str, list[Patch]]) -> None:
        self.wanted = wanted
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
        spec.loader = Patching(spec.loader, self.wanted[fullname])
        return spec


class Patching(Loader):
    """A loader that patches what another one has loaded."""

    def __init__(self, loader: Loader, patches: list[Patch]) -> None:
        self.loader, self.patches = loader, patches

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        patch(module, self.patches)

    def __getattr__(self, name: str) -> Any:  # what else a loader offers: get_source, get_filename, ...
        return getattr(self.loader, name)
