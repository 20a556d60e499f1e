"""Trackers: where their files go, what they call a training, and that they end with it.

transformers' own integrations do the reporting. Left alone they write into the working directory and the user's home,
ask for keys on the terminal, and keep one open run a process; the user's environment variables still have the last word.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from finetune.backends import Job
from finetune.backends.torch.calling import Tracker
from finetune.core.console import say
from finetune.core.errors import UsageError
from finetune.core.files import write_text
from finetune.recipe import trackers

PROJECT = "finetune"
_PREFIXES = ("MLFLOW_", "TENSORBOARD_", "TRACKIO_", "WANDB_")
_OFFLINE_VALUES = {"1", "on", "yes", "true"}


@contextmanager
def tracked(job: Job, closed: Callable[[], bool]) -> Iterator[list[Tracker]]:
    """While inside, the job's trackers write into `job.out/trackers`; a resumed job goes on in its own run.

    `closed`: whether nobody waits for the job's result any more. What fails in a tracker ends no training: see `calling`.
    Raises MissingError for one that is not installed, UsageError for a place that it cannot write to by its nature.
    """
    section = "align" if job.objective == "dpo" else "train"
    names = trackers.named(job.options.get("report_to"))
    if not names:
        yield []
        return
    trackers.require(names, section)
    place = job.out / "trackers"
    if "mlflow" in names and "?" in str(place):
        raise UsageError(f"mlflow cannot keep its files in {place}: a '?' ends the path of its database. Use --run DIR")
    before = dict(os.environ)
    found = [
        Tracker(
            name,
            partial(_open, name, job, place, before),
            partial(_close, name),
            can_go_offline=partial(_can_go_offline, name, before),
            stop=lambda: closed() or job.should_stop(),
            hurried=closed,
        )
        for name in names
    ]
    ended = False
    try:
        for tracker in found:
            tracker.begin()
        if working := [tracker.name for tracker in found if not tracker.left]:
            say(f"reporting to {', '.join(working)} (their local files: {place})")
        yield found
        ended = True
    finally:
        for tracker in found:
            tracker.close(ended)
        for variable in [name for name in os.environ if name.startswith(_PREFIXES)]:
            if variable not in before:
                del os.environ[variable]
            else:
                os.environ[variable] = before[variable]


def _open(name: str, job: Job, place: Path, before: Mapping[str, str], offline: bool) -> None:
    """Make one tracker ready; `offline`: in its local files, whatever was chosen."""
    resumed = job.resume is not None
    if offline and "WANDB_RUN_ID" not in before:  # wandb may hold on to the one that it could not begin
        os.environ.pop("WANDB_RUN_ID", None)
    for variable, value in environment([name], place, resumed=resumed).items():
        os.environ.setdefault(variable, value)
    if name == "trackio" and "TRACKIO_DIR" not in before:
        _forget("trackio")
    if name == "wandb":
        _open_wandb(resumed, chosen="WANDB_MODE" in before and not offline, offline=offline)
    if name == "mlflow":
        _open_mlflow(job, place, chosen="MLFLOW_TRACKING_URI" in before and not offline, offline=offline)


def _can_go_offline(name: str, before: Mapping[str, str]) -> bool:
    """Whether a tracker sends its logs elsewhere, and can keep them in the run instead."""
    online = {"wandb": os.environ.get("WANDB_MODE") != "offline", "mlflow": "MLFLOW_TRACKING_URI" in before}
    return online.get(name, False)


def environment(names: list[str], place: Path, *, resumed: bool) -> dict[str, str]:
    """Environment variables that keep these trackers inside `place`, quiet, and from waiting for a network or a key."""
    values: dict[str, str] = {}
    if "tensorboard" in names:
        values["TENSORBOARD_LOGGING_DIR"] = str(place / "tensorboard")
    if "trackio" in names:
        values["TRACKIO_DIR"] = str(place / "trackio")
    if "mlflow" in names:
        (place / "mlflow").mkdir(parents=True, exist_ok=True)  # SQLite makes the file, not its folder
        values["MLFLOW_TRACKING_URI"] = _local_mlflow(place)
        values |= {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
        values["MLFLOW_DISABLE_TELEMETRY"] = "true"
        if resumed:  # a run's parameters cannot change, and a training that goes on for longer has others
            values["MLFLOW_MAX_LOG_PARAMS"] = "0"
    if "wandb" in names:
        inside = place / "wandb"
        inside.mkdir(parents=True, exist_ok=True)  # where there is none, it goes to the system's temporary files
        values |= {"WANDB_DIR": str(place), "WANDB_CACHE_DIR": str(inside), "WANDB_DATA_DIR": str(inside)}
        values |= {"WANDB_PROJECT": PROJECT, "WANDB_SILENT": "true", "WANDB_CONSOLE": "off", "WANDB_INIT_TIMEOUT": "30"}
        values |= {"WANDB_FINISH_TIMEOUT": "60"}  # what is not sent by then stays here, for `wandb sync`
        values |= {"WANDB_ERROR_REPORTING": "false", "WANDB_RUN_ID": _run_id(inside / "run-id", resumed)}
        # Its metadata hold the command line and the repository's address, and both can hold a secret.
        values["WANDB_X_DISABLE_META"] = values["WANDB_DISABLE_GIT"] = "true"
    return values


def _run_id(file: Path, resumed: bool) -> str:
    """The stored id of a training that goes on, or a new one."""
    if not (resumed and file.is_file()):
        write_text(file, os.urandom(4).hex() + "\n")
    return file.read_text(encoding="utf-8").strip()


def _local_mlflow(place: Path) -> str:
    return f"sqlite:///{place / 'mlflow' / 'mlflow.db'}"


def _open_wandb(resumed: bool, *, chosen: bool, offline: bool) -> None:
    """Without a key it would ask for one on the terminal; then, and where the hub is not to be asked, it stays offline."""
    wandb: Any = importlib.import_module("wandb")
    if not chosen:
        asked = offline or os.environ.get("HF_HUB_OFFLINE", "").lower() in _OFFLINE_VALUES
        os.environ["WANDB_MODE"] = "offline" if asked or not wandb.login(prompt=False, verify=False) else "online"
    if resumed and os.environ["WANDB_MODE"] == "online":
        os.environ.setdefault("WANDB_RESUME", "allow")
    wandb.teardown()  # its service remembers the settings that it first met


def _open_mlflow(job: Job, place: Path, *, chosen: bool, offline: bool) -> None:
    """Name the run beforehand: the integration then reports to it, and a resumed training finds it again."""
    mlflow: Any = importlib.import_module("mlflow")
    for name in ("alembic", "mlflow.store.db.utils"):  # they tell of every table that they make
        logging.getLogger(name).setLevel(logging.WARNING)
    if offline:  # the run of that name is at the server that was chosen
        os.environ["MLFLOW_TRACKING_URI"] = _local_mlflow(place)
        os.environ.pop("MLFLOW_RUN_ID", None)
    if not chosen:
        mlflow.set_tracking_uri(os.environ["MLFLOW_TRACKING_URI"])
    if os.environ.get("MLFLOW_RUN_ID"):
        return
    stored = place / "mlflow" / ("offline-run-id" if offline else "run-id")
    if not (job.resume and stored.is_file()):
        client = mlflow.MlflowClient()
        project = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = client.get_experiment_by_name(project)
        files = None if chosen else (place / "mlflow" / "artifacts").as_uri()
        experiment = found.experiment_id if found else client.create_experiment(project, artifact_location=files)
        write_text(stored, client.create_run(experiment, run_name=job.name).info.run_id + "\n")
    os.environ["MLFLOW_RUN_ID"] = stored.read_text(encoding="utf-8").strip()


def _close(name: str, ended: bool) -> None:
    """End what an integration leaves open, so that the next training of this process has a run of its own."""
    library: Any = sys.modules.get(name)
    if library is None:
        return
    if name == "wandb" and library.run is not None:
        library.finish(exit_code=0 if ended else 1)
    if name == "trackio":
        with suppress(RuntimeError):  # there is none
            library.finish()
    if name == "mlflow":
        try:
            if library.active_run() is not None:
                library.end_run("FINISHED" if ended else "FAILED")
        finally:
            library.set_tracking_uri(None)


def _forget(package: str) -> None:
    """Import a package anew when next asked: it reads the environment only then."""
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        del sys.modules[name]
    importlib.invalidate_caches()
