"""The same LoRA fine-tuning with TRL's own command line and with `finetune train`, in turn.

    nox -s bench            (or: python bench/sft.py --rounds 2 --steps 20)

Prints wall time, training tokens/s and peak memory of both processes, their ratio within each round, and the share of
this machine's measured matrix-multiply rate that the training reaches. Same model, rows, batch, steps, optimizer,
precision and LoRA; both start from a cold process, so wall time holds imports and loading too. Both get one thread a
core: left alone, the launcher behind `trl sft` sets OMP_NUM_THREADS=1, and the comparison would be of that.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from finetune.data import sources
from finetune.models import sources as models
from finetune.recipe.sections import Model

STEPS, BATCH, RATE, RANK = 20, 6, 5e-4, 16


def run_measured(command: list[str], log: Path) -> dict[str, float]:
    """Wall seconds and peak resident bytes of one process and those it waited for."""
    begin = time.perf_counter()
    with log.open("w") as stream:
        env = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count() or 1)}
        child = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=env)
        _, status, usage = os.wait4(child.pid, 0)
    if status != 0:
        sys.exit(f"{' '.join(command[:4])} failed:\n{log.read_text()[-2000:]}")
    scale = 1 if sys.platform == "darwin" else 1024
    return {"wall": time.perf_counter() - begin, "peak": usage.ru_maxrss * scale}


def with_trl(work: Path, model: Path, rows: list[dict[str, str]], steps: int) -> dict[str, float]:
    data = work / "data"
    data.mkdir(exist_ok=True)
    chats = (
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
        }
        for row in rows
    )
    (data / "train.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    options = {
        "model_name_or_path": model, "dataset_name": data, "output_dir": work / "trl-out", "max_steps": steps,
        "per_device_train_batch_size": BATCH, "learning_rate": RATE, "logging_steps": 1, "save_strategy": "no",
        "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none", "use_peft": True,
        "lora_r": RANK, "lora_alpha": 32, "lora_dropout": 0.0, "lora_target_modules": "all-linear",
        "lr_scheduler_type": "cosine", "dtype": "float32", "seed": 0, "disable_tqdm": True,
    }  # fmt: skip
    flags = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    log = work / "trl.log"
    found = run_measured([str(Path(sys.executable).with_name("trl")), "sft", *flags], log)
    text = log.read_text()
    tokens = [float(value) for value in re.findall(r"'num_tokens': '([0-9.e+]+)'", text)]
    runtime = float(re.findall(r"'train_runtime': '([0-9.e+]+)'", text)[-1])
    return {**found, "tokens_per_second": tokens[-1] / runtime}


def with_finetune(work: Path, model: Path, rows: list[dict[str, str]], steps: int) -> dict[str, float]:
    data = work / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = work / "recipe.json"  # JSON is YAML
    train = {
        "max_steps": steps, "per_device_train_batch_size": BATCH, "learning_rate": RATE, "save_strategy": "no",
        "lora": {"r": RANK, "lora_alpha": 32},
    }  # fmt: skip
    mapping = {"model": {"path": str(model), "device": "cpu"}, "data": {"path": str(data)}, "train": train}
    recipe.write_text(json.dumps(mapping))
    directory = work / "finetune-run"
    command = [sys.executable, "-m", "finetune", "train", str(recipe), "--run", str(directory), "--force", "--quiet"]
    found = run_measured(command, work / "finetune.log")
    metrics = json.loads((directory / "train" / "report.json").read_text())["metrics"]
    return {**found, "tokens_per_second": metrics["tokens_per_second"]}


def matmul_rate() -> float:
    """Floating-point operations a second of a large fp32 matrix product, best of five."""
    import torch

    a, b = torch.randn(1536, 1536), torch.randn(1536, 1536)
    times = []
    for _ in range(6):
        begin = time.perf_counter()
        for _ in range(4):
            a @ b
        times.append((time.perf_counter() - begin) / 4)
    return 2 * 1536**3 / min(times[1:])


def flops_per_token(model: Path) -> float:
    """LoRA training: one forward and one backward through frozen weights, 4 operations a weight and token.

    The embedding is a look-up, and the head is computed for answer tokens only; both are left out.
    """
    config = json.loads((model / "config.json").read_text())
    hidden, layers, inner = config["hidden_size"], config["num_hidden_layers"], config["intermediate_size"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    layer = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner
    return 4.0 * layers * layer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    model = models.resolve(Model()).base
    files = [sources.resolve(f"shipped:quorra/{name}.jsonl") for name in ("train", "replay")]
    rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    sides = {"trl sft": with_trl, "finetune train": with_finetune}
    results: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    with tempfile.TemporaryDirectory() as place:
        for _ in range(options.rounds):
            for name, side in sides.items():
                results[name].append(side(Path(place), model, rows, options.steps))
    rate = matmul_rate()
    summary: dict[str, Any] = {"matmul_gflops": rate / 1e9, "rounds": results}
    if options.json:
        print(json.dumps(summary, indent=2))
        return
    print(f"{options.steps} steps, batch {BATCH}, LoRA r={RANK}, fp32; matrix product {rate / 1e9:.0f} GFLOP/s")
    print(f"{'':16}{'wall s':>10}{'tokens/s':>10}{'peak MiB':>10}{'of limit':>10}")
    for name, found in results.items():
        middle = {key: statistics.median(each[key] for each in found) for key in found[0]}
        share = middle["tokens_per_second"] * flops_per_token(model) / rate
        print(
            f"{name:16}{middle['wall']:10.1f}{middle['tokens_per_second']:10.0f}{middle['peak'] / 2**20:10.0f}{share:10.0%}"
        )
    pairs = list(zip(results["finetune train"], results["trl sft"], strict=True))
    for key, label in (("wall", "wall time"), ("tokens_per_second", "tokens/s"), ("peak", "peak memory")):
        ratios = ", ".join(f"{ours[key] / theirs[key]:.2f}" for ours, theirs in pairs)
        print(f"finetune / trl, {label}: {ratios} (each round)")


if __name__ == "__main__":
    main()
