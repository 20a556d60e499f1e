"""Weights, adapter, tokenizer, licence, model card and checksums in one directory, ready for `hf upload`.

    OUT/config.json  *.safetensors  tokenizer...  adapter/  LICENSE  README.md  manifest.json

Nothing of this machine goes with it: paths become names, training state stays behind.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from finetune import __version__
from finetune.core import schemas
from finetune.core.errors import MissingError, NewerError, StageError, UsageError
from finetune.core.files import digest, read_object, strays, write_json, write_text
from finetune.core.memory import need_disk
from finetune.core.secrets import detector, redacted
from finetune.export import Exported, Source
from finetune.export import card as cards

MANIFEST, README = "manifest.json", "README.md"
ALTHOUGH = "exported_although"  # in a manifest: why the bundle should not have been put out
# Training state, logs and notes: pickles that run code when loaded, and files that name this machine.
_LEFT_OUT = (
    "training_args.bin", "optimizer*", "scheduler*", "rng_state*", "scaler.pt", "trainer_state.json", "*.pt", "*.pth",
    "*.pkl", "*.pickle", "*.lock", "*.log", "*.tmp", "*.partial", "events.jsonl", "report.json", README, MANIFEST,
)  # fmt: skip
_FOLDERS_LEFT_OUT = ("checkpoint-*", "ref", "runs", "logs", "wandb", "__pycache__")
_LICENSES = re.compile(r"(LICEN[SC]E|COPYING)([-_. ].*)?", re.IGNORECASE)
_BINARIES = ("pytorch_model*.bin", "adapter_model*.bin")
_CONFIGS = ("config.json", "*_config.json")
# What a tokenizer learned is no text of ours: tokens may look like paths and like secrets.
_VOCABULARIES = ("tokenizer.json", "vocab.*", "merges.txt", "*.index.json", "added_tokens.json")
_TEXTS = (".json", ".jinja", ".py", ".txt", ".md", ".yaml", ".yml", ".toml", ".cfg")
_PATH_KEYS = ("name_or_path", "_path", "_dir", "_file")
# What `git`, the hub and its client add of their own.
_FOREIGN = (".git", ".cache", ".gitattributes")
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "fake_model.json")


@dataclass(frozen=True)
class _Clean:
    """What stands for places of this machine: the base model's name, and the places known."""

    base: str
    places: tuple[Path, ...]


def rehearse(model: Path, variant: str, *, trust_remote_code: bool = False) -> None:
    """Any model directory with a config can be bundled. Raises MissingError where there is none."""
    if not (model / "config.json").is_file():
        raise MissingError(f"{model} cannot be bundled: it holds no config.json. Get the model again")


def export(source: Source, variant: str, out: Path) -> Exported:
    """Write the bundle into the empty directory `out`; the manifest last.

    Raises MissingError without weights, ResourceError where the disk is too small, StageError for a secret in a file, and
    for a link that leads out of the model's directory.
    """
    files = list(_chosen(source))
    _check(source, files, out)
    base = cards.base_name(source.card.get("base_model"))
    clean = _Clean(base or "", cards.known_places(source.model, source.base, source.adapter, out))
    changed = [said for file, name in files if (said := _place(file, out / name, name, clean))]
    written = out / "LICENSE"
    if source.license_text:
        write_text(written, source.license_text.rstrip() + "\n")
    model_type = read_object(source.model / "config.json").get("model_type")
    card = cards.Card(
        name=source.name,
        base_model=base,
        license=source.license,
        license_file=written.is_file(),
        adapter=source.adapter is not None,
        loadable=model_type != "fake",
        system=source.system,
        trust_remote_code=source.trust_remote_code,
        facts=source.card,
        places=clean.places,
    )
    write_text(out / README, redacted(cards.text(card)))
    _write_manifest(out, {"name": source.name, "base_model": base, "license": source.license, "finetune": __version__})
    return Exported(
        path=out,
        notes=(
            *changed,
            f"{len(files)} files; upload with: hf upload {source.name} <this directory>",
            *(() if source.license else ("the base model's licence is not known; the card says so",)),
        ),
    )


def set_card(
    directory: Path,
    verdicts: Sequence[Mapping[str, Any]] | None,
    marks: Sequence[str] = (),
    although: Sequence[str] = (),
) -> None:
    """Write later verdicts, and what has to be known beside them (`run.outcome.marks`), into the model card of a bundle that
    was put out, and above all what it was put out in spite of (`although`). The manifest gets the card's digest, and says
    that too; what it says of other files stays."""
    readme = directory / README
    places = cards.known_places(directory)
    try:
        stated = schemas.BUNDLE.read(read_object(directory / MANIFEST), directory / MANIFEST)
        text = readme.read_text(encoding="utf-8")
        text = text if verdicts is None else cards.with_verdicts(text, list(verdicts), places, marks)
    except NewerError:
        raise
    except (OSError, StageError, ValueError):
        raise StageError(f"the card or the manifest in {directory} is damaged; export the bundle again") from None
    if although:
        text, stated = cards.with_warning(text, although), {**stated, ALTHOUGH: list(although)}
    write_text(readme, redacted(text))
    stated = {**stated, "files": {**stated["files"], README: _fact(readme)}}
    write_json(directory / MANIFEST, schemas.BUNDLE.written(stated))


def is_bundle(directory: Path) -> bool:
    """Whether a directory is a bundle that was put out: its manifest lists files, which a run's does not."""
    try:
        stated = read_object(directory / MANIFEST)
    except (OSError, StageError):
        return False
    return isinstance(stated.get("files"), dict)


def verify_manifest(directory: Path) -> list[str]:
    """What is wrong with a bundle, one line each: files missing, changed, or in no list. Empty: all is as written."""
    try:
        listed = schemas.BUNDLE.read(read_object(directory / MANIFEST), MANIFEST).get("files")
    except OSError:
        return [f"{MANIFEST}: missing"]
    except NewerError as error:
        return [str(error)]
    except (StageError, ValueError):
        return [f"{MANIFEST}: not readable"]
    if not isinstance(listed, dict) or not listed:
        return [f"{MANIFEST}: lists no files"]
    faults = []
    there = {name: file for name, file in _files(directory) if name != MANIFEST}
    for name, fact in sorted(listed.items()):
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            faults.append(f"{name}: lies outside the bundle")
        elif name not in there:
            faults.append(f"{name}: missing")
        elif not isinstance(fact, dict):
            faults.append(f"{name}: has no digest in {MANIFEST}")
        elif (size := there[name].stat().st_size) != fact.get("size"):
            faults.append(f"{name}: changed ({size} bytes, not {fact.get('size')})")
        elif digest(there[name]) != fact.get("sha256"):
            faults.append(f"{name}: changed (SHA-256 differs)")
    return [*faults, *(f"{name}: not in {MANIFEST}" for name in sorted(set(there) - set(listed)))]


def _chosen(source: Source) -> Iterator[tuple[Path, str]]:
    """(file, its name in the bundle) of everything that goes along."""
    for directory, under in ((source.model, ""), (source.adapter, "adapter/")):
        if directory is None:
            continue
        for name, file in _files(directory):
            if not _left_out(name) and not (source.license_text and _LICENSES.fullmatch(file.name)):
                yield file, under + name


def _left_out(name: str) -> bool:
    *folders, last = name.split("/")
    if any(part.startswith(".") for part in (*folders, last)):
        return True
    if any(fnmatch(folder, pattern) for folder in folders for pattern in _FOLDERS_LEFT_OUT):
        return True
    if any(fnmatch(last, pattern) for pattern in _LEFT_OUT):
        return True
    return last.endswith(".bin") and not any(fnmatch(last, pattern) for pattern in _BINARIES)


def _files(directory: Path) -> Iterator[tuple[str, Path]]:
    """(name relative to the directory, file) of all files below it, sorted."""
    for file in sorted(directory.rglob("*")):
        parts = file.relative_to(directory).parts
        if file.is_file() and parts[0] not in _FOREIGN:
            yield "/".join(parts), file


def _check(source: Source, files: Sequence[tuple[Path, str]], out: Path) -> None:
    rehearse(source.model, "")
    if not any(fnmatch(name, pattern) for _, name in files if "/" not in name for pattern in _WEIGHTS):
        raise MissingError(f"{source.model} holds no weights to bundle. Merge them again with: finetune merge RECIPE")
    for directory in (source.model, *([source.adapter] if source.adapter else [])):
        if led := strays(directory):
            raise StageError(
                f"{directory / led[0]} is a link to a file outside of {directory.name}, which is not shipped: put the file "
                "itself there, or take the link away"
            )
    if out.exists() and any(out.iterdir()):
        raise UsageError(f"{out} is not empty; a bundle is written into an empty directory")
    out.mkdir(parents=True, exist_ok=True)
    need_disk(out, sum(file.stat().st_size for file, _ in files), "the bundle")


def _place(file: Path, target: Path, name: str, clean: _Clean) -> str:
    """Put one file into the bundle; says what was changed in it, if anything."""
    target.parent.mkdir(parents=True, exist_ok=True)
    last = file.name
    if any(fnmatch(last, pattern) for pattern in _CONFIGS):
        stored = read_object(file)
        changed = _cleaned(stored, "", clean)
        if changed != stored:
            write_json(target, changed)
            keys = ", ".join(key for key in stored if stored[key] != changed[key])
            return f"{name}: {keys} named a place on this machine, or a secret"
    if file.suffix in _TEXTS and not any(fnmatch(last, pattern) for pattern in _VOCABULARIES):
        text = file.read_text(encoding="utf-8", errors="replace")
        if found := detector()(text):
            raise StageError(
                f"{file} holds what looks like a token or password ({found}); remove it, then export again"
            )
    shutil.copyfile(file, target)
    return ""


def _cleaned(value: Any, key: str, clean: _Clean) -> Any:
    if isinstance(value, dict):
        return {name: _cleaned(inner, name, clean) for name, inner in value.items()}
    if isinstance(value, list):
        return [_cleaned(inner, key, clean) for inner in value]
    if not isinstance(value, str) or key == "chat_template":  # the model's behaviour, to the letter
        return value
    if key.endswith(_PATH_KEYS) and cards.is_place(value):
        return clean.base if key.endswith("name_or_path") else Path(value).name
    return redacted(cards.without_known(value, clean.places))


def _write_manifest(out: Path, facts: dict[str, Any]) -> None:
    files = {name: _fact(file) for name, file in _files(out) if name != MANIFEST}
    write_json(out / MANIFEST, schemas.BUNDLE.written({**facts, "files": files}))


def _fact(file: Path) -> dict[str, Any]:
    return {"size": file.stat().st_size, "sha256": digest(file)}
