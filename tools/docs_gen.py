"""The docs that are written from the code: docs/recipes.md and the keys in docs/specs.md from the models, the tree
in docs/architecture.md from the source, docs/detection.md from the measured docs/detection.csv.

`python -m tools.docs_gen` writes them; with `--check` it writes nothing and exits 1 when one is out of date.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from finetune.core import schemas
from finetune.models import tiny
from finetune.recipe import Recipe
from finetune.recipe.aliases import ALIASES, OLDER
from finetune.recipe.legacy import FIELD_KEYS
from finetune.recipe.profiles import PROFILES
from finetune.recipe.sections import Align, Data, Evaluate, Expect, Lora, Model, Optimization, Section, Template, Train
from finetune.testing import logs
from finetune.testing.spec.model import Bounds, Inference, Learned, Loss, Spec, Stderr, json_schema
from sabotage import detection
from tools import sabotage_docs

RECIPES = Path("docs/recipes.md")
SPECS = Path("docs/specs.md")
SPEC_SCHEMA = Path("docs/spec.schema.json")
SABOTAGE = Path("docs/sabotage.md")
COMPATIBILITY = Path("docs/compatibility.md")
ARCHITECTURE = Path("docs/architecture.md")
SOURCE = Path("src/finetune")

EXAMPLE = """\
name: support
model: smollm2-135m            # or a hub id, a local directory, a GGUF file
data:
  path: tickets.jsonl          # rows like {"prompt": "...", "completion": "..."}
  eval_fraction: 0.1
train:
  learning_rate: 5e-4
  num_train_epochs: 3
  lora:
    r: 16
evaluate:
  probes: probes.jsonl         # questions the model must answer afterwards
expect:
  learned_min: 0.5             # fewer than half of the probes improved: the run fails
"""

INTRO = f"""\
# Recipes

<!-- Written by `make docs` from the models in src/finetune/recipe/. Do not edit: change the models, then run it. -->

A recipe is a YAML file that says what is wanted: a model, data, how to train, and what must be proved afterwards.

```yaml
{EXAMPLE}```

`finetune validate recipe.yaml` reports every fault at once, each with its line; `finetune run recipe.yaml` runs it.
Only `data.path` must be given (with an `align` section, `align.data.path` too); a default left blank below means empty
(`null`). A key that is not in the tables is an error, with the nearest known key named.

- YAML is version 1.2: `5e-4` is a number and `no` is a word. A file has at most 256 KiB, 10,000 keys and values (what each
  alias stands for counted), 50 levels; numbers fit into 64 bits, and no text holds a NUL byte.
- **Paths** are relative to the recipe's own directory. `model.path` counts as a path when something is there, or when
  it starts with `.`, `/` or `~`; anything else is an embedded name or a hub id. In `data.path`, `hub:owner/name` is a
  data set on the hub, and `shipped:quorra/train.jsonl` comes with the package.
- **Tiny models**: `model: tiny:llama` is a small model with random weights, made on the spot, the same every time: for
  smoke tests, and for training from scratch. Its tokenizer is trained on the texts of `data` (on shipped ones without
  any). Sizes go behind a question mark: `tiny:llama?hidden_size=128&num_hidden_layers=3&vocab_size=1000` (at most so
  many tokens), and `seed`. Architectures: {", ".join(tiny.ARCHITECTURES)}; a wrong option lists those there are.
- **Overrides**: `--set train.max_steps=1` (repeatable, on every command that takes a recipe) lays one value over the
  file. The value is read as YAML, so `--set train.lora.target_modules='[q_proj, v_proj]'` is a list.
- **Environment**: `${{NAME}}` and `${{NAME:-default}}` are replaced in any text. A variable whose name sounds like a
  secret (TOKEN, KEY, PASSWORD, ...), or whose value has the shape of one, may be named by `model.token` only.
- **Secrets** are written into no run. What is told (notes, errors, events, reports, the manifest) has `***` for the values of
  such variables, for the token, for passwords in addresses, and for whatever has the shape of a known token. Data are never
  changed: a secret in a row, a question, a template, a path or any key of the recipe is refused, by its variable, with file
  and line. Where it is none, `data.on_secret: keep` uses rows and questions as they are, and `env -u NAME finetune ...` runs
  without the variable. A value that looks like other text is not looked for in data: under 8 characters, one plain word, a
  few words of under 16 characters, a number or date of under 12, fewer than 5 different characters; messages hide it from
  6 characters on, where it stands alone.
- **Versions**: a recipe may say `schema: {schemas.RECIPE.number}`, the number of its format, as those do that finetune writes;
  one of a later version of finetune is refused. Keys that had another name are read with a note (see compatibility.md).
- **Switching a part off**: `train: null` skips fine-tuning; without an `align` section there is no alignment.
"""

LEGACY = """\
## Older configurations

Files with the sections `training:`, `alignment:` or `dataset:` run unchanged, through
`finetune train --config FILE [--resume CHECKPOINT]` and `finetune align --config FILE`; a file with a `models:` list
goes to `finetune download --config FILE`. They are read as recipes, so an error names the old key and its line:

| old | new |
| --- | --- |
| `training.*` | `train.*` |
| `alignment.*`, with `dataset.*` beside it | `align.*` and `align.data.*` |
| `dataset.*` | `data.*` |
| `dataset.format` with a type of file (`jsonl`, ...) | left out: the file's name tells |
| `huggingface.*` | `model.*` |
| `device` | `model.device` |
"""

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

SPEC_SECTIONS: tuple[tuple[str, type[Section], str], ...] = (
    ("Top level", Spec, "The first three are required."),
    ("`loss`", Loss, "A bound that a model passes which learned nothing is honoured, and reported as vacuous."),
    ("`stderr`", Stderr, "Texts are looked for as they are, in each line."),
    (
        "`inference`",
        Inference,
        "Present: the trained model is served, completes the prompt, and the completion is scored.",
    ),
    ("`learned`", Learned, "The recipe's `evaluate` section says the rest."),
    ("`bounds`", Bounds, "Without a key, no bound."),
)

# What the models leave to the libraries' own names, said in words. A key with neither is an error, and so is a word
# for a key that needs none.
WORDS = {
    "Recipe.align": "Preference alignment; off when absent.",
    "Recipe.data": "What to train on; required unless `train: null`.",
    "Recipe.evaluate": "What the model is asked before and after.",
    "Recipe.expect": "Bounds of the checks.",
    "Recipe.model": "Which model.",
    "Recipe.template": "How a conversation becomes text.",
    "Recipe.train": "How to fine-tune; `null` skips it.",
    "Optimization.adam_beta1": "Decay of Adam's mean of gradients.",
    "Optimization.adam_beta2": "Decay of Adam's mean of squared gradients.",
    "Optimization.adam_epsilon": "Keeps Adam from dividing by zero.",
    "Optimization.bf16": "Compute in bfloat16.",
    "Optimization.dataloader_num_workers": "Processes that load rows; 0 loads in the training process.",
    "Optimization.eval_steps": "Steps between evaluations, with `eval_strategy: steps`.",
    "Optimization.eval_strategy": "When to compute the loss on the held-out rows.",
    "Optimization.fp16": "Compute in float16 with loss scaling; a GPU only.",
    "Optimization.full_determinism": "Deterministic kernels, at some cost in speed.",
    "Optimization.gradient_accumulation_steps": "Batches added up before a weight update.",
    "Optimization.gradient_checkpointing": "Recompute activations in the backward pass: less memory, more time.",
    "Optimization.learning_rate": "Peak learning rate.",
    "Optimization.logging_steps": "Steps between logged losses; a step whose held-out loss is taken is logged, too.",
    "Optimization.lr_scheduler_type": "How the learning rate moves over the run.",
    "Optimization.max_grad_norm": "Gradients are clipped to this norm; 0 turns clipping off.",
    "Optimization.num_train_epochs": "Passes over the rows.",
    "Optimization.optim": "Optimizer, by the name that transformers gives it.",
    "Optimization.per_device_eval_batch_size": "Rows per device and evaluation batch.",
    "Optimization.per_device_train_batch_size": "Rows per device and training batch.",
    "Optimization.report_to": "Trackers by transformers' names: `none`, one, or a list; see trackers.md.",
    "Optimization.save_steps": "Steps between checkpoints.",
    "Optimization.save_strategy": "When to save a checkpoint.",
    "Optimization.save_total_limit": "Checkpoints kept; empty keeps all.",
    "Optimization.seed": "Seed of everything random.",
    "Optimization.tf32": "TF32 matrix multiplication on recent NVIDIA GPUs; the library's choice when empty.",
    "Optimization.torch_compile": "Compile the model with torch.compile.",
    "Optimization.weight_decay": "Weight decay.",
    "Train.early_stopping_threshold": "How much the evaluation loss must fall to count as gain.",
    "Train.label_smoothing_factor": "Share of probability spread over the other tokens.",
    "Train.lora": "Settings of the adapter.",
    "Train.loss_type": "`nll` is cross-entropy; `dft` weighs each token by its own probability.",
    "Train.method": "Train a LoRA adapter, or every weight.",
    "Train.neftune_noise_alpha": "Noise added to the embeddings (NEFTune); off when empty.",
    "Train.packing": "Put several rows into one sequence.",
    "Train.packing_strategy": "How rows are packed.",
    "Lora.alpha_pattern": "`lora_alpha` for modules of these names.",
    "Lora.bias": "Which biases are trained too.",
    "Lora.init_lora_weights": "How the adapter starts; `true` starts without any effect on the model.",
    "Lora.layers_to_transform": "Layers that get an adapter; all when empty.",
    "Lora.lora_alpha": "The adapter's output is scaled by `lora_alpha / r`.",
    "Lora.lora_dropout": "Dropout before the adapter.",
    "Lora.modules_to_save": "Modules trained and saved whole, beside the adapter.",
    "Lora.r": "Rank of the adapter.",
    "Lora.rank_pattern": "`r` for modules of these names.",
    "Lora.use_dora": "Train magnitude and direction apart (DoRA).",
    "Lora.use_rslora": "Scale by `lora_alpha / sqrt(r)` (rank-stabilised).",
    "Align.beta": "How strongly the model is held to its reference.",
    "Align.data": "Preference pairs: `prompt`, `chosen`, `rejected`.",
    "Align.learning_rate": "Peak learning rate.",
    "Align.loss_type": "Loss over the margin between chosen and rejected.",
    "Align.label_smoothing": "Assumed share of pairs labelled the wrong way round.",
    "Align.method": "Direct preference optimisation.",
    "Align.num_train_epochs": "Passes over the pairs.",
    "Evaluate.max_new_tokens": "Tokens an answer may have.",
}

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


def describe(model: type[Section], name: str, field: FieldInfo, unused: set[str]) -> str:
    """What a key is for. Raises KeyError where neither the model nor WORDS says."""
    if field.description:
        return field.description
    unused.discard(f"{model.__name__}.{name}")
    return WORDS[f"{model.__name__}.{name}"]


def recipe_tables() -> Iterator[str]:
    """The recipe's tables. Raises ValueError where WORDS and the models have come apart."""
    unused = set(WORDS)
    yield from tables(SECTIONS, unused)
    if unused:
        raise ValueError(f"docs_gen.WORDS describes keys that need no words: {', '.join(sorted(unused))}")


def tables(sections: Iterable[tuple[str, type[Section], str]], unused: set[str]) -> Iterator[str]:
    """A heading and a table for every section; the WORDS that were needed are taken out of `unused`."""
    for title, model, sentence in sections:
        yield f"## {title}\n\n{sentence}\n"
        rows = [
            (f"`{name}`", kind(field.annotation, field.metadata), default(field), describe(model, name, field, unused))
            for name, field in own_fields(model).items()
        ]
        yield table(("key", "type", "default", "what it is"), rows)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(part.replace('|', chr(92) + '|') for part in line)} |\n" for line in lines)


def recipes() -> str:
    """The text of docs/recipes.md."""
    profiles = [(f"`{name}`", ", ".join(_settings(sections))) for name, sections in PROFILES.items()]
    renamed = [(f"`dataset.{old}`", f"`data.fields.{new}`") for old, new in FIELD_KEYS.items()]
    parts = [
        INTRO,
        "## Profiles\n\n`profile: NAME` sets defaults for a kind of task; whatever the recipe says itself wins.\n",
        table(("profile", "sets"), profiles),
        *recipe_tables(),
        LEGACY,
        "Keys with another name now, beside those in compatibility.md:\n",
        table(("old", "new"), renamed),
    ]
    return "\n".join(parts)


def _settings(sections: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    for section, keys in sections.items():
        for key, value in keys.items():
            yield f"`{section}.{key}: {value if isinstance(value, str) else json.dumps(value)}`"


def tree(folder: Path, depth: int = 0) -> list[str]:
    """The Python files of a package, one a line, each with its docstring's first sentence."""
    name = folder.as_posix() if depth == 0 else folder.name
    lines = [_leaf(f"{name}/", depth, folder / "__init__.py")]
    files = [path for path in sorted(folder.glob("*.py")) if path.name != "__init__.py"]
    lines += [_leaf(path.name, depth + 1, path) for path in files]
    for inner in sorted(path.parent for path in folder.glob("*/__init__.py")):
        lines += tree(inner, depth + 1)
    return lines


def _leaf(name: str, depth: int, module: Path) -> str:
    docstring = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or ""
    sentence = re.split(r"(?<=[.?!])\s", " ".join(docstring.split()), maxsplit=1)[0]
    return f"{'  ' * depth + name:<26}{sentence.removesuffix('.')}".rstrip()


def architecture(text: str, source: Path) -> str:
    """docs/architecture.md with the tree between its markers written anew."""
    return between(text, "tree", "```text\n" + "\n".join(tree(source)) + "\n```")


def specs(text: str) -> str:
    """docs/specs.md with the tables of keys between its markers written anew."""
    return between(text, "keys", "\n" + "\n".join(tables(SPEC_SECTIONS, set())))


def sabotages(text: str) -> str:
    """docs/sabotage.md with the tables of baselines, of places to patch and of what changes files."""
    text = between(text, "baselines", table(("baseline", "what it does"), sabotage_docs.baselines()))
    text = between(text, "targets", table(("name", "place", "what it takes, and gives"), sabotage_docs.places()))
    return between(text, "files", table(("helper", "what it does"), sabotage_docs.helpers()))


def compatibility(text: str) -> str:
    """docs/compatibility.md with the tables of schema numbers, of keys under other names and of logs' columns."""
    kinds = [
        (each.what, f"`{each.file}`", str(each.number), str(each.oldest) if each.steps else "")
        for each in schemas.KINDS
    ]
    keys = [
        (
            ", ".join(f"`{section}.{alias.old}`" for section in alias.sections if section not in OLDER),
            f"`{alias.new}`",
            alias.whose,
        )
        for alias in ALIASES
    ]
    columns = [(name, ", ".join(f"`{column}`" for column in known)) for name, known in logs.COLUMNS.items()]
    text = between(text, "columns", table(("value", "columns, of which the first that is there is taken"), columns))
    text = between(text, "schemas", table(("what", "file", "today", "read from"), kinds))
    return between(text, "aliases", table(("old name", "today", "of"), keys))


def between(text: str, name: str, block: str) -> str:
    """A text with what is between `<!-- name -->` and `<!-- /name -->` replaced; unchanged where it has no markers."""
    before, start, rest = text.partition(f"<!-- {name} -->")
    _, end, after = rest.partition(f"<!-- /{name} -->")
    return f"{before}{start}\n{block}\n{end}{after}" if start and end else text


def outdated(root: Path) -> dict[Path, str]:
    """The generated files whose text is not what the code says now, with the text that they should have."""
    wanted = {root / RECIPES: recipes(), root / SPEC_SCHEMA: json.dumps(json_schema(), indent=2) + "\n"}
    if results := detection.load(root):
        wanted[root / detection.PAGE] = detection.render(results)
    for name, write in (
        (ARCHITECTURE, lambda text: architecture(text, root / SOURCE)),
        (SPECS, specs),
        (SABOTAGE, sabotages),
        (COMPATIBILITY, compatibility),
    ):
        if (root / name).is_file():
            wanted[root / name] = write((root / name).read_text(encoding="utf-8"))
    return {
        path: text for path, text in wanted.items() if not path.is_file() or path.read_text(encoding="utf-8") != text
    }


def main(arguments: list[str] | None = None) -> int:
    """Write the docs under the current directory, or with `--check` say which are out of date (exit code 1)."""
    parser = argparse.ArgumentParser(prog="python -m tools.docs_gen", description="Write the generated docs.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a file is out of date")
    check = parser.parse_args(arguments).check
    found = outdated(Path())
    for path, text in found.items():
        if check:
            print(f"{path} is out of date. Write it with: make docs", file=sys.stderr)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path}")
    return 1 if check and found else 0


if __name__ == "__main__":
    sys.exit(main())
