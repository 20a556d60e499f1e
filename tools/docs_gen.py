"""The docs that are written from the code: docs/recipes.md and the keys in docs/specs.md from the models, the tree
in docs/architecture.md from the source, the verdicts in docs/checks.md from the checks, docs/detection.md from the measured
docs/detection.csv.

`python -m tools.docs_gen` writes them; with `--check` it writes nothing and exits 1 when one is out of date.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from finetune.checks import BY_NAME
from finetune.checks.explained import OF_CHECK
from finetune.core import schemas
from finetune.models import tiny
from finetune.recipe.aliases import ALIASES, OLDER
from finetune.recipe.keys import SECTIONS, default, kind, own_fields
from finetune.recipe.legacy import FIELD_KEYS
from finetune.recipe.profiles import PROFILES
from finetune.recipe.sections import Section
from finetune.testing import logs
from finetune.testing.spec.model import Bounds, Inference, Learned, Loss, Spec, Stderr, json_schema
from sabotage import detection
from tools import sabotage_docs

RECIPES = Path("docs/recipes.md")
SPECS = Path("docs/specs.md")
SPEC_SCHEMA = Path("docs/spec.schema.json")
SABOTAGE = Path("docs/sabotage.md")
CHECKS = Path("docs/checks.md")
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


def tables(sections: Iterable[tuple[str, type[Section], str]]) -> Iterator[str]:
    """A heading and a table for every section. Raises ValueError where a key does not say what it is for."""
    for title, model, sentence in sections:
        yield f"## {title}\n\n{sentence}\n"
        rows = [
            (f"`{name}`", kind(field.annotation, field.metadata), default(field), described(model, name, field))
            for name, field in own_fields(model).items()
        ]
        yield table(("key", "type", "default", "what it is"), rows)


def described(model: type[Section], name: str, field: FieldInfo) -> str:
    """What a key is for. Raises ValueError where its field does not say."""
    if not field.description:
        raise ValueError(f"{model.__name__}.{name} has no description")
    return field.description


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
        *tables(SECTIONS),
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
    return between(text, "keys", "\n" + "\n".join(tables(SPEC_SECTIONS)))


def verdicts(text: str) -> str:
    """docs/checks.md with the tables of verdicts, one a check, between its markers written anew."""
    head = ("verdict", "what it measures", "read from", "bound")
    tables = (
        f"**{check}**: {BY_NAME[check].help}\n\n"
        + table(
            head,
            (
                (f"`{name}`", each.measures, ", ".join(map(_place, each.evidence)), each.bound)
                for name, each in entries.items()
            ),
        )
        for check, entries in OF_CHECK.items()
    )
    return between(text, "verdicts", "\n" + "\n".join(tables))


def _place(evidence: str) -> str:
    """A path as code; words as they are."""
    return evidence if " " in evidence else f"`{evidence}`"


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
        (CHECKS, verdicts),
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
