"""What stages left on disk is read back as it was, and what is missing is named with the command that writes it."""

from __future__ import annotations

import math
import shutil

import pytest

from finetune.core.errors import MissingError, StageError
from finetune.core.files import write_json
from finetune.run import Run, evidence, layout
from support.town import edit_json


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path).create()


STEP = {
    "learning_rate": 0.1,
    "grad_norm": None,
    "seconds": 0.1,
    "tokens": 9,
    "trained_tokens": 4,
    "epoch": 0.5,
    "rows": [],
}


def taken(run: Run, stage: str = "train") -> list[tuple[int, float]]:
    return [(step["step"], step["loss"]) for step in evidence.steps(run, stage)]


def log(run: Run, *steps: tuple[int, float], resumed: int | None = None, stage: str = "train") -> None:
    run.event("training", stage=stage, resumed_from=resumed)
    for number, loss in steps:
        run.event("step", stage=stage, **{**STEP, "step": number, "loss": loss})


def test_steps_are_those_of_the_stage_in_order(run):
    log(run, (1, 3.0), (2, 2.0))
    log(run, (1, 0.69), stage="align")
    assert taken(run) == [(1, 3.0), (2, 2.0)]
    assert taken(run, "align") == [(1, 0.69)]
    assert taken(run, "evaluate") == []


def test_a_training_started_anew_drops_what_came_before(run):
    log(run, (1, 3.0), (2, 2.0), (3, 1.0))
    log(run, (1, 5.0))
    assert taken(run) == [(1, 5.0)]


def test_a_resumed_training_drops_what_came_after_its_checkpoint(run):
    log(run, (1, 3.0), (2, 2.0), (3, 1.0), (4, 0.5))
    log(run, (3, 1.5), (4, 1.25), resumed=2)
    assert taken(run) == [(1, 3.0), (2, 2.0), (3, 1.5), (4, 1.25)]
    log(run, (4, 1.0), resumed=3)
    assert taken(run) == [(1, 3.0), (2, 2.0), (3, 1.5), (4, 1.0)]


def test_losses_that_are_no_numbers_come_back_as_they_were(run):
    log(run, (1, math.nan), (2, math.inf), (3, 0.1 + 0.2))
    found = [loss for _, loss in taken(run)]
    assert math.isnan(found[0])
    assert found[1:] == [math.inf, 0.1 + 0.2]


@pytest.mark.parametrize(
    ("read", "name", "stage"),
    [
        (lambda run: evidence.fetched(run), "fetch/model.json", "fetch"),
        (lambda run: evidence.rows(run, layout.TRAIN_ROWS), "prepare/train.jsonl", "prepare"),
        (lambda run: evidence.read(run, layout.ROW_SCORES), "evaluate/rows.json", "evaluate"),
        (lambda run: evidence.required(run, layout.MERGED), "merge/model", "merge"),
    ],
)
def test_what_is_missing_is_named_with_the_command_that_writes_it(run, read, name, stage):
    with pytest.raises(MissingError, match=rf"{name} is not in .*Write it with: finetune {stage} RECIPE"):
        read(run)


def test_what_no_check_could_read_is_not_written(run):
    for write in (
        lambda: evidence.write(run, layout.TEMPLATE, {"name": "chatml"}),
        lambda: evidence.write_rows(run, layout.PROMPTS, [{"prompt": "a", "ids": [1]}, {"prompt": "b", "ids": ["1"]}]),
    ):
        with pytest.raises(StageError, match="is damaged"):
            write()
    assert list(run.path.rglob("*")) == []


def test_rows_whose_last_one_is_cut_short_are_damaged(run):
    file = evidence.write_rows(run, layout.PROMPTS, [{"prompt": "a", "ids": [1]}, {"prompt": "b", "ids": [2]}])
    assert len(evidence.rows(run, layout.PROMPTS)) == 2
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(
        StageError, match=r"prompts\.jsonl is damaged: its last line is cut short\. .*finetune evaluate RECIPE"
    ):
        evidence.rows(run, layout.PROMPTS)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"schema": -1}, "its schema is -1, and this version knows 0 to 1"),
        ({"schema": True}, "its schema is True"),
        ({"schema": 0}, "its schema is 0, and 'asked' is there"),
        ({"asked": ...}, "its schema is 1, and 'asked' is not"),
        ({"files": ...}, "its schema is 1, and 'files' is not"),
        ({"made_with": ...}, "its schema is 1, and 'made_with' is not"),
    ],
)
def test_a_report_of_an_unknown_schema_or_not_whole_as_one_is_damaged(copied, change, why):
    def edit(report):
        report.update(change)
        for key in [key for key, value in report.items() if value is ...]:
            del report[key]

    edit_json(copied.run, "merge/report.json", edit)
    with pytest.raises(StageError) as damaged:
        copied.run.report("merge")
    assert f"merge/report.json is damaged: {why}" in str(damaged.value)


def test_row_scores_need_every_row_before_and_after(run):
    assert evidence.row_scores(run) is None
    score = {"answer": [-3.0, 2], "all": [-4.0, 3]}
    for scores in ({}, {"base": {}}, {"base": {}, "trained": {}}, {"base": {"0": score}}, {"trained": {"0": score}}):
        write_json(run.path / "evaluate" / "rows.json", scores)
        assert evidence.row_scores(run) is None, scores
    write_json(run.path / "evaluate" / "rows.json", {"base": {"0": score, "1": score}, "trained": {"0": score}})
    assert evidence.row_scores(run) is None
    write_json(run.path / "evaluate" / "rows.json", {"base": {"0": score}, "trained": {"0": score, "1": score}})
    assert evidence.row_scores(run) == ({"0": score}, {"0": score, "1": score})


def test_phases_are_the_model_at_each_point_as_far_as_the_run_came(copied):
    run, base = copied.run, evidence.phases(copied.run, copied.recipe)["base"]
    adapters = {"trained": (base[0], run.path / "train/adapter"), "aligned": (base[0], run.path / "align/adapter")}
    assert base[1] is None
    assert (base[0] / "config.json").is_file()
    assert evidence.phases(run, copied.recipe) == {"base": base, **adapters}
    assert evidence.final(run, copied.recipe) == adapters["aligned"]

    run.forget("align")
    assert evidence.phases(run, copied.recipe) == {"base": base, "trained": adapters["trained"]}
    without = copied.recipe.model_copy(update={"align": None})
    assert evidence.final(run, without) == adapters["trained"]
    run.forget("train")
    assert evidence.phases(run, copied.recipe) == {"base": base}


def test_a_stage_that_the_recipe_dropped_is_no_phase(copied):
    """Its report and its adapter may still lie there."""
    without = copied.recipe.model_copy(update={"align": None})
    assert list(evidence.phases(copied.run, without)) == ["base", "trained"]


def test_a_fully_trained_model_takes_the_place_of_the_base(copied):
    run = copied.run
    for stage in ("train", "align"):
        shutil.rmtree(run.path / stage / "adapter")
        (run.path / stage / "model").mkdir()
    assert evidence.phases(run, copied.recipe)["trained"] == (run.path / "train/model", None)
    assert evidence.phases(run, copied.recipe)["aligned"] == (run.path / "align/model", None)
    assert evidence.final(run, copied.recipe) == (run.path / "align/model", None)


def test_a_fetched_adapter_belongs_to_the_base(copied, tmp_path):
    edit_json(copied.run, "fetch/model.json", lambda found: found.update(adapter=str(tmp_path / "adapter")))
    assert evidence.phases(copied.run, copied.recipe)["base"][1] == tmp_path / "adapter"


def test_only_what_a_backend_may_know_of_the_model_is_handed_on(honest):
    assert set(evidence.model_settings(honest.recipe)) == {
        "dtype",
        "device",
        "attn_implementation",
        "trust_remote_code",
    }
