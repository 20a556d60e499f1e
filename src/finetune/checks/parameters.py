"""Did training change what it should, and nothing else?"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path

from finetune import evidence
from finetune.backends import TensorFacts, get
from finetune.checks import Verdict, finite, judge, missing
from finetune.errors import FinetuneError
from finetune.recipe import Recipe
from finetune.run import Run, digest

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
EFFECT = 1e-3  # nats a token: far above the rounding of two runs of the same model, far below any learning


def check(recipe: Recipe, run: Run) -> list[Verdict]:
    assert recipe.train is not None
    backend = get(recipe.backend)
    try:
        if recipe.train.method == "full":
            before = backend.tensors(evidence.phases(run, recipe)["base"][0])
            after = backend.tensors(run.path / "train" / "model")
        else:
            before = backend.tensors(run.path / "train" / "initial")
            after = backend.tensors(run.path / "train" / "adapter")
    except FinetuneError as error:
        return [missing("parameters_changed", ">", recipe.expect.lora_changed_min, "share", "train", str(error))]
    verdicts = [_changed(recipe, before, after)]
    if recipe.train.method == "lora":
        verdicts += [_matrices(after), _coverage(recipe, run, after), *_frozen(run)]
    else:
        verdicts.append(_kinds(before, after))
    verdicts += [*_precision(recipe, run), _effect(run)]
    return verdicts


def _changed(recipe: Recipe, before: dict[str, TensorFacts], after: dict[str, TensorFacts]) -> Verdict:
    assert recipe.train is not None
    changed = sum(name in before and before[name].sha256 != facts.sha256 for name, facts in after.items())
    place = "train/adapter" if recipe.train.method == "lora" else "train/model"
    return judge(
        "parameters_changed", changed / len(after) if after else None, ">", recipe.expect.lora_changed_min, "share", place,
        f"{changed} of {len(after)} trained tensors differ from those before the first step",
    )  # fmt: skip


def _matrices(after: dict[str, TensorFacts]) -> Verdict:
    """B starts at zero, so a zero B is an adapter that does nothing there."""
    matrices = {name: facts for name, facts in after.items() if "lora_B" in name or "lora_embedding_B" in name}
    dead = [name for name, facts in matrices.items() if not 0 < facts.norm < math.inf]
    why = f"{len(matrices)} B matrices"
    why += f"; the norm of {dead[0]} is {matrices[dead[0]].norm:g}" if dead else ", none is zero"
    alive = (len(matrices) - len(dead)) / len(matrices) if matrices else None
    return judge("lora_b_nonzero", alive, "==", 1.0, "share", "train/adapter", why)


def _kinds(before: dict[str, TensorFacts], after: dict[str, TensorFacts]) -> Verdict:
    """Full training moves every kind of matrix (the embedding, q_proj, ...) in some layer; a lost one is the base's."""
    moved: dict[str, bool] = {}
    for name, facts in after.items():
        if len(facts.shape) > 1:
            kind = re.sub(r"\.\d+\.", ".*.", name)
            moved[kind] = moved.get(kind, False) or name not in before or before[name].sha256 != facts.sha256
    same = [kind for kind, changed in moved.items() if not changed]
    why = f"{len(moved) - len(same)} of {len(moved)} kinds of matrices differ from the base in some layer"
    why += f"; as in the base: {same[0]}" if same else ""
    share = (len(moved) - len(same)) / len(moved) if moved else None
    return judge("kinds_changed", share, "==", 1.0, "share", "train/model", why)


def _coverage(recipe: Recipe, run: Run, after: dict[str, TensorFacts]) -> Verdict:
    """Every layer of the model carries an adapter, unless the recipe chose layers."""
    assert recipe.train is not None
    base = Path(evidence.fetched(run)["base"])
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    chosen, targets = recipe.train.lora.layers_to_transform, recipe.train.lora.target_modules
    count = next((config[key] for key in ("num_hidden_layers", "n_layer") if key in config), None)
    expected = set(chosen) if chosen is not None else set(range(count or 0))
    if isinstance(targets, str) and targets != "all-linear":  # a regular expression may choose layers as well
        modules = {name.rpartition(".")[0] for name in get(recipe.backend).tensors(base)}
        expected = _layers(f"{module}." for module in modules if re.fullmatch(targets, module)) or expected
    found = _layers(after)
    why = f"adapters in {len(found & expected)} of {len(expected)} layers"
    share = len(found & expected) / len(expected) if expected else None
    return judge("lora_coverage", share, "==", 1.0, "share", "train/adapter", why)


def _layers(names: Iterable[str]) -> set[int]:
    return {int(match[1]) for name in names if (match := re.search(r"\.(?:layers|h|blocks)\.(\d+)\.", name))}


def _frozen(run: Run) -> list[Verdict]:
    report = run.report("train")
    facts = report.metrics if report else {}
    before, after = facts.get("frozen_sha256_before"), facts.get("frozen_sha256_after")
    same = None if not before or not after else float(before == after)
    verdict = judge(
        "frozen_identical", same, "==", 1.0, "yes", "train/report.json",
        f"SHA-256 over {facts.get('frozen_parameters', 0):,} frozen parameters in memory, before and after training",
    )  # fmt: skip
    found = evidence.fetched(run)
    stored = found["files"]
    intact = [name for name, file in stored.items() if _intact(Path(found["base"]) / name, file["sha256"])]
    return [
        verdict,
        judge(
            "base_intact", len(intact) / len(stored) if stored else None, "==", 1.0, "share", "fetch/model.json",
            f"{len(intact)} of {len(stored)} files of the base model are as they were fetched",
        ),
    ]  # fmt: skip


def _intact(path: Path, sha256: str) -> bool:
    return path.is_file() and digest(path) == sha256


def _precision(recipe: Recipe, run: Run) -> list[Verdict]:
    """Whether the weights were in memory as precisely as the recipe says: of frozen ones where there are any."""
    report = run.report("train")
    facts = report.metrics if report else {}
    frozen, trained = facts.get("frozen_parameters"), facts.get("trainable_bytes")
    if trained is None or frozen is None:
        return []
    count = frozen or facts["trainable_parameters"]
    size = (facts["weight_bytes"] - trained if frozen else trained) / count
    kind = "frozen" if frozen else "trained"
    why = f"{count:,} {kind} weights took {size:g} bytes each; the recipe says {recipe.model.dtype}"
    wanted = BYTES[recipe.model.dtype]
    return [judge("weights_precision", size, ">=", wanted, "bytes a weight", "train/report.json", why)]


def _effect(run: Run) -> Verdict:
    """The trained model, loaded from disk, does not answer as the base does."""
    name, place = "adapter_effect", "evaluate/rows.json"
    scores = evidence.row_scores(run)
    if scores is None:
        return missing(
            name, ">", EFFECT, "nats a token", place, "training rows were not scored with and without training"
        )
    base, trained = scores
    moved = [abs(trained[row]["answer"][0] - base[row]["answer"][0]) / max(1, base[row]["answer"][1]) for row in base]
    why = f"mean change of the answers' log-probability over {len(moved)} rows, with training on and off"
    return judge(name, finite(evidence.mean(moved)), ">", EFFECT, "nats a token", place, why)
