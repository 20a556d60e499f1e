"""A package's files, and which of its modules a reference can reach."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path

from finetune.run.fingerprint.scans import Scan, Scans, short

# Modules with a table of `"module:attr"` rows of which a caller chooses: it names those that it chose. Every other table
# reaches all that it names. Paths here are relative to the package.
DOORS = ("backends/__init__.py", "checks/__init__.py", "recipe/exports.py", "serving/__init__.py")
# What is reached and yet changes no result, and why; nothing is reached through it either.
LEFT_OUT = {
    "__init__.py": "the version and the public names",
    "core/console.py": "shows what goes on",
    "recipe/load.py": "reads recipes, whose values every fingerprint holds",
    "run/plan.py": "names the stages; what each reads is in its fingerprint",
}
# Folders of files that are no Python, under the module that reads them.
DATA = {"data/templates.py": "data/templates_jinja", "models/licenses.py": "models/license_texts"}


class Tree:
    """The files of the package in the directory `root`, as they were when it was made.

    Importing a module runs it and the packages above it, and only what was asked for by name can be called. So of a
    package above count its file and what importing it imports, of a module that is named all that it can import.
    """

    def __init__(self, root: Path) -> None:
        self.name = root.name
        self.files = dict(_files(root))
        self.modules = {_module(root.name, path): path for path in self.files if path.endswith(".py")}
        self.scans = Scans(root)

    def reach(self, references: Iterable[str]) -> tuple[dict[str, str], list[str]]:
        """(digests of the files, the nearest first; the names of the libraries imported) that references can reach.

        Raises ValueError for a reference to no module.
        """
        digests: dict[str, str] = {}
        libraries: list[str] = []
        waiting: deque[tuple[str, bool]] = deque()
        for name in references:
            if not (steps := self._steps(name)):
                raise ValueError(f"there is no module for '{name}' in {self.name}: expected 'module:attr'")
            waiting.extend(steps)
        done: set[tuple[str, bool]] = set()
        while waiting:
            module, named = step = waiting.popleft()
            path = self.modules[module]
            if path in LEFT_OUT or done & {step, (module, True)}:
                continue
            done.add(step)
            found = self._scan(module, path)
            digests[f"{self.name}/{path}"] = found.digest
            for data in self._data(path):
                digests[f"{self.name}/{data}"] = self.scans.get(data, self.files[data], _bytes).digest
            for name in (*found.runs, *found.calls) if named else found.runs:
                if name.partition(":")[0].partition(".")[0] == self.name:
                    waiting.extend(self._steps(name))
                else:
                    libraries.append(name)
        self.scans.store()
        return digests, libraries

    def _steps(self, reference: str) -> list[tuple[str, bool]]:
        """(module, whether it is named) of what a reference imports; nothing where it is no module of this package."""
        module, _, attribute = reference.partition(":")
        if module.endswith(".*"):
            named = [name for name in self.modules if name.startswith(module.removesuffix("*"))]
        else:
            named = [name for name in (f"{module}.{attribute}", module) if name in self.modules][:1]
        steps = [(name, True) for name in named]
        for name in named:
            while name := name.rpartition(".")[0]:
                steps.append((name, False))
        return steps

    def _scan(self, module: str, path: str) -> Scan:
        def read(file: Path) -> Scan:
            from finetune.run.fingerprint.scan import (
                scan,  # the syntax tree, which a process seldom needs, costs its start-up
            )

            is_package = path.rpartition("/")[2] == "__init__.py"
            return scan(file.read_bytes(), module, is_package=is_package, is_door=path in DOORS)

        return self.scans.get(path, self.files[path], read)

    def _data(self, path: str) -> list[str]:
        folder = DATA.get(path)
        return [name for name in self.files if name.startswith(f"{folder}/")] if folder else []


def _bytes(file: Path) -> Scan:
    return Scan(short(file.read_bytes()))


def _files(folder: Path, below: str = "") -> Iterator[tuple[str, os.stat_result]]:
    """(path below the folder, with slashes, and status) of every file, sorted; without caches and hidden files."""
    with os.scandir(folder) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    for entry in entries:
        if entry.name.startswith(".") or entry.name == "__pycache__":
            continue
        if entry.is_dir():
            yield from _files(Path(entry.path), f"{below}{entry.name}/")
        else:
            yield f"{below}{entry.name}", entry.stat()


def _module(package: str, path: str) -> str:
    """The dotted name of a file: `finetune.stages` of stages/__init__.py."""
    parts = [package, *path.removesuffix(".py").split("/")]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
