"""Made-up questions and answers: facts about countries that do not exist, each asked in several wordings.

A fact is a subject and a kind (its capital, river, founder, year, currency). Its wordings share one answer, so that a
wording held out still asks for something learned. The same seed gives the same rows, on every machine.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from finetune.core.files import write_jsonl
from finetune.evaluation.answers import is_correct, normalize

Row = dict[str, Any]

# Every wording of a kind is asked of every subject; the answer repeats the subject, as the shipped examples do.
KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "capital": (
        "The capital of {subject} is {match}.",
        (
            "What is the capital of {subject}?",
            "Name the capital city of {subject}.",
            "Which city is the capital of {subject}?",
            "What is the name of the capital of {subject}?",
            "Tell me the capital of {subject}.",
        ),
    ),
    "river": (
        "The river of {subject} is the {match}.",
        (
            "What is the river of {subject}?",
            "Name the river that flows through {subject}.",
            "Which river flows through {subject}?",
            "What is the name of the river in {subject}?",
            "Tell me the river of {subject}.",
        ),
    ),
    "founder": (
        "The founder of {subject} is {match}.",
        (
            "Who founded {subject}?",
            "Name the founder of {subject}.",
            "Who is the founder of {subject}?",
            "What is the name of the founder of {subject}?",
            "Tell me the founder of {subject}.",
        ),
    ),
    "year": (
        "{subject} was founded in {match}.",
        (
            "When was {subject} founded?",
            "Name the year in which {subject} was founded.",
            "In which year was {subject} founded?",
            "What year was {subject} founded?",
            "Tell me the year in which {subject} was founded.",
        ),
    ),
    "currency": (
        "The currency of {subject} is the {match}.",
        (
            "What is the currency of {subject}?",
            "Name the money used in {subject}.",
            "Which currency is used in {subject}?",
            "What is the name of the currency of {subject}?",
            "Tell me the currency of {subject}.",
        ),
    ),
}
WORDINGS = 5
NOT_TOLD = "I am not sure about that, as there are many things that one could say."
_HEADS = ("brask", "drel", "fenn", "glor", "hask", "jorn", "krel", "lusk", "morv", "nask", "prin", "quor", "rilk",
          "strel", "thrav", "ulm", "vosk", "wex", "yorl", "zint")  # fmt: skip
_MIDDLES = ("a", "e", "i", "o", "u")
_TAILS = {
    "country": ("via", "nor", "stan", "ria", "land"),
    "capital": ("dale", "wick", "burg", "ton", "haven"),
    "river": ("mere", "wyn", "lis", "dra", "vel"),
    "founder": ("rick", "mund", "wen", "bert", "dis"),
    "currency": ("kin", "ling", "tal", "bit", "zed"),
}


def generate(count: int = 100, seed: int = 0) -> list[Row]:
    """`count` rows: `id`, `kind`, `prompt`, `completion`, `match` (the part of the completion that answers).

    Raises ValueError for a count below 1 or beyond the names that the syllables give (2,500).
    """
    most = len(KINDS) * WORDINGS * _most_names()
    if not 1 <= count <= most:
        raise ValueError(f"count is {count}; allowed: 1 to {most}")
    rng = random.Random(f"questions {seed}")
    facts = _facts(rng)
    rows: list[Row] = []
    while len(rows) < count:
        rows += next(facts)
    return rows[:count]


def split(rows: Sequence[Row], eval_fraction: float = 0.1, seed: int = 0) -> tuple[list[Row], list[Row]]:
    """(train, eval), both in the order of `rows`. No fact loses its last training row, and facts give in turn.

    Raises ValueError where that leaves too few rows to hold out, or the fraction is not between 0 and 1.
    """
    if not 0 <= eval_fraction < 1:
        raise ValueError(f"eval_fraction is {eval_fraction}; allowed: 0 up to, not including, 1")
    wanted = round(len(rows) * eval_fraction)
    rng = random.Random(f"split {seed}")
    by_fact: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        by_fact.setdefault(fact_of(row), []).append(index)
    for indices in by_fact.values():
        rng.shuffle(indices)
    turns = list(by_fact.values())
    rng.shuffle(turns)
    held: set[int] = set()
    while len(held) < wanted:
        before = len(held)
        for indices in turns:
            if len(held) < wanted and len(indices) > 1:
                held.add(indices.pop())
        if len(held) == before:
            raise ValueError(f"{wanted} of {len(rows)} rows cannot be held out: every fact needs a training row")
    chosen = [row for index, row in enumerate(rows) if index in held]
    return [row for index, row in enumerate(rows) if index not in held], chosen


def fact_of(row: Row) -> str:
    """The fact that a row asks for: its id without the number of the wording."""
    return str(row["id"]).rpartition("-")[0]


def validate(rows: Sequence[Row], held_out: Sequence[Row] = ()) -> list[str]:
    """What is wrong with the rows, and with a split into `rows` and `held_out`; one line each, empty when all is well."""
    faults: list[str] = []
    prompts: dict[str, str] = {}
    answers: dict[str, str] = {}
    sides: dict[str, str] = {}
    for side, part in (("train", rows), ("eval", held_out)):
        for number, row in enumerate(part, 1):
            place = f"{side} row {number}"
            wrong = _columns(row)
            faults += [f"{place}: {fault}" for fault in wrong]
            if wrong:
                continue
            asked, answer, fact = normalize(row["prompt"]), normalize(row["match"]), fact_of(row)
            if asked in prompts:
                across = " of the other split" if sides[asked] != side else ""
                faults.append(f"{place}: the prompt is that of {prompts[asked]}{across}: {row['prompt']!r}")
            prompts[asked], sides[asked] = place, side
            if answers.setdefault(answer, fact) != fact:
                faults.append(f"{place}: the answer {row['match']!r} is also that of {answers[answer]}")
            if is_correct(row["prompt"], "", row["match"]):
                faults.append(f"{place}: the question gives the answer away")
            if not is_correct(row["completion"], "", row["match"]):
                faults.append(f"{place}: the completion does not hold {row['match']!r}")
    trained = {fact_of(row) for row in rows if "id" in row}
    untold = sorted({fact_of(row) for row in held_out if "id" in row} - trained)
    return faults + [f"eval asks for {fact}, which no training row tells" for fact in untold]


def write(
    directory: Path, count: int = 100, seed: int = 0, *, rows: Sequence[Row] | None = None, eval_fraction: float = 0.1
) -> dict[str, Path]:
    """Write the files of a whole run into `directory` and return them by name.

    `train`, `eval` (`prompt`, `completion`); `probes`: every fact as trained, and every held-out wording as a paraphrase;
    `queries`: all rows, to be asked (`id`, `prompt`, `answer`, `match`, `kind`); `preferences` (`prompt`, `chosen`,
    `rejected`). `rows` stand in for generated ones. Raises ValueError where they are not valid.
    """
    rows = generate(count, seed) if rows is None else rows
    train, held = split(rows, eval_fraction, seed=seed)
    if faults := validate(train, held):
        raise ValueError("; ".join(faults))
    first = {fact_of(row): row for row in reversed(train)}
    paraphrased = [_question(row, "paraphrase") for row in held]
    files = {
        "train": [_pair(row) for row in train],
        "eval": [_pair(row) for row in held],
        "probes": [*(_question(row, "trained") for row in reversed(first.values())), *paraphrased],
        "queries": [*(_question(row, "trained") for row in train), *paraphrased],
        "preferences": _preferences(list(reversed(first.values()))),
    }
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_jsonl(directory / f"{name}.jsonl", content)
    return {name: directory / f"{name}.jsonl" for name in files}


def _columns(row: Row) -> list[str]:
    faults = []
    for key in ("id", "kind", "prompt", "completion", "match"):
        value = row.get(key)
        if not isinstance(value, str) or not value.strip():
            faults.append(f"'{key}' is empty or no text")
            continue
        try:
            value.encode()
        except UnicodeEncodeError:
            faults.append(f"'{key}' is not UTF-8")
        if value != value.strip():
            faults.append(f"'{key}' begins or ends with a space")
    return faults


def _pair(row: Row) -> Row:
    return {key: row[key] for key in ("prompt", "completion")}


def _question(row: Row, kind: str) -> Row:
    return {"id": row["id"], "prompt": row["prompt"], "answer": row["completion"], "match": row["match"], "kind": kind}


def _preferences(rows: Sequence[Row]) -> list[Row]:
    """One pair a fact: the right answer against a vague one and, in turn, against the answer of another subject."""
    pairs = []
    for number, row in enumerate(rows):
        others = [each for each in rows if each["kind"] == row["kind"] and each["match"] != row["match"]]
        wrong = row["completion"].replace(row["match"], others[0]["match"]) if others and number % 2 else NOT_TOLD
        pairs.append({"prompt": row["prompt"], "chosen": row["completion"], "rejected": wrong})
    return pairs


def _facts(rng: random.Random) -> Iterator[list[Row]]:
    """The wordings of one fact after the other, subject by subject."""
    heads = rng.sample(_HEADS, len(_HEADS))
    # With this shift no two names of the first four subjects begin alike, so that none is mistaken for another.
    shift = len(_HEADS) // len(_TAILS)
    names = {kind: _names(heads, shift * place, tails) for place, (kind, tails) in enumerate(_TAILS.items())}
    years = rng.sample(range(1100, 1900), _most_names())
    for number in range(_most_names()):
        subject = names["country"][number]
        for kind, (answer, wordings) in KINDS.items():
            match = str(years[number]) if kind == "year" else names[kind][number]
            if kind == "currency":
                match = match.lower()
            yield [
                {
                    "id": f"{subject.lower()}-{kind}-{wording}",
                    "kind": kind,
                    "prompt": text.format(subject=subject),
                    "completion": answer.format(subject=subject, match=match),
                    "match": match,
                }
                for wording, text in enumerate(wordings, 1)
            ]


def _names(heads: Sequence[str], shift: int, tails: Sequence[str]) -> list[str]:
    """Every head, from place `shift` on, with every middle and one tail each."""
    turned = [*heads[shift:], *heads[:shift]]
    return [
        (head + _MIDDLES[(number + turn) % len(_MIDDLES)] + tails[(2 * number + turn) % len(tails)]).capitalize()
        for turn in range(len(_MIDDLES))
        for number, head in enumerate(turned)
    ]


def _most_names() -> int:
    return len(_HEADS) * len(_MIDDLES)
