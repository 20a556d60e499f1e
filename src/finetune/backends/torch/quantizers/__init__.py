"""Quantizers, one a file, by the names of their rows in `finetune.recipe.quantizers`.

Each has `loading(dtype, device)`, what transformers' `from_pretrained` is told so that it quantizes as it loads;
`loaded(model)`, the model as it is to compute; `names(model)`, the weights that it holds; `held(parameter)`, how many numbers
and bytes one of them is; `dequantized(model)`, the same model with plain layers, whose weights are the numbers that the
quantized ones stand for; and `rounded(weight)`, a weight quantized and back.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from types import ModuleType
from typing import Any

from finetune.core.errors import MissingError
from finetune.core.install import missing_package
from finetune.recipe.quantizers import quantizer


def chosen(settings: Mapping[str, Any]) -> ModuleType | None:
    """The quantizer that a model is to be loaded with; None for plain weights. Raises MissingError for its package."""
    if not (name := settings.get("quantization")):
        return None
    try:
        return import_module(quantizer(name).reference)
    except ModuleNotFoundError as error:
        raise MissingError(missing_package(error.name or name)) from error
