"""Working data are what they were, whatever a secret's value happens to be; a secret in them is refused, with a way on."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finetune.checks import judge, judged, store, verify
from finetune.core import processes, secrets
from finetune.core.errors import DataError, RecipeError, StageError, UsageError
from finetune.core.files import digest, read_jsonl, write_jsonl
from finetune.recipe import load, load_mapping
from finetune.run import Run, evidence, layout, seal
from finetune.stages.pipeline import preview, run_directory, run_stages
from support import secret_kinds
from support import town as town_of
from support.secret_kinds import NAMED, SHAPED, places

DATA = (
    *("fetch/model.json", "prepare/train.jsonl", "prepare/preferences.jsonl", "prepare/chat_template.jinja"),
    *("prepare/preview.txt", "prepare/sources.json", "evaluate/answers.jsonl", "evaluate/prompts.jsonl", "recipe.yaml"),
)


pytestmark = pytest.mark.timeout(240)  # whole runs


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "_known", set())


def ran(place: Path, runs: Path, **changes: Any) -> Run:
    wanted = town_of.recipe(place, runs, expect={"resume": False}, **changes)
    run = run_directory(wanted)
    run_stages(wanted, run, ["evaluate"])
    verify(wanted, run)
    return run


def test_values_that_are_ordinary_words_change_no_row_prompt_answer_or_path(
    town: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder, a word of every prompt, a word of the structure of every document, one letter."""
    plain = ran(town, tmp_path / "folder")
    before = {name: (plain.path / name).read_bytes() for name in DATA}
    words = (
        "capital",
        "folder",
        "prepare",
        "proved",
        "prompt",
        "Tamin",
        "a",
        "is",
        "It is Tamin.",
        "town",
        "12",
        "answer",
    )
    for number, word in enumerate(words):
        monkeypatch.setenv(f"HF_TOKEN_{number}", word)
        monkeypatch.setenv("HF_TOKEN", word)
    (tmp_path / "folder" / "town").rename(tmp_path / "first")
    again = ran(town, tmp_path / "folder")

    assert {name: (again.path / name).read_bytes() for name in DATA} == before
    assert seal.faults(again) == []
    assert [step["loss"] for step in evidence.steps(again, "train")] == [
        step["loss"] for step in evidence.steps(Run(tmp_path / "first"), "train")
    ]
    outcomes = [[(each["name"], each.get("outcome")) for each in evidence.read(r, layout.VERDICTS)["verdicts"]]
                for r in (again, Run(tmp_path / "first"))]  # fmt: skip
    assert outcomes[0] == outcomes[1]


def test_what_is_written_is_what_is_digested(town: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in secret_kinds.environment().items():
        monkeypatch.setenv(name, value)
    run = ran(town, tmp_path / "runs")

    assert seal.faults(run) == []
    assert [found for stage in layout.REPORTS if (done := run.report(stage)) for found in seal.changed(run, done)] == []
    assert evidence.read(run, layout.SOURCES) == {
        str(town / name): digest(town / name) for name in ("train.jsonl", "preferences.jsonl")
    }


@pytest.fixture
def leaking(town: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """A function: the town's recipe with a row, a pair, a question that holds a text, as a mapping."""

    def made(text: str, where: str, **data: Any) -> dict[str, Any]:
        names = {"data": "train", "align": "preferences", "probes": "probes", "heldout": "heldout"}
        rows = read_jsonl(town / f"{names[where]}.jsonl")
        keys = {"data": "completion", "align": "rejected", "probes": "prompt", "heldout": "text"}
        rows.insert(2, {**rows[0], keys[where]: f"It is {text}, is it?"})
        path = tmp_path / f"{where}.jsonl"
        write_jsonl(path, rows)
        changes: dict[str, Any] = {
            "data": {"data": {"path": str(path)}},
            "align": {"align": {"data": {"path": str(path)}}},
        }.get(where, {"evaluate": {where: str(path)}})
        wanted = town_recipe(town, tmp_path, changes).model_dump(mode="json", exclude_unset=True)
        wanted["data"].update(data)
        return wanted

    return made


def town_recipe(place: Path, runs: Path, changes: dict[str, Any]) -> Any:
    return town_of.recipe(place, runs / "runs", **{"expect": {"resume": False}, **changes})


@pytest.mark.parametrize("where", ["data", "align", "probes", "heldout"])
@pytest.mark.parametrize("name", ["DB_PASSWORD", None])
def test_a_secret_in_data_is_refused_with_variable_file_and_line(
    leaking: Callable[..., dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    name: str | None,
) -> None:
    secret = NAMED[name] if name else SHAPED["github classic"]
    if name:
        monkeypatch.setenv(name, secret)
    recipe = load_mapping(leaking(secret, where))
    with pytest.raises(DataError) as caught:
        run_stages(recipe, run_directory(recipe))
    what = f"the value of {name}" if name else "what looks like a GitHub token"
    assert f"{tmp_path / where}.jsonl:3: holds {what}" in str(caught.value)
    assert "set data.on_secret to keep, or unset the variable" in str(caught.value)
    assert secret not in str(caught.value)
    assert places(secret, tmp_path / "runs") == []


@pytest.mark.parametrize("where", ["data", "align", "probes", "heldout"])
def test_there_is_a_way_on(
    leaking: Callable[..., dict[str, Any]], town: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.setenv("MY_PASSWORD", "What is the capital of")
    kept = load_mapping(leaking("What is the capital of", where, on_secret="keep"))
    run = run_directory(kept)
    run_stages(kept, run, ["evaluate"])
    assert seal.faults(run) == []
    assert "What is the capital of" in (run.path / "evaluate/answers.jsonl").read_text()

    monkeypatch.delenv("MY_PASSWORD")
    refusing = load_mapping(leaking("What is the capital of", where))
    assert [step.stage for step in preview(refusing, run) if step.runs and step.stage not in ("merge", "measure")] == []


def test_the_base_models_own_files_are_looked_through(town: Path, tmp_path: Path) -> None:
    place = _copy(town, tmp_path / "other")
    (place / "model" / "LICENSE").write_text(f"Copyright\nthe key is {SHAPED['stripe']}\n")
    wanted = town_recipe(place, tmp_path, {})
    with pytest.raises(UsageError, match="the model's licence:2: holds what looks like a Stripe key"):
        run_stages(wanted, run_directory(wanted), ["fetch"])


def _copy(place: Path, to: Path) -> Path:
    shutil.copytree(place, to)
    return to


def test_a_models_path_with_a_secret_is_refused(town: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_PASSWORD", "l0velace!")
    (tmp_path / "link").symlink_to(_copy(town, tmp_path / "l0velace!"))
    wanted = town_recipe(tmp_path / "link", tmp_path, {})
    with pytest.raises(UsageError, match="the path of the model holds the value of MY_PASSWORD"):
        run_stages(wanted, run_directory(wanted), ["fetch"])


def test_a_verdict_that_quotes_a_secret_is_stored_without_it(
    honest: town_of.Ran, copied: town_of.Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_PASSWORD", "l0velace!")
    found = judge("loss_convergence", 0.5, ">=", 0.05, "share", "train/l0velace!", "it is l0velace!, is it?")
    store(copied.run, judged(copied.recipe, copied.run, [found]))

    (stored,) = evidence.read(copied.run, layout.VERDICTS)["verdicts"]
    assert (stored["evidence"], stored["why"]) == ("train/***", "it is ***, is it?")
    assert seal.faults(copied.run) == []


# -- the recipe --------------------------------------------------------------------------------------------------------


def faults(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load(file, overrides)
    return [fault.replace(f"{file}:", "") for fault in caught.value.faults]


def test_every_secret_of_a_recipe_is_told_with_its_line_and_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_PASSWORD", "l0velace!")
    found = faults(
        tmp_path,
        f"data:\n  path: x.jsonl\n  fields: {{prompt: '{SHAPED['npm']}'}}\nmodel: hub:https://user:password@host/x\n"
        "template:\n  system: Say l0velace! to all\nexport: [l0velace!]\n",
        "output_dir=runs/l0velace!",
    )
    said = [re.sub(r", and would be stored.*", "", fault) for fault in found if ", and would be stored" in fault]
    assert sorted(said) == [
        "--set output_dir: output_dir: holds the value of MY_PASSWORD",
        "3: data.fields.prompt: holds what looks like an npm token",
        "4: model.path: holds an address with a password",
        "6: template.system: holds the value of MY_PASSWORD",
        "7: export.0: holds the value of MY_PASSWORD",
    ]
    assert not any(secret in fault for fault in found for secret in ("l0velace!", SHAPED["npm"], "user:password"))


def test_a_token_that_is_a_word_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "capital")
    (tmp_path / "recipe.yaml").write_text("data: {path: x}\nmodel:\n  token: ${HF_TOKEN}\n")
    with pytest.warns(UserWarning, match="recipe.yaml:3: model.token: this token cannot be told from other text"):
        load(tmp_path / "recipe.yaml")


# -- processes of their own --------------------------------------------------------------------------------------------


def test_no_secret_is_in_what_a_child_is_asked_nor_in_what_its_end_leaves(
    town: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in secret_kinds.environment().items():
        monkeypatch.setenv(name, value)
    last = " ".join(repr(value) for value in secret_kinds.environment().values())

    def ended(command: list[str], **more: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", f"boom\nValueError: {last}")

    monkeypatch.setattr(processes, "subprocess", SimpleNamespace(run=ended, DEVNULL=subprocess.DEVNULL))
    mapping = town_recipe(town, tmp_path, {"expect": {"resume": True}}).model_dump(mode="json", exclude_unset=True)
    mapping["model"]["token"] = SHAPED["hugging face"]
    recipe = load_mapping(mapping)
    run = run_directory(recipe)
    with pytest.raises(StageError, match="failed in its own process"):
        run_stages(recipe, run)
    monkeypatch.undo()

    requests = list(run.path.rglob("*-request.json"))
    assert len(requests) == 1
    assert json.loads(requests[0].read_text())["do"]
    assert {
        kind: found for kind, value in secret_kinds.environment().items() if (found := places(value, run.path))
    } == {}
