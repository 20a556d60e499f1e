"""How many steps a recipe asks for, where the check of the reports can know it."""

from __future__ import annotations

from typing import Any

import pytest

from finetune.checks import results
from finetune.checks.reports import _planned
from finetune.recipe.sections import Train
from finetune.stages.pipeline import run_directory, run_stages
from support import town


@pytest.mark.parametrize(
    ("asked", "rows", "processes", "taken", "planned"),
    [
        ({"max_steps": 7}, 6, 1, 4, 7),
        ({"max_steps": 7}, 6, 8, 0, 7),
        ({"num_train_epochs": 3}, 6, 1, 4, 6),  # two batches of 4 an epoch
        ({"num_train_epochs": 1.5}, 6, 1, 4, 3),
        ({"num_train_epochs": 2, "gradient_accumulation_steps": 2}, 9, 1, 8, 4),  # three batches, two steps
        ({"num_train_epochs": 2}, 3, 1, 3, 2),
        ({"num_train_epochs": 2}, 6, 2, 4, None),  # two processes share an epoch
        ({"num_train_epochs": 2}, 16, 1, 8, None),  # a step took 8: two devices
        ({"num_train_epochs": 2, "packing": True}, 6, 1, 0, None),
    ],
)
def test_the_steps_of_a_recipe_are_known_where_rows_and_batches_are(asked, rows, processes, taken, planned):
    first: Any = {"step": 1, "rows": list(range(taken))}

    assert _planned(Train(**asked), rows, processes, [first]) == planned


def test_a_training_that_may_stop_early_is_held_to_its_plan_all_the_same(tmp_path):
    stopping = {
        "eval_strategy": "steps",
        "eval_steps": 3,
        "early_stopping_patience": 1,
        "early_stopping_threshold": 9.0,
    }
    there = town.build(tmp_path / "town")
    recipe = town.only_training(there, tmp_path / "runs", data={"eval_fraction": 0.34}, train=stopping)
    run = run_directory(recipe)
    run_stages(recipe, run, ["train"])

    def found() -> set[str]:
        return {verdict.name for verdict in results(recipe, run, ["reports"]) if verdict.refuted}

    assert run.require("train").metrics["steps"] < run.require("train").metrics["planned_steps"] == 12
    assert found() == set()
    town.edit_json(run, "train/report.json", lambda report: report["metrics"].update(planned_steps=9))
    assert found() == {"report_as_logged"}
