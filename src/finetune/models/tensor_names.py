"""Names of stored tensors, without what wrappers of a model put before and into them."""

from __future__ import annotations

import re
from collections.abc import Iterable

# torch.compile, DistributedDataParallel and DataParallel, FSDP, activation checkpointing, DeepSpeed and Fabric.
_WITHIN = re.compile(r"(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")
_BEFORE = re.compile(r"^module\.")
_OLD_NORMS = re.compile(r"(?P<norm>(^|\.)[^.]*(norm|ln)[^.]*)\.(?P<kind>gamma|beta)$", re.IGNORECASE)
_KINDS = {"gamma": "weight", "beta": "bias"}  # TensorFlow's names
PEFT = "base_model.model."


def of_model(names: Iterable[str], *, norms: bool = True) -> dict[str, str]:
    """A model's tensors: the name that each is stored under, and its own. `norms`: whether a normalization's gamma and beta
    are its weight and bias, as in all that transformers knows."""
    own = {name: _bare(name, PEFT).replace(".base_layer.", ".") for name in names}
    return {name: _old_norm(bare) if norms else bare for name, bare in own.items()}


def of_adapter(names: Iterable[str]) -> dict[str, str]:
    """As `of_model`, for PEFT's adapters, whose names begin with `base_model.model.` once."""
    return {name: PEFT + re.sub(r"(\.lora_[A-Za-z_]+)\.default(?=\.|$)", r"\1", _bare(name, PEFT)) for name in names}


def _bare(name: str, *prefixes: str) -> str:
    before = None
    while name != before:  # wrappers are wrapped
        before = name
        name = _BEFORE.sub("", _WITHIN.sub(r"\1", name))
        for prefix in prefixes:
            name = name.removeprefix(prefix)
    return name


def _old_norm(name: str) -> str:
    return _OLD_NORMS.sub(lambda found: f"{found['norm']}.{_KINDS[found['kind'].lower()]}", name)
