"""Trackers in a recipe: known by name, told when they are not, and kept inside the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.backends.torch import tracking
from finetune.core.errors import MissingError, RecipeError, UsageError
from finetune.recipe import load, trackers
from finetune.run import Run
from finetune.stages.pipeline import run_directory, run_stages
from finetune.training import job
from support.town import only_training

RECIPE = """\
data: {path: rows.jsonl}
train:
  max_steps: 1
  report_to: REPORT_TO
"""


@pytest.fixture
def written(tmp_path: Path) -> Callable[[str], Path]:
    def write(report_to: str) -> Path:
        (tmp_path / "recipe.yaml").write_text(RECIPE.replace("REPORT_TO", report_to))
        return tmp_path / "recipe.yaml"

    return write


@pytest.mark.parametrize(
    ("report_to", "names"),
    [
        ("none", []),
        ("[]", []),
        ("[none]", []),
        ("tensorboard", ["tensorboard"]),
        ("[wandb, trackio, wandb]", ["wandb", "trackio"]),
    ],
)
def test_a_recipe_names_trackers(written: Callable[[str], Path], report_to: str, names: list[str]) -> None:
    train = load(written(report_to)).train
    assert train is not None
    assert trackers.named(train.report_to) == names


@pytest.mark.parametrize(
    ("report_to", "said"),
    [
        ("tensorbord", "no tracker 'tensorbord'. Did you mean 'tensorboard'? Known: none, trackio, tensorboard, wandb"),
        ("[mlflow, wandbb]", "no tracker 'wandbb'. Did you mean 'wandb'?"),
        ("all", "'all' is whatever happens to be installed; name the trackers"),
        ("[none, wandb]", "'none' stands alone"),
    ],
)
def test_what_is_no_tracker_is_a_fault_of_the_recipe(written: Callable[[str], Path], report_to: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load(written(report_to))

    (fault,) = caught.value.faults
    assert said in fault
    assert ":4: train.report_to" in fault


def test_a_tracker_without_its_package_is_missing_with_the_line_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None if name in ("wandb", "comet_ml") else object())

    trackers.require(["tensorboard"], "train")
    with pytest.raises(
        MissingError, match=r"^align.report_to: wandb is not installed. Install with: pip install wandb$"
    ):
        trackers.require(["tensorboard", "wandb"], "align")
    with pytest.raises(
        MissingError, match="wandb and comet_ml are not installed. Install with: pip install wandb comet-ml"
    ):
        trackers.require(["wandb", "comet_ml"], "train")


def test_the_fake_backend_refuses_trackers_rather_than_passing_over_them(town: Path, tmp_path: Path) -> None:
    recipe = only_training(town, tmp_path, train={"report_to": ["tensorboard"]})

    with pytest.raises(UsageError, match="train.report_to: the fake backend reports to no tracker"):
        run_stages(recipe, run_directory(recipe), ["train"])


def test_notes_tell_of_the_whole_training_and_of_no_other(tmp_path: Path) -> None:
    run = Run(tmp_path)

    def failed(stage: str, step: int) -> trackers.Failure:
        failure = trackers.Failure(tracker="wandb", step=step, why="refused", offline=False)
        run.event("tracker_failed", stage=stage, **failure)
        return failure

    run.event("training", stage="train", resumed_from=None)
    failed("train", 1)
    run.event("training", stage="train", resumed_from=None)
    first = failed("train", 2)
    failed("align", 3)
    run.event("training", stage="train", resumed_from=2)
    second = failed("train", 4)

    assert job._of_trackers(run, "train") == [trackers.sentence(first), trackers.sentence(second)]


def test_every_file_of_a_tracker_is_inside_the_run(tmp_path: Path) -> None:
    values = tracking.environment(["tensorboard", "trackio", "mlflow", "wandb"], tmp_path, resumed=False)

    places = {name: value for name, value in values.items() if "DIR" in name or "URI" in name}
    assert set(places) == {
        "TENSORBOARD_LOGGING_DIR", "TRACKIO_DIR", "MLFLOW_TRACKING_URI", "WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR",
    }  # fmt: skip
    assert all(str(tmp_path) in value for value in places.values())


def test_a_resumed_training_keeps_its_id_and_a_new_one_gets_another(tmp_path: Path) -> None:
    def run_id(**more: Any) -> str:
        return tracking.environment(["wandb"], tmp_path, **more)["WANDB_RUN_ID"]

    first = run_id(resumed=False)
    assert run_id(resumed=True) == first
    assert run_id(resumed=False) != first
