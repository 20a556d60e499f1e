"""Under which licence a model may be used: found beside its weights, never guessed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.core.cache import cache_dir
from finetune.core.errors import RecipeError, StageError
from finetune.models import gguf_header
from finetune.models import sources as models
from finetune.recipe import yaml

TEXTS = Path(__file__).parent / "license_texts"
# The hub writes SPDX ids in lower case; ids of its own, as `llama3.2` or `gemma`, are kept as they are.
SPDX = {
    name.lower(): name
    for name in (
        "AFL-3.0", "AGPL-3.0", "Apache-2.0", "Artistic-2.0", "BSD-2-Clause", "BSD-3-Clause", "BSD-3-Clause-Clear",
        "BSL-1.0", "CC-BY-2.0", "CC-BY-2.5", "CC-BY-3.0", "CC-BY-4.0", "CC-BY-NC-2.0", "CC-BY-NC-3.0", "CC-BY-NC-4.0",
        "CC-BY-NC-ND-3.0", "CC-BY-NC-ND-4.0", "CC-BY-NC-SA-2.0", "CC-BY-NC-SA-3.0", "CC-BY-NC-SA-4.0", "CC-BY-ND-4.0",
        "CC-BY-SA-3.0", "CC-BY-SA-4.0", "CC0-1.0", "ECL-2.0", "EPL-1.0", "EPL-2.0", "EUPL-1.1", "GFDL", "GPL-2.0",
        "GPL-3.0", "ISC", "LGPL-2.1", "LGPL-3.0", "MIT", "MPL-2.0", "MS-PL", "NCSA", "OFL-1.1", "OSL-3.0", "PDDL",
        "PostgreSQL", "Unlicense", "WTFPL", "Zlib",
    )
}  # fmt: skip
# Further ids that the hub knows: https://huggingface.co/docs/hub/repositories-licenses
HUB_IDS = {*SPDX} | {
    "bigcode-openrail-m", "bigscience-bloom-rail-1.0", "bigscience-openrail-m", "bsd", "c-uda", "cc",
    "creativeml-openrail-m", "deepfloyd-if-license", "gemma", "gpl", "lgpl", "llama2", "llama3", "llama3.1", "llama3.2",
    "llama3.3", "llama4", "openrail", "openrail++",
}  # fmt: skip
_NAMELESS = ("", "other", "unknown", "none")
_FILES = re.compile(r"(LICEN[SC]E|COPYING|NOTICE)([-_. ].*)?", re.IGNORECASE)
_LARGEST = 1_000_000  # bytes; a longer file is no licence


@dataclass(frozen=True, kw_only=True)
class License:
    """`spdx` is the SPDX id, or the hub's own id where SPDX has none; `text` the words of the licence, notices
    included; `source` says where both were found. What is not known is None."""

    spdx: str | None = None
    text: str | None = None
    source: str = "not stated"


def find(base: Path, kind: str, *, path: str | None = None) -> License:
    """The licence of the model in the directory `base` (or GGUF file), of that kind (see `models.kind`).

    `path` is the model as the recipe names it: a GGUF file says what its unpacked directory does not.
    """
    for model in models.EMBEDDED.values():
        if model.license and _is_embedded(base, model, kind):
            return License(spdx=model.license, text=text_of(model.license), source=f"the package {model.package}")
    gguf = next((place for place in (base, Path(path or "").expanduser()) if place.is_file()), None)
    if gguf is not None:
        return _of_gguf(gguf)
    return of_directory(base) if base.is_dir() else License()


def of_directory(directory: Path) -> License:
    """What README.md states in its front matter, with the words of the licence files. Two that disagree say nothing."""
    stated = _stated(directory / "README.md")
    files = [file for file in sorted(directory.iterdir()) if _FILES.fullmatch(file.name) and file.is_file()]
    texts = {file.name: text.strip() for file in files if (text := _read(file)).strip()}
    recognised = sorted({known for text in texts.values() if (known := recognise(text))})
    name = stated or (recognised[0] if len(recognised) == 1 else None)
    sources = [*(["README.md"] if stated else []), *texts]
    if stated and recognised and stated not in recognised:
        where = f"README.md says {stated}, the licence file is {' and '.join(recognised)}"
        return License(text=_joined(texts), source=where)
    if name is None and not texts:
        return License()
    return License(spdx=name, text=_joined(texts) or text_of(name), source=" and ".join(sources))


def combine(base: License, added: License) -> License:
    """The licence of what is made from two parts, as an adapter folded into its base: both, where they differ.

    An addition that states none leaves the base's.
    """
    if added.spdx in (None, base.spdx) and added.text in (None, base.text):
        return base
    names = sorted({name for name in (base.spdx, added.spdx) if name})
    known = base.spdx is not None and (added.spdx is not None or added.text is None)
    texts = dict.fromkeys(text for text in (base.text, added.text) if text)
    source = f"base: {base.source}; adapter: {added.source}"
    return License(spdx=" AND ".join(names) if known else None, text="\n\n".join(texts) or None, source=source)


def identifier(name: Any) -> str | None:
    """A licence's name as SPDX writes it; None for one that says nothing, as the hub's `other`."""
    text = name.strip() if isinstance(name, str) else ""
    return None if text.lower() in _NAMELESS else SPDX.get(text.lower(), text)


def text_of(spdx: str | None) -> str | None:
    """The words of a licence that are the same whoever grants it; None where they name the grantor, or are not here."""
    file = TEXTS / f"{spdx}.txt"
    return file.read_text(encoding="utf-8") if spdx == "Apache-2.0" else None


def recognise(text: str) -> str | None:
    """The SPDX id of a licence's text, where it is word for word one of those shipped here."""
    words = _words(text)
    for file in sorted(TEXTS.glob("*.txt")):
        # Between the title, the grantor's line above it and the appendix below, the terms themselves.
        terms = _words(file.read_text(encoding="utf-8"))
        first, last = _TERMS[file.stem]
        begin, end = terms.index(first), terms.index(last) + len(last)
        if terms[begin:end] in words:
            return file.stem
    return None


_TERMS = {
    "Apache-2.0": ("terms and conditions for use, reproduction", "end of terms and conditions"),
    "MIT": ("permission is hereby granted", "or other dealings in the software."),
}


def _words(text: str) -> str:
    return " ".join(text.lower().replace("\u201c", '"').replace("\u201d", '"').split())


def _is_embedded(base: Path, model: models.Embedded, kind: str) -> bool:
    """Whether `base` is an embedded model's own file, or the directory that `models.dequantized` made of it."""
    stem = Path(model.file).stem
    if base.name == model.file and kind == "embedded":
        return True
    return base.name.startswith(f"{stem}-{model.sha256[:16]}-") and base.parent == cache_dir() / "dequantized"


def _stated(readme: Path) -> str | None:
    front = front_matter(readme)
    return identifier(front.get("license")) or identifier(front.get("license_name"))


def front_matter(readme: Path) -> Mapping[str, Any]:
    """The YAML between the two `---` lines that a model card starts with; empty where there is none."""
    found = re.match(r"\ufeff?---\r?\n(.*?)\r?\n---\s*(\r?\n|$)", _read(readme), re.DOTALL)
    if found is None:
        return {}
    try:
        value = yaml.parse(found.group(1), readme.name)[0]
    except RecipeError:
        return {}
    return value if isinstance(value, dict) else {}


def _read(file: Path) -> str:
    if not file.is_file() or file.stat().st_size > _LARGEST:
        return ""
    return file.read_text(encoding="utf-8", errors="replace")


def _joined(texts: Mapping[str, str]) -> str | None:
    if len(texts) < 2:
        return next(iter(texts.values()), None)
    return "\n\n".join(f"=== {name} ===\n\n{text}" for name, text in texts.items())


# -- GGUF --------------------------------------------------------------------------------------------------------------

_KEYS = ("general.license", "general.license.name")


def _of_gguf(file: Path) -> License:
    try:
        found = gguf_header.read(file, before="tokenizer.")
    except StageError:  # damaged: loading it says so, and better
        found = {}
    for key in _KEYS:
        if name := identifier(found.get(key)):
            return License(spdx=name, text=text_of(name), source=f"{key} in the GGUF file")
    return License()
