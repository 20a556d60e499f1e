"""When patches of sabotages act, and how often they were called: from a stage on, over all processes, however those end."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from finetune.core.errors import StageError
from finetune.core.files import write_text
from finetune.recipe import yaml
from finetune.run import Run
from sabotage import baseline, bench, import_hook, sabotage, starting, table
from sabotage.calls import Called, Counter, counted
from sabotage.context import Context
from support import town

OWN = """
import os
from pathlib import Path
from sabotage.context import Context

def noted(context: Context) -> None:
    def note(original, stage, path):
        with open(os.environ["NOTES"], "a") as file:
            file.write(stage + " ")
        return original(stage, path)

    context.wrap("finetune.stages.runner:left_by", note)

def shout(context: Context) -> None:
    context.wrap("textwrap:shorten", lambda original, text, width: original(text, width).upper())
    context.wrap("textwrap:fill", lambda original, *arguments: "")
"""
SHORTEN = "import textwrap; print(textwrap.shorten('a b', 9))"


@pytest.fixture
def environment(tmp_path):
    """That of patched processes, which find a module `own` of sabotages and count their calls in a folder."""
    for name in ("start", "calls"):
        (tmp_path / name).mkdir()
    write_text(tmp_path / "own.py", OWN)
    shutil.copyfile(starting.__file__, tmp_path / "start" / "sitecustomize.py")
    found = baseline.environment()
    path = os.pathsep.join([str(tmp_path / "start"), str(tmp_path), found["PYTHONPATH"]])
    return {**found, "PYTHONPATH": path, starting.PATCHES: "own:shout", starting.CALLS: str(tmp_path / "calls")}


def python(code, environment):
    return subprocess.run(
        [sys.executable, "-P", "-c", code], env=environment, capture_output=True, text=True, check=False, timeout=60
    )


# -- when they act -----------------------------------------------------------------------------------------------------


def test_a_patch_since_evaluate_does_not_act_in_the_stages_before_though_they_run(environment, tmp_path):
    recipe = town.recipe(town.build(tmp_path / "town"), tmp_path / "runs", align=None, expect={"resume": False})
    write_text(tmp_path / "recipe.yaml", yaml.write(recipe.model_dump(mode="json", exclude_unset=True)))
    more = {**environment, starting.PATCHES: "own:noted", starting.SINCE: "evaluate", "NOTES": str(tmp_path / "notes")}
    run = Run(tmp_path / "run")
    for length in (256, 255):  # so that the second time everything is done again
        words = ("run", str(tmp_path / "recipe.yaml"), "--run", str(run.path), "--set", f"train.max_length={length}")
        baseline.finetune(*words, more=more, allowed=(0, 1))

    began = [line["stage"] for line in run.events() if line["event"] == "stage_started"]
    assert [began.count(name) for name in ("prepare", "train", "evaluate")] == [2, 2, 2]
    noted = (tmp_path / "notes").read_text().split()
    assert noted == [name for name in began if name not in ("fetch", "prepare", "rehearse", "train")]


@pytest.mark.parametrize(("stage", "says"), [("train", "a b"), ("evaluate", "A B"), ("compare", "A B"), (None, "a b")])
def test_a_process_that_a_stage_starts_is_patched_as_the_stage_is(environment, stage, says):
    told = {import_hook.STAGE: stage} if stage else {}
    done = python(SHORTEN, {**environment, starting.SINCE: "evaluate", **told})
    assert (done.stdout, done.stderr) == (f"{says}\n", "")


def test_a_patch_of_all_stages_acts_before_the_first(environment):
    assert python(SHORTEN, {**environment, starting.SINCE: "fetch"}).stdout == "A B\n"


def test_a_value_is_there_only_while_patches_act(monkeypatch):
    monkeypatch.setenv(import_hook.STAGE, "fetch")
    reach, context = import_hook.Reach("evaluate"), Context()
    context.put(f"{__name__}:SHORTEN", lambda original: original + "!")
    import_hook.patch(sys.modules[__name__], enumerate(context.patches), reach)
    before = SHORTEN
    seen = []
    for name in ("train", "evaluate", "merge", "prepare"):
        reach.begin(lambda stage: seen.append(SHORTEN), type("Stage", (), {"name": name}))

    assert seen == [before, f"{before}!", f"{before}!", before]


def test_a_sabotage_that_begins_with_no_stage_is_refused():
    with pytest.raises(
        ValueError, match="no stage 'evaluation', which 'it' is to begin with; the stages: fetch, prepare"
    ):
        sabotage("it", since="evaluation")


# -- how often they are called -----------------------------------------------------------------------------------------

ENDS = {
    "by itself": "",
    "at once": "os._exit(0)",
    "killed": "os.kill(os.getpid(), 9)",
    "as a copy at once": "os.fork() or (textwrap.shorten('a', 9), os._exit(0)); os.wait()",
}


@pytest.mark.parametrize(("end", "processes"), [*((name, 1) for name in list(ENDS)[:3]), ("as a copy at once", 2)])
def test_calls_are_counted_however_a_process_ends(environment, tmp_path, end, processes):
    python(f"import os, textwrap; textwrap.shorten('a', 9); textwrap.shorten('b', 9); {ENDS[end]}", environment)
    found = counted(tmp_path / "calls", ["shorten", "fill"])
    assert found == (Called("shorten", 1 + processes, processes), Called("fill", 0, 0))


def test_what_does_not_act_is_not_counted(environment, tmp_path):
    python(SHORTEN, {**environment, starting.SINCE: "evaluate", import_hook.STAGE: "train"})
    assert counted(tmp_path / "calls", ["shorten", "fill"])[0].times == 0


def test_a_process_that_calls_nothing_leaves_no_file(tmp_path):
    counter = Counter(tmp_path, 2)
    assert list(tmp_path.iterdir()) == []
    counter.add(1)
    assert [len(Path(file).read_bytes()) for file in tmp_path.iterdir()] == [16]


def attempted(tmp_path, monkeypatch, *, calls, refused=""):
    """What becomes of a sabotage of two patches that a process calls so often."""
    (tmp_path / "honest" / "run").mkdir(parents=True)
    write_text(tmp_path / "honest" / "run" / "verdicts.json", "{}")

    def carry_out(self, name, context, run, told, of):
        counter = Counter(Path(told[starting.CALLS]), 2)
        for number, times in enumerate(calls):
            for _ in range(times):
                counter.add(number)
        return bench.Found(name=name, failed=(), refused=refused, seconds=1.0)

    def apply(context):
        context.wrap("one:f", lambda original: None)
        context.wrap("two:f", lambda original: None)

    monkeypatch.setattr(bench.Bench, "_honest", lambda self, name: (tmp_path / "honest", {}))
    monkeypatch.setattr(bench.Bench, "_carry_out", carry_out)
    each = replace(next(iter(table().values())), since="train", apply=apply)
    return bench.Bench(tmp_path / "bench").attempt(each)


def test_what_is_found_says_how_often_each_patch_was_called(tmp_path, monkeypatch):
    found = attempted(tmp_path, monkeypatch, calls=(3, 1))
    assert [(each.target, each.times) for each in found.calls] == [("one:f", 3), ("two:f", 1)]


def test_a_sabotage_with_a_patch_that_was_never_called_is_broken_and_not_missed(tmp_path, monkeypatch):
    with pytest.raises(StageError, match="NEVER CALLED, from 'train' on: two:f$"):
        attempted(tmp_path, monkeypatch, calls=(3, 0))


def test_but_not_where_the_run_was_refused(tmp_path, monkeypatch):
    assert attempted(tmp_path, monkeypatch, calls=(0, 0), refused="no").caught
