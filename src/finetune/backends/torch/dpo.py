"""Direct preference optimization (https://arxiv.org/abs/2305.18290) on TRL's DPOTrainer."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from finetune.backends import Job
from finetune.backends.torch.tokenizer import HFTokenizer
from finetune.backends.torch.training import arguments, read_rows


def make_trainer(job: Job, model: Any, tokenizer: HFTokenizer) -> Any:
    """The trainer, over rows of token ids: `prompt_ids`, `chosen_ids`, `rejected_ids`, `row`.

    TRL insists on tokenizing text itself, which would render a second time, differently. So it is given a stand-in
    row, and our rows take its place before training starts. The reference is the model as it is now.
    """
    options = {key: job.options[key] for key in ("beta", "label_smoothing") if key in job.options}
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(**arguments(job), **options, loss_type=[job.options.get("loss_type", "sigmoid")]),
        train_dataset=Dataset.from_list([{"prompt": "1\n", "chosen": "2", "rejected": "3"}]),
        processing_class=tokenizer.hf,
    )
    rows = read_rows(job.rows)
    if job.options.get("precompute_ref_log_probs") and job.method == "lora":
        rows = _with_reference(trainer, rows, job.options["per_device_train_batch_size"])
        trainer.precompute_ref_logps = True
    keep = ("prompt_ids", "chosen_ids", "rejected_ids", "row", "ref_chosen_logps", "ref_rejected_logps")
    trainer.train_dataset = Dataset.from_list([{key: row[key] for key in keep if key in row} for row in rows])
    return trainer


def _with_reference(trainer: Any, rows: list[dict[str, Any]], batch_size: int) -> list[dict[str, Any]]:
    """The rows with the reference's log-probabilities, so that training runs one model instead of two."""
    done = []
    trainer.model.eval()
    for begin in range(0, len(rows), batch_size):
        chunk = rows[begin : begin + batch_size]
        inputs = trainer.data_collator([{k: v for k, v in row.items() if k != "row"} for row in chunk])
        inputs = {key: value.to(trainer.args.device) for key, value in inputs.items()}
        with torch.no_grad():
            chosen, rejected = trainer.compute_ref_log_probs(trainer.model, inputs)
        for row, good, bad in zip(chunk, chosen.tolist(), rejected.tolist(), strict=True):
            done.append({**row, "ref_chosen_logps": good, "ref_rejected_logps": bad})
    return done
