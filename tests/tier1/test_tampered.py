"""A finished run in which somebody put something else, by the real command line: told by name, and nothing is handed out."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from finetune import checks
from finetune.cli.app import cli
from finetune.core.files import write_text
from finetune.recipe import dump
from finetune.report import files, summary
from finetune.run import Run, seal
from finetune.stages import pipeline
from support.town import as_of_0_1, build, edit_rows, recipe


def call(*args: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(arg) for arg in args], prog_name="finetune")


@pytest.fixture(scope="module")
def makes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Run]:
    """A function: the run of a seed, with a bundle, verified, its report written, sealed; made once."""
    root, made = tmp_path_factory.mktemp("tampered"), dict[int, Run]()
    town = build(root / "town")

    def make(seed: int) -> Run:
        if seed not in made:
            nothing = {"resume": False}
            wanted = recipe(
                town, root / "runs", name=f"seed{seed}", export=["bundle"], expect=nothing, train={"seed": seed}
            )
            run = pipeline.run_directory(wanted)
            pipeline.run_stages(wanted, run)
            checks.verify(wanted, run)
            files.write(run, files.render(summary.document(run))[1])
            seal.close(run)
            write_text(root / f"{seed}.yaml", dump(wanted))
            made[seed] = run
        return made[seed]

    return make


@pytest.fixture
def run(makes, tmp_path) -> Run:
    shutil.copytree(makes(0).path, tmp_path / "run")
    return Run(tmp_path / "run")


@pytest.fixture
def other(makes) -> Run:
    return makes(7)


def refuted(run: Run) -> dict[str, str]:
    found = json.loads(call("verify", run.path, "--json").stdout)
    return {each["name"]: each["why"] for each in found["verdicts"] if each["passed"] is False}


def test_the_run_is_honest(run):
    assert refuted(run) == {}
    assert call("export", run.path, "--out", run.path.parent / "out").exit_code == 0


# -- checkpoints -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("swap", "named"),
    [
        (["adapter.json"], "adapter.json was changed"),
        (["optimizer.json"], "optimizer.json was changed"),
        (
            ["adapter.json", "adapter_config.json", "optimizer.json", "trainer_state.json", "digests.json"],
            "was changed",
        ),
    ],
)
def test_a_checkpoint_with_files_of_another_training_is_refused(run, other, swap, named):
    for name in swap:
        shutil.copy(other.path / "train/checkpoint-6" / name, run.path / "train/checkpoint-6" / name)
    said = call("train", run.path / "recipe.yaml", "--run", run.path, "--resume", "checkpoint-6")
    assert said.exit_code == 2
    assert named in said.stderr


def test_a_checkpoint_whose_record_was_taken_away_is_of_no_earlier_version(run):
    for name in ("finetune.json", "digests.json"):
        (run.path / "train/checkpoint-6" / name).unlink()
    said = call("train", run.path / "recipe.yaml", "--run", run.path, "--resume", "checkpoint-6")
    assert said.exit_code == 2
    assert "is gone" in said.stderr
    (run.path / "train/report.json").unlink()  # as if it had not ended
    said = call("train", run.path / "recipe.yaml", "--run", run.path, "--resume", "checkpoint-6")
    assert said.exit_code == 2
    assert "finetune.json is gone" in said.stderr


# -- the seal ----------------------------------------------------------------------------------------------------------


def test_a_run_that_poses_as_one_of_version_0_1_is_found_out(run):
    reports = {path: path.read_bytes() for path in run.path.glob("*/report.json")}
    as_of_0_1(run)
    for path, content in reports.items():
        path.write_bytes(content)
    assert "manifest.json was changed" in refuted(run)["sealed"]
    assert call("export", run.path, "--out", run.path.parent / "out").exit_code == 1


@pytest.mark.parametrize("name", ["report.html", "report.json", "junit.xml"])
def test_verifying_again_puts_no_new_seal_over_a_change(run, name):
    (run.path / name).write_text("all is well")
    for _ in range(3):
        assert f"{name} was changed after the run was sealed" in refuted(run)["sealed"]
    assert call("export", run.path, "--out", run.path.parent / "out").exit_code == 1
    assert call("report", run.path).exit_code == 0  # which writes it anew
    assert refuted(run) == {}


@pytest.mark.parametrize("name", ["verdicts.json", "recipe.yaml"])
def test_what_the_log_tells_of_and_is_no_file_is_named(run, name):
    (run.path / name).unlink()
    gone = [] if name == "verdicts.json" else [f"{name} is gone"]  # verdicts are made anew by every check
    assert [str(found) for found in seal.faults(Run(run.path))] == gone
    (run.path / name).mkdir()
    assert [str(found) for found in seal.faults(Run(run.path))] == [f"{name} is no file"]


def test_a_stage_of_other_models_than_are_there_is_named(run):
    def other(events):
        for event in events:
            if event["event"] == "stage_started" and event["stage"] == "evaluate":
                event["of"]["train"] = "0" * 64

    edit_rows(run, "events.jsonl", other)
    assert "evaluate began with other models than are there" in refuted(run)["told_of"]


# -- the report --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["evaluate/answers.jsonl", "train/adapter/adapter.json", "merge/report.json"])
def test_a_report_on_what_is_no_longer_what_was_verified_says_so(run, name):
    with (run.path / name).open("a") as stream:
        stream.write(" " if name.endswith(".json") else "\n" * 0 + '{"id": "x"}\n')
    said = call("report", run.path).stdout
    assert f"not what was verified: {name} was changed after it was written" in " ".join(said.split())
    assert "verify again" in said
    assert "proved" not in said.strip().splitlines()[-1]
    assert json.loads(call("report", run.path, "--json").stdout)["passed"] is None
    compared = json.loads(call("report", run.path, run.path, "--json", "--out", run.path.parent / "two.html").stdout)
    assert compared["a"]["status"] == "changed since it was verified"


# -- things that are no files ------------------------------------------------------------------------------------------


def pipe(path: Path) -> None:
    os.mkfifo(path)


def folder_elsewhere(path: Path) -> None:
    path.symlink_to("/etc")


def to_nothing(path: Path) -> None:
    path.symlink_to("nowhere")


@pytest.mark.parametrize("make", [pipe, folder_elsewhere, to_nothing])
@pytest.mark.parametrize("place", ["export/bundle", "train", "merge/model"])
def test_a_link_or_a_pipe_among_the_files_is_named_and_nothing_is_handed_out(run, make, place):
    make(run.path / place / "strange")
    assert "strange was not written by this stage" in refuted(run)["artifacts_intact"]
    out = run.path.parent / "out"
    assert call("export", run.path, "--out", out).exit_code == 1
    assert not out.exists()


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "name", ["prepare/sources.json", "train/report.json", "evaluate/answers.jsonl", "manifest.json"]
)
def test_a_pipe_in_place_of_a_file_is_read_by_nobody(run, name):
    (run.path / name).unlink()
    pipe(run.path / name)
    assert refuted(run)
    assert call("report", run.path).exit_code in (0, 4)


DEEP = "[" * 200_000


@pytest.mark.parametrize(
    "name", ["manifest.json", "events.jsonl", "evaluate/rows.json", "fetch/model.json", "train/report.json"]
)
def test_a_file_nested_without_end_is_damaged_and_no_error(run, name):
    write_text(run.path / name, DEEP + "\n")
    found = refuted(run)
    assert found
    assert not any("RecursionError" in why and "report" in why.lower() and "please" in why for why in found.values())


@pytest.mark.parametrize(
    "name",
    [
        "events.jsonl",
        "manifest.json",
        "prepare/sources.json",
        "train/report.json",
        "verdicts.json",
        "evaluate/heldout.json",
    ],
)
def test_a_folder_in_place_of_a_file_is_damage_that_a_run_mends(run, makes, name):
    (run.path / name).unlink()
    (run.path / name / "within").mkdir(parents=True)
    verified = call("verify", run.path)
    assert verified.exit_code == 1, verified.stderr
    again = call("run", run.path / "recipe.yaml", "--run", run.path)
    assert refuted(run) == {}
    assert again.exit_code == 0, again.stderr


# -- the base ----------------------------------------------------------------------------------------------------------


def test_a_file_that_came_into_the_base_is_named_and_export_does_not_train_anew(tmp_path):
    town = build(tmp_path / "town")
    wanted = recipe(town, tmp_path / "runs", export=["bundle"], expect={"resume": False})
    run = pipeline.run_directory(wanted)
    pipeline.run_stages(wanted, run)
    checks.verify(wanted, run)
    (town / "model" / "adapter_config.json").write_text("{}")
    assert "adapter_config.json was not there when it was fetched" in refuted(run)["base_intact"]
    before = run.require("train")
    said = call("export", run.path)
    assert said.exit_code == 4
    assert "would have to be trained again (another base model: " in said.stderr
    assert Run(run.path).require("train") == before
