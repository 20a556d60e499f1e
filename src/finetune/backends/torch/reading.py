"""What transformers reads in a model directory: prompts and constants, without loading weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError

from finetune.backends import Constant
from finetune.backends.torch.tokenizer import HFTokenizer, read_config
from finetune.core.errors import first_line

# Hugging Face's names of one constant, by architecture.
NAMES = {
    "norm_eps": ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"),
    "intermediate_size": ("intermediate_size", "n_inner"),
}
PLAIN = (
    "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings", "tie_word_embeddings",
)  # fmt: skip


def render(
    model: Path, conversations: Sequence[Sequence[Mapping[str, str]]], *, trust_remote_code: bool = False
) -> list[list[int] | str]:
    """The ids of `apply_chat_template`, or the template's refusal."""
    tokenizer = HFTokenizer(model, trust_remote_code=trust_remote_code).hf
    rendered: list[list[int] | str] = []
    for messages in conversations:
        try:
            ids = tokenizer.apply_chat_template(
                [dict(message) for message in messages], add_generation_prompt=True, tokenize=True, return_dict=False
            )
            rendered.append([int(token) for token in ids])
        except (TemplateError, ValueError) as error:
            rendered.append(first_line(error))
    return rendered


def constants(model: Path, *, trust_remote_code: bool = False) -> dict[str, Constant]:
    """The constants in `config.json`, with transformers' defaults for those that are not in it."""
    config = read_config(model, trust_remote_code=trust_remote_code)
    tokenizer = HFTokenizer(model, trust_remote_code=trust_remote_code)
    found: dict[str, Constant] = {name: getattr(config, name, None) for name in PLAIN}
    for name, candidates in NAMES.items():
        found[name] = next((value for key in candidates if (value := getattr(config, key, None)) is not None), None)
    heads = found["num_attention_heads"]
    if getattr(config, "head_dim", None) is not None:
        found["head_dim"] = config.head_dim
    elif heads:
        found["head_dim"] = config.hidden_size // int(heads)
    found["num_key_value_heads"] = found["num_key_value_heads"] or heads
    found["sliding_window"] = _sliding_window(config)
    found["rope_theta"] = _rope_theta(config)
    found["eos_token_id"] = tokenizer.hf.eos_token_id
    found["bos_token_id"] = tokenizer.hf.bos_token_id
    found["add_bos_token"] = tokenizer.adds_bos
    return {name: value for name, value in found.items() if value is not None}


def _rope_theta(config: Any) -> float | None:
    """The base of the rotary encoding; of the layers with full attention where they differ. None without one."""
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    found = rope.get("rope_theta", getattr(config, "rope_theta", None))
    return None if found is None else float(found)


def _sliding_window(config: Any) -> int | None:
    kinds = getattr(config, "layer_types", None)
    if getattr(config, "use_sliding_window", True) is False or (kinds and "sliding_attention" not in kinds):
        return None
    found = getattr(config, "sliding_window", None)
    return None if found is None else int(found)
