"""Is what a training left on disk what it trained: whole, of its last step, as precise, for the same model, with its
tokenizer?"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune.backends import tokenizer_of
from finetune.checks import Part, Verdict, judge, missing
from finetune.checks.parts import TRAININGS, Training, is_lora, lora, single, tells, tensors
from finetune.core.files import read_object
from finetune.data.tokenizer import Tokenizer
from finetune.recipe import Recipe
from finetune.run import Run, checkpoints, evidence, layout

MERGED = layout.MERGED.path
# What an adapter's configuration says about how its tensors act; which layers have some, 'lora_coverage' tells.
ACTING = (
    "r", "lora_alpha", "use_rslora", "use_dora", "bias", "rank_pattern", "alpha_pattern", "modules_to_save",
    "target_modules", "base_model_name_or_path",
)  # fmt: skip
TEXTS = 64  # rows whose text both tokenizers read


# -- of each training --------------------------------------------------------------------------------------------------


def _of_each(
    name: str,
    check: Callable[[Recipe, Run, Training], Verdict],
    place: str,
    when: Callable[[Recipe, Training], bool] = lambda recipe, training: True,
) -> Part:
    """A part of one verdict: of the first training that is not proved, or else of the last one."""

    def trainings(recipe: Recipe) -> list[Training]:
        return [each for each in TRAININGS if each.section(recipe) is not None and when(recipe, each)]

    def judged(recipe: Recipe, run: Run) -> Verdict:
        verdicts = [check(recipe, run, training) for training in trainings(recipe)]
        return next((verdict for verdict in verdicts if not verdict.passed), verdicts[-1])

    return single(name, judged, place, lambda recipe: bool(trainings(recipe)))


def _place(recipe: Recipe, run: Run, training: Training) -> str:
    return training.result(run, recipe).relative_to(run.path).as_posix()


def _whole(recipe: Recipe, run: Run, training: Training) -> Verdict:
    """Some loaders need more than what was trained (a whole embedding); none can do with less."""
    count = training.facts(run)["trainable_parameters"]
    stored = sum(math.prod(facts.shape) for facts in tensors(recipe, training.result(run, recipe)).values())
    why = f"{stored:,} parameters are stored, {count:,} were trained"
    share = stored / count if count else None
    return judge("saved_whole", share, ">=", 1.0, "share", _place(recipe, run, training), why)


def _precise(recipe: Recipe, run: Run, training: Training) -> Verdict:
    """Bytes on disk against bytes in training."""
    files = sorted(training.result(run, recipe).glob("*.safetensors"))
    stored, size = sum(map(evidence.tensor_bytes, files)), training.facts(run)["trainable_bytes"]
    why = f"{stored:,} bytes of tensors are stored, {size:,} were trained; a coarser type would lose some in silence"
    share = stored / size if size else None
    return judge("saved_precision", share, ">=", 1.0, "share of bytes", _place(recipe, run, training), why)


def _last(recipe: Recipe, run: Run, training: Training) -> Verdict:
    """The result, against the checkpoint of the last step, which it is made of."""
    steps, result = training.facts(run)["steps"], training.result(run, recipe)
    checkpoint = result.parent / f"checkpoint-{steps}"
    place = checkpoint.relative_to(run.path).as_posix()
    if not checkpoints.is_checkpoint(checkpoint):
        why = f"the checkpoint of the last step, {place}, is not there, or not whole"
        return missing("saved_last", "==", 0, "tensors differ", training.stage, why)
    last, ours = tensors(recipe, checkpoint), tensors(recipe, result)
    known, there = ({tensor: (facts.sha256, facts.shape) for tensor, facts in each.items()} for each in (ours, last))
    differing = [
        tensor for tensor in {**there, **known} if known.get(tensor) != there.get(tensor)
    ]  # NaN norms equal none
    why = f"{_place(recipe, run, training)} against the checkpoint of the last step, {len(last)} tensors bit by bit"
    why += f"; first: {differing[0]}" if differing else ""
    return judge("saved_last", len(differing) if last else None, "==", 0, "tensors differ", place, why)


def _keeps_last(recipe: Recipe, training: Training) -> bool:
    """Whether the last step leaves a checkpoint, and the result is made of it: early stopping keeps the best one."""
    section = training.asked(recipe)
    return section.save_strategy != "no" and getattr(section, "early_stopping_patience", None) is None


def _configured(recipe: Recipe, run: Run, training: Training) -> Verdict:
    """The adapter's configuration, against the recipe's, or that of the adapter which the training went on from. A setting
    that is not there is PEFT's default, which is nothing."""
    place = f"{_place(recipe, run, training)}/adapter_config.json"
    found = evidence.fetched(run)
    wanted = {**lora(recipe).model_dump(mode="json"), "base_model_name_or_path": found["base"]}
    compared = list(ACTING)
    if found["adapter"]:
        wanted = read_object(Path(found["adapter"]) / "adapter_config.json")
    elif isinstance(wanted["target_modules"], str):
        compared.remove("target_modules")  # a rule, of which the list is made
    path = run.path / place
    if not path.is_file():
        return missing("adapter_config", "==", 0, "settings differ", place, "the adapter has no configuration")
    said = read_object(path)
    off = [key for key in compared if _plain(said.get(key)) != _plain(wanted.get(key))]
    why = f"{len(compared)} settings of the adapter are those it was trained with"
    if off:
        why = f"trained with {off[0]}: {wanted.get(off[0])}, the adapter says {said.get(off[0], 'nothing')}"
    return judge("adapter_config", len(off), "==", 0, "settings differ", place, why)


def _plain(value: Any) -> Any:
    """Modules by their last names, in any order, and nothing as nothing."""
    if isinstance(value, list):
        return sorted({name.rpartition(".")[2] for name in value}) or None
    return None if value == "none" else value or None


# -- of the run --------------------------------------------------------------------------------------------------------


def _finite(recipe: Recipe, run: Run) -> Verdict:
    """Every tensor of what was trained and merged is of numbers; where not, the first model of the run that has others."""
    made = [_place(recipe, run, training) for training in TRAININGS if training.section(recipe) is not None]
    odd = {place: _not_finite(recipe, run.path / place) for place in (*made, MERGED)}
    count = sum(map(len, odd.values()))
    why = f"every tensor of {', '.join(odd)} has a finite norm"
    if count:
        odd = {"the base": _not_finite(recipe, Path(evidence.fetched(run)["base"])), **odd}
        first = next(place for place, names in odd.items() if names)
        why = (
            f"NaN or infinity in {count} tensors of what was trained and merged; they begin in {first}: {odd[first][0]}"
        )
    return judge("weights_finite", count, "==", 0, "tensors with NaN or infinity", MERGED, why)


def _not_finite(recipe: Recipe, directory: Path) -> list[str]:
    """The tensors whose norm is no finite number."""
    return [name for name, facts in tensors(recipe, directory).items() if not math.isfinite(facts.norm)]


def _tokenizer(recipe: Recipe, run: Run) -> Verdict:
    """The tokenizer that goes with the result, against the base's: what each id means, and the ids of the run's texts."""
    ours = tokenizer_of(recipe, Path(evidence.fetched(run)["base"]))
    theirs = tokenizer_of(recipe, run.path / MERGED)
    ids = [number for number in range(ours.vocab_size) if ours.decode([number]) != theirs.decode([number])]
    texts = _texts(recipe, run, ours)
    read = [text for text in texts if ours.encode(text) != theirs.encode(text)]
    why = f"{ours.vocab_size:,} token ids and {len(texts)} texts of the run, read as the base's tokenizer reads them"
    if ids:
        why += f"; id {ids[0]} means {theirs.decode(ids[:1])!r} instead of {ours.decode(ids[:1])!r}"
    elif read:
        why += f"; read otherwise: {read[0][:60]!r}"
    return judge("saved_tokenizer", len(ids) + len(read), "==", 0, "ids or texts differ", MERGED, why)


def _texts(recipe: Recipe, run: Run, tokenizer: Tokenizer) -> list[str]:
    """What the first prepared rows and pairs say."""
    ids: list[list[int]] = []
    if recipe.train is not None:
        ids += [row["input_ids"] for row in evidence.rows(run, layout.TRAIN_ROWS)[:TEXTS]]
    if recipe.align is not None:
        ids += [pair["prompt_ids"] + pair["chosen_ids"] for pair in evidence.rows(run, layout.PAIRS)[:TEXTS]]
    return [tokenizer.decode(row) for row in ids]


PARTS = (
    _of_each("saved_whole", _whole, "train"),
    _of_each("saved_precision", _precise, "train", lambda recipe, training: tells(recipe, "saved_precision")),
    _of_each("saved_last", _last, "train", _keeps_last),
    _of_each("adapter_config", _configured, "train", lambda recipe, training: is_lora(recipe)),
    single("weights_finite", _finite, MERGED, lambda recipe: True),
    single("saved_tokenizer", _tokenizer, MERGED, lambda recipe: True),
)
