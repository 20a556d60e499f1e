"""Older configurations (`training:`, `dataset:`, `alignment:`, `huggingface:`) read as recipes of today."""

from __future__ import annotations

from pathlib import Path
from typing import Any

FILE_TYPES = ("json", "jsonl", "csv", "parquet")
FIELD_KEYS = {
    "text_field": "text",
    "prompt_field": "prompt",
    "completion_field": "completion",
    "instruction_field": "instruction",
    "input_field": "input",
    "output_field": "output",
    "messages_field": "messages",
    "chosen_field": "chosen",
    "rejected_field": "rejected",
}


OLD_SECTIONS = ("training", "alignment", "dataset", "huggingface", "device")


def is_old_key(option: str) -> bool:
    """Whether `section.key=value` speaks of a section of the older files."""
    return option.partition("=")[0].strip().partition(".")[0] in OLD_SECTIONS


def is_legacy(mapping: dict[str, Any]) -> bool:
    return any(key in mapping for key in ("training", "alignment", "dataset"))


def is_download(mapping: dict[str, Any]) -> bool:
    return "models" in mapping and not is_legacy(mapping)


def migrate(mapping: dict[str, Any]) -> tuple[dict[str, Any], dict[tuple[str, ...], tuple[str, ...]]]:
    """The recipe mapping, of one whose keys have today's names (`recipe.aliases`), and for every new path the old one (so that
    an error can name the user's own line)."""
    new: dict[str, Any] = {}
    origin: dict[tuple[str, ...], tuple[str, ...]] = {}

    def put(path: tuple[str, ...], value: Any, old: tuple[str, ...]) -> None:
        place = new
        for key in path[:-1]:
            place = place.setdefault(key, {})
        place[path[-1]] = value
        origin[path] = old

    sections = {"training": "train", "alignment": "align"}
    is_align = "alignment" in mapping and "training" not in mapping
    section = "align" if is_align else "train"
    data_path: tuple[str, ...] = ("align", "data") if is_align else ("data",)
    for key, value in mapping.items():
        if key in sections and isinstance(value, dict):
            for inner, inner_value in value.items():
                put((sections[key], inner), inner_value, (key, inner))
        elif key == "dataset" and isinstance(value, dict):
            for inner, inner_value in value.items():
                if inner in FIELD_KEYS:
                    put((*data_path, "fields", FIELD_KEYS[inner]), inner_value, ("dataset", inner))
                elif not (inner == "format" and inner_value in FILE_TYPES):
                    put((*data_path, inner), inner_value, ("dataset", inner))
        elif key == "dataset" and isinstance(value, str | list):
            put((*data_path, "path"), value, ("dataset",))
        elif key == "model" and isinstance(value, str):
            put(("model", "path"), value, ("model",))
        elif key == "device":
            put(("model", "device"), value, ("device",))
        elif key == "huggingface" and isinstance(value, dict):
            for inner, inner_value in value.items():
                put(("model", inner), inner_value, ("huggingface", inner))
        elif key == "model" and isinstance(value, dict):
            for inner, inner_value in value.items():
                put(("model", inner), inner_value, ("model", inner))
        else:
            put((key,), value, (key,))
    if is_align:
        new.setdefault("train", None)
    out = new.get(section, {}).get("output_dir") if isinstance(new.get(section), dict) else None
    if isinstance(out, str):
        new.setdefault("output_dir", out)
        new.setdefault("name", "run")
    return new, origin


def downloads(mapping: dict[str, Any], base: Path) -> list[dict[str, Any]]:
    """The downloads a `models:` file asks for: `repo`, `files` (empty for all), `output_dir`, `token`."""
    token = (mapping.get("huggingface") or {}).get("token")
    return [
        {
            "repo": _repo(str(entry["repo"]), base),
            "files": [str(name) for name in entry.get("files") or []],
            "output_dir": str(base / entry["output_dir"]) if entry.get("output_dir") else None,
            "revision": entry.get("revision"),
            "token": token,
        }
        for entry in mapping["models"]
    ]


def _repo(name: str, base: Path) -> str:
    """A directory or file from `base` where there is one; otherwise the name as it is."""
    return str((base / name).resolve()) if name.startswith(".") or (base / name).exists() else name
