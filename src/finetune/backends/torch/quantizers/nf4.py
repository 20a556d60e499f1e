"""bitsandbytes' 4-bit NormalFloat (NF4): 16 values, at the quantiles of a normal distribution, times a scale for each 64
weights (https://arxiv.org/abs/2305.14314). The scales stay float32: quantizing them too saves 0.4 bits a weight."""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit
from transformers import BitsAndBytesConfig

GROUP = 64


def loading(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Keyword arguments of `from_pretrained`: linear layers but the output head are quantized, and compute in `dtype`."""
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return {"quantization_config": config, "device_map": {"": str(device)}}


def loaded(model: Any) -> Any:
    """`model`, made to compute as it was asked to: where a CPU has bfloat16 of its own (AVX-512), bitsandbytes takes that for
    every answer, whatever the type, and answers then differ from those of the weights that were trained (3.5e-5 nats)."""
    for module in model.modules():
        if isinstance(module, Linear4bit) and module.compute_dtype != torch.bfloat16:
            module.support_avx512bf16_for_cpu = False
    return model


def names(model: Any) -> list[str]:
    """The names of the weights that are quantized."""
    return [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Linear4bit)]


def held(parameter: torch.nn.Parameter) -> tuple[int, int] | None:
    """(numbers, bytes with their scales) of a quantized weight; None for a plain one."""
    state = getattr(parameter, "quant_state", None)
    return None if state is None else (state.shape.numel(), parameter.nbytes + state.absmax.nbytes)


def dequantized(model: Any) -> Any:
    """`model`, changed in its place: transformers' own `dequantize` rounds to bfloat16 on its way."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear4bit):
            model.set_submodule(name, _plain(module))
    model.hf_quantizer, model.is_quantized, model.is_loaded_in_4bit = None, False, False
    del model.config.quantization_config
    return model


def _plain(module: Linear4bit) -> torch.nn.Linear:
    weight = dequantize_4bit(module.weight.data, module.weight.quant_state).to(module.compute_dtype)
    made = torch.nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
    made.weight = torch.nn.Parameter(weight, requires_grad=False)
    made.bias = module.bias
    return made


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """A weight quantized and back, in float32."""
    packed, state = quantize_4bit(weight.float().contiguous(), quant_type="nf4", blocksize=GROUP)
    found: torch.Tensor = dequantize_4bit(packed, state)
    return found
