"""Spec files as cases: each a spec, with the line of every key, and where its recipe is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from finetune.core.errors import Faults, MissingError
from finetune.core.lookup import did_you_mean
from finetune.recipe import profiles, yaml
from finetune.recipe.faults import Lines, describe, place
from finetune.testing.spec.model import EXAMPLE_PREFIX, Spec


class SpecError(Faults):
    """A spec that cannot be loaded: every fault, with file, line and key."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One test. `id` is the spec's `test_id`, with the case's name in brackets where the spec has cases; `lines` has the
    line (from 1) of every path of keys in `file`."""

    id: str
    spec: Spec
    file: Path
    lines: Lines

    def line(self, key: str = "") -> int:
        """The line of a key like `loss.final_max`, or of the nearest key around it that the file has."""
        path = tuple(key.split(".")) if key else ()
        while path and path not in self.lines:
            path = path[:-1]
        return int(self.lines.get(path, 1))


def load(file: Path) -> list[Case]:
    """The cases of a spec file, in its order. Raises SpecError with every fault."""
    try:
        value, lines = yaml.read(file, "spec")
    except Faults as error:
        raise SpecError(error.headline, error.faults) from None
    if not isinstance(value, dict):
        raise SpecError(f"{file} is not a spec:", [f"{file}:1: expected 'key: value' lines"])
    known: Lines = {**lines}
    cases = value.pop("cases", {})
    if not isinstance(cases, dict) or not all(isinstance(inner, dict) for inner in cases.values()):
        at = place(str(file), ("cases",), known)
        raise SpecError(f"{file} has 1 fault:", [f"{at}: expected names, each with keys to lay over the spec"])
    if ("cases",) in known and not cases:
        raise SpecError(f"{file} has 1 fault:", [f"{place(str(file), ('cases',), known)}: there is no case in it"])
    faults: list[str] = []
    found = [_case(file, value, known, None, {}, faults)] if not cases else []
    for name, changes in cases.items():
        if "test_id" in changes or "cases" in changes:
            at = place(str(file), ("cases", name), known)
            faults.append(f"{at}: a case has neither 'test_id' nor 'cases'; its name tells it apart")
            continue
        found.append(_case(file, value, known, str(name), changes, faults))
    if faults:
        unique = list(dict.fromkeys(faults))
        raise SpecError(f"{file} has {len(unique)} fault{'s' if len(unique) > 1 else ''}:", unique)
    return [case for case in found if case is not None]


def _case(
    file: Path, value: dict[str, Any], lines: Lines, name: str | None, changes: dict[str, Any], faults: list[str]
) -> Case | None:
    """One case, or None after its faults were added to `faults`."""
    own = {path[2:]: line for path, line in lines.items() if path[:2] == ("cases", name)} if name else {}
    known: Lines = {**lines, **own, (): lines.get(("cases", name), 1) if name else 1}
    try:
        spec = Spec.model_validate(profiles.merge(value, changes))
    except ValidationError as error:
        faults += describe(error, str(file), known, Spec)
        return None
    return Case(id=spec.test_id + (f"[{name}]" if name else ""), spec=spec, file=file, lines=known)


def recipe_file(case: Case, roots: Iterable[Path]) -> Path | None:
    """The recipe that a case is about; None for one that comes with finetune (`config: example:NAME`).

    `project_dir` is looked for in `roots` in their order, then beside the spec. Raises MissingError with the spec's
    line and all the places where it is not.
    """
    spec = case.spec
    if spec.config.startswith(EXAMPLE_PREFIX):
        return None
    places = list(dict.fromkeys([*(root.resolve() for root in roots), case.file.resolve().parent]))
    for root in places:
        if (found := root / spec.project_dir / spec.config).is_file():
            return found
    folders = [root / spec.project_dir for root in places if (root / spec.project_dir).is_dir()]
    if folders:
        here = [path.name for folder in folders for path in sorted(folder.glob("*.y*ml"))]
        at, what = case.line("config"), f"config: no '{spec.config}' in {folders[0]}."
        what += did_you_mean(spec.config, here) or f" There: {', '.join(here) or 'no YAML file'}."
    else:
        at, what = case.line("project_dir"), f"project_dir: no '{spec.project_dir}' in {', '.join(map(str, places))}"
    raise MissingError(f"{case.file}:{at}: {what}")


def repository(path: Path) -> Path | None:
    """The nearest folder around `path` that is a git repository, or None."""
    return next((folder for folder in path.resolve().parents if (folder / ".git").exists()), None)
