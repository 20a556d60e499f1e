"""The model card: README.md with the front matter that the hub reads, and what was proved about the model.

What `facts` (`Source.card`) may hold: `base_model` (as the recipe names it), `recipe` (YAML text or a mapping),
`verdicts` (as in verdicts.json), `manifest` (the run's; the versions are taken from it), `metrics` (a mapping a stage).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.core.errors import RecipeError
from finetune.models import licenses, sources, tiny
from finetune.recipe import yaml
from finetune.run import outcome

VERDICTS_START, VERDICTS_END = "<!-- verdicts -->", "<!-- /verdicts -->"
_PART = r"[^\s\\/:*?\"'<>|,;()\[\]{}`]+"
_PLACE = re.compile(rf"(?<![\w.:/\\~-])(?:file://)?(?:(?:~|[A-Za-z]:)(?:[\\/]{_PART})+|(?:[\\/]{_PART}){{2,}})[\\/]?")
_ABSOLUTE = re.compile(r"[\\/]|~[\\/]|[A-Za-z]:[\\/]|file://")
_WORDS = {"lora": "low-rank adaptation (LoRA)", "full": "full fine-tuning", "dpo": "preference alignment (DPO)"}
_NOT_SHOWN = ("output_dir", "device", "token")


@dataclass(frozen=True, kw_only=True)
class Card:
    """What the text is made from. `license_file`: a LICENSE lies beside it; `adapter`: so does the adapter's folder."""

    name: str
    base_model: str | None
    license: str | None
    license_file: bool
    adapter: bool
    loadable: bool
    system: str | None
    trust_remote_code: bool
    facts: Mapping[str, Any]
    places: tuple[Path, ...] = ()


def text(card: Card) -> str:
    """The whole card. Places on this machine are left out of it."""
    how = ", then ".join(_WORDS[tag] for tag in _tags(card) if tag in _WORDS)
    parts = [
        f"---\n{yaml.write(front_matter(card))}---",
        f"# {card.name}",
        f"{card.base_model or 'A language model'}, fine-tuned{how and f' by {how}'} with finetune.",
        *_loading(card),
        *_training(card),
        "## What was proved",
        _between(verdict_table(card.facts.get("verdicts"), card.places, _marks(card.facts))),
        *_recipe(card),
        *_license(card),
        "## Files\n\n`manifest.json` lists the size and the SHA-256 of every file.",
    ]
    return "\n\n".join(parts) + "\n"


def front_matter(card: Card) -> dict[str, Any]:
    """What the hub reads. Keys: https://huggingface.co/docs/hub/model-cards"""
    front: dict[str, Any] = hub_license(card.license)
    if front["license"] == "other" and card.license_file:
        front["license_link"] = "LICENSE"
    if card.base_model:
        front |= {"base_model": card.base_model, "base_model_relation": "finetune"}
    return {**front, "tags": _tags(card), "library_name": "transformers", "pipeline_tag": "text-generation"}


def hub_license(spdx: str | None) -> dict[str, Any]:
    """A licence as the hub's front matter names it: one of its ids, or `other` and the name."""
    if spdx is None:
        return {"license": "unknown"}
    if spdx.lower() in licenses.HUB_IDS:
        return {"license": spdx.lower()}
    return {"license": "other", "license_name": spdx}


def base_name(path: object) -> str | None:
    """The base model as others know it: its hub id, or its bare name where a recipe names a place on disk."""
    if not isinstance(path, str) or not path.strip():
        return None
    if path in sources.EMBEDDED:
        return sources.EMBEDDED[path].hub_id or path
    if tiny.is_name(path):  # random weights are nobody's model
        return None
    if is_place(path) or path.count("/") > 1 or path.startswith(".") or path.endswith(".gguf"):
        return Path(path.replace("\\", "/").rstrip("/")).name.removesuffix(".gguf") or None
    return path


def verdict_table(verdicts: object, places: Iterable[Path] = (), marks: Iterable[str] = ()) -> str:
    """What verdicts, as `verdicts.json` holds them, say in a sentence, and a Markdown table of them; `marks` has to be
    known beside them."""
    rows = [each for each in _as_list(verdicts) if isinstance(each, Mapping)]
    if not rows:
        return "Nothing was verified when this card was written."
    lines = ["| check | measured | bound | verdict | why |", "|---|---|---|---|---|"]
    for each in rows:
        said = outcome.outcome(each)
        measured = "nothing" if each.get("measured") is None else _number(each["measured"])
        bound = f"{each.get('compare', '')} {_number(each.get('bound'))} {each.get('unit', '')}"
        state = f"**{said}**" if said == outcome.REFUTED else said
        cells = [each.get("name", ""), measured, bound, state, without_places(str(each.get("why", "")), places)]
        lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    said_of_all = without_places(outcome.headline(rows, marks=list(marks)), places)
    return "\n".join([f"{said_of_all[:1].upper()}{said_of_all[1:]}.", "", *lines])


def _marks(facts: Mapping[str, Any]) -> list[str]:
    return outcome.marks(_mapping(facts.get("manifest")), _mapping(facts.get("metrics")))


def with_verdicts(card: str, verdicts: object, places: Iterable[Path] = (), marks: Iterable[str] = ()) -> str:
    """A card's text with another table of verdicts in it. Raises ValueError where the text has no place for one."""
    before, start, rest = card.partition(VERDICTS_START)
    _, end, after = rest.partition(VERDICTS_END)
    if not start or not end:
        raise ValueError("no verdicts section")
    return before + _between(verdict_table(verdicts, places, marks)) + after


def with_warning(card: str, reasons: Sequence[str]) -> str:
    """A card's text with a warning under its title: what the model was put out in spite of."""
    warning = "\n".join(["> **Exported although:**", ">", *(f"> - {_cell(reason)}" for reason in reasons)])
    title = re.search(r"^# .*$", card, re.MULTILINE)
    if title is None:
        return f"{card.rstrip()}\n\n{warning}\n"
    return f"{card[: title.end()]}\n\n{warning}{card[title.end() :]}"


# -- places ------------------------------------------------------------------------------------------------------------


def is_place(text: str) -> bool:
    """Whether a text is a path of some machine, as a whole."""
    return bool(_ABSOLUTE.match(text)) and "\n" not in text


def without_places(text: str, places: Iterable[Path] = ()) -> str:
    """`text` with every path of a machine cut down to its last part. `places` are known ones, which may hold spaces."""
    text = without_known(text, places)
    return _PLACE.sub(lambda found: re.split(r"[\\/]", found.group().rstrip("\\/"))[-1], text)


def without_known(text: str, places: Iterable[Path]) -> str:
    """`text` with these directories taken off the paths below them, and their names in place of themselves."""
    for place in sorted({str(each) for each in places}, key=len, reverse=True):
        name = Path(place).name
        text = re.sub(rf"{re.escape(place)}(/|(?![\w.-]))", lambda found, name=name: "" if found[1] else name, text)  # type: ignore[misc]
    return text


def known_places(*paths: Path | None) -> tuple[Path, ...]:
    """These paths and the directories above them, the home and the working directory; not the root of a disk."""
    start = [path.absolute() for path in paths if path is not None]
    found = {place for path in (*start, Path.cwd()) for place in (path, *path.parents) if len(place.parts) > 2}
    return tuple(sorted(found | {Path.home()} - {Path(Path.home().anchor)}))


def _clean(value: Any, places: Iterable[Path]) -> Any:
    """A recipe's values without places, and without the keys that say where and on what it ran."""
    if isinstance(value, Mapping):
        return {key: _clean(inner, places) for key, inner in value.items() if key not in _NOT_SHOWN}
    if isinstance(value, list | tuple):
        return [_clean(inner, places) for inner in value]
    if not isinstance(value, str):
        return value
    return Path(value.replace("\\", "/")).name if is_place(value) else without_places(value, places)


# -- sections ----------------------------------------------------------------------------------------------------------


def _loading(card: Card) -> list[str]:
    if not card.loadable:
        return ["## How to load it\n\nThis model has no weights for a library: it was made by the `fake` backend."]
    remote = ", trust_remote_code=True" if card.trust_remote_code else ""
    system = [{"role": "system", "content": card.system}] if card.system else []
    messages = [*system, {"role": "user", "content": "..."}]
    code = f"""\
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "."  # this directory, or its name on the hub
tokenizer = AutoTokenizer.from_pretrained(path{remote})
model = AutoModelForCausalLM.from_pretrained(path{remote})
messages = {messages!r}
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**inputs, max_new_tokens=64, do_sample=False)[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))"""
    found = [f"## How to load it\n\n{_fenced(code, 'python')}"]
    if card.adapter:
        base = card.base_model or "BASE MODEL"
        peft = f"""\
from peft import PeftModel

base = AutoModelForCausalLM.from_pretrained({base!r}{remote})
model = PeftModel.from_pretrained(base, path, subfolder="adapter")"""
        found.append(f"The weights here have the adapter folded in. The adapter alone:\n\n{_fenced(peft, 'python')}")
    return found


def _training(card: Card) -> list[str]:
    recipe, facts = _recipe_of(card), card.facts
    lines = [f"- base model: {card.base_model}"] if card.base_model else []
    for label, section in (("data", recipe.get("data")), ("preference pairs", (recipe.get("align") or {}).get("data"))):
        if paths := _as_list((section or {}).get("path")):
            lines.append(f"- {label}: {', '.join(_clean(str(path), card.places) for path in paths)}")
    for stage, found in _mapping(facts.get("metrics")).items():
        numbers = {key: value for key, value in _mapping(found).items() if _is_number(value)}
        if numbers:
            lines.append(f"- {stage}: " + ", ".join(f"{key} {_number(value)}" for key, value in numbers.items()))
    if versions := _versions(_mapping(facts.get("manifest"))):
        lines.append("- versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    return ["## How it was trained\n\n" + "\n".join(lines)] if lines else []


def _versions(manifest: Mapping[str, Any]) -> dict[str, str]:
    named = {name: manifest.get(name) for name in ("finetune", "python")}
    return {name: str(found) for name, found in {**named, **_mapping(manifest.get("packages"))}.items() if found}


def _tags(card: Card) -> list[str]:
    """`finetune`, the method, the objectives."""
    recipe = _recipe_of(card)
    trained = recipe.get("train", {}) if recipe else None
    tags = ["finetune"]
    if trained is not None:
        tags += [str(_mapping(trained).get("method", "lora")), "sft"]
    return tags + (["dpo"] if recipe.get("align") else [])


def _recipe_of(card: Card) -> dict[str, Any]:
    recipe = card.facts.get("recipe")
    if isinstance(recipe, str):
        try:
            recipe = yaml.parse(recipe, "recipe")[0]
        except RecipeError:
            recipe = None
    return dict(_mapping(recipe))


def _recipe(card: Card) -> list[str]:
    recipe = _clean(_recipe_of(card), card.places)
    return [f"## Recipe\n\n{_fenced(yaml.write(recipe).rstrip(), 'yaml')}"] if recipe else []


def _license(card: Card) -> list[str]:
    where = " Its words are in `LICENSE`." if card.license_file else ""
    if card.license is None:
        said = "The licence of the base model is not known: find out before you pass this on."
    else:
        said = f"The base model's licence is {card.license}, and it holds for what is derived from it."
    return [f"## Licence\n\n{said}{where}"]


def _between(table: str) -> str:
    return f"{VERDICTS_START}\n\n{table}\n\n{VERDICTS_END}"


def _fenced(code: str, language: str) -> str:
    longest = max((len(run) for run in re.findall(r"`+", code)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{code}\n{fence}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: Any) -> str:
    if not _is_number(value):
        return str(value)
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def _cell(value: Any) -> str:
    # As Markdown shows it: `<|im_end|>` is neither a column nor a tag.
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]
