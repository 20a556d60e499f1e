"""Python code that comes with a model runs where the recipe trusts it, in every process, and nobody is ever asked."""

from __future__ import annotations

import json
import os
import pty
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from finetune.checks import results
from finetune.core.errors import StageError, UsageError
from finetune.core.lookup import load
from finetune.recipe import load as load_recipe
from finetune.stages.pipeline import run_directory, run_stages
from support.processes import stay_here

MODEL = """
import sys
from transformers import LlamaConfig, LlamaForCausalLM

print("[y/N]", {"facts": None})  # anybody may print
print("noise", file=sys.stderr)


class OwnConfig(LlamaConfig):
    model_type = "own-llama"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
TOKENIZER = """
import os, pathlib
from transformers import PreTrainedTokenizerFast

print("[y/N]")
if "OWN_CODE_MARK" in os.environ:
    pathlib.Path(os.environ["OWN_CODE_MARK"]).touch()


class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""
QUESTIONS = [{"id": "one", "prompt": "What is 1 plus 1?", "answer": "It is 2."}]


def with_code(source: Path, place: Path, *, model: bool = True, tokenizer: bool = True) -> Path:
    """A copy of a model directory whose model, tokenizer or both are classes of its own."""
    shutil.copytree(source, place)
    if model:
        named = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
        change(place / "config.json", model_type="own-llama", auto_map=named, architectures=["OwnForCausalLM"])
        (place / "modeling_own.py").write_text(MODEL)
    if tokenizer:
        named = {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}
        change(place / "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=named)
        (place / "tokenization_own.py").write_text(TOKENIZER)
    return place


def change(file: Path, **values: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def write_recipe(place: Path, model: Path, *, trust: bool) -> Path:
    rows = [{"prompt": f"What is {n} plus {n}?", "completion": f"It is {2 * n}."} for n in range(8)]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "probes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    recipe = {
        "name": "own",
        "model": {"path": str(model), "device": "cpu", "trust_remote_code": trust},
        "data": {"path": str(place / "rows.jsonl")},
        "train": {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-3},
        "evaluate": {"probes": str(place / "probes.jsonl"), "max_new_tokens": 4},
        "export": ["bundle"],
        "output_dir": str(place / "runs"),
    }
    (place / "recipe.yaml").write_text(json.dumps(recipe))
    return place / "recipe.yaml"


def on_a_terminal(command: list[str], environment: dict[str, str], cwd: Path) -> tuple[int, str]:
    """Run a command whose standard input, output and errors are a terminal that answers "y" to whatever is asked."""
    mine, theirs = pty.openpty()
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, cwd=cwd)
    os.close(theirs)
    said, asked, end = b"", False, time.monotonic() + 600
    while time.monotonic() < end:
        if select.select([mine], [], [], 0.1)[0]:
            try:
                said += os.read(mine, 65536)
            except OSError:  # the terminal is gone with the last who had it
                break
            if b"[y/N]" in said and not asked:
                asked = True  # once: a terminal echoes
                os.write(mine, b"y\n")
        elif process.poll() is not None:
            break
    os.close(mine)
    return process.wait(10), said.decode("utf-8", "replace")


@pytest.mark.parametrize(("where", "terminal"), [("tokenizer", True), ("model", False)])
def test_code_that_is_not_trusted_is_refused_and_nobody_is_asked(tiny_model, tmp_path, where, terminal):
    model = with_code(tiny_model(), tmp_path / "base", **{"model": False, "tokenizer": False, where: True})
    recipe = write_recipe(tmp_path, model, trust=False)
    environment = {**os.environ, "OWN_CODE_MARK": str(tmp_path / "mark"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-m", "finetune", "fetch", str(recipe)]

    if terminal:
        code, said = on_a_terminal(command, {**environment, "COLUMNS": "1000"}, tmp_path)
    else:
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, input="y\n" * 9, check=False
        )
        code, said = done.returncode, done.stdout + done.stderr

    assert code == 2, said
    assert "[y/N]" not in said
    assert "model.trust_remote_code is false" in said
    file, named = ("config.json", "modeling_own.OwnConfig") if where == "model" else (
        "tokenizer_config.json", "tokenization_own.OwnTokenizer"
    )  # fmt: skip
    assert f"{file} names {named}" in said
    assert not (tmp_path / "mark").exists()
    assert not (tmp_path / "modules").exists()


def test_trusted_code_goes_through_the_whole_pipeline_and_its_processes(tiny_model, tmp_path, monkeypatch):
    """Up to `measure` on a terminal, with a process of its own; the rest here. What the code prints is no answer."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    stay_here(monkeypatch)
    model = with_code(tiny_model(), tmp_path / "base")
    file = write_recipe(tmp_path, model, trust=True)
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "COLUMNS": "200"}

    code, said = on_a_terminal([sys.executable, "-m", "finetune", "measure", str(file)], environment, tmp_path)
    assert (code, "unexpected" in said) == (0, False), said
    recipe = load_recipe(file)
    run = run_directory(recipe)
    run_stages(recipe, run, ["compare"])
    verdicts = {each.name: each for each in results(recipe, run)}

    for place in (run.path / "merge" / "model", run.path / "export" / "bundle"):
        assert {"modeling_own.py", "tokenization_own.py"} <= {each.name for each in place.iterdir()}
    for name in ("fresh_process", "saved_tokenizer", "prompt_parity[bundle]", "distribution_parity[bundle]"):
        assert verdicts[name].passed, verdicts[name]


def test_code_that_is_not_needed_is_not_run(tiny_model, tmp_path, monkeypatch):
    """transformers has the class itself: published models keep the code that they began with."""
    monkeypatch.setenv("OWN_CODE_MARK", str(tmp_path / "mark"))
    model = with_code(tiny_model(), tmp_path / "base", model=False, tokenizer=True)
    change(model / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    read = load("finetune.backends.torch.tokenizer:HFTokenizer")

    assert read(model).encode("a") == read(tiny_model()).encode("a")
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("reference", ["reading:constants", "tokenizer:read_config", "loading:load_for_inference"])
def test_every_reader_of_a_model_refuses_by_itself(tiny_model, tmp_path, reference):
    model = with_code(tiny_model(), tmp_path / "base", tokenizer=False)

    with pytest.raises(UsageError, match=r"config.json names modeling_own.OwnConfig.*trust_remote_code: true"):
        load(f"finetune.backends.torch.{reference}")(model)


def test_trusted_code_that_fails_is_named(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = with_code(tiny_model(), tmp_path / "base")
    (model / "tokenization_own.py").write_text("raise ZeroDivisionError('over nothing')")
    read = load("finetune.backends.torch.tokenizer:HFTokenizer")

    with pytest.raises(
        StageError, match=r"ZeroDivisionError in or around the code that comes with it .*: over nothing"
    ):
        read(model, trust_remote_code=True)
