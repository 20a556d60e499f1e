"""What must never be trained, looked for in what was: questions in other words, untaught facts, controls, held-out text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from finetune.checks import Verdict, judge
from finetune.data import formats, sources
from finetune.evaluation.answers import normalize
from finetune.recipe import Recipe
from finetune.run import Run, evidence, layout

EVIDENCE = layout.TRAIN_ROWS.path
QUESTION_WORDS = 5  # a shorter question may stand in another text by chance
ANSWER_WORDS = 3
WINDOW = 13  # words, as in the decontamination of GPT-3 (arXiv:2005.14165, appendix C)
# Share of a held-out text's windows that training rows have. Stories made from few patterns share up to 0.58 honestly.
COVERED = 0.8
SEPARATOR = "\x1e"  # between rows


def trained(recipe: Recipe, run: Run) -> dict[int, formats.Example]:
    """The examples of the rows that were prepared for training, read again from the data, by their number; none where the
    recipe has no such training. Raises FinetuneError where the rows or the data cannot be read."""
    if recipe.data is None or recipe.train is None:
        return {}
    examples = formats.to_examples(sources.read(recipe.data), recipe.data)
    rows = evidence.rows(run, layout.TRAIN_ROWS)
    return {row["row"]: examples[row["row"]] for row in rows if row["row"] < len(examples)}


def nothing_leaked(recipe: Recipe, examples: Mapping[int, formats.Example]) -> Verdict:
    """Raises FinetuneError where a file cannot be read."""
    known = Trained([*examples.values(), *_pairs(recipe)])
    found = [*_questions(recipe, known), *_facts(recipe, known), *_texts(recipe, known)]
    why = f"looked for in {len(known.rows)} rows of the data that is trained"
    if found:
        why = f"{found[0]}; {len(found)} in all. What was trained proves nothing about what was learned or kept"
    return judge("nothing_leaked", len(found), "==", 0, "leaked", EVIDENCE, why)


class Trained:
    """The texts of trained rows: message by message, and whole."""

    def __init__(self, examples: Iterable[formats.Example]) -> None:
        self.messages: dict[str, str] = {}
        self.rows: list[tuple[str, str]] = []
        for example in examples:
            place = f"{example.file}:{example.line}"
            parts = [message["content"] for message in example.messages]
            parts += [part for part in (example.text, example.chosen) if part]
            for part in parts:
                self.messages.setdefault(normalize(part), place)
            self.rows.append((f" {normalize(' '.join(parts))} ", place))
        self.whole = SEPARATOR.join(said for said, _ in self.rows)

    def place_of(self, text: str, words: int) -> str | None:
        """Where a text is trained: as a whole message, or, where it has so many words, anywhere."""
        wanted = normalize(text)
        if wanted in self.messages or len(wanted.split()) < words:
            return self.messages.get(wanted)
        if f" {wanted} " not in self.whole:
            return None
        return next(place for said, place in self.rows if f" {wanted} " in said)

    def windows(self, wanted: set[str]) -> set[str]:
        """Those of some windows of words that are trained."""
        first = {window.partition(" ")[0] for window in wanted}
        return {window for said, _ in self.rows for window in _windows(said, first) if window in wanted}


def _windows(text: str, first: set[str] | None = None) -> Iterator[str]:
    """All runs of WINDOW words, or those that begin with some words."""
    words = text.split()
    for at in range(len(words) - WINDOW + 1):
        if first is None or words[at] in first:
            yield " ".join(words[at : at + WINDOW])


def _pairs(recipe: Recipe) -> list[formats.Example]:
    if recipe.align is None:
        return []
    return formats.to_examples(sources.read(recipe.align.pairs), recipe.align.pairs)


def _rows(path: str | None) -> list[sources.Row]:
    return sources.read_jsonl_objects(path) if path else []


def _questions(recipe: Recipe, known: Trained) -> Iterator[str]:
    evaluate = recipe.evaluate
    for name, path in (
        ("probe", evaluate.probes),
        ("control", evaluate.controls),
        ("untaught question", evaluate.unseen),
    ):
        for row in _rows(path):
            if name == "probe" and row.values.get("kind", "trained") == "trained":
                continue
            if place := known.place_of(str(row.values.get("prompt")), QUESTION_WORDS):
                kind = f"{name} ({row.values['kind']})" if name == "probe" else name
                yield f"the {kind} {str(row.values['prompt'])[:80]!r} is trained at {place}"


def _facts(recipe: Recipe, known: Trained) -> Iterator[str]:
    for row in _rows(recipe.evaluate.unseen):
        answer = str(row.values.get("answer"))
        if len(normalize(answer).split()) >= ANSWER_WORDS and (place := known.place_of(answer, ANSWER_WORDS)):
            yield f"the untaught fact {answer[:80]!r} is trained at {place}"


def _texts(recipe: Recipe, known: Trained) -> Iterator[str]:
    texts = [row for row in _rows(recipe.evaluate.heldout) if isinstance(row.values.get("text"), str)]
    windows = [set(_windows(normalize(row.values["text"]))) for row in texts]
    there = known.windows(set().union(*windows))
    for row, own in zip(texts, windows, strict=True):
        text = row.values["text"]
        covered = len(own & there) / len(own) if own else float(known.place_of(text, QUESTION_WORDS) is not None)
        if covered >= COVERED:
            yield f"the held-out text {text[:60]!r} ({row.file}:{row.line}) is trained ({covered:.0%} of it)"
