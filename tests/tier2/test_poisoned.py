"""No pickle is ever run, whatever file it is put into and whatever is done with it; the refusal is ours and names the file."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest

from finetune.cli.app import cli, guarded
from support.poison import FORMS
from support.processes import stay_here

STEPS = 4
LINES = [{"prompt": f"What is {n} plus {n}?", "completion": f"It is {2 * n}."} for n in range(8)]


@dataclass(frozen=True)
class Said:
    code: int
    text: str

    @property
    def in_order(self) -> bool:
        """Whether it went well, or was refused in our words."""
        return self.code in (0, 1, 2, 3, 4) and "unexpected" not in self.text and "Traceback" not in self.text


def call(*arguments: str | Path) -> Said:
    """The command line in this process."""
    said = io.StringIO()
    with redirect_stderr(said), redirect_stdout(said):
        code = guarded(lambda: cli.main([str(each) for each in arguments], "finetune", standalone_mode=False))
    return Said(code, said.getvalue())


@pytest.fixture(scope="module")
def world(tiny_model, tmp_path_factory) -> Path:
    """A base model, a recipe and its whole run, of which tests take copies."""
    place = tmp_path_factory.mktemp("world")
    shutil.copytree(tiny_model(hidden_size=32, intermediate_size=64), place / "base")
    (place / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    write_recipe(place)
    with pytest.MonkeyPatch.context() as patch:
        stay_here(patch)
        made = call("export", place / "recipe.yaml")
    assert made.in_order, made.text
    assert (place / "runs" / "poisoned" / "export" / "bundle").is_dir()  # what so short a training made is not proved
    return place


def write_recipe(place: Path, **model: object) -> None:
    recipe = {
        "name": "poisoned",
        "model": {"path": str(place / "base"), "device": "cpu", **model},
        "data": {"path": str(place / "rows.jsonl")},
        "train": {"max_steps": STEPS, "save_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-3},
        "evaluate": {"max_new_tokens": 4},
        "export": ["bundle"],
        "output_dir": str(place / "runs"),
    }
    (place / "recipe.yaml").write_text(json.dumps(recipe))


@pytest.fixture
def copy(world, tmp_path) -> Path:
    """The world's own copy for a test; the recipe's run stands on the copied base."""
    place = tmp_path / "copy"
    shutil.copytree(world, place)
    for file in (place / "recipe.yaml", *(place / "runs" / "poisoned").glob("fetch/model.json")):
        file.write_text(file.read_text().replace(str(world), str(place)))
    return place


# -- a model's directory ------------------------------------------------------------------------------------------------

READ = (
    "model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
    "chat_template.jinja", "special_tokens_map.json", "added_tokens.json", "tokenizer.model", "vocab.json", "merges.txt",
    "LICENSE", "README.md", "preprocessor_config.json", "model.safetensors.index.json", "own.py",
)  # fmt: skip
UNREAD = (
    "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt", "pytorch_model.bin",
    "adapter_model.bin", "weights.npy", "weights.npz", "model.joblib", "model.pkl", "consolidated.00.pth",
)  # fmt: skip
CASES = [
    *((name, "torch zip", True) for name in READ),
    *((name, "protocol 2", True) for name in ("config.json", "tokenizer.json", "tokenizer.model", "LICENSE")),
    *((name, "torch zip", False) for name in UNREAD),
]


def test_as_many_files_are_poisoned_as_were_counted() -> None:
    assert (len(CASES), len(STATES), len(WHOLE_RUN)) == (32, 14, 23)


@pytest.mark.parametrize(("name", "form", "refused"), CASES)
def test_a_poisoned_file_of_a_base_is_refused_by_name_or_never_read(world, tmp_path, name, form, refused):
    mark = tmp_path / "mark"
    shutil.copytree(world / "base", tmp_path / "base")
    shutil.copy(world / "rows.jsonl", tmp_path)
    write_recipe(tmp_path)
    (tmp_path / "base" / name).write_bytes(FORMS[form](mark))

    said = call("fetch" if refused else "prepare", tmp_path / "recipe.yaml")

    assert not mark.exists()
    assert said.in_order, said.text
    assert (said.code != 0) == refused, said.text
    if refused:
        assert f"{name} holds a pickle that calls posix.mkdir" in said.text
        assert "safetensors" in said.text


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["base", "adapter"])
def test_poisoned_weights_are_refused_in_every_form(world, tmp_path, form, kind):
    mark = tmp_path / "mark"
    shutil.copytree(world / "base", tmp_path / "base")
    shutil.copy(world / "rows.jsonl", tmp_path)
    write_recipe(tmp_path)
    if kind == "base":
        (tmp_path / "base" / "model.safetensors").unlink()
        file = tmp_path / "base" / "pytorch_model.bin"
    else:
        shutil.copytree(world / "runs" / "poisoned" / "train" / "adapter", tmp_path / "adapter")
        (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
        file = tmp_path / "adapter" / "adapter_model.bin"
        write_recipe(tmp_path, path=str(tmp_path / "adapter"), base_model=str(tmp_path / "base"))
    file.write_bytes(FORMS[form](mark))

    said = call("fetch", tmp_path / "recipe.yaml")

    assert not mark.exists()
    assert said.code == 2, said.text
    assert f"{file} holds a pickle that calls posix.mkdir, which is no stored tensor" in said.text
    assert "Take the model as safetensors" in said.text


# -- a checkpoint -------------------------------------------------------------------------------------------------------

STATES = [
    *(
        (name, "torch zip")
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt", "adapter_model.bin")
    ),
    *((name, "row of pickles") for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth")),
    ("training_args.bin", "torch zip"),
    ("pytorch_model.bin", "torch zip"),
    ("trainer_state.json", "protocol 2"),
    ("adapter_config.json", "torch zip"),
    ("finetune.json", "torch zip"),
    ("adapter_model.safetensors", "torch zip"),
]
UNREAD_STATES = ("training_args.bin",)  # refused all the same: it is not the file that was written


@pytest.mark.parametrize(("name", "form"), STATES)
def test_a_poisoned_checkpoint_is_refused_and_none_of_it_run(copy, tmp_path, name, form):
    mark, run = tmp_path / "mark", copy / "runs" / "poisoned"
    checkpoint = run / "train" / "checkpoint-2"
    shutil.copytree(checkpoint, tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-2" / name).write_bytes(FORMS[form](mark))

    said = call("train", copy / "recipe.yaml", "--force", "--resume", tmp_path / "checkpoint-2")

    assert not mark.exists()
    assert said.in_order, said.text
    assert said.code != 0, said.text
    assert name in said.text
    assert "pickle" in said.text or name in UNREAD_STATES


# -- a run --------------------------------------------------------------------------------------------------------------

EVIDENCE = (
    "fetch/model.json", "fetch/report.json", "prepare/train.jsonl", "prepare/template.json", "prepare/chat_template.jinja",
    "prepare/sources.json", "prepare/report.json", "train/trainer_logs.json", "train/report.json", "evaluate/rows.json",
    "merge/report.json", "export/exports.json", "recipe.yaml", "manifest.json", "events.jsonl",
)  # fmt: skip
RESULTS = (
    "train/adapter/adapter_model.bin", "train/adapter/adapter_config.json", "train/adapter/tokenizer.json",
    "train/adapter/adapter_model.safetensors", "merge/model/pytorch_model.bin", "merge/model/config.json",
    "merge/model/model.safetensors", "merge/model/tokenizer_config.json",
)  # fmt: skip
WHOLE_RUN = (*EVIDENCE, *RESULTS)
READING: tuple[Callable[[Path], Said], ...] = (
    lambda place: call("verify", place / "runs" / "poisoned"),
    lambda place: call("serve", place / "runs" / "poisoned"),
    lambda place: call("export", place / "runs" / "poisoned", "--out", place / "out"),
)
MAKING: tuple[Callable[[Path], Said], ...] = (
    lambda place: call("evaluate", place / "recipe.yaml"),
    lambda place: call("merge", place / "recipe.yaml", "--force"),
    lambda place: call("export", place / "recipe.yaml", "--force"),
)
MADE_AGAIN = ("recipe.yaml", "prepare/chat_template.jinja", "export/exports.json", *RESULTS)  # stages go on from these


@pytest.mark.parametrize("name", WHOLE_RUN)
def test_a_poisoned_run_is_told_of_by_every_command_and_none_of_it_run(copy, tmp_path, name, monkeypatch):
    stay_here(monkeypatch)
    monkeypatch.setattr("finetune.serving.serve", lambda *_: None)
    mark = tmp_path / "mark"
    (copy / "runs" / "poisoned" / name).write_bytes(FORMS["torch zip"](mark))

    for number, command in enumerate((*READING, *(MAKING if name in MADE_AGAIN else ()))):
        said = command(copy)
        assert not mark.exists()
        assert said.in_order, (number, said.text)
        assert said.code != 0 or command in MAKING, (number, said.text)
