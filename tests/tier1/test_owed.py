"""What a check owes for a recipe is what it delivers, on honest runs of every kind; and what it cannot deliver is refuted."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from finetune.checks import BY_NAME, CHECKS, REFUTED, owed, results
from finetune.checks.parts import WITHOUT
from finetune.core.lookup import load
from finetune.recipe import Recipe
from finetune.run import Run
from finetune.stages.pipeline import run_directory, run_stages
from support import town as town_

PACKED = {"packing": True}
FULL = {"method": "full", "lora": {}}
STOPPING = {"eval_strategy": "steps", "eval_steps": 3, "early_stopping_patience": 2}
OTHER = {"optim": "sgd", "max_grad_norm": 0.0, "loss_type": "dft", "save_strategy": "no"}
# Recipes whose honest runs owe other verdicts than the whole one of the fixture `honest`.
KINDS: dict[str, dict[str, Any]] = {
    "full": {"train": FULL},
    "packed": {"train": PACKED, "align": None},
    "held out, with early stopping": {"train": STOPPING, "data": {"eval_fraction": 0.34}, "align": None},
    "an optimizer that is no Adam, another loss, nothing clipped or saved": {
        "train": OTHER, "align": {"save_strategy": "no"}, "expect": {"loss_below_unigram": False, "resume": False},
    },
    "alignment alone": {"train": None, "data": None, "expect": {"resume": False}},
    "nothing asked": {"align": None, "evaluate": dict.fromkeys(("probes", "controls", "unseen", "heldout"))},
}  # fmt: skip
BY_THE_RUNNER = ("the check said nothing of it", "makes no sense to the check")
SWEPT = [check.name for check in CHECKS]
FP16 = {"train": {"fp16": True}, "align": {"fp16": True}}


def names(recipe: Recipe, run: Run, check: str) -> list[str]:
    return sorted(verdict.name for verdict in results(recipe, run, [check]))


def test_every_check_is_swept():
    assert len(SWEPT) >= 16
    assert {"seal", "labels", "reports", "parity"} < set(SWEPT)


@pytest.mark.parametrize("name", SWEPT)
def test_a_check_owes_what_it_delivers(honest, name):
    """And delivers nothing twice."""
    recipe, run = honest
    check = BY_NAME[name]
    if not check.wanted(recipe):
        return  # it has a test of its own, on a run that calls for it

    assert names(recipe, run, name) == sorted(owed(check, recipe))
    assert [name for name, times in Counter(owed(check, recipe)).items() if times > 1] == []


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.replace(" ", "-"))
def test_what_is_owed_is_delivered_for_other_recipes_too(kind, tmp_path):
    recipe = town_.recipe(town_.build(tmp_path / "town"), tmp_path / "runs", **KINDS[kind])
    run = run_directory(recipe)
    run_stages(recipe, run)
    for check in CHECKS:
        if not check.wanted(recipe):
            continue
        delivered = results(recipe, run, [check.name])

        assert sorted(verdict.name for verdict in delivered) == sorted(owed(check, recipe)), check.name
        assert [f"{v.name}: {v.why}" for v in delivered if any(said in v.why for said in BY_THE_RUNNER)] == []


@pytest.mark.parametrize("name", SWEPT)
def test_where_nothing_is_left_every_verdict_that_is_owed_is_refuted(honest, tmp_path, name):
    recipe, _ = honest
    check = BY_NAME[name]
    if name == "seal" or not check.wanted(recipe):  # an empty folder was never sealed
        return
    verdicts = results(recipe, Run(tmp_path).create(), [name])

    assert sorted(verdict.name for verdict in verdicts) == sorted(owed(check, recipe))
    proved = [verdict.name for verdict in verdicts if verdict.outcome != REFUTED]
    assert proved == (["judged_strictly"] if name == "questions" and proved else [])  # of the files of questions alone


def keys(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every key of every object in a JSON value."""
    found = []
    for key, inner in value.items() if isinstance(value, dict) else ():
        found += [(*path, key), *keys(inner, (*path, key))]
    for place, inner in enumerate(value[:1]) if isinstance(value, list) else ():
        found += keys(inner, (*path, place))
    return found


def without(value: Any, path: tuple[Any, ...]) -> Any:
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return value


@pytest.mark.parametrize("stage", ["train", "align"])
def test_no_verdict_goes_with_a_key_of_a_report(honest, copied, stage):
    """Every number of a training's report taken away, one by one: what is owed is delivered, and what knew it is refuted."""
    recipe, run = copied
    mine = ["rows", "parameters", "optimizer", "reports", "artifacts"]
    expected = {name: names(*honest, name) for name in mine}
    file = run.path / stage / "report.json"
    stored = json.loads(file.read_text(encoding="utf-8"))
    swept = [path for path in keys(stored) if path[0] == "metrics" and len(path) > 1]
    assert len(swept) >= 25
    for path in swept:
        town_.edit_json(run, f"{stage}/report.json", lambda report, path=path: without(report, path))
        verdicts = [verdict for name in mine for verdict in results(recipe, run, [name])]

        assert sorted(verdict.name for verdict in verdicts) == sorted(
            name for part in expected.values() for name in part
        )
        assert [verdict.name for verdict in verdicts if verdict.refuted], path
        town_.edit_json(run, f"{stage}/report.json", lambda report: (report.clear(), report.update(stored)))


def test_what_a_backend_has_not_is_said_with_its_reason():
    known = {name for check in CHECKS for part in load(check.parts) for name in part.owes(town_recipe())}
    for backend, lacking in WITHOUT.items():
        assert backend in ("fake",)
        assert set(lacking) <= known
        assert all(lacking.values())


def town_recipe() -> Recipe:
    return town_.recipe(Path("town"), Path("runs"), backend="torch")


@pytest.mark.parametrize("changes", [{}, FP16], ids=["float32", "fp16"])
def test_a_learning_rate_lags_behind_where_steps_are_skipped(changes):
    names = owed(BY_NAME["optimizer"], town_.recipe(Path("town"), Path("runs"), **changes))

    assert ("learning_rate_as_asked" in names) is not bool(changes)
    assert ("dpo_learning_rate_as_asked" in names) is not bool(changes)
    assert "steps_move_weights" in names


def test_a_damaged_file_costs_the_verdicts_that_stand_on_it_and_no_others(copied):
    recipe, run = copied
    (run.path / "measure" / "fresh.json").unlink()
    (run.path / "measure" / "fresh.json").write_text('{"template_sha256": ')
    town_.as_if_written_so(run)
    refuted = {verdict.name: verdict.why for verdict in results(recipe, run, ["artifacts"]) if verdict.refuted}

    assert set(refuted) == {"fresh_process"}
    assert "fresh.json is damaged: it is not JSON" in refuted["fresh_process"]
    assert "finetune measure RECIPE" in refuted["fresh_process"]
    shutil.rmtree(run.path / "measure")
