"""Older configurations run unchanged: download, train, resume and align, each with its files where they always were."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from finetune import models
from finetune.cli import cli as command_line

TEXTS = ["The sky is blue during the day.", "Grass is green and grows in gardens.",
         "The sun provides light and warmth.", "Water is essential for all life forms."]  # fmt: skip
PAIRS = [
    ("What color is the sky?", "The sky is blue.", "I don't know."),
    ("What color is grass?", "Grass is green.", "Purple."),
    ("What does the sun do?", "The sun provides light.", "Nothing."),
    ("Why is water important?", "Water sustains life.", "It's not."),
]
DOWNLOAD = """
huggingface:
  token: "<HF_TOKEN>"

models:
  - repo: "{repo}"
    files:
      - "config.json"
      - "pytorch_model.bin"
      - "tokenizer.json"
      - "vocab.json"
      - "merges.txt"
    output_dir: "{place}/models/distilgpt2"
"""
TRAIN = """
model:
  path: "{place}/models/distilgpt2"

dataset:
  path: "{place}/finetune.json"
  format: "json"
  text_field: "text"

training:
  method: "lora"
  max_steps: 1
  max_seq_length: 64
  batch_size: 1
  gradient_accumulation_steps: 1
  learning_rate: 3e-4
  num_epochs: 1
  save_steps: 1
  output_dir: "{place}/checkpoints/finetuned"

device: "cpu"
"""
ALIGN = """
model:
  path: "{place}/checkpoints/finetuned"

dataset:
  path: "{place}/dpo.json"
  format: "json"
  prompt_field: "prompt"
  chosen_field: "chosen"
  rejected_field: "rejected"

alignment:
  method: "dpo"
  max_steps: 1
  max_seq_length: 64
  batch_size: 1
  learning_rate: 1e-5
  num_epochs: 1
  beta: 0.1
  output_dir: "{place}/checkpoints/aligned"

device: "cpu"
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory, chosen_scale):
    """The three files and their data, with the embedded model's directory where the hub's name was."""
    place = tmp_path_factory.mktemp("seed")
    (place / "finetune.json").write_text(json.dumps([{"text": text} for text in TEXTS]))
    rows = [{"prompt": prompt, "chosen": chosen, "rejected": rejected} for prompt, chosen, rejected in PAIRS]
    (place / "dpo.json").write_text(json.dumps(rows))
    repo = models.directory("smollm2-135m")
    for name, text in (("download", DOWNLOAD), ("finetune", TRAIN), ("align", ALIGN)):
        (place / f"{name}.yaml").write_text(text.format(place=place, repo=repo))
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
    assert (finetuned / "checkpoint-1").is_dir()
    assert any("lora" in name for name, _ in loaded(finetuned).named_parameters())

    invoke("train", "--config", str(place / "finetune.yaml"), "--resume", str(finetuned / "checkpoint-1"))

    invoke("align", "--config", str(place / "align.yaml"))
    assert any("lora" in name for name, _ in loaded(place / "checkpoints/aligned").named_parameters())
