"""How what is missing is installed: the name of the distribution, and the extra that brings a package."""

from __future__ import annotations

DISTRIBUTION = "finetune-proof"  # on PyPI, where `finetune` is another project; it is imported as `finetune`

# The extra that brings a package by its import name; the others come with torch's.
EXTRAS = {
    "pyarrow": "parquet",
    **dict.fromkeys(("convert_hf_to_gguf", "conversion", "cyllama", "xllamacpp"), "gguf"),
    **dict.fromkeys(("mlx", "mlx_lm"), "mlx"),
    **dict.fromkeys(("fastapi", "starlette", "uvicorn", "openai", "httpx2"), "serve"),
}


def install(*extras: str) -> str:
    """The command that installs this package with some extras."""
    return f"pip install '{DISTRIBUTION}[{','.join(extras)}]'" if extras else f"pip install {DISTRIBUTION}"


def missing_package(name: str) -> str:
    """The message for a Python package, by its import name, that is not installed."""
    package = name.partition(".")[0]
    return f"the Python package '{package}' is not installed. Install it with: {install(EXTRAS.get(package, 'torch'))}"
