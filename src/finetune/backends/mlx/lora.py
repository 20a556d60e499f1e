"""LoRA on mlx-lm's own layers, stored as PEFT stores it, so that every other tool reads the adapter."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.backends.mlx.layout import hugging_face_modules
from finetune.backends.mlx.loading import linear_modules
from finetune.backends.mlx.runtime import mx, tree_unflatten
from finetune.backends.mlx.tensors import stored
from finetune.core.errors import Faults, MissingError, StageError, UsageError
from finetune.core.files import read_object, write_json
from finetune.core.lookup import did_you_mean

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
OUTPUT = ("lm_head", "embed_out")  # `all-linear` leaves the output layer out, as PEFT does
# PEFT's options that are not carried out here, each with the values that ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "use_dora": (None, False),
    "bias": (None, "none"),
    "modules_to_save": (None, []),
    "init_lora_weights": (None, True, "gaussian"),
}
# What an adapter from elsewhere may ask for besides.
FOREIGN: dict[str, tuple[Any, ...]] = {
    **{name: values for name, values in UNSUPPORTED.items() if name != "init_lora_weights"},
    "trainable_token_indices": (None, {}, []),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "lora_bias": (None, False),
    "alora_invocation_tokens": (None, []),
}


def apply(model: Any, directory: Path, lora: Mapping[str, Any]) -> None:
    """Freeze the model and put a fresh adapter onto its linear modules. Raises UsageError with every fault."""
    faults = [
        f"{key}: the mlx backend has no {key}={lora[key]!r}; leave it out, or set 'backend: torch'"
        for key, neutral in UNSUPPORTED.items()
        if lora.get(key) not in neutral
    ]
    modules = {theirs: ours for ours, theirs in hugging_face_modules(directory, linear_modules(model)).items()}
    chosen = _chosen(lora, list(modules), faults)
    for key in ("rank_pattern", "alpha_pattern"):
        unmatched = [pattern for pattern in lora.get(key) or {} if not _matches(pattern, chosen)]
        faults += [f"{key}: no chosen module matches '{pattern}'" for pattern in unmatched]
    if faults:
        listed = [f"train.lora.{fault}" for fault in faults]
        raise Faults(f"{len(faults)} fault{'s' if len(faults) > 1 else ''} in the recipe:", listed)
    _wrap(model, {modules[name]: _rank_and_scale(lora, name) for name in chosen}, lora)


def attach(model: Any, directory: Path, adapter: Path) -> dict[str, Any]:
    """Put a stored PEFT adapter onto a model; returns its config. Raises StageError where it does not fit."""
    lora, tensors = read(adapter)
    modules = {theirs: ours for ours, theirs in hugging_face_modules(directory, linear_modules(model)).items()}
    names = sorted({name for name, _ in tensors})
    if unknown := [name for name in names if name not in modules]:
        raise StageError(
            f"the adapter in {adapter} does not fit the model in {directory}, which has no linear module {unknown[0]}. "
            "If it was trained on another, set model.base_model"
        )
    _wrap(model, {modules[name]: _rank_and_scale(lora, name) for name in names}, lora)
    placed = dict(model.named_modules())
    for (name, letter), tensor in tensors.items():
        module, attribute = placed[modules[name]], f"lora_{letter.lower()}"
        if module[attribute].shape != tensor.T.shape:
            raise StageError(
                f"the adapter in {adapter} does not fit the model in {directory}: lora_{letter} of {name} has the shape "
                f"{tuple(tensor.shape)}, not {tuple(module[attribute].T.shape)}"
            )
        module[attribute] = tensor.T.astype(mx.float32)
    return lora


def read(adapter: Path) -> tuple[dict[str, Any], dict[tuple[str, str], Any]]:
    """A PEFT adapter: its config, and its matrices by (module, `A` or `B`), in PEFT's orientation."""
    for name in (CONFIG, WEIGHTS):
        if not (adapter / name).is_file():
            raise MissingError(f"{adapter} holds no adapter: {name} is not there")
    lora = read_object(adapter / CONFIG)
    asked = [f"{key}={lora[key]!r}" for key, neutral in FOREIGN.items() if lora.get(key) not in neutral]
    if lora.get("peft_type") != "LORA" or asked:
        what = ", ".join(asked) or f"peft_type={lora.get('peft_type')!r}"
        raise UsageError(f"the mlx backend cannot carry out the adapter in {adapter}: it has {what}. Use torch for it")
    tensors = {}
    for key, tensor in stored(adapter / WEIGHTS).items():
        found = re.fullmatch(re.escape(PREFIX) + r"(.+)\.lora_([AB])\.weight", key)
        if found is None:
            raise StageError(f"the adapter in {adapter} holds {key}, which is no LoRA matrix of a linear module")
        tensors[found[1], found[2]] = tensor
    lonely = [name for name, letter in tensors if (name, "B" if letter == "A" else "A") not in tensors]
    if lonely or not tensors:
        raise StageError(
            f"the adapter in {adapter} is not whole: {f'half of {lonely[0]}' if lonely else 'it is empty'}"
        )
    return lora, tensors


def save(model: Any, directory: Path, lora: Mapping[str, Any], out: Path, *, fan_in_fan_out: bool) -> None:
    """Write the adapter that a model carries as PEFT would."""
    layers = {name: module for name, module in model.named_modules() if "lora_a" in module}
    linear = {name: module.linear for name, module in layers.items()}
    names = hugging_face_modules(directory, linear)
    tensors = {}
    for name, module in layers.items():
        tensors[f"{PREFIX}{names[name]}.lora_A.weight"] = mx.contiguous(module.lora_a.T)
        tensors[f"{PREFIX}{names[name]}.lora_B.weight"] = mx.contiguous(module.lora_b.T)
    out.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(out / WEIGHTS), tensors, metadata={"format": "pt"})
    own = {key: value for key, value in lora.items() if key not in ("target_modules", "inference_mode")}
    stated = {
        **own,
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(directory),
        "target_modules": sorted(names.values()),
        "layers_to_transform": None,  # the targets above are whole names already
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
    }
    write_json(out / CONFIG, stated)


def dropout(model: Any) -> float | None:
    """The largest share that an adapter's layers drop as they are now; None without an adapter."""
    layers = [module.dropout for _, module in model.named_modules() if "lora_a" in module]
    return max((1 - layer._p_1 if layer.training else 0.0 for layer in layers), default=None)


def scale(lora: Mapping[str, Any], name: str) -> float:
    """What B times A is multiplied by in a module."""
    return _rank_and_scale(lora, name)[1]


def _wrap(model: Any, chosen: Mapping[str, tuple[int, float]], lora: Mapping[str, Any]) -> None:
    from mlx_lm.tuner.lora import LoRALinear

    model.freeze()
    placed = dict(model.named_modules())
    wrapped = []
    for name, (rank, factor) in chosen.items():
        layer = LoRALinear.from_base(placed[name], rank, float(lora.get("lora_dropout") or 0.0), factor)
        if lora.get("init_lora_weights") == "gaussian":
            layer.lora_a = mx.random.normal(layer.lora_a.shape) / rank
        layer.unfreeze(recurse=False)
        wrapped.append((name, layer))
    model.update_modules(tree_unflatten(wrapped))


def _rank_and_scale(lora: Mapping[str, Any], name: str) -> tuple[int, float]:
    rank = int(_by_pattern(lora.get("rank_pattern") or {}, name, lora["r"]))
    alpha = float(_by_pattern(lora.get("alpha_pattern") or {}, name, lora["lora_alpha"]))
    return rank, alpha / (math.sqrt(rank) if lora.get("use_rslora") else rank)


def _by_pattern(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that the end of the module's name matches."""
    return next((value for pattern, value in patterns.items() if _matches(pattern, [name])), default)


def _matches(pattern: str, names: list[str]) -> bool:
    try:
        return any(re.match(rf"(.*\.)?({pattern})$", name) for name in names)
    except re.error:
        return False


def _chosen(lora: Mapping[str, Any], names: list[str], faults: list[str]) -> list[str]:
    """The modules that `target_modules` and `layers_to_transform` name, by PEFT's rules."""
    targets = lora.get("target_modules") or "all-linear"
    if targets == "all-linear":
        chosen = [name for name in names if name.rpartition(".")[2] not in OUTPUT]
    elif isinstance(targets, str):
        chosen = [name for name in names if re.fullmatch(targets, name)]
        if not chosen:
            faults.append(f"target_modules: no linear module's whole name matches '{targets}'. One is: {names[0]}")
    else:
        ends = sorted({name.rpartition(".")[2] for name in names})
        for target in targets:
            if not any(_ends(name, target) for name in names):
                hint = did_you_mean(target, ends)
                faults.append(
                    f"target_modules: this model has no linear module '{target}'.{hint} It has: {', '.join(ends)}."
                )
        chosen = [name for name in names if any(_ends(name, target) for target in targets)]
    if (layers := lora.get("layers_to_transform")) is not None:
        count = 1 + max((layer for name in names if (layer := _layer(name)) is not None), default=-1)
        faults += [
            f"layers_to_transform: this model has no layer {layer}; its layers are 0 to {count - 1}"
            for layer in layers
            if not 0 <= layer < count
        ]
        chosen = [name for name in chosen if _layer(name) in layers]
    return chosen


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _layer(name: str) -> int | None:
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else None
