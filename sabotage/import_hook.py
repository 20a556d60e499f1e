"""Patches for modules that are not imported yet, in processes that know nothing of them.

`install` is called when Python starts, in the run's own process and in every one that the run starts: see `starting`.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from sabotage.context import Scene, Wrapper


def install(reference: str) -> None:
    """Patch what is imported, and arrange for the rest to be patched as soon as it is."""
    module, _, name = reference.partition(":")
    scene = Scene()
    getattr(importlib.import_module(module), name)(scene)
    wanted: dict[str, list[tuple[str, Wrapper]]] = {}
    for target, attribute, wrapper in scene.patches:
        wanted.setdefault(target, []).append((attribute, wrapper))
    for target in [target for target in wanted if target in sys.modules]:
        patch(sys.modules[target], wanted.pop(target))
    if wanted:
        sys.meta_path.insert(0, Finder(wanted))


def patch(module: ModuleType, patches: Sequence[tuple[str, Wrapper]]) -> None:
    """Put `wrapper(original)` in place of every attribute named. Raises AttributeError for one that is not there."""
    for attribute, wrapper in patches:
        *above, last = attribute.split(".")
        place: Any = module
        for part in above:
            place = getattr(place, part)
        setattr(place, last, wrapper(getattr(place, last)))


class Finder(MetaPathFinder):
    """Finds the modules to be patched as everybody does, and patches them when they have been executed."""

    def __init__(self, wanted: dict[str, list[tuple[str, Wrapper]]]) -> None:
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

    def __init__(self, loader: Loader, patches: list[tuple[str, Wrapper]]) -> None:
        self.loader, self.patches = loader, patches

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        patch(module, self.patches)

    def __getattr__(self, name: str) -> Any:  # what else a loader offers: get_source, get_filename, ...
        return getattr(self.loader, name)
