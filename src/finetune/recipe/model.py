"""The recipe itself."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from finetune.recipe.exports import targets
from finetune.recipe.quantizers import quantizer
from finetune.recipe.sections import Align, Data, Evaluate, Expect, Model, Section, Template, Train

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$")]


class Recipe(Section):
    """What is wanted: a model, data, how to train, what to prove.

    Relative paths are resolved against the recipe's own directory when it is loaded from a file.
    """

    name: Name = Field("run", description="Names the run directory.")
    profile: Literal["chat", "instruction", "code"] | None = Field(None, description="Defaults for a kind of task.")
    backend: str = Field("torch", description="What trains: torch, or fake (no weights, for workflow tests).")
    model: Model = Field(default_factory=Model, description="Which model.")
    data: Data | None = Field(None, description="What to train on; required unless `train: null`.")
    template: Template = Field(default_factory=Template, description="How a conversation becomes text.")
    train: Train | None = Field(default_factory=Train, description="How to fine-tune; `null` skips it.")
    align: Align | None = Field(None, description="Preference alignment; off when absent.")
    evaluate: Evaluate = Field(default_factory=Evaluate, description="What the model is asked before and after.")
    export: list[str] = Field(
        default_factory=list,
        description="Formats that the merged model is written in and proven in: gguf:f16, gguf:q8_0, gguf:q4_k_m, mlx, "
        "mlx:q8, ollama, bundle.",
    )
    expect: Expect = Field(default_factory=Expect, description="Bounds of the checks.")
    output_dir: str = Field("runs", description="Run directories are made in here.")

    @field_validator("export")
    @classmethod
    def _known_exports(cls, value: list[str]) -> list[str]:
        return [target.name for target in targets(value)]

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.train is not None and self.data is None:
            raise ValueError("'train' needs a 'data' section (or set 'train: null')")
        if self.train is not None and self.data is not None and self.data.format == "preference":
            raise ValueError("'data.format: preference' belongs under 'align.data'; 'train' wants answers to imitate")
        if self.model.quantization and (unfit := _unfit(self)):
            raise ValueError(unfit)
        if self.align is not None and (idle := _idle(self.align)):
            raise ValueError(f"'align.{idle}' would do nothing: alignment holds no pairs out; leave it out")
        if self.align is not None and self.train is not None and self.train.lora.bias != "none":
            raise ValueError(
                "'train.lora.bias' must be 'none' with 'align': PEFT has no reference beside trained biases"
            )
        if self.train is not None and self.data is not None and not (self.data.eval_path or self.data.eval_fraction):
            asking = [
                key
                for key, value in (
                    ("eval_strategy", self.train.eval_strategy != "no"),
                    ("early_stopping_patience", self.train.early_stopping_patience),
                )
                if value
            ]
            if asking:
                raise ValueError(
                    f"'train.{asking[-1]}' needs held-out rows: set 'data.eval_fraction' (0.1) or 'data.eval_path'"
                )
        return self


def _unfit(recipe: Recipe) -> str:
    """Why the recipe's quantizer cannot be had with the rest of it, and what can; empty where it can."""
    row = quantizer(str(recipe.model.quantization))
    asked, train = f"'model.quantization: {row.name}'", recipe.train
    if recipe.backend not in row.backends:
        return f"{asked} is for the backend {' or '.join(row.backends)}, not '{recipe.backend}'; leave it out"
    if recipe.model.device not in ("auto", *row.devices):
        return f"{asked} computes on {' or '.join(row.devices)}, not on '{recipe.model.device}'; leave it out"
    if train is not None and train.method not in row.methods:
        return f"{asked} holds weights that 'train.method: {train.method}' would train; use {' or '.join(row.methods)}"
    if train is not None and train.lora.init_lora_weights not in row.initial:
        return (
            f"{asked} holds weights that 'train.lora.init_lora_weights: {train.lora.init_lora_weights}' would change; use "
            "true or gaussian"
        )
    return ""


def _idle(align: Align) -> str | None:
    """The first key that speaks of held-out pairs, of which alignment has none."""
    keys = ("eval_strategy", "eval_steps", "per_device_eval_batch_size")
    asked = [key for key in keys if getattr(align, key) != type(align).model_fields[key].default]
    asked += [f"data.{key}" for key in ("eval_path", "eval_fraction") if getattr(align.data, key)]
    return asked[0] if asked else None
