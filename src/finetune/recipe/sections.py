"""The sections of a recipe: frozen, keyword-only, unknown keys rejected. Option names are those of TRL and PEFT."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from finetune.recipe import trackers
from finetune.recipe.exports import parse
from finetune.recipe.quantizers import quantizer

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
TINY = "tiny:"  # what the names of tiny models begin with


class Section(BaseModel):
    """A frozen group of keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), validate_default=True)


class Model(Section):
    """Which model is trained. `path` is an embedded name, a hub id, a local directory, a GGUF file, an adapter, or
    `tiny:ARCHITECTURE`."""

    path: str = Field(
        "smollm2-135m",
        min_length=1,
        description="Embedded name, hub id, local directory, GGUF file, or `tiny:llama` (random weights, made here).",
    )
    base_model: str | None = Field(
        None, description="The base of `path`, where `path` is an adapter that does not say."
    )
    revision: str | None = Field(None, description="Branch, tag or commit on the hub.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="Type of the weights in memory.")
    token: SecretStr | None = Field(None, description="Hub token; write `${HF_TOKEN}`. Never stored.")
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model.")
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2"] | None = Field(
        None, description="Attention kernel; the library's own choice when empty."
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="Where to compute.")
    quantization: str | None = Field(
        None, description="Hold the base's weights in fewer bits while LoRA trains on top (QLoRA): `nf4`."
    )

    @field_validator("quantization")
    @classmethod
    def _known_quantizer(cls, value: str | None) -> str | None:
        return value and quantizer(value).name

    @property
    def is_tiny(self) -> bool:
        """Whether `path` asks for a tiny model, whose tokenizer is trained on the data."""
        return self.path.startswith(TINY)


DATA_FORMATS = ("auto", "chat", "prompt_completion", "instruction", "text", "preference")


class Data(Section):
    """Where the rows are and how to read them."""

    path: str | list[str] = Field(
        description="File (json, jsonl, csv, parquet), hub data set `hub:owner/name`, or a list."
    )
    format: Literal["auto", "chat", "prompt_completion", "instruction", "text", "preference"] = Field(
        "auto", description="What a row holds; `auto` tells it from the columns."
    )
    fields: dict[str, str] = Field(default_factory=dict, description="Our field name: your column name.")
    split: str = Field("train", description="Split of a hub data set.")
    subset: str | None = Field(None, description="Configuration (subset) of a hub data set.")
    eval_path: str | None = Field(None, description="A file of held-out rows.")
    eval_fraction: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="Share of the rows held out when there is no `eval_path`."
    )
    limit: Positive | None = Field(None, description="Use the first N rows only.")
    on_duplicate: Literal["warn", "drop", "error"] = Field("warn", description="What to do with a repeated row.")
    on_overlong: Literal["error", "drop", "truncate"] = Field(
        "error", description="What to do with a row longer than `max_length`."
    )
    on_secret: Literal["error", "keep"] = Field(
        "error",
        description="What to do where data or questions hold a secret; `keep` uses and stores them as they are.",
    )

    @field_validator("path")
    @classmethod
    def _some_path(cls, value: str | list[str]) -> str | list[str]:
        if not value or (isinstance(value, list) and not all(value)):
            raise ValueError("name at least one file")
        return value

    @property
    def paths(self) -> list[str]:
        return [self.path] if isinstance(self.path, str) else list(self.path)


class Template(Section):
    """How a conversation becomes text."""

    name: Literal["model", "alpaca", "chatml", "llama", "llama3", "custom"] = Field(
        "model", description="`model` is the template that comes with the model."
    )
    path: str | None = Field(None, description="A Jinja file, for `custom`.")
    jinja: str | None = Field(None, description="Jinja text, for `custom`.")
    system: str | None = Field(None, description="System message put before a conversation that has none.")

    @model_validator(mode="after")
    def _custom_has_source(self) -> Template:
        sources = [source for source in (self.path, self.jinja) if source is not None]
        if self.name == "custom" and len(sources) != 1:
            raise ValueError("a custom template needs exactly one of 'path' and 'jinja'")
        if self.name != "custom" and sources:
            raise ValueError(f"'path' and 'jinja' belong to the template 'custom', not '{self.name}'")
        return self


class Lora(Section):
    """PEFT's LoraConfig, by its own names."""

    r: Positive = Field(16, description="Rank of the adapter.")
    lora_alpha: PositiveFloat = Field(32, description="The adapter's output is scaled by `lora_alpha / r`.")
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="Dropout before the adapter.")
    target_modules: str | list[str] = Field(
        "all-linear", description="Module names, a regular expression, or all-linear."
    )
    bias: Literal["none", "all", "lora_only"] = Field("none", description="Which biases are trained too.")
    use_rslora: bool = Field(False, description="Scale by `lora_alpha / sqrt(r)` (rank-stabilised).")
    use_dora: bool = Field(False, description="Train magnitude and direction apart (DoRA).")
    init_lora_weights: bool | Literal["gaussian", "pissa", "olora"] = Field(
        True, description="How the adapter starts; `true` starts without any effect on the model."
    )
    modules_to_save: list[str] | None = Field(None, description="Modules trained and saved whole, beside the adapter.")
    layers_to_transform: list[int] | None = Field(None, description="Layers that get an adapter; all when empty.")
    rank_pattern: dict[str, Positive] = Field(default_factory=dict, description="`r` for modules of these names.")
    alpha_pattern: dict[str, PositiveFloat] = Field(
        default_factory=dict, description="`lora_alpha` for modules of these names."
    )

    @model_validator(mode="after")
    def _targets(self) -> Lora:
        if not isinstance(self.target_modules, str) or self.target_modules == "all-linear":
            return self
        if self.layers_to_transform is not None:
            raise ValueError(
                "'layers_to_transform' needs 'target_modules' as a list, as in [q_proj, v_proj], or all-linear, "
                f"not the regular expression {self.target_modules!r}"
            )
        try:
            re.compile(self.target_modules)
        except re.error as error:
            raise ValueError(f"'target_modules' {self.target_modules!r} is no regular expression: {error}") from None
        return self


class Optimization(Section):
    """What SFT and DPO share: TRL's and transformers' training arguments, by their own names."""

    num_train_epochs: PositiveFloat = Field(3.0, description="Passes over the rows.")
    max_steps: Annotated[int, Field(ge=-1)] = Field(-1, description="Overrides the epochs when positive.")
    per_device_train_batch_size: Positive = Field(4, description="Rows per device and training batch.")
    per_device_eval_batch_size: Positive = Field(4, description="Rows per device and evaluation batch.")
    gradient_accumulation_steps: Positive = Field(1, description="Batches added up before a weight update.")
    learning_rate: NonNegativeFloat = Field(2e-4, description="Peak learning rate.")
    lr_scheduler_type: Literal[
        "linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt", "cosine_with_restarts"
    ] = Field("cosine", description="How the learning rate moves over the run.")
    warmup_steps: NonNegativeFloat = Field(0, description="Steps, or a share of all steps when below 1.")
    weight_decay: NonNegativeFloat = Field(0.0, description="Weight decay.")
    max_grad_norm: NonNegativeFloat = Field(
        1.0, description="Gradients are clipped to this norm; 0 turns clipping off."
    )
    optim: str = Field("adamw_torch", description="Optimizer, by the name that transformers gives it.")
    adam_beta1: Fraction = Field(0.9, description="Decay of Adam's mean of gradients.")
    adam_beta2: Fraction = Field(0.999, description="Decay of Adam's mean of squared gradients.")
    adam_epsilon: PositiveFloat = Field(1e-8, description="Keeps Adam from dividing by zero.")
    max_length: Annotated[int, Field(ge=8)] = Field(1024, description="Tokens a row may have.")
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass: less memory, more time."
    )
    bf16: bool = Field(False, description="Compute in bfloat16.")
    fp16: bool = Field(False, description="Compute in float16 with loss scaling; a GPU only.")
    tf32: bool | None = Field(
        None, description="TF32 matrix multiplication on recent NVIDIA GPUs; the library's choice when empty."
    )
    torch_compile: bool = Field(False, description="Compile the model with torch.compile.")
    seed: NonNegative = Field(0, description="Seed of everything random.")
    data_seed: NonNegative | None = Field(None, description="Seed of the row order; `seed` when empty.")
    full_determinism: bool = Field(False, description="Deterministic kernels, at some cost in speed.")
    logging_steps: Positive = Field(
        1, description="Steps between logged losses; a step whose held-out loss is taken is logged, too."
    )
    save_strategy: Literal["no", "steps", "epoch"] = Field("steps", description="When to save a checkpoint.")
    save_steps: Positive = Field(50, description="Steps between checkpoints.")
    save_total_limit: Positive | None = Field(2, description="Checkpoints kept; empty keeps all.")
    eval_strategy: Literal["no", "steps", "epoch"] = Field(
        "no", description="When to compute the loss on the held-out rows."
    )
    eval_steps: Positive | None = Field(None, description="Steps between evaluations, with `eval_strategy: steps`.")
    dataloader_num_workers: NonNegative = Field(
        0, description="Processes that load rows; 0 loads in the training process."
    )
    report_to: str | list[str] = Field(
        "none", description="Trackers by transformers' names: `none`, one, or a list; see trackers.md."
    )
    on_oom: Literal["stop", "shrink"] = Field(
        "stop",
        description="Out of memory: stop, or go on with half the batch and twice the accumulation (the same rows a step).",
    )
    on_nan: Literal["stop", "skip", "rollback", "ignore"] = Field(
        "stop",
        description="A loss or gradient that is NaN or infinite: stop before it changes a weight, skip the step, go back to "
        "the last checkpoint with half the learning rate (three times at most), or train on.",
    )
    output_dir: str | None = Field(None, description="Also publish the adapter and checkpoints into this directory.")

    @field_validator("report_to")
    @classmethod
    def _known_trackers(cls, value: str | list[str]) -> str | list[str]:
        trackers.check(value)
        return value

    @field_validator("max_steps")
    @classmethod
    def _some_steps(cls, value: int) -> int:
        if value == 0:
            raise ValueError("0 steps train nothing; use -1 to let num_train_epochs decide")
        return value

    @model_validator(mode="after")
    def _one_precision(self) -> Optimization:
        if self.bf16 and self.fp16:
            raise ValueError("bf16 and fp16 exclude each other")
        return self


class Train(Optimization):
    """Supervised fine-tuning (TRL's SFTTrainer)."""

    method: Literal["lora", "full"] = Field("lora", description="Train a LoRA adapter, or every weight.")
    lora: Lora = Field(default_factory=Lora, description="Settings of the adapter.")
    completion_only_loss: bool = Field(True, description="Train on the answers only, not on the prompts.")
    packing: bool = Field(False, description="Put several rows into one sequence.")
    packing_strategy: Literal["bfd", "bfd_split", "wrapped"] = Field("bfd", description="How rows are packed.")
    loss_type: Literal["nll", "dft"] = Field(
        "nll", description="`nll` is cross-entropy; `dft` weighs each token by its own probability."
    )
    label_smoothing_factor: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="Share of probability spread over the other tokens."
    )
    neftune_noise_alpha: PositiveFloat | None = Field(
        None, description="Noise added to the embeddings (NEFTune); off when empty."
    )
    early_stopping_patience: Positive | None = Field(None, description="Stop after N evaluations without gain.")
    early_stopping_threshold: NonNegativeFloat = Field(
        0.0, description="How much the evaluation loss must fall to count as gain."
    )

    @model_validator(mode="after")
    def _early_stopping(self) -> Train:
        """transformers keeps the best checkpoint, so it must save whenever it evaluates."""
        if self.early_stopping_patience is None:
            return self
        if self.eval_strategy == "no" or self.save_strategy != self.eval_strategy:
            raise ValueError(
                "'early_stopping_patience' needs 'eval_strategy' and 'save_strategy' to be the same, 'steps' or "
                f"'epoch', not '{self.eval_strategy}' and '{self.save_strategy}'"
            )
        every = self.eval_steps or self.logging_steps
        if self.eval_strategy == "steps" and self.save_steps % every:
            raise ValueError(
                f"'early_stopping_patience' needs 'save_steps' to be a multiple of 'eval_steps', "
                f"not {self.save_steps} and {every}"
            )
        return self


class Align(Optimization):
    """Preference alignment (TRL's DPOTrainer); off when the section is absent."""

    method: Literal["dpo"] = Field("dpo", description="Direct preference optimisation.")
    data: Data = Field(description="Preference pairs: `prompt`, `chosen`, `rejected`.")
    beta: PositiveFloat = Field(0.1, description="How strongly the model is held to its reference.")
    loss_type: Literal["sigmoid", "hinge", "ipo", "robust"] = Field(
        "sigmoid", description="Loss over the margin between chosen and rejected."
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        0.0, description="Assumed share of pairs labelled the wrong way round."
    )
    precompute_ref_log_probs: bool = Field(True, description="Score the reference once instead of at every step.")
    learning_rate: NonNegativeFloat = Field(5e-5, description="Peak learning rate.")
    num_train_epochs: PositiveFloat = Field(1.0, description="Passes over the pairs.")

    @model_validator(mode="after")
    def _smoothed(self) -> Align:
        if self.label_smoothing and self.loss_type != "robust":
            raise ValueError(f"'label_smoothing' needs 'loss_type: robust'; '{self.loss_type}' would pass over it")
        return self

    @property
    def pairs(self) -> Data:
        """`data`, read as preference pairs where it leaves the format open."""
        return self.data.model_copy(update={"format": "preference"}) if self.data.format == "auto" else self.data


class Evaluate(Section):
    """What the model is asked before and after. Each path is a JSONL file, one object a line."""

    probes: str | None = Field(None, description="Questions as trained and paraphrases: `prompt`, `answer`, `kind`.")
    controls: str | None = Field(None, description="General questions, never trained, that must stay answered.")
    unseen: str | None = Field(
        None, description="Made-up facts of the same kind, never trained: the untrained control."
    )
    heldout: str | None = Field(None, description="Plain text for perplexity, never trained.")
    max_new_tokens: Positive = Field(24, description="Tokens an answer may have.")
    batch_size: Positive | None = Field(None, description="Questions answered at a time; as many as fit when empty.")
    score_rows: Positive = Field(64, description="Training rows whose loss is computed again, independently.")


class Expect(Section):
    """Bounds of the checks; defaults are those of the original validators, hardened."""

    loss_reduction_min: Fraction = Field(0.05, description="Fall of the window mean, first to last.")
    loss_first_tolerance: NonNegativeFloat = Field(
        0.05, description="Relative distance of the first logged loss from the same rows scored independently."
    )
    loss_below_unigram: bool = Field(True, description="The last window must beat the entropy of the answers' words.")
    learned_min: Fraction = Field(0.3, description="Share of probes that improve, as trained and paraphrased.")
    unseen_margin_min: Fraction = Field(
        0.3, description="Share improved less the share of untrained controls improved."
    )
    stopped_min: Fraction = Field(0.9, description="Share of trained probes whose answer ends by itself.")
    controls_kept_min: Fraction = Field(0.7, description="Share of controls known before that are known after.")
    heldout_ratio_max: PositiveFloat = Field(1.5, description="Perplexity of held-out text after, divided by before.")
    lora_changed_min: Fraction = Field(0.8, description="Share of LoRA tensors that changed.")
    memory_reduction_min: Fraction | None = Field(
        None, description="LoRA's training state below full fine-tuning's; measured when set."
    )
    preference_accuracy_min: Fraction = Field(0.6, description="Share of pairs whose chosen answer wins after DPO.")
    resume: bool = Field(False, description="Train the last part again from a checkpoint and compare bit by bit.")
    invariance: bool = Field(
        False, description="Measure on a tiny copy of the model what no correct trainer changes; docs/invariances.md."
    )
    serving: bool = Field(False, description="Serve the final model and hold what a client gets against `evaluate`.")
    export_kl_mean_max: dict[str, PositiveFloat] = Field(
        default_factory=dict,
        description="Export name: bound of the mean KL divergence from the merged model (nats); "
        "docs/architecture.md lists the defaults.",
    )
    export_greedy_min: dict[str, Fraction] = Field(
        default_factory=dict, description="Export name: share of answers that must be the same token by token."
    )
    export_learned_min: Fraction = Field(
        0.95, description="Share of the probes that the merged model answers which an export must answer."
    )

    @field_validator("export_kl_mean_max", "export_greedy_min")
    @classmethod
    def _known_exports(cls, value: dict[str, float]) -> dict[str, float]:
        return {parse(name).name: bound for name, bound in value.items()}
