"""From YAML to a Recipe and back."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from finetune.core import schemas
from finetune.core.errors import MissingError, RecipeError, UsageError
from finetune.core.secrets import detector, holds_secret, looks_secret, redact, remember
from finetune.core.secrets.shapes import has_password
from finetune.recipe import aliases, legacy, profiles, yaml
from finetune.recipe.faults import TOKEN_PATH, Lines, describe, place
from finetune.recipe.limits import DEPTH
from finetune.recipe.model import Recipe

_REFERENCE = re.compile(r"(\$?)\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")
_PATH_KEYS = (
    ("data", "path"),
    ("data", "eval_path"),
    ("align", "data", "path"),
    ("align", "data", "eval_path"),
    ("template", "path"),
    ("evaluate", "probes"),
    ("evaluate", "controls"),
    ("evaluate", "unseen"),
    ("evaluate", "heldout"),
    ("output_dir",),
    ("train", "output_dir"),
    ("align", "output_dir"),
)


def read_mapping(path: str | Path) -> tuple[dict[str, Any], Lines]:
    """The mapping in a YAML file and the line of every key in it."""
    file = Path(path)
    if not file.is_file():
        raise MissingError(f"no recipe at {file}. Write one with: finetune init {file.name}")
    value, lines = yaml.read(file)
    if not isinstance(value, dict):
        raise RecipeError(f"{file} is not a recipe:", [f"{file}:1: expected 'key: value' lines"])
    return value, {**lines}


def load(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe in a YAML file, with `overrides` (`"train.max_steps=1"`) laid on it.

    Relative paths become absolute, from the recipe's own directory. Raises RecipeError with every fault,
    NewerError for a recipe of a later version.
    """
    mapping, lines = read_mapping(path)
    return load_mapping(mapping, overrides, source=str(path), lines=lines, base=Path(path).resolve().parent)


def load_mapping(
    mapping: dict[str, Any],
    overrides: Iterable[str] = (),
    *,
    source: str = "recipe",
    lines: Lines | None = None,
    base: Path | None = None,
) -> Recipe:
    """A recipe from a mapping, as `load`, resolving relative paths against `base` (kept as they are when None)."""
    lines, options, faults = dict(lines or {}), list(overrides), list[str]()
    mapping = aliases.apply(_of_today(mapping, source, lines, faults), source, lines, faults)
    if legacy.is_legacy(mapping):
        old = [text for text in options if legacy.is_old_key(text)]
        options = [text for text in options if text not in old]
        mapping, origin = legacy.migrate(_override(mapping, old, lines, faults))
        lines |= {
            new + place[len(before) :]: line
            for new, before in origin.items()
            for place, line in list(lines.items())
            if place[: len(before)] == before
        }
    mapping = _expand(mapping, (), source, lines, faults)
    mapping = _whole_model(_override(_whole_model(mapping), options, lines, faults))
    mapping = profiles.apply(mapping)
    if base is not None:
        for keys in _PATH_KEYS:
            _resolve(mapping, keys, base)
        _resolve_model(mapping, base)
    model = mapping.get("model")
    if isinstance(model, dict) and isinstance(model.get("token"), str):
        _remember(model["token"], place(source, TOKEN_PATH, lines))
    faults += _secrets_in(mapping, (), source, lines)
    try:
        recipe = Recipe.model_validate(mapping)
    except ValidationError as error:
        faults += describe(error, source, lines, Recipe)
    if faults:
        raise RecipeError(f"{source} has {len(faults)} fault{'s' if len(faults) > 1 else ''}:", faults)
    return recipe


def load_downloads(path: str | Path) -> list[dict[str, Any]]:
    """The downloads that a `models:` file asks for, as `legacy.downloads`. Raises RecipeError with every fault."""
    mapping, lines = read_mapping(path)
    source, faults = str(path), list[str]()
    models = mapping["models"]
    if not isinstance(models, list) or not models:
        faults.append(f"{place(source, ('models',), lines)}: expected a list of downloads, each with a 'repo'")
    else:
        for index, entry in enumerate(models):
            if not isinstance(entry, dict) or not isinstance(entry.get("repo"), str):
                faults.append(f"{place(source, ('models', index), lines)}: expected 'repo: NAME'")
    section = mapping.get("huggingface")
    token = section.get("token") if isinstance(section, dict) else None
    expanded = {
        "models": _expand(models, ("models",), source, lines, faults),
        "huggingface": {"token": _expand(token, TOKEN_PATH, source, lines, faults)},
    }
    faults += _secrets_in(expanded["models"], ("models",), source, lines)
    if faults:
        raise RecipeError(f"{source} has {len(faults)} fault{'s' if len(faults) > 1 else ''}:", faults)
    return legacy.downloads(expanded, Path(path).resolve().parent)


def dump(recipe: Recipe, *, defaults: bool = False) -> str:
    """The recipe as YAML that `load` reads back to an equal recipe, its schema number first. A token becomes `${HF_TOKEN}`,
    never itself."""
    mapping = _escape(recipe.model_dump(mode="json", exclude_unset=not defaults))
    if recipe.model.token is not None:
        mapping["model"]["token"] = "${HF_TOKEN}"
    return yaml.write(schemas.RECIPE.written(mapping))


def says_the_same(stored: str, text: str) -> bool:
    """Whether two dumped recipes say the same, whatever their schema numbers. Raises NewerError for one of a later version."""
    said: list[Any] = []
    for each in (stored, text):
        try:
            value, lines = yaml.parse(each, "recipe")
        except RecipeError:
            return False
        said.append(_of_today(value, "recipe", {**lines}, []) if isinstance(value, dict) else value)
    return bool(said[0] == said[1])


def _of_today(mapping: dict[str, Any], source: str, lines: Lines, faults: list[str]) -> dict[str, Any]:
    """A recipe as this version writes it, without its schema number. Raises NewerError for one of a later version."""
    try:
        mapping = schemas.RECIPE.read(mapping, source)
    except ValueError as error:
        faults.append(f"{place(source, (schemas.KEY,), lines)}: {error}")
    return {key: value for key, value in mapping.items() if key != schemas.KEY}


def _override(mapping: dict[str, Any], overrides: Iterable[str], lines: Lines, faults: list[str]) -> dict[str, Any]:
    for text in overrides:
        dotted, equals, value = text.partition("=")
        keys = tuple(dotted.strip().split("."))
        if not equals or not all(keys) or len(keys) > DEPTH:
            raise UsageError(f"--set {redact(text)}: expected section.key=value, as in --set train.max_steps=1")
        layer: Any = yaml.scalar(value, f"--set {dotted}")
        if keys == TOKEN_PATH:
            layer = value or None
        if (new := aliases.today(keys)) != keys:
            faults += aliases.check(keys[0], keys[1], layer, f"--set {dotted.strip()}")
            keys = new
        if keys == ("model",) and isinstance(layer, str):
            keys = ("model", "path")
        for key in reversed(keys):
            layer = {key: layer}
        mapping = profiles.merge(mapping, layer)
        lines[keys] = f"--set {dotted.strip()}"
    return mapping


def _whole_model(mapping: dict[str, Any]) -> dict[str, Any]:
    """`model: NAME` as `model: {path: NAME}`; before the overrides, since `--set model.dtype=...` must keep the name."""
    return {**mapping, "model": {"path": mapping["model"]}} if isinstance(mapping.get("model"), str) else mapping


def _escape(value: Any) -> Any:
    """`value` with every `${NAME}` in it written so that loading leaves it alone."""
    if isinstance(value, dict):
        return {key: _escape(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_escape(inner) for inner in value]
    return _REFERENCE.sub(lambda match: "$" + match.group(), value) if isinstance(value, str) else value


def _expand(value: Any, path: tuple[str | int, ...], source: str, lines: Lines, faults: list[str]) -> Any:
    """`value` with every `${NAME}` and `${NAME:-default}` replaced from the environment; `$${NAME}` stays `${NAME}`."""
    if isinstance(value, dict):
        return {key: _expand(inner, (*path, key), source, lines, faults) for key, inner in value.items()}
    if isinstance(value, list):
        return [_expand(inner, (*path, index), source, lines, faults) for index, inner in enumerate(value)]
    if not isinstance(value, str):
        return value

    def replace(match: re.Match[str]) -> str:
        escape, name, default = match.groups()
        if escape:
            return match.group()[1:]
        if path != TOKEN_PATH and holds_secret(name):
            faults.append(
                f"{place(source, path, lines)}: '${{{name}}}' holds a secret, which only model.token may name"
            )
            return ""
        found = os.environ.get(name, default)
        if found is None and path == TOKEN_PATH:
            return ""
        if found is None:
            faults.append(f"{place(source, path, lines)}: the environment variable {name} is not set")
            return ""
        return found

    expanded = _REFERENCE.sub(replace, value)
    if path == TOKEN_PATH:
        remember(expanded)
        if expanded == value and value and not value.startswith("<"):
            warnings.warn(f"{place(source, path, lines)}: a literal token; write '${{HF_TOKEN}}' instead", stacklevel=2)
        return expanded if expanded and not expanded.startswith("<") else None
    return expanded


def _remember(token: str, where: str) -> None:
    """Have a token hidden from now on, and say so where it cannot be told from other text."""
    remember(token)
    if token and not looks_secret(token):
        why = "it is short, or an ordinary word, so it is hidden in messages only, where it stands alone"
        warnings.warn(f"{where}: this token cannot be told from other text: {why}", stacklevel=3)


def _secrets_in(value: Any, path: tuple[str | int, ...], source: str, lines: Lines) -> list[str]:
    """A fault for every secret in a recipe but its token: a run keeps its recipe, and names its paths in many files."""
    found = detector()

    def look(value: Any, path: tuple[str | int, ...]) -> Iterator[str]:
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from look(str(key), path) if isinstance(key, str) and found(key) else look(inner, (*path, key))
        elif isinstance(value, list):
            for index, inner in enumerate(value):
                yield from look(inner, (*path, index))
        elif isinstance(value, str) and path != TOKEN_PATH:
            what = found(value) or ("an address with a password" if has_password(value) else None)
            if what:
                yield (
                    f"{place(source, path, lines)}: holds {what}, and would be stored in the run; take it out, or unset "
                    "the variable where it is no secret"
                )

    return list(look(value, path))


def _resolve(mapping: dict[str, Any], keys: tuple[str, ...], base: Path) -> None:
    place: Any = mapping
    for key in keys[:-1]:
        place = place.get(key) if isinstance(place, dict) else None
    if not isinstance(place, dict):
        return
    value = place.get(keys[-1])
    if isinstance(value, str):
        place[keys[-1]] = _absolute(value, base)
    elif isinstance(value, list):
        place[keys[-1]] = [_absolute(item, base) if isinstance(item, str) else item for item in value]


def _absolute(value: str, base: Path) -> str:
    if not value or ":" in value.split("/")[0]:  # hub:owner/name, quorra:train and the like are names, not paths
        return value
    return str(base / Path(value).expanduser())


def _resolve_model(mapping: dict[str, Any], base: Path) -> None:
    """A model is a path only where one is there, or where it is written as one; `gpt2` and `owner/name` are hub ids."""
    model = mapping.get("model")
    if not isinstance(model, dict):
        return
    for key in ("path", "base_model"):
        value = model.get(key)
        if isinstance(value, str) and (value.startswith((".", "/", "~")) or (base / value).exists()):
            model[key] = str((base / Path(value).expanduser()).resolve())
