"""How far sound exports are from the merged model: trains the embedded model with several seeds and other made-up facts,
exports and compares each, and prints the least and greatest of every measure.

    python bench/parity.py [--seeds 10] [--to gguf:f16 ...] [--out DIR]

The bounds in src/finetune/parity/tolerances.py are made from this table; docs/architecture.md states the rule.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from finetune.core.files import read_jsonl, write_json, write_jsonl
from finetune.recipe import load_mapping
from finetune.run import Run
from finetune.stages.pipeline import run_stages
from finetune.testing import questions

EXPORTS = ("gguf:f16", "gguf:q8_0", "gguf:q6_k", "gguf:q5_k_m", "gguf:q4_k_m", "mlx")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first", type=int, default=0, help="The first seed.")
    parser.add_argument("--to", action="append", help="An export; repeatable.")
    parser.add_argument("--out", type=Path, default=Path("runs/parity"))
    options = parser.parse_args()
    seen: dict[str, list[dict[str, float]]] = {}
    for seed in range(options.first, options.first + options.seeds):
        for name, measures in one(seed, options.to or list(EXPORTS), options.out).items():
            seen.setdefault(name, []).append({"seed": seed, **measures})
        write_json(options.out / "parity.json", seen)
    for name, rows in seen.items():
        print(f"{name} ({len(rows)} seeds)")
        for measure in rows[0]:
            values = sorted(row[measure] for row in rows)
            print(f"  {measure:<16}{values[0]:.3g} .. {values[-1]:.3g}")


def one(seed: int, exports: list[str], out: Path) -> dict[str, dict[str, float]]:
    """The measures of every hop of one seed's run, whose weights are removed again."""
    asked = questions.write(out / f"asked-{seed}", seed=seed)
    probes = read_jsonl(asked["probes"])
    write_jsonl(asked["probes"], [*probes[:8], *probes[-2:]])  # as trained, and in words held out
    recipe = load_mapping(
        {
            "name": f"seed-{seed}",
            "data": {"path": str(asked["train"])},
            "template": {"name": "chatml"},
            "train": {
                "max_steps": 32,
                "per_device_train_batch_size": 6,
                "learning_rate": 7e-4,
                "warmup_steps": 5,
                "save_strategy": "no",
                "seed": seed,
            },
            "evaluate": {"probes": str(asked["probes"]), "max_new_tokens": 20, "score_rows": 6},
            "export": exports,
            "output_dir": str(out),
        }
    )
    run = Run(out / recipe.name)
    run_stages(recipe, run)
    found = {}
    for path in (run.path / "compare").glob("*.json"):
        hop = json.loads(path.read_text(encoding="utf-8"))
        if "hop" in hop:
            found[hop["hop"]] = measures(hop)
    for folder in ("merge", "export", "train"):
        shutil.rmtree(run.path / folder)
    return found


def measures(hop: dict[str, Any]) -> dict[str, float]:
    apart, known = hop["distributions"], hop["learned"]["known"]
    return {
        "kl_mean": apart["mean"],
        "kl_max": apart["max"],
        "kl_answers": apart["answers_mean"],
        "top1": apart["top1"],
        "greedy": hop["greedy"]["equal"] / hop["greedy"]["compared"],
        "stopped": hop["stop"]["stopped"] / max(1, hop["stop"]["compared"]),
        "learned": hop["learned"]["kept"] / known if known else float("nan"),
        "probes": float(known),
    }


if __name__ == "__main__":
    main()
