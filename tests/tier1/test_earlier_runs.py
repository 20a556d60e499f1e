"""A run that version 0.1.0 made verifies, and goes on, under this one: its trainings are kept, the rest is made again.

`support/run-0.1.0.tar.gz` is such a run, whole, with its data; `@ROOT@` stands for the folder it was made in.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from finetune.checks import NOT_EXAMINED, results, verify
from finetune.cli.app import cli
from finetune.core.errors import MissingError
from finetune.core.files import digest
from finetune.data.sources import local_files
from finetune.export.bundle import set_card, verify_manifest
from finetune.lifecycle import handout
from finetune.recipe import Recipe, load
from finetune.report import compare, summary
from finetune.run import Run, evidence, layout, seal
from finetune.run.plan import BY_NAME, inputs, plan
from finetune.serving import models
from finetune.stages import pipeline
from support.proof import flip
from support.town import edit_json

STORED = Path(__file__).parents[1] / "support" / "run-0.1.0.tar.gz"
TRAININGS = ("train", "align")


@pytest.fixture
def earlier(tmp_path: Path) -> tuple[Recipe, Run]:
    """The stored run, laid out in a folder of its own, with the digests that version 0.1.0 would have given it there."""
    with tarfile.open(STORED) as archive:
        for member in archive:
            stream = archive.extractfile(member)
            assert stream is not None
            path = tmp_path / member.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(stream.read().replace(b"@ROOT@", str(tmp_path).encode()))
    run = Run(tmp_path / "runs" / "town")
    recipe = load(run.path / "recipe.yaml")
    reports: dict[str, dict[str, Any]] = {}
    for stage in plan(recipe):
        path = run.path / stage.name / "report.json"
        report = reports[stage.name] = json.loads(path.read_text())
        report["artifacts"] = {name: digest(run.path / name) for name in report["artifacts"]}
        before = {
            need: [reports[need]["fingerprint"], reports[need]["artifacts"]] for need in stage.needs if need in reports
        }
        files = {str(file): digest(file) for file in local_files(recipe, stage.name)}
        # As stages/__init__.py of 0.1.0 has it.
        text = json.dumps(["0.1.0", inputs(BY_NAME[stage.name], recipe), files, before], sort_keys=True, default=str)
        report["fingerprint"] = hashlib.sha256(text.encode()).hexdigest()
        path.write_text(json.dumps(report))
    return recipe, run


def test_it_verifies(earlier: tuple[Recipe, Run]) -> None:
    verdicts = {verdict.name: verdict for verdict in results(*earlier)}

    assert [f"{each.name}: {each.why}" for each in verdicts.values() if each.refuted] == []
    assert verdicts["sealed"].outcome == NOT_EXAMINED
    assert len(verdicts) >= 90


def test_verifying_it_does_not_seal_what_nobody_sealed(earlier: tuple[Recipe, Run]) -> None:
    verify(*earlier)
    run = Run(earlier[1].path)

    assert not seal.is_sealed(run)
    assert "seal" not in run.manifest()
    assert [verdict.outcome for verdict in results(earlier[0], run, ["seal"])] == [NOT_EXAMINED]


def test_what_is_changed_in_it_is_seen_all_the_same(earlier: tuple[Recipe, Run]) -> None:
    recipe, run = earlier
    (run.path / "merge" / "model" / "fake_model.json").write_text("{}")
    assert "artifacts_intact" in {verdict.name for verdict in results(recipe, run) if verdict.refuted}


def test_its_trainings_are_kept_and_marked_and_all_else_is_made_again(earlier: tuple[Recipe, Run]) -> None:
    recipe, run = earlier
    before = {name: run.require(name) for name in TRAININGS}
    planned = {step.stage: step for step in pipeline.preview(recipe, run)}
    assert planned["prepare"].why == "made by version 0.1"
    reports = {report.stage: report for report in pipeline.run_stages(recipe, run)}

    for name in TRAININGS:
        assert (reports[name].started, reports[name].artifacts) == (before[name].started, before[name].artifacts)
    assert all(reports[name].started > before["align"].started for name in reports if name not in TRAININGS)
    kept = run.manifest()["kept"]
    assert set(kept) == set(TRAININGS)
    assert all(changes[0].startswith("finetune 0.1.0 -> ") for changes in kept.values())
    assert seal.faults(Run(run.path)) == []
    assert [f"{v.name}: {v.why}" for v in results(recipe, Run(run.path)) if v.refuted] == []
    assert not [step for step in pipeline.preview(recipe, Run(run.path)) if step.runs]


def test_a_training_that_the_recipe_now_asks_otherwise_is_done_anew(earlier: tuple[Recipe, Run]) -> None:
    recipe, run = earlier
    assert recipe.train is not None
    other = recipe.model_copy(update={"train": recipe.train.model_copy(update={"learning_rate": 2e-4})})
    before = run.require("train").started
    pipeline.run_stages(other, run, ["train"])
    assert run.require("train").started > before


def test_retrain_does_a_kept_training_anew(earlier: tuple[Recipe, Run]) -> None:
    recipe, run = earlier
    pipeline.run_stages(recipe, run)
    before = run.require("train").started
    pipeline.run_stages(recipe, run, retrain=True)
    assert run.require("train").started > before
    assert run.manifest()["kept"] == {}


def test_it_is_handed_out_while_it_is_whole(earlier: tuple[Recipe, Run]) -> None:
    recipe, run = earlier
    exported, merged = run.path / "export" / "bundle", run.path / "merge" / "model"
    assert (handout.damage(run), handout.unproved(run, recipe)) == ([], [])
    assert handout.changed(run, [exported, merged, run.path / "train" / "adapter", run.path / "recipe.yaml"]) == []

    flip(exported / "fake_model.json")
    flip(merged / "fake_model.json")
    assert [str(each) for each in handout.changed(run, [exported, merged])] == [
        "export/bundle was changed after it was written", "merge/model was changed after it was written",
    ]  # fmt: skip
    assert [each.file for each in handout.damage(run)] == ["merge/model", "export/bundle"]
    (checkpoint,) = handout.changed(run, [run.path / "train" / "checkpoint-3"])
    assert "listed nowhere by version 0.1" in checkpoint.why
    exported.rename(run.path / "gone")
    assert [str(each) for each in handout.changed(run, [exported])] == ["export/bundle is gone"]


def test_its_environment_is_known(earlier: tuple[Recipe, Run]) -> None:
    manifest, shown = earlier[1].manifest(), summary.document(earlier[1])["manifest"]

    assert (manifest["finetune"], manifest["python"], manifest["cpu"]) == ("0.1.0", "3.11.7", "AMD EPYC")
    assert manifest["packages"]["transformers"] == "5.23.0"
    assert manifest["seeds"] == {"train": {"seed": 0, "data_seed": 0}, "align": {"seed": 0, "data_seed": 0}}
    assert shown == manifest
    assert "schema" not in manifest


def test_its_environment_is_held_against_another_run_s(earlier: tuple[Recipe, Run], tmp_path: Path) -> None:
    shutil.copytree(earlier[1].path, tmp_path / "other")
    edit_json(Run(tmp_path / "other"), "manifest.json", lambda manifest: manifest.update(python="3.13.1"))
    found = compare.compare(earlier[1], Run(tmp_path / "other"))
    assert [(each["key"], each["a"], each["b"]) for each in found["versions"]] == [("python", "3.11.7", "3.13.1")]


def test_its_bundle_is_verified_by_the_command_line(earlier: tuple[Recipe, Run]) -> None:
    bundle = earlier[1].path / "export" / "bundle"
    assert "schema" not in json.loads((bundle / "manifest.json").read_text())
    whole = CliRunner().invoke(cli, ["verify", str(bundle)])
    assert (whole.exit_code, whole.stdout) == (0, f"{bundle}: every file is as it was put out\n")

    flip(bundle / "fake_model.json")
    broken = CliRunner().invoke(cli, ["verify", str(bundle), "--json"])
    assert broken.exit_code == 1
    assert json.loads(broken.stdout)["faults"] == ["fake_model.json: changed (SHA-256 differs)"]
    assert CliRunner().invoke(cli, ["verify", str(bundle), "--check", "seal"]).exit_code == 2


def test_a_bundle_is_taken_for_no_run(earlier: tuple[Recipe, Run]) -> None:
    """Whoever writes into a bundle, as `report` does into a run, makes it another one."""
    bundle = earlier[1].path / "export" / "bundle"
    before = sorted(path.name for path in bundle.iterdir())

    for verb in ("report", "export"):
        said = CliRunner().invoke(cli, [verb, str(bundle)], standalone_mode=False)
        assert isinstance(said.exception, MissingError)
        assert f"no run at {bundle}" in str(said.exception)
    assert not Run(bundle).exists
    assert sorted(path.name for path in bundle.iterdir()) == before


def test_its_bundle_is_a_model_that_answers_as_it_did(earlier: tuple[Recipe, Run], tmp_path: Path) -> None:
    recipe, run = earlier
    before = {row["prompt"]: row["phases"]["aligned"]["text"] for row in evidence.rows(run, layout.ANSWERS)}
    bundle = run.path / "export" / "bundle"
    again = recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update={"path": str(bundle)}), "output_dir": str(tmp_path / "again"),
            "train": None, "align": None, "data": None, "export": [], "expect": type(recipe.expect)(),
        }
    )  # fmt: skip
    later = pipeline.run_directory(again)
    pipeline.run_stages(again, later, ["evaluate"])

    answers = {row["prompt"]: row["phases"]["base"]["text"] for row in evidence.rows(later, layout.ANSWERS)}
    assert answers == before
    assert len(answers) >= 12


def test_its_model_is_found_to_be_served(earlier: tuple[Recipe, Run]) -> None:
    recipe, run = earlier
    found = models.final(run, recipe)
    assert found.path == run.path / "merge" / "model"
    assert handout.changed(run, models.loaded(found, run, recipe)) == []


def test_its_bundle_gets_a_card_and_a_number_where_it_is_put_out_again(earlier: tuple[Recipe, Run]) -> None:
    bundle = earlier[1].path / "export" / "bundle"
    set_card(bundle, None, (), ["why"])
    stated = json.loads((bundle / "manifest.json").read_text())
    assert (stated["schema"], stated["finetune"], stated["exported_although"]) == (1, "0.1.0", ["why"])
    assert verify_manifest(bundle) == []


def test_its_verdicts_are_those_of_its_newest_stage(earlier: tuple[Recipe, Run]) -> None:
    recipe, run = earlier
    report = json.loads((run.path / "merge" / "report.json").read_text())
    (run.path / "merge" / "report.json").write_text(json.dumps({**report, "started": "2999-01-01T00:00:00.000Z"}))
    assert handout.unproved(run, recipe) == ["not verified since the stage 'merge' ran"]
    (run.path / "verdicts.json").unlink()
    assert handout.unproved(run, recipe) == ["not verified"]
