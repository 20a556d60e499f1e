"""After an edit or an upgrade a stage runs again and says why; only a finished training is kept, and marked."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import finetune
from finetune.core.files import write_json
from finetune.recipe import dump
from finetune.run import Run
from sabotage.context import as_if_written_so
from support.town import build, only_training

SOURCE = Path(finetune.__file__).parent


class Made:
    """A package of its own, which may be edited, and a run that it made."""

    def __init__(self, root: Path) -> None:
        ignored = shutil.ignore_patterns("__pycache__", "sabotage")
        self.package = Path(shutil.copytree(SOURCE, root / "lib" / "finetune", ignore=ignored))
        self.recipe = root / "recipe.yaml"
        self.recipe.write_text(dump(only_training(build(root / "town"), root / "runs")), encoding="utf-8")
        self.run = root / "runs" / "town"
        self.environment = {
            **os.environ, "PYTHONPATH": str(root / "lib"), "FT_CACHE_DIR": str(root / "cache"), "PYTHONDONTWRITEBYTECODE": "1",
        }  # fmt: skip

    def call(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "finetune", *arguments]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)

    def again(self, *more: str) -> tuple[list[str], str]:
        """What is said of stages that run again, and the headline, of `finetune run`."""
        done = self.call("run", str(self.recipe), *more)
        assert done.returncode == 0, done.stderr[-800:]
        said = [line for line in done.stderr.splitlines() if "runs again" in line]
        headline = json.loads((self.run / "report.json").read_text(encoding="utf-8"))["conclusion"]
        return said, headline

    def edit(self, name: str) -> None:
        """Add a statement to a module, as an edit or a pull does."""
        path = self.package / name
        path.write_text(f"{path.read_text(encoding='utf-8')}\n_EDITED = True\n", encoding="utf-8")

    def started(self) -> dict[str, str]:
        return {path.parent.name: json.loads(path.read_text())["started"] for path in self.run.glob("*/report.json")}


@pytest.fixture
def made(tmp_path: Path) -> Made:
    found = Made(tmp_path)
    assert found.again()[0] == []
    return found


@pytest.mark.timeout(120)
def test_nothing_runs_again_where_nothing_changed_and_an_edit_is_named(made: Made) -> None:
    before = made.started()
    assert made.again()[0] == []
    assert made.started() == before

    made.edit("stages/evaluate.py")
    said, _ = made.again()
    assert said[0].startswith("evaluate runs again: finetune/stages/evaluate.py changed")
    changed = {name for name, time in made.started().items() if time != before[name]}
    assert {"evaluate"} <= changed <= {"evaluate", "measure"}
    assert made.again()[0] == []


@pytest.mark.timeout(120)
def test_a_training_is_kept_over_an_edit_and_marked_until_it_is_done_anew(made: Made) -> None:
    before = made.started()["train"]
    made.edit("backends/fake/training.py")
    _, headline = made.again()

    assert made.started()["train"] == before
    assert "finetune/backends/fake/training.py changed" in headline
    assert "--retrain" in headline
    kept = Run(made.run).manifest()["kept"]
    assert kept["train"] == ["finetune/backends/fake/training.py changed"]

    said, headline = made.again("--retrain")
    assert any(line.startswith("train runs again: finetune/backends/fake/training.py changed") for line in said)
    assert made.started()["train"] > before
    assert "--retrain" not in headline
    assert Run(made.run).manifest()["kept"] == {}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("stage", ["prepare", "train"])
def test_another_version_of_a_library_is_named(made: Made, stage: str) -> None:
    """As if the stage had been made with an older one."""
    path = made.run / stage / "report.json"
    report = json.loads(path.read_text(encoding="utf-8"))
    now = report["made_with"]["libraries"]["jinja2"]
    report["made_with"]["libraries"]["jinja2"] = "3.0.1"
    write_json(path, report)
    as_if_written_so(Run(made.run))
    before = made.started()
    said, headline = made.again()

    if stage == "train":
        assert f"the training was made with jinja2 3.0.1, now {now}: --retrain does it anew" in headline
        assert made.started()["train"] == before["train"]
    else:
        assert said[0].startswith("prepare runs again: ")
        assert f"jinja2 3.0.1 -> {now}" in said[0]
        assert made.started()["train"] == before["train"]
