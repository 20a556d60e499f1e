"""What llama.cpp makes of an architecture's constants, and what the converter therefore has to write.

`plan(config)` compares a Hugging Face config with what llama.cpp (b9190, src/models/*.cpp) computes for it. What can be
written so that llama.cpp computes the same is in the plan; what cannot raises UsageError.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from finetune.core.errors import UsageError

Config = Mapping[str, Any]
ORDINALS = {2: "second", 6: "sixth"}
LEAST_WINDOW = 256  # a file whose context is cut to less than this would be of no use

SWITCHES = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "use_bidirectional_attention": False}
SILU = ("silu", "swish")
TANH_GELU = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_tanh")


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """How llama.cpp computes one `model_type`. `period`: of how many layers the last has full attention and the others
    the sliding window (0: it knows no window); `query` names the tensor that can take a factor of the scores;
    `partial`: it rotates a part of each head; `untied`: it takes an output matrix of its own; `output`: it needs one."""

    activations: tuple[str, ...] = SILU
    period: int = 0
    query: str | None = None
    partial: bool = False
    untied: bool = True
    output: bool = False


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(),
    "mistral": Architecture(),
    "qwen2": Architecture(),
    "qwen3": Architecture(),
    "phi": Architecture(activations=TANH_GELU, partial=True, output=True),
    "phi3": Architecture(partial=True),
    "gemma": Architecture(activations=TANH_GELU, untied=False),
    "gemma2": Architecture(activations=TANH_GELU, period=2, query="attn_q.weight", untied=False),
    "gemma3_text": Architecture(activations=TANH_GELU, period=6, query="attn_q_norm.weight"),
    "gpt2": Architecture(activations=TANH_GELU),
}
LARGE_GEMMA = {"gemma2": 46, "gemma3_text": 62}  # layers of the 27B, whose scores llama.cpp scales another way

Metadata = float | int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """`metadata`: GGUF keys without the architecture's name, as they have to be; of those in `settled` `mended` speaks
    already. `query_factor`: what the tensors whose name ends in `query` are multiplied with. `copy_output`: write the
    tied embedding as output matrix too. `mended` and `notes`: sentences for the user."""

    metadata: dict[str, Metadata] = field(default_factory=dict)
    settled: tuple[str, ...] = ()
    query: str = ""
    query_factor: float = 1.0
    copy_output: bool = False
    mended: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def plan(config: Config) -> Plan:
    """The plan for a config (a mapping with the library's defaults filled in). Raises UsageError for what llama.cpp
    cannot compute."""
    name = str(config.get("model_type"))
    known = ARCHITECTURES.get(name)
    if known is None:
        return Plan(
            notes=(f"nothing is known of '{name}' in llama.cpp here; only the parity checks guard its constants",)
        )
    mended: list[str] = []
    notes: list[str] = []
    _refuse(name, config, known, notes)
    metadata = {**_sizes(config), **_positions(config, known), **_softcaps(config)}
    window = _window(name, config, known, metadata, mended)
    metadata |= window
    factor = _query_factor(name, config, known)
    if factor != 1.0:
        scale = config["query_pre_attn_scalar"]
        mended.append(
            f"the factor of the attention scores (query_pre_attn_scalar {scale}) is in the weights {known.query}, "
            "since llama.cpp always takes the head's dimension"
        )
    tied = bool(config.get("tie_word_embeddings", True))
    if tied and known.output:
        mended.append("the embedding is written as output matrix too, since llama.cpp wants one for this architecture")
    return Plan(
        metadata=metadata,
        settled=tuple(key for key in window if key == "context_length"),
        query=known.query or "",
        query_factor=factor,
        copy_output=tied and known.output,
        mended=tuple(mended),
        notes=tuple(notes),
    )


def _refuse(name: str, config: Config, known: Architecture, notes: list[str]) -> None:
    activation = first(config, "hidden_activation", "hidden_act", "activation_function")
    if activation == "gelu" and known.activations is TANH_GELU:
        notes.append("llama.cpp computes GELU by its tanh approximation, the model by the exact function")
    elif activation not in (*known.activations, None):
        raise UsageError(
            f"llama.cpp computes '{name}' with the activation {known.activations[0]}, and this model has '{activation}', "
            "so it cannot be a GGUF file"
        )
    if not known.untied and not config.get("tie_word_embeddings", True):
        raise UsageError(
            f"llama.cpp reads the output matrix of '{name}' from the embedding, and this model has one of its own "
            "(tie_word_embeddings: false), so it cannot be a GGUF file"
        )
    part = _partial(config)
    if part != 1.0 and not known.partial:
        raise UsageError(
            f"llama.cpp rotates whole heads in '{name}', and this model {part:.0%} of each (partial_rotary_factor), "
            "so it cannot be a GGUF file"
        )
    for switch, usual in SWITCHES.items():
        if config.get(switch, usual) not in (usual, None):
            raise UsageError(
                f"llama.cpp computes '{name}' with {switch}: {usual}, and this model has {config[switch]}, "
                "so it cannot be a GGUF file"
            )


def _sizes(config: Config) -> dict[str, Metadata]:
    hidden, heads = first(config, "hidden_size", "n_embd"), first(config, "num_attention_heads", "n_head")
    found: dict[str, Any] = {
        "context_length": first(config, "max_position_embeddings", "n_positions"),
        "embedding_length": hidden,
        "block_count": first(config, "num_hidden_layers", "n_layer"),
        "attention.head_count": heads,
        "attention.head_count_kv": config.get("num_key_value_heads"),
        "feed_forward_length": first(config, "intermediate_size", "n_inner") or 4 * int(hidden),
        "attention.layer_norm_rms_epsilon": config.get("rms_norm_eps"),
        "attention.layer_norm_epsilon": first(config, "layer_norm_eps", "layer_norm_epsilon"),
    }
    if (dimension := config.get("head_dim")) is not None:
        found["attention.key_length"] = found["attention.value_length"] = dimension
    return {key: value for key, value in found.items() if value is not None}


def _positions(config: Config, known: Architecture) -> dict[str, Metadata]:
    """The rotary encoding's bases and size."""
    base = rope_theta(config, "full_attention")
    if base is None:
        return {}
    found: dict[str, Metadata] = {"rope.freq_base": base}
    local = (config.get("rope_parameters") or {}).get("sliding_attention")
    if local and known.period:
        found["rope.freq_base_swa"] = float(local["rope_theta"])
    if known.partial:
        found["rope.dimension_count"] = int(_head_dim(config) * _partial(config))
    return found


def _softcaps(config: Config) -> dict[str, Metadata]:
    keys = {"attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"}
    return {key: float(config[name]) for name, key in keys.items() if config.get(name)}


def _window(
    name: str, config: Config, known: Architecture, metadata: Mapping[str, Metadata], mended: list[str]
) -> dict[str, Metadata]:
    """The sliding window; where llama.cpp knows none, a context no longer than the window, in which it does nothing."""
    kinds, window = layer_kinds(config), config.get("sliding_window")
    context = int(metadata["context_length"])
    if not window or "sliding_attention" not in kinds:
        return {"attention.sliding_window": context} if known.period else {}
    if known.period:
        if kinds != default_kinds(len(kinds), known.period) or "full_attention" not in kinds:
            raise UsageError(
                f"llama.cpp gives full attention to every {ORDINALS[known.period]} layer of '{name}' and no other, and this "
                f"model to {kinds.count('full_attention')} of {len(kinds)} (layer_types), so it cannot be a GGUF file"
            )
        return {"attention.sliding_window": int(window)}
    if context <= window:
        return {}
    if window < LEAST_WINDOW:
        raise UsageError(
            f"this '{name}' attends to the last {window} tokens only (sliding_window), and llama.cpp knows no window "
            "there, so it cannot be a GGUF file"
        )
    mended.append(
        f"the context length is {window} instead of {context}: llama.cpp knows no sliding window in '{name}', and "
        "within it the window makes no difference"
    )
    return {"context_length": int(window)}


def _query_factor(name: str, config: Config, known: Architecture) -> float:
    """The model's factor of the attention scores over llama.cpp's."""
    scalar = config.get("query_pre_attn_scalar")
    if known.query is None or scalar is None:
        return 1.0
    large = config["num_hidden_layers"] == LARGE_GEMMA[name]
    theirs = config["hidden_size"] // config["num_attention_heads"] if large else _head_dim(config)
    return 1.0 if theirs == scalar else math.sqrt(theirs / scalar)


def layer_kinds(config: Config) -> list[str]:
    """`full_attention` or `sliding_attention` of every layer."""
    layers = int(first(config, "num_hidden_layers", "n_layer"))
    if kinds := config.get("layer_types"):
        return [str(kind) for kind in kinds]
    windowed = config.get("sliding_window") and config.get("use_sliding_window", True)
    return ["sliding_attention" if windowed else "full_attention"] * layers


def default_kinds(layers: int, period: int) -> list[str]:
    """What llama.cpp takes it to be."""
    return ["sliding_attention" if layer % period < period - 1 else "full_attention" for layer in range(layers)]


def rope_theta(config: Config, kind: str) -> float | None:
    """The base of the rotary encoding in layers of a kind; None without one."""
    rope = _rope(config, kind)
    found = rope.get("rope_theta", config.get("rope_theta"))
    return None if found is None else float(found)


def _rope(config: Config, kind: str) -> Config:
    rope: Config = config.get("rope_parameters") or {}
    kinds: Config = rope.get(kind, rope)
    return kinds


def _partial(config: Config) -> float:
    rope = _rope(config, "full_attention")
    found = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    return 1.0 if found is None else float(found)


def _head_dim(config: Config) -> int:
    hidden, heads = first(config, "hidden_size", "n_embd"), first(config, "num_attention_heads", "n_head")
    return int(config.get("head_dim") or hidden // heads)


def first(config: Config, *names: str) -> Any:
    """The first of several keys that is set."""
    return next((value for name in names if (value := config.get(name)) is not None), None)
