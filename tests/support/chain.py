"""A tiny run carried to other formats, to be broken by hand and compared again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.checks import results
from finetune.core.files import write_jsonl
from finetune.experiments import worker
from finetune.recipe import Recipe, load_mapping
from finetune.run import Run
from finetune.stages import compare
from finetune.stages.pipeline import run_stages
from finetune.testing import questions

FACTS = 6


def tiny_recipe(model: Path, folder: Path, exports: list[str], **train: Any) -> Recipe:
    """Full fine-tuning of a tiny model on a few generated facts, which it then knows by heart."""
    rows = questions.generate(count=5 * FACTS)[:: questions.WORDINGS]
    write_jsonl(folder / "train.jsonl", [{"prompt": row["prompt"], "completion": row["completion"]} for row in rows])
    probes = [{key: row[key] for key in ("id", "prompt", "match")} | {"answer": row["completion"]} for row in rows]
    write_jsonl(folder / "probes.jsonl", probes)
    options = {
        "method": "full",
        "max_steps": 60,
        "per_device_train_batch_size": FACTS,
        "learning_rate": 4e-3,
        "save_strategy": "no",
        **train,
    }
    return load_mapping(
        {
            "name": "tiny",
            "model": {"path": str(model), "device": "cpu"},
            "data": {"path": str(folder / "train.jsonl")},
            "train": options,
            "evaluate": {"probes": str(folder / "probes.jsonl"), "max_new_tokens": 40, "score_rows": FACTS},
            "export": exports,
            "output_dir": str(folder / "runs"),
        }
    )


@dataclass
class Chain:
    """A finished run that may be compared again, in this process; what was not touched is asked only once."""

    recipe: Recipe
    run: Run
    seen: dict[str, tuple[dict[str, Any], Path]] = field(default_factory=dict)

    def here(self, request: dict[str, Any], file: Path) -> dict[str, Any]:
        """Stands for `in_fresh_process`."""
        kept = f"{request['model']} {request['adapter']}"
        wanted = Path(request["distributions"])
        if kept in self.seen:
            answer, stored = self.seen[kept]
            shutil.copyfile(stored, wanted)
            return answer
        answer = {**json.loads(json.dumps(worker.observe(json.loads(json.dumps(request))))), "peak_bytes": 1}
        if "/export/" not in request["model"]:
            stored = self.run.path.parent / f"{len(self.seen)}.npy"
            shutil.copyfile(wanted, stored)
            self.seen[kept] = answer, stored
        return answer

    def compared(self) -> dict[str, str]:
        """Compare everything again and return what fails of the models, with the reason; that a broken export is not the
        one that is listed goes without saying."""
        self.run.force = True
        compare.run(self.recipe, self.run)
        return {v.name: v.why for v in results(self.recipe, self.run, ["parity"]) if v.refuted and "[" in v.name}


def finished(recipe: Recipe, monkeypatch: Any) -> Chain:
    """Run everything; `in_fresh_process` of the comparison is replaced until `monkeypatch` is undone."""
    chain = Chain(recipe, Run(Path(recipe.output_dir) / recipe.name))
    monkeypatch.setattr(compare, "in_fresh_process", chain.here)
    run_stages(recipe, chain.run)
    return chain


def copied(chain: Chain, folder: Path) -> Callable[[], None]:
    """Keep a copy of an export's folder; the returned function puts it back."""
    kept = chain.run.path.parent / f"kept-{folder.name}"
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(folder, kept)

    def back() -> None:
        shutil.rmtree(folder)
        shutil.copytree(kept, folder)

    return back
