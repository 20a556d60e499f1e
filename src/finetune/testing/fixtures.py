"""Fixtures for tests that users write. The plugin loads them; nothing heavy is imported before one is used.

    tiny_model      a function: the directory of a tiny random model
    tiny_run        a finished run in which nothing is refuted
    trained_run     a function: the run of a recipe, trained once for equal input
    memory_tracker, check_convergence     as in finetune.testing

What is expensive is made once a session; workers of pytest-xdist share it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from finetune.testing import helpers

if TYPE_CHECKING:
    from finetune.recipe import Recipe
    from finetune.run import Run

TEXTS = "shipped:quorra/train.jsonl"
FAILURE = "failure.txt"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", f"{helpers.MARKER}(name): skip where that backend or device is not there")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    from finetune.testing.plugin import lacking

    for mark in item.iter_markers(helpers.MARKER):
        if reason := helpers.unavailable(mark.args[0]):
            lacking(item.config, mark.args[0], reason)


@pytest.fixture(scope="session")
def finetune_shared(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Path:
    """A temporary folder that is the same for all workers of pytest-xdist."""
    base: Path = tmp_path_factory.getbasetemp()
    shared = (base.parent if hasattr(pytestconfig, "workerinput") else base) / "finetune"
    shared.mkdir(exist_ok=True)
    return shared


@pytest.fixture(scope="session")
def tiny_model(finetune_shared: Path, pytestconfig: pytest.Config) -> Callable[..., Path]:
    """A function: the directory of a tiny random model, made once.

    `tiny_model("llama", hidden_size=128)`: see finetune.models.tiny.make. Tests read it and leave it as it is.
    """

    def make(architecture: str = "llama", *, texts: Sequence[str] = (), **changes: Any) -> Path:
        from finetune.data.sources import resolve
        from finetune.models import tiny
        from finetune.testing.plugin import lacking

        if reason := helpers.unavailable("torch"):
            lacking(pytestconfig, "torch", reason)
        words = list(texts) or resolve(TEXTS).read_text("utf-8").splitlines()
        place = finetune_shared / f"{architecture}-{_mark([architecture, words, changes])}"
        with _once(place) as first:
            if first:
                tiny.make(place, architecture, texts=words, **changes)
        return place

    return make


@pytest.fixture(scope="session")
def trained_run(finetune_shared: Path) -> Callable[..., Run]:
    """A function: the verified run of a recipe, trained once for equal input, in a temporary folder.

    `trained_run("recipe.yaml", train={"max_steps": 20})`: a file or a mapping, with sections laid over it. Raises
    StageError, with the stage and its message, where the run fails; a check that is refuted is for the test to judge. Tests
    read the run and leave it as it is.
    """

    def train(recipe: str | Path | Mapping[str, Any], **overrides: Any) -> Run:
        from finetune.core.errors import StageError
        from finetune.run import Run

        wanted = _recipe(recipe, overrides)
        place = finetune_shared / "runs" / f"{wanted.name}-{_mark(_input(wanted))}"
        run, failure = Run(place), place / FAILURE
        with _once(place) as first:
            if first:
                _run(wanted, run)
        if failure.is_file():
            raise StageError(failure.read_text(encoding="utf-8"))
        return run

    return train


@pytest.fixture(scope="session")
def tiny_run(trained_run: Callable[..., Run], finetune_shared: Path, request: pytest.FixtureRequest) -> Run:
    """A finished run in which nothing is refuted: a tiny Llama on PyTorch where that is installed, else the fake backend.

    `run.manifest()` and recipe.yaml in it say which. Tests read it and leave it as it is.
    """
    from finetune.core.errors import StageError
    from finetune.report.summary import verdicts
    from finetune.run import outcome

    common = {"name": "tiny", "data": {"path": TEXTS, "limit": 12}}
    train = {"method": "full", "max_steps": 24, "per_device_train_batch_size": 4, "save_strategy": "no"}
    if helpers.unavailable("torch") is None:
        make: Callable[..., Path] = request.getfixturevalue("tiny_model")
        model, train = {"path": str(make()), "device": "cpu"}, {**train, "learning_rate": 1e-2}
        run = trained_run({**common, "backend": "torch", "model": model, "train": train})
    else:
        place = finetune_shared / "fake"
        with _once(place) as first:
            if first:
                from finetune.backends.fake.model import make_model

                make_model(place)
        run = trained_run({**common, "backend": "fake", "model": str(place), "train": {**train, "learning_rate": 1e-4}})
    stored = verdicts(run)
    if stored is None or not stored["passed"]:
        listed = stored["verdicts"] if stored else []
        refuted = "; ".join(f"{each['name']}: {each['why']}" for each in outcome.of(listed, outcome.REFUTED))
        raise StageError(f"the tiny run in {run.path} is not proved ({outcome.count(listed)}): {refuted}")
    return run


@pytest.fixture(name="memory_tracker")
def _memory_tracker() -> Callable[[], AbstractContextManager[helpers.MemoryStats]]:
    """`with memory_tracker() as stats:` measures the block; `stats.total_used_mb` is what it took."""
    return helpers.memory_tracker


@pytest.fixture(name="check_convergence")
def _check_convergence() -> Callable[..., bool]:
    """`check_convergence(losses)`, or of a run: AssertionError, with the numbers, where a training did not learn."""
    return helpers.check_convergence


@contextmanager
def _once(place: Path) -> Iterator[bool]:
    """Whether `place`, an empty folder now, is to be filled in the block; False where a test or another worker did."""
    import shutil

    from filelock import FileLock

    done = place.with_name(f".{place.name}.done")
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(place.with_name(f".{place.name}.lock")):
        if done.exists():
            yield False
            return
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        yield True
        done.touch()


def _mark(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _recipe(recipe: str | Path | Mapping[str, Any], overrides: Mapping[str, Any]) -> Recipe:
    """The recipe with `overrides` laid over it, publishing nothing outside of its run."""
    from finetune.recipe import profiles
    from finetune.recipe.load import load_mapping, read_mapping

    if isinstance(recipe, Mapping):
        loaded = load_mapping(profiles.merge(dict(recipe), dict(overrides)))
    else:
        mapping, lines = read_mapping(recipe)
        merged = profiles.merge(mapping, dict(overrides))
        loaded = load_mapping(merged, source=str(recipe), lines=lines, base=Path(recipe).resolve().parent)
    sections = {name: getattr(loaded, name) for name in ("train", "align")}
    private = {name: each.model_copy(update={"output_dir": None}) for name, each in sections.items() if each}
    return loaded.model_copy(update=private)


def _input(recipe: Recipe) -> list[Any]:
    """All that a run's outcome depends on: the recipe but for its place, and the content of its data files."""
    from finetune.core.files import digest
    from finetune.data.sources import local_files

    files = {path: digest(path) for stage in ("prepare", "evaluate") for path in local_files(recipe, stage)}
    values = recipe.model_dump(mode="json", exclude={"output_dir": True, "model": {"token"}})
    return [values, {str(path): mark for path, mark in files.items()}]


def _run(recipe: Recipe, run: Run) -> None:
    """Run and verify a recipe. What fails is written into the run, so that no other test tries the same again."""
    from finetune.checks import verify
    from finetune.core.errors import FinetuneError
    from finetune.core.files import write_text
    from finetune.stages.pipeline import run_stages

    try:
        run_stages(recipe, run)
        verify(recipe, run)
    except FinetuneError as error:
        stages = [event["stage"] for event in run.events("stage_failed")]
        where = f"stage '{stages[-1]}'" if stages else "the run"
        write_text(run.path / FAILURE, f"{where} of recipe '{recipe.name}' failed: {error}")
        run.written.add(FAILURE)
