"""Commands on a stored run: which directory is one, what becomes of a read-only one, and what is damaged is named."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from finetune.cli.app import cli
from finetune.core import files
from finetune.core.files import digest, write_json, write_text
from finetune.recipe import dump
from finetune.report import summary
from finetune.run import Run, evidence, layout, seal
from support.town import as_of_0_1, only_training

REPORTS = ("report.json", "junit.xml", "report.md", "report.html")


def call(*args: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(arg) for arg in args], prog_name="finetune")


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def trained(town: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small project with its run, verified and reported: project/recipe.yaml, project/runs/small."""
    place = tmp_path_factory.mktemp("project")
    text = dump(only_training(town, Path("runs"), name="small"))
    write_text(place / "recipe.yaml", text)
    result = call("run", place / "recipe.yaml")
    assert result.exit_code == 0, result.output
    return place


@pytest.fixture
def project(trained: Path, here: Path) -> Path:
    """A copy of it in the current folder, its run made for this place."""
    shutil.copytree(trained, here / "project")
    return here / "project"


@pytest.fixture
def run(project: Path) -> Run:
    return Run(project / "runs" / "small")


# -- which directory is a run ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["verify", "report", "serve", "runs show", "spec record"])
def test_a_project_folder_without_a_run_is_never_taken_for_one(project: Path, command: str) -> None:
    shutil.rmtree(project / "runs")
    before = content(project.parent)
    for given in (project, project / "recipe.yaml"):
        result = call(*command.split(), given)

        assert result.exit_code == 3
        assert (
            f"{project / 'recipe.yaml'} has not been run: there is no run at {project / 'runs' / 'small'}"
            in result.stderr
        )
        assert f"finetune run {project / 'recipe.yaml'}" in result.stderr
    assert content(project.parent) == before


@pytest.mark.parametrize(
    "given", ["project", "project/recipe.yaml", "project/runs/small", "project/runs/small/recipe.yaml"]
)
def test_a_recipe_or_its_folder_stands_for_its_run(project: Path, given: str) -> None:
    result = call("verify", given, "--json")

    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["run"] == str(project / "runs" / "small")
    assert sorted(path.name for path in project.iterdir()) == ["recipe.yaml", "runs"]
    assert f"to look at: {project / 'runs' / 'small' / 'report.html'}" in call("report", given).stdout


def test_a_copied_run_stands_for_itself(run: Run, here: Path) -> None:
    shutil.copytree(run.path, here / "copied")

    assert json.loads(call("verify", "copied/recipe.yaml", "--json").stdout)["run"] == str(here / "copied")


def test_serve_finds_the_run_of_a_recipe(project: Path) -> None:
    result = call("serve", project)

    assert f"{project / 'runs' / 'small'} was made with the backend 'fake'" in result.stderr


def test_what_was_looked_for_is_named(here: Path) -> None:
    result = call("verify", "nothing")

    assert result.exit_code == 3
    assert f"no run at {here / 'nothing'} (it holds no manifest.json)" in result.stderr
    assert list(here.iterdir()) == []


def test_runs_are_listed_and_the_newest_chosen_by_their_manifest(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    other = project / "runs" / "a-project"
    write_text(other / "recipe.yaml", (project / "recipe.yaml").read_text("utf-8"))
    os.utime(other / "recipe.yaml", (4e9, 4e9))

    assert [each["name"] for each in json.loads(call("runs", "ls", "--json").stdout)] == ["small"]
    assert json.loads(call("verify", "--json").stdout)["run"] == str(project / "runs" / "small")
    assert not (other / ".lock").exists()


def test_an_export_of_a_project_means_its_recipe(project: Path) -> None:
    result = call("export", project, "--to", "bundle", "--dry-run", "--json")

    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["run"] == str(project / "runs" / "small")


# -- a run that cannot be written into ---------------------------------------------------------------------------------


@pytest.fixture(params=["read-only", "forbidden", "no locks", "writing fails"])
def closed(request: pytest.FixtureRequest, run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The run on a file system that refuses, in the ways that there are."""
    codes = {
        "read-only": errno.EROFS,
        "forbidden": errno.EACCES,
        "no locks": errno.ENOLCK,
        "writing fails": errno.EROFS,
    }
    error = OSError(codes[request.param], os.strerror(codes[request.param]))

    def refuse(*args: Any, **named: Any) -> None:
        raise error

    if request.param == "writing fails":
        write = files.write_text
        for module in ("finetune.core.files", "finetune.report.files"):
            monkeypatch.setattr(
                f"{module}.write_text",
                lambda path, *rest: refuse() if path.is_relative_to(run.path) else write(path, *rest),
            )
    else:
        monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    return run


def test_a_read_only_run_is_verified_and_nothing_is_stored(closed: Run) -> None:
    before = content(closed.path)
    result = call("verify", closed.path)

    assert result.exit_code == 0, result.stderr
    assert "proved" in result.stdout
    assert result.stderr.count("\n") == 1
    assert f"note: what was verified could not be stored in {closed.path} (" in result.stderr
    assert "--out FILE" in result.stderr
    assert content(closed.path).keys() - {".lock"} == before.keys() - {".lock"}
    assert all(content(closed.path)[name] == before[name] for name in before)


def test_a_read_only_run_is_reported_and_nothing_is_stored(closed: Run) -> None:
    before = content(closed.path)
    result = call("report", closed.path)

    assert result.exit_code == 0, result.stderr
    assert "proved" in result.stdout and "to look at" not in result.stdout
    assert f"the report could not be stored in {closed.path}" in result.stderr
    assert all(content(closed.path)[name] == before[name] for name in before)


def test_the_verdicts_go_where_they_are_wanted_and_nowhere_else(run: Run, here: Path) -> None:
    (run.path / ".lock").unlink(missing_ok=True)
    before = content(run.path)
    result = call("verify", run.path, "--out", "found.json")
    found = json.loads((here / "found.json").read_text("utf-8"))

    assert (result.exit_code, result.stderr) == (0, "")
    assert (found["passed"], found["run"]) == (True, str(run.path))
    assert {each["outcome"] for each in found["verdicts"]} >= {"proved"}
    assert content(run.path) == before
    assert call("verify", run.path, "--out", here).exit_code == 2


def test_a_run_that_is_in_use_is_reported_and_left_alone(run: Run) -> None:
    before = content(run.path)
    with run.locked():
        result = call("report", run.path)

    assert result.exit_code == 0
    assert "another finetune process works in it" in result.stderr
    assert all(content(run.path)[name] == before[name] for name in before)


# -- what is damaged ---------------------------------------------------------------------------------------------------


def spoil(run: Run, name: str) -> None:
    path = run.path / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] + b"\xff\x00{")


SHOWN = ("manifest.json", "events.jsonl", "train/report.json")  # of what a report shows
DAMAGED = (*SHOWN, "prepare/train.jsonl", "evaluate/rows.json", "fetch/model.json")


@pytest.mark.parametrize("name", DAMAGED)
def test_verify_names_a_damaged_file_and_the_other_checks_still_run(run: Run, name: str) -> None:
    spoil(run, name)
    result = call("verify", run.path, "--json")
    found = json.loads(result.stdout)

    assert result.exit_code == 1
    assert "unexpected" not in result.stderr
    assert any(name in each["why"] and each["outcome"] == "refuted" for each in found["verdicts"])
    assert sum(each["outcome"] == "proved" for each in found["verdicts"]) >= 3


@pytest.mark.parametrize("name", DAMAGED)
def test_a_report_over_a_damaged_file_names_it_and_shows_the_rest(run: Run, name: str) -> None:
    spoil(run, name)
    result = call("report", run.path)
    document = summary.document(run)

    assert result.exit_code == 0, result.stderr
    if name in SHOWN:
        assert len([line for line in result.stdout.splitlines() if line.startswith("damaged: ") and name in line]) == 1
        assert any(name in line for line in document["damaged"])
        for file in REPORTS[2:]:
            assert name.split(".")[0] in (run.path / file).read_text("utf-8").replace("\\", "")
    assert document["stages"]
    assert call("runs", "ls", run.path.parent).exit_code == 0


def test_a_recipe_that_cannot_be_loaded_ends_verify_with_4(run: Run) -> None:
    spoil(run, "recipe.yaml")
    result = call("verify", run.path)

    assert result.exit_code == 4
    assert f"{run.path / 'recipe.yaml'} is damaged" in result.stderr
    write_text(run.path / "recipe.yaml", "name: [")
    assert (call("verify", run.path).exit_code, call("report", run.path).exit_code) == (4, 0)


def test_verdicts_that_were_changed_are_no_verdicts(run: Run) -> None:
    document = evidence.read(run, layout.VERDICTS)
    document["verdicts"] = [{**each, "why": "trust me"} for each in document["verdicts"]]  # type: ignore[typeddict-item]
    evidence.write(run, layout.VERDICTS, document)
    result = call("report", run.path)
    found = summary.document(run)

    assert "verdicts.json was changed after it was written: verify again" in result.stdout
    assert "trust me" not in result.stdout
    assert (found["passed"], found["verified"], found["verdicts"]) == (None, None, [])
    assert "not verified yet" in result.stdout
    assert json.loads(call("runs", "show", run.path, "--json").stdout)["passed"] is None


def test_verdicts_of_version_0_1_are_read(run: Run) -> None:
    stored: Any = evidence.read(run, layout.VERDICTS)
    judged = [each for each in stored["verdicts"] if each["passed"] is not None]
    of_0_1 = [{key: each[key] for key in each if key not in ("outcome", "remedy")} for each in judged]
    write_json(run.path / layout.VERDICTS.path, {"time": stored["time"], "passed": True, "verdicts": of_0_1})
    run.event("verified", passed=True, sha256=digest(run.path / layout.VERDICTS.path))

    assert {each["outcome"] for each in summary.document(run)["verdicts"]} == {"proved"}


# -- the seal ----------------------------------------------------------------------------------------------------------


def test_what_report_writes_is_sealed(run: Run) -> None:
    assert call("report", run.path).exit_code == 0
    assert set(REPORTS) <= set(run.manifest()["seal"]["files"])
    assert seal.faults(run) == []
    with (run.path / "report.md").open("a") as stream:
        stream.write("and more")
    assert [found.file for found in seal.faults(run)] == ["report.md"]


def test_some_checks_alone_do_not_take_the_place_of_the_whole(run: Run) -> None:
    before = {file: file.read_bytes() for file in run.path.rglob("*") if file.is_file()}
    found = json.loads(call("verify", run.path, "--check", "seal", "--json").stdout)
    assert [each["name"] for each in found["verdicts"]] == ["sealed"]
    assert {file: file.read_bytes() for file in run.path.rglob("*") if file.is_file()} == before


def test_a_run_of_version_0_1_is_not_sealed_by_looking_at_it(run: Run) -> None:
    as_of_0_1(run)
    for _ in range(2):
        found = json.loads(call("verify", run.path, "--json").stdout)
        assert [each["outcome"] for each in found["verdicts"] if each["name"] == "sealed"] == ["not examined"]
        assert call("report", run.path).exit_code == 0


# -- kept and gone on with ---------------------------------------------------------------------------------------------


def test_a_kept_training_is_marked_in_every_report(run: Run) -> None:
    seal.update_manifest(run, kept={"train": ["transformers 5.23.0 -> 5.24.0"]})
    said = "the training was made with transformers 5.23.0, now 5.24.0: --retrain does it anew"
    assert said in call("report", run.path).stdout
    assert said in call("verify", run.path).stdout
    for name in REPORTS:
        if name != "junit.xml":
            assert said.removeprefix("the ") in (run.path / name).read_text("utf-8").replace("\\", "")


def test_retrain_reaches_the_stages(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(
        "finetune.stages.pipeline.run_stages", lambda *args, retrain, **more: asked.append(retrain) or []
    )
    monkeypatch.setattr("finetune.stages.pipeline.preview", lambda *args, retrain, **more: asked.append(retrain) or [])
    recipe = project / "recipe.yaml"
    call("run", recipe, "--retrain")
    call("train", recipe, "--retrain", "--dry-run")
    call("run", recipe)

    assert asked == [True, True, False]
