"""The older configurations, as they were written; their places are filled in by the tests."""

DOWNLOAD = """
huggingface:
  token: "<HF_TOKEN>"

models:
  - repo: "distilgpt2"
    files:
      - "config.json"
      - "pytorch_model.bin"
      - "tokenizer.json"
      - "vocab.json"
      - "merges.txt"
    output_dir: "{tmp_path}/models/distilgpt2"
"""

FINETUNE = """
model:
  path: "{model_dir}"

dataset:
  path: "{sample_finetune_data}"
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
  save_steps: 1000
  output_dir: "{tmp_path}/checkpoints/finetuned"

device: "cpu"
"""

RESUME = """
model:
  path: "{model_dir}"
  base_model: "distilgpt2"

dataset:
  path: "{sample_finetune_data}"
  format: "json"
  text_field: "text"

training:
  method: "lora"
  max_steps: 1
  max_seq_length: 64
  batch_size: 1
  save_steps: 1
  output_dir: "{tmp_path}/checkpoints/resume-test"

device: "cpu"
"""

ALIGN = """
model:
  path: "{tmp_path}/checkpoints/finetuned"

dataset:
  path: "{sample_dpo_data}"
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
  output_dir: "{tmp_path}/checkpoints/aligned"

device: "cpu"
"""
