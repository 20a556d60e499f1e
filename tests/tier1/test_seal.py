"""Whatever is changed in a run after it was written is named; copying, moving and going on is fine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.recipe import Recipe
from finetune.run import Run, seal
from finetune.run.report import left_by
from finetune.stages import pipeline
from support.town import build, only_training


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Run]:
    """A small run to its end, and its recipe. Tests leave it as it is."""
    root = tmp_path_factory.mktemp("sealed")
    recipe = only_training(build(root / "town"), root / "runs")
    run = pipeline.run_directory(recipe)
    pipeline.run_stages(recipe, run)
    return recipe, run


@pytest.fixture
def run(made: tuple[Recipe, Run], tmp_path: Path) -> Run:
    """A copy, as a new process sees it."""
    shutil.copytree(made[1].path, tmp_path / "moved" / "run")
    return Run(tmp_path / "moved" / "run")


STAGES = ("fetch", "prepare", "train", "evaluate", "merge", "measure")


def names(run: Run) -> list[str]:
    """What is found by a reader that knows nothing yet: of the run as a whole, then of its stages."""
    fresh = Run(run.path)
    reports = [report for name in STAGES if (report := fresh.report(name))]
    return [found.file for found in (*seal.faults(fresh), *(f for each in reports for f in seal.changed(fresh, each)))]


def edit(file: Path, change: Callable[[Any], Any]) -> None:
    """Change a JSON file as an editor does."""
    value = json.loads(file.read_text(encoding="utf-8"))
    change(value)
    file.write_text(json.dumps(value, indent=2), encoding="utf-8")


def line(run: Run, number: int, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change one line of the log, counted from 1 (from the end when negative)."""
    lines = run.events_path.read_text(encoding="utf-8").splitlines()
    event = json.loads(lines[number - 1 if number > 0 else number])
    change(event)
    lines[number - 1 if number > 0 else number] = json.dumps(event)
    run.events_path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_a_run_copied_and_moved_is_as_it_was(run: Run) -> None:
    assert seal.is_sealed(run)
    assert names(run) == []


def test_a_run_that_nothing_was_done_to_again_is_sealed_again(made: tuple[Recipe, Run], run: Run) -> None:
    pipeline.run_stages(made[0], run)
    assert names(run) == []
    assert [event["event"] for event in run.events()].count("stage_finished") == len(STAGES)


@pytest.mark.parametrize("place", [1, 5, 12, -2, -1])
def test_an_edited_event_is_named_with_its_line(run: Run, place: int) -> None:
    line(run, place, lambda event: event.update(loss=0.001))
    count = len(run.events_path.read_text().splitlines())
    assert names(run) == [f"events.jsonl:{place if place > 0 else count + 1 + place}"]


def test_the_end_of_the_log_cannot_be_cut_off(run: Run) -> None:
    lines = run.events_path.read_bytes().splitlines(keepends=True)
    run.events_path.write_bytes(b"".join(lines[:-2]))
    assert "events.jsonl" in names(run)
    run.events_path.write_bytes(b"")
    assert "events.jsonl" in names(run)
    run.events_path.unlink()
    assert "events.jsonl" in names(run)


@pytest.mark.parametrize(
    "key", ["time", "command", "cpu", "git", "packages", "data", "model", "kept", "seeds", "seal", "digest", "schema"]
)
def test_an_edited_manifest_is_named(run: Run, key: str) -> None:
    whole = (run.path / "manifest.json").read_text()
    edit(run.path / "manifest.json", lambda value: value.pop(key))
    assert names(run)[0] == "manifest.json"
    (run.path / "manifest.json").write_text(whole.replace('"cores": ', '"cores": 1'))
    assert names(run)[0] == "manifest.json"
    (run.path / "manifest.json").unlink()
    assert names(run)[0] == "manifest.json"


@pytest.mark.parametrize("name", ["recipe.yaml", "train/report.json", "prepare/report.json"])
def test_an_edited_recipe_or_report_is_named(run: Run, name: str) -> None:
    text = (run.path / name).read_text()
    (run.path / name).write_text(text.replace("e", "e", 1) + " ")
    assert names(run) == [name]


def test_a_recipe_that_is_gone_is_named(run: Run) -> None:
    (run.path / "recipe.yaml").unlink()
    assert names(run) == ["recipe.yaml"]


def test_a_file_of_no_stage_is_held_until_the_log_goes_on(run: Run) -> None:
    page = run.path / "report.html"
    page.write_text("all is well")
    seal.close(Run(run.path))
    assert names(run) == []
    page.write_text("all is better")
    assert names(run) == ["report.html"]
    page.unlink()
    assert names(run) == ["report.html"]
    # What a killed command wrote may be newer than the seal.
    Run(run.path).event("stage_started", stage="merge", fingerprint="0" * 64)
    assert names(run) == []


def test_every_file_that_a_stage_left_is_held(run: Run) -> None:
    """One bit, half of it, nothing of it, none at all; checkpoints and previews too."""
    files = [path for path in run.path.rglob("*") if path.is_file() and path.name not in (".lock", "report.json")]
    held = [path for path in files if path.parent != run.path]
    assert len(held) >= 25
    for path in held:
        if not path.stat().st_size:
            continue
        content = path.read_bytes()
        name = path.relative_to(run.path).as_posix()
        for changed in (bytes([content[0] ^ 1]) + content[1:], content[: len(content) // 2], b""):
            path.write_bytes(changed)
            assert names(run) == [name]
        path.unlink()
        assert names(run) == [name]
        path.write_bytes(content)
    assert names(run) == []


def test_a_file_put_into_a_stages_folder_is_named(run: Run) -> None:
    (run.path / "merge" / "model" / "chat_template.jinja").write_text("another")
    assert names(run) == ["merge/model/chat_template.jinja"]
    (run.path / "merge" / "model" / "report.json").write_text("named as a stage's report is, and none")
    assert names(run) == ["merge/model/chat_template.jinja", "merge/model/report.json"]
    assert list(left_by("merge", run.path)) == sorted(
        path.relative_to(run.path).as_posix()
        for path in (run.path / "merge").rglob("*")
        if path.is_file() and path != run.path / "merge" / "report.json"
    )


def test_a_seal_is_never_made_again_over_a_change(made: tuple[Recipe, Run], run: Run) -> None:
    line(run, -1, lambda event: event.update(seconds=0))
    seal.close(Run(run.path))
    assert names(run) != []
    edit(run.path / "manifest.json", lambda value: value.update(cpu="another"))
    seal.close(Run(run.path))
    assert names(run)[0] == "manifest.json"


def test_a_changed_manifest_is_not_sealed_again_though_the_log_is_whole(run: Run) -> None:
    edit(run.path / "manifest.json", lambda value: value.update(cpu="another"))
    seal.close(Run(run.path))
    assert names(run) == ["manifest.json"]


@pytest.mark.parametrize("name", ["manifest.json", "events.jsonl"])
def test_a_run_was_sealed_though_what_says_so_cannot_be_read(run: Run, name: str) -> None:
    (run.path / name).write_text("{oops\n")
    assert seal.is_sealed(Run(run.path))
    assert name in names(run)


# -- going on with what was damaged --------------------------------------------------------------------------------------


def losses(run: Run) -> list[float]:
    return [event["loss"] for event in Run(run.path).events("step", stage="train")]


@pytest.mark.parametrize("how", ["edited", "cut", "no json", "gone"])
def test_a_changed_log_is_made_again_from_what_the_trainer_logged(
    made: tuple[Recipe, Run], run: Run, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = losses(made[1])
    if how == "edited":
        line(run, 14, lambda event: event.update(loss=0.001))
    elif how == "cut":
        run.events_path.write_bytes(b"".join(run.events_path.read_bytes().splitlines(keepends=True)[:-3]))
    elif how == "no json":
        run.events_path.write_bytes(run.events_path.read_bytes().replace(b'{"time"', b'{"ti', 1))
    else:
        run.events_path.unlink()
    reports = pipeline.run_stages(made[0], Run(run.path))

    assert names(run) == []
    assert losses(run) == before
    assert [report.started for report in reports] == [made[1].require(report.stage).started for report in reports]
    assert "the log is made again from reports and trainer logs" in capsys.readouterr().err
    assert how == "gone" or len(list(run.path.glob("events.jsonl.*.damaged"))) == 1
    (restored,) = Run(run.path).events("log_restored")
    assert restored["aside"] == ("nothing" if how == "gone" else "events.jsonl.1.damaged")
    assert [event["resumed_from"] for event in Run(run.path).events("training", stage="train")] == [None]


def test_a_changed_manifest_is_made_again_and_said(
    made: tuple[Recipe, Run], run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    for content in ("", "{oops", (run.path / "manifest.json").read_text().replace('"cores": ', '"cores": 1')):
        (run.path / "manifest.json").write_text(content)
        pipeline.run_stages(made[0], Run(run.path))
        assert names(run) == []
        assert "manifest.json" in capsys.readouterr().err
    assert len(list(run.path.glob("manifest.json.*.damaged"))) == 3, "each is set aside, and none over another"


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("content", ["", "{oops", "[]", "{}", None])
def test_a_damaged_report_is_a_reason_to_do_its_stage_again(
    made: tuple[Recipe, Run], run: Run, stage: str, content: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run.path / stage / "report.json"
    path.write_text(path.read_text() + " " if content is None else content)
    planned = {step.stage for step in pipeline.preview(made[0], Run(run.path)) if step.runs}
    assert stage in planned
    pipeline.run_stages(made[0], Run(run.path))

    assert names(run) == []
    said = [text for text in capsys.readouterr().err.splitlines() if "runs again" in text and stage in text]
    assert len(said) == 1
    assert "report.json" in said[0]


def test_what_a_stage_left_and_was_changed_is_a_reason_to_do_it_again(
    made: tuple[Recipe, Run], run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("prepare/train.jsonl", "merge/model/config.json", "train/trainer_logs.json", "fetch/model.json"):
        (run.path / name).write_text("")
        pipeline.run_stages(made[0], Run(run.path))
        assert names(run) == []
        assert f"runs again: {name} was changed after it was written" in capsys.readouterr().err


def test_files_that_a_killed_writer_left_are_cleared(made: tuple[Recipe, Run], run: Run) -> None:
    left = [run.path / ".manifest.json.1.partial", run.path / "train" / ".x.9.partial"]
    for path in left:
        path.write_text("half")
    reports = pipeline.run_stages(made[0], Run(run.path))
    assert not any(path.exists() for path in left)
    assert names(run) == []
    assert [report.started for report in reports] == [made[1].require(report.stage).started for report in reports], (
        "half a file is no reason to do its stage again"
    )
