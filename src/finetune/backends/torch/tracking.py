"""Trackers: where their files go, what they call a training, and that they end with it.

transformers' own integrations do the reporting. Left alone they write into the working directory and the user's home,
ask for keys on the terminal, and keep one open run a process; the user's environment variables still have the last word.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from finetune.backends import Job
from finetune.console import say
from finetune.core.files import write_text
from finetune.errors import FinetuneError, StageError, UsageError, first_line
from finetune.recipe import trackers

PROJECT = "finetune"
_FIX = {"wandb": "Set WANDB_MODE=offline to send it later", "mlflow": "Unset MLFLOW_TRACKING_URI to keep it in the run"}
_PREFIXES = ("MLFLOW_", "TENSORBOARD_", "TRACKIO_", "WANDB_")
_OFFLINE_VALUES = {"1", "on", "yes", "true"}


@contextmanager
def tracked(job: Job) -> Iterator[None]:
    """While inside, the job's trackers write into `job.out/trackers`; a resumed job goes on in its own run."""
    section = "align" if job.objective == "dpo" else "train"
    names = trackers.named(job.options.get("report_to"))
    if not names:
        yield
        return
    trackers.require(names, section)
    place = job.out / "trackers"
    before = dict(os.environ)
    for variable, value in environment(names, place, resumed=job.resume is not None).items():
        os.environ.setdefault(variable, value)
    ended = False
    try:
        if "trackio" in names and "TRACKIO_DIR" not in before:
            _forget("trackio")
        if "wandb" in names:
            _open_wandb(job.resume is not None, chosen="WANDB_MODE" in before)
        if "mlflow" in names:
            _open_mlflow(job, place, chosen="MLFLOW_TRACKING_URI" in before)
        say(f"reporting to {', '.join(names)} (their local files: {place})")
        yield
        ended = True
    except FinetuneError:
        raise
    except Exception as error:
        name = next((each for each in names if _raised_by(error, trackers.TRACKERS[each][0])), None)
        if name is None:
            raise
        raise StageError(
            f"{section}.report_to: {name} failed: {first_line(error)}. {_FIX.get(name, 'Mend that')}, or leave "
            f"'{name}' out of report_to"
        ) from error
    finally:
        _close(names, ended)
        for variable in [name for name in os.environ if name.startswith(_PREFIXES)]:
            if variable not in before:
                del os.environ[variable]
            else:
                os.environ[variable] = before[variable]


def environment(names: list[str], place: Path, *, resumed: bool) -> dict[str, str]:
    """Environment variables that keep these trackers inside `place`, quiet, and from waiting for a network or a key."""
    values: dict[str, str] = {}
    if "tensorboard" in names:
        values["TENSORBOARD_LOGGING_DIR"] = str(place / "tensorboard")
    if "trackio" in names:
        values["TRACKIO_DIR"] = str(place / "trackio")
    if "mlflow" in names:
        if "?" in str(place):
            raise UsageError(
                f"mlflow cannot keep its files in {place}: a '?' ends the path of its database. Use --run DIR"
            )
        (place / "mlflow").mkdir(parents=True, exist_ok=True)  # SQLite makes the file, not its folder
        values["MLFLOW_TRACKING_URI"] = f"sqlite:///{place / 'mlflow' / 'mlflow.db'}"
        values["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "2"
        values["MLFLOW_DISABLE_TELEMETRY"] = "true"
        if resumed:  # a run's parameters cannot change, and a training that goes on for longer has others
            values["MLFLOW_MAX_LOG_PARAMS"] = "0"
    if "wandb" in names:
        inside = place / "wandb"
        inside.mkdir(parents=True, exist_ok=True)  # where there is none, it goes to the system's temporary files
        values |= {"WANDB_DIR": str(place), "WANDB_CACHE_DIR": str(inside), "WANDB_DATA_DIR": str(inside)}
        values |= {"WANDB_PROJECT": PROJECT, "WANDB_SILENT": "true", "WANDB_CONSOLE": "off", "WANDB_INIT_TIMEOUT": "30"}
        values |= {"WANDB_FINISH_TIMEOUT": "120"}  # what is not sent by then stays here, for `wandb sync`
        values |= {"WANDB_ERROR_REPORTING": "false", "WANDB_RUN_ID": _run_id(inside / "run-id", resumed)}
        # Its metadata hold the command line and the repository's address, and both can hold a secret.
        values["WANDB_X_DISABLE_META"] = values["WANDB_DISABLE_GIT"] = "true"
    return values


def _run_id(file: Path, resumed: bool) -> str:
    """The stored id of a training that goes on, or a new one."""
    if not (resumed and file.is_file()):
        write_text(file, os.urandom(4).hex() + "\n")
    return file.read_text(encoding="utf-8").strip()


def _open_wandb(resumed: bool, *, chosen: bool) -> None:
    """Without a key it would ask for one on the terminal; then, and where the hub is not to be asked, it stays offline."""
    wandb: Any = importlib.import_module("wandb")
    if not chosen:
        asked = os.environ.get("HF_HUB_OFFLINE", "").lower() in _OFFLINE_VALUES
        os.environ["WANDB_MODE"] = "offline" if asked or not wandb.login(prompt=False, verify=False) else "online"
    if resumed and os.environ["WANDB_MODE"] == "online":
        os.environ.setdefault("WANDB_RESUME", "allow")
    wandb.teardown()  # its service remembers the settings that it first met


def _open_mlflow(job: Job, place: Path, *, chosen: bool) -> None:
    """Name the run beforehand: the integration then reports to it, and a resumed training finds it again."""
    mlflow: Any = importlib.import_module("mlflow")
    for name in ("alembic", "mlflow.store.db.utils"):  # they tell of every table that they make
        logging.getLogger(name).setLevel(logging.WARNING)
    if not chosen:
        mlflow.set_tracking_uri(os.environ["MLFLOW_TRACKING_URI"])
    if os.environ.get("MLFLOW_RUN_ID"):
        return
    stored = place / "mlflow" / "run-id"
    if not (job.resume and stored.is_file()):
        client = mlflow.MlflowClient()
        project = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = client.get_experiment_by_name(project)
        files = None if chosen else (place / "mlflow" / "artifacts").as_uri()
        experiment = found.experiment_id if found else client.create_experiment(project, artifact_location=files)
        write_text(stored, client.create_run(experiment, run_name=job.name).info.run_id + "\n")
    os.environ["MLFLOW_RUN_ID"] = stored.read_text(encoding="utf-8").strip()


def _close(names: list[str], ended: bool) -> None:
    """End what the integrations leave open, so that the next training of this process has a run of its own."""
    if "wandb" in names and (wandb := sys.modules.get("wandb")) and wandb.run is not None:
        wandb.finish(exit_code=0 if ended else 1)
    if "trackio" in names and (trackio := sys.modules.get("trackio")):
        with suppress(RuntimeError):  # there is none
            trackio.finish()
    if "mlflow" in names and (mlflow := sys.modules.get("mlflow")):
        if mlflow.active_run() is not None:
            mlflow.end_run("FINISHED" if ended else "FAILED")
        mlflow.set_tracking_uri(None)


def _forget(package: str) -> None:
    """Import a package anew when next asked: it reads the environment only then."""
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        del sys.modules[name]
    importlib.invalidate_caches()


def _raised_by(error: BaseException, module: str) -> bool:
    """Whether an error is of a package's own kind, or was raised in its code."""
    package = module.partition(".")[0]
    if type(error).__module__.partition(".")[0] == package:
        return True
    trace: Any = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_globals.get("__name__", "").partition(".")[0] == package:
            return True
        trace = trace.tb_next
    return False
