"""A step that cannot be taken: told with its rows and whose fault it is, or got over as the recipe asks; nothing is lost."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.backends import Job
from finetune.backends import failing as failing_steps
from finetune.backends.failing import NoMemoryError, NotFiniteError, StepError
from finetune.backends.fake.training import Training
from finetune.checks import verify
from finetune.cli.app import guarded
from finetune.core.errors import Interrupted, StageError
from finetune.recipe import Recipe
from finetune.run import Run, evidence, layout
from finetune.stages.pipeline import run_directory, run_stages
from finetune.training import recovery
from support.town import MANIFEST, only_training

ROW_CHECKS = ["rows", "optimizer", "loss", "reports"]
Fault = Callable[[Training, list[Any]], None]


@pytest.fixture(autouse=True)
def no_manifest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.run.manifest.collect", lambda recipe: MANIFEST)


@pytest.fixture
def wanted(town: Path, tmp_path: Path) -> Callable[..., Recipe]:
    return lambda **train: only_training(town, tmp_path / "runs", train=train)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[Fault], None]:
    """A function: from now on a training step first does this, with the training and its rows; None mends it."""
    real = Training._loss

    def install(fault: Fault | None) -> None:
        def loss(self: Training, rows: list[Any], gradient: Any) -> Any:
            found = fault(self, rows) if fault and gradient is not None else None
            return (found, {}) if found is not None else real(self, rows, gradient)

        monkeypatch.setattr(Training, "_loss", loss)

    return install


def trained(asked: Recipe) -> Run:
    run = run_directory(asked)
    run_stages(asked, run, ["train"])
    return run


def adapter(run: Run) -> bytes:
    return (run.path / "train" / "adapter" / "adapter.json").read_bytes()


def judged(asked: Recipe, run: Run) -> dict[str, Any]:
    return {verdict.name: verdict for verdict in verify(asked, run, ROW_CHECKS)}


def refuted(asked: Recipe, run: Run) -> set[str]:
    """What does not hold of the training; whatever needs the questions of an evaluation has none here."""
    asked_too = {"loss_is_of_answers", "loss_confirmed", "stages_finished"}
    found = {verdict.name: verdict for verdict in verify(asked, run, ROW_CHECKS)}
    return {name for name, verdict in found.items() if verdict.refuted and "not in" not in verdict.why} - asked_too


def bad_steps(run: Run) -> list[tuple[int, str]]:
    return [(event["step"], event["done"]) for event in run.events("bad_step")]


def nan_at(*steps: int, above: float = 0.0) -> Fault:
    """A loss that is none at these steps, as long as the learning rate is above a bound."""
    return lambda training, rows: (
        math.nan if training.step + 1 in steps and training.options["learning_rate"] > above else None
    )


def fails_at(step: int, error: BaseException) -> Fault:
    def fault(training: Training, rows: list[Any]) -> None:
        if training.step + 1 == step:
            raise error

    return fault


def too_large(training: Training, rows: list[Any]) -> None:
    if training.step + 1 >= 5 and training._batch > 1:
        raise MemoryError


# -- what a step is -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "grad_norm", "what"),
    [
        (1.0, 2.0, ""),
        (1.0, None, ""),
        (math.nan, 2.0, "its loss is nan"),
        (math.inf, None, "its loss is inf"),
        (-math.inf, 2.0, "its loss is -inf"),
        (1.0, math.nan, "its gradient is nan"),
        (1.0, math.inf, "its gradient is inf"),
    ],
)
def test_what_is_no_finite_number_ends_a_training_unless_it_is_asked_for_otherwise(loss, grad_norm, what):
    step = {"step": 3, "loss": loss, "grad_norm": grad_norm, "rows": [4]}

    assert failing_steps.not_finite(loss, grad_norm) == what
    assert not failing_steps.skips({"on_nan": "ignore"}, **step)
    assert failing_steps.skips({"on_nan": "skip"}, **step) == bool(what)
    for stops in ({}, {"on_nan": "stop"}, {"on_nan": "rollback"}):
        if not what:
            assert not failing_steps.skips(stops, **step)
            continue
        with pytest.raises(NotFiniteError, match=what) as told:
            failing_steps.skips(stops, **step)
        assert (told.value.step, told.value.rows) == (3, (4,))


def test_a_step_that_failed_leaves_the_one_before_unless_the_training_goes_further_back():
    nan = NotFiniteError(step=3, loss=math.nan, grad_norm=None, rows=[])
    for error in (nan, NoMemoryError("out of memory", step=3), StepError("ValueError", step=3)):
        for policy in ("stop", "skip", "rollback", "ignore"):
            kept = failing_steps.leaves_checkpoint(error, {"on_nan": policy})
            assert kept == (policy != "rollback" or error is not nan), (error, policy)


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (MemoryError(), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("[METAL] Insufficient Memory"), True),
        (RuntimeError("std::bad_alloc"), True),
        (ValueError("out of memory"), False),
        (RuntimeError("shapes do not match"), False),
    ],
)
def test_what_is_a_lack_of_memory(error, memory):
    assert failing_steps.is_out_of_memory(error) == memory


# -- stop ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "what"),
    [
        (nan_at(8), "its loss is nan"),
        (fails_at(8, MemoryError()), "out of memory"),
        (fails_at(8, RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")), "out of memory"),
        (fails_at(8, ValueError("index 7 is out of range")), "ValueError: index 7 is out of range"),
        (fails_at(8, ConnectionError("gone")), "ConnectionError: gone"),
    ],
)
def test_a_step_that_fails_is_told_with_its_rows_and_the_same_command_goes_on(wanted, failing, fault, what, tmp_path):
    asked = wanted()
    whole = adapter(trained(asked.model_copy(update={"name": "whole"})))
    failing(fault)
    with pytest.raises(StageError) as told:
        trained(asked)

    run = run_directory(asked)
    rows = run.events("bad_step")[0]["rows"]
    lines = [row["line"] for row in evidence.rows(run, layout.TRAIN_ROWS) if row["row"] in rows]
    assert f"step 8 could not be taken (its rows: row {rows[0]} of train.jsonl:" in str(told.value)
    assert all(f"train.jsonl:{line}" in str(told.value) for line in lines)
    assert what in str(told.value)
    assert "checkpoint-7 is kept" in str(told.value)
    assert bad_steps(run) == [(8, "stop")]

    failing(None)
    assert adapter(trained(asked)) == whole
    assert run.events("training")[-1]["resumed_from"] == 7
    assert refuted(asked, run) == set()


def test_no_checkpoint_is_of_a_step_that_was_no_number(wanted, failing):
    failing(nan_at(4))
    with pytest.raises(StageError):
        trained(wanted(save_steps=1))

    left = run_directory(wanted()).path / "train"
    assert sorted(folder.name for folder in left.glob("checkpoint-*")) == [
        "checkpoint-1",
        "checkpoint-2",
        "checkpoint-3",
    ]


def test_a_base_that_is_not_of_numbers_is_refused_at_once(town, tmp_path):
    base = shutil.copytree(town / "model", tmp_path / "model")
    model = json.loads((base / "fake_model.json").read_text(encoding="utf-8"))
    row = next(iter(model["bigram"].values()))
    row[next(iter(row))] = math.nan
    (base / "fake_model.json").write_text(json.dumps(model), encoding="utf-8")
    asked = only_training(town, tmp_path / "runs", model={"path": str(base)})

    with pytest.raises(StageError, match=r"holds NaN or infinity in 1 of its tensors \(first: .*on_nan: ignore"):
        trained(asked)
    trained(only_training(town, tmp_path / "runs", model={"path": str(base)}, train={"on_nan": "ignore"}))


# -- skip ----------------------------------------------------------------------------------------------------------------


def test_a_skipped_step_is_told_and_its_training_holds(wanted, failing):
    asked = wanted(on_nan="skip", max_steps=24, save_steps=12)
    failing(nan_at(9))
    run = trained(asked)

    step = evidence.steps(run, "train")[8]
    assert (step["step"], step["skipped"], math.isnan(step["loss"])) == (9, 1, True)
    assert bad_steps(run) == [(9, "skip")]
    assert "1 of 24 steps were skipped" in " ".join(run.require("train").notes)
    assert refuted(asked, run) == set()
    assert judged(asked, run)["steps_skipped"].measured == pytest.approx(1 / 24)


def test_more_skipped_steps_than_one_in_twenty_are_refuted(wanted, failing):
    asked = wanted(on_nan="skip", max_steps=24, save_steps=12)
    failing(nan_at(9, 10))

    assert refuted(asked, trained(asked)) == {"steps_skipped"}


def test_what_was_skipped_counts_where_the_recipe_asks_for_no_skipping(wanted, failing):
    """The recipe is edited afterwards, and the training is kept: nothing else of it was asked for."""
    asked = wanted(on_nan="skip", max_steps=24, save_steps=12)
    failing(nan_at(9))
    run = trained(asked)

    assert "loss_finite" in refuted(wanted(max_steps=24, save_steps=12), run)


# -- roll back -----------------------------------------------------------------------------------------------------------


def test_a_training_rolls_back_to_its_last_checkpoint_with_half_the_rate(wanted, failing):
    asked = wanted(on_nan="rollback")
    failing(nan_at(8, above=0.6e-4))
    run = trained(asked)

    assert bad_steps(run) == [(8, "rollback")]
    assert [event["resumed_from"] for event in run.events("training")] == [None, 6]
    assert [step["learning_rate"] for step in evidence.steps(run, "train")] == [1e-4] * 6 + [0.5e-4] * 6
    (adapted,) = run.require("train").metrics["adaptations"]
    assert (adapted["step"], adapted["kind"], adapted["learning_rate_share"]) == (6, "rollback", 0.5)
    assert "from step 6: 0.5 of the learning rate (at step 8 its loss is nan)" in " ".join(run.require("train").notes)
    assert refuted(asked, run) == set()


def test_a_rate_halved_without_the_recipes_leave_is_not_as_asked(wanted, failing):
    failing(nan_at(8, above=0.6e-4))
    run = trained(wanted(on_nan="rollback"))

    assert "learning_rate_as_asked" in refuted(wanted(), run)


def test_it_rolls_back_to_the_beginning_where_there_is_no_checkpoint(wanted, failing):
    failing(nan_at(2, above=0.6e-4))
    asked = wanted(on_nan="rollback")
    run = trained(asked)

    assert {step["learning_rate"] for step in evidence.steps(run, "train")} == {0.5e-4}
    assert len(evidence.steps(run, "train")) == 12
    assert refuted(asked, run) == set()


def test_what_no_rate_mends_ends_after_three_times(wanted, failing):
    failing(nan_at(8))
    with pytest.raises(StageError, match="step 8 could not be taken"):
        trained(wanted(on_nan="rollback"))

    assert bad_steps(run_directory(wanted())) == [(8, "rollback")] * 3 + [(8, "stop")]


# -- shrink --------------------------------------------------------------------------------------------------------------


def test_a_batch_that_does_not_fit_is_shrunk_and_the_steps_stay_the_same(wanted, failing):
    asked = wanted(on_oom="shrink")
    whole = trained(asked.model_copy(update={"name": "whole"}))
    failing(too_large)
    run = trained(asked)

    assert bad_steps(run) == [(5, "shrink")]
    assert run.events("training")[-1]["resumed_from"] == 4, "the step before, not the last checkpoint of the recipe"
    (adapted,) = run.require("train").metrics["adaptations"]
    assert (adapted["per_device_train_batch_size"], adapted["gradient_accumulation_steps"]) == (1, 3)
    rows = [[step["rows"] for step in evidence.steps(each, "train")] for each in (whole, run)]
    assert rows[0] == rows[1]
    assert adapter(run) == adapter(whole)
    assert refuted(asked, run) == set()


def test_a_training_that_was_shrunk_and_stopped_goes_on_as_it_was_shrunk(wanted, failing, monkeypatch, capsys):
    asked = wanted(on_oom="shrink")
    whole = adapter(trained(asked.model_copy(update={"name": "whole"})))

    def stopping(training: Training, rows: list[Any]) -> None:
        too_large(training, rows)
        if training.step + 1 == 10:
            raise Interrupted("now")

    failing(stopping)
    with pytest.raises(Interrupted):
        trained(asked)
    sizes: list[int] = []
    failing(lambda training, rows: sizes.append(training._batch))
    run = trained(asked)

    assert "going on as adapted from step 4: per_device_train_batch_size 1" in capsys.readouterr().err
    assert set(sizes) == {1}
    assert adapter(run) == whole
    assert refuted(asked, run) == set()


@pytest.mark.parametrize(
    ("policy", "fault"), [({"on_oom": "shrink"}, too_large), ({"on_nan": "rollback"}, nan_at(8, above=0.6e-4))]
)
def test_the_experiment_of_a_resume_goes_on_as_the_training_was_adapted(town, failing, tmp_path, policy, fault):
    asked = only_training(town, tmp_path / "runs", train=policy, expect={"resume": True})
    failing(fault)
    run = run_directory(asked)
    run_stages(asked, run, ["train", "measure"])

    assert run.events("bad_step")
    assert [v.name for v in verify(asked, run, ["resume"]) if v.refuted] == []


@pytest.mark.parametrize(
    ("nan", "large_from", "kinds"),
    [(8, 5, ["shrink", *["rollback"] * 3]), (3, 9, [*["rollback"] * 3, "shrink"])],
    ids=["shrunk, then rolled back", "rolled back, then shrunk"],
)
def test_what_was_adapted_before_stays_so(wanted, failing, nan, large_from, kinds):
    """Each rollback halves the rate again, a shrunk batch keeps it, and no shrinking counts as a rollback."""
    asked = wanted(on_nan="rollback", on_oom="shrink")

    def fault(training: Training, rows: list[Any]) -> float | None:
        if training.step + 1 >= large_from and training._batch > 1:
            raise MemoryError
        return nan_at(nan, above=0.2e-4)(training, rows)  # type: ignore[func-returns-value]

    failing(fault)
    run = trained(asked)

    adapted = run.require("train").metrics["adaptations"]
    assert [each["kind"] for each in adapted] == kinds
    assert adapted[-1]["learning_rate_share"] == 1 / 8
    assert adapted[-1]["per_device_train_batch_size"] == 1
    assert refuted(asked, run) <= {"loss_end"}, "an eighth of the rate learns less"


def test_one_row_that_does_not_fit_ends_the_training(wanted, failing):
    failing(fails_at(5, MemoryError()))
    with pytest.raises(StageError, match=r"out of memory.*Lower train\.per_device_train_batch_size") as told:
        trained(wanted(on_oom="shrink"))
    assert "on_oom" not in str(told.value), "that is what it did"


@pytest.mark.parametrize(
    ("batch", "accumulation", "smaller"), [(8, 1, 4), (3, 1, 1), (6, 2, 3), (3, 2, 1), (2, 5, 1), (5, 2, 2), (9, 1, 3)]
)
def test_the_smaller_batch_makes_up_the_same_step(batch, accumulation, smaller):
    assert recovery._smaller(batch, accumulation) == smaller
    assert batch * accumulation % smaller == 0


def test_a_report_that_tells_no_adaptation_is_found_out(wanted, failing):
    asked = wanted(on_oom="shrink")
    failing(too_large)
    run = trained(asked)
    file = run.path / "train" / "report.json"
    report = json.loads(file.read_text(encoding="utf-8"))
    del report["metrics"]["adaptations"]
    file.write_text(json.dumps(report), encoding="utf-8")

    assert "report_as_logged" in refuted(asked, run)


# -- whose fault ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("losses", "settings", "blamed"),
    [
        ([2.0, 1.9, 1.8], {}, "most likely these rows' fault"),
        (
            [2.0, 1.9, 30.0],
            {},
            "learning rate's fault: the loss had risen from 1.9 to 30 at train.learning_rate 0.1. Set 0.01",
        ),
        ([2.0, 1.9, 3.9], {}, "learning rate's fault: the loss had risen from 1.9 to 3.9"),
        ([2.0, 1.9, 30.0], {"dtype": "float16"}, "precision's fault: float16 holds numbers up to 65,504"),
        ([2.0, 1.9, 30.0], {"fp16": True}, "precision's fault: float16 holds numbers up to 65,504"),
        ([], {}, "fault of the base or of these rows"),
    ],
)
def test_a_step_that_is_no_number_says_whose_fault_it_most_likely_is(losses, settings, blamed, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"row": 4, "file": "data.jsonl", "line": 5}\n', encoding="utf-8")
    job = Job(
        objective="sft", method="lora", model=tmp_path, out=tmp_path / "out", rows=rows, settings=settings,
        options={"learning_rate": 0.1, "per_device_train_batch_size": 2, "fp16": settings.get("fp16", False)},
    )  # fmt: skip
    error = NotFiniteError(step=len(losses) + 1, loss=math.nan, grad_norm=None, rows=[4])

    said = str(recovery.ended(error, job, [{"loss": loss} for loss in losses]))
    assert blamed in said
    assert "row 4 of data.jsonl:5" in said
    assert "The same command" not in said, "there is no checkpoint to go on from"


def test_rows_beyond_four_are_counted(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(f'{{"row": {n}, "file": "d.jsonl", "line": {n + 1}}}\n' for n in range(9)), encoding="utf-8"
    )
    job = Job(
        objective="dpo",
        method="lora",
        model=tmp_path,
        out=tmp_path / "out",
        rows=rows,
        options={"per_device_train_batch_size": 1},
    )
    said = str(recovery.ended(StepError("it broke", step=3, rows=range(9)), job, []))

    assert said.startswith("align: step 3 could not be taken (its rows: row 0 of d.jsonl:1, ")
    assert "row 3 of d.jsonl:4 and 5 more): it broke." in said
    assert "Lower align.per_device_train_batch_size" in str(
        recovery.ended(NoMemoryError("out of memory", step=1), job, [])
    )


# -- ended at the worst moment -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", ["event", "rename"])
@pytest.mark.parametrize("name", ["recipe.yaml", "prepare/report.json", "train/report.json"])
def test_a_run_that_ends_as_a_file_gets_its_name_is_whole_after_the_same_command(town, tmp_path, monkeypatch, name, at):
    """The log knows of the file by then, or nobody would ever tell it."""
    asked = only_training(town, tmp_path / "runs")
    run = run_directory(asked)
    rename, event = Path.replace, Run.event

    def renamed(self: Path, target: Path) -> Path:
        if at == "rename" and str(target) == str(run.path / name):
            raise KeyboardInterrupt
        return rename(self, target)

    def told(self: Run, kind: str, **values: Any) -> None:
        of = "recipe.yaml" if kind == "recipe" else f"{values.get('stage')}/report.json"
        if at == "event" and kind in ("recipe", "stage_finished") and of == name:
            raise KeyboardInterrupt
        event(self, kind, **values)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", renamed)
        patch.setattr(Run, "event", told)
        with pytest.raises(KeyboardInterrupt):
            run_stages(asked, run, ["train"])
    assert not (run.path / name).exists()
    run_stages(asked, run, ["train"])

    (verdict,) = [verdict for verdict in verify(asked, run, ["records"]) if verdict.name == "told_of"]
    assert f"it does not tell that the stage {Path(name).parent} ended" not in verdict.why
    assert "which recipe was stored" not in verdict.why


def test_a_lack_of_memory_anywhere_is_told_as_that(capsys):
    def lacking() -> None:
        raise MemoryError

    assert guarded(lacking) == 4
    said = capsys.readouterr().err
    assert "error: out of memory" in said
    assert "unexpected" not in said
