"""The trackers that a training can report to, by the names that transformers gives them."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, TypedDict

from finetune.core.errors import MissingError
from finetune.core.lookup import did_you_mean

# Name: the Python module that it needs, and the package that brings it. Those of transformers 5.23.
TRACKERS: dict[str, tuple[str, str]] = {
    "trackio": ("trackio", "trackio"),
    "tensorboard": ("tensorboard", "tensorboard"),
    "wandb": ("wandb", "wandb"),
    "mlflow": ("mlflow", "mlflow"),
    "azure_ml": ("azureml.core.run", "azureml-core"),
    "clearml": ("clearml", "clearml"),
    "codecarbon": ("codecarbon", "codecarbon"),
    "comet_ml": ("comet_ml", "comet-ml"),
    "dagshub": ("dagshub", "dagshub mlflow"),
    "dvclive": ("dvclive", "dvclive"),
    "flyte": ("flytekit", "flytekit"),
    "kubeflow": ("transformers", "transformers"),
    "neptune": ("neptune", "neptune"),
    "swanlab": ("swanlab", "swanlab"),
}


class Failure(TypedDict):
    """A tracker that failed for good in a training: after which step (0: before the first), why, and whether it went on
    offline."""

    tracker: str
    step: int
    why: str
    offline: bool


def sentence(failure: Failure | Mapping[str, Any]) -> str:
    """What people are told of it."""
    when = f"after step {failure['step']}" if failure["step"] else "before the first step"
    then = "it went on offline, into its files in the run" if failure["offline"] else "the training went on without it"
    return f"the tracker {failure['tracker']} failed {when} ({failure['why']}); {then}"


def named(report_to: str | list[str] | None) -> list[str]:
    """The trackers meant by `train.report_to`; `none` and nothing mean none."""
    given = [report_to] if isinstance(report_to, str) else report_to or []
    return [] if given == ["none"] else list(dict.fromkeys(given))


def check(report_to: str | list[str]) -> None:
    """Raise ValueError where a name is unknown, or where `none` stands beside another."""
    for name in named(report_to):
        if name == "all":
            raise ValueError("'all' is whatever happens to be installed; name the trackers, as in [tensorboard, wandb]")
        if name == "none":
            raise ValueError("'none' stands alone; leave it out, or leave out the others")
        if name not in TRACKERS:
            raise ValueError(f"no tracker '{name}'.{did_you_mean(name, TRACKERS)} Known: none, {', '.join(TRACKERS)}")


def require(names: list[str], section: str) -> None:
    """Raise MissingError where a tracker's package is not installed."""
    missing = [name for name in names if not _installed(TRACKERS[name][0])]
    if missing:
        packages = " ".join(TRACKERS[name][1] for name in missing)
        raise MissingError(
            f"{section}.report_to: {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed. "
            f"Install with: pip install {packages}"
        )


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package that it would be in is not there
        return False
