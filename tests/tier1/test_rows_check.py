"""What the check of the rows allows: rows held out, dropped as asked, packed, left out by early stopping; and nothing else."""

from __future__ import annotations

import pytest

from finetune.checks import results
from finetune.core.files import read_jsonl, write_jsonl
from finetune.stages.pipeline import run_directory, run_stages
from support import town


@pytest.fixture
def there(tmp_path):
    return town.build(tmp_path / "town")


@pytest.fixture
def trained(there, tmp_path):
    """Train with changes to the recipe; gives the recipe, the run, and the check's verdicts by name."""

    def do(**changes):
        recipe = town.only_training(there, tmp_path / "runs", **changes)
        run = run_directory(recipe)
        run_stages(recipe, run, ["train"])
        return recipe, run, by_name(recipe, run)

    return do


def by_name(recipe, run):
    return {verdict.name: verdict for verdict in results(recipe, run, ["rows"])}


def failed(verdicts):
    return {name for name, verdict in verdicts.items() if verdict.refuted}


def one_more(there, row):
    rows = town.facts()
    write_jsonl(there / "train.jsonl", [*rows, row])
    return len(rows)


def test_rows_held_out_are_not_lost(trained):
    recipe, run, verdicts = trained(data={"eval_fraction": 0.34})
    assert failed(verdicts) == set()
    assert len(read_jsonl(run.path / "prepare" / "eval.jsonl")) == 2

    town.edit_rows(run, "prepare/eval.jsonl", lambda rows: rows[1:])
    assert failed(by_name(recipe, run)) == {"rows_prepared"}


def test_a_row_that_is_too_long_is_not_lost_where_the_recipe_drops_it(there, trained):
    one_more(there, {"prompt": "What is long?", "completion": "This is. " * 40})
    recipe, run, verdicts = trained(data={"on_overlong": "drop"})
    assert failed(verdicts) == set()
    assert "1 left out as the recipe says" in verdicts["rows_prepared"].why

    town.edit_rows(run, "prepare/train.jsonl", lambda rows: rows[1:])
    assert verdicts["rows_prepared"].measured == 0
    assert by_name(recipe, run)["rows_prepared"].measured == 1  # the short one, and not the long one


@pytest.mark.parametrize(("rule", "lost"), [("drop", 0), ("warn", 1)])
def test_a_repeated_row_is_lost_unless_the_recipe_drops_it(there, trained, rule, lost):
    repeat = one_more(there, town.facts()[0])
    recipe, run, verdicts = trained(data={"on_duplicate": rule})
    assert failed(verdicts) == set()

    town.edit_rows(run, "prepare/train.jsonl", lambda rows: [row for row in rows if row["row"] != repeat])
    verdict = by_name(recipe, run)["rows_prepared"]
    assert verdict.measured == lost
    assert verdict.passed is not bool(lost)


def test_where_packing_hides_the_rows_the_tokens_of_an_epoch_are_counted(trained):
    recipe, run, verdicts = trained(train={"packing": True})
    edit = town.edit_rows

    def rowless(rows):
        for row in rows:
            if row["event"] == "step":
                row["rows"] = []

    edit(run, "events.jsonl", rowless)
    assert failed(by_name(recipe, run)) == set()
    assert "rows_trained" not in verdicts
    unpacked = recipe.model_copy(update={"train": recipe.train.model_copy(update={"packing": False})})
    assert failed(by_name(unpacked, run)) == {"rows_trained", "tokens_as_prepared"}

    edit(run, "prepare/train.jsonl", lambda rows: rows[:-1])
    assert failed(by_name(recipe, run)) == {"rows_prepared", "tokens_as_prepared"}


def test_a_training_that_may_stop_early_is_not_held_to_its_last_step(trained):
    stopping = {
        "eval_strategy": "steps",
        "eval_steps": 3,
        "early_stopping_patience": 1,
        "early_stopping_threshold": 9.0,
    }
    _, run, verdicts = trained(data={"eval_fraction": 0.34}, train=stopping)
    assert run.require("train").metrics["steps"] < 12
    assert failed(verdicts) == set()
    assert "trained_to_the_end" not in verdicts


@pytest.mark.parametrize("length", [{"max_steps": 5}, {"max_steps": 40}, {"max_steps": -1, "num_train_epochs": 1.5}])
def test_a_training_goes_on_for_as_long_as_asked(trained, length):
    recipe, run, verdicts = trained(train=length)
    assert failed(verdicts) == set()

    steps = run.require("train").metrics["steps"]
    town.edit_json(run, "train/report.json", lambda report: report["metrics"].update(steps=steps - 1))
    assert failed(by_name(recipe, run)) == {"trained_to_the_end"}


def test_steps_that_log_seldom_still_tell_their_rows(trained):
    _, _, verdicts = trained(train={"logging_steps": 5})
    assert failed(verdicts) == set()
