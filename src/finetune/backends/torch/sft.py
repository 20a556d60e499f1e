"""Supervised fine-tuning on TRL's SFTTrainer, over rows that `prepare` tokenized and masked."""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from finetune.backends import Job
from finetune.backends.torch.tokenizer import HFTokenizer
from finetune.backends.torch.training import arguments, read_rows

OWN = ("packing", "packing_strategy", "loss_type", "label_smoothing_factor", "neftune_noise_alpha")


def make_trainer(job: Job, model: Any, tokenizer: HFTokenizer) -> Any:
    """The trainer. Labels come with the rows, so TRL neither renders nor masks; with packing it packs them."""
    from transformers import EarlyStoppingCallback

    packing = bool(job.options.get("packing"))
    extra: dict[str, Any] = {} if packing else {"dataset_kwargs": {"skip_prepare_dataset": True}}
    callbacks = []
    if job.options.get("early_stopping_patience"):
        extra |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False}
        callbacks.append(
            EarlyStoppingCallback(job.options["early_stopping_patience"], job.options["early_stopping_threshold"])
        )
    return SFTTrainer(
        model=model,
        args=SFTConfig(**arguments(job, *OWN), **extra),
        train_dataset=_dataset(read_rows(job.rows), packing),
        eval_dataset=_dataset(read_rows(job.eval_rows), packing, held_out=True) if job.eval_rows else None,
        processing_class=tokenizer.hf,
        callbacks=callbacks,
    )


def _dataset(rows: list[dict[str, Any]], packing: bool, held_out: bool = False) -> Dataset:
    keep = ("input_ids", "labels") if packing else ("input_ids", "labels", "row")
    numbered = [{**row, "row": -1 - row["row"] if held_out else row["row"]} for row in rows]
    return Dataset.from_list([{key: row[key] for key in keep} for row in numbered])
