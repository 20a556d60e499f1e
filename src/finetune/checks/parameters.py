"""Did training change what it should, and nothing else?"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path

from finetune.backends import TensorFacts
from finetune.checks import Verdict, finite, judge, missing
from finetune.checks.parts import SFT, Training, is_lora, lora, of_trainings, single, tensors, trains
from finetune.core.arithmetic import DTYPE_BYTES, mean
from finetune.core.errors import StageError
from finetune.core.files import read_object
from finetune.recipe import Recipe
from finetune.recipe.quantizers import quantizer
from finetune.run import Run, evidence, layout
from finetune.run.base import base_changed

Tensors = dict[str, TensorFacts]

QUANTIZED_BITS = 0.05  # groups at the ends of matrices are smaller, and have a scale too
EFFECT = 1e-3  # nats a token: far above the rounding of two runs of the same model, far below any learning


def _place(recipe: Recipe) -> str:
    return layout.TRAINED.path if is_lora(recipe) else layout.TRAINED_MODEL.path


def _before_and_after(recipe: Recipe, run: Run) -> tuple[Tensors, Tensors]:
    """The tensors that are trained, as they were before the first step and as they are stored."""
    before = run.path / layout.INITIAL.path if is_lora(recipe) else Path(evidence.fetched(run)["base"])
    return tensors(recipe, before), tensors(recipe, run.path / _place(recipe))


def _changed(recipe: Recipe, run: Run) -> Verdict:
    before, after = _before_and_after(recipe, run)
    changed = sum(name in before and before[name].sha256 != facts.sha256 for name, facts in after.items())
    return judge(
        "parameters_changed", changed / len(after) if after else None, ">", recipe.expect.lora_changed_min, "share",
        _place(recipe), f"{changed} of {len(after)} trained tensors differ from those before the first step",
    )  # fmt: skip


def _matrices(recipe: Recipe, run: Run) -> Verdict:
    """B starts at zero, so a zero B is an adapter that does nothing there."""
    after = tensors(recipe, run.path / _place(recipe))
    matrices = {name: facts for name, facts in after.items() if "lora_B" in name or "lora_embedding_B" in name}
    dead = [name for name, facts in matrices.items() if not 0 < facts.norm < math.inf]
    why = f"{len(matrices)} B matrices"
    why += f"; the norm of {dead[0]} is {matrices[dead[0]].norm:g}" if dead else ", none is zero"
    alive = (len(matrices) - len(dead)) / len(matrices) if matrices else None
    return judge("lora_b_nonzero", alive, "==", 1.0, "share", _place(recipe), why)


def _kinds_changed(recipe: Recipe, run: Run) -> Verdict:
    return _kinds(*_before_and_after(recipe, run))


def _kinds(before: Tensors, after: Tensors) -> Verdict:
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
    return judge("kinds_changed", share, "==", 1.0, "share", layout.TRAINED_MODEL.path, why)


def _coverage(recipe: Recipe, run: Run) -> Verdict:
    """Every layer of the model carries an adapter, unless the recipe chose layers."""
    base = Path(evidence.fetched(run)["base"])
    config = read_object(base / "config.json")
    chosen, targets = lora(recipe).layers_to_transform, lora(recipe).target_modules
    count = next((config[key] for key in ("num_hidden_layers", "n_layer") if key in config), None)
    expected = set(chosen) if chosen is not None else set(range(count or 0))
    if isinstance(targets, str) and targets != "all-linear":  # a regular expression may choose layers as well
        modules = {name.rpartition(".")[0] for name in tensors(recipe, base)}
        expected = _layers(f"{module}." for module in modules if re.fullmatch(targets, module)) or expected
    found = _layers(tensors(recipe, run.path / _place(recipe)))
    why = f"adapters in {len(found & expected)} of {len(expected)} layers"
    share = len(found & expected) / len(expected) if expected else None
    return judge("lora_coverage", share, "==", 1.0, "share", _place(recipe), why)


def _layers(names: Iterable[str]) -> set[int]:
    return {int(match[1]) for name in names if (match := re.search(r"\.(?:layers|h|blocks)\.(\d+)\.", name))}


def _frozen(recipe: Recipe, run: Run, training: Training) -> Verdict:
    facts = training.facts(run)
    before, after = facts["frozen_sha256_before"], facts["frozen_sha256_after"]
    same = None if not before or not after else float(before == after)
    why = f"SHA-256 over {facts['frozen_parameters']:,} frozen parameters in memory, before and after training"
    return judge(f"{training.prefix}frozen_identical", same, "==", 1.0, "yes", training.report, why)


def _base(recipe: Recipe, run: Run) -> Verdict:
    fetched = evidence.fetched(run)
    count, found = len(fetched["files"]) + len(fetched["adapter_files"]), base_changed(run)
    intact = max(0, count - len(found))  # files that came in count against it, too
    why = f"{intact} of {count} files of the base model are as they were fetched"
    if found:
        why += f"; {found[0]}"
    share = intact / count if count else None
    return judge("base_intact", share, "==", 1.0, "share", layout.MODEL.path, why)


def _precision(recipe: Recipe, run: Run) -> Verdict:
    """Whether the weights were in memory as precisely as the recipe says: of frozen ones where there are any."""
    facts = SFT.facts(run)
    held, bytes_held = facts.get("quantized_parameters", 0), facts.get("quantized_bytes", 0)
    frozen, trained = facts["frozen_parameters"] - held, facts["trainable_bytes"]
    count = frozen or facts["trainable_parameters"]
    size = (facts["weight_bytes"] - bytes_held - trained if frozen else trained) / count if count else None
    kind = "frozen" if frozen else "trained"
    why = f"{count:,} {kind} weights took {size or 0:g} bytes each; the recipe says {recipe.model.dtype}"
    wanted = DTYPE_BYTES[recipe.model.dtype]
    return judge("weights_precision", size, ">=", wanted, "bytes a weight", SFT.report, why)


def _quantized(recipe: Recipe, run: Run) -> Verdict:
    """Whether the base was held in the bits of the quantizer that the recipe asks for."""
    name, unit, row = "quantized_as_asked", "bits a weight apart", quantizer(str(recipe.model.quantization))
    facts = SFT.facts(run)
    count, size = facts.get("quantized_parameters", 0), facts.get("quantized_bytes", 0)
    if not count:
        return missing(name, "<=", QUANTIZED_BITS, unit, SFT.report, f"no weight was held in {row.name}")
    bits = 8 * size / count
    why = f"{count:,} weights were held in {bits:g} bits each, scales included; {row.name} takes {row.bits:g}"
    return judge(name, abs(bits - row.bits), "<=", QUANTIZED_BITS, unit, SFT.report, why)


def _effect(recipe: Recipe, run: Run) -> Verdict:
    """The trained model, loaded from disk, does not answer as the base does."""
    scores = evidence.row_scores(run)
    if scores is None:
        raise StageError("training rows were not scored with and without training")
    base, trained = scores
    moved = [abs(trained[row]["answer"][0] - base[row]["answer"][0]) / max(1, base[row]["answer"][1]) for row in base]
    why = f"mean change of the answers' log-probability over {len(moved)} rows, with training on and off"
    return judge("adapter_effect", finite(mean(moved)), ">", EFFECT, "nats a token", layout.ROW_SCORES.path, why)


def _adapts(recipe: Recipe) -> bool:
    return trains(recipe) and is_lora(recipe)


PARTS = (
    single("parameters_changed", _changed, "train"),
    single("lora_b_nonzero", _matrices, layout.TRAINED.path, _adapts),
    single("lora_coverage", _coverage, layout.TRAINED.path, _adapts),
    single("kinds_changed", _kinds_changed, layout.TRAINED_MODEL.path, lambda recipe: not is_lora(recipe)),
    *of_trainings("frozen_identical", _frozen, when=lambda recipe, training: is_lora(recipe)),
    single("base_intact", _base, layout.MODEL.path, _adapts),
    single("weights_precision", _precision, SFT.report),
    single(
        "quantized_as_asked", _quantized, SFT.report, lambda recipe: trains(recipe) and bool(recipe.model.quantization)
    ),
    single("adapter_effect", _effect, layout.ROW_SCORES.path),
)
