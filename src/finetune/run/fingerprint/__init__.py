"""The code that a result was made with: the source that its stage can reach, and the libraries that compute in it.

`finetune.stages.evaluate:run` reaches whatever it imports, in functions too, and the modules that it names as texts to be
loaded later. What it chooses from a table (a backend, an export, a check) its caller names beside it.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from finetune import __version__
from finetune.run.fingerprint.libraries import distribution, version, versions
from finetune.run.fingerprint.scans import short
from finetune.run.fingerprint.tree import Tree

ROOT = Path(__file__).parents[2]
UNKNOWN = "made before code was recorded"


@dataclass(frozen=True, kw_only=True)
class Code:
    """What a computation was made with. `modules` maps files (`finetune/stages/evaluate.py`) to digests, the nearest
    first; `libraries` distributions to versions; `python` is its minor version."""

    modules: Mapping[str, str]
    libraries: Mapping[str, str]
    python: str


def code_of(*references: str, root: Path = ROOT) -> Code:
    """What the `"module:attr"` references can reach, as it was when this process first asked.

    Where the package in `root` is no source (it is in a zip, or compiled only), its version stands for it. Of a module of
    another package count its file and its distribution's version. Raises ValueError for a reference to no module.
    """
    ours = [name for name in references if name.partition(":")[0].partition(".")[0] == root.name]
    if (root / "__init__.py").is_file():
        modules, imports = _tree(root).reach(ours)
    else:
        modules, imports = {root.name: __version__}, []
    libraries = versions(imports)
    for name in references:
        if name not in ours:
            path, file = _other(name)
            modules[path] = short(file.read_bytes())
            package = distribution(name.partition(":")[0].partition(".")[0])
            libraries |= {package: found} if (found := version(package)) is not None else {}
    return Code(modules=modules, libraries=libraries, python=f"{sys.version_info.major}.{sys.version_info.minor}")


def digest(code: Code) -> str:
    """SHA-256 of it, as hexadecimal digits."""
    return hashlib.sha256(json.dumps(asdict(code), sort_keys=True).encode()).hexdigest()


def changes(before: Mapping[str, Any] | None, now: Code) -> list[str]:
    """What is different from the code that a result was made with (`asdict` of it, or None), a phrase each: Python, the
    libraries, the files, the nearest first. Empty where `digest` is the same.

    Another Python may read the same source into another tree, so that after one the files are not compared.
    """
    if before is None:
        return [UNKNOWN]
    then = Code(**before)
    found = [
        f"{name} {old} -> {new}" if old and new else f"{name} {new or old} is {'new' if new else 'gone'}"
        for name, old, new in _different(then.libraries, now.libraries)
    ]
    if then.python != now.python:
        return [f"Python {then.python} -> {now.python}", *found]
    for path, old, new in _different(then.modules, now.modules):
        found.append(f"{path} {'changed' if old and new else 'is new' if new else 'is gone'}")
    return found


def _different(before: Mapping[str, str], now: Mapping[str, str]) -> Iterator[tuple[str, str | None, str | None]]:
    """(key, its value before, its value now) where these differ; None where it is not there."""
    for key in {**now, **before}:
        if before.get(key) != now.get(key):
            yield key, before.get(key), now.get(key)


@cache
def _tree(root: Path) -> Tree:
    # Once a process: what it has imported does not change with the files.
    return Tree(root)


def _other(reference: str) -> tuple[str, Path]:
    """(path below the folder that holds its package, file) of a module of another package. Imports nothing."""
    top, *below = reference.partition(":")[0].split(".")
    spec = find_spec(top)
    folders = (spec.submodule_search_locations or ()) if spec else ()
    places = [Path(folder).joinpath(*below) for folder in folders]
    files = [file for place in places for file in (place / "__init__.py", place.with_name(f"{place.name}.py"))]
    if spec and spec.origin and not below:
        files = [Path(spec.origin)]
    for file in files:
        if file.is_file():
            return "/".join([top, *below]) + ".py", file
    raise ValueError(f"there is no module for '{reference}': expected 'module:attr'")
