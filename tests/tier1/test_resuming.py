"""A resume is the same training, or it is said: on the fake backend, every way in which it may be another."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from finetune.backends import get
from finetune.backends.fake.model import make_model
from finetune.checks import NOT_EXAMINED, verify
from finetune.cli.app import cli
from finetune.core.errors import Faults, FinetuneError, Interrupted, UsageError
from finetune.core.files import write_jsonl
from finetune.recipe import Recipe, dump, schedule
from finetune.run import Run, evidence, identity
from finetune.run.identity import WITHOUT_EFFECT, Past, Record
from finetune.stages.pipeline import checkpoint, run_directory, run_stages
from support.town import (
    KNOWN,
    MANIFEST,
    as_of_0_1,
    build,
    checkpoint_as_written,
    edit_json,
    facts,
    only_training,
    recipe,
)

COSINE = {"lr_scheduler_type": "cosine", "warmup_steps": 2}
EPOCHS = {"max_steps": -1, "num_train_epochs": 2}  # of 2 steps each
Training = Callable[..., tuple[Recipe, Run]]


@pytest.fixture(autouse=True)
def no_manifest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.run.manifest.collect", lambda recipe: MANIFEST)


@pytest.fixture
def wanted(town: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """A function: the town's recipe of a training, with changes."""
    return lambda **changes: only_training(town, tmp_path / "runs", **changes)


@pytest.fixture
def run(wanted: Callable[..., Recipe]) -> Run:
    """A training of 12 steps, with a checkpoint after every third."""
    asked = wanted()
    made = run_directory(asked)
    run_stages(asked, made, ["train"])
    return made


def resume(asked: Recipe, run: Run, name: str = "checkpoint-6", stage: str = "train", **more: Any) -> None:
    run_stages(asked, run, [stage], resume=checkpoint(asked, run, stage, name), **more)


def verdicts(asked: Recipe, run: Run) -> dict[str, Any]:
    return {verdict.name: verdict for verdict in verify(asked, run, ["rows", "optimizer"])}


def failed(asked: Recipe, run: Run) -> set[str]:
    return {name for name, verdict in verdicts(asked, run).items() if verdict.refuted}


def tensors(run: Run) -> Any:
    return get("fake").tensors(run.path / "train" / "adapter")


# -- the same training -------------------------------------------------------------------------------------------------


def test_a_checkpoint_says_what_it_is_of(run):
    record = identity.read(run.path / "train" / "checkpoint-6")

    assert record is not None
    assert json.loads((run.path / "train/checkpoint-6/finetune.json").read_text())["schema"] == 1
    training = record.training
    assert (training.backend, training.objective, training.method) == ("fake", "sft", "lora")
    assert (training.rows.file, training.rows.count) == ("prepare/train.jsonl", 6)
    assert training.options["learning_rate"] == 1e-4
    assert training.lora is not None and training.lora["r"] == 8
    fetched = evidence.fetched(run)["files"]
    assert training.model == {name: facts["sha256"] for name, facts in fetched.items()}
    assert record.past == Past(steps_watched=6, plans=((0, 12),))


def test_an_honest_resume_has_the_verdicts_of_an_uninterrupted_training(run, wanted):
    straight, weights = verdicts(wanted(), run), tensors(run)
    resume(wanted(), run)

    again = verdicts(wanted(), run)
    assert again.keys() == straight.keys()
    assert [name for name, verdict in again.items() if verdict.refuted] == []
    assert tensors(run) == weights
    assert "each of 12 steps" in again["steps_move_weights"].why
    metrics = run.require("train").metrics
    assert (metrics["plans"], metrics["changed"], metrics["unexamined"]) == ([[0, 12]], [], [])
    assert run.events("resumed")[-1] | {"time": "", "prev": ""} == {
        "time": "", "prev": "", "event": "resumed", "stage": "train", "step": 6, "examined": True,
        "changed": [], "longer": None,
        "checkpoint": str(run.path / "train" / "checkpoint-6"),
    }  # fmt: skip
    assert run.require("train").notes == []


def test_steps_without_effect_before_a_resume_are_not_forgotten(run, wanted):
    edit_json(run, "train/checkpoint-6/finetune.json", lambda record: record["past"].update(steps_without_effect=2))
    checkpoint_as_written(run, "checkpoint-6")
    resume(wanted(), run)
    assert verdicts(wanted(), run)["steps_move_weights"].measured == 2


def test_what_makes_no_other_training_may_differ(run, wanted, tmp_path):
    weights = tensors(run)
    other = {"logging_steps": 2, "save_strategy": "epoch", "save_steps": 5, "save_total_limit": 9}
    other |= {"on_oom": "shrink", "on_nan": "skip", "dataloader_num_workers": 1, "output_dir": str(tmp_path / "out")}
    asked = wanted(train=other, model={"path": str(wanted().model.path), "device": "cpu"})
    resume(asked, run)

    assert tensors(run) == weights
    assert failed(asked, run) == set()
    assert {*other, "device", "report_to"} - {"output_dir"} == set(WITHOUT_EFFECT)


def test_the_same_rows_from_another_file_are_the_same(run, wanted, tmp_path):
    write_jsonl(tmp_path / "moved.jsonl", facts())
    asked = wanted(data={"path": str(tmp_path / "moved.jsonl")})
    resume(asked, run)
    assert failed(asked, run) == set()


def test_a_resume_drops_the_checkpoints_after_its_own(run, wanted):
    resume(wanted(train={"save_strategy": "no"}), run)
    assert sorted(path.name for path in (run.path / "train").glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]


@pytest.mark.parametrize("stage", ["train", "align"])
def test_resuming_at_the_last_step_gives_the_result_of_that_checkpoint(town, tmp_path, stage):
    asked = recipe(town, tmp_path / "runs", expect={"resume": False})
    run = run_directory(asked)
    run_stages(asked, run, [stage])
    adapter = run.path / stage / "adapter"
    weights, steps = get("fake").tensors(adapter), len(evidence.steps(run, stage))
    resume(asked, run, f"checkpoint-{steps}", stage)

    assert get("fake").tensors(adapter) == weights
    assert len(evidence.steps(run, stage)) == run.require(stage).metrics["steps"] == steps
    failures = {v.name for v in verify(asked, run, ["rows", "optimizer"]) if v.refuted}
    assert {name for name in failures if not (stage == "train" and name.startswith("dpo_"))} == set()


def test_a_training_that_stopped_early_takes_no_step_more(wanted):
    patience = {"early_stopping_patience": 2, "early_stopping_threshold": 100.0}
    train = {"eval_strategy": "steps", "eval_steps": 3, "max_steps": 20, **patience}
    asked = wanted(data={"eval_fraction": 0.34}, train=train)
    run = run_directory(asked)
    run_stages(asked, run, ["train"])
    weights = tensors(run)
    resume(asked, run, "checkpoint-9")

    assert run.require("train").metrics["steps"] == 9
    assert tensors(run) == weights


# -- another training --------------------------------------------------------------------------------------------------

CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "rate": ({"learning_rate": 2e-4}, "train.learning_rate 0.0001 -> 0.0002"),
    "batch": ({"per_device_train_batch_size": 2}, "train.per_device_train_batch_size 3 -> 2"),
    "accumulation": ({"gradient_accumulation_steps": 2}, "train.gradient_accumulation_steps 1 -> 2"),
    "schedule": ({"lr_scheduler_type": "linear"}, "train.lr_scheduler_type constant -> linear"),
    "warm-up": ({"warmup_steps": 0.5}, "train.warmup_steps 0.0 -> 0.5"),
    "seed": ({"seed": 1}, "train.seed 0 -> 1"),
    "order": ({"data_seed": 1}, "train.data_seed nothing -> 1"),
    "decay": ({"weight_decay": 0.1}, "train.weight_decay 0.0 -> 0.1"),
    "beta": ({"adam_beta2": 0.9}, "train.adam_beta2 0.999 -> 0.9"),
    "clipping": ({"max_grad_norm": 0.5}, "train.max_grad_norm 1.0 -> 0.5"),
    "packing": ({"packing": True}, "train.packing False -> True"),
    "shorter": ({"max_steps": 9}, "train.max_steps 12 -> 9"),
    "by epochs": ({"max_steps": -1}, "train.max_steps 12 -> -1"),
}
FIXED: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"lora": {"r": 4, "lora_alpha": 16}}, "train.lora.r 8 -> 4"),
    "alpha": ({"lora": {"r": 8, "lora_alpha": 8}}, "train.lora.lora_alpha 16.0 -> 8.0"),
    "method": ({"method": "full"}, "train.method lora -> full"),
    "optimizer": ({"optim": "sgd"}, "train.optim adamw_torch -> sgd"),
}


@pytest.mark.parametrize(("train", "phrase"), (CHANGES | FIXED).values(), ids=CHANGES | FIXED)
def test_another_training_is_refused_by_name_before_anything_is_touched(run, wanted, train, phrase):
    within = run.path / "train" if "seed" in train else run.path  # another seed may choose other rows: they come first
    before = {path: path.read_bytes() for path in within.rglob("*") if path.is_file()}
    with pytest.raises(Faults, match="checkpoint-6 is of another training") as refused:
        resume(wanted(train=train), run)

    assert phrase in refused.value.faults
    assert refused.value.exit_code == 2
    assert before == {path: path.read_bytes() for path in within.rglob("*") if path.is_file()}


def test_all_that_differs_is_said_at_once(run, wanted, town, tmp_path):
    write_jsonl(tmp_path / "more.jsonl", [*facts(), {"prompt": "What is the capital of Aa?", "completion": "It is B."}])
    make_model(tmp_path / "relative", dict(list(KNOWN.items())[1:]))
    asked = wanted(
        data={"path": str(tmp_path / "more.jsonl")}, model={"path": str(tmp_path / "relative"), "dtype": "bfloat16"},
        train={"learning_rate": 2e-4, "seed": 3},
    )  # fmt: skip
    with pytest.raises(Faults, match="--resume --changed, or start anew with --force") as refused:
        resume(asked, run)

    assert refused.value.faults == [
        "train.learning_rate 0.0001 -> 0.0002",
        "train.seed 0 -> 3",
        "model.dtype float32 -> bfloat16",
        "prepare/train.jsonl has other rows (6 -> 7)",
        "the base model is another: config.json, fake_model.json",
    ]
    assert run.report("train") is not None
    assert run.events("stage_failed") == []


def test_another_chat_template_is_another_training(run, wanted):
    with pytest.raises(Faults) as refused:
        resume(wanted(template={"name": "alpaca"}), run)
    assert "the chat template is another" in refused.value.faults


def test_as_many_other_rows_are_other_rows(run, wanted, tmp_path):
    write_jsonl(tmp_path / "other.jsonl", [*facts()[:5], {"prompt": "What is the capital of Aa?", "completion": "B."}])
    with pytest.raises(Faults, match=r"prepare/train\.jsonl has other rows \(6, as before\)"):
        resume(wanted(data={"path": str(tmp_path / "other.jsonl")}), run)


def edit_the_base(run: Run) -> None:
    """In its place, after it was fetched: another model of the same shapes."""
    make_model(Path(evidence.fetched(run)["base"]), dict(list(KNOWN.items())[1:]))


@pytest.fixture
def alone(tmp_path: Path) -> Callable[..., Recipe]:
    """As `wanted`, of a town that no other test reads."""
    build(tmp_path / "town")
    return lambda **changes: only_training(tmp_path / "town", tmp_path / "runs", **changes)


def test_a_base_that_was_edited_in_its_place_is_another(alone):
    run = run_directory(alone())
    run_stages(alone(), run, ["train"])
    edit_the_base(run)
    with pytest.raises(Faults) as refused:
        resume(alone(), run)
    assert refused.value.faults == ["the base model is another: config.json, fake_model.json"]


def test_held_out_rows_belong_to_a_training(wanted, run):
    with pytest.raises(Faults, match=r"prepare/eval\.jsonl: held-out rows are new"):
        resume(wanted(data={"eval_fraction": 0.2}), run)


@pytest.mark.parametrize(("train", "phrase"), FIXED.values(), ids=FIXED)
def test_nobody_goes_on_with_another_geometry_or_optimizer(run, wanted, train, phrase):
    with pytest.raises(Faults, match="; start anew with --force:") as refused:
        resume(wanted(train=train), run, changed=True)
    assert phrase in refused.value.faults


@pytest.mark.parametrize("changed", [False, True])
def test_a_checkpoint_without_its_optimizer_is_refused(run, wanted, changed):
    (run.path / "train" / "checkpoint-6" / "optimizer.json").unlink()
    with pytest.raises(UsageError, match=r"checkpoint-6 is damaged \(optimizer.json is gone"):
        resume(wanted(), run, changed=changed)
    as_of_0_1(run)
    with pytest.raises(Faults, match="checkpoint-6 has no optimizer.json, so its optimizer would start anew"):
        resume(wanted(), run, changed=changed)


def test_an_alignment_of_another_adapter_is_refused(town, tmp_path):
    asked = recipe(town, tmp_path / "runs")
    run = run_directory(asked)
    run_stages(asked, run, ["align"])
    other = recipe(town, tmp_path / "runs", train={"seed": 5}, align={"beta": 0.2})
    with pytest.raises(Faults) as refused:
        resume(other, run, "checkpoint-6", "align")

    assert refused.value.faults == ["the adapter it goes on from is another: train/adapter", "align.beta 0.1 -> 0.2"]


def test_a_plan_that_ends_before_the_checkpoint_is_refused(run, wanted):
    with pytest.raises(UsageError, match="the checkpoint is of step 6, and the recipe plans 4 steps"):
        resume(wanted(train=EPOCHS), run, changed=True)


def test_a_record_that_cannot_be_read_is_refused(run, wanted):
    (run.path / "train" / "checkpoint-6" / "finetune.json").write_text('{"schema": 1}')
    checkpoint_as_written(run, "checkpoint-6")
    with pytest.raises(UsageError, match=r"finetune\.json is no record of a training that this version can read"):
        resume(wanted(), run)


def test_insisting_goes_on_and_is_recorded(run, wanted):
    asked = wanted(train={"learning_rate": 2e-4, "per_device_train_batch_size": 2})
    resume(asked, run, changed=True)

    phrases = ["train.per_device_train_batch_size 3 -> 2", "train.learning_rate 0.0001 -> 0.0002"]
    report = run.require("train")
    assert run.events("resumed")[-1]["changed"] == phrases
    assert report.metrics["changed"] == [f"from step 6: {phrase}" for phrase in phrases]
    assert report.notes == [f"went on although this became another: from step 6: {phrase}" for phrase in phrases]
    found = verdicts(asked, run)
    assert not found["one_training"].passed
    assert "train.learning_rate 0.0001 -> 0.0002" in found["one_training"].why
    assert found["one_training"].measured == 2
    # The first 6 steps took 3 rows each, the others 2.
    assert "5.00 epochs" in found["trained_to_the_end"].why

    resume(asked, run, "checkpoint-9")
    assert run.require("train").metrics["changed"] == report.metrics["changed"], (
        "a change is forgotten by the next resume"
    )
    assert failed(asked, run) >= {"one_training"}


# -- the same training, for longer -------------------------------------------------------------------------------------


def rates(run: Run, *parts: tuple[int, int]) -> list[tuple[float, float]]:
    """(logged, wanted) of every step; `parts` are (last step, total planned) of each part of the training."""
    wanted = []
    for step in evidence.steps(run, "train"):
        total = next(total for last, total in parts if step["step"] <= last)
        wanted.append((step["learning_rate"], schedule.learning_rate("cosine", 1e-4, 2, step["step"], total)))
    return wanted


def test_training_for_more_steps_is_honest(wanted):
    asked = wanted(train=COSINE)
    run = run_directory(asked)
    run_stages(asked, run, ["train"])
    straight = set(verdicts(asked, run))
    longer = wanted(train={**COSINE, "max_steps": 20})
    resume(longer, run, "last")

    assert failed(longer, run) == set()
    assert set(verdicts(longer, run)) == straight
    metrics = run.require("train").metrics
    assert metrics["plans"] == [[0, 12], [12, 20]]
    assert all(math.isclose(*pair) for pair in rates(run, (12, 12), (20, 20)))
    assert run.events("resumed")[-1]["longer"] == "train.max_steps 12 -> 20"
    assert "(cosine, 0.0001, 12, then 20 steps)" in verdicts(longer, run)["learning_rate_as_asked"].why
    resume(longer, run, "checkpoint-15")
    assert run.require("train").metrics["plans"] == [[0, 12], [12, 20]]
    assert failed(longer, run) == set()


def test_a_rate_of_the_old_plan_after_the_resume_is_off_the_schedule(wanted):
    run = run_directory(wanted(train=COSINE))
    run_stages(wanted(train=COSINE), run, ["train"])
    longer = wanted(train={**COSINE, "max_steps": 20})
    resume(longer, run, "checkpoint-6")
    assert failed(longer, run) == set()

    edit_json(run, "train/report.json", lambda report: report["metrics"].update(plans=[[0, 12], [9, 20]]))
    assert failed(longer, run) == {"learning_rate_as_asked"}


def test_training_for_more_epochs_is_honest(wanted):
    run = run_directory(wanted(train={**COSINE, **EPOCHS}))
    run_stages(wanted(train={**COSINE, **EPOCHS}), run, ["train"])
    longer = wanted(train={**COSINE, **EPOCHS, "num_train_epochs": 4})
    resume(longer, run, "last")

    found = verdicts(longer, run)
    assert failed(longer, run) == set()
    assert "8 steps, 4.00 epochs; the recipe asks for 4 epochs" in found["trained_to_the_end"].why
    assert run.require("train").metrics["plans"] == [[0, 4], [4, 8]]


def test_epochs_are_counted_by_rows_and_not_as_they_are_logged(wanted):
    asked = wanted(train=EPOCHS)
    run = run_directory(asked)
    run_stages(asked, run, ["train"])
    events = run.events()
    run.events_path.unlink()
    for event in events:
        run.event(event.pop("event"), **event | ({"epoch": 2 * event["epoch"]} if "epoch" in event else {}))
    assert "4 steps, 2.00 epochs" in verdicts(asked, run)["trained_to_the_end"].why


# -- a checkpoint of an earlier version --------------------------------------------------------------------------------


def test_a_checkpoint_of_an_earlier_version_goes_on_and_it_is_said(run, wanted, capsys):
    as_of_0_1(run)
    weights = tensors(run)
    resume(wanted(), run)

    assert tensors(run) == weights
    said = [line for line in capsys.readouterr().err.splitlines() if "earlier version" in line]
    assert said == [
        "train: checkpoint-6 is of an earlier version; whether it is of this same training cannot be examined"
    ]
    assert run.require("train").metrics["unexamined"] == [6]
    assert run.events("resumed")[-1]["examined"] is False
    verdict = verdicts(wanted(), run)["one_training"]
    assert (verdict.measured, verdict.outcome) == (None, NOT_EXAMINED)
    assert "earlier version at step 6" in verdict.why
    assert failed(wanted(), run) == set()

    resume(wanted(), run, "checkpoint-9")
    assert verdicts(wanted(), run)["one_training"].outcome == NOT_EXAMINED


def test_a_training_that_an_earlier_version_resumed_is_not_proven_the_same(run, wanted):
    def as_it_was(report: dict[str, Any]) -> None:
        for key in ("plans", "changed", "unexamined", "steps_watched"):
            del report["metrics"][key]

    edit_json(run, "train/report.json", as_it_was)
    assert verdicts(wanted(), run)["one_training"].passed
    edit_json(run, "train/report.json", lambda report: report["metrics"].update(resumed_from=6))
    assert verdicts(wanted(), run)["one_training"].outcome == NOT_EXAMINED


@pytest.mark.parametrize("name", ["rank", "alpha", "method"])
def test_an_adapter_of_another_geometry_is_known_without_a_record(run, wanted, name):
    as_of_0_1(run)
    train, phrase = FIXED[name]
    with pytest.raises(Faults) as refused:
        resume(wanted(train=train), run)
    assert phrase.removesuffix(".0").replace("16.0", "16.0") in "; ".join(refused.value.faults)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES: dict[str, tuple[str, Callable[[Path], Any]]] = {
    f"{file} {how}": (file, change)
    for file in ("adapter.json", "optimizer.json", "trainer_state.json", "finetune.json", "digests.json")
    for how, change in {
        "empty": lambda path: path.write_bytes(b""),
        "nested without end": lambda path: path.write_text("[" * 200_000),
        "flipped": flip,
        "cut": halve,
        "gone": Path.unlink,
    }.items()
}


# -- going on by itself ------------------------------------------------------------------------------------------------


@pytest.fixture
def stop(monkeypatch) -> Callable[[Recipe], Run]:
    """A function: a training that Ctrl-C ended after 5 of 12 steps."""

    def stopping(asked: Recipe) -> Run:
        event = Run.event

        def at_the_fourth(self: Run, kind: str, **values: Any) -> None:
            event(self, kind, **values)
            if kind == "step" and values["step"] == 4:
                os.kill(os.getpid(), signal.SIGINT)

        monkeypatch.setattr(Run, "event", at_the_fourth)
        run = run_directory(asked)
        with pytest.raises(Interrupted):
            run_stages(asked, run, ["train"])
        monkeypatch.setattr(Run, "event", event)
        return run

    return stopping


@pytest.fixture
def stopped(wanted, stop) -> Run:
    return stop(wanted())


def begins(run: Run) -> list[int | None]:
    return [event["resumed_from"] for event in run.events("training", stage="train")]


def test_a_checkpoint_of_an_interruption_says_what_it_is_of(stopped):
    record = identity.read(stopped.path / "train" / "checkpoint-5")
    assert record is not None
    assert record.past == Past(steps_watched=5, plans=((0, 12),))


@pytest.mark.parametrize(
    ("train", "why"),
    [
        ({"learning_rate": 2e-4}, "train.learning_rate 0.0001 -> 0.0002"),
        ({"lora": {"r": 4}}, "train.lora.r 8 -> 4"),
    ],
)
def test_what_does_not_go_on_by_itself_says_why(stopped, wanted, capsys, train, why):
    run_stages(wanted(train=train), stopped, ["train"])

    assert begins(stopped) == [None, None]
    said = capsys.readouterr().err
    assert "train: starting anew, not from checkpoint-5, where it was stopped: " in said
    assert why in said


def test_over_a_base_that_was_edited_in_its_place_a_training_starts_anew(alone, stop, capsys):
    stopped = stop(alone())
    edit_the_base(stopped)
    run_stages(alone(), stopped, ["train"])
    assert begins(stopped) == [None, None]
    said = capsys.readouterr().err
    assert "fetch runs again: " in said
    assert "config.json was changed after it was fetched" in said
    assert "the base model is another: config.json, fake_model.json" in said


def test_a_longer_plan_goes_on_by_itself_and_it_is_said(stopped, wanted, capsys):
    run_stages(wanted(train={"max_steps": 20}), stopped, ["train"])
    assert begins(stopped) == [None, 5]
    assert "the same training goes on for longer (train.max_steps 12 -> 20)" in capsys.readouterr().err
    assert stopped.require("train").metrics["plans"] == [[0, 12], [5, 20]]


def test_what_is_saved_more_often_goes_on_by_itself(stopped, wanted, capsys):
    run_stages(wanted(train={"save_steps": 2}), stopped, ["train"])
    assert begins(stopped) == [None, 5]
    assert "going on from checkpoint-5" in capsys.readouterr().err


@pytest.mark.parametrize(("train", "expected"), [({}, [None, 5]), ({"learning_rate": 2e-4}, [None, None])])
def test_without_a_record_the_same_inputs_go_on_by_themselves(stopped, wanted, capsys, train, expected):
    as_of_0_1(stopped)
    run_stages(wanted(train=train), stopped, ["train"])
    assert begins(stopped) == expected
    assert "earlier version" in capsys.readouterr().err


@pytest.fixture
def straight(wanted, tmp_path) -> Run:
    """The same training, uninterrupted."""
    run = Run(tmp_path / "straight")
    run_stages(wanted(), run, ["train"])
    return run


@pytest.mark.parametrize(("name", "damage"), DAMAGES.items(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(stopped, wanted, straight, capsys, name, damage):
    file, change = damage
    change(stopped.path / "train" / "checkpoint-5" / file)
    run_stages(wanted(), stopped, ["train"])
    assert begins(stopped)[-1] == 3
    said = capsys.readouterr().err
    named = file if name != "digests.json flipped" else ""  # one of the others has another digest then
    assert f"train: checkpoint-5 is damaged and passed over: {named}" in said
    assert tensors(stopped) == tensors(straight)


def test_where_no_checkpoint_is_whole_a_training_starts_anew_and_it_is_said(stopped, wanted, capsys):
    for folder in (stopped.path / "train").glob("checkpoint-*"):
        (folder / "optimizer.json").write_text("")
    run_stages(wanted(), stopped, ["train"])
    assert begins(stopped) == [None, None]
    said = capsys.readouterr().err
    assert "train: starting anew, since no checkpoint is whole" in said
    assert "train: the checkpoints of the training before are deleted (checkpoint-3, checkpoint-5)" in said


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), MemoryError(), ConnectionError("tracker"), EOFError(), ValueError()],
)
def test_whatever_ended_a_training_it_goes_on(wanted, straight, monkeypatch, capsys, tmp_path, error):
    event = Run.event

    def at_the_eighth(self: Run, kind: str, **values: Any) -> None:
        if kind == "step" and values["step"] == 8:
            raise error
        event(self, kind, **values)

    failed = Run(tmp_path / "failed")
    monkeypatch.setattr(Run, "event", at_the_eighth)
    with pytest.raises((FinetuneError, OSError, ValueError)):
        run_stages(wanted(), failed, ["train"])
    monkeypatch.setattr(Run, "event", event)
    run_stages(wanted(), failed, ["train"])

    assert begins(failed) == [None, 6]
    assert "train: going on from checkpoint-6, where it was stopped" in capsys.readouterr().err
    assert tensors(failed) == tensors(straight)
    assert [step["step"] for step in evidence.steps(failed, "train")] == list(range(1, 13))


# -- the command line --------------------------------------------------------------------------------------------------


def test_the_command_line_refuses_with_2_and_goes_on_when_told(run, wanted, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(dump(wanted()), encoding="utf-8")
    command = ["train", str(file), "--run", str(run.path), "--set", "train.seed=4", "--resume", "checkpoint-6"]
    refused = CliRunner().invoke(cli, command, prog_name="finetune")

    assert refused.exit_code == 2
    assert "train.seed 0 -> 4" in refused.stderr
    assert "--resume --changed" in refused.stderr
    assert CliRunner().invoke(cli, [*command, "--changed"], prog_name="finetune").exit_code == 0
    assert run.require("train").metrics["changed"] == ["from step 6: train.seed 0 -> 4"]


# -- the record itself -------------------------------------------------------------------------------------------------


def since(**facts: Any) -> dict[str, Any]:
    """What a training of 3 steps has measured."""
    return {"steps_watched": 3, "planned_steps": 12, **facts}


def test_the_past_keeps_the_first_move_the_largest_norm_and_what_is_no_number():
    first = Past().grown(since(first_move=0.99, clipped_norm=0.5, steps_without_effect=1))
    then = first.model_copy(update={"plans": (*first.plans, (3, None))}).grown(
        since(first_move=7.0, clipped_norm=0.4, steps_without_effect=0)
    )

    assert (then.first_move, then.clipped_norm) == (0.99, 0.5)
    assert (then.steps_watched, then.steps_without_effect, then.plans) == (6, 1, ((0, 12),))
    assert math.isnan(then.grown(since(clipped_norm=math.nan)).clipped_norm or 0)
    assert then.grown(since(planned_steps=12)).plans == ((0, 12),)


def test_a_norm_that_is_no_number_survives_the_file(run):
    record = identity.read(run.path / "train" / "checkpoint-6")
    assert record is not None
    text = identity.grown(record.text(), since(clipped_norm=math.nan))
    assert math.isnan(Record.model_validate_json(text).past.clipped_norm or 0)


def test_what_a_backend_does_not_look_at_stays_unseen():
    past = Past().grown(since())
    assert past.steps_without_effect is None
    assert past.grown(since(steps_without_effect=0)).steps_without_effect is None
    assert "steps_without_effect" not in past.facts()


def test_rows_are_told_apart_wherever_a_number_moves(tmp_path):
    ways = [
        [{"row": 0, "input_ids": [1, 2], "labels": [3]}], [{"row": 0, "input_ids": [1], "labels": [2, 3]}],
        [{"row": 1, "input_ids": [1, 2], "labels": [3]}], [{"row": 0, "input_ids": [1, 2]}],
        [{"row": 0, "input_ids": [1, 2], "labels": []}],
        [{"row": 0, "prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4]}],
        [{"row": 0, "prompt_ids": [1, 2], "chosen_ids": [4], "rejected_ids": [3]}],
    ]  # fmt: skip
    found = set()
    for rows in ways:
        write_jsonl(tmp_path / "rows.jsonl", rows)
        found.add(identity.of_rows(tmp_path / "rows.jsonl", "rows").sha256)
    assert len(found) == len(ways)


def test_an_adam_has_a_first_step_after_a_checkpoint_only_where_no_weight_could_have_moved(run):
    text = (run.path / "train" / "checkpoint-3" / "finetune.json").read_text()
    assert identity.unmoved("", 0)
    assert not identity.unmoved("", 3)
    assert identity.unmoved(text, 3), "3 steps were watched, and none of them moved anything"
    assert not identity.unmoved(text, 4)
    assert not identity.unmoved(identity.grown(text, since(first_move=1.0, steps_without_effect=0)), 6)
    assert not identity.unmoved(identity.grown(text, since(steps_without_effect=1)), 6)


def test_an_option_that_a_record_does_not_know_had_its_default(run, wanted):
    file = "train/checkpoint-6/finetune.json"
    edit_json(run, file, lambda record: record["training"]["options"].pop("label_smoothing_factor"))
    checkpoint_as_written(run, "checkpoint-6")
    resume(wanted(), run)
    with pytest.raises(Faults, match=r"train\.label_smoothing_factor 0\.0 -> 0\.5"):
        resume(wanted(train={"label_smoothing_factor": 0.5}), run)
