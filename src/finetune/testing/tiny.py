"""Tiny random models of several architectures, with a tokenizer trained on the spot: seconds instead of minutes.

Random weights hardly learn through LoRA (6.07 to 5.29 nats where full training reaches 1.38), so they show that the
machinery works on an architecture; that a model learns facts is shown on the embedded one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from finetune.errors import UsageError
from finetune.lookup import did_you_mean

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SIZE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}


def _config(model_type: str, **values: Any) -> Callable[..., Any]:
    def make(vocab_size: int, **changes: Any) -> Any:
        from transformers import AutoConfig

        sizes = {"vocab_size": vocab_size, "max_position_embeddings": 512, **values}
        return AutoConfig.for_model(model_type, **{**sizes, **changes})

    return make


ARCHITECTURES: dict[str, Callable[..., Any]] = {
    "llama": _config("llama", **SIZE, num_key_value_heads=2, tie_word_embeddings=True),
    "gpt2": _config("gpt2", n_embd=64, n_layer=2, n_head=4, n_positions=512),
    "qwen2": _config("qwen2", **SIZE, num_key_value_heads=2, tie_word_embeddings=False),
    "gemma": _config("gemma", **SIZE, num_key_value_heads=1, head_dim=16),
    "gemma2": _config("gemma2", **SIZE, num_key_value_heads=2, head_dim=16),
    "gemma3_text": _config("gemma3_text", **SIZE, num_key_value_heads=2, head_dim=16),
    "phi": _config("phi", **SIZE, num_key_value_heads=4),
    "phi3": _config("phi3", **SIZE, num_key_value_heads=4),
    "qwen3": _config("qwen3", **SIZE, num_key_value_heads=2, head_dim=16),
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


def make(
    directory: Path, architecture: str = "llama", *, texts: Sequence[str] = (), seed: int = 0, odd: bool = False,
    **changes: Any,
) -> Path:  # fmt: skip
    """Write a random model of an architecture, and a tokenizer trained on `texts`, into `directory`; return it.

    Weights are float32 from `seed`. The chat template is ChatML, its end-of-turn token `<|im_end|>`. `odd` takes the
    constants of ODD, and `changes` whatever else of the config.
    """
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UsageError(
            f"unknown architecture '{architecture}'.{did_you_mean(architecture, ARCHITECTURES)} Known: {known}."
        )
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = _tokenizer(texts)
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    values = {**({**ODD[architecture], "initializer_range": ODD_INITIALIZER_RANGE} if odd else {}), **changes}
    config = ARCHITECTURES[architecture](len(tokenizer), pad_token_id=pad, bos_token_id=pad, eos_token_id=eos, **values)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        if odd:  # biases start at zero and norms at one, where leaving one out would change nothing
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.data += 0.2 * torch.randn_like(parameter)
    model.generation_config.eos_token_id = eos
    model.save_pretrained(str(directory))
    tokenizer.save_pretrained(str(directory))
    return directory


def _tokenizer(texts: Sequence[str]) -> Any:
    """Byte-level BPE with GPT-2's pre-tokenizer, which llama.cpp's converter recognises."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts or ["the quick brown fox jumps over the lazy dog"], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = CHATML
    return tokenizer
