"""Get the model, and write down what it is; and the older `models:` files, which only download."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from finetune.backends import get
from finetune.core import hub
from finetune.core.console import say
from finetune.core.errors import MissingError, StageError, UsageError
from finetune.core.files import copy, digest, read_object, write_text
from finetune.data import secrecy
from finetune.models import files as modelfiles
from finetune.models import licenses, sources, weights
from finetune.recipe import Recipe
from finetune.run import Run, evidence, layout
from finetune.run.base import files_of
from finetune.run.records.trained import Fetched, FileFacts
from finetune.stages import Result

_TOKENIZER_PARTS = (
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
)
_STATED = ("config.json", "*_config.json", "*.jinja")
_WEIGHTS = ("pytorch_model.bin", "model.safetensors", "tf_model.h5", "flax_model.msgpack")
# Without these a tokenizer.json does not know its end-of-turn token or its chat template.
_COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json")


def run(recipe: Recipe, run: Run) -> Result:
    """Write `fetch/model.json`: `path` as asked for, `kind`, `base` and `adapter` (directories), and for every file
    its `size` in bytes and `sha256`. `license` is the SPDX id or None, `license_source` where it was found, and
    `license_text` the file of its words (`fetch/LICENSE`, inside the run) or None."""
    begin = time.perf_counter()
    found = sources.resolve(recipe.model, recipe.data)
    seconds = time.perf_counter() - begin
    _check_backend(recipe, found.base)
    _check_code(recipe, found.base)
    for place in filter(None, (found.base, found.adapter)):
        _refuse_secrets(place)
    facts = _facts(found.base)
    named = recipe.model.base_model if found.adapter else recipe.model.path
    _refuse_not_finite(recipe, found)
    license = licenses.find(found.base, found.kind, path=named)
    if found.adapter is not None:
        license = licenses.combine(license, licenses.of_directory(found.adapter))
    if license.text is not None:
        secrecy.refuse_text(license.text, "the model's licence")
    words = _write_license(license, run)
    known: Fetched = {
        "path": recipe.model.path,
        "kind": found.kind,
        "base": str(found.base),
        "adapter": str(found.adapter) if found.adapter else None,
        "files": facts,
        "adapter_files": _facts(found.adapter) if found.adapter else {},
        "license": license.spdx,
        "license_source": license.source,
        "license_text": words.relative_to(run.path).as_posix() if words else None,
    }
    if found.sources:
        known["converted_from"] = found.sources
    target = evidence.write(run, layout.MODEL, known)
    metrics: dict[str, Any] = {"bytes": sum(fact["size"] for fact in facts.values()), "seconds": round(seconds, 3)}
    if (parameters := weights.count_parameters(found.base)) is not None:
        metrics["parameters"] = parameters
    return {"metrics": metrics, "artifacts": [target, *([words] if words else [])], "notes": list(found.notes)}


def _refuse_not_finite(recipe: Recipe, found: sources.Resolved) -> None:
    """Raise StageError where a model that is to be trained holds NaN or infinity: now, not after the first step."""
    if all(section is None or section.on_nan == "ignore" for section in (recipe.train, recipe.align)):
        return
    for place in filter(None, (found.base, found.adapter)):
        if not list(place.glob("*.safetensors")) and recipe.backend != "fake":
            continue  # whoever loads it says what is missing
        odd = [name for name, facts in get(recipe.backend).tensors(place).items() if not math.isfinite(facts.norm)]
        if odd:
            raise StageError(
                f"{place} holds NaN or infinity in {len(odd)} of its tensors (first: {odd[0]}), and nothing can be trained on "
                "them. Get the model again, or set on_nan: ignore in 'train' (and 'align') to see what comes of it"
            )


def _refuse_secrets(model: Path) -> None:
    """Raise UsageError for a secret in a model's path, or in a file of it that goes into the run to the letter. What its
    tokenizer learned is left out: tokens may look like secrets."""
    secrecy.refuse_path(model, "the model")
    for pattern in _STATED:
        for file in sorted(model.glob(pattern)):
            secrecy.refuse_text(file.read_text(encoding="utf-8", errors="replace"), str(file))


def _write_license(license: licenses.License, run: Run) -> Path | None:
    """The file of the licence's words; one left by an earlier model is removed."""
    file = run.path / "fetch" / "LICENSE"
    file.unlink(missing_ok=True)
    if license.text is None:
        return None
    write_text(file, license.text.rstrip() + "\n")
    return file


def _check_backend(recipe: Recipe, base: Path) -> None:
    file = base / "config.json"
    if not file.is_file():
        raise MissingError(f"{base} holds no config.json")
    is_fake = read_object(file).get("model_type") == "fake"
    if is_fake != (recipe.backend == "fake"):
        other = (
            "needs a directory made for it" if recipe.backend == "fake" else "cannot load a model of the fake backend"
        )
        raise UsageError(f"backend '{recipe.backend}' {other}, and model.path is {recipe.model.path}")


def _check_code(recipe: Recipe, base: Path) -> None:
    """Raise UsageError for a model that needs code of its own, where that is not trusted: now, not after the data."""
    if modelfiles.code(base):
        get(recipe.backend).constants(base, trust_remote_code=recipe.model.trust_remote_code)


def _facts(directory: Path) -> dict[str, FileFacts]:
    return {file.name: {"size": file.stat().st_size, "sha256": digest(file)} for file in files_of(directory)}


# -- the older download files ------------------------------------------------------------------------------------------


def download(entry: dict[str, Any]) -> Path:
    """Carry out one entry of a `models:` file, and return the directory that the files are in.

    `repo` is a hub id, an embedded name, a directory or a GGUF file; `files` (all when empty) go to `output_dir` (the
    hub's cache when empty). A file that is there in another format only is substituted, with a note.
    """
    repo, listed, revision, token = entry["repo"], entry["files"], entry.get("revision"), entry.get("token")
    into = Path(entry["output_dir"]).expanduser().resolve() if entry.get("output_dir") else None
    if sources.kind(repo) == "hub":
        return _from_hub(repo, listed, into, revision, token)
    source = sources.directory(repo)
    if into is None or into == source:
        choose(listed, [file.name for file in files_of(source)], repo)
        return source
    names = choose(listed, [file.name for file in files_of(source)], repo)
    hub.check_space(into, sum((source / name).stat().st_size for name in names if not (into / name).is_file()))
    into.mkdir(parents=True, exist_ok=True)
    for name in names:
        (into / name).parent.mkdir(parents=True, exist_ok=True)
        copy(source / name, into / name)
    return into


def _from_hub(repo: str, listed: list[str], into: Path | None, revision: str | None, token: str | None) -> Path:
    if not listed:
        return hub.snapshot(sources.hub_id(repo), revision=revision, token=token, into=into)
    try:
        names = choose(listed, hub.names(sources.hub_id(repo), revision=revision, token=token), repo)
        return hub.files(repo, names, into, revision=revision, token=token)
    except MissingError as error:
        if into is None or not all((into / name).is_file() for name in listed):
            raise
        say(f"note: {error}; using the files that are in {into} already")
        return into


def choose(listed: Iterable[str], there: Collection[str], repo: str) -> list[str]:
    """The names to fetch for those listed (for all when none is), out of those that are there, each once.

    Raises MissingError naming every file that nothing stands in for.
    """
    chosen: list[str] = []
    absent: list[str] = []
    for name in listed or there:
        stand_ins = [name] if name in there else _stand_ins(name, there)
        if not stand_ins:
            absent.append(name)
        elif stand_ins != [name]:
            say(f"note: {repo} has no {name}; taking {', '.join(stand_ins)} instead")
        chosen += stand_ins
    if absent:
        raise MissingError(f"{repo} has no {', '.join(absent)}. It has: {', '.join(sorted(there))}")
    if "tokenizer.json" in chosen:
        chosen += [name for name in _COMPANIONS if name in there]
    return list(dict.fromkeys(chosen))


def _stand_ins(name: str, there: Collection[str]) -> list[str]:
    """What holds the same in another format."""
    if name in _WEIGHTS:
        shards = sorted(other for other in there if other.startswith("model-") and other.endswith(".safetensors"))
        if shards and "model.safetensors.index.json" in there:
            return ["model.safetensors.index.json", *shards]
        return next(([other] for other in ("model.safetensors", "pytorch_model.bin") if other in there), [])
    if name in _TOKENIZER_PARTS and "tokenizer.json" in there:
        return ["tokenizer.json"]
    return []
