"""The stages of a run, in order: what each reads of a recipe, and which a recipe wants."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from finetune.core.errors import UsageError

if TYPE_CHECKING:  # the command line reads this table for its help, and pydantic would cost it its start-up time
    from finetune.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One row of the table. `sections` are the recipe's keys that the stage reads, `needs` the stages before it.

    `keys` narrows a section to those of its keys that the stage reads. `goes_on` where what it left before is of use to it;
    the evidence of any other is cleared before it runs again.
    """

    name: str
    help: str
    sections: tuple[str, ...]
    needs: tuple[str, ...] = ()
    keys: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    goes_on: bool = False
    wanted: Callable[[Recipe], bool] = lambda recipe: True
    run: str = ""

    @property
    def reference(self) -> str:
        """What carries it out: `execute(recipe, run)` of the module in `finetune.stages` that has its name, or `run`."""
        return self.run or f"finetune.stages.{self.name}:run"


STAGES: tuple[Stage, ...] = (
    Stage(
        name="fetch",
        help="Get the model: unpack the embedded one, download from the hub, or link a local directory.",
        sections=("backend", "model"),
    ),
    Stage(
        name="prepare",
        help="Read, check, render and tokenize the data; show one example with the masked part visible.",
        sections=("backend", "model", "data", "template", "train", "align"),
        keys={
            "train": ("max_length", "completion_only_loss", "seed", "early_stopping_patience"),
            "align": ("data", "max_length"),
        },
        needs=("fetch",),
    ),
    Stage(
        name="rehearse",
        help="Try every export that the recipe asks for on the base model, before any training.",
        sections=("model", "export"),
        needs=("prepare",),
        wanted=lambda recipe: bool(recipe.export),
    ),
    Stage(
        name="train",
        goes_on=True,
        help="Supervised fine-tuning (SFT), full or LoRA.",
        sections=("backend", "model", "train"),
        needs=("prepare",),
        wanted=lambda recipe: recipe.train is not None,
    ),
    Stage(
        name="align",
        goes_on=True,
        help="Preference alignment (DPO) of the trained model.",
        sections=("backend", "model", "train", "align"),
        needs=("train",),
        wanted=lambda recipe: recipe.align is not None,
    ),
    Stage(
        name="evaluate",
        help="Ask the model before and after: probes, controls, held-out text, training rows.",
        sections=("backend", "model", "template", "evaluate"),
        needs=("train", "align"),
    ),
    Stage(
        name="merge",
        help="Fold the adapter into the base model's weights.",
        sections=("backend", "model"),
        needs=("train", "align"),
    ),
    Stage(
        name="measure",
        help="The experiments that checks ask for: memory against full fine-tuning, resume, a fresh process.",
        sections=("backend", "model", "train", "expect"),
        needs=("evaluate", "merge"),
    ),
    Stage(
        name="export",
        goes_on=True,
        help="Write the merged model in other formats: GGUF, MLX, Ollama, a bundle for the hub.",
        sections=("name", "backend", "model", "template", "export"),
        needs=("rehearse", "merge", "measure"),
        wanted=lambda recipe: bool(recipe.export),
    ),
    Stage(
        name="compare",
        goes_on=True,
        help="Ask every export, in its own runtime, what the merged model was asked, and hold them side by side.",
        sections=("backend", "model", "template", "evaluate", "export"),
        needs=("evaluate", "merge", "export"),
        wanted=lambda recipe: bool(recipe.export),
    ),
)
BY_NAME = {stage.name: stage for stage in STAGES}
MODELS = ("train", "align", "merge", "export")  # what makes a model that later stages speak of
TRAININGS = ("train", "align")  # what takes a night: finished, they are kept though code or libraries have changed


def models_before(stage: Stage) -> list[str]:
    """The stages whose models a stage speaks of."""
    return [name for name in stage.needs if name in MODELS]


def plan(recipe: Recipe, only: Iterable[str] | None = None) -> list[Stage]:
    """The stages this recipe wants, in order; with `only`, those names and everything they need."""
    wanted = [stage for stage in STAGES if stage.wanted(recipe)]
    if only is None:
        return wanted
    names: set[str] = set()

    def add(name: str) -> None:
        if name not in BY_NAME:
            raise UsageError(f"unknown stage '{name}'. Known: {', '.join(BY_NAME)}.")
        if name not in names:
            names.add(name)
            for need in BY_NAME[name].needs:
                add(need)

    for name in only:
        add(name)
    return [stage for stage in wanted if stage.name in names]


_WHERE_IT_FAILS = {"on_oom": True, "on_nan": True}  # what they did to a training stands in its evidence
_WITHOUT_EFFECT: dict[str, Any] = {
    "model": {"token": True},
    "data": {"on_secret": True},
    "train": _WHERE_IT_FAILS,
    "align": {"data": {"on_secret": True}, **_WHERE_IT_FAILS},
}


def inputs(stage: Stage, recipe: Recipe) -> dict[str, Any]:
    """The part of the recipe that a stage reads, as plain values; without the token, and without what changes no outcome."""
    sections = {*stage.sections, *(("data",) if stage.name == "fetch" and recipe.model.is_tiny else ())}
    found = recipe.model_dump(mode="json", include=sections, exclude=_WITHOUT_EFFECT)
    for section, keys in stage.keys.items():
        if found[section] is not None:
            found[section] = {key: found[section][key] for key in keys}
    return found
