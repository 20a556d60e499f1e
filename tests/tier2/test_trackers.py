"""Trackers through transformers' own integrations: the losses that they hold are the training's, and all is in the run.

Each that is not installed is skipped; `pip install 'finetune-proof[trackers]'` gets them all.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sqlite3
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune.core.errors import MissingError
from finetune.core.files import digest
from finetune.recipe import Recipe
from finetune.recipe.trackers import sentence
from finetune.run import Run
from finetune.stages.pipeline import run_directory, run_stages
from support.silent import WAYS, failing

KEY, TOKEN = "k" * 40, "hf_plantedplantedplanted"
SHORT = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2}


def tensorboard(place: Path, name: str) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(place / "tensorboard"))
    found.Reload()
    return {scalar.step: scalar.value for scalar in found.Scalars("train/loss")}


def trackio(place: Path, name: str) -> dict[int, float]:
    with sqlite3.connect(place / "trackio" / "finetune.db") as store:
        rows = store.execute("SELECT run_name, metrics FROM metrics ORDER BY id").fetchall()
    assert {run for run, _ in rows} == {name}
    logs = [json.loads(metrics) for _, metrics in rows]
    return {log["train/global_step"]: log["train/loss"] for log in logs if "train/loss" in log}


def mlflow(place: Path, name: str) -> dict[int, float]:
    from mlflow import MlflowClient, is_tracking_uri_set

    assert not is_tracking_uri_set()
    client = MlflowClient(tracking_uri=f"sqlite:///{place / 'mlflow' / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("finetune").experiment_id])
    assert (run.info.run_name, run.info.status) == (name, "FINISHED")
    return {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, "loss")}


def wandb(place: Path, name: str) -> dict[int, float]:
    losses, runs = {}, set()
    for file in sorted(place.glob("wandb/offline-run-*/*.wandb")):
        for record in wandb_records(file):
            if record.WhichOneof("record_type") == "run":
                runs.add((record.run.run_id, record.run.project, record.run.display_name))
            items = {(item.key or "/".join(item.nested_key)): item.value_json for item in record.history.item}
            if "train/loss" in items:
                losses[int(items["train/global_step"])] = float(items["train/loss"])
    assert runs == {((place / "wandb" / "run-id").read_text().strip(), "finetune", name)}
    return losses


def wandb_records(file: Path) -> Iterator[Any]:
    """The records of an offline file: LevelDB's log format behind a header of 7 bytes, a protobuf message each."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = file.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if (left := 2**15 - at % 2**15) < 7:  # a block's last bytes are too few for a header
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            yield Record.FromString(whole)
            whole = b""


READERS: dict[str, Callable[[Path, str], dict[int, float]]] = {
    "tensorboard": tensorboard, "trackio": trackio, "mlflow": mlflow, "wandb": wandb,
}  # fmt: skip
TRACKERS = pytest.mark.parametrize("tracker", READERS)


def variables() -> dict[str, str]:
    """The environment variables of trackers."""
    prefixes = ("WANDB_", "MLFLOW_", "TRACKIO_", "TENSORBOARD_")
    return {name: value for name, value in os.environ.items() if name.startswith(prefixes)}


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model, skip_or_fail) -> Callable[[str], Path]:
    """A function: skips where a tracker is missing, and returns an empty home that is the working directory too."""
    for name in variables():
        monkeypatch.delenv(name)
    tiny_model()

    def prepare(tracker: str) -> Path:
        if importlib.util.find_spec(tracker) is None:
            skip_or_fail(tracker, f"{tracker} is not installed; get it with: pip install {tracker}")
        home = tmp_path / "home"
        home.mkdir()
        monkeypatch.chdir(home)
        monkeypatch.setenv("HOME", str(home))
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setenv("FT_CACHE_DIR", str(tmp_path / "ours"))  # by default it is in the home
        return home

    return prepare


def logged(run: Run, stage: str = "train") -> dict[int, float]:
    rows = json.loads((run.path / stage / "trainer_logs.json").read_text("utf-8"))
    return {row["step"]: row["loss"] for row in rows}


@TRACKERS
def test_a_tracker_holds_the_losses_of_a_training_and_of_its_continuation(
    tracker: str, alone, tiny_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, capfd
):
    home = alone(tracker)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    environment = variables()
    recipe = tiny_recipe(**SHORT, report_to=tracker)
    run = run_directory(recipe)

    run_stages(recipe, run, ["train"])
    place = run.path / "train" / "trackers"
    assert READERS[tracker](place, recipe.name) == pytest.approx(logged(run))

    longer = tiny_recipe(**{**SHORT, "max_steps": 6}, report_to=[tracker])
    run_stages(longer, run, ["train"], resume=run.path / "train" / "checkpoint-4")
    assert sorted(logged(run)) == [1, 2, 3, 4, 5, 6]
    assert READERS[tracker](place, recipe.name) == pytest.approx(logged(run))

    assert "ERROR" not in capfd.readouterr().err
    assert variables() == environment == {"WANDB_API_KEY": KEY}
    assert [path for path in home.rglob("*") if path.is_file()] == []
    files = [path for path in run.path.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert [path for path in files if KEY.encode() in (held := path.read_bytes()) or TOKEN.encode() in held] == []


@TRACKERS
def test_two_stages_of_one_process_are_two_runs(
    tracker: str, alone, tiny_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
):
    alone(tracker)
    monkeypatch.setenv("WANDB_MODE", "offline")
    align = {"data": {"path": "shipped:quorra/preferences.jsonl"}, "max_steps": 2, "report_to": tracker}
    recipe = tiny_recipe(**SHORT, report_to=tracker, align=align)
    run = run_directory(recipe)

    run_stages(recipe, run, ["align"])

    for stage, name in (("train", recipe.name), ("align", f"{recipe.name}-align")):
        assert READERS[tracker](run.path / stage / "trackers", name) == pytest.approx(logged(run, stage))


def test_what_the_user_set_has_the_last_word(
    alone, tiny_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    alone("tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "mine" / "tensorboard"))
    recipe = tiny_recipe(**SHORT, report_to="tensorboard")
    run = run_directory(recipe)

    run_stages(recipe, run, ["train"])

    assert tensorboard(tmp_path / "mine", recipe.name) == pytest.approx(logged(run))
    assert not (run.path / "train" / "trackers").exists()


@pytest.fixture
def undisturbed(tiny_recipe: Callable[..., Recipe]) -> str:
    """The digest of the adapter of a training without a tracker."""
    recipe = tiny_recipe(**SHORT, name="undisturbed")
    run = run_directory(recipe)
    run_stages(recipe, run, ["train"])
    return digest(run.path / "train" / "adapter" / "adapter_model.safetensors")


def left_or_offline(run: Run, tracker: str, said: str) -> dict[str, Any]:
    """How a tracker failed: as the log, the stage's report and one line on stderr tell alike."""
    (event,) = run.events("tracker_failed", stage="train", tracker=tracker)
    assert run.require("train").notes == [sentence(event)]
    assert said.count(f"the tracker {tracker} failed") == 1
    assert sentence(event) in said
    return event


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tracker", ["mlflow", "wandb"])
def test_a_server_that_fails_sends_its_tracker_offline_and_costs_the_training_nothing(
    tracker: str, way: str, alone, tiny_recipe: Callable[..., Recipe], undisturbed, monkeypatch, capfd
):
    alone(tracker)
    short = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "2", "WANDB_INIT_TIMEOUT": "3"}
    for name, value in {**short, "WANDB_MODE": "online", "WANDB_API_KEY": KEY}.items():
        monkeypatch.setenv(name, value)
    recipe = tiny_recipe(**SHORT, report_to=tracker)
    run = run_directory(recipe)

    with failing(way) as (url, asked):
        monkeypatch.setenv({"mlflow": "MLFLOW_TRACKING_URI", "wandb": "WANDB_BASE_URL"}[tracker], url)
        run_stages(recipe, run, ["train"])

    assert asked
    event = left_or_offline(run, tracker, capfd.readouterr().err)
    assert (event["step"], event["offline"]) == (0, True)
    assert READERS[tracker](run.path / "train" / "trackers", recipe.name) == pytest.approx(logged(run))
    assert digest(run.path / "train" / "adapter" / "adapter_model.safetensors") == undisturbed


def test_a_tracker_that_cannot_write_is_left_and_costs_the_training_nothing(
    alone, tiny_recipe: Callable[..., Recipe], undisturbed, monkeypatch, tmp_path, capfd
):
    alone("tensorboard")
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", f"{tmp_path}/file/x")
    recipe = tiny_recipe(**SHORT, report_to="tensorboard")
    run = run_directory(recipe)

    run_stages(recipe, run, ["train"])

    event = left_or_offline(run, "tensorboard", capfd.readouterr().err)
    assert (event["step"], event["offline"]) == (0, False)
    assert sorted(logged(run)) == [1, 2, 3, 4]
    assert digest(run.path / "train" / "adapter" / "adapter_model.safetensors") == undisturbed


def test_a_tracker_whose_disk_is_full_is_left(
    alone, tiny_recipe: Callable[..., Recipe], undisturbed, monkeypatch, tmp_path, capfd, skip_or_fail
):
    alone("tensorboard")
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        skip_or_fail("mount", "no file system can be mounted here")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(small))
    recipe = tiny_recipe(**SHORT, report_to="tensorboard")
    run = run_directory(recipe)
    try:
        run_stages(recipe, run, ["train"])
    finally:
        subprocess.run(["umount", "--lazy", str(small)], check=True)

    assert "No space left on device" in left_or_offline(run, "tensorboard", capfd.readouterr().err)["why"]
    assert digest(run.path / "train" / "adapter" / "adapter_model.safetensors") == undisturbed


@TRACKERS
def test_a_sound_tracker_costs_the_training_nothing(tracker: str, alone, tiny_recipe, undisturbed, monkeypatch):
    alone(tracker)
    monkeypatch.setenv("WANDB_MODE", "offline")
    recipe = tiny_recipe(**SHORT, report_to=tracker)
    run = run_directory(recipe)
    run_stages(recipe, run, ["train"])
    assert run.require("train").notes == []
    assert digest(run.path / "train" / "adapter" / "adapter_model.safetensors") == undisturbed


def test_a_tracker_that_is_not_installed_is_told_before_the_model_is_loaded(
    tiny_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
):
    from finetune.backends.torch import training
    from finetune.recipe import trackers

    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    monkeypatch.setattr(training, "load_model", lambda *_: pytest.fail("the model was loaded"))
    recipe = tiny_recipe(**SHORT, report_to="neptune")

    with pytest.raises(
        MissingError, match="train.report_to: neptune is not installed. Install with: pip install neptune"
    ):
        run_stages(recipe, run_directory(recipe), ["train"])


def test_our_trackers_are_those_of_transformers():
    from transformers.integrations import integration_utils

    from finetune.recipe.trackers import TRACKERS as ours

    assert set(ours) == set(integration_utils.INTEGRATION_TO_CALLBACK)
