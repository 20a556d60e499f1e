"""The experiments: trainings by the recipe's own path that must agree, two by two, and what they were seen to do."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from finetune.backends import Job, tokenizer_of
from finetune.core.errors import UsageError
from finetune.core.files import digest, write_jsonl
from finetune.experiments.invariance import MEASURED, lacks, tiny_copy, uses
from finetune.experiments.worker import in_fresh_process, train_request
from finetune.recipe import Recipe
from finetune.run import Run, evidence, layout, seal
from finetune.run.records.measured import Invariances
from finetune.run.report import written_anew
from finetune.training.job import sft_job

BATCH = 8  # of shrink.ROWS rows, so the last window of every epoch is short
EPOCHS = 2
LEARNING_RATE = 1e-3  # a lower one hardly moves a loss in so few steps, a higher one amplifies rounding
MOST_RANK = 16  # of a tiny model's 64
# What an experiment varies, or what would blur it, before it does: no randomness but the seed's, float32, every step seen.
PLAIN: dict[str, Any] = {
    "max_steps": -1, "num_train_epochs": EPOCHS, "per_device_train_batch_size": BATCH, "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False, "packing": False, "neftune_noise_alpha": None, "bf16": False, "fp16": False,
    "tf32": None, "torch_compile": False, "logging_steps": 1, "save_strategy": "no", "eval_strategy": "no",
    "early_stopping_patience": None, "report_to": "none", "learning_rate": LEARNING_RATE,
    "warmup_steps": 0,
}  # fmt: skip
# An adapter that changes much, by whatever optimizer the recipe has, so that an error in its merge is no rounding.
ADAPTED: dict[str, Any] = {
    "optim": "adamw_torch", "lr_scheduler_type": "constant", "learning_rate": 5e-3,
}  # fmt: skip


def write(recipe: Recipe, run: Run) -> Invariances:
    """Measure, and leave the evidence where the stage `measure` would; return it. For the process that holds the run's lock.

    Where that stage has finished before, its report tells the digest of the newer evidence; one that was changed since it was
    written stays as it is, for `verify` to name.
    """
    found = measure(recipe, run, run.stage_dir("measure"))
    file = evidence.write(run, layout.INVARIANCE, found)
    report = run.report("measure")
    if report is not None and seal.is_as_recorded(run, layout.report("measure").path):
        run.write_report(written_anew(report, MEASURED, digest(file)))
    seal.close(run)
    return found


def measure(recipe: Recipe, run: Run, out: Path) -> Invariances:
    """Carry out every experiment, in two processes side by side, and return the evidence: `invariances` by name, each with
    `comparisons` (two sequences that must agree), or with `not_applicable` (why there is nothing to compare)."""
    if recipe.train is None:
        raise UsageError("the invariances are those of a training, and the recipe has no 'train' section")
    work = out / "invariance"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        bench = Bench(recipe, run, work)
        with ThreadPoolExecutor(2) as pool:
            found = pool.map(bench.carry_out, bench.requests())
            seen = {k: v for each in found for k, v in each.items()}
            return cast(Invariances, {**bench.facts, "invariances": bench.evidence(seen)})
    finally:
        shutil.rmtree(work, ignore_errors=True)


class Bench:
    """A tiny copy of the recipe's model, a few rows, and the trainings to be compared on them."""

    def __init__(self, recipe: Recipe, run: Run, work: Path) -> None:
        assert recipe.train is not None
        self.recipe, self.train, self.work = recipe, recipe.train, work
        job = replace(sft_job(recipe, run, work), adapter=None, eval_rows=None, resume=None)
        self.model, self.lacks = job.model, lacks(recipe)
        config = {"model_type": "fake"}
        if recipe.backend != "fake":  # which is tiny as it is
            self.model = work / "model"
            config = tiny_copy.copy(job.model, self.model)
        if "packing" not in self.lacks and (why := tiny_copy.unpackable(self.model)):
            self.lacks["packing"] = why
        plain = evidence.model_settings(
            recipe, merged=True
        )  # a quantizer rounds, which no order of sums survives bit by bit
        self.settings = {**plain, "dtype": "float32", "device": "cpu"}
        if self.settings.get("attn_implementation") == "flash_attention_2":
            self.settings["attn_implementation"] = None  # there is none in float32, nor on a CPU
        self.rows = tiny_copy.rows([{**row} for row in evidence.rows(run, layout.TRAIN_ROWS)])
        pad = tokenizer_of(recipe, self.model).eos_ids[0]
        self.files = {"rows": work / "rows.jsonl", "padded": work / "padded.jsonl"}
        write_jsonl(self.files["rows"], self.rows)
        write_jsonl(self.files["padded"], tiny_copy.padded(self.rows, pad))
        self.job = replace(job, model=self.model, rows=self.files["rows"], settings=self.settings, lora=self._lora(job))
        self.options = {**job.options, **PLAIN}
        self.facts = {
            "backend": recipe.backend,
            "architecture": config["model_type"],
            "tokens": [len(row["input_ids"]) for row in self.rows],
            "trained_tokens": [sum(label != tiny_copy.MASKED for label in row["labels"][1:]) for row in self.rows],
            "options": {key: self.options[key] for key in ("optim", "lr_scheduler_type", "loss_type", *PLAIN)},
            "settings": {key: value for key, value in self.settings.items() if key != "trust_remote_code"},
        }

    def _lora(self, job: Job) -> dict[str, Any] | None:
        if job.lora is None:
            return None
        ranks = {key: min(MOST_RANK, rank) for key, rank in job.lora["rank_pattern"].items()}
        layers = job.lora["layers_to_transform"]
        if layers is not None:
            layers = [layer for layer in layers if layer < tiny_copy.LAYERS] or [0]
        rank = min(MOST_RANK, job.lora["r"])
        return {**job.lora, "r": rank, "lora_dropout": 0.0, "rank_pattern": ranks, "layers_to_transform": layers}

    # -- what is asked of the processes -----------------------------------------------------------------------------

    def training(self, name: str, rows: str = "rows", **changes: Any) -> dict[str, Any]:
        job = replace(
            self.job, out=self.work / name, rows=self.files[rows], options={**self.options, **changes}, name=name
        )
        return train_request(self.recipe.backend, job)

    def requests(self) -> list[dict[str, dict[str, Any]]]:
        """By name, for each of two processes; the first training of both is the same."""
        whole: dict[str, Any] = {"per_device_train_batch_size": tiny_copy.ROWS}
        there = {"backend": self.recipe.backend, "model": str(self.model), "settings": self.settings, "rows": self.rows}
        first = {
            "plain": self.training("plain"),
            "accumulated": self.training(
                "accumulated", per_device_train_batch_size=1, gradient_accumulation_steps=BATCH
            ),
            "whole": self.training("whole", **whole),
            "other seed": self.training("other", seed=self.train.seed + 1, data_seed=None),
        }
        second = {
            "again": self.training("again"),
            "padded": self.training("padded", "padded", **whole),
            "together": {"do": "together", **there},
        }
        if "checkpointing" not in self.lacks:
            second["checkpointed"] = self.training("checkpointed", gradient_checkpointing=True)
        if "packing" not in self.lacks:
            tokens = self.facts["tokens"]
            # Two packs, however they are filled: a row fits into one of them unless both hold more than all rows.
            most = sum(tokens) // 2 + max(tokens) + 1
            second["packed"] = self.training("packed", packing=True, per_device_train_batch_size=2, max_length=most)
        if "merge" not in self.lacks:
            first["adapted"] = self.training("adapted", **whole, **ADAPTED)
            paths = {"adapter": str(self.work / "adapted" / "adapter"), "out": str(self.work / "merged")}
            first["merged"] = {"do": "merged", **there, **paths}
        return [first, second]

    def carry_out(self, requests: dict[str, dict[str, Any]]) -> dict[str, Any]:
        file = self.work / f"invariance-{next(iter(requests))}.json"
        found: dict[str, Any] = in_fresh_process({"do": "several", "requests": requests}, file)["answers"]
        return found

    # -- what they answered -----------------------------------------------------------------------------------------

    def evidence(self, found: dict[str, Any]) -> dict[str, Any]:
        last = tiny_copy.ROWS % BATCH
        plain, whole = _trained(f"batches of {BATCH}", found["plain"]), _trained("all rows at once", found["whole"])
        alone = found["together"]
        result: dict[str, Any] = {
            "accumulation": _compared(
                plain, _trained(f"{BATCH} x 1, accumulated", found["accumulated"]), f"a last window of {last} rows"
            ),
            "padding": {
                "comparisons": [
                    {
                        "one": whole,
                        "other": _trained("with more padding on the right", found["padded"]),
                        "of": "training",
                    },
                    *(
                        {
                            "one": {"what": "each alone", "losses": alone[f"{kind}_alone"]},
                            "other": {"what": f"in one batch, padded on the {side}", "losses": alone[kind]},
                            "of": kind,
                        }
                        for kind, side in (("scores", "right"), ("answers", "left"))
                    ),
                ]
            },
            "order": {
                "first": _trained(f"seed {self.train.seed}", found["plain"]),
                "again": _trained("the same, in another process", found["again"]),
                "other_seed": _trained(f"seed {self.train.seed + 1}", found["other seed"]),
            },
        }
        if "checkpointing" not in self.lacks:
            result["checkpointing"] = _compared(plain, _trained("with checkpointing", found["checkpointed"]), "")
        if "packing" not in self.lacks:
            packed = {**_trained("in two packs", found["packed"]), "rows": whole["rows"]}  # a pack tells no row numbers
            result["packing"] = _compared(whole, packed, "")
        if "merge" not in self.lacks:
            on = {"what": "rows with the adapter on", "losses": found["merged"]["on"]}
            merged = {"what": "rows of the merged model", "losses": found["merged"]["merged"]}
            result["merge"] = {
                "comparisons": [{"one": on, "other": merged, "of": "scores"}],
                "off": found["merged"]["off"],
            }
        for name, why in self.lacks.items():
            result[name] = {"not_applicable": why, "used": uses(self.recipe, name)}
        return result


def _trained(what: str, answer: dict[str, Any]) -> dict[str, Any]:
    steps = answer["steps"]
    return {
        "what": what,
        "losses": [step["loss"] for step in steps],
        "gradients": [step["grad_norm"] for step in steps],
        "rows": [list(step["rows"]) for step in steps],
    }


def _compared(one: dict[str, Any], other: dict[str, Any], note: str) -> dict[str, Any]:
    return {"comparisons": [{"one": one, "other": other, "of": "training", **({"note": note} if note else {})}]}
