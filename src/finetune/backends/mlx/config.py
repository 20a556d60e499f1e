"""What mlx-lm reads in a model's config, against what transformers means by it.

mlx-lm takes each constant from a key of its own choice and a default of its own where the key is missing, in silence:
transformers 5 writes `rope_parameters: {rope_theta: ...}`, and mlx-lm's Llama reads `rope_theta`, else 10000. So every
key that mlx-lm reads is written from transformers' reading, and what its code cannot do is refused.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.backends import Constant
from finetune.backends.mlx.runtime import mx  # noqa: F401 (before mlx_lm imports it)
from finetune.backends.mlx.tokenizer import MlxTokenizer
from finetune.core.errors import StageError, UsageError, first_line
from finetune.core.files import read_object

ABSENT = object()
SHORTEST_WINDOW = 1024  # a sliding window below this would be felt in nearly every conversation
# How mlx-lm's code spells an activation, by transformers' names of it.
ACTIVATIONS = {
    ("silu", "swish"): ("swiglu", "silu", "SwitchGLU"),
    ("gelu_pytorch_tanh", "gelu_new", "gelu_fast"): ("gelu_approx",),
    ("gelu",): ("nn.gelu(", "nn.gelu,"),
    ("relu",): ("nn.relu(", "nn.relu,"),
    ("relu2",): ("nn.relu2", "relu_squared"),
}
# Keys that change what a model computes, each with the values that change nothing.
INFLUENTIAL: dict[str, tuple[Any, ...]] = {
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "query_pre_attn_scalar": (None,),
    "use_bidirectional_attention": (None, False),
    "scale_attn_weights": (None, True),
    "scale_attn_by_inverse_layer_idx": (None, False),
    "qk_layernorm": (None, False),
    "clip_qkv": (None,),
    "alibi": (None, False),
    "logit_scale": (None, 1, 1.0),
    "logits_scaling": (None, 1, 1.0),
    "embedding_multiplier": (None, 1, 1.0),
    "residual_multiplier": (None, 1, 1.0),
    "attention_multiplier": (None,),
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
}


@dataclass(frozen=True, kw_only=True)
class Reading:
    """`config` as mlx-lm shall read it; `changed` the keys that differ from the file's; `mended` and `notes` in
    sentences."""

    config: dict[str, Any]
    changed: dict[str, Any]
    mended: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def stored_for_mlx(model: Path) -> bool:
    """Whether mlx-lm wrote these weights; then its config is what it is, and nothing is mended."""
    file = next(iter(sorted(model.glob("model*.safetensors"))), None)
    if file is None:
        return False
    with file.open("rb") as stream:
        header = stream.read(int.from_bytes(stream.read(8), "little"))
    try:
        return bool(json.loads(header).get("__metadata__", {}).get("format") == "mlx")
    except ValueError:
        raise StageError(f"{file} is not a safetensors file; get the model again") from None


def classes(config: dict[str, Any]) -> tuple[Any, Any]:
    """mlx-lm's Model and ModelArgs for a config. Raises UsageError for an architecture that it does not have."""
    from mlx_lm.utils import _get_classes

    try:
        return _get_classes(config)  # type: ignore[no-any-return]
    except (KeyError, ValueError) as error:
        kind = config.get("model_type")
        raise UsageError(f"mlx-lm has no architecture '{kind}' ({first_line(error)}); leave MLX out for it") from None


def read(model: Path, *, trust_remote_code: bool = False) -> Reading:
    """The config of a model directory as mlx-lm shall read it.

    Raises UsageError where mlx-lm's code cannot do what the config asks for, StageError where it takes a constant for
    another in spite of the mending.
    """
    from mlx_lm.utils import load_config

    if not (model / "config.json").is_file():
        raise StageError(f"{model} holds no config.json, so it is no model directory")
    read_object(model / "config.json")
    config = load_config(model)
    if stored_for_mlx(model) or config.get("model_file"):
        return Reading(config=config, changed={})
    module_class, args_class = classes(config)
    theirs = _transformers_config(model, trust_remote_code)
    source = inspect.getsource(sys.modules[module_class.__module__])
    fields = {field.name: _default(field) for field in dataclasses.fields(args_class)}
    notes: list[str] = []
    window = _window(theirs, fields, source, notes)
    wanted = {**_wanted(theirs, fields, config, notes), **window}
    _refuse_what_is_ignored(theirs, fields, source, notes)
    changed, mended = {}, []
    for name, value in wanted.items():
        if (found := config.get(name, fields[name])) != value:
            changed[name] = value
            instead = f"in its place it would take {found}" if found is not ABSENT else "it needs it"
            mended.append(f"config.json now has {name} = {_shown(value)}: mlx-lm reads it there, and {instead}")
    if "text_config" in fields and getattr(theirs, "text_config", None) is not None:
        text = {**theirs.text_config.to_dict(), **config.get("text_config", {}), **_rotary(theirs.text_config, notes)}
        changed["text_config"] = {key: value for key, value in text.items() if value is not None}
        mended.append("config.json's text_config now spells out its constants, under the names that mlx-lm reads")
    reading = Reading(config={**config, **changed}, changed=changed, mended=tuple(mended), notes=tuple(notes))
    compare(reading.config, wanted)
    return reading


def compare(config: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise StageError for the first constant that mlx-lm holds, after reading `config`, for another than `wanted`."""
    _, args_class = classes(config)
    try:
        args = args_class.from_dict(config)
    except (TypeError, ValueError, KeyError) as error:
        raise UsageError(f"mlx-lm cannot read this model's config: {first_line(error)}") from None
    for name, value in wanted.items():
        if (found := getattr(args, name)) != value:
            raise StageError(
                f"mlx-lm reads {name} = {_shown(found)} where transformers reads {_shown(value)}, so the model would "
                "answer differently in it; leave MLX out for this model"
            )


def _transformers_config(model: Path, trust_remote_code: bool) -> Any:
    from finetune.backends.torch.tokenizer import read_config

    return read_config(model, trust_remote_code=trust_remote_code)


def _default(field: Any) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return ABSENT if field.default_factory is dataclasses.MISSING else field.default_factory()


def _wanted(theirs: Any, fields: dict[str, Any], config: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """What each key that mlx-lm reads has to be, by transformers' reading."""
    skip = {"model_type", "layer_types", "sliding_window", "sliding_window_pattern", "rope_scaling", "quantization"}
    wanted: dict[str, Any] = {}
    for name in fields:
        value = getattr(theirs, name, ABSENT)
        if name in skip or name.endswith("_config") or value is ABSENT:
            continue
        if value is None and config.get(name, fields[name]) in (None, ABSENT):
            continue
        wanted[name] = value
    if "n_ctx" in fields and "n_ctx" not in wanted:
        wanted["n_ctx"] = theirs.max_position_embeddings
    rotary = _rotary(theirs, notes)
    if "rope_parameters" in fields:  # such code reads transformers' own form
        rotary.pop("rope_scaling", None)
    elif rotary.get("rope_scaling") and "rope_scaling" not in fields:
        kind = rotary["rope_scaling"]["rope_type"]
        raise UsageError(f"mlx-lm's {theirs.model_type} has no position encoding of the kind '{kind}'; leave MLX out")
    return {**wanted, **{name: value for name, value in rotary.items() if name in fields}}


def _rotary(theirs: Any, notes: list[str]) -> dict[str, Any]:
    """The position encoding under the names that came before transformers 5, which most of mlx-lm reads."""
    stored = getattr(theirs, "rope_parameters", None) or {}
    if not stored:
        return {}
    nested = any(isinstance(value, dict) for value in stored.values())
    full = dict(stored.get("full_attention", {}) if nested else stored)
    found: dict[str, Any] = {}
    if full.get("rope_theta") is not None:
        found["rope_theta"] = full["rope_theta"]
    if nested and "rope_theta" in (local := stored.get("sliding_attention", {})):
        found["rope_local_base_freq"] = local["rope_theta"]
        if local.get("rope_type", "default") != "default":
            raise UsageError(f"mlx-lm scales no position encoding of sliding layers ('{local['rope_type']}')")
    if (partial := full.get("partial_rotary_factor", getattr(theirs, "partial_rotary_factor", None))) is not None:
        found["partial_rotary_factor"] = partial
    found["rope_scaling"] = _scaling(theirs, full, notes)
    return found


def _scaling(theirs: Any, full: dict[str, Any], notes: list[str]) -> dict[str, Any] | None:
    kind = full.get("rope_type", "default")
    if kind == "default":
        return None
    if full.get("attention_factor") is not None or full.get("truncate") is False:
        raise UsageError(f"mlx-lm ignores 'attention_factor' and 'truncate' of the position encoding '{kind}'")
    scaling = {key: value for key, value in full.items() if key not in ("rope_theta", "partial_rotary_factor")}
    scaling["type"] = kind
    if kind == "longrope":
        original = scaling.get("original_max_position_embeddings") or theirs.original_max_position_embeddings
        scaling |= {"original_max_position_embeddings": original, "long_factor": scaling["short_factor"]}
        notes.append(
            f"mlx-lm has one set of longrope factors for all lengths; those for texts up to {original} tokens are "
            "written, so longer texts are computed differently"
        )
    return scaling


def _window(theirs: Any, fields: dict[str, Any], source: str, notes: list[str]) -> dict[str, Any]:
    """The keys of the sliding window, where mlx-lm has one; else a note, or UsageError for a short one."""
    size, kinds = sliding(theirs)
    if size is None:
        cleared = {"sliding_window": None} if fields.get("sliding_window", ABSENT) not in (None, ABSENT) else {}
        return cleared if "sliding_window_pattern" not in fields else {}
    keys = {"sliding_window": size}
    if "sliding_window" in fields and "window_size" in source:
        if "layer_types" in fields and "full_attention" in kinds:
            return {**keys, "layer_types": kinds}
        if "sliding_window_pattern" in fields and "full_attention" in kinds:
            pattern = kinds.index("full_attention") + 1
            if all((kind == "full_attention") == (at % pattern == 0) for at, kind in enumerate(kinds, 1)):
                return {**keys, "sliding_window_pattern": pattern}
        if not {"layer_types", "sliding_window_pattern"} & fields.keys():
            return keys
    said = f"mlx-lm's {theirs.model_type} has no sliding window as this model's (of {size} tokens)"
    if size < SHORTEST_WINDOW or "sliding_window_pattern" in fields:  # the pattern chooses position encodings as well
        raise UsageError(f"{said}, so all but short texts would be computed differently; leave MLX out for it")
    notes.append(f"{said}: texts longer than that are computed differently")
    return {}


def sliding(theirs: Any) -> tuple[int | None, list[str]]:
    """The size of the sliding window (None without one) and the kind of every layer."""
    size = getattr(theirs, "sliding_window", None)
    if size is None or getattr(theirs, "use_sliding_window", True) is False:
        return None, []
    kinds = list(getattr(theirs, "layer_types", None) or ["sliding_attention"] * theirs.num_hidden_layers)
    return (int(size), kinds) if "sliding_attention" in kinds else (None, [])


def _refuse_what_is_ignored(theirs: Any, fields: dict[str, Any], source: str, notes: list[str]) -> None:
    """Raise UsageError for what transformers computes and mlx-lm's code of this architecture does not look at."""
    kind = theirs.model_type
    for name, neutral in INFLUENTIAL.items():
        value = getattr(theirs, name, None)
        if value not in neutral and name not in fields and name not in source:
            raise UsageError(f"mlx-lm's {kind} ignores {name}, which is {value} in this model; leave MLX out for it")
        if value is None and "softcapping" in name and fields.get(name, ABSENT) not in (None, ABSENT):
            raise UsageError(f"mlx-lm's {kind} cannot do without {name}, which this model has not; leave MLX out")
    if kind == "gpt2" and (inner := getattr(theirs, "n_inner", None)) not in (None, 4 * theirs.n_embd):
        raise UsageError(
            f"mlx-lm's gpt2 takes n_inner for 4 * n_embd = {4 * theirs.n_embd}, and this model's is {inner}; leave MLX out"
        )
    chosen = next(
        (v for k in ("hidden_activation", "hidden_act", "activation_function") if (v := getattr(theirs, k, None))), None
    )
    spelled = [names for names, marks in ACTIVATIONS.items() if any(mark in source for mark in marks)]
    if chosen is None or not spelled or {"hidden_act", "hidden_activation"} & fields.keys():
        return
    if not any(chosen in names for names in spelled):
        if kind == "gemma" and chosen == "gelu_pytorch_tanh":
            notes.append(
                "mlx-lm's gemma computes GELU exactly, where transformers computes its tanh approximation: answers are "
                "the same but for near ties"
            )
            return
        raise UsageError(
            f"mlx-lm's {kind} uses the activation {spelled[0][0]}, and this model's is {chosen}; leave MLX out for it"
        )


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# transformers' names of a constant, and mlx-lm's.
NAMES = {
    "hidden_size": ("hidden_size", "n_embd"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer"),
    "num_attention_heads": ("num_attention_heads", "n_head"),
    "num_key_value_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "intermediate_size": ("intermediate_size",),
    "max_position_embeddings": ("max_position_embeddings", "n_positions"),
    "rope_theta": ("rope_theta",),
    "norm_eps": ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"),
    "tie_word_embeddings": ("tie_word_embeddings",),
    "vocab_size": ("vocab_size",),
    "model_type": ("model_type",),
}


def constants(model: Path, *, trust_remote_code: bool = False) -> dict[str, Constant]:
    """What mlx-lm's ModelArgs hold after reading the config (see Backend.constants), and its tokenizer."""
    config = read(model, trust_remote_code=trust_remote_code).config
    _, args_class = classes(config)
    args: Any = args_class.from_dict(config)
    inner = getattr(args, "text_config", None)
    held = {**vars(args), **(inner if isinstance(inner, dict) else {})}
    found: dict[str, Constant] = {
        name: next((held[key] for key in keys if held.get(key) is not None), None) for name, keys in NAMES.items()
    }
    if found["head_dim"] is None and found["hidden_size"] and found["num_attention_heads"]:
        found["head_dim"] = int(found["hidden_size"]) // int(found["num_attention_heads"])
    kinds = held.get("layer_types")
    if held.get("sliding_window") is not None and (kinds is None or "sliding_attention" in kinds):
        found["sliding_window"] = held["sliding_window"]
    tokenizer = MlxTokenizer(model, trust_remote_code=trust_remote_code)
    found["eos_token_id"] = tokenizer.hf.eos_token_id
    found["bos_token_id"] = tokenizer.hf.bos_token_id
    found["add_bos_token"] = tokenizer.adds_bos
    return {name: value for name, value in found.items() if value is not None}
