"""Models from directories into MLX, and adapters onto models."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.backends.mlx import config as configs
from finetune.backends.mlx.runtime import choose_device, mx, nn, on, tree_map
from finetune.backends.mlx.tokenizer import MlxTokenizer
from finetune.core.errors import StageError, UsageError, first_line
from finetune.models import files


@dataclass(frozen=True)
class Handle:
    """A loaded model with its tokenizer; opaque outside this package."""

    model: Any
    tokenizer: MlxTokenizer
    device: Any


def load_model(
    directory: Path, *, dtype: str | None = None, trust_remote_code: bool = False, mend_weights: bool = True
) -> tuple[Any, configs.Reading]:
    """mlx-lm's model from a directory, in evaluation mode, with its mended config. Nothing is computed yet: MLX reads
    a weight when it is used, so a dry run costs no memory."""
    from mlx_lm.utils import load_model as load

    reading = configs.read(directory, trust_remote_code=trust_remote_code)
    foreign = not configs.stored_for_mlx(directory)
    options = {"get_model_classes": _foreign_classes(mend_weights)} if foreign else {}
    try:
        model, _ = load(
            directory, lazy=True, model_config=reading.changed, trust_remote_code=trust_remote_code, **options
        )
    except (OSError, KeyError, TypeError, RuntimeError) as error:
        raise StageError(f"mlx-lm cannot load the model in {directory}: {first_line(error)}") from error
    except ValueError as error:
        if "trust_remote_code" in str(error):
            raise files.refused_code(directory) from None
        # weights that have no place in mlx-lm's model, or places without weights
        raise UsageError(
            f"mlx-lm's '{reading.config.get('model_type')}' does not fit the model in {directory}: {_brief(error)}"
        ) from error
    if dtype is not None:
        cast(model, dtype)
    return model, reading


def _brief(error: BaseException) -> str:
    lines = [line.strip(" ,.:") for line in str(error).splitlines() if line.strip()]
    return ": ".join(lines[:2])[:200]


def cast(model: Any, dtype: str) -> None:
    """Every floating-point weight as another type."""
    kind = getattr(mx, dtype)
    model.update(tree_map(lambda p: p.astype(kind) if mx.issubdtype(p.dtype, mx.floating) else p, model.parameters()))


def _foreign_classes(mend_weights: bool) -> Any:
    """mlx-lm's classes for a config, with weights mended on their way in from Hugging Face's names."""

    def get(config: dict[str, Any]) -> tuple[Any, Any]:
        model_class, args_class = configs.classes(config)

        class Mended(model_class):  # type: ignore[misc, valid-type]
            def sanitize(self, weights: dict[str, Any]) -> dict[str, Any]:
                # transformers saves GPT-2 under `transformer.`; mlx-lm knows OpenAI's files, which are not.
                if "transformer" not in self:
                    weights = {name.removeprefix("transformer."): value for name, value in weights.items()}
                if hasattr(super(), "sanitize"):
                    weights = super().sanitize(weights)
                if mend_weights and config["model_type"] == "gemma3_text":
                    weights = _with_exact_embedding_scale(weights, config["hidden_size"])
                return weights

        return Mended, args_class

    return get


def embedding_scale_error(hidden_size: int) -> float:
    """What mlx-lm's Gemma 3 scales embeddings by, over what transformers does: it rounds sqrt(hidden_size) to bf16."""
    return float(mx.array(math.sqrt(hidden_size), mx.bfloat16).astype(mx.float32)) / math.sqrt(hidden_size)


def _with_exact_embedding_scale(weights: dict[str, Any], hidden_size: int) -> dict[str, Any]:
    """Gemma 3 weights for embeddings that are too large by a factor: what is added to them grows by the same factor.

    Every reader of the sum normalizes it, so the factor is gone again. In bfloat16 transformers rounds as well.
    """
    factor = embedding_scale_error(hidden_size)
    if factor == 1 or weights["model.embed_tokens.weight"].dtype == mx.bfloat16:
        return weights
    ends = ("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")
    return {name: (1 + value) * factor - 1 if name.endswith(ends) else value for name, value in weights.items()}


def load_for_inference(directory: Path, adapter: Path | None = None, **settings: Any) -> Handle:
    """A handle for `score` and `generate`. Raises UsageError for a setting that MLX does not have."""
    from mlx_lm.utils import dequantize_model

    device = device_of(settings)
    trust = bool(settings.get("trust_remote_code"))
    with on(device):
        model, reading = load_model(directory, dtype=settings.get("dtype"), trust_remote_code=trust)
        if device == mx.cpu and "quantization" in reading.config:
            # The same numbers to rounding; MLX's quantized product has no fast code there (8 tokens/s for 135M).
            model = dequantize_model(model)
        if adapter is not None:
            from finetune.backends.mlx import lora

            lora.attach(model, directory, adapter)
        model.eval()
        mx.eval(model.parameters())
    return Handle(model, MlxTokenizer(directory, trust_remote_code=trust), device)


def device_of(settings: Mapping[str, Any]) -> Any:
    """The device that the settings ask for; what else they may not ask for is refused."""
    if settings.get("attn_implementation"):
        raise UsageError(
            f"model.attn_implementation is '{settings['attn_implementation']}': the mlx backend has one attention of "
            "its own. Leave it out"
        )
    return choose_device(settings.get("device", "auto"))


def linear_modules(model: Any) -> dict[str, Any]:
    """The linear modules by mlx-lm's names."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
