"""A checkpoint as older libraries wrote it is gone on with, bit by bit, or refused by name."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.backends import get
from finetune.core.errors import UsageError
from finetune.run import Run, evidence
from finetune.stages.pipeline import checkpoint, run_directory, run_stages
from support.town import as_of_0_1

SHORT = {"max_steps": 8, "save_steps": 3, "save_total_limit": None, "lr_scheduler_type": "cosine", "warmup_steps": 2}
LATER = ("foreach", "maximize", "capturable", "differentiable", "fused", "decoupled_weight_decay")  # after PyTorch 1.11


def read(folder: Path, name: str) -> Any:
    return torch.load(folder / name, weights_only=False)


def edit(folder: Path, name: str, change: Callable[[Any], Any], **more: Any) -> None:
    value = read(folder, name)
    torch.save(change(value) or value, folder / name, **more)


def whole_steps(folder: Path) -> None:
    def change(state: Any) -> None:
        for each in state["state"].values():
            each["step"] = int(each["step"])

    edit(folder, "optimizer.pt", change)


def fewer_settings(folder: Path) -> None:
    def change(state: Any) -> None:
        for group in state["param_groups"]:
            for key in LATER:
                del group[key]

    edit(folder, "optimizer.pt", change)


def small_schedule(folder: Path) -> None:
    edit(folder, "scheduler.pt", lambda state: {"last_epoch": state["last_epoch"], "lr_lambdas": [None]})


def numpy_1(folder: Path) -> None:
    """NumPy 1 called the module of its arrays otherwise; protocol 2 writes names as lines."""
    file, packed = folder / "rng_state.pth", io.BytesIO()
    with zipfile.ZipFile(file) as before, zipfile.ZipFile(packed, "w") as after:
        for member in before.namelist():
            content = before.read(member)
            if member.endswith("data.pkl"):
                assert b"numpy._core.multiarray" in content
                content = content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
            after.writestr(member, content)
    file.write_bytes(packed.getvalue())


def before_zip(folder: Path) -> None:
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        edit(folder, name, lambda value: value, _use_new_zipfile_serialization=False)


def pickled_weights(folder: Path) -> None:
    for old, new in (("adapter_model.safetensors", "adapter_model.bin"), ("model.safetensors", "pytorch_model.bin")):
        if (folder / old).is_file():
            torch.save(load_file(folder / old), folder / new)
            (folder / old).unlink()


def old_trainer_state(folder: Path) -> None:
    file = folder / "trainer_state.json"
    state = json.loads(file.read_text())
    kept = ("epoch", "global_step", "max_steps", "num_train_epochs", "total_flos", "log_history", "trial_name")
    file.write_text(json.dumps({key: state[key] for key in kept} | {"trial_params": None}))


AGES: dict[str, tuple[Callable[[Path], None], ...]] = {
    "as finetune 0.1 left it": (),
    "Adam's step as a whole number": (whole_steps,),
    "groups without later settings": (fewer_settings,),
    "a schedule of few keys": (small_schedule,),
    "NumPy 1": (numpy_1,),
    "PyTorch before 1.6": (before_zip,),
    "a pickled adapter": (pickled_weights,),
    "transformers 4": (old_trainer_state,),
    "all of it": (whole_steps, fewer_settings, small_schedule, pickled_weights, old_trainer_state, numpy_1),
}


@pytest.fixture
def make(tiny_recipe: Callable[..., Any]) -> Callable[..., tuple[Any, Run, Path]]:
    """A function: a recipe of 8 steps with changes, its finished run as of 0.1, and its checkpoint of step 3."""

    def ran(**changes: Any) -> tuple[Any, Run, Path]:
        recipe = tiny_recipe(**{**SHORT, **changes})
        run = run_directory(recipe)
        run_stages(recipe, run, ["train"])
        as_of_0_1(run)
        return recipe, Run(run.path), run.path / "train" / "checkpoint-3"

    return ran


def resume(recipe: Any, run: Run) -> None:
    run_stages(recipe, run, ["train"], resume=checkpoint(recipe, run, "train", "checkpoint-3"))


def left(run: Run, result: str = "adapter") -> tuple[Any, list[tuple[int, float, float]]]:
    logged = [(step["step"], step["loss"], step["learning_rate"]) for step in evidence.steps(run, "train")]
    return get("torch").tensors(run.path / "train" / result), logged


@pytest.mark.parametrize("age", AGES)
def test_an_older_state_is_gone_on_with_bit_by_bit(make: Any, age: str) -> None:
    recipe, run, folder = make()
    straight = left(run)
    for change in AGES[age]:
        change(folder)
    resume(recipe, run)

    assert left(run) == straight
    assert run.require("train").metrics["unexamined"] == [3]


def test_there_are_as_many_ages_as_were_counted() -> None:
    assert len(AGES) == 9


def test_settings_that_came_later_are_the_job_s_own(make: Any) -> None:
    recipe, run, folder = make(optim="adamw_torch_fused")
    straight = left(run)
    fewer_settings(folder)
    whole_steps(folder)
    resume(recipe, run)
    assert left(run) == straight


def test_a_whole_model_that_was_pickled_is_gone_on_with(make: Any) -> None:
    recipe, run, folder = make(method="full")
    straight = left(run, "model")
    pickled_weights(folder)
    resume(recipe, run)
    assert left(run, "model") == straight


def no_state(state: Any) -> Any:
    return {**state, "state": {}}


def other_shape(state: Any) -> None:
    state["state"][0]["exp_avg"] = state["state"][0]["exp_avg"][:1]


def no_moment(state: Any) -> None:
    del state["state"][0]["exp_avg_sq"]


def fewer_weights(state: Any) -> None:
    state["param_groups"][0]["params"].pop()


def without(key: str) -> Callable[[Any], Any]:
    return lambda state: {name: value for name, value in state.items() if name != key}


REFUSED: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "an optimizer without moments": ("optimizer.pt", no_state, "it holds nothing of any weight"),
    "moments of another weight": ("optimizer.pt", other_shape, r"'exp_avg' of a weight of \[16, \d+\] is \[1, \d+\]"),
    "Adam without a moment": ("optimizer.pt", no_moment, "no 'exp_avg_sq'"),
    "fewer weights": (
        "optimizer.pt",
        fewer_weights,
        "doesn't match the size",
    ),
    "no groups": ("optimizer.pt", without("param_groups"), "it has no 'param_groups'"),
    "a schedule that does not say where it is": ("scheduler.pt", without("last_epoch"), "which step"),
    "a random state without Python's": ("rng_state.pth", without("python"), "it has no 'python'"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_state_that_cannot_be_gone_on_with_is_refused_by_name(make: Any, kind: str) -> None:
    name, change, why = REFUSED[kind]
    recipe, run, folder = make()
    edit(folder, name, change)
    pattern = name.replace("rng_state.pth", "rng_state")
    with pytest.raises(UsageError, match=rf"checkpoint-3/{pattern}.* is no state to go on from: .*{why}"):
        resume(recipe, run)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_state_that_was_cut_short_is_refused_by_name(make: Any, name: str) -> None:
    recipe, run, folder = make()
    (folder / name).write_bytes((folder / name).read_bytes()[:-200])
    with pytest.raises(UsageError, match=rf"checkpoint-3/{name.partition('.')[0]}.* is no state to go on from"):
        resume(recipe, run)


def test_a_whole_model_under_a_wrapper_s_names_is_not_passed_over(make: Any) -> None:
    recipe, run, folder = make(method="full")
    tensors = load_file(folder / "model.safetensors")
    save_file({f"module.{name}": tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    with pytest.raises(UsageError, match=r"model\.embed_tokens\.weight is not in the checkpoint"):
        resume(recipe, run)


def test_a_trainer_s_state_of_a_later_version_is_refused_by_name(make: Any) -> None:
    recipe, run, folder = make()
    state = json.loads((folder / "trainer_state.json").read_text())
    (folder / "trainer_state.json").write_text(json.dumps({**state, "mood": "fine"}))
    with pytest.raises(UsageError, match=r"checkpoint-3/trainer_state\.json is no state .*does not know 'mood'"):
        resume(recipe, run)
