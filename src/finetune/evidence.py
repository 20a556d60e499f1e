"""What stages leave on disk, read back. Stages write these files, checks and reports read them; nobody else."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.errors import MissingError
from finetune.recipe import Recipe
from finetune.run import Run, read_jsonl


def fetched(run: Run) -> dict[str, Any]:
    """Where the model is: `base` (directory), `adapter` (directory or None), `files` with digests."""
    found: dict[str, Any] = read_json(run, "fetch/model.json", "fetch")
    return found


def read_json(run: Run, name: str, stage: str) -> Any:
    """A JSON file of a stage. Raises MissingError with the command that writes it."""
    return json.loads(required(run, name, stage).read_text(encoding="utf-8"))


def read_rows(run: Run, name: str, stage: str) -> list[dict[str, Any]]:
    """The objects of a JSONL file of a stage. Raises MissingError with the command that writes it."""
    return read_jsonl(required(run, name, stage))


def required(run: Run, name: str, stage: str) -> Path:
    path = run.path / name
    if not path.exists():
        raise MissingError(f"{name} is not in {run.path}. Write it with: finetune {stage} RECIPE")
    return path


def steps(run: Run, stage: str) -> list[dict[str, Any]]:
    """The steps of the last training of a stage, one a step, in order.

    A training started anew drops what came before; a resumed one drops what came after its checkpoint.
    """
    found: list[dict[str, Any]] = []
    for event in run.events(stage=stage):
        if event["event"] == "training":
            begin = event.get("resumed_from") or 0
            found = [step for step in found if step["step"] <= begin]
        elif event["event"] == "step":
            found.append(event)
    return found


def row_scores(run: Run) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The training rows' scores before and after training (see stage evaluate); None unless every row has both."""
    path = run.path / "evaluate" / "rows.json"
    scores = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    base, trained = scores.get("base", {}), scores.get("trained", {})
    return (base, trained) if base and set(base) <= set(trained) else None


def tensor_bytes(file: Path) -> int:
    """Bytes of all tensors of a safetensors file: 8 bytes of length, a JSON header, tensors
    (https://huggingface.co/docs/safetensors)."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
    return file.stat().st_size - 8 - length


def mean(values: Sequence[float]) -> float:
    """The mean; NaN without a value, and where one is NaN (`statistics.fmean` raises at infinities of both signs)."""
    return sum(values) / len(values) if values else math.nan


def perplexity(total: float, count: int) -> float:
    """exp of the mean negative log-probability (nats) of `count` tokens whose log-probabilities add up to `total`: NaN
    without a token or where `total` is, infinity where it is beyond a float."""
    nats = -total / count if count else math.nan
    return math.inf if nats > math.log(sys.float_info.max) else math.exp(nats)


def model_settings(recipe: Recipe) -> dict[str, Any]:
    """How a backend shall load the model, as plain values."""
    return recipe.model.model_dump(include={"dtype", "device", "attn_implementation", "trust_remote_code"})


def final(run: Run, recipe: Recipe) -> tuple[Path, Path | None]:
    """The model directory and the adapter directory (or None) after the last training stage that ran."""
    found = fetched(run)
    base, adapter = Path(found["base"]), Path(found["adapter"]) if found["adapter"] else None
    for stage, wanted in (("train", recipe.train), ("align", recipe.align)):
        if wanted is None:
            continue
        if (run.path / stage / "adapter").is_dir():
            adapter = run.path / stage / "adapter"
        elif (run.path / stage / "model").is_dir():
            base, adapter = run.path / stage / "model", None
    return base, adapter


def phases(run: Run, recipe: Recipe) -> dict[str, tuple[Path, Path | None]]:
    """`base`, `trained`, `aligned`: the model and adapter directories at each point of the run, as far as it came."""
    found = fetched(run)
    here = (Path(found["base"]), Path(found["adapter"]) if found["adapter"] else None)
    result = {"base": here}
    for phase, stage, wanted in (("trained", "train", recipe.train), ("aligned", "align", recipe.align)):
        if wanted is None or run.report(stage) is None:
            continue
        adapter, model = run.path / stage / "adapter", run.path / stage / "model"
        here = (here[0], adapter) if adapter.is_dir() else (model, None)
        result[phase] = here
    return result
