"""How names, numbers and results are worded, in one place for the terminal and the files alike."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from finetune.core.console import duration
from finetune.core.memory import human
from finetune.run import Report, outcome

PHASES = {"base": "before", "trained": "after training", "aligned": "after alignment"}
SETS = {
    "probes": "What it was taught",
    "controls": "What it must not forget",
    "unseen": "What it was never told (it should not know)",
}
KINDS = {"trained": "asked as trained", "paraphrase": "asked in other words"}
_WRITTEN = {"lora": "LoRA", "dpo": "DPO", "b": "B", "kl": "KL"}
COMPARED = {">=": "at least", "<=": "at most", ">": "more than", "<": "less than", "==": "exactly"}
NOTHING = {outcome.NOT_EXAMINED: "not examined", outcome.REFUTED: "no evidence", outcome.PROVED: "nothing"}
ORDER = (outcome.REFUTED, outcome.NOT_EXAMINED, outcome.PROVED)  # what has to be seen stands first
Kind = Literal["number", "bytes", "share", "seconds"]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """How one number of a stage's report is shown. `better` is None where neither direction is."""

    label: str
    kind: Kind = "number"
    better: Literal["higher", "lower"] | None = None


_METRICS = {
    "trained_correct": Metric(label="right answers, asked as trained", kind="share", better="higher"),
    "paraphrase_correct": Metric(label="right answers, asked in other words", kind="share", better="higher"),
    "controls_correct": Metric(label="right answers to control questions", kind="share", better="higher"),
    "unseen_correct": Metric(label="right answers to facts it was never told", kind="share"),
    "perplexity": Metric(label="perplexity of held-out text", better="lower"),
    "first_loss": Metric(label="first loss"),
    "last_loss": Metric(label="last loss", better="lower"),
    "steps_without_effect": Metric(label="steps that moved no weight", better="lower"),
    "tokens_per_second": Metric(label="tokens a second", better="higher"),
    "seconds_per_step": Metric(label="seconds a step", better="lower"),
    "eval_rows": Metric(label="rows for evaluation"),
    "trained_tokens": Metric(label="tokens trained on"),
    "trained_tokens_min": Metric(label="tokens trained on in the poorest row"),
    "longest_row": Metric(label="longest row (tokens)"),
    "lost_answer_tokens": Metric(label="tokens of answers cut off", better="lower"),
    "unigram_entropy": Metric(label="loss of knowing word frequencies alone"),
    "uniform_entropy": Metric(label="loss of guessing any token"),
    "vocab_size": Metric(label="tokens in the vocabulary"),
    "preference_rows": Metric(label="pairs"),
    "world_size": Metric(label="processes"),
    "weight_bytes": Metric(label="memory of weights", kind="bytes", better="lower"),
    "trainable_bytes": Metric(label="memory of trained weights", kind="bytes", better="lower"),
    "gradient_bytes": Metric(label="memory of gradients", kind="bytes", better="lower"),
    "optimizer_bytes": Metric(label="memory of the optimizer", kind="bytes", better="lower"),
    "bytes": Metric(label="size", kind="bytes"),
    "hops": Metric(label="models compared"),
    "seconds": Metric(label="seconds", kind="seconds", better="lower"),
}
_TELLING = ("first_loss", "last_loss", "tokens_per_second", "seconds_per_step", "rows", "trained_tokens")


def metric(name: str) -> Metric:
    """The wording of a metric; one without its own is its name in words. A phase at the name's end is spelled out."""
    if name in _METRICS:
        return _METRICS[name]
    stem, _, last = name.rpartition("_")
    if last in PHASES:
        found = metric(stem)
        return Metric(label=f"{found.label}, {PHASES[last]}", kind=found.kind, better=found.better)
    if name.endswith("bytes"):
        return Metric(label=name.removesuffix("_bytes").replace("_", " "), kind="bytes")
    return Metric(label=name.replace("_", " "))


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def value(number_: float, kind: Kind = "number") -> str:
    """A number as its kind is read: `1.5 GiB`, `83 %`, `2 min 05 s`, `1,234`."""
    if not math.isfinite(number_):
        return number(number_)
    if kind == "bytes":
        return human(round(number_))
    if kind == "seconds":
        return duration(number_)
    return percent(number_) if kind == "share" else number(number_)


def small(found: float) -> str:
    """A small number by its magnitude: `6.1e-06`."""
    return f"{found:.1e}" if found else "0"


def percent(share: float) -> str:
    """`83 %`; 99.6 % does not become 100 %, nor 0.4 % nothing."""
    if not math.isfinite(share):
        return number(share)
    whole = round(share * 100)
    near = (whole >= 100 and share < 1) or (whole <= 0 and share > 0)
    return f"{share * 100:.1f} %" if near else f"{whole} %"


def number(found: float) -> str:
    """A number at a glance: large and whole ones grouped, others with four digits."""
    if isinstance(found, float) and not math.isfinite(found):
        return "not a number" if math.isnan(found) else "infinity" if found > 0 else "-infinity"
    if isinstance(found, int) or (found.is_integer() and abs(found) < 1e15):
        return f"{int(found):,}"
    return f"{found:,.0f}" if 1000 <= abs(found) < 1e15 else f"{found:.4g}"


def plural(count: int, one: str, many: str = "") -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def sentence(text: str) -> str:
    """Text with a large first letter, but for a name that has none (`train.learning_rate`, `events.jsonl`)."""
    first = text.partition(" ")[0].rstrip(",:;.")
    return text if re.search(r"[._/]", first) else text[:1].upper() + text[1:]


# -- what a stage did --------------------------------------------------------------------------------------------------


def metric_lines(report: Report, limit: int = 4) -> list[str]:
    """The plain numbers of a report, as `name value`, the most telling first."""
    known = [name for name in _TELLING if name in report.metrics]
    named = {name: report.metrics[name] for name in dict.fromkeys([*known, *report.metrics])}
    return [
        f"{metric(name).label} {value(found, metric(name).kind)}" for name, found in named.items() if is_number(found)
    ][:limit]


def result(report: Report) -> str:
    """What a stage did, in a line: its own words where it has some, else its first numbers."""
    tell = _RESULTS.get(report.stage)
    known = {name: found for name, found in report.metrics.items() if found is not None}
    said = [part for part in (tell(known) if tell else ()) if part]
    return ", ".join(said or metric_lines(report))


def _count(numbers: dict[str, Any], name: str, one: str, many: str = "") -> str:
    return plural(int(numbers[name]), one, many) if numbers.get(name) else ""


def _bytes(numbers: dict[str, Any]) -> str:
    return human(int(numbers["bytes"])) if "bytes" in numbers else ""


def _fetched(numbers: dict[str, Any]) -> Iterable[str]:
    return (_count(numbers, "parameters", "parameter"), _bytes(numbers))


def _prepared(numbers: dict[str, Any]) -> Iterable[str]:
    if {"tokens", "trained_tokens"} <= numbers.keys():
        yield (
            f"{_count(numbers, 'rows', 'row')}: {number(numbers['trained_tokens'])} of {number(numbers['tokens'])} "
            "tokens are trained on"
        )
    yield _count(numbers, "eval_rows", "row to evaluate on", "rows to evaluate on")
    yield _count(numbers, "preference_rows", "pair")


def _trained(numbers: dict[str, Any]) -> Iterable[str]:
    if {"first_loss", "last_loss"} <= numbers.keys():
        yield f"loss {number(numbers['first_loss'])} to {number(numbers['last_loss'])}"
    yield _count(numbers, "steps", "step")
    if "tokens_per_second" in numbers:
        yield f"{number(numbers['tokens_per_second'])} tokens/s"


def _evaluated(numbers: dict[str, Any]) -> Iterable[str]:
    groups = {"trained": "as trained", "paraphrase": "in other words", "controls": "controls", "unseen": "never told"}
    told = [f"{words} {_from_to(numbers, f'{name}_correct', percent)}" for name, words in groups.items()
            if _from_to(numbers, f"{name}_correct", percent)]  # fmt: skip
    if told:
        yield "right answers: " + ", ".join(told)
    if change := _from_to(numbers, "perplexity", number):
        yield f"perplexity {change}"


def _from_to(numbers: dict[str, Any], name: str, worded: Callable[[float], str]) -> str:
    """The first and the last phase of a metric; empty where it was not measured."""
    found = [worded(numbers[f"{name}_{phase}"]) for phase in PHASES if f"{name}_{phase}" in numbers]
    if not found:
        return ""
    return found[-1] if found[0] == found[-1] else f"{found[0].removesuffix(' %')} to {found[-1]}"


_EXPERIMENTS = {
    "fresh": "answers of a fresh process",
    "memory": "LoRA against full",
    "resume": "stop and resume",
    "serving": "answers of a server",
    "invariance": "what no correct trainer changes",
}
_RESULTS: dict[str, Callable[[dict[str, Any]], Iterable[str]]] = {
    "fetch": _fetched,
    "prepare": _prepared,
    "rehearse": lambda numbers: [_count(numbers, "exports", "export would work", "exports would work")],
    "train": _trained,
    "align": _trained,
    "evaluate": _evaluated,
    "merge": lambda numbers: [_bytes(numbers)],
    "measure": lambda numbers: [_EXPERIMENTS.get(name, name) for name in numbers.get("experiments", ())],
    "export": lambda numbers: [_count(numbers, "exports", "export"), _bytes(numbers)],
    "compare": lambda numbers: [_count(numbers, "hops", "model compared", "models compared")],
}


# -- verdicts ----------------------------------------------------------------------------------------------------------


def held(verdict: dict[str, Any]) -> str:
    """`0.01 >= 0.05 share`: the measured value, how it is held against the bound, and the unit."""
    measured = "nothing" if verdict["measured"] is None else number(verdict["measured"])
    return f"{measured} {verdict['compare']} {number(verdict['bound'])} {verdict['unit']}".rstrip()


def measured(verdict: dict[str, Any]) -> str:
    """The measured value with its unit: `83 %`, `0.981 relative fall`."""
    if verdict["measured"] is None:
        return NOTHING[outcome.outcome(verdict)]
    return _with_unit(verdict["measured"], verdict["unit"])


def wanted(verdict: dict[str, Any]) -> str:
    """What was wanted: `more than 30 %`."""
    bound = _with_unit(verdict["bound"], verdict["unit"])
    return bound if verdict["unit"] == "yes" else f"{COMPARED.get(verdict['compare'], verdict['compare'])} {bound}"


def _with_unit(found: float, unit: str) -> str:
    word, _, rest = unit.partition(" ")
    if word == "share":
        return f"{percent(found)} {rest}".rstrip()
    if unit == "yes":
        return {0.0: "no", 1.0: "yes"}.get(float(found), number(found))
    return f"{number(found)} {unit}".rstrip()


def ordered(verdicts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Verdicts with the refuted ones first, then what was not examined."""
    return sorted(verdicts, key=lambda verdict: ORDER.index(outcome.outcome(verdict)))


def title(name: str) -> str:
    """A verdict's name as words, without its hop: `distribution_parity[mlx]` is `Distribution parity`."""
    words = [_WRITTEN.get(word, word) for word in name.partition("[")[0].split("_")]
    return " ".join([words[0][:1].upper() + words[0][1:], *words[1:]])


def hop(name: str) -> str:
    """The export that a verdict is about, or empty."""
    return name.partition("[")[2].removesuffix("]")


def status(document: dict[str, Any]) -> str:
    """Whether a run worked, in a few words (see `summary.document`)."""
    if document["stopped"]:
        return f"{document['stopped']['how']} in the stage '{document['stopped']['stage']}'"
    if document["outdated"]:
        return "changed since it was verified"
    if document["passed"] is None:
        return "not verified yet"
    refuted = outcome.of(document["verdicts"], outcome.REFUTED)
    return outcome.count(document["verdicts"]) if refuted else outcome.headline(document["verdicts"])


def ended(stopped: dict[str, Any]) -> str:
    """What stopped a run, in a line (see `summary.stopped`)."""
    how = {"failed": "failed", "interrupted": "was interrupted"}.get(stopped["how"], "is still running, or was killed")
    return f"the stage '{stopped['stage']}' {how}" + (f": {stopped['message']}" if stopped["message"] else "")
