"""A tiny copy of a model's architecture, with random weights and its own tokenizer; and a few short rows of unequal length."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from finetune.core.errors import MissingError, StageError, first_line
from finetune.core.files import read_object
from finetune.core.install import missing_package

LAYERS, HEADS, KV_HEADS = 2, 4, 2
INITIALIZER_RANGE = 0.1  # at the usual 0.02, attention is nearly uniform, and what it attends to hardly shows
# By the names of config.json; a name that a config lacks, or has null, stays as it is.
HEAD_NAMES = ("num_attention_heads", "n_head", "n_heads", "num_heads")
KV_HEAD_NAMES = ("num_key_value_heads", "num_kv_heads")
SIZES: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), LAYERS),
    **dict.fromkeys(HEAD_NAMES, HEADS),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim"), 128),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 64),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 4),
    "head_dim": 16,
}
DROPOUT = re.compile(r"(drop|dropout|_pdrop|dropout_rate|dropout_prob)$")
TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model")
COPIED = (*TOKENIZER, "chat_template*", "generation_config.json")
MASKED = -100

ROWS, MOST_TOKENS, STEPS_APART = 12, 32, 3


def copy(base: Path, out: Path) -> dict[str, Any]:
    """Write a model of `base`'s architecture with two small layers into `out`; return its config.

    Vocabulary, norms, activation, position encoding and ties are those of `base`; there is no dropout. Raises StageError
    where its kind cannot be made so small.
    """
    stored = read_object(base / "config.json")
    kind = stored.get("model_type", "unknown")
    why = "the invariances are measured on a tiny copy of the model. Leave out expect.invariance"
    if any(isinstance(stored.get(name), dict) for name in ("text_config", "llm_config")) or "auto_map" in stored:
        raise StageError(f"there is no tiny copy of a {kind} model with parts or code of its own, and {why}")
    try:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM
    except ModuleNotFoundError as error:
        raise MissingError(missing_package(error.name or "torch")) from error
    try:
        full = AutoConfig.from_pretrained(str(base), local_files_only=True, trust_remote_code=False)
        config = type(full)(**smaller(full.to_dict()))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            model.eval()(input_ids=torch.tensor([[0, 1]]))  # some sizes fail only when the model is used
    except (ValueError, TypeError, KeyError, RuntimeError, ZeroDivisionError, AttributeError) as error:
        raise StageError(f"there is no tiny copy of a {kind} model ({first_line(error)}), and {why}") from error
    model.save_pretrained(str(out))
    for pattern in COPIED:
        for file in base.glob(pattern):
            shutil.copyfile(file, out / file.name)
    return read_object(out / "config.json")


def unpackable(model: Path) -> str:
    """Why rows packed into one sequence cannot be told apart by this kind of model; empty where they can."""
    import inspect

    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(str(model), local_files_only=True, trust_remote_code=False)
    forward = AutoModelForCausalLM._model_mapping[type(config)].forward
    if "position_ids" in inspect.signature(forward).parameters:
        return ""
    return f"a {config.model_type} model takes no positions, by which packed rows are told apart"


def smaller(config: dict[str, Any]) -> dict[str, Any]:
    """A config with the sizes of a tiny model, and without dropout or quantization."""
    found = {key: value for key, value in config.items() if key not in ("quantization_config", "dtype", "torch_dtype")}
    heads = next((found[name] for name in HEAD_NAMES if found.get(name)), None)
    for name in KV_HEAD_NAMES:
        if (kv := found.get(name)) is not None:
            found[name] = HEADS if kv == heads else 1 if kv == 1 else KV_HEADS
    found |= {name: size for name, size in SIZES.items() if found.get(name) is not None}
    found |= {key: 0.0 for key, value in found.items() if DROPOUT.search(key) and isinstance(value, int | float)}
    if isinstance(found.get("num_experts_per_tok"), int):
        found["num_experts_per_tok"] = min(2, found["num_experts_per_tok"])
    if isinstance(found.get("layer_types"), list):
        kinds = [*dict.fromkeys(found["layer_types"]), *found["layer_types"]]
        found["layer_types"] = kinds[:LAYERS]
    if "initializer_range" in found:
        found["initializer_range"] = INITIALIZER_RANGE
    for name in ("rope_parameters", "rope_scaling"):
        if isinstance(found.get(name), dict):
            found[name] = _plain(found[name])
    return found


def _plain(rope: dict[str, Any]) -> dict[str, Any]:
    """A position encoding without the factors that a list gives for every pair of a head's numbers."""
    if any(isinstance(value, list) for value in rope.values()):
        return {"rope_type": "default", **{key: rope[key] for key in ("rope_theta",) if key in rope}}
    return {key: _plain(value) if isinstance(value, dict) else value for key, value in rope.items()}


def rows(prepared: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """ROWS short rows from those that `prepare` left: unequal in length and in trained tokens, cut at their beginning.

    Equal rows would hide a mean of means. Where there are too few, they come again, cut elsewhere.
    """
    usable = [row for row in prepared if any(label != MASKED for label in row["labels"][-MOST_TOKENS // 2 :])]
    if not usable:
        raise StageError("no prepared row trains one of its last tokens, so no invariance can be measured on them")
    spread = max(1, len(usable) // ROWS)
    found = []
    for place in range(ROWS):
        row = usable[place * spread % len(usable)]
        most = max(MOST_TOKENS // 2, min(MOST_TOKENS, len(row["input_ids"])) - STEPS_APART * (place % 5))
        ids, labels = row["input_ids"][-most:], row["labels"][-most:]
        if place % 3 == 2:
            trained = [at for at, label in enumerate(labels) if label != MASKED]
            first = trained[len(trained) // 2]
            labels = [MASKED] * first + labels[first:]
        found.append({"row": place, "input_ids": ids, "labels": labels})
    return found


def padded(chosen: list[dict[str, Any]], pad: int) -> list[dict[str, Any]]:
    """The same rows with unequal amounts of padding at their end, none of it trained."""
    return [
        {
            **row,
            "input_ids": row["input_ids"] + [pad] * (5 + 4 * (row["row"] % 4)),
            "labels": row["labels"] + [MASKED] * (5 + 4 * (row["row"] % 4)),
        }
        for row in chosen
    ]
