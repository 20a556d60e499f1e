"""The command line: what it accepts, what it prints where, and what it ends with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from finetune.checks import judge
from finetune.checks.remedies import with_remedy
from finetune.cli.app import COMMANDS, cli
from finetune.core import console, errors
from finetune.core.files import write_json, write_jsonl, write_text
from finetune.recipe import Recipe, load
from finetune.recipe.examples import EXAMPLES, examples
from finetune.report import summary, terminal
from finetune.run import Run
from finetune.stages import runner
from support import records

TOKEN = "hf_" + "secretvalue" * 3
WHY = "the mean of the last steps was held against the mean of the first ones, " * 3
RECIPE = """\
name: small
backend: fake
data:
  path: rows.jsonl
train:
  max_steps: 3
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with a recipe and its data."""
    monkeypatch.chdir(tmp_path)
    for name in ("FT_DEBUG", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "small.yaml").write_text(RECIPE)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 6)
    return tmp_path


def call(*args: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(arg) for arg in args], prog_name="finetune")


Stand = Callable[[Recipe, Run], dict[str, Any]]


class Stages:
    """Stand-ins for the stages: they note what ran, and do what a test puts into `does`."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.resumed: dict[str, Path | None] = {}
        self.does: dict[str, Stand] = {}
        self.insisted: list[bool] = []

    def load(self, reference: str) -> Stand:
        name = reference.partition(":")[0].rpartition(".")[2]

        def run(recipe: Recipe, run: Run) -> dict[str, Any]:
            self.ran.append(name)
            self.resumed[name] = run.resume
            print(f"a library prints in {name}")
            result = run.stage_dir(name) / "result.json"
            write_json(result, {"stage": name})
            extra = self.does.get(name, lambda recipe, run: {})(recipe, run)
            return {"metrics": records.metrics(name), "artifacts": [result], **extra}

        return run


@pytest.fixture
def stand_ins(here: Path, monkeypatch: pytest.MonkeyPatch) -> Stages:
    found = Stages()
    monkeypatch.setattr(runner, "load", found.load)
    # They prepare nothing, so there is nothing to hold a checkpoint against; test_resuming.py does.
    monkeypatch.setattr(
        "finetune.stages.pipeline.refuse_another", lambda *args, changed: found.insisted.append(changed)
    )
    return found


def _verdicts(passed: bool) -> Callable[..., list[Any]]:
    """What the checks find: one verdict."""

    def results(recipe: Recipe, run: Run, only: Any = None, *, training: bool = False) -> list[Any]:
        return [with_remedy(judge("loss_convergence", 0.5 if passed else 0.01, ">=", 0.05, "share", "train/x", WHY))]

    return results


# -- exit codes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (errors.UsageError("no such thing"), 2),
        (errors.RecipeError("recipe.yaml has 2 faults:", ["one", "two"]), 2),
        (errors.DataError("the data has faults:", ["rows.jsonl:3: broken"]), 2),
        (errors.MissingError("not there. Install it with: pip install it"), 3),
        (errors.StageError("the loss is not a number"), 4),
        (errors.ResourceError("too little memory"), 4),
        (errors.LockedError("in use"), 4),
        (errors.Interrupted("interrupted; go on with: finetune train RECIPE --resume"), 130),
        (KeyboardInterrupt(), 130),
    ],
)
def test_every_error_has_its_exit_code_and_one_message(stand_ins: Stages, raised: BaseException, code: int) -> None:
    def fail(recipe: Recipe, run: Run) -> dict[str, Any]:
        raise raised

    stand_ins.does["train"] = fail
    result = call("train", "small.yaml")

    assert result.exit_code == code
    assert f"error: {raised or 'interrupted'}" in result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""


def test_a_bug_is_one_line_that_asks_for_a_report(stand_ins: Stages) -> None:
    stand_ins.does["train"] = lambda recipe, run: {"metrics": len(5)}  # type: ignore[arg-type]
    result = call("train", "small.yaml")

    assert result.exit_code == 4
    assert result.stderr.splitlines()[-1] == (
        "error: unexpected TypeError: object of type 'int' has no len() "
        "(run again with --debug for the traceback; please report)"
    )
    assert "Traceback" not in result.output


@pytest.mark.parametrize("way", ["option", "environment"])
def test_debug_shows_the_traceback(stand_ins: Stages, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    stand_ins.does["train"] = lambda recipe, run: {"metrics": len(5)}  # type: ignore[arg-type]
    if way == "environment":
        monkeypatch.setenv("FT_DEBUG", "1")
    result = call("train", "small.yaml", *(["--debug"] if way == "option" else []))

    assert result.exit_code == 4
    assert "Traceback (most recent call last)" in result.stderr
    assert "please report" not in result.stderr


def test_a_full_disk_is_named(stand_ins: Stages) -> None:
    def fail(recipe: Recipe, run: Run) -> dict[str, Any]:
        raise OSError(28, "No space left on device", "checkpoint-5")

    stand_ins.does["train"] = fail
    result = call("train", "small.yaml")

    assert result.exit_code == 4
    assert "error: No space left on device: checkpoint-5. The disk is full" in result.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["trian"], "Did you mean 'train'?"),
        (["train", "--resum"], "No such option"),
        (["--nope"], "No such option"),
        (["train"], "no recipe given"),
        (["train", "small.yaml", "--config", "other.yaml"], "more than one recipe"),
        (["train", "small.yaml", "--set", "train.max_steps"], "expected section.key=value"),
        (["run", "--example", "quikstart"], "Did you mean 'quickstart'?"),
        (["completion", "cmd.exe"], "bash"),
        (["align", "small.yaml"], "it has no 'align' section"),
        (["fetch", "small.yaml", "--to", "there"], "--to"),
    ],
)
def test_bad_usage_ends_with_2_and_a_hint(here: Path, args: list[str], words: str) -> None:
    result = call(*args)

    assert result.exit_code == 2
    assert "error: " in result.stderr
    assert words in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["train", "nope.yaml"], "finetune init nope.yaml"),
        (["verify", "nope"], "finetune runs ls"),
        (["report", "nope"], "finetune runs ls"),
        (["runs", "ls", "nope"], "no directory nope"),
        (["train", "small.yaml", "--resume"], "nothing to resume"),
        (["train", "small.yaml", "--resume", "nope"], "no checkpoint at nope"),
    ],
)
def test_what_is_missing_ends_with_3_and_the_way_to_get_it(here: Path, args: list[str], words: str) -> None:
    result = call(*args)

    assert result.exit_code == 3
    assert words in result.stderr


def test_a_run_in_use_is_not_touched(stand_ins: Stages, here: Path) -> None:
    with Run(here / "runs" / "small").locked():
        result = call("train", "small.yaml")

    assert result.exit_code == 4
    assert "in use by another finetune process" in result.stderr
    assert stand_ins.ran == []
    assert not (here / "runs" / "small" / "recipe.yaml").exists()


@pytest.mark.parametrize(("passed", "code"), [(True, 0), (False, 1)])
def test_run_ends_as_its_checks_do(
    stand_ins: Stages, here: Path, monkeypatch: pytest.MonkeyPatch, passed: bool, code: int
) -> None:
    monkeypatch.setattr("finetune.checks.results", _verdicts(passed))
    result = call("run", "small.yaml")

    assert result.exit_code == code
    assert stand_ins.ran == ["fetch", "prepare", "train", "evaluate", "merge", "measure"]
    assert ("all 1 check proved" if passed else "1 of 1 check refuted: loss_convergence") in result.stdout
    assert f"verify again: finetune verify {Path('runs') / 'small'}" in result.stdout


def test_verify_ends_with_1_when_a_check_is_refuted(stand_ins: Stages, monkeypatch: pytest.MonkeyPatch) -> None:
    call("train", "small.yaml")
    monkeypatch.setattr("finetune.checks.results", _verdicts(False))

    assert call("verify", "small").exit_code == 1
    assert call("verify", "runs/small").exit_code == 1
    assert call("verify").exit_code == 1  # the newest run


# -- recipes -----------------------------------------------------------------------------------------------------------


def test_every_fault_of_a_recipe_is_reported_at_once_with_its_line(here: Path) -> None:
    (here / "bad.yaml").write_text(
        "name: bad\nbackend: fake\ndata: {path: rows.jsonl}\ntrain:\n  learning_rat: 1\n  max_steps: 0\n"
    )
    result = call("validate", "bad.yaml", "--set", "evaluate.probs=x")

    assert result.exit_code == 2
    assert "bad.yaml has 3 faults:" in result.stderr
    assert "bad.yaml:5: train.learning_rat: unknown key. Did you mean 'learning_rate'?" in result.stderr
    assert "bad.yaml:6: train.max_steps: 0 steps train nothing" in result.stderr
    assert "Did you mean 'probes'?" in result.stderr


def test_broken_yaml_is_reported_with_its_line(here: Path) -> None:
    (here / "bad.yaml").write_text("name: x\ntrain: [1, 2\ndata: 3\n")
    result = call("validate", "bad.yaml")

    assert result.exit_code == 2
    assert "bad.yaml:3:" in result.stderr


def test_a_recipe_that_is_no_text_is_refused(here: Path) -> None:
    (here / "bad.yaml").write_bytes(b"\xff\xfe\x00name")
    result = call("validate", "bad.yaml")

    assert result.exit_code == 2
    assert "not UTF-8" in result.stderr


def test_validate_names_every_file_that_is_missing(here: Path) -> None:
    result = call(
        *("validate", "small.yaml", "--set", "data.path=row.jsonl", "--set", "evaluate.probes=probes.jsonl"),
        *("--set", "model.path=./nothing"),
    )

    assert result.exit_code == 3
    assert "small.yaml has 3 faults:" in result.stderr
    assert "Did you mean 'rows.jsonl'?" in result.stderr
    assert "evaluate.probes: no file" in result.stderr
    assert "model.path: no model at" in result.stderr


def test_validate_names_an_unknown_backend(here: Path) -> None:
    result = call("validate", "small.yaml", "--set", "backend=troch")

    assert result.exit_code == 2
    assert "Did you mean 'torch'?" in result.stderr


def test_validate_prints_a_recipe_that_loads_to_the_same(here: Path) -> None:
    result = call("validate", "small.yaml", "--set", "train.learning_rate=3e-4")
    (here / "again.yaml").write_text(result.stdout)

    assert result.exit_code == 0
    again, first = load(here / "again.yaml"), load(here / "small.yaml", ["train.learning_rate=3e-4"])
    assert Path(again.output_dir) == Path(first.output_dir).resolve()
    assert again.model_dump(exclude={"output_dir"}) == first.model_dump(exclude={"output_dir"})


def test_the_recipe_can_be_an_argument_an_option_a_directory_or_here(stand_ins: Stages, here: Path) -> None:
    (here / "project").mkdir()
    (here / "project" / "recipe.yaml").write_text(RECIPE.replace("rows.jsonl", "../rows.jsonl"))
    (here / "recipe.yaml").write_text(RECIPE)

    for args in (["small.yaml"], ["--config", "small.yaml"], ["project"], []):
        result = call("train", *args, "--dry-run", "--json")
        assert result.exit_code == 0, args
        assert json.loads(result.stdout)["run"] == str(here / "runs" / "small")


def test_a_stored_run_can_be_run_again_as_a_recipe(stand_ins: Stages, here: Path) -> None:
    call("train", "small.yaml", "--run", "elsewhere")
    stand_ins.ran.clear()
    result = call("train", "elsewhere", "--run", "elsewhere")

    assert result.exit_code == 0
    assert stand_ins.ran == []


def test_a_literal_token_is_warned_about_and_printed_nowhere(stand_ins: Stages, here: Path) -> None:
    (here / "small.yaml").write_text(RECIPE + f"model:\n  token: {TOKEN}\n")

    def fail(recipe: Recipe, run: Run) -> dict[str, Any]:
        assert recipe.model.token is not None
        assert recipe.model.token.get_secret_value() == TOKEN
        raise errors.StageError(f"the hub refused {TOKEN}")

    stand_ins.does["train"] = fail
    results = [
        call("train", "small.yaml", "--debug"),
        call("validate", "small.yaml"),
        call("validate", "small.yaml", "--json"),
    ]

    assert "warning: small.yaml:8: model.token: a literal token; write '${HF_TOKEN}' instead" in results[0].stderr
    assert "the hub refused ***" in results[0].stderr
    assert [TOKEN in result.output for result in results] == [False] * 3
    written = [path for path in (here / "runs").rglob("*") if path.is_file()]
    assert len(written) >= 4
    assert [path.name for path in written if TOKEN.encode() in path.read_bytes()] == []


@pytest.mark.parametrize(
    ("option", "told", "token"),
    [
        ("model.token=short-secret-1", "model.token=***", "short-secret-1"),
        ("model.token=pw-12", "model.token=***", "pw-12"),
        ("model={token: short-secret-1}", "model={token: ***}", "short-secret-1"),
    ],
)
def test_a_token_on_the_command_line_is_not_written_into_the_run(
    stand_ins: Stages, here: Path, monkeypatch: pytest.MonkeyPatch, option: str, told: str, token: str
) -> None:
    args = ["train", "small.yaml", "--set", option]
    monkeypatch.setattr(sys, "argv", ["finetune", *args])
    result = call(*args)

    assert result.exit_code == 0
    assert told in Run("runs/small").manifest()["command"]
    assert [p for p in (here / "runs").rglob("*") if p.is_file() and token.encode() in p.read_bytes()] == []


# -- stages ------------------------------------------------------------------------------------------------------------


def test_a_stage_runs_what_it_needs_and_nothing_else(stand_ins: Stages) -> None:
    assert call("prepare", "small.yaml").exit_code == 0
    assert stand_ins.ran == ["fetch", "prepare"]

    stand_ins.ran.clear()
    assert call("train", "small.yaml").exit_code == 0
    assert stand_ins.ran == ["train"]


def test_finished_stages_are_not_run_again(stand_ins: Stages) -> None:
    call("train", "small.yaml")
    stand_ins.ran.clear()
    result = call("train", "small.yaml")

    assert result.exit_code == 0
    assert stand_ins.ran == []
    assert "train: up to date" in result.stderr


def test_force_runs_the_named_stage_again_and_not_what_it_needs(stand_ins: Stages) -> None:
    call("train", "small.yaml")
    stand_ins.ran.clear()
    call("train", "small.yaml", "--force")

    assert stand_ins.ran == ["train"]


def test_dry_run_runs_and_writes_nothing(stand_ins: Stages, here: Path) -> None:
    before = sorted(here.rglob("*"))
    result = call("run", "small.yaml", "--dry-run")

    assert result.exit_code == 0
    assert stand_ins.ran == []
    assert sorted(here.rglob("*")) == before
    assert result.stdout.count("has not run yet") == 6


def test_dry_run_says_what_changed(stand_ins: Stages, here: Path) -> None:
    call("train", "small.yaml")

    def planned(*args: str) -> dict[str, tuple[bool, str]]:
        found = json.loads(call("train", "small.yaml", "--dry-run", "--json", *args).stdout)["stages"]
        return {step["stage"]: (step["runs"], step["why"]) for step in found}

    assert {runs for runs, _ in planned().values()} == {False}
    changed = planned("--set", "train.max_steps=5")
    assert changed["fetch"] == (False, "up to date")
    assert changed["prepare"] == (False, "up to date")
    assert changed["train"][1] == "changed: train.max_steps 3 -> 5"
    longer = planned("--set", "train.max_length=64")
    assert longer["prepare"][1] == "changed: train.max_length 1024 -> 64"
    assert longer["train"][1] == "changed: train.max_length 1024 -> 64"
    assert planned("--force")["train"] == (True, "forced")

    (here / "rows.jsonl").write_text('{"prompt": "c", "completion": "d"}\n')
    assert planned()["prepare"] == (True, "its data or an earlier stage changed")

    (here / "runs" / "small" / "fetch" / "result.json").unlink()
    assert planned()["fetch"] == (True, "fetch/result.json is gone")


def test_the_run_holds_recipe_manifest_and_events(stand_ins: Stages, here: Path) -> None:
    call("train", "small.yaml", "--set", "train.seed=7")
    run = Run.open("runs/small")
    manifest = run.manifest()

    stored = load(run.path / "recipe.yaml").train
    assert stored is not None
    assert stored.seed == 7
    assert manifest["seeds"]["train"] == {"seed": 7, "data_seed": 7}
    assert {"finetune", "python", "packages", "platform", "cpu", "cores", "memory_bytes", "gpus", "git"} <= set(
        manifest
    )
    assert [event["event"] for event in run.events()][:2] == ["recipe", "stage_started"]

    call("train", "small.yaml", "--set", "train.seed=8", "--set", "train.data_seed=9")
    assert [event["replaced"] for event in run.events("recipe")] == [False, True]
    assert run.manifest()["seeds"]["train"] == {"seed": 8, "data_seed": 9}


def test_a_failed_stage_leaves_an_event_and_no_report(stand_ins: Stages) -> None:
    call("train", "small.yaml")

    def fail(recipe: Recipe, run: Run) -> dict[str, Any]:
        raise errors.StageError("the loss is not a number")

    stand_ins.does["train"] = fail
    call("train", "small.yaml", "--force")
    run = Run.open("runs/small")

    assert run.report("train") is None
    assert run.report("prepare") is not None
    assert run.events("stage_failed")[-1]["message"] == "the loss is not a number"
    assert "ended:        failed in train: the loss is not a number" in call("runs", "show", "small").stdout


def _checkpoint(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "trainer_state.json").write_text('{"global_step": 1}')
    return path


def test_resume_takes_the_newest_checkpoint(stand_ins: Stages, here: Path) -> None:
    for step in (9, 10):
        _checkpoint(here / "runs" / "small" / "train" / f"checkpoint-{step}")
    result = call("train", "small.yaml", "--resume")

    assert result.exit_code == 0
    assert stand_ins.resumed["train"] == here / "runs" / "small" / "train" / "checkpoint-10"
    assert stand_ins.resumed["prepare"] is None


@pytest.mark.parametrize(
    "args", [["--config", "small.yaml", "--resume", "out/checkpoint-1"], ["--resume", "small.yaml"]]
)
def test_resume_takes_a_published_checkpoint(stand_ins: Stages, here: Path, args: list[str]) -> None:
    (here / "small.yaml").write_text(RECIPE + "  output_dir: out\n")
    wanted = _checkpoint(here / "out" / "checkpoint-1")
    result = call("train", *args)

    assert result.exit_code == 0, result.stderr
    assert stand_ins.resumed["train"] == wanted


def test_resume_runs_a_finished_stage_again(stand_ins: Stages, here: Path) -> None:
    call("train", "small.yaml")
    _checkpoint(here / "runs" / "small" / "train" / "checkpoint-2")
    stand_ins.ran.clear()
    call("train", "small.yaml", "--resume", "checkpoint-2")

    assert stand_ins.ran == ["train"]


def test_going_on_with_another_training_must_be_asked_for(stand_ins: Stages, here: Path) -> None:
    _checkpoint(here / "runs" / "small" / "train" / "checkpoint-2")
    alone = call("train", "small.yaml", "--changed")

    assert alone.exit_code == 2
    assert "--changed goes with --resume" in alone.stderr
    assert call("train", "small.yaml", "--resume").exit_code == 0
    assert call("train", "small.yaml", "--resume", "checkpoint-2", "--changed").exit_code == 0
    assert stand_ins.insisted == [False, True]


def test_a_directory_that_is_no_checkpoint_is_refused_with_those_that_are(stand_ins: Stages, here: Path) -> None:
    _checkpoint(here / "runs" / "small" / "train" / "checkpoint-4")
    result = call("train", "small.yaml", "--resume", here)

    assert result.exit_code == 2
    assert "is not a checkpoint" in result.stderr
    assert "checkpoint-4" in result.stderr
    assert stand_ins.ran == []


def test_train_quick_makes_its_own_recipe(stand_ins: Stages, here: Path) -> None:
    result = call("train", "quick", "smollm2-135m", "rows.jsonl", "--steps", "5", "--set", "backend=fake")
    recipe = load(here / "runs" / "quick-rows" / "recipe.yaml")

    assert result.exit_code == 0
    assert stand_ins.ran == ["fetch", "prepare", "train"]
    assert recipe.train is not None
    assert recipe.data is not None
    assert (recipe.train.max_steps, recipe.data.path) == (5, str(here / "rows.jsonl"))
    assert str(here / "runs" / "quick-rows" / "recipe.yaml") in result.stderr


# -- fetch -------------------------------------------------------------------------------------------------------------


def test_download_files_of_old_are_downloaded(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[dict[str, Any]] = []

    def download(entry: dict[str, Any]) -> Path:
        got.append(entry)
        return Path(entry["output_dir"])

    monkeypatch.setattr("finetune.stages.fetch.download", download)
    (here / "download.yaml").write_text(
        'huggingface:\n  token: "<HF_TOKEN>"\n'
        "models:\n  - repo: distilgpt2\n    files: [config.json]\n    output_dir: models/d\n"
    )
    result = call("download", "--config", "download.yaml", "--json")

    assert result.exit_code == 0
    assert json.loads(result.stdout) == [{"model": "distilgpt2", "path": str(here / "models" / "d")}]
    assert (got[0]["files"], got[0]["token"]) == (["config.json"], None)


def test_every_fault_of_a_download_file_is_reported(here: Path) -> None:
    (here / "download.yaml").write_text("models:\n  - files: [a]\n  - 5\n")
    result = call("download", "--config", "download.yaml")

    assert result.exit_code == 2
    assert "download.yaml has 2 faults" in result.stderr
    assert "download.yaml:3: models.1" in result.stderr


def test_fetch_takes_a_bare_model_and_a_place_for_it(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "cache").mkdir()
    (here / "cache" / "config.json").write_text("{}")
    monkeypatch.setattr("finetune.models.sources.obtain", lambda path, **more: here / "cache")
    monkeypatch.setattr("finetune.models.sources.directory", lambda path, **more: here / "cache")

    assert call("fetch", "smollm2-135m").stdout == f"smollm2-135m -> {here / 'cache'}\n"
    assert call("fetch", "smollm2-135m", "--to", "models/s").exit_code == 0
    assert (here / "models" / "s" / "config.json").is_file()
    assert call("fetch", "smollm2-135m", "--to", "models/s").exit_code == 2


# -- output ------------------------------------------------------------------------------------------------------------


def _no_json(name: str) -> None:
    pytest.fail(f"{name} is no JSON")


def test_json_alone_is_on_stdout(stand_ins: Stages, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_ins.does["train"] = lambda recipe, run: {"metrics": records.metrics("train", last_loss=float("nan"))}
    monkeypatch.setattr("finetune.checks.results", _verdicts(True))
    commands = [
        *(
            ["validate", "small.yaml"],
            ["run", "small.yaml", "--dry-run"],
            ["train", "small.yaml"],
            ["run", "small.yaml"],
        ),
        *(["verify", "small"], ["report", "small"], ["runs", "ls"], ["runs", "show", "small"], ["init", "new"]),
        ["estimate", "small.yaml", "--set", "backend=torch"],
    ]
    for args in commands:
        result = call(*args, "--json")
        assert result.exit_code == 0, (args, result.stderr)
        json.loads(result.stdout, parse_constant=_no_json)
        assert result.stderr == "" or "library prints" in result.stderr, (args, result.stderr)
    assert len(commands) == 10


def test_progress_and_library_output_go_to_stderr(stand_ins: Stages) -> None:
    result = call("train", "small.yaml")

    assert "a library prints in train" in result.stderr
    assert "train done in" in result.stderr
    assert "prints" not in result.stdout
    assert "run directory:" in result.stdout


def test_quiet_says_nothing_but_the_result(stand_ins: Stages) -> None:
    stand_ins.does["train"] = lambda recipe, run: console.say("working") or {}  # type: ignore[func-returns-value]
    result = call("train", "small.yaml", "--quiet")

    assert "working" not in result.stderr
    assert "==" not in result.stderr
    assert "run directory:" in result.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script_for_both_names_and_how_to_install_it(shell: str) -> None:
    result = call("completion", shell)

    assert result.exit_code == 0
    assert f"_FINETUNE_COMPLETE={shell}_complete" in result.stdout
    assert f"_FT_COMPLETE={shell}_complete" in result.stdout
    assert f"finetune completion {shell} >" in result.stdout


def test_completion_completes_commands_and_examples() -> None:
    def complete(*words: str) -> list[str]:
        env = {**os.environ, "_FINETUNE_COMPLETE": "bash_complete"}
        env |= {"COMP_WORDS": " ".join(["finetune", *words]), "COMP_CWORD": str(len(words))}
        done = subprocess.run([sys.executable, "-m", "finetune"], env=env, capture_output=True, text=True, check=True)
        return [line.partition(",")[2] for line in done.stdout.splitlines()]

    assert {"train", "evaluate", "run"} <= set(complete(""))
    assert complete("run", "--example", "qui") == ["quickstart"]
    assert "loss" in complete("verify", "--check", "")


# -- reports -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def stored(here: Path) -> Run:
    """A run with answers and verdicts, as the stages write them."""
    run = Run(here / "runs" / "stored").create()
    write_text(run.path / "recipe.yaml", RECIPE)
    said = {"text": "It is [red]Bo[/red].", "ids": [], "finish": "length", "correct": False, "logprob": -3.5}
    learned = {"text": "It is Ardal.", "ids": [], "finish": "stop", "correct": True, "logprob": -0.25}
    rows = [
        {
            "set": name,
            "id": f"{name}-{number}",
            "kind": kind,
            "prompt": f"Who leads {name} {number}?" + " Really?" * (20 if number == 1 else 0),
            "answer": "It is Ardal.",
            "match": "Ardal",
            "phases": {"base": said, "trained": learned},
        }
        for name, kind in (("probes", "trained"), ("probes", "paraphrase"), ("controls", ""), ("unseen", ""))
        for number in range(12)
    ]
    write_jsonl(run.stage_dir("evaluate") / "answers.jsonl", rows)
    refuted = records.verdict("loss_convergence", "refuted", why=WHY, remedy="Train longer.")
    records.store_verdicts(run, [records.verdict("labels_aligned", why=WHY), refuted])
    return run


def test_report_shows_answers_verdicts_and_how_to_verify_again(stored: Run) -> None:
    result = call("report", "stored")
    text = result.stdout

    assert result.exit_code == 0
    assert "Who leads probes 0?  (expected: Ardal)" in text
    assert "before   - It is [red]Bo[/red]...." in text
    assert "after    + It is Ardal." in text
    assert "0/12   -3.50   12/12   -0.25" in text
    assert "REFUTED  loss_convergence  0.01 >= 0.05 share" in text
    assert text.index("REFUTED") < text.index("proved   labels_aligned")
    assert f"           {WHY.strip()}" in text
    assert "           What to do: Train longer." in text
    assert "1 of 2 checks refuted: loss_convergence" in text
    assert "finetune verify runs/stored" in text


def test_report_fits_80_columns_and_is_plain(stored: Run) -> None:
    text = terminal.render(summary.document(stored))

    assert max(len(line.rstrip()) for line in text.splitlines() if str(stored.path) not in line) <= 80
    assert "\x1b" not in text


def test_no_sentence_is_cut_or_broken_where_no_terminal_is(stored: Run) -> None:
    text = call("report", "stored").stdout

    assert text.count(WHY.strip()) == 2  # of the refuted verdict, and of the proved one
    assert "Who leads probes 1?" + " Really?" * 15 in text
    assert "\x1b" not in text


def test_report_as_json_counts_the_answers(stored: Run) -> None:
    found = json.loads(call("report", "stored", "--json").stdout)

    assert found["passed"] is False
    assert {
        "set": "probes",
        "kind": "trained",
        "phase": "trained",
        "asked": 12,
        "right": 12,
        "logprob": -0.25,
    } in found["scores"]


def test_report_of_a_run_that_has_done_nothing_says_so(here: Path) -> None:
    run = Run(here / "runs" / "fresh").create()
    write_text(run.path / "recipe.yaml", RECIPE)
    run.event("recipe", replaced=False)

    assert "not verified yet" in call("report", "fresh").stdout


def test_runs_are_listed_newest_first(stored: Run, stand_ins: Stages) -> None:
    call("train", "small.yaml")
    found = json.loads(call("runs", "ls", "--json").stdout)

    assert [(run["name"], run["stages"], run["passed"]) for run in found] == [
        ("small", ["fetch", "prepare", "train"], None),
        ("stored", [], False),
    ]
    listed = call("runs", "ls").stdout
    assert "1 of 2 checks refuted" in listed and "not verified" in listed


# -- init, doctor, examples --------------------------------------------------------------------------------------------


def test_init_writes_a_recipe_that_validates_with_data_of_its_own(here: Path) -> None:
    result = call("init", "project")
    text = (here / "project" / "recipe.yaml").read_text()

    assert result.exit_code == 0
    assert "shipped:" not in text
    assert text.count("#") > 10
    assert (here / "project" / "data" / "train.jsonl").stat().st_size > 1000
    assert call("validate", "project").exit_code == 0


def test_init_overwrites_only_when_told(here: Path) -> None:
    call("init", "mine.yaml", "--example", "minimal")
    (here / "data" / "train.jsonl").write_text("mine")
    result = call("init", "mine.yaml", "--example", "minimal")

    assert result.exit_code == 2
    assert "already there: mine.yaml, data/train.jsonl" in result.stderr
    assert (here / "data" / "train.jsonl").read_text() == "mine"
    assert call("init", "mine.yaml", "--example", "minimal", "--force").exit_code == 0
    assert (here / "data" / "train.jsonl").read_text() != "mine"


def test_every_example_validates(here: Path) -> None:
    assert examples() == sorted(path.stem for path in EXAMPLES.glob("*.yaml"))
    assert {"quickstart", "minimal", "full"} <= set(examples())
    for name in examples():
        result = call("validate", "--example", name, "--json")
        assert result.exit_code == 0, (name, result.stderr)
        assert json.loads(result.stdout)["recipe"]["output_dir"] == "runs"


def test_doctor_lists_what_there_is_and_the_line_that_gets_what_is_not(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune.cli.machine.installed", lambda name: None if name in ("torch", "trl") else "1.0")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = call("doctor", "--json")
    found = {finding["name"]: finding for finding in json.loads(result.stdout)}

    assert result.exit_code == 0
    assert found["pydantic"]["ok"]
    assert not found["torch"]["ok"]
    assert found["torch"]["fix"] == "pip install 'finetune-proof[torch]'"
    assert found["extra torch"]["found"] == "lacks torch, trl"
    assert found["hub"]["found"] == "switched off by HF_HUB_OFFLINE"
    assert {"python", "cpu", "memory", "disk", "gpu", "embedded model", "find-links"} <= set(found)


def test_doctor_ends_with_3_when_a_required_thing_is_missing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.cli.machine.installed", lambda name: None if name == "torch" else "1.0")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    assert call("doctor", "--require", "pydantic").exit_code == 0
    misspelled = call("doctor", "--require", "tarch")
    assert misspelled.exit_code == 2
    assert "Did you mean 'torch'?" in misspelled.stderr
    result = call("doctor", "--require", "torch")
    assert result.exit_code == 3
    assert "pip install 'finetune-proof[torch]'" in result.stderr


def test_estimate_counts_steps_and_compares_methods(here: Path) -> None:
    found = json.loads(call("estimate", "small.yaml", "--length", "64", "--json").stdout)

    assert (found["rows"], found["steps"], found["epochs"]) == (6, 3, 1.5)
    both = found["stages"]["train"]
    assert both["lora"]["training_state"] < 0.3 * both["full"]["training_state"]
    assert found["peak"] == both["lora"]["total"]
    assert "this recipe" in call("estimate", "small.yaml").stdout


def test_every_command_of_the_table_loads() -> None:
    from click import Context

    group: Any = cli
    loaded = [group.get_command(Context(cli), name) for name in COMMANDS]

    assert len(loaded) >= 16
    assert None not in loaded


# -- known before the training, not after it -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "code", "words"),
    [
        ("evaluate.probes=none.jsonl", 3, "evaluate.probes: no file"),
        ("evaluate.probes=rows.jsonl", 2, "rows.jsonl:1: needs answer (text)"),
        ("evaluate.heldout=rows.jsonl", 2, "rows.jsonl:1: needs 'text'"),
        ("model.path=rows.gguf", 3, "model.path: no model at"),
    ],
)
def test_a_fault_in_a_file_of_a_late_stage_is_told_before_any_stage_runs(
    stand_ins: Stages, here: Path, override: str, code: int, words: str
) -> None:
    (here / "rows.gguf").write_text("not a model")
    result = call("run", "small.yaml", "--set", override)
    assert (result.exit_code, stand_ins.ran) == (code, [])
    assert words in result.stderr


def test_a_stage_does_not_wait_for_files_that_it_never_reads(stand_ins: Stages, here: Path) -> None:
    assert call("train", "small.yaml", "--set", "evaluate.probes=none.jsonl").exit_code == 0


@pytest.mark.parametrize("short", ["train.save_strategy='no'", "train.save_total_limit=1", "train.save_steps=3"])
def test_a_resume_that_cannot_be_proved_is_told_before_any_stage_runs(
    stand_ins: Stages, here: Path, short: str
) -> None:
    result = call("run", "small.yaml", "--set", "expect.resume=true", "--set", short)
    assert (result.exit_code, stand_ins.ran) == (2, [])
    assert "expect.resume needs a checkpoint before the last step" in result.stderr
    more = ("--set", "train.save_steps=1", "--set", "train.save_strategy=steps", "--set", "train.save_total_limit=2")
    assert call("run", "small.yaml", "--set", "expect.resume=true", *more, "--dry-run").exit_code == 0


def test_a_copy_that_fails_is_told_in_one_line(stand_ins: Stages) -> None:
    import shutil

    def fail(recipe: Recipe, run: Run) -> dict[str, Any]:
        raise shutil.Error([("a", "b", "[Errno 28] No space left on device"), ("c", "d", "the same")])

    stand_ins.does["train"] = fail
    result = call("train", "small.yaml")
    assert result.exit_code == 4
    assert "error: copying a to b failed: [Errno 28] No space left on device\n" in result.stderr
