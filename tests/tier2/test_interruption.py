"""Real processes, really interrupted and really killed, go on where they were."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from finetune.backends import get
from finetune.recipe import dump
from finetune.run import evidence
from finetune.stages.pipeline import run_directory, run_stages

STEPS = 150


def start(tmp_path, run, recipe_file, *more) -> subprocess.Popen[str]:
    """`finetune train` in a process of its own, once it has done some steps more than were done."""
    before = len(run.events("step"))
    command = [sys.executable, "-m", "finetune", "train", str(recipe_file), "--run", str(run.path), *more]
    child = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    deadline = time.monotonic() + 120
    while len(run.events("step")) < before + 25:
        if child.poll() is not None or time.monotonic() > deadline:
            child.kill()
            pytest.fail(f"training did not start: {child.communicate()[1]}")
        time.sleep(0.05)
    return child


@pytest.fixture
def parts(tiny_recipe, tmp_path):
    recipe = tiny_recipe(max_steps=STEPS, save_steps=20, save_total_limit=None)
    file = tmp_path / "recipe.yaml"
    file.write_text(dump(recipe), encoding="utf-8")
    return recipe, file, run_directory(recipe, tmp_path / "interrupted")


def test_interrupted_then_killed_then_resumed_equals_the_uninterrupted_run(parts, tmp_path, cli):
    recipe, file, run = parts
    child = start(tmp_path, run, file)
    os.kill(child.pid, signal.SIGINT)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "--resume" in said
    assert "Traceback" not in said
    done = max(step["step"] for step in run.events("step"))
    assert done < STEPS, "the training was over before it could be interrupted"
    assert (run.path / "train" / f"checkpoint-{done}").is_dir()
    assert run.report("train") is None

    child = start(tmp_path, run, file, "--resume")
    child.kill()
    child.communicate(timeout=60)
    assert run.report("train") is None

    resumed = cli("train", file, "--run", run.path, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert run.report("train").metrics["resumed_from"] > done

    straight = run_directory(recipe, tmp_path / "straight")
    run_stages(recipe, straight, ["train"])
    backend = get("torch")
    assert backend.tensors(run.path / "train/adapter") == backend.tensors(straight.path / "train/adapter")
    losses = [[(step["step"], step["loss"]) for step in evidence.steps(each, "train")] for each in (run, straight)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == STEPS
