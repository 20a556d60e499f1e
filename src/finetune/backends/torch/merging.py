"""Base plus adapter as one model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from finetune.backends.torch.loading import load_adapter, load_model
from finetune.errors import StageError


def merge(model: Path, adapter: Path, out: Path, **settings: Any) -> Path:
    """Write base + adapter to `out` with the adapter's tokenizer (it carries the training's chat template).

    Raises StageError when the merged weights hold NaN or infinity. `out` appears whole or not at all.
    """
    merged = load_adapter(load_model(model, {**settings, "device": "cpu"}), adapter)
    try:
        merged = merged.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise StageError(f"merging {adapter} failed: {error}") from None
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    merged.save_pretrained(str(partial))
    source = adapter if (adapter / "tokenizer_config.json").is_file() else model
    AutoTokenizer.from_pretrained(str(source), local_files_only=True).save_pretrained(str(partial))
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    return out
