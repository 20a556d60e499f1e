"""A key under the name that it had before is the key of today, and a note says so once."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from finetune.cli.app import cli
from finetune.core.errors import RecipeError
from finetune.recipe import Recipe, dump, load
from finetune.recipe.aliases import ALIASES, Alias, today
from finetune.recipe.faults import section_at

VALUES: dict[str, Any] = {
    "max_length": 64, "eval_strategy": "epoch", "warmup_steps": 0.25, "per_device_train_batch_size": 7, "num_train_epochs": 2,
    "per_device_eval_batch_size": 6, "gradient_accumulation_steps": 5, "dtype": "bfloat16",
}  # fmt: skip
DATA = "data: {path: rows.jsonl, eval_fraction: 0.1}\n"


def written(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def section_of(alias: Alias) -> str:
    return alias.sections[0]


def loaded(file: Path, *options: str) -> tuple[Recipe, list[str]]:
    """The recipe, and what is said of old names."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        recipe = load(file, options)
    return recipe, [str(each.message) for each in caught if each.category is FutureWarning]


def test_every_alias_leads_to_a_key_and_is_none_itself() -> None:
    assert len(ALIASES) == 10
    for alias in ALIASES:
        for section in alias.sections:
            model = section_at(({"training": "train", "alignment": "align"}.get(section, section),), Recipe)
            assert model is not None
            assert alias.new in model.model_fields
            assert alias.old not in model.model_fields
            assert today((section, alias.new)) == (section, alias.new) == today((section, alias.old))


@pytest.mark.parametrize("alias", ALIASES, ids=lambda alias: alias.old)
def test_an_old_name_means_the_same_and_one_note_says_so(tmp_path: Path, alias: Alias) -> None:
    section, value = section_of(alias), VALUES[alias.new]
    new, nothing = loaded(written(tmp_path, f"{DATA}{section}:\n  {alias.new}: {value}\n"))
    old, notes = loaded(written(tmp_path, f"{DATA}{section}:\n  {alias.old}: {value}\n"))
    asked, on_the_line = loaded(written(tmp_path, DATA), f"{section}.{alias.old}={value}")

    assert old == new == asked
    told = f"{section}.{alias.old} is called {alias.new} now; it will be refused from version 1.0"
    assert notes == [f"{tmp_path}/recipe.yaml:3: {told}"]
    assert on_the_line == [
        f"--set {section}.{alias.old} is called {alias.new} now; it will be refused from version 1.0"
    ]
    assert nothing == []
    assert f" {alias.old}:" not in dump(old)


def test_faults_of_an_old_name_have_the_line_of_the_users_own_file(tmp_path: Path) -> None:
    file = written(tmp_path, f"{DATA}train:\n  seed: 1\n  max_seq_length: 3\n")
    with pytest.warns(FutureWarning), pytest.raises(RecipeError) as refused:
        load(file)
    assert len(refused.value.faults) == 1
    assert refused.value.faults[0].startswith(f"{file}:4: train.max_length: ")


@pytest.mark.parametrize("names", [("max_length", "max_seq_length"), ("per_gpu_train_batch_size", "batch_size")])
@pytest.mark.parametrize("turned", [False, True])
def test_both_names_at_once_are_a_fault(tmp_path: Path, names: tuple[str, str], turned: bool) -> None:
    first, second = reversed(names) if turned else names
    file = written(tmp_path, f"{DATA}train:\n  {first}: 64\n  {second}: 64\n")
    with pytest.warns(FutureWarning), pytest.raises(RecipeError) as refused:
        load(file)
    assert refused.value.faults == [
        f"{file}:4: train.{second}: the same key as '{first}', which is given too; leave one of the two out"
    ]


def test_an_override_wins_over_the_file_under_either_name(tmp_path: Path) -> None:
    for key in ("max_length", "max_seq_length"):
        for option in ("max_length", "max_seq_length"):
            recipe, _ = loaded(written(tmp_path, f"{DATA}train: {{{key}: 64}}\n"), f"train.{option}=32")
            assert recipe.train is not None
            assert recipe.train.max_length == 32


@pytest.mark.parametrize("value", ["1", "30", "-0.1", "true", "many"])
def test_a_warmup_ratio_that_is_no_share_is_no_number_of_steps(tmp_path: Path, value: str) -> None:
    file = written(tmp_path, f"{DATA}train: {{warmup_ratio: {value}}}\n")
    for place, options in ((file, ()), (written(tmp_path, DATA), (f"train.warmup_ratio={value}",))):
        file.write_text(file.read_text() if options else f"{DATA}train: {{warmup_ratio: {value}}}\n", encoding="utf-8")
        with (
            pytest.warns(FutureWarning),
            pytest.raises(RecipeError, match=r"train\.warmup_ratio: a share of all steps"),
        ):
            load(place, options)


def test_an_old_name_elsewhere_is_an_unknown_key(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=re.escape("evaluate.num_epochs: unknown key")):
        load(written(tmp_path, f"{DATA}evaluate: {{num_epochs: 2}}\n"))


def test_the_command_line_says_the_note_and_goes_on(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n', encoding="utf-8")
    file = written(tmp_path, f"{DATA}train: {{evaluation_strategy: epoch}}\n")
    said = CliRunner().invoke(cli, ["validate", str(file)], prog_name="finetune")

    assert said.exit_code == 0, said.output
    assert said.stderr.count("note: ") == 1
    assert f"note: {file}:2: train.evaluation_strategy is called eval_strategy now" in said.stderr
    assert "eval_strategy: epoch" in said.stdout
