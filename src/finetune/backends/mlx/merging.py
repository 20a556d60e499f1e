"""Base plus adapter as one Hugging Face model directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune.backends.mlx import layout, lora
from finetune.backends.mlx.runtime import mx, on
from finetune.core.errors import StageError
from finetune.core.files import read_object


def merge(model: Path, adapter: Path, out: Path, **settings: Any) -> Path:
    """Write base + adapter to `out` with the adapter's tokenizer (it carries the training's chat template).

    Weights are added in float32 and stored in the settings' type, NaN and infinity too: it is for the checks to refuse
    what was trained. Raises StageError when the adapter fits no weight.
    """
    layout.require_hugging_face(model, "merge into")
    config, matrices = lora.read(adapter)
    model_type = read_object(model / "config.json").get("model_type", "")
    dtype = settings.get("dtype")
    merged: set[str] = set()
    known = {name: name for name in layout.stored_names(model)}
    bare = {name.removeprefix("transformer."): name for name in known}  # see layout.hugging_face_modules

    deltas = {}
    for name in {name for name, _ in matrices}:
        weight = f"{name}.weight"
        target = known.get(weight) or bare.get(weight.removeprefix("transformer."))
        if target is None:
            raise StageError(f"the adapter in {adapter} does not fit the model in {model}, which has no {weight}")
        deltas[target] = name

    def change(name: str, weight: Any) -> Any:
        floating = mx.issubdtype(weight.dtype, mx.floating)
        kind = getattr(mx, dtype) if dtype and floating else weight.dtype
        if name not in deltas:
            return weight.astype(kind)
        module = deltas[name]
        a, b = (matrices[module, letter].astype(mx.float32) for letter in "AB")
        delta = lora.scale(config, module) * (b @ a)
        if layout.inputs_first(model_type, name):
            delta = delta.T
        if delta.shape != weight.shape:
            raise StageError(f"the adapter in {adapter} does not fit the model in {model}: {module} has other sizes")
        merged.add(name)
        return (weight.astype(mx.float32) + delta).astype(kind)

    source = adapter if (adapter / "tokenizer_config.json").is_file() else model
    with on(mx.cpu):
        layout.rewrite(
            model, out, change, tokenizer=source, dtype=dtype, trust_remote_code=bool(settings.get("trust_remote_code"))
        )
    assert merged == deltas.keys()
    return out
