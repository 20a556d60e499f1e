"""The keys of a recipe in a reader's words: in which section each is, its type, its default, what it is."""

from __future__ import annotations

import json
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from finetune.recipe.model import Recipe
from finetune.recipe.sections import Align, Data, Evaluate, Expect, Lora, Model, Optimization, Section, Template, Train

# Where a section stands in the file, its class, and a sentence about it.
SECTIONS: tuple[tuple[str, type[Section], str], ...] = (
    ("Top level", Recipe, "Sections have a table each, further down."),
    ("`model`", Model, "`model: NAME` is short for `model: {path: NAME}`."),
    ("`data`", Data, "`align.data` takes the same keys, and wants preference pairs."),
    (
        "`template`",
        Template,
        "How a conversation becomes text; alpaca, chatml, llama and llama3 come with the package.",
    ),
    ("`train` and `align`", Optimization, "Keys of both, by the names that TRL and transformers give them."),
    ("`train`", Train, "Supervised fine-tuning. Takes the keys above too."),
    ("`train.lora`", Lora, "Used with `train.method: lora`; the names are those of PEFT's `LoraConfig`."),
    ("`align`", Align, "Preference alignment after training. Takes the keys above too."),
    ("`evaluate`", Evaluate, "What the model is asked before and after. Each file is JSONL, one object a line."),
    ("`expect`", Expect, "Bounds of the checks. A check that finds no evidence fails, whatever the bound."),
)

_SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
_PLAIN = {
    str: "text",
    SecretStr: "text",
    int: "integer",
    float: "number",
    bool: "true or false",
    type(None): "empty",
    Any: "value",
}


# -- one field ---------------------------------------------------------------------------------------------------------


def kind(annotation: Any, metadata: Iterable[object] = ()) -> str:
    """A type in a reader's words: `integer > 0`, `one of "a", "b"`, `list of text`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner = [part for item in arguments[1:] for part in (item.metadata if isinstance(item, FieldInfo) else [item])]
        return kind(arguments[0], [*inner, *metadata])
    if origin is Literal:
        values = ", ".join(f"`{value}`" for value in arguments)
        return f"one of {values}" if len(arguments) > 1 else values
    if origin in (Union, types.UnionType):
        return " or ".join(kind(choice) for choice in arguments)
    if origin is list:
        return f"list of {kind(arguments[0])}"
    if origin is dict:
        return f"`name: {kind(arguments[1])}` pairs"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    parts = list(metadata)
    bounds = [
        f"{sign} {getattr(part, name):g}" for part in parts for name, sign in _SIGNS.items() if hasattr(part, name)
    ]
    return f"{_PLAIN[annotation]} {' and '.join(bounds)}".strip()


def default(field: FieldInfo) -> str:
    """A field's default as YAML has it."""
    if field.is_required():
        return "required"
    if field.default_factory is not None:
        return (
            ""
            if kind(field.annotation).startswith("section")
            else "`[]`"
            if "list" in str(field.annotation)
            else "`{}`"
        )
    if field.default is None:
        return ""
    return f"`{field.default if isinstance(field.default, str) else json.dumps(field.default)}`"


def own_fields(model: type[Section]) -> dict[str, FieldInfo]:
    """The fields that a section does not share with Optimization: new ones, and those with a default of their own."""
    if model is Optimization or not issubclass(model, Optimization):
        return dict(model.model_fields)
    shared = Optimization.model_fields
    fields = model.model_fields.items()
    return {name: field for name, field in fields if name not in shared or field.default != shared[name].default}


# -- all of them -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Key:
    """One key at each of its places (`train.seed`, `align.seed`), which has the same type there. `defaults` and
    `descriptions` are by place."""

    name: str
    kind: str
    defaults: dict[str, str]
    descriptions: dict[str, str]

    @property
    def places(self) -> tuple[str, ...]:
        return tuple(self.defaults)

    @property
    def sections(self) -> list[str]:
        """Where it stands, by the names of sections; empty for the top level."""
        return [place.rpartition(".")[0] for place in self.places]


# The places of every section's keys; those of Optimization stand in both trainings.
PLACES: dict[str, type[Section]] = {
    "": Recipe,
    "model": Model,
    "data": Data,
    "template": Template,
    "train": Train,
    "train.lora": Lora,
    "align": Align,
    "align.data": Data,
    "evaluate": Evaluate,
    "expect": Expect,
}


def keys() -> list[Key]:
    """Every key, in the order of the sections; one that two sections share (both trainings, both data) is there once."""
    found: dict[tuple[type[Section], str], list[tuple[str, FieldInfo]]] = {}
    for section, model in PLACES.items():
        for name, field in model.model_fields.items():
            shared = issubclass(model, Optimization) and name in Optimization.model_fields
            place = f"{section}.{name}" if section else name
            found.setdefault((Optimization if shared else model, name), []).append((place, field))
    return [
        Key(
            name=name,
            kind=_plain(kind(there[0][1].annotation, there[0][1].metadata)),
            defaults={place: _default(field) for place, field in there},
            descriptions={place: field.description or "" for place, field in there},
        )
        for (_, name), there in found.items()
    ]


def matching(name: str, known: Iterable[Key]) -> Iterator[Key]:
    """The keys that a name means: those at that place, or else those whose place ends with it (`lora.r`)."""
    known = list(known)
    exact = [key for key in known if name in key.places]
    yield from exact or (key for key in known if any(place.endswith(f".{name}") for place in key.places))


def _default(field: FieldInfo) -> str:
    if kind(field.annotation).startswith("section") and field.default_factory is not None:
        return "there, with the defaults of its keys"
    return _plain(default(field)) or "empty"


def _plain(text: str) -> str:
    return text.replace("`", "")
