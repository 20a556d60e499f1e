"""The older configurations run as they were written: each becomes the recipe that means the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.core.errors import RecipeError
from finetune.recipe import load
from finetune.recipe.legacy import is_download, is_legacy
from finetune.recipe.load import load_downloads, read_mapping
from support.older import ALIGN, DOWNLOAD, FINETUNE, RESUME


@pytest.fixture
def config(tmp_path):
    """A function: the configuration's file, its places filled in as its own tests do."""
    places = {
        "tmp_path": tmp_path,
        "model_dir": tmp_path / "models" / "distilgpt2",
        "sample_finetune_data": tmp_path / "finetune.json",
        "sample_dpo_data": tmp_path / "dpo.json",
    }

    def fill(text: str) -> Path:
        file = tmp_path / "config.yaml"
        file.write_text(text.format(**places))
        return file

    return fill


@pytest.fixture
def recipe(tmp_path):
    """A function: the recipe in a text of today."""

    def fill(text: str):
        file = tmp_path / "recipe.yaml"
        file.write_text(text)
        return load(file)

    return fill


def test_the_finetune_configuration_means_the_same_as_a_recipe(config, recipe, tmp_path):
    old, new = (
        load(config(FINETUNE)),
        recipe(
            f"""
        name: run
        output_dir: {tmp_path}/checkpoints/finetuned
        model: {{path: {tmp_path}/models/distilgpt2, device: cpu}}
        data: {{path: {tmp_path}/finetune.json, fields: {{text: text}}}}
        train:
          method: lora
          max_steps: 1
          max_length: 64
          per_device_train_batch_size: 1
          gradient_accumulation_steps: 1
          learning_rate: 0.0003
          num_train_epochs: 1
          save_steps: 1000
          output_dir: {tmp_path}/checkpoints/finetuned
        """
        ),
    )
    assert old == new
    assert old.train is not None
    assert isinstance(old.train.learning_rate, float)


def test_the_resume_configuration_keeps_its_base_model(config):
    old = load(config(RESUME))
    assert old.model.base_model == "distilgpt2"
    assert old.train is not None
    assert (old.train.save_steps, old.train.num_train_epochs) == (1, 3.0)


def test_the_align_configuration_means_the_same_as_a_recipe(config, recipe, tmp_path):
    assert load(config(ALIGN)) == recipe(
        f"""
        name: run
        output_dir: {tmp_path}/checkpoints/aligned
        model: {{path: {tmp_path}/checkpoints/finetuned, device: cpu}}
        train: null
        align:
          method: dpo
          data:
            path: {tmp_path}/dpo.json
            fields: {{prompt: prompt, chosen: chosen, rejected: rejected}}
          max_steps: 1
          max_length: 64
          per_device_train_batch_size: 1
          learning_rate: 0.00001
          num_train_epochs: 1
          beta: 0.1
          output_dir: {tmp_path}/checkpoints/aligned
        """
    )


def test_the_download_configuration_asks_for_its_files(config, tmp_path):
    file = config(DOWNLOAD)
    mapping, _ = read_mapping(file)
    assert is_download(mapping)
    assert not is_legacy(mapping)
    assert load_downloads(file) == [
        {
            "repo": "distilgpt2",
            "files": ["config.json", "pytorch_model.bin", "tokenizer.json", "vocab.json", "merges.txt"],
            "output_dir": f"{tmp_path}/models/distilgpt2",
            "revision": None,
            "token": None,
        }
    ]


def test_a_directory_beside_the_download_file_is_found_from_there(config, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir("/")
    file = config("models:\n  - repo: here\n    output_dir: out\n  - repo: owner/name\n")
    first, second = load_downloads(file)
    assert (first["repo"], first["output_dir"]) == (str(tmp_path / "here"), f"{tmp_path}/out")
    assert (second["repo"], second["files"]) == ("owner/name", [])


def test_the_older_files_take_overrides_in_either_words(config):
    for option in ("training.batch_size=7", "train.per_device_train_batch_size=7"):
        recipe = load(config(FINETUNE), [option])
        assert recipe.train is not None
        assert recipe.train.per_device_train_batch_size == 7


def test_faults_name_the_line_of_the_older_file(config):
    text = FINETUNE.replace("batch_size: 1", "batch_size: 0").replace("save_steps", "save_stepz")
    with pytest.raises(RecipeError) as caught:
        load(config(text + "training_mode: x\n"))
    lines = text.splitlines()
    number = {key: next(i for i, line in enumerate(lines, 1) if key in line) for key in ("batch_size", "save_stepz")}
    found = sorted(fault.partition("config.yaml:")[2] for fault in caught.value.faults)
    assert len(found) == 3
    assert found[0].startswith(f"{number['batch_size']}: train.per_device_train_batch_size: ")
    assert found[1].startswith(f"{number['save_stepz']}: train.save_stepz: unknown key. Did you mean 'save_steps'?")
    assert found[2].startswith(f"{len(lines) + 1}: training_mode: unknown key.")


def test_a_fault_deep_in_an_older_section_has_its_own_line(config):
    with pytest.raises(RecipeError, match=r"config\.yaml:5: train\.lora\.rr: unknown key"):
        load(config("dataset: rows.json\ntraining:\n  method: lora\n  lora:\n    rr: 8\n"))


def test_training_and_alignment_in_one_file_keep_to_their_sections(config):
    recipe = load(
        config(
            "model: gpt2\ndevice: cpu\ndataset: {{path: a.json}}\ntraining: {{batch_size: 2}}\n"
            "alignment: {{beta: 0.3, batch_size: 3, data: {{path: b.json}}}}\n"
        )
    )
    assert recipe.train is not None
    assert recipe.align is not None
    assert (recipe.train.per_device_train_batch_size, recipe.align.per_device_train_batch_size) == (2, 3)
    assert recipe.align.beta == 0.3
    assert (recipe.model.path, recipe.model.device) == ("gpt2", "cpu")


def test_a_file_format_is_no_row_format_but_a_row_format_is(config):
    assert load(config("dataset: {{path: a.json, format: json}}\ntraining: {{}}\n")).data.format == "auto"
    assert load(config("dataset: {{path: a.json, format: chat}}\ntraining: {{}}\n")).data.format == "chat"
