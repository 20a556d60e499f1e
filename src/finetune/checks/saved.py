"""Is what a training left on disk what it trained: whole, of its last step, as precise, for the same model, with its
tokenizer?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune import evidence
from finetune.backends import TensorFacts, Tokenizer, get
from finetune.checks import Verdict, judge, missing
from finetune.errors import FinetuneError, first_line
from finetune.recipe import Recipe
from finetune.recipe.sections import Lora
from finetune.run import Report, Run, read_jsonl, read_object
from finetune.training import checkpoint_step, checkpoints

# What an adapter's configuration says about how its tensors act; which layers have some, 'lora_coverage' tells.
ACTING = (
    "r", "lora_alpha", "use_rslora", "use_dora", "bias", "rank_pattern", "alpha_pattern", "modules_to_save",
    "target_modules", "base_model_name_or_path",
)  # fmt: skip
TEXTS = 64  # rows whose text both tokenizers read


@dataclass(frozen=True)
class Trained:
    """What one training stage left."""

    stage: str
    directory: Path
    report: Report
    tensors: dict[str, TensorFacts]

    @property
    def place(self) -> str:
        return f"{self.stage}/{self.directory.name}"


def check(recipe: Recipe, run: Run) -> list[Verdict]:
    """One verdict of each name: of the first training that fails, or else of the last one."""
    verdicts: list[Verdict] = []
    for stage, section in (("train", recipe.train), ("align", recipe.align)):
        report = run.report(stage)
        if section is None or report is None:
            continue  # 'stages_finished' speaks of it
        directory = run.path / stage / ("adapter" if recipe.train is None or recipe.train.method == "lora" else "model")
        try:
            trained = Trained(stage, directory, report, get(recipe.backend).tensors(directory))
        except FinetuneError as error:
            verdicts.append(missing("saved_whole", ">=", 1.0, "share", stage, first_line(error)))
            continue
        verdicts += [_whole(trained), *_precise(trained), *_last(recipe, trained)]
        if directory.name == "adapter":
            verdicts.append(_configured(recipe, run, trained))
    chosen: dict[str, Verdict] = {}
    for verdict in verdicts:
        if verdict.name not in chosen or chosen[verdict.name].passed:
            chosen[verdict.name] = verdict
    return [*chosen.values(), _finite(recipe, run), _tokenizer(recipe, run)]


def _finite(recipe: Recipe, run: Run) -> Verdict:
    """Every tensor of what was trained and merged is of numbers; where not, the first model of the run that has others."""
    name, unit, place = "weights_finite", "tensors with NaN or infinity", "merge/model"
    made = [f"{stage}/{kind}" for stage in ("train", "align") for kind in ("adapter", "model")]
    try:
        odd = {each: _not_finite(recipe, run.path / each) for each in made if (run.path / each).is_dir()}
        odd[place] = _not_finite(recipe, run.path / place)
        count = sum(map(len, odd.values()))
        why = f"every tensor of {', '.join(odd)} has a finite norm"
        if count:
            odd = {"the base": _not_finite(recipe, Path(evidence.fetched(run)["base"])), **odd}
            first = next(each for each, names in odd.items() if names)
            why = f"NaN or infinity in {count} tensors of what was trained and merged; they begin in {first}: {odd[first][0]}"
    except FinetuneError as error:
        return missing(name, "==", 0, unit, place, first_line(error))
    return judge(name, count, "==", 0, unit, place, why)


def _not_finite(recipe: Recipe, directory: Path) -> list[str]:
    """The tensors whose norm is no finite number."""
    stored = get(recipe.backend).tensors(directory)
    return [name for name, facts in stored.items() if not math.isfinite(facts.norm)]


def _tokenizer(recipe: Recipe, run: Run) -> Verdict:
    """The tokenizer that goes with the result, against the base's: what each id means, and the ids of the run's texts."""
    name, unit, place = "saved_tokenizer", "ids or texts differ", "merge/model"
    backend = get(recipe.backend)
    try:
        ours = backend.tokenizer(Path(evidence.fetched(run)["base"]))
        theirs = backend.tokenizer(run.path / place)
    except FinetuneError as error:
        return missing(name, "==", 0, unit, place, first_line(error))
    ids = [number for number in range(ours.vocab_size) if ours.decode([number]) != theirs.decode([number])]
    texts = _texts(run, ours)
    read = [text for text in texts if ours.encode(text) != theirs.encode(text)]
    why = f"{ours.vocab_size:,} token ids and {len(texts)} texts of the run, read as the base's tokenizer reads them"
    if ids:
        why += f"; id {ids[0]} means {theirs.decode(ids[:1])!r} instead of {ours.decode(ids[:1])!r}"
    elif read:
        why += f"; read otherwise: {read[0][:60]!r}"
    return judge(name, len(ids) + len(read), "==", 0, unit, place, why)


def _texts(run: Run, tokenizer: Tokenizer) -> list[str]:
    """What the first prepared rows and pairs say."""
    rows = [
        row.get("input_ids") or row["prompt_ids"] + row["chosen_ids"]
        for name in ("train", "preferences")
        if (file := run.path / "prepare" / f"{name}.jsonl").is_file()
        for row in read_jsonl(file)[:TEXTS]
    ]
    return [tokenizer.decode(row) for row in rows]


def _whole(trained: Trained) -> Verdict:
    """Some loaders need more than what was trained (a whole embedding); none can do with less."""
    count = trained.report.metrics.get("trainable_parameters")
    stored = sum(math.prod(facts.shape) for facts in trained.tensors.values())
    why = f"{stored:,} parameters are stored, {count or 0:,} were trained"
    share = stored / count if count else None
    return judge("saved_whole", share, ">=", 1.0, "share", trained.place, why)


def _precise(trained: Trained) -> list[Verdict]:
    """Bytes on disk against bytes in training. Nothing to say of a format other than safetensors."""
    files = sorted(trained.directory.glob("*.safetensors"))
    if not files:
        return []
    stored, size = sum(map(evidence.tensor_bytes, files)), trained.report.metrics.get("trainable_bytes")
    why = (
        f"{stored:,} bytes of tensors are stored, {size or 0:,} were trained; a coarser type would lose some in silence"
    )
    share = stored / size if size else None
    return [judge("saved_precision", share, ">=", 1.0, "share of bytes", trained.place, why)]


def _last(recipe: Recipe, trained: Trained) -> list[Verdict]:
    """The result against the checkpoint of the last step, where it is still there and is what the result is made of."""
    section = recipe.train if trained.stage == "train" else recipe.align
    if getattr(section, "early_stopping_patience", None) is not None:
        return []  # the result is the best checkpoint then
    stored = checkpoints(trained.directory.parent)
    if not stored or checkpoint_step(stored[-1]) != trained.report.metrics.get("steps"):
        return []
    name, place = "saved_last", f"{trained.stage}/{stored[-1].name}"
    try:
        last = get(recipe.backend).tensors(stored[-1])
    except FinetuneError as error:
        return [missing(name, "==", 0, "tensors differ", place, first_line(error))]
    ours = trained.tensors
    known, there = ({tensor: (facts.sha256, facts.shape) for tensor, facts in each.items()} for each in (ours, last))
    differing = [
        tensor for tensor in {**last, **ours} if known.get(tensor) != there.get(tensor)
    ]  # NaN norms equal none
    why = f"{trained.place} against the checkpoint of the last step, {len(last)} tensors bit by bit"
    why += f"; first: {differing[0]}" if differing else ""
    return [judge(name, len(differing), "==", 0, "tensors differ", place, why)]


def _configured(recipe: Recipe, run: Run, trained: Trained) -> Verdict:
    """The adapter's configuration, against the recipe's, or that of the adapter which the training went on from."""
    name, place = "adapter_config", f"{trained.place}/adapter_config.json"
    found = evidence.fetched(run)
    lora = recipe.train.lora if recipe.train else Lora()
    wanted = {**lora.model_dump(mode="json"), "base_model_name_or_path": found["base"]}
    path = run.path / place
    if not path.is_file():
        return missing(name, "==", 0, "settings differ", place, "the adapter has no configuration")
    if found["adapter"]:
        wanted = read_object(Path(found["adapter"]) / "adapter_config.json")
    elif isinstance(wanted["target_modules"], str):
        wanted.pop("target_modules")  # a rule, of which the list is made
    said = read_object(path)
    compared = [key for key in ACTING if key in said and key in wanted]
    off = [key for key in compared if _plain(said[key]) != _plain(wanted[key])]
    why = f"{len(compared)} settings of the adapter are those it was trained with"
    if off:
        why = f"trained with {off[0]}: {wanted[off[0]]}, the adapter says {said[off[0]]}"
    return judge(name, len(off), "==", 0, "settings differ", place, why)


def _plain(value: Any) -> Any:
    """Modules by their last names, in any order, and nothing as nothing."""
    return sorted({name.rpartition(".")[2] for name in value}) if isinstance(value, list) else value or None
