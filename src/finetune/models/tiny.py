"""Tiny random models of several architectures, with a tokenizer trained on the spot: seconds instead of minutes.

A recipe names one as `model: tiny:llama`, or with other sizes as `tiny:llama?hidden_size=128&vocab_size=2000`: for smoke
tests, and for training from scratch. Random weights hardly learn through LoRA (6.07 to 5.29 nats where full training
reaches 1.38), so with LoRA they show that the machinery works on an architecture, not that a model learns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from finetune.core.errors import MissingError, UsageError
from finetune.core.install import missing_package
from finetune.core.lookup import did_you_mean
from finetune.recipe.sections import TINY

VOCAB_SIZE = 512
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_SIZE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
_POSITIONS = {"max_position_embeddings": 512}

# By each architecture's own names, as in its config.json. These are the options that a name may set.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {**_SIZE, **_POSITIONS, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512},
    "qwen2": {**_SIZE, **_POSITIONS, "num_key_value_heads": 2, "tie_word_embeddings": False},
    "gemma": {**_SIZE, **_POSITIONS, "num_key_value_heads": 1, "head_dim": 16},
    "gemma2": {**_SIZE, **_POSITIONS, "num_key_value_heads": 2, "head_dim": 16},
    "gemma3_text": {**_SIZE, **_POSITIONS, "num_key_value_heads": 2, "head_dim": 16},
    "phi": {**_SIZE, **_POSITIONS, "num_key_value_heads": 4},
    "phi3": {**_SIZE, **_POSITIONS, "num_key_value_heads": 4},
    "qwen3": {**_SIZE, **_POSITIONS, "num_key_value_heads": 2, "head_dim": 16},
}

# Constants that no library has for a default, so that one taken in silence is seen; weights large enough to show it.
ODD: dict[str, dict[str, Any]] = {
    "llama": {"rope_theta": 321.0, "rms_norm_eps": 3e-3, "head_dim": 24, "tie_word_embeddings": False, "mlp_bias": False},
    "gpt2": {"layer_norm_epsilon": 3e-2, "n_inner": 96},
    "qwen2": {"rope_theta": 777.0, "rms_norm_eps": 4e-3, "tie_word_embeddings": True},
    "qwen3": {"rope_theta": 432.0, "rms_norm_eps": 2e-2, "head_dim": 24, "tie_word_embeddings": True},
    "gemma": {"rope_theta": 543.0, "rms_norm_eps": 0.7, "head_dim": 24},
    "gemma2": {
        "rope_theta": 654.0, "rms_norm_eps": 0.7, "head_dim": 24, "sliding_window": 8, "query_pre_attn_scalar": 9,
        "final_logit_softcapping": 7.0, "attn_logit_softcapping": 5.0,
    },
    "gemma3_text": {
        "rope_theta": 765.0, "rope_local_base_freq": 321.0, "rms_norm_eps": 0.05, "head_dim": 24, "sliding_window": 8,
        "query_pre_attn_scalar": 20, "num_hidden_layers": 6,  # the sixth has full attention, as in every runtime
    },
    "phi": {"rope_theta": 876.0, "layer_norm_eps": 3e-3, "partial_rotary_factor": 0.5},
    "phi3": {"rope_theta": 987.0, "rms_norm_eps": 6e-3, "sliding_window": 8, "tie_word_embeddings": False},
}  # fmt: skip
ODD_INITIALIZER_RANGE = 0.25


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a name asks for. `values` are the config's; `vocab_size` is the most that the tokenizer may have."""

    architecture: str
    values: Mapping[str, Any]
    vocab_size: int = VOCAB_SIZE
    seed: int = 0

    @property
    def config(self) -> dict[str, Any]:
        """The sizes as in a `config.json`."""
        return {"model_type": self.architecture, "vocab_size": self.vocab_size, **self.values}


def is_name(path: str) -> bool:
    """Whether a model's name asks for a tiny one."""
    return path.startswith(TINY)


def parse(name: str) -> Wanted:
    """`tiny:ARCHITECTURE?key=value&key=value`. Raises UsageError naming the nearest that is known."""
    architecture, _, query = name.removeprefix(TINY).partition("?")
    sizes = dict(_known(architecture))
    more = {"vocab_size": VOCAB_SIZE, "seed": 0}
    for key, text in parse_qsl(query, keep_blank_values=True):
        place = more if key in more else sizes
        if key not in place:
            known = (*sizes, *more)
            raise UsageError(f"{name}: unknown option '{key}'.{did_you_mean(key, known)} Known: {', '.join(known)}.")
        place[key] = _value(name, key, text, place[key])
    return Wanted(architecture=architecture, values=sizes, **more)


def _known(architecture: str) -> dict[str, Any]:
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UsageError(
            f"unknown architecture '{architecture}'.{did_you_mean(architecture, ARCHITECTURES)} Known: {known}."
        )
    return ARCHITECTURES[architecture]


def _value(name: str, key: str, text: str, default: Any) -> int | bool:
    if isinstance(default, bool):
        if text not in ("true", "false"):
            raise UsageError(f"{name}: '{key}' must be true or false, not '{text}'")
        return text == "true"
    least = 0 if key == "seed" else len(SPECIAL) + 256 if key == "vocab_size" else 1  # every byte is a token
    if not text.isascii() or not text.isdigit() or int(text) < least:
        raise UsageError(f"{name}: '{key}' must be a whole number from {least} on, not '{text}'")
    return int(text)


def make(
    directory: Path, architecture: str = "llama", *, texts: Sequence[str] = (), seed: int = 0, odd: bool = False,
    vocab_size: int = VOCAB_SIZE, **changes: Any,
) -> Path:  # fmt: skip
    """Write a random model of an architecture, and a tokenizer trained on `texts`, into `directory`; return it.

    Weights are float32 from `seed`. The chat template is ChatML, its end-of-turn token `<|im_end|>`. `odd` takes the
    constants of ODD, and `changes` whatever else of the config. Raises UsageError for sizes that make no model.
    """
    sizes = _known(architecture)
    try:
        import torch
        from huggingface_hub.errors import StrictDataclassError
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.utils import logging

        words = tokenizer(texts, vocab_size=vocab_size)
    except ModuleNotFoundError as error:
        raise MissingError(missing_package(error.name or "torch")) from error
    logging.disable_progress_bar()
    pad, eos = words.pad_token_id, words.eos_token_id
    values = {**sizes, **({**ODD[architecture], "initializer_range": ODD_INITIALIZER_RANGE} if odd else {}), **changes}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            config = AutoConfig.for_model(
                architecture, vocab_size=len(words), pad_token_id=pad, bos_token_id=pad, eos_token_id=eos, **values
            )
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            model.eval()(input_ids=torch.tensor([[eos, eos]]))  # some sizes fail only when the model is used
        except (StrictDataclassError, ValueError, RuntimeError, ZeroDivisionError) as error:
            why = " ".join(str(error).split())
            raise UsageError(f"no {architecture} model can have these sizes: {values}. {why}") from error
        if odd:  # biases start at zero and norms at one, where leaving one out would change nothing
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.data += 0.2 * torch.randn_like(parameter)
    model.generation_config.eos_token_id = eos
    model.save_pretrained(str(directory))
    words.save_pretrained(str(directory))
    return directory


def tokenizer(texts: Sequence[str] = (), *, vocab_size: int = VOCAB_SIZE) -> Any:
    """A transformers tokenizer of at most `vocab_size` tokens, trained on `texts`: byte-level BPE with GPT-2's
    pre-tokenizer, which llama.cpp's converter recognises, and ChatML."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts or ["the quick brown fox jumps over the lazy dog"], trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )
    made.chat_template = CHATML
    return made
