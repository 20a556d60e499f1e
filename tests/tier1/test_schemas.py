"""Files of an earlier schema are read as they are and stay so; those of a later one are refused by name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import finetune
from finetune.checks import PROVED, results
from finetune.core import schemas
from finetune.core.errors import NewerError
from finetune.core.files import digests, write_json
from finetune.export.bundle import set_card, verify_manifest
from finetune.recipe import dump, load, load_mapping
from finetune.run import Run, checkpoints, evidence, identity, layout, seal
from finetune.run.log import PREVIOUS
from finetune.stages import pipeline
from support.town import Ran, as_of_0_1, edit_json

SOURCE = Path(finetune.__file__).parent
LATER = 9  # a number that nobody has raised anything to


def later(run: Run, name: str) -> None:
    """Let a file of a run say that a later version wrote it; of the log, the last line."""
    path = run.path / name
    if path.suffix != ".jsonl":
        edit_json(run, name, lambda value: value.update(schema=LATER))
        return
    *lines, last = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([*lines, json.dumps({**json.loads(last), "schema": LATER})]) + "\n", encoding="utf-8")


def everything(run: Run) -> dict[str, str]:
    return digests(run.path)


READERS: dict[str, Callable[[Run], object]] = {
    "manifest.json": Run.manifest,
    "events.jsonl": Run.log,
    "merge/report.json": lambda run: run.report("merge"),
    "verdicts.json": lambda run: evidence.read(run, layout.VERDICTS),
    "train/checkpoint-6/digests.json": lambda run: checkpoints.faults(run.path / "train" / "checkpoint-6"),
    "train/checkpoint-6/finetune.json": lambda run: identity.read(run.path / "train" / "checkpoint-6"),
}


def test_there_is_one_row_a_kind_and_no_number_elsewhere() -> None:
    assert len({schema.file for schema in schemas.KINDS}) == len(schemas.KINDS) == 9
    assert all(schema.number >= 1 and schema.oldest >= 0 for schema in schemas.KINDS)
    sources = {path: path.read_text(encoding="utf-8") for path in SOURCE.rglob("*.py")}
    assert len(sources) > 200
    own = re.compile(r"^SCHEMA\b|['\"]schema['\"]: \d", re.MULTILINE)
    assert [path.name for path, text in sources.items() if own.search(text)] == []


@pytest.mark.parametrize("name", READERS)
def test_a_file_of_a_later_version_is_refused_by_name(copied: Ran, name: str) -> None:
    if name == "verdicts.json":
        write_json(copied.run.path / name, {"schema": 1, "time": "", "passed": True, "verdicts": []})
    later(copied.run, name)
    with pytest.raises(NewerError) as refused:
        READERS[name](Run(copied.run.path))

    said = str(refused.value)
    assert said.startswith(str(copied.run.path / name))
    assert f"its schema is {LATER}, and this version knows up to 1. Upgrade finetune" in said


def test_a_recipe_of_a_later_version_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(f"schema: {LATER}\nwhat: nobody knows\n", encoding="utf-8")
    with pytest.raises(NewerError, match=rf"{file} was written by a later version of finetune: its schema is {LATER}"):
        load(file)


@pytest.mark.parametrize("said", ["one", True, -1, 1.0, None])
def test_a_recipe_s_schema_that_is_no_number_is_a_fault_with_its_line(tmp_path: Path, said: object) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(f"data: {{path: x}}\nschema: {json.dumps(said)}\n", encoding="utf-8")
    with pytest.raises(
        ValueError, match=rf"recipe.yaml:2: schema: its schema is {said!r}, and this version knows 0 to 1"
    ):
        load(file)


def test_a_recipe_is_the_same_with_its_schema_and_without() -> None:
    plain = {"data": {"path": "x"}}
    assert load_mapping({"schema": 1, **plain}) == load_mapping({"schema": 0, **plain}) == load_mapping(plain)
    assert dump(load_mapping(plain)).startswith("schema: 1\n")


def test_a_run_is_verified_but_for_what_a_later_version_wrote(copied: Ran) -> None:
    before = {verdict.name for verdict in results(*copied) if verdict.refuted}
    later(copied.run, "merge/report.json")
    refuted = {verdict.name: verdict.why for verdict in results(copied.recipe, Run(copied.run.path)) if verdict.refuted}

    assert before == set()
    assert "merge/report.json was written by a later version of finetune" in refuted["told_of"]
    assert refuted.keys() < {verdict.name for verdict in results(*copied)}
    assert len(refuted) < 12


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("name", ["manifest.json", "events.jsonl", "merge/report.json"])
def test_what_a_later_version_wrote_is_not_made_again(copied: Ran, name: str, force: bool) -> None:
    later(copied.run, name)
    before = everything(copied.run)
    with pytest.raises(NewerError, match=name):
        pipeline.run_stages(copied.recipe, Run(copied.run.path), force=force)

    assert {key: sha for key, sha in everything(copied.run).items() if key != ".lock"} == before


def test_a_stopped_training_does_not_start_anew_over_a_later_version_s_checkpoints(copied: Ran) -> None:
    (copied.run.path / "train" / "report.json").unlink()
    for name in ("digests.json", "finetune.json"):
        before = everything(copied.run)
        newest = f"train/checkpoint-12/{name}"
        if name == "finetune.json":
            (copied.run.path / "train/checkpoint-12/digests.json").unlink()
            edit_json(copied.run, newest, lambda value: value.update(schema=LATER))
            folder = copied.run.path / "train" / "checkpoint-12"
            write_json(folder / "digests.json", schemas.CHECKPOINT.written({"files": digests(folder)}))
        else:
            edit_json(copied.run, newest, lambda value: value.update(schema=LATER))
        with pytest.raises(NewerError, match=newest):
            pipeline.run_stages(copied.recipe, Run(copied.run.path), ["train"])
        assert {key for key in before if "checkpoint" in key} <= set(everything(copied.run))


def test_a_bundle_of_a_later_version_is_refused_by_name(copied: Ran) -> None:
    bundle = copied.run.path / "export" / "bundle"
    assert verify_manifest(bundle) == []
    later(copied.run, "export/bundle/manifest.json")
    assert "manifest.json was written by a later version of finetune" in verify_manifest(bundle)[0]
    with pytest.raises(NewerError):
        set_card(bundle, None)


# -- the day a number is raised ------------------------------------------------------------------------------------------

RAISED = (schemas.MANIFEST, schemas.EVENT, schemas.REPORT, schemas.VERDICTS, schemas.CHECKPOINT, schemas.BUNDLE)


@pytest.fixture
def steps() -> Iterator[dict[str, int]]:
    """Every number is one higher, with a step that changes one word of a manifest and nothing else: how often each was taken,
    by kind."""
    taken = {schema.what: 0 for schema in (*RAISED, schemas.TRAINING, schemas.RECIPE)}
    before = {schema.what: (schema.number, schema.steps) for schema in schemas.KINDS}

    def step(what: str) -> schemas.Step:
        def change(stored: dict[str, Any]) -> dict[str, Any]:
            taken[what] += 1
            return {**stored, "command": "in other words"} if what == schemas.MANIFEST.what else dict(stored)

        return change

    kinds = {schema.what: schema for schema in schemas.KINDS}
    for what in taken:  # frozen, as nobody else shall
        object.__setattr__(kinds[what], "number", before[what][0] + 1)
        object.__setattr__(kinds[what], "steps", (*before[what][1], step(what)))
    yield taken
    for what in taken:
        for name, value in zip(("number", "steps"), before[what], strict=True):
            object.__setattr__(kinds[what], name, value)


def test_a_run_of_before_is_proved_as_before_and_stays_as_it_is(copied: Ran, steps: dict[str, int]) -> None:
    before = everything(copied.run)
    again = Run(copied.run.path)
    verdicts = results(copied.recipe, again)
    folder = copied.run.path / "train" / "checkpoint-6"

    assert [f"{verdict.name}: {verdict.why}" for verdict in verdicts if verdict.refuted] == []
    assert {verdict.name for verdict in verdicts if verdict.outcome == PROVED} > {"sealed", "told_of", "records_whole"}
    assert seal.faults(again) == []
    assert (checkpoints.faults(folder), verify_manifest(again.path / "export" / "bundle")) == ([], [])
    assert identity.read(folder) is not None
    assert everything(copied.run) == before
    assert [what for what, times in steps.items() if not times and what not in ("verdicts", "recipe")] == []


def test_nothing_of_a_run_of_before_is_made_again(copied: Ran, steps: dict[str, int]) -> None:
    recipe = load(copied.run.path / "recipe.yaml")
    assert [step for step in pipeline.preview(recipe, copied.run, ["merge"]) if step.runs] == []
    replaced = [event for event in copied.run.events("recipe") if event["replaced"]]
    reports = {name: sha for name, sha in everything(copied.run).items() if name.endswith("report.json")}
    run = Run(copied.run.path)
    pipeline.run_stages(recipe, run, ["merge"])

    assert {name: everything(run)[name] for name in reports} == reports
    assert [event for event in run.events("recipe") if event["replaced"]] == replaced
    assert json.loads((run.path / "manifest.json").read_text())["schema"] == 2
    assert seal.faults(Run(run.path)) == []


def test_what_an_older_file_could_not_know_is_not_made_up(copied: Ran, steps: dict[str, int]) -> None:
    as_of_0_1(copied.run)
    run = Run(copied.run.path)

    report = run.report("merge")
    assert report is not None
    assert (report.schema, report.files) == (0, {})
    assert "schema" not in run.manifest()
    assert not any(PREVIOUS in event or "schema" in event for event in run.events())
    assert not seal.is_sealed(run)


def test_a_report_of_0_1_that_is_written_again_stays_one(copied: Ran) -> None:
    as_of_0_1(copied.run)
    run = Run(copied.run.path)
    before = run.require("merge")
    run.write_report(before)

    assert Run(run.path).report("merge") == before
    assert "schema" not in json.loads((run.path / "merge" / "report.json").read_text())
