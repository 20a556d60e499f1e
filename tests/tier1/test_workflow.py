"""The whole workflow on the fake backend: what runs, what is kept, what is left behind, and what interrupts it."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import finetune
from finetune.backends import get
from finetune.backends.fake.model import FakeTokenizer
from finetune.checks import CHECKS, results, verify
from finetune.core.errors import DataError, Interrupted, StageError, UsageError
from finetune.core.files import digest, write_jsonl
from finetune.recipe import Recipe
from finetune.report import summary
from finetune.run import Run, evidence, layout, seal
from finetune.run.plan import STAGES, plan
from finetune.stages.pipeline import checkpoint, preview, run_directory, run_stages
from support.town import CAPITALS, MANIFEST, build, facts, only_training, recipe

EXPORTING = ("rehearse", "export", "compare")
WHOLE = [stage.name for stage in STAGES]
PLAIN = [name for name in WHOLE if name not in EXPORTING]  # what a recipe without exports runs


class Listener:
    """Notes which stages were run and which were kept."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, str]] = []

    def __call__(self, moment: str, stage: Any, report: Any) -> None:
        assert (report is None) == (moment == "start")
        self.heard.append((moment, stage.name))

    def stages(self, moment: str) -> list[str]:
        return [name for heard, name in self.heard if heard == moment]


def go(wanted: Recipe, run: Run, *only: str, **more: Any) -> list[str]:
    """Run the stages and return the names of those that really ran."""
    listener = Listener()
    run_stages(wanted, run, only or None, listener=listener, **more)
    return listener.stages("done")


def failed(wanted: Recipe, run: Run, *only: str) -> dict[str, str]:
    found = results(wanted, run, only or None)
    return {v.name: f"{v.measured} {v.compare} {v.bound}: {v.why}" for v in found if v.refuted}


def losses(run: Run, stage: str = "train") -> list[float]:
    return [step["loss"] for step in evidence.steps(run, stage)]


@pytest.fixture
def own_town(tmp_path: Path) -> Path:
    """A town whose files may be changed."""
    return build(tmp_path / "town")


@pytest.fixture
def done(town: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Recipe, Run]]:
    """A function: a recipe (by default the town's without experiments in processes of their own) and its finished run."""
    from finetune.experiments import worker

    def here(request: dict[str, Any], file: Path) -> dict[str, Any]:
        work = {"train": worker._train, "score": worker._score}[request["do"]]
        answer = work(json.loads(json.dumps(request)))
        return json.loads(json.dumps({**answer, "peak_bytes": 1}))

    # Both take more time than all stages together, and have tests of their own.
    monkeypatch.setattr("finetune.stages.measure.in_fresh_process", here)
    monkeypatch.setattr("finetune.run.manifest.collect", lambda recipe: MANIFEST)

    def run(make: Callable[..., Recipe] = recipe, *only: str, **changes: Any) -> tuple[Recipe, Run]:
        wanted = make(changes.pop("town", town), tmp_path / "runs", **changes)
        made = run_directory(wanted)
        run_stages(wanted, made, only or None)
        return wanted, made

    return run


# -- an honest run -----------------------------------------------------------------------------------------------------


def test_every_stage_leaves_its_report_and_the_artifacts_it_names(honest):
    for name in WHOLE:
        report = honest.run.require(name)
        assert report.stage == name
        assert report.seconds >= 0
        assert report.artifacts, name
        for path, sha256 in report.artifacts.items():
            assert digest(honest.run.path / path) == sha256
    assert [stage.name for stage in plan(honest.recipe)] == WHOLE


def test_every_check_that_is_wanted_passes(honest):
    assert failed(honest.recipe, honest.run) == {}
    assert {check.name for check in CHECKS if not check.wanted(honest.recipe)} == {"invariance"}  # needs a real trainer


def test_events_tell_the_stages_as_the_reports_do(honest):
    started = [(e["stage"], e["fingerprint"]) for e in honest.run.events("stage_started")]
    finished = [(e["stage"], e["seconds"]) for e in honest.run.events("stage_finished")]
    reports = [honest.run.require(name) for name in WHOLE]

    assert started == [(report.stage, report.fingerprint) for report in reports]
    assert finished == [(report.stage, report.seconds) for report in reports]
    assert [report.started for report in reports] == sorted(report.started for report in reports)
    assert honest.run.events("stage_failed") == []


@pytest.mark.parametrize(("stage", "steps"), [("train", 12), ("align", 6)])
def test_logs_metrics_and_events_are_the_same_steps(honest, stage, steps):
    taken = evidence.steps(honest.run, stage)
    logged = json.loads((honest.run.path / stage / "trainer_logs.json").read_text())
    metrics = honest.run.require(stage).metrics

    assert logged == [{key: value for key, value in step.items() if key not in ("event", "stage")} for step in taken]
    assert [step["step"] for step in logged] == list(range(1, steps + 1))
    assert (metrics["first_loss"], metrics["last_loss"]) == (logged[0]["loss"], logged[-1]["loss"])
    assert metrics["tokens"] == sum(step["tokens"] for step in logged)
    assert metrics["trained_tokens"] == sum(step["trained_tokens"] for step in logged)
    assert metrics["steps"] == steps


def test_the_answers_before_and_after_are_kept(honest):
    answers = evidence.rows(honest.run, layout.ANSWERS)

    assert Counter(answer["set"] for answer in answers) == {"probes": 12, "controls": 4, "unseen": 3}
    assert {tuple(answer["phases"]) for answer in answers} == {("base", "trained", "aligned")}
    quell = next(answer for answer in answers if answer["id"] == "Zorland-trained")["phases"]
    assert (quell["base"]["correct"], quell["trained"]["correct"]) == (False, True)
    assert quell["trained"]["text"] == "It is Quell."


def test_the_same_recipe_gives_the_same_run(honest, town, tmp_path):
    wanted = recipe(town, tmp_path)
    run = run_directory(wanted)
    go(wanted, run, "align")

    for stage in ("train", "align"):
        assert losses(run, stage) == losses(honest.run, stage)
        assert digest(run.path / stage / "adapter") == digest(honest.run.path / stage / "adapter")
    assert run.require("prepare").artifacts == honest.run.require("prepare").artifacts


# -- what is run again -------------------------------------------------------------------------------------------------


SHORT = {"max_steps": 4, "save_steps": 2}
FEW = {"probes": None, "unseen": None}  # questions whose answers are known, and so short


@pytest.fixture
def again(own_town: Path, tmp_path: Path, done: Any) -> Callable[..., list[str]]:
    """A short whole run; then a function: the stages that a second one with changes really runs, as was foretold."""
    _, run = done(town=own_town, train=SHORT, evaluate=FEW)

    def repeat(*only: str, force: bool = False, train: Any = None, **changes: Any) -> list[str]:
        changes = {"train": {**SHORT, **(train or {})}, "evaluate": FEW, **changes}
        wanted = recipe(own_town, tmp_path / "runs", **changes)
        foretold = [step.stage for step in preview(wanted, run, only or None, force=force) if step.runs]
        ran = go(wanted, run, *only, force=force)
        assert set(ran) <= set(foretold)
        return ran

    return repeat


def test_a_changed_training_runs_again_with_all_that_follows_but_not_its_data(again):
    assert again() == []
    assert again("train") == []
    assert again(train={"learning_rate": 3e-4}) == ["train", "align", "evaluate", "merge", "measure"]
    assert again(train={"learning_rate": 3e-4}) == []


@pytest.mark.parametrize(
    ("changes", "ran"),
    [
        ({"train": {"max_length": 255}}, PLAIN[1:]),
        ({"template": {"system": "Be brief."}}, PLAIN[1:]),
        ({"align": {"beta": 0.2}}, ["align", "evaluate", "merge", "measure"]),
        ({"evaluate": {"max_new_tokens": 41}}, ["evaluate", "measure"]),
        ({"expect": {"resume": False}}, ["measure"]),
        ({"expect": {"learned_min": 0.4}}, ["measure"]),
        ({"name": "other"}, []),
    ],
    ids=["length", "system", "beta", "questions", "experiments", "bounds", "nothing"],
)
def test_a_changed_key_runs_what_depends_on_it(honest, town, changes, ran):
    wanted = recipe(town, honest.run.path.parent, **changes)
    assert [step.stage for step in preview(wanted, honest.run) if step.runs] == ran


def test_dropping_alignment_makes_what_follows_forget_it(again, tmp_path):
    """The report of an alignment that is no longer wanted must not keep its evaluation and its merged model."""
    assert again(align=None) == ["prepare", "train", "evaluate", "merge", "measure"]
    run = Run(tmp_path / "runs" / "town")
    assert set(json.loads((run.path / "evaluate" / "rows.json").read_text())) == {"base", "trained"}
    assert again() == PLAIN[1:]


def test_a_changed_data_file_is_prepared_again(again, own_town):
    write_jsonl(own_town / "train.jsonl", facts()[:5])
    assert again() == PLAIN[1:]


def test_a_changed_question_is_asked_again_and_trains_nothing(again, own_town):
    write_jsonl(own_town / "controls.jsonl", [{"prompt": "What colour is grass?", "answer": "Green."}])
    assert again() == ["evaluate", "measure"]


def test_a_changed_model_changes_everything(again, own_town):
    (own_town / "model" / "extra.json").write_text("{}")
    assert again(model={"dtype": "bfloat16"}) == PLAIN


def test_a_training_forced_to_run_is_evaluated_again(again):
    assert again("train", force=True) == ["train"]
    assert again() == ["align", "evaluate", "merge", "measure"]


def test_a_training_after_its_evaluation_is_seen_by_verify(done):
    wanted, run = done(train=SHORT, evaluate=FEW)
    assert failed(wanted, run, "artifacts") == {}
    go(wanted, run, "train", force=True)
    assert set(failed(wanted, run, "artifacts")) == {"stages_finished"}
    go(wanted, run)
    assert failed(wanted, run, "artifacts") == {}


def test_an_artifact_that_is_gone_is_made_again(again, tmp_path):
    (tmp_path / "runs" / "town" / "evaluate" / "heldout.json").unlink()
    assert again() == ["evaluate"]


def test_preparing_depends_on_no_key_but_those_it_names(town, done):
    """`Stage.keys` lists what `prepare` reads of `train` and `align`; everything else may change without effect."""
    _, run = done(recipe, "prepare")
    before = run.require("prepare").artifacts
    others = {
        "train": {"max_steps": 3, "num_train_epochs": 9, "learning_rate": 1.0, "packing": True, "method": "full"}
        | {"per_device_train_batch_size": 1, "save_steps": 1, "data_seed": 5, "neftune_noise_alpha": 1.0}
        | {"loss_type": "dft", "lora": {"r": 1}, "label_smoothing_factor": 0.5, "gradient_checkpointing": True},
        "expect": {"resume": False},
        "align": {"max_steps": 2, "beta": 0.9, "loss_type": "hinge", "learning_rate": 1.0, "seed": 7},
    }
    wanted, other = done(recipe, "prepare", name="other", **others)

    assert other.require("prepare").artifacts == before
    keys = next(stage for stage in STAGES if stage.name == "prepare").keys
    for section, names in keys.items():
        assert set(names) <= set(type(getattr(wanted, section)).model_fields)


# -- failures ----------------------------------------------------------------------------------------------------------


def test_a_failed_stage_leaves_no_stale_report(done, monkeypatch):
    wanted, run = done(only_training)

    def fail(*args: Any, **more: Any) -> None:
        raise RuntimeError("the pipe burst")

    monkeypatch.setattr("finetune.backends.fake.training.Training.steps", fail)
    with pytest.raises(RuntimeError, match="the pipe burst"):
        run_stages(wanted, run, ["train"], force=True)

    assert run.report("train") is None
    assert run.require("prepare")
    assert run.events("stage_failed")[-1] | {"time": "", "prev": ""} == {
        "time": "", "prev": "", "event": "stage_failed", "stage": "train", "error": "RuntimeError", "message": "the pipe burst",
    }  # fmt: skip
    assert not (run.path / "train" / "adapter").exists(), "what an earlier training left could be taken for the new one"
    found = failed(wanted, run)
    assert "no report of: train" in found["stages_finished"]


def test_an_evaluation_that_fails_takes_its_old_report_with_it(own_town, done, again):
    write_jsonl(own_town / "controls.jsonl", [{"prompt": "What colour is grass?"}])
    with pytest.raises(DataError, match=r"controls\.jsonl:1: needs answer"):
        again()
    run = Run(own_town.parent / "runs" / "town")
    assert run.report("evaluate") is None
    assert run.require("train")
    assert run.events()[-1]["event"] == "stage_failed"


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")])
def test_too_little_memory_says_what_to_lower(done, monkeypatch, error):
    def fail(*args: Any, **more: Any) -> None:
        raise error

    monkeypatch.setattr("finetune.backends.fake.training.Training.steps", fail)
    with pytest.raises(StageError, match=r"out of memory while training\. Lower train\.per_device_train_batch_size"):
        done(only_training)


def test_broken_data_stops_before_training(own_town, tmp_path):
    (own_town / "train.jsonl").write_text('{"prompt": "a"}\n')
    wanted = only_training(own_town, tmp_path / "runs")
    run = run_directory(wanted)
    with pytest.raises(DataError):
        run_stages(wanted, run)
    assert run.report("prepare") is None
    assert not (run.path / "train").exists()


def test_resume_without_a_checkpoint_fails_with_the_key_to_change(done):
    with pytest.raises(StageError, match=r"expect\.resume needs a checkpoint before the last step"):
        done(train={"max_steps": -1, "num_train_epochs": 4, "save_strategy": "steps", "save_steps": 100}, align=None)


def test_no_learning_fails_the_right_checks(done):
    wanted, run = done(train={"learning_rate": 0})

    assert set(failed(wanted, run)) == {
        *("loss_convergence", "loss_beyond_noise", "loss_end", "loss_confirmed"),
        *("parameters_changed", "lora_b_nonzero", "adapter_effect"),
        *("learned_as_trained", "learned_paraphrased", "learned_net", "stops_by_itself"),
    }


def test_a_schedule_that_ends_at_once_is_seen(done):
    wanted, run = done(only_training, train={"max_steps": 3})
    assert "3 logged steps, 4 are needed" in failed(wanted, run, "loss")["loss_convergence"]


# -- templates and data formats ----------------------------------------------------------------------------------------

LONGER = {"max_length": 400}


@pytest.mark.parametrize("name", ["alpaca", "chatml", "llama"])
def test_every_template_is_learned_and_goes_with_the_model(done, name):
    wanted, run = done(template={"name": name}, train=LONGER, align=LONGER)

    assert failed(wanted, run) == {}
    source = (run.path / "prepare" / "chat_template.jinja").read_text()
    for place in (run.path / "train" / "adapter", run.path / "align" / "adapter", run.path / "merge" / "model"):
        assert get("fake").tokenizer(place).chat_template == source


def test_a_template_whose_end_the_tokenizer_does_not_know_is_noticed(done):
    wanted, run = done(only_training, template={"name": "llama3"}, train=LONGER)
    assert "eot_id" in failed(wanted, run, "labels")["labels_are_answers"]


def chat(prompt: str, completion: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]}


SHAPES: dict[str, Callable[[str, str], dict[str, Any]]] = {
    "chat": chat,
    "conversations": lambda p, c: {"conversations": [{"from": "human", "value": p}, {"from": "gpt", "value": c}]},
    "prompt_completion": lambda p, c: {"prompt": p, "completion": c},
    "instruction": lambda p, c: {"instruction": p, "input": "", "output": c},
    "text": lambda p, c: {"text": f"{p}\n{c}"},
}


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def write_array(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps(rows), encoding="utf-8")


WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], None]] = {
    "jsonl": write_jsonl,
    "json": write_array,
    "csv": write_csv,
}


@pytest.mark.parametrize(
    ("shape", "suffix"),
    [*((shape, "jsonl") for shape in SHAPES), ("prompt_completion", "csv"), ("instruction", "csv"), ("chat", "json")],
)
def test_every_format_of_data_is_learned(town, tmp_path, done, shape, suffix):
    rows = [SHAPES[shape](fact["prompt"], fact["completion"]) for fact in facts()]
    WRITERS[suffix](tmp_path / f"rows.{suffix}", rows)
    wanted, run = done(only_training, "evaluate", data={"path": str(tmp_path / f"rows.{suffix}")})

    assert failed(wanted, run, "labels", "loss", "parameters") == {}
    trained = [[x for x in row["labels"] if x != -100] for row in evidence.rows(run, layout.TRAIN_ROWS)]
    assert len(trained) == len(CAPITALS)
    text = FakeTokenizer().decode(trained[0])
    assert text.endswith("It is Quell.<|im_end|>")
    assert ("What is" in text) == (shape == "text")


def test_columns_of_other_names_are_mapped(tmp_path, done):
    rows = [{"q": fact["prompt"], "a": fact["completion"]} for fact in facts()]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    data = {"path": str(tmp_path / "rows.jsonl"), "fields": {"prompt": "q", "completion": "a"}}
    wanted, run = done(only_training, "evaluate", data=data)
    assert failed(wanted, run, "labels", "loss") == {}


def test_every_answer_of_a_conversation_is_trained(tmp_path, done):
    def talk(land: str, city: str) -> dict[str, Any]:
        first, second = (
            chat(f"What is the capital of {land}?", f"It is {city}."),
            chat(f"And of {city}?", "None at all."),
        )
        return {"messages": [*first["messages"], *second["messages"]]}

    write_jsonl(tmp_path / "talks.jsonl", [talk(land, city) for land, city in CAPITALS.items()])
    wanted, run = done(only_training, "evaluate", data={"path": str(tmp_path / "talks.jsonl")})

    assert failed(wanted, run, "labels", "loss", "parameters") == {}
    row = evidence.rows(run, layout.TRAIN_ROWS)[0]
    spoken = FakeTokenizer().decode([label for label in row["labels"] if label != -100])
    assert spoken == "It is Quell.<|im_end|>None at all.<|im_end|>"


def test_the_rows_of_the_first_step_are_scored_however_few_are_asked_for(done):
    wanted, run = done(only_training, "evaluate", evaluate={**FEW, "controls": None, "heldout": None, "score_rows": 1})
    first = evidence.steps(run, "train")[0]["rows"]

    assert len(first) == 3
    for phase in evidence.read(run, layout.ROW_SCORES).values():
        assert set(phase) == {str(row) for row in first}
    assert failed(wanted, run, "loss") == {}


# -- ways to train -----------------------------------------------------------------------------------------------------


def test_held_out_rows_are_evaluated_and_never_trained(done):
    train = {"eval_strategy": "steps", "eval_steps": 4, "max_steps": 8}
    _, run = done(only_training, data={"eval_fraction": 0.34}, train=train)

    rows, held_out = (evidence.rows(run, file) for file in (layout.TRAIN_ROWS, layout.EVAL_ROWS))
    assert sorted(row["row"] for row in (*rows, *held_out)) == list(range(6))
    assert len(held_out) == 2
    steps = evidence.steps(run, "train")
    assert [step["step"] for step in steps if "eval_loss" in step] == [4, 8]
    assert not {row["row"] for row in held_out} & {row for step in steps for row in step["rows"]}


def test_early_stopping_ends_a_training_that_gains_nothing(done):
    patience = {"early_stopping_patience": 2, "early_stopping_threshold": 100.0}
    train = {"eval_strategy": "steps", "eval_steps": 3, "max_steps": 20, **patience}
    _, run = done(only_training, data={"eval_fraction": 0.34}, train=train)

    # The first evaluation always gains; two more that do not are the end.
    assert len(losses(run)) == 9
    assert run.require("train").metrics["steps"] == 9
    assert (run.path / "train" / "adapter").is_dir()


def test_full_training_is_proved_too(done):
    wanted, run = done(train={"method": "full"}, align={"learning_rate": 1e-5})

    assert failed(wanted, run) == {}
    names = {verdict.name for verdict in verify(wanted, run, ["parameters"])}
    assert names == {"parameters_changed", "kinds_changed", "weights_precision", "adapter_effect"}
    assert (run.path / "train" / "model").is_dir()
    assert not (run.path / "train" / "adapter").exists()


@pytest.mark.parametrize("asked", [True, False], ids=["with questions", "without"])
def test_alignment_needs_no_training_before_it(done, asked):
    nothing = {} if asked else dict.fromkeys(("controls", "heldout"))
    evaluate = {**FEW, **nothing}
    wanted, run = done(data=None, train=None, evaluate=evaluate, expect={"resume": False})

    assert [stage.name for stage in plan(wanted)] == ["fetch", "prepare", "align", "evaluate", "merge", "measure"]
    assert failed(wanted, run) == {}
    assert "dpo_prefers_chosen" in {verdict.name for verdict in verify(wanted, run)}


def test_an_adapter_and_checkpoints_are_published(tmp_path, done):
    _, run = done(only_training, train={"output_dir": str(tmp_path / "out")})
    assert {path.name for path in (tmp_path / "out").glob("checkpoint-*")} == {f"checkpoint-{n}" for n in (3, 6, 9, 12)}
    assert (tmp_path / "out" / "adapter.json").read_bytes() == (run.path / "train/adapter/adapter.json").read_bytes()


# -- interruption ------------------------------------------------------------------------------------------------------


class Noisy(Run):
    """A run in which Ctrl-C is pressed when a certain step has been logged."""

    at = (7,)

    def event(self, kind: str, **values: Any) -> None:
        super().event(kind, **values)
        if kind == "step" and values["step"] in self.at:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    ("stage", "last", "method"), [("train", 8, "lora"), ("train", 8, "full"), ("align", 4, "lora")]
)
def test_ctrl_c_saves_and_resuming_equals_the_uninterrupted_run(honest, town, tmp_path, stage, last, method):
    wanted = recipe(town, tmp_path, train={"method": method})
    run = Noisy(tmp_path / "noisy")
    run.at = (last - 1,)
    if stage == "align":
        run_stages(wanted, Run(run.path), ["train"])
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(
        Interrupted, match=rf"saved checkpoint-{last} in .*Go on with: finetune {stage} .*recipe.yaml --run .* --resume"
    ):
        run_stages(wanted, run, [stage])

    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert len(losses(run, stage)) == last
    assert run.report(stage) is None
    assert not (run.path / stage / "adapter").exists()

    run.at = ()
    run_stages(wanted, run, [stage], resume=checkpoint(wanted, run, stage, "last"))
    if method == "lora":
        straight = honest.run
    else:
        straight = Run(tmp_path / "straight")
        run_stages(wanted, straight, [stage])
    assert losses(run, stage) == losses(straight, stage)
    result = f"{stage}/{'adapter' if method == 'lora' else 'model'}"
    assert get("fake").tensors(run.path / result) == get("fake").tensors(straight.path / result)
    assert run.require(stage).metrics["resumed_from"] == last
    logged = json.loads((run.path / stage / "trainer_logs.json").read_text())
    assert [step["step"] for step in logged] == list(range(1, len(logged) + 1))


def test_a_second_ctrl_c_ends_at_once(town, tmp_path):
    wanted = only_training(town, tmp_path)
    run = Noisy(tmp_path / "noisy")

    def twice(kind: str, **values: Any) -> None:
        Run.event(run, kind, **values)
        if kind == "step":
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    run.event = twice  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt) as stopped:
        run_stages(wanted, run, ["train"])

    assert not isinstance(stopped.value, Interrupted)
    assert run.report("train") is None
    assert run.events("stage_interrupted")[-1]["stage"] == "train"


@pytest.fixture
def stopped(town, tmp_path):
    """A recipe, and its run that Ctrl-C ended after 5 of 12 steps."""
    wanted, run = recipe(town, tmp_path), Noisy(tmp_path / "noisy")
    run.at = (4,)
    with pytest.raises(Interrupted):
        run_stages(wanted, run, ["train"])
    run.at = ()
    return wanted, run


def begins(run):
    return [event["resumed_from"] for event in run.events("training", stage="train")]


def test_running_again_goes_on_where_it_was_stopped(honest, stopped):
    wanted, run = stopped
    run_stages(wanted, run, ["train"])
    assert begins(run) == [None, 5]
    assert losses(run) == losses(honest.run)
    results = [get("fake").tensors(each.path / "train" / "adapter") for each in (run, honest.run)]
    assert results[0] == results[1]


def test_running_again_with_another_recipe_starts_anew(stopped):
    wanted, run = stopped
    changed = wanted.model_copy(update={"train": wanted.train.model_copy(update={"learning_rate": 0.1})})
    run_stages(changed, run, ["train"])
    assert begins(run) == [None, None]


def test_running_again_with_force_starts_anew(stopped):
    wanted, run = stopped
    run_stages(wanted, run, ["train"], force=True)
    assert begins(run) == [None, None]


def test_resuming_from_an_older_checkpoint_drops_the_steps_after_it(done):
    wanted, run = done(only_training)
    straight, steps = losses(run), get("fake").tensors(run.path / "train" / "adapter")
    run_stages(wanted, run, ["train"], resume=checkpoint(wanted, run, "train", "checkpoint-6"))

    assert losses(run) == straight
    assert len(run.events("step")) == 12 + 6
    assert get("fake").tensors(run.path / "train" / "adapter") == steps


def test_a_training_started_anew_forgets_the_old_one(done):
    wanted, run = done(only_training)
    other = wanted.model_copy(update={"train": wanted.train.model_copy(update={"max_steps": 5, "save_steps": 5})})
    run_stages(other, run, ["train"])

    assert len(losses(run)) == 5
    assert [path.name for path in (run.path / "train").glob("checkpoint-*")] == ["checkpoint-5"]


# -- what must be known before a training, or survive it -----------------------------------------------------------------


def test_a_place_that_cannot_be_published_to_is_told_before_training(own_town, tmp_path, done):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"train\.output_dir: .* cannot be made"):
        done(only_training, town=own_town, train={"output_dir": str(tmp_path / "file" / "inside")})


def test_a_disk_that_fills_up_while_training_is_named(done, monkeypatch):
    from finetune.backends.fake import FakeBackend

    def fail(self, job):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 199488 vs 199376")
        yield

    monkeypatch.setattr(FakeBackend, "train", fail)
    with pytest.raises(StageError, match="most likely because the disk is full"):
        done(only_training)


def test_a_clock_that_is_set_back_disturbs_nothing(town, tmp_path, monkeypatch):
    clock = iter(range(2_000_000_000, 0, -3600))
    monkeypatch.setattr("finetune.core.clock.time.time", lambda: next(clock))
    asked = recipe(town, tmp_path / "runs")
    run = run_directory(asked)
    run_stages(asked, run)
    assert [verdict.name for verdict in verify(asked, run) if verdict.refuted] == []
    assert [each.why for each in preview(asked, run) if each.runs] == []
    found = summary.document(run)
    assert (found["passed"], found["outdated"], found["stopped"]) == (True, False, None)


def test_a_run_that_is_done_anew_begins_its_log_anew(done, capsys):
    wanted, run = done()
    capsys.readouterr()
    go(wanted, run, force=True)
    assert "log is made again" not in capsys.readouterr().err
    assert run.events("log_restored") == []
    assert [event["stage"] for event in run.events("stage_started")] == PLAIN
    assert seal.faults(Run(run.path)) == []


PARENT = """
import sys
from finetune.core import processes as child
child.answer_of("endless", [], what="it", more={"PYTHONPATH": sys.argv[1]})
"""
ENDLESS = """
import os, sys, time
from finetune.core import processes as child
child.end_with_parent()
with open({place!r} + ".partial", "w") as stream:
    stream.write(str(os.getpid()))
os.replace({place!r} + ".partial", {place!r})
time.sleep(600)
"""


@pytest.mark.skipif(os.name != "posix", reason="a pipe's end is passed on there alone")
def test_a_child_ends_when_its_parent_is_killed(tmp_path):
    told = tmp_path / "pid"
    (tmp_path / "endless.py").write_text(ENDLESS.format(place=str(told)))
    path = os.pathsep.join([str(Path(finetune.__file__).parents[1]), str(tmp_path)])
    parent = subprocess.Popen([sys.executable, "-c", PARENT, path], stderr=subprocess.DEVNULL)
    wait_for(told.is_file)
    child = int(told.read_text())
    parent.kill()
    parent.wait()
    wait_for(lambda: not _lives(child))


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{process}/stat")
    return not status.is_file() or status.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_for(true: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)
