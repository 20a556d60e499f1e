"""Older configurations run unchanged: download, train, resume and align, each with its files where they always were."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from finetune.cli.app import cli as command_line
from finetune.models import sources
from support.older import ALIGN, DOWNLOAD, FINETUNE, RESUME

TEXTS = ["The sky is blue during the day.", "Grass is green and grows in gardens.",
         "The sun provides light and warmth.", "Water is essential for all life forms."]  # fmt: skip
PAIRS = [
    ("What color is the sky?", "The sky is blue.", "I don't know."),
    ("What color is grass?", "Grass is green.", "Purple."),
    ("What does the sun do?", "The sun provides light.", "Nothing."),
    ("Why is water important?", "Water sustains life.", "It's not."),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory, chosen_scale):
    """The three files and their data, with the embedded model's directory where the hub's name was."""
    place = tmp_path_factory.mktemp("seed")
    (place / "finetune.json").write_text(json.dumps([{"text": text} for text in TEXTS]))
    rows = [{"prompt": prompt, "chosen": chosen, "rejected": rejected} for prompt, chosen, rejected in PAIRS]
    (place / "dpo.json").write_text(json.dumps(rows))
    places = {
        "tmp_path": place,
        "model_dir": place / "models" / "distilgpt2",
        "sample_finetune_data": place / "finetune.json",
        "sample_dpo_data": place / "dpo.json",
    }
    here = DOWNLOAD.replace('repo: "distilgpt2"', f'repo: "{sources.directory("smollm2-135m")}"')
    for name, text in (("download", here), ("finetune", FINETUNE), ("resume", RESUME), ("align", ALIGN)):
        (place / f"{name}.yaml").write_text(text.format(**places))
    return place


def invoke(*arguments: str) -> None:
    result = CliRunner().invoke(command_line, list(arguments))
    assert result.exit_code == 0, result.output


def loaded(directory):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(directory), device_map="cpu")


def test_download_train_resume_and_align_run_unchanged(place):
    invoke("download", "--config", str(place / "download.yaml"))
    assert (place / "models/distilgpt2/config.json").exists()
    assert (place / "models/distilgpt2/tokenizer.json").exists()

    finetuned = place / "checkpoints/finetuned"
    invoke("train", "--config", str(place / "finetune.yaml"))
    assert (finetuned / "adapter_config.json").exists()
    assert any("lora" in name for name, _ in loaded(finetuned).named_parameters())

    checkpoint = place / "checkpoints/resume-test/checkpoint-1"
    invoke("train", "--config", str(place / "resume.yaml"))
    assert checkpoint.is_dir()
    invoke("train", "--config", str(place / "resume.yaml"), "--resume", str(checkpoint))

    invoke("align", "--config", str(place / "align.yaml"))
    assert any("lora" in name for name, _ in loaded(place / "checkpoints/aligned").named_parameters())
