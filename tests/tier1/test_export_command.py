"""`finetune export`: what it accepts, what it proves, and that what it puts somewhere is there whole or not at all."""

from __future__ import annotations

import http.server
import json
import shutil
import threading
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import finetune
from finetune import checks
from finetune.checks import judge
from finetune.cli import machine
from finetune.cli.app import cli
from finetune.core.errors import MissingError
from finetune.core.files import digest, digests, write_json, write_text
from finetune.export import FORMATS, targets
from finetune.export import bundle as bundles
from finetune.lifecycle.delivery import deliver
from finetune.recipe import dump, load
from finetune.run import Run, evidence, layout
from finetune.run.restore import restore
from finetune.stages import runner
from finetune.stages.pipeline import run_stages
from support.proof import flip, prove, stated, whole_folder
from support.town import only_training
from support.town import recipe as town_recipe


def call(*args: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(arg) for arg in args], prog_name="finetune")


@pytest.fixture(autouse=True)
def _found_from_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes of their own find the package whatever the working directory, also when it is not installed."""
    monkeypatch.setenv("PYTHONPATH", str(Path(finetune.__file__).parents[1]))


@pytest.fixture(scope="module")
def trained(town: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the town without any export."""
    wanted = town_recipe(town, tmp_path_factory.mktemp("runs"), align=None, expect={"resume": False})
    run = Run(tmp_path_factory.mktemp("trained") / "town")
    run_stages(wanted, run)
    return run.path


@pytest.fixture(scope="module")
def first(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Result]:
    """The run after a first export of it, what was put into --out, and what the command said."""
    place = tmp_path_factory.mktemp("first")
    shutil.copytree(trained, place / "town")
    result = call("export", place / "town", "--to", "bundle", "--out", place / "out")
    return place / "town", place / "out", result


@pytest.fixture
def exported(first: tuple[Path, Path, Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the exported run as ./runs/town, in which nothing is left to do."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(first[0], tmp_path / "runs" / "town"))


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the stages that run."""
    found: list[str] = []

    def spy(reference: str, load: Callable[[str], Any] = runner.load) -> Any:
        found.append(reference.partition(":")[0].rpartition(".")[2])
        return load(reference)

    monkeypatch.setattr(runner, "load", spy)
    return found


def verdict(monkeypatch: pytest.MonkeyPatch, **passed: bool) -> None:
    """Have the checks find these verdicts, `greedy_parity__bundle` for `greedy_parity[bundle]`."""

    def results(recipe: Any, run: Any, only: Any = None, *, training: bool = False) -> list[Any]:
        names = {f"{name.replace('__', '[')}]" if "__" in name else name: good for name, good in passed.items()}
        return [judge(name, float(good), "==", 1.0, "share", "x", f"why {name}") for name, good in names.items()]

    monkeypatch.setattr(checks, "results", results)


# -- a whole export ----------------------------------------------------------------------------------------------------


def test_a_trained_run_is_exported_compared_shown_and_put_where_it_is_wanted(
    first: tuple[Path, Path, Result],
) -> None:
    run, out, result = first

    assert result.exit_code == 0, result.output
    assert "bundle" in result.stdout and str(out / "bundle") in result.stdout
    for place in (run / "export" / "bundle", out / "bundle"):
        assert bundles.verify_manifest(place) == []
    assert (run / "compare" / "bundle.json").is_file()
    assert load(run / "recipe.yaml").export == ["bundle"]
    assert [path.name for path in out.iterdir()] == ["bundle"]


def test_the_card_that_is_put_out_tells_how_the_export_did(first: tuple[Path, Path, Result]) -> None:
    run, out, _ = first
    stored = json.loads((run / "verdicts.json").read_text())["verdicts"]
    card = (out / "bundle" / "README.md").read_text()

    assert sum(each["name"].endswith("[bundle]") for each in stored) >= 5
    for each in stored:
        assert f"| {each['name']} |" in card
    assert "[bundle] |" not in (run / "export" / "bundle" / "README.md").read_text()
    assert str(run) not in card


def test_training_is_not_repeated_for_an_export(first: tuple[Path, Path, Result], trained: Path) -> None:
    for stage in ("fetch", "prepare", "train", "evaluate", "merge", "measure"):
        assert (first[0] / stage / "report.json").read_bytes() == (trained / stage / "report.json").read_bytes()


def test_what_is_up_to_date_is_not_exported_again_but_verified(exported: Path, ran: list[str]) -> None:
    (exported / "verdicts.json").unlink()
    assert call("export", "town", "--to", "bundle").exit_code == 0
    assert ran == []
    assert (exported / "verdicts.json").is_file()


def test_without_to_the_recipes_own_formats_are_meant(exported: Path, ran: list[str]) -> None:
    result = call("export")
    assert (result.exit_code, ran) == (0, [])
    assert "using runs/town" in result.stderr


def test_force_exports_again_and_does_nothing_else_again(exported: Path, ran: list[str]) -> None:
    result = call("export", exported, "--to", "bundle", "--force", "--no-parity")
    assert result.exit_code == 0, result.output
    assert ran == ["export"]


def test_without_parity_nothing_is_compared(exported: Path, ran: list[str]) -> None:
    before = (exported / "verdicts.json").read_bytes()
    result = call("export", "town", "--no-parity", "--out", "out")

    assert (result.exit_code, ran) == (0, [])
    assert "not compared" in result.stdout
    assert (exported / "verdicts.json").read_bytes() == before
    assert bundles.verify_manifest(Path("out/bundle")) == []


def test_json_alone_is_on_stdout(exported: Path) -> None:
    result = call("export", "town", "--json", "--out", "out")
    found = json.loads(result.stdout)

    assert (result.exit_code, found["passed"], found["run"]) == (0, True, str(exported))
    assert [each["path"] for each in found["exports"]] == [str(exported / "export" / "bundle")]
    assert [each["hop"] for each in found["compared"]] == ["merged", "bundle"]
    assert {each["name"].partition("[")[2] for each in found["verdicts"]} == {"merged]", "bundle]"}
    assert found["published"] == ["out/bundle"]
    assert json.loads(call("export", "town", "--json", "--no-parity").stdout)["passed"] is None


def test_a_dry_run_says_what_would_run_and_writes_nothing(exported: Path, ran: list[str]) -> None:
    before = sorted(exported.rglob("*"))
    result = call("export", "town", "--dry-run", "--force", "--json", "--out", "out")
    would = {step["stage"] for step in json.loads(result.stdout)["stages"] if step["runs"]}

    assert (result.exit_code, would, ran) == (0, {"export", "compare"}, [])
    assert sorted(exported.rglob("*")) == before
    assert not Path("out").exists()


def test_a_recipe_is_trained_first(town: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    nothing = dict.fromkeys(("probes", "controls", "unseen", "heldout"))
    small = town_recipe(
        town, tmp_path / "runs", align=None, evaluate=nothing, expect={"resume": False}, train={"max_steps": 3}
    )
    write_text(tmp_path / "own.yaml", dump(small))
    (tmp_path / "project").mkdir()
    write_text(tmp_path / "project" / "recipe.yaml", dump(small))

    result = call("export", "own.yaml", "--to", "bundle", "--no-parity", "--run", "here")
    assert result.exit_code == 0, result.output
    assert bundles.verify_manifest(tmp_path / "here" / "export" / "bundle") == []
    # A directory that holds a recipe and was never run is no run.
    steps = json.loads(call("export", "project", "--to", "bundle", "--dry-run", "--json").stdout)
    assert steps["run"] == str(tmp_path / "runs" / "town")
    assert [step["runs"] for step in steps["stages"] if step["stage"] == "train"] == [True]


# -- an export that is not like its model ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["greedy_parity__bundle", "merged_once__merged"])
def test_a_failed_parity_ends_with_1_and_puts_nothing_out(
    exported: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    verdict(monkeypatch, prompt_parity__bundle=True, **{name: False})
    result = call("export", "town", "--out", "out")

    assert result.exit_code == 1
    assert f"why {name.replace('__', '[')}]" in result.stdout
    assert "nothing was put into out" in result.stderr
    assert not Path("out").exists()


def test_only_what_concerns_the_exports_decides(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verdict(monkeypatch, prompt_parity__bundle=True, memory_reduced=False, prompt_parity__mlx=False)
    assert call("export", "town").exit_code == 0


def test_no_parity_verdict_is_no_passed_one(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verdict(monkeypatch, loss_convergence=True)
    result = call("export", "town", "--out", "out")
    assert result.exit_code == 1
    assert not Path("out").exists()


# -- what is not handed out --------------------------------------------------------------------------------------------

DAMAGED = (
    "export/bundle/fake_model.json", "export/bundle/README.md", "export/bundle/adapter/adapter.json",
    "export/bundle/manifest.json", "export/report.json", "merge/model/fake_model.json", "train/adapter/adapter.json",
    "evaluate/answers.jsonl", "recipe.yaml", "events.jsonl",
)  # fmt: skip


def add_line(file: Path) -> None:
    file.write_text(file.read_text() + "\n")


def told_again(run: Run) -> None:
    run.events_path.unlink()
    assert restore(Run(run.path))


@pytest.mark.parametrize("more", [[], ["--no-parity"], ["--json"]])
@pytest.mark.parametrize("name", DAMAGED)
def test_what_is_not_as_it_was_made_is_not_put_out(exported: Path, ran: list[str], name: str, more: list[str]) -> None:
    if name == "events.jsonl":
        text = (exported / name).read_text()
        (exported / name).write_text(text.replace('"step": 1,', '"step": 2,', 1))
    elif name in ("recipe.yaml", "export/report.json"):
        add_line(exported / name)
    else:
        flip(exported / name)
    before = {path: path.read_bytes() for path in whole_folder(exported)}
    result = call("export", exported, "--out", "out", *more)

    assert (result.exit_code, result.stdout, ran) == (1, "", []), result.output
    assert "nothing was put into out" in result.stderr and name in result.stderr
    assert "finetune run" in result.stderr and "--anyway" in result.stderr
    assert not Path("out").exists()
    assert {path: path.read_bytes() for path in whole_folder(exported)} == before


def test_a_stage_whose_report_is_gone_is_missed(exported: Path, ran: list[str]) -> None:
    (exported / "compare" / "report.json").unlink()
    result = call("export", "town", "--out", "out", "--no-parity")
    assert (result.exit_code, ran) == (1, [])
    assert "compare/report.json is gone" in result.stderr


def test_who_insists_gets_it_with_a_card_that_says_so(exported: Path, ran: list[str]) -> None:
    listed = stated(exported / "export" / "bundle")
    weights = flip(exported / "export" / "bundle" / "fake_model.json")
    result = call("export", exported, "--out", "out", "--anyway", "--json")
    out, why = Path("out/bundle"), "export/bundle/fake_model.json was changed after it was written"

    assert (result.exit_code, ran) == (0, []), result.output
    assert f"warning: exported although: {why}" in result.stderr
    assert json.loads(result.stdout)["published"] == ["out/bundle"]
    card = (out / "README.md").read_text()
    title, _, rest = card.partition("# town")[2].partition("\n\n")
    assert (title, rest.splitlines()[:3]) == ("", ["> **Exported although:**", ">", f"> - {why}"])
    assert json.loads((out / "manifest.json").read_text())["exported_although"] == [why]
    # Nothing is hashed again to fit: the manifest says what was made, and who checks it finds what was changed.
    assert {**stated(out), "README.md": ""} == {**listed, "README.md": ""}
    assert bundles.verify_manifest(out) == ["fake_model.json: changed (SHA-256 differs)"]
    assert (out / "fake_model.json").read_bytes() == weights.read_bytes()


def test_what_is_damaged_is_made_again_without_out_or_with_force(exported: Path, ran: list[str]) -> None:
    made = (exported / "export" / "bundle" / "fake_model.json").read_bytes()
    flip(exported / "export" / "bundle" / "fake_model.json")
    assert call("export", "town", "--force", "--out", "out").exit_code == 0
    assert "export" in ran
    assert Path("out/bundle/fake_model.json").read_bytes() == made
    flip(exported / "export" / "bundle" / "fake_model.json")
    assert call("export", "town").exit_code == 0
    assert (exported / "export" / "bundle" / "fake_model.json").read_bytes() == made


def test_an_export_changed_together_with_the_list_of_exports_is_made_again(exported: Path) -> None:
    weights = exported / "export" / "bundle" / "fake_model.json"
    made = weights.read_bytes()
    flip(weights)
    entries = json.loads((exported / "export" / "exports.json").read_text())
    entries[0] |= {"sha256": digest(weights.parent), "files": digests(weights.parent)}
    write_json(exported / "export" / "exports.json", entries)
    assert call("export", "town").exit_code == 0
    assert weights.read_bytes() == made


def test_an_export_that_is_not_there_is_not_made_of_what_is_damaged(exported: Path, ran: list[str]) -> None:
    flip(exported / "merge" / "model" / "fake_model.json")
    result = call("export", "town", "--to", "mlx", "--out", "out", "--anyway", "--no-parity")
    assert (result.exit_code, ran) == (3, []), result.output
    assert "has no export mlx" in result.stderr


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda run, recipe: (run.path / "verdicts.json").unlink(), "not verified"),
        (lambda run, recipe: add_line(run.path / "verdicts.json"), "verdicts.json was changed after it was written"),
        (lambda run, recipe: prove(run, recipe, refuted=["learned_as_trained"]), "refuted: learned_as_trained"),
        (lambda run, recipe: prove(run, recipe, but=["artifacts_intact"]), "not verified: artifacts_intact"),
        (lambda run, recipe: prove(run, recipe, but=["loss_end"]), "not verified: loss_end"),
        (lambda run, recipe: told_again(run), "not verified since its log was made again"),
        (lambda run, recipe: run.event("recipe", replaced=True), "not verified since the recipe changed"),
        (lambda run, recipe: run.event("stage_started", stage="merge"), "not verified since the stage 'merge' ran"),
    ],
    ids=["never", "edited", "refuted", "in part", "not the training", "log made again", "another recipe", "before"],
)
def test_a_run_that_is_not_proved_is_not_put_out(
    exported: Path, ran: list[str], change: Callable[[Run, Any], Any], why: str
) -> None:
    change(Run(exported), load(exported / "recipe.yaml"))
    result = call("export", "town", "--no-parity", "--out", "out")
    assert (result.exit_code, ran) == (1, []), result.output
    assert f"  {why}" in result.stderr
    assert f"finetune verify {exported}" in result.stderr
    assert not Path("out").exists()

    result = call("export", "town", "--no-parity", "--out", "out", "--anyway")
    assert result.exit_code == 0, result.output
    assert f"> - {why}" in Path("out/bundle/README.md").read_text()
    assert f"warning: exported although: {why}" in result.stderr
    assert bundles.verify_manifest(Path("out/bundle")) == []


def test_what_has_to_be_known_of_the_training_stands_in_the_card_that_is_put_out(exported: Path) -> None:
    stored = evidence.read(Run(exported), layout.VERDICTS)["verdicts"]
    mark = "the training was made with torch 2.13.0, now 2.14.0"
    deliver(Run(exported), targets(["bundle"]), Path("out"), verdicts=stored, marks=[mark])
    assert mark in Path("out/bundle/README.md").read_text()


def test_any_refuted_verdict_keeps_exports_in_the_run(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verdict(monkeypatch, prompt_parity__bundle=True, memory_reduced=False)
    result = call("export", "town", "--out", "out", "--json")
    assert (result.exit_code, json.loads(result.stdout)["published"]) == (1, [])
    assert "refuted: memory_reduced" in result.stderr
    assert not Path("out").exists()


def test_anyway_is_for_what_is_put_out(exported: Path, ran: list[str]) -> None:
    result = call("export", "town", "--anyway")
    assert (result.exit_code, ran) == (2, [])
    assert "--anyway goes with --out" in result.stderr


def test_a_format_without_a_card_gets_one_that_says_why(exported: Path) -> None:
    folder = exported / "export" / "gguf-f16"
    folder.mkdir()
    (folder / "town.gguf").write_bytes(b"GGUF")
    deliver(Run(exported), targets(["gguf"]), Path("out"), verdicts=None, although=["not verified"])
    assert (Path("out/gguf-f16/README.md").read_text()) == "# gguf-f16\n\n> **Exported although:**\n>\n> - not verified"


def test_what_is_put_out_is_what_the_run_lists(first: tuple[Path, Path, Result]) -> None:
    run, out, _ = first
    report, (entry,) = json.loads((run / "export" / "report.json").read_text()), evidence.read(Run(run), layout.EXPORTS)
    there = digests(out / "bundle")
    anew = {"README.md", "manifest.json"}  # the card has got the verdicts

    assert there.keys() == entry["files"].keys() and len(there) >= 8
    for name in there.keys() - anew:
        assert there[name] == entry["files"][name] == report["files"][f"export/bundle/{name}"]
    assert {name: sha for name, sha in stated(out / "bundle").items() if name not in anew} == {
        name: sha for name, sha in there.items() if name not in anew
    }


def test_no_two_files_of_a_run_are_one_on_the_disk(first: tuple[Path, Path, Result]) -> None:
    files = [*whole_folder(first[0]), *whole_folder(first[1])]
    assert len(files) > 60
    assert [str(path) for path in files if path.is_symlink() or path.stat().st_nlink != 1] == []


def test_a_model_trained_whole_is_copied_when_it_is_merged(town: Path, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    run_stages(only_training(town, tmp_path, train={"method": "full"}), run, ["merge"])
    assert digest(run.path / "merge" / "model") == digest(run.path / "train" / "model")
    assert [str(path) for path in whole_folder(run.path) if path.is_symlink() or path.stat().st_nlink != 1] == []


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["town", "--to", "bundel"], 2, "unknown export format 'bundel'. Did you mean 'bundle'?"),
        (["town", "--to", "gguf:q8"], 2, "no variant 'q8' of 'gguf'. Did you mean 'q8_0'?"),
        (["town", "--to", "bundle:f16"], 2, "'bundle' has no variants"),
        (["twon", "--to", "bundle"], 3, "no run at twon. Did you mean 'town'?"),
        (["nowhere/else", "--to", "bundle"], 3, "no run at"),
        (["none.yaml", "--to", "bundle"], 3, "none.yaml"),
        (["town", "--run", "other"], 2, "town is a run already"),
        (["town", "--out", "file"], 2, "--out file is not a directory"),
        (["town", "--out", "runs/town/export"], 2, "lies inside the run"),
        (["town", "--out", "runs/town"], 2, "lies inside the run"),
        (["town", "--set", "train.max_step=4"], 2, "max_steps"),
    ],
)
def test_bad_input_is_one_message_and_nothing_runs(
    exported: Path, ran: list[str], args: list[str], code: int, words: str
) -> None:
    Path("file").write_text("x")
    before = (exported / "recipe.yaml").read_bytes()
    result = call("export", *args)

    assert (result.exit_code, ran) == (code, []), result.output
    assert words in result.stderr
    assert "Traceback" not in result.output
    assert (exported / "recipe.yaml").read_bytes() == before


def test_no_format_at_all_names_those_that_there_are(trained: Path, tmp_path: Path, ran: list[str]) -> None:
    run = shutil.copytree(trained, tmp_path / "town")
    result = call("export", run)

    assert (result.exit_code, ran) == (2, [])
    for name in ("--to gguf:", "gguf, mlx, ollama, bundle"):
        assert name in result.stderr


def test_a_run_that_did_not_finish_training_is_told_to(trained: Path, tmp_path: Path, ran: list[str]) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "town"))
    (run / "train" / "report.json").unlink()
    result = call("export", run, "--to", "bundle")

    assert (result.exit_code, ran) == (3, [])
    assert f"its stage 'train' has not finished. Go on with: finetune run {run / 'recipe.yaml'}" in result.stderr
    assert not (run / "export").exists()


def test_a_run_is_never_trained_again_by_an_export(exported: Path, ran: list[str]) -> None:
    result = call("export", "town", "--set", "train.max_steps=13")

    assert (result.exit_code, ran) == (4, [])
    assert "would have to be trained again (changed: train.max_steps 12 -> 13)" in result.stderr


# -- --out -------------------------------------------------------------------------------------------------------------


def test_what_is_there_already_is_replaced_only_when_told(exported: Path, ran: list[str]) -> None:
    Path("out/bundle").mkdir(parents=True)
    Path("out/bundle/mine").write_text("x")
    Path("out/other").write_text("x")
    result = call("export", "town", "--out", "out")
    assert (result.exit_code, ran) == (2, [])
    assert "out/bundle exists already" in result.stderr and "--force" in result.stderr
    assert Path("out/bundle/mine").read_text() == "x"

    assert call("export", "town", "--out", "out", "--force").exit_code == 0
    assert bundles.verify_manifest(Path("out/bundle")) == []
    assert sorted(path.name for path in Path("out").iterdir()) == ["bundle", "other"]


def test_an_empty_folder_is_free(exported: Path) -> None:
    Path("out/bundle").mkdir(parents=True)
    assert call("export", "town", "--out", "out", "--no-parity").exit_code == 0
    assert bundles.verify_manifest(Path("out/bundle")) == []


def copying(monkeypatch: pytest.MonkeyPatch, third: Callable[[Path], None]) -> None:
    """Have the third file that is put out treated otherwise."""
    copied: list[str] = []

    def copy(source: Any, target: Any, original: Callable[..., Any] = shutil.copyfile, **more: Any) -> Any:
        if ".partial" in Path(target).parent.name and Path(target).parts[0] == "out":
            copied.append(str(target))
        done = original(source, target, **more)
        if len(copied) == 3 and copied[-1] == str(target):
            third(Path(target))
        return done

    monkeypatch.setattr(shutil, "copyfile", copy)


def full(target: Path) -> None:
    raise OSError(28, "No space left on device")


def test_a_copy_that_breaks_off_leaves_what_was_there(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("out/bundle").mkdir(parents=True)
    Path("out/bundle/mine").write_text("x")
    copying(monkeypatch, full)
    result = call("export", "town", "--out", "out", "--force", "--json")

    assert result.exit_code == 4
    assert "No space left on device" in result.stderr
    assert [path.name for path in Path("out").rglob("*")] == ["bundle", "mine"]


def test_a_copy_that_is_not_like_its_original_leaves_nothing(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copying(monkeypatch, flip)
    result = call("export", "town", "--out", "out")

    assert result.exit_code == 4
    assert "the copy of" in result.stderr and "is not like it" in result.stderr
    assert list(Path("out").iterdir()) == []


def test_a_rename_that_fails_puts_the_old_one_back(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("out/bundle").mkdir(parents=True)
    Path("out/bundle/mine").write_text("x")

    def rename(self: Path, target: Path, original: Callable[[Path, Path], Path] = Path.rename) -> Path:
        if self.name.endswith(".partial") and self.parent.name == "out":
            raise OSError(13, "Permission denied")
        return original(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    assert call("export", "town", "--out", "out", "--force").exit_code == 4
    assert [path.name for path in Path("out").rglob("*")] == ["bundle", "mine"]


def test_a_disk_that_is_too_small_is_told_before_copying(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.core.memory.disk_free", lambda path: 10)
    result = call("export", "town", "--out", "out", "--no-parity")
    assert result.exit_code == 4
    assert "on the disk of out, which has 10 B left. Make room" in result.stderr
    assert list(Path("out").iterdir()) == []


# -- help --------------------------------------------------------------------------------------------------------------


def test_help_lists_every_format_and_variant() -> None:
    text = call("export", "--help").stdout
    rows = " ".join(text.partition("Formats, and their variants")[2].split())

    assert len(FORMATS) >= 4
    for name, row in FORMATS.items():
        own = rows.partition(f" {name} ")[2]
        assert own, name
        if name != "ollama":  # its variants are those of gguf, and the help says so
            assert all(f"{variant}" in own.partition(". ")[2] or f" {variant}" in own for variant in row.variants)
    assert FORMATS["ollama"].variants == FORMATS["gguf"].variants
    assert "f16 (the default)" in rows and FORMATS["gguf"].default == "f16"
    assert "q8_0 by default" in rows and FORMATS["ollama"].default == "q8_0"


# -- doctor: what the formats need -------------------------------------------------------------------------------------


def test_doctor_knows_the_extras_of_the_package() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    offered = project["optional-dependencies"]
    names = {
        extra: {line.split(";")[0].split(">")[0].split("[")[0].strip() for line in lines}
        for extra, lines in offered.items()
    }

    assert {"gguf", "mlx"} <= set(names)
    names["torch"].discard("huggingface_hub")  # named once, as the extra hub
    assert {extra: set(packages) for extra, packages in machine.EXTRAS.items()} == names


def test_an_extra_for_exports_is_optional_and_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["mlx-lm>=0.3; extra == 'mlx'", "mlx>=1; extra == 'mlx'", "mlx[cpu]>=1; os_name == 'x' and extra == 'mlx'"]
    monkeypatch.setattr(machine, "requires", lambda name: lines)
    monkeypatch.setattr(machine, "installed", lambda name: None)
    assert machine.extras() == {"mlx": ("mlx-lm", "mlx")}
    (found,) = machine._extra("mlx", machine.extras()["mlx"])
    assert (found.state, found.found, found.fix) == ("absent", "lacks mlx-lm, mlx", "pip install 'finetune-proof[mlx]'")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "http://127.0.0.1:11434"),
        ("", "http://127.0.0.1:11434"),
        ("0.0.0.0", "http://127.0.0.1:11434"),
        ("box:1234", "http://box:1234"),
        (":1234", "http://127.0.0.1:1234"),
        ("http://box/", "http://box:80"),
        ("https://box", "https://box:443"),
        ("'https://box:7'", "https://box:7"),
    ],
)
def test_the_ollama_server_is_where_ollama_host_says(
    monkeypatch: pytest.MonkeyPatch, value: str | None, expected: str
) -> None:
    monkeypatch.delenv("OLLAMA_HOST", raising=False)
    if value is not None:
        monkeypatch.setenv("OLLAMA_HOST", value)
    assert machine._ollama_address() == expected


class Ollama(http.server.BaseHTTPRequestHandler):
    """Answers `/api/version` as Ollama does."""

    body = b'{"version":"0.12.3"}'

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/api/version" else 404)
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def ollama(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Ollama) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        address = f"127.0.0.1:{server.server_address[1]}"
        monkeypatch.setenv("OLLAMA_HOST", address)
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # where nothing is: it must not be asked
        yield address
        server.shutdown()


def test_doctor_finds_a_running_ollama(ollama: str) -> None:
    found = machine._ollama()
    assert (found.state, found.found) == ("ok", f"0.12.3, serving at http://{ollama}")


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b"not json"])
def test_another_server_in_its_place_is_not_taken_for_it(
    ollama: str, monkeypatch: pytest.MonkeyPatch, body: bytes
) -> None:
    monkeypatch.setattr(Ollama, "body", body)
    assert not machine._ollama().ok


@pytest.mark.parametrize(
    ("binary", "found"), [("/usr/local/bin/ollama", "but no server answers"), (None, "not installed")]
)
def test_a_missing_ollama_is_absent_not_wrong(monkeypatch: pytest.MonkeyPatch, binary: str | None, found: str) -> None:
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    monkeypatch.setattr(shutil, "which", lambda name: binary)
    finding = machine._ollama()
    assert (finding.state, finding.optional) == ("absent", True)
    assert found in finding.found
    assert "ollama serve" in finding.fix


def test_a_missing_ollama_is_told_before_the_training_and_only_where_it_is_needed(
    town: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune.cli.validate import refuse_faults

    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    wanted = town_recipe(town, tmp_path / "runs", export=["ollama"])
    with pytest.raises(MissingError, match="the export 'ollama' cannot be compared: .*ollama serve"):
        refuse_faults(wanted)
    refuse_faults(wanted, ["export"])  # --no-parity
    refuse_faults(town_recipe(town, tmp_path / "runs", export=["bundle"]))
