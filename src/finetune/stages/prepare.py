"""Read, check, render and tokenize the data, once; everything later reads the rows that this stage wrote."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any, cast

from finetune.backends import tokenizer_of
from finetune.core.console import say
from finetune.core.errors import StageError, UsageError
from finetune.core.files import digest, read_object, write_text
from finetune.data import checks, encode, formats, secrecy, sources, templates
from finetune.data.tokenizer import Tokenizer
from finetune.recipe import Recipe
from finetune.recipe.sections import Data
from finetune.run import Run, evidence, layout
from finetune.run.records import trained
from finetune.stages import Result


def run(recipe: Recipe, run: Run) -> Result:
    """Write `prepare/train.jsonl` (`row`, `input_ids`, `labels`, `file`, `line`), `eval.jsonl`, `preferences.jsonl`,
    `template.json`, `chat_template.jinja`, `preview.txt` and `sources.json`, the data files' digests."""
    tokenizer = tokenizer_of(recipe, Path(evidence.fetched(run)["base"]))
    template = templates.choose(recipe.template, tokenizer)
    out = run.stage_dir("prepare")
    for stale in out.iterdir():
        stale.unlink()
    secrecy.refuse_text(template.source, recipe.template.path or f"the template '{template.name}'")
    write_text(run.path / layout.CHAT_TEMPLATE.path, template.source)
    known: trained.Template = {"name": template.name, "sha256": template.digest, "system": recipe.template.system}
    evidence.write(run, layout.TEMPLATE, known)
    notes = [template.note] if template.note else []
    metrics: dict[str, Any] = {"vocab_size": tokenizer.vocab_size, "template_sha256": template.digest}
    if recipe.train is not None and recipe.data is not None:
        metrics |= _sft_rows(recipe, run, tokenizer, template, notes)
    if recipe.align is not None:
        metrics |= _preference_rows(recipe, run, tokenizer, template, notes)
    evidence.write(run, layout.SOURCES, {str(path): digest(path) for path in sources.local_files(recipe, "prepare")})
    for note in notes:
        say(f"note: {note}")
    return {"metrics": metrics, "artifacts": sorted(path for path in out.iterdir()), "notes": notes}


def _examples(data: Data, recipe: Recipe) -> list[formats.Example]:
    token = recipe.model.token.get_secret_value() if recipe.model.token else None
    rows = sources.read(data, token)
    if not secrecy.allowed(recipe):
        secrecy.refuse(rows)
    return formats.to_examples(rows, data)


def _encode(
    data: Data, recipe: Recipe, tokenizer: Tokenizer, template: templates.ChatTemplate, notes: list[str]
) -> list[encode.Encoded]:
    assert recipe.train is not None
    encoder = partial(
        encode.encode_sft,
        tokenizer=tokenizer,
        template=template,
        system=recipe.template.system,
        completion_only=recipe.train.completion_only_loss,
    )
    encoded = encode.encode_all(_examples(data, recipe), encoder)
    kept, found = checks.check(encoded, data, recipe.train.max_length, eos_ids=tokenizer.eos_ids)
    notes.extend(found)
    return kept


def _sft_rows(
    recipe: Recipe, run: Run, tokenizer: Tokenizer, template: templates.ChatTemplate, notes: list[str]
) -> dict[str, Any]:
    data = recipe.data
    assert data is not None and recipe.train is not None
    train = _encode(data, recipe, tokenizer, template, notes)
    held_out: list[encode.Encoded] = []
    if data.eval_path:
        held_out = _encode(data.model_copy(update={"path": data.eval_path}), recipe, tokenizer, template, notes)
    elif data.eval_fraction:
        train, held_out = checks.split(train, data.eval_fraction, recipe.train.seed)
    if recipe.train.early_stopping_patience and not held_out:
        raise StageError("train.early_stopping_patience needs held-out rows: set data.eval_fraction or data.eval_path")
    _check_positions(Path(evidence.fetched(run)["base"]), [*train, *held_out])
    evidence.write_rows(run, layout.TRAIN_ROWS, [_stored(row) for row in train])
    if held_out:
        evidence.write_rows(run, layout.EVAL_ROWS, [_stored(row) for row in held_out])
    preview = encode.preview(train[0], tokenizer)
    write_text(run.path / layout.PREVIEW.path, preview + "\n")
    say(preview)
    trained = [sum(label != -100 for label in row.labels) for row in train]
    return {
        "rows": len(train),
        "eval_rows": len(held_out),
        "tokens": sum(len(row.input_ids) for row in train),
        "trained_tokens": sum(trained),
        "trained_tokens_min": min(trained),
        "longest_row": max(len(row.input_ids) for row in train),
        "lost_answer_tokens": sum(row.lost_answer_tokens for row in train),
        "unigram_entropy": encode.unigram_entropy([[x for x in row.labels if x != -100] for row in train]),
        "uniform_entropy": math.log(tokenizer.vocab_size),
    }


def _check_positions(base: Path, rows: list[encode.Encoded]) -> None:
    """A row beyond the positions that a model knows ends in an index error, or in noise."""
    config = read_object(base / "config.json")
    most = config.get("max_position_embeddings") or config.get("n_positions")
    longest = max(rows, key=lambda row: len(row.input_ids))
    if most and len(longest.input_ids) > most:
        raise UsageError(
            f"{longest.file}:{longest.line}: {len(longest.input_ids)} tokens, and the model knows {most} positions. "
            f"Set train.max_length to {most} or less, and data.on_overlong to drop or truncate"
        )


def _stored(row: encode.Encoded) -> trained.Row:
    return {"row": row.row, "input_ids": row.input_ids, "labels": row.labels, "file": row.file, "line": row.line}


def _preference_rows(
    recipe: Recipe, run: Run, tokenizer: Tokenizer, template: templates.ChatTemplate, notes: list[str]
) -> dict[str, Any]:
    assert recipe.align is not None
    data = recipe.align.pairs
    rows, found = checks.preferences(
        _examples(data, recipe),
        data,
        tokenizer=tokenizer,
        template=template,
        system=recipe.template.system,
        max_length=recipe.align.max_length,
    )
    notes.extend(found)
    evidence.write_rows(run, layout.PAIRS, cast(list[trained.Pair], rows))
    return {"preference_rows": len(rows)}
