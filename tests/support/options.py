"""The ledger of options: for every key of a recipe another value, and what must change with it.

A row says where the change is observed (`where`, one of TIERS), and which of the things observed there must differ from
what the same recipe leaves without it (`seen`). A stored recipe, a fingerprint or a time is never what is observed.
`beside` lies on both sides: what one value alone needs to be legal. `{files}` in a text is a folder of the observer's.

Most rows are an `effect`. A `refusal` is told to the user, since this machine or this stage cannot carry it out; an
`argument` is seen to reach a library that is kept from doing what it asks. Both say why.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from pydantic import BaseModel

from finetune.core.files import read_jsonl
from finetune.recipe import Recipe, load_mapping
from finetune.recipe.profiles import merge
from finetune.run import Run

# Where a row is observed, and the tier that does it.
TIERS = {
    "read": 1, "prepare": 1, "folder": 1, "evaluate": 1, "verdicts": 1, "export": 1,
    "train": 2, "align": 2, "hub": 2, "dataset": 2,
}  # fmt: skip
By = Literal["effect", "refusal", "argument"]
Values = Mapping[str, Any]  # dotted keys and their values


@dataclass(frozen=True, kw_only=True)
class Row:
    """One key, another value than the observer's own recipe has for it, and what must change."""

    key: str
    value: Any
    where: str
    seen: str
    beside: Values = field(default_factory=dict)
    by: By = "effect"
    why: str = ""

    @property
    def tier(self) -> int:
        return TIERS[self.where]


def leaves(model: type[BaseModel] = Recipe, path: str = "") -> Iterator[str]:
    """Every key of a recipe that holds a value, dotted, from the schema itself."""
    for name, found in model.model_fields.items():
        inner = _section(found.annotation)
        if inner is None:
            yield path + name
        else:
            yield from leaves(inner, f"{path}{name}.")


def _section(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for each in get_args(annotation) if (found := _section(each))), None)


def laid(mapping: dict[str, Any], values: Values, files: object = "") -> dict[str, Any]:
    """`mapping` with values laid on it by their dotted keys; `{files}` in texts is replaced."""
    for dotted, value in values.items():
        layer: Any = value
        for key in reversed(dotted.split(".")):
            layer = {key: layer}
        mapping = merge(mapping, layer)
    return dict(_filled(mapping, str(files)))


def _filled(value: Any, files: str) -> Any:
    if isinstance(value, dict):
        return {key: _filled(inner, files) for key, inner in value.items()}
    if isinstance(value, list):
        return [_filled(inner, files) for inner in value]
    return value.replace("{files}", files) if isinstance(value, str) else value


def value_of(recipe: Recipe, dotted: str) -> Any:
    """The value that a recipe has for a key."""
    found: Any = recipe
    for name in dotted.split("."):
        found = getattr(found, name)
    return found


def sides(row: Row, mapping: dict[str, Any], files: object = "") -> tuple[dict[str, Any], dict[str, Any]]:
    """The recipe without and with the row's value, as mappings; AssertionError where they have the same value."""
    before = laid(mapping, row.beside, files)
    after = laid(before, {row.key: row.value}, files)
    if row.by != "refusal":
        assert value_of(load_mapping(before), row.key) != value_of(load_mapping(after), row.key), row.key
    return before, after


def differs(row: Row, before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Why a row does not hold, from what was observed without and with its value; empty where it does.

    `refused` among the observations is what the user was told instead of a result.
    """
    name = row.key.rpartition(".")[2]
    if row.seen != "refused" and before.get("refused"):
        return f"{row.key}: its own recipe is refused: {before['refused']}"
    if row.by == "refusal" and after.get("refused"):
        return "" if name in after["refused"] else f"{row.key}: refused, but not by its name: {after['refused']}"
    if row.seen != "refused" and after.get("refused"):
        return f"{row.key}: {row.value!r} is refused: {after['refused']}"
    if before.get(row.seen) != after.get(row.seen):
        return ""
    return f"{row.key}: {row.value!r} changes nothing: '{row.seen}' stays {str(before.get(row.seen))[:200]}"


def prepared(run: Run) -> dict[str, list[Any]]:
    """The ids and labels of the rows that `prepare` wrote, without where they came from."""
    names = {"rows": "train", "held_out": "eval", "pairs": "preferences"}
    files = {seen: run.path / "prepare" / f"{name}.jsonl" for seen, name in names.items()}
    return {
        seen: [{k: v for k, v in row.items() if "ids" in k or k == "labels"} for row in read_jsonl(file)]
        for seen, file in files.items()
        if file.is_file()
    }


def _rows(where: str, section: str, *each: tuple[Any, ...]) -> tuple[Row, ...]:
    """Rows as (key, value, seen), and the values beside it where there are some; keys are the section's."""
    return tuple(
        Row(key=f"{section}{key}", value=value, where=where, seen=seen, beside=rest[0] if rest else {})
        for key, value, seen, *rest in each
    )


def _optimization(section: str) -> tuple[Row, ...]:
    """What SFT and DPO share, each observed in both."""
    every = {f"{section}.save_strategy": "steps", f"{section}.save_steps": 1}
    cpu = "accelerate passes over it on a CPU, so the backend refuses it there"
    return (
        *_rows(
            section, f"{section}.",
            ("num_train_epochs", 2, "steps", {f"{section}.max_steps": -1}),
            ("max_steps", 2, "steps"),
            ("per_device_train_batch_size", 3, "rows"),
            ("gradient_accumulation_steps", 2, "rows"),
            ("learning_rate", 1e-3, "weights"),
            ("lr_scheduler_type", "linear", "rates"),
            ("warmup_steps", 2, "rates"),
            ("weight_decay", 0.5, "weights"),
            ("max_grad_norm", 1e-3, "weights"),
            ("optim", "sgd", "weights"),
            ("adam_beta1", 0.5, "weights"),
            ("adam_beta2", 0.5, "weights"),
            ("adam_epsilon", 0.1, "weights"),
            ("gradient_checkpointing", True, "forwards"),
            ("bf16", True, "losses"),
            ("seed", 1, "initial"),
            ("data_seed", 1, "rows"),
            ("full_determinism", True, "deterministic"),
            ("logging_steps", 3, "losses", {f"{section}.save_strategy": "no"}),  # a step that is saved is logged
            ("save_strategy", "no", "checkpoints", every),
            ("save_steps", 2, "checkpoints", {**every, f"{section}.save_total_limit": 3}),
            ("save_total_limit", 1, "checkpoints", every),
            ("dataloader_num_workers", 1, "loaders"),
            ("report_to", "tensorboard", "trackers"),
            ("output_dir", "{files}/published", "published"),
        ),
        Row(
            key=f"{section}.on_oom", value="shrink", where=section, seen="refused", by="argument",
            beside={f"{section}.per_device_train_batch_size": 6},
            why="no test is to use up a machine's memory; the trainer's step says what PyTorch says, of more rows than fit",
        ),
        Row(
            key=f"{section}.on_nan", value="ignore", where=section, seen="refused",
            beside={f"{section}.learning_rate": 1e30, f"{section}.max_grad_norm": 0.0},
        ),
        Row(key=f"{section}.fp16", value=True, where=section, seen="losses", by="refusal", why=cpu),
        Row(key=f"{section}.tf32", value=True, where=section, seen="losses", by="refusal", why="NVIDIA GPUs alone have it"),
        Row(
            key=f"{section}.torch_compile", value=True, where=section, seen="compiled", by="argument",
            why="compiling takes a minute and a C++ compiler; torch.compile is called, and gives the model back",
        ),
    )  # fmt: skip


HELD_OUT = {"data.eval_fraction": 0.5, "train.eval_strategy": "steps", "train.eval_steps": 1}
PATIENT = {**HELD_OUT, "train.max_steps": 6, "train.save_strategy": "steps", "train.save_steps": 1}

TRAIN = (
    *_optimization("train"),
    *_rows(
        "train", "train.",
        ("max_length", 28, "tokens", {"data.on_overlong": "truncate"}),
        ("per_device_eval_batch_size", 1, "eval_calls", HELD_OUT),
        ("eval_strategy", "steps", "evaluations", {**HELD_OUT, "train.eval_strategy": "no"}),
        ("eval_steps", 2, "evaluations", HELD_OUT),
        ("method", "full", "tensors"),
        ("completion_only_loss", False, "losses"),
        ("packing", True, "rows"),
        ("packing_strategy", "wrapped", "losses", {"train.packing": True, "train.max_length": 64}),
        ("loss_type", "dft", "losses"),
        ("label_smoothing_factor", 0.5, "losses"),
        ("neftune_noise_alpha", 5.0, "losses"),
        ("early_stopping_patience", 1, "steps", {**PATIENT, "train.early_stopping_threshold": 10.0}),
        ("early_stopping_threshold", 10.0, "steps", {**PATIENT, "train.early_stopping_patience": 1}),
    ),
    *_rows(
        "train", "train.lora.",
        ("r", 4, "tensors"),
        ("lora_alpha", 8, "losses"),
        ("lora_dropout", 0.5, "losses"),
        ("target_modules", ["q_proj"], "tensors"),
        ("bias", "all", "tensors", {"model.path": "{files}/gpt2"}),
        ("use_rslora", True, "losses"),
        ("use_dora", True, "tensors"),
        ("init_lora_weights", "gaussian", "initial"),
        ("modules_to_save", ["norm"], "tensors"),
        ("layers_to_transform", [0], "tensors"),
        ("rank_pattern", {"q_proj": 2}, "tensors"),
        ("alpha_pattern", {"q_proj": 2.0}, "losses"),
    ),
)  # fmt: skip

ALIGN = (
    *_optimization("align"),
    *_rows(
        "align", "align.",
        ("max_length", 44, "rows", {"align.data.on_overlong": "drop"}),
        ("beta", 0.5, "weights"),
        ("loss_type", "hinge", "losses"),
        ("label_smoothing", 0.2, "weights", {"align.loss_type": "robust"}),
        ("precompute_ref_log_probs", False, "forwards"),
    ),
    *(
        Row(
            key=f"align.{key}", value=value, where="read", seen="recipe", by="refusal",
            why="alignment holds no pairs out, so the recipe is refused",
        )
        for key, value in (
            ("eval_strategy", "steps"), ("eval_steps", 5), ("per_device_eval_batch_size", 2),
            ("data.eval_path", "pairs.jsonl"), ("data.eval_fraction", 0.5),
        )
    ),
    Row(key="align.method", value="ppo", where="read", seen="recipe", by="refusal", why="there is one method so far"),
)  # fmt: skip

MODEL = (
    *_rows(
        "train", "model.",
        ("path", "{files}/other", "losses"),
        ("base_model", "{files}/other", "losses", {"model.path": "{files}/adapter"}),
        ("dtype", "bfloat16", "weight_bytes"),
        ("quantization", "nf4", "weight_bytes"),
        ("trust_remote_code", True, "refused", {"model.path": "{files}/custom"}),
        ("attn_implementation", "eager", "sdpa_calls"),
    ),
    Row(
        key="model.device", value="cuda", where="train", seen="device", by="refusal",
        why="refused where there is no such device; where there is, it computes",
    ),
    *_rows("hub", "model.", ("revision", "{files}", "revisions"), ("token", "${LEDGER_TOKEN}", "authorizations")),
)  # fmt: skip


TEMPLATE = "{% for message in messages %}{{ message.content }}!{% endfor %}"


def _data(section: str, rows: str) -> tuple[Row, ...]:
    """The keys of a data section; `rows` is what they change."""
    pairs = section == "align.data"
    kind = "pairs" if pairs else "answers"
    return (
        *_rows(
            "prepare", f"{section}.",
            ("path", f"{{files}}/{kind}-more.jsonl", rows),
            ("fields", {"prompt": "asked"}, rows),
            ("limit", 2, rows),
            ("on_duplicate", "drop", rows, {f"{section}.path": f"{{files}}/{kind}-twice.jsonl"}),
            ("on_overlong", "drop", rows, {f"{section}.on_overlong": "truncate",
                                           ("align" if pairs else "train") + ".max_length": 48}),
            ("on_secret", "keep", "refused", {f"{section}.path": f"{{files}}/{kind}-secret.jsonl"}),
        ),
        *_rows(
            "dataset", f"{section}.",
            ("split", "test", rows, {f"{section}.path": f"hub:{{files}}/hub-{kind}"}),
            ("subset", "second", rows, {f"{section}.path": f"hub:{{files}}/hub-{kind}", f"{section}.subset": "first"}),
        ),
    )  # fmt: skip


DATA = (
    *_data("data", "rows"),
    *_data("align.data", "pairs"),
    *_rows(
        "prepare", "",
        ("data.format", "text", "rows"),
        ("data.eval_path", "{files}/answers-more.jsonl", "held_out"),
        ("data.eval_fraction", 0.5, "held_out"),
        ("template.name", "alpaca", "rows"),
        ("template.path", "{files}/other.jinja", "rows", {"template": {"name": "custom", "path": "{files}/own.jinja"}}),
        ("template.jinja", TEMPLATE.replace("!", "?"), "rows", {"template": {"name": "custom", "jinja": TEMPLATE}}),
        ("template.system", "Be brief.", "rows"),
    ),
    Row(
        key="align.data.format", value="chat", where="prepare", seen="pairs", by="refusal",
        why="pairs have one format, so any other is refused with the file and line",
    ),
    *_rows("prepare", "", ("profile", "instruction", "rows")),
)  # fmt: skip

REST = (
    *_rows("folder", "", ("name", "other", "folders"), ("output_dir", "{files}/elsewhere", "folders")),
    Row(
        key="backend", value="torch", where="folder", seen="folders", by="refusal",
        why="a model belongs to one backend: that of the fake one is refused by the others",
    ),
    *_rows("export", "", ("export", ["bundle"], "files", {"export": []})),
    *_rows(
        "evaluate", "evaluate.",
        ("probes", "{files}/few.jsonl", "answers"),
        ("controls", "{files}/few.jsonl", "answers"),
        ("unseen", "{files}/few.jsonl", "answers"),
        ("heldout", "{files}/texts.jsonl", "heldout"),
        ("max_new_tokens", 2, "answers"),
        ("batch_size", 3, "asked_at_once"),
        ("score_rows", 4, "scored"),
    ),
    *_rows(
        "verdicts", "expect.",
        ("loss_reduction_min", 0.11, "loss_convergence"),
        ("loss_first_tolerance", 0.11, "loss_is_of_answers"),
        ("loss_below_unigram", False, "loss_end"),
        ("learned_min", 0.11, "learned_as_trained"),
        ("unseen_margin_min", 0.11, "learned_net"),
        ("stopped_min", 0.11, "stops_by_itself"),
        ("controls_kept_min", 0.11, "controls_kept"),
        ("heldout_ratio_max", 9.0, "heldout_perplexity"),
        ("lora_changed_min", 0.11, "parameters_changed"),
        ("memory_reduction_min", None, "memory_efficiency"),
        ("preference_accuracy_min", 0.11, "dpo_prefers_chosen"),
        ("resume", False, "resume_losses"),
        ("export_kl_mean_max", {"bundle": 0.5}, "distribution_parity[bundle]"),
        ("export_greedy_min", {"bundle": 0.11}, "greedy_parity[bundle]"),
        ("export_learned_min", 0.11, "learned_parity[bundle]"),
        ("serving", False, "names", {"expect.serving": True}),
        ("invariance", False, "names", {"expect.invariance": True}),
    ),
)  # fmt: skip

# Keys that a schema may or may not have; their rows count where it has them.
COMING = frozenset({"expect.serving", "expect.invariance"})
KEYS = tuple(leaves())
ROWS = tuple(row for row in (*TRAIN, *ALIGN, *MODEL, *DATA, *REST) if row.key in KEYS or row.key not in COMING)


def of_tier(tier: int) -> tuple[Row, ...]:
    return tuple(row for row in ROWS if row.tier == tier)
