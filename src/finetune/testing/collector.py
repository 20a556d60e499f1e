"""Specs as pytest knows them: a file is a collector, a case an item."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from finetune.core.errors import FinetuneError
from finetune.recipe import Recipe
from finetune.recipe.exports import parse
from finetune.testing.helpers import NEEDS, unavailable
from finetune.testing.plugin import lacking
from finetune.testing.resource_lock import Need, reserved
from finetune.testing.spec import load as specs
from finetune.testing.spec.execute import Outcome, execute, recipe_of
from finetune.testing.spec.judge import Finding, judge
from finetune.testing.spec.load import Case
from finetune.training import estimate

GIB = 2**30
FAKE_NEED = GIB // 8
UNKNOWN_NEED = 2 * GIB  # a model whose size is not known before it is fetched
SCORER_NEED = 1 * GIB  # gpt2 or the embedded model in float32, and its runtime
OVERHEAD_SECONDS = 120  # beyond a command's own time limit: serving, scoring, stopping it
ids_key = pytest.StashKey[dict[str, Path]]()


class SpecFailure(Exception):
    """What a spec asked for and did not get, as a text that names file, line, measured value and bound."""


class EmptyFolder(pytest.Directory):
    """A folder for specs that has none."""

    def collect(self) -> Iterator[pytest.Item]:
        raise self.CollectError(
            f"{self.path} has no spec in it (*.yaml). Write one from a good run with: finetune spec record RUN"
        )


class SpecFile(pytest.File):
    """A YAML file with one spec, or with the cases of one."""

    def collect(self) -> Iterator[SpecItem]:
        known = self.config.stash.setdefault(ids_key, {})
        try:
            cases = specs.load(self._shown())
        except FinetuneError as error:
            raise self.CollectError(str(error)) from None
        for case in cases:
            first = known.setdefault(case.id, self.path)
            if first != self.path:
                raise self.CollectError(f"{case.file}:{case.line('test_id')}: test_id '{case.id}' is also in {first}")
            yield SpecItem.from_parent(self, name=case.id, case=case)

    def _shown(self) -> Path:
        """The file as it is shown: relative to where pytest was called, where it is below."""
        here = self.config.invocation_params.dir
        return self.path.relative_to(here) if here == Path.cwd() and self.path.is_relative_to(here) else self.path


class SpecItem(pytest.Item):
    """One case. Its time limit begins when its command starts: waiting for memory does not count."""

    def __init__(self, *, case: Case, **more: Any) -> None:
        super().__init__(**more)
        self.case = case
        self.notes: list[tuple[str, str]] = []
        self._held = ExitStack()
        served = case.spec.inference.server_timeout if case.spec.inference else 0
        self.add_marker(pytest.mark.timeout(case.spec.timeout + served + OVERHEAD_SECONDS, func_only=True))
        for name in case.spec.markers:
            self.config.addinivalue_line("markers", f"{name}: set by specs")
            self.add_marker(name)

    def setup(self) -> None:
        self._skip_without_hardware()
        try:
            recipe = recipe_of(self.case, root=self.config.rootpath)
        except FinetuneError:
            return  # a recipe with faults takes nothing; running it says what they are
        for name in _runtimes(self.case, recipe):
            if reason := unavailable(name):
                lacking(self.config, name, reason)
        try:
            need = _need(self.case, recipe)
        except FinetuneError:
            return
        waited = self._held.enter_context(reserved(self.nodeid, need))
        if waited > 1:
            self.user_properties.append(("waited_seconds", round(waited, 1)))

    def teardown(self) -> None:
        self._held.close()

    def runtest(self) -> None:
        directory = self.config._tmp_path_factory.mktemp(self.case.spec.test_id)  # type: ignore[attr-defined]
        os.environ.update(_threads())
        outcome = execute(self.case, directory, root=self.config.rootpath)
        findings = judge(self.case, outcome)
        for finding in findings:
            if finding.measured is not None:
                self.user_properties.append((finding.key, finding.measured))
        self.notes = [(each.kind, each.text(self.case)) for each in findings if each.kind in ("warning", "vacuous")]
        failed = [each for each in findings if each.kind == "failed"]
        if failed:
            raise SpecFailure(_message(self.case, failed, outcome))

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        if isinstance(excinfo.value, SpecFailure):
            return str(excinfo.value)
        if isinstance(excinfo.value, FinetuneError):
            return f"{self.case.file}:{self.case.line('config')}: config: {excinfo.value}"
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, int, str]:
        return self.path, self.case.line("test_id") - 1, self.case.id

    def _skip_without_hardware(self) -> None:
        from finetune.core.memory import gpus

        wanted, there = self.case.spec.gpu_requirement, len(gpus()) or int(_is_apple_silicon())
        if wanted <= there or self.config.getoption("--on-cpu") or self.config.getini("finetune_on_cpu"):
            return
        lacking(
            self.config,
            "gpu",
            f"{self.case.file}:{self.case.line('gpu_requirement')}: gpu_requirement {wanted}, here: {there}. "
            "Run it on the CPU with --on-cpu (or finetune_on_cpu = true in pytest's ini file), or write gpu_requirement: 0",
        )


def _need(case: Case, recipe: Recipe) -> Need:
    """Memory by the recipe's estimate, and more where a model is scored."""
    config = estimate.model_config(recipe)
    memory = UNKNOWN_NEED
    if recipe.backend == "fake":
        memory = FAKE_NEED
    elif config is not None and (found := estimate.of_recipe(recipe, config)) is not None:
        memory = found.total
    return Need(memory=memory + (SCORER_NEED if case.spec.inference else 0), gpus=case.spec.gpu_requirement)


def _runtimes(case: Case, recipe: Recipe) -> list[str]:
    """The runtimes that a case needs, by the names that `--require` knows."""
    backends = {recipe.backend}
    backends |= {name for export in case.spec.parity if (name := parse(export).format.backend)}
    if case.spec.inference is not None:
        backends |= {"torch", case.spec.inference.backend}  # torch scores
    return sorted(backends & set(NEEDS))


def _is_apple_silicon() -> bool:
    return sys.platform == "darwin" and platform.machine() == "arm64"


def _threads() -> dict[str, str]:
    """This worker's share of the cores, where several run: busy threads slow each other down five times. For the command,
    the server and the scorer alike."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers == 1 or "OMP_NUM_THREADS" in os.environ:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // workers))}


def _message(case: Case, failed: list[Finding], outcome: Outcome) -> str:
    """Every failed finding with its place, then how to see more."""
    lines = [each.text(case) for each in failed]
    again = shlex.join(part for part in outcome.command)
    return "\n".join([*lines, f"the run: {outcome.run.path}", f"the command: {again}"])
