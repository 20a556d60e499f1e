"""The spec format: frozen, unknown keys rejected; the keys and defaults that most specs need come first."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from finetune.checks import BY_NAME
from finetune.core.lookup import did_you_mean
from finetune.recipe import Recipe
from finetune.recipe.exports import parse
from finetune.recipe.faults import section_at
from finetune.recipe.model import Name
from finetune.recipe.sections import Expect, Fraction, NonNegative, NonNegativeFloat, Positive, PositiveFloat, Section
from finetune.recipe.sections import Train as TrainSection

EXAMPLE_PREFIX = "example:"
Marker = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
# What a recipe says about a run that a spec has to redirect or asks for by keys of its own.
OWN_KEYS = {"name": "test_id", "export": "parity", "expect": "expect", "output_dir": "nothing: it is temporary"}


class Loss(Section):
    """Bounds of the training loss, in nats."""

    final_max: PositiveFloat | None = Field(None, description="Most that the last logged loss may be.")
    final_min: NonNegativeFloat | None = Field(None, description="Least that the last logged loss may be.")
    no_nan: bool = Field(True, description="Fail if any logged loss is NaN or infinite.")


class Stderr(Section):
    """What the command may write to its standard error."""

    forbidden_patterns: list[str] = Field(default_factory=list, description="Fail where one of these texts appears.")
    warn_patterns: list[str] = Field(default_factory=list, description="Warn where one of these texts appears.")


class Inference(Section):
    """After training the model is served by `finetune serve`, completes a prompt, and the completion is scored."""

    prompt: str = Field("Once upon a time", min_length=1, description="Text to complete.")
    max_tokens: Positive = Field(50, description="Most tokens to generate.")
    temperature: NonNegativeFloat = Field(0.7, description="Sampling temperature; 0 is greedy.")
    perplexity_max: PositiveFloat = Field(500.0, description="Most that the completion's perplexity may be.")
    server_timeout: Positive = Field(60, description="Seconds that the server may take to start.")
    seed: NonNegative = Field(0, description="Seed of the sampling.")
    distinct_min: Fraction = Field(
        0.4, description="Least share of the completion's tokens that are different ones; repetition scores low."
    )
    scorer: str | None = Field(
        None,
        description="Model that scores: FT_SCORER, gpt2 where it is in the cache or can be had, else smollm2-135m.",
    )
    backend: Literal["torch", "llamacpp", "mlx"] = Field("torch", description="What serves the model.")


class Learned(Section):
    """Probes: questions that the trained model must answer. Paths are relative to the recipe, as in the recipe."""

    probes: str | None = Field(None, description="A file of probes, where the recipe's `evaluate.probes` is not meant.")
    unseen: str | None = Field(None, description="A file of facts never trained, for the margin.")
    improved_min: Fraction = Field(0.3, description="Share of the probes that must improve.")


class Bounds(Section):
    """What the command may take."""

    seconds_max: PositiveFloat | None = Field(None, description="Wall time of the whole command.")
    tokens_per_second_min: PositiveFloat | None = Field(None, description="Training speed.")
    process_mib_max: PositiveFloat | None = Field(None, description="Peak memory of the process, in MiB.")
    device_mib_max: PositiveFloat | None = Field(None, description="Peak memory of the GPU, in MiB.")


class Spec(Section):
    """One test: a recipe run by the real command line in a temporary directory, and what must be true of it then."""

    model_config = ConfigDict(title="finetune spec")

    test_id: Name = Field(description="Names the test; unique among all specs.")
    project_dir: str = Field(
        description="Folder of the recipe, relative to the repository (or to pytest's root, or to the spec)."
    )
    config: str = Field(description="The recipe's file in that folder; `example:NAME` is one that comes with finetune.")
    dynamic_args: dict[str, Any] = Field(
        default_factory=dict,
        description="Overrides of recipe keys: `max_steps` is short for `train.max_steps`, others are written whole.",
    )
    loss: Loss = Field(default_factory=Loss, description="Bounds of the training loss.")
    stderr: Stderr = Field(default_factory=Stderr, description="What the command may write to standard error.")
    expected_files: list[str] = Field(
        default=["trainer_logs.json"], description="Files (or patterns) in the training's or the run's directory."
    )
    min_steps_logged: NonNegative = Field(1, description="Least number of steps in `trainer_logs.json`.")
    gpu_requirement: NonNegative = Field(
        1, description="GPUs needed; skipped where there are fewer, unless specs are to run on the CPU (`--on-cpu`)."
    )
    timeout: Positive = Field(300, description="Seconds that the command may take.")
    markers: list[Marker] = Field(default=["integration"], description="pytest markers.")
    inference: Inference | None = Field(None, description="Serve the model, complete a prompt, score it.")
    expect: Expect | None = Field(None, description="Bounds of the recipe's checks; runs all stages and all checks.")
    checks: list[str] | None = Field(None, description="Only these checks, of those that the recipe calls for.")
    parity: list[str] = Field(
        default_factory=list, description="Export formats that must behave as the trained model: gguf:q8_0, mlx, ..."
    )
    learned: Learned | None = Field(None, description="Questions that the trained model must answer.")
    resume: bool = Field(False, description="Interrupted and resumed must equal uninterrupted, bit by bit.")
    bounds: Bounds = Field(default_factory=Bounds, description="Time and memory.")
    cases: dict[Name, dict[str, Any]] = Field(
        default_factory=dict, description="Name: keys laid over this spec; each case is a test of its own."
    )

    @property
    def whole(self) -> bool:
        """Whether all stages and checks run (`finetune run`), not the training alone (`finetune train`)."""
        return bool(self.expect or self.checks or self.parity or self.learned or self.resume)

    @property
    def overrides(self) -> dict[str, Any]:
        """What is laid over the recipe: its keys, written whole, and their values."""
        found = {recipe_key(name): value for name, value in self.dynamic_args.items()}
        if self.expect is not None:
            found |= {f"expect.{key}": value for key, value in self.expect.model_dump(exclude_unset=True).items()}
        if self.parity:
            found["export"] = list(self.parity)
        if self.learned is not None:
            found["expect.learned_min"] = self.learned.improved_min
            files = {"evaluate.probes": self.learned.probes, "evaluate.unseen": self.learned.unseen}
            found |= {key: file for key, file in files.items() if file is not None}
        if self.resume:
            found["expect.resume"] = True
        return found

    @field_validator("dynamic_args")
    @classmethod
    def _known_keys(cls, value: dict[str, Any]) -> dict[str, Any]:
        faults = [fault for name in value if (fault := _unknown(name))]
        if faults:
            raise ValueError("; ".join(faults))
        return value

    @field_validator("checks")
    @classmethod
    def _known_checks(cls, value: list[str] | None) -> list[str] | None:
        for name in value or ():
            if name not in BY_NAME:
                raise ValueError(f"unknown check '{name}'.{did_you_mean(name, BY_NAME)} Known: {', '.join(BY_NAME)}")
        return value

    @field_validator("parity")
    @classmethod
    def _known_formats(cls, value: list[str]) -> list[str]:
        return [parse(name).name for name in value]

    @model_validator(mode="after")
    def _servable(self) -> Spec:
        if self.inference is None:
            return self
        if self.overrides.get("train.save_strategy") == "no":
            raise ValueError(
                "'inference' serves a checkpoint, and dynamic_args.save_strategy 'no' saves none; use 'steps' or 'epoch'"
            )
        family = {"llamacpp": "gguf", "mlx": "mlx"}.get(self.inference.backend)
        if family and not any(name.partition(":")[0] == family for name in self.parity):
            raise ValueError(f"inference.backend '{self.inference.backend}' needs a {family} format in 'parity'")
        return self


def recipe_key(name: str) -> str:
    """The recipe's key that a name among `dynamic_args` means."""
    return name if "." in name or name in Recipe.model_fields else f"train.{name}"


def _unknown(name: str) -> str:
    """What is wrong with a name among `dynamic_args`; empty for a key of the recipe that a spec may set."""
    *above, last = parts = recipe_key(name).split(".")
    if parts[0] in OWN_KEYS:
        return f"'{name}' is not for dynamic_args (instead: {OWN_KEYS[parts[0]]})"
    section = section_at(tuple(above), Recipe)
    around = section_at(tuple(above[:-1]), Recipe) if above else None
    free = section is None and around is not None and above[-1] in around.model_fields  # data.fields.prompt: any name
    if free or (section is not None and last in section.model_fields):
        return ""
    known = list(section.model_fields if section is not None else Recipe.model_fields)
    if "." not in name:
        known = [*TrainSection.model_fields, *Recipe.model_fields]
    return f"the recipe has no key '{recipe_key(name)}'.{did_you_mean(last, known)}"


def json_schema() -> dict[str, Any]:
    """The format as a JSON Schema, for editors (`# yaml-language-server: $schema=...`)."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Spec.model_json_schema()}
