"""What workflow and checks share: the town's files, and one whole run of it a worker, which tests copy to break it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune.core import console
from finetune.run import Run
from support.town import Ran, build, whole


@pytest.fixture(autouse=True)
def _notes_are_said() -> None:
    """A command line called with --quiet or --json silences the process, and so the tests after it."""
    console.set_mode("auto")


@pytest.fixture(scope="session")
def town(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model and data files of the town. Tests read them and leave them as they are."""
    return build(tmp_path_factory.mktemp("town"))


@pytest.fixture(scope="session")
def honest(town: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    """A whole run in which every check has its evidence. Tests read it and leave it as it is, which the end verifies."""
    made = whole(town, tmp_path_factory.mktemp("runs"))
    before = {path: path.read_bytes() for path in made.run.path.rglob("*") if path.is_file()}
    yield made
    assert {path: path.read_bytes() for path in made.run.path.rglob("*") if path.is_file()} == before


@pytest.fixture
def copied(honest: Ran, tmp_path: Path) -> Ran:
    """A copy of the honest run, to be broken. Its files but the log are links, as copies would take most of the time:
    replace them (as `finetune.run` does), never write into them."""
    ignored = shutil.ignore_patterns("*-request.json", ".lock", "events.jsonl")  # nothing reads the first two again
    shutil.copytree(honest.run.path, tmp_path / "run", ignore=ignored, copy_function=os.link)
    shutil.copy2(honest.run.events_path, tmp_path / "run" / "events.jsonl")
    return Ran(honest.recipe, Run(tmp_path / "run"))
