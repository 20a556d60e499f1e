"""A stored run for a reader at a terminal: answers before and after, verdicts, times, files. Fits 80 columns; where it goes
into a file or another program, no sentence is cut."""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

from finetune.core.console import duration
from finetune.core.memory import human
from finetune.core.secrets import redact
from finetune.core.streams import styled
from finetune.core.text import visible
from finetune.report import summary
from finetune.report.wording import SETS, ended, held, ordered, result, sentence, small
from finetune.report.wording import metric_lines as metric_lines
from finetune.report.wording import number as number
from finetune.run import Report, Run, outcome

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

SHOWN = {"probes": 4, "controls": 2, "unseen": 2}  # questions of a set; the rest is in the file
_ANSWERS = 8  # of two runs
_STATES = {
    outcome.PROVED: ("proved ", "green"),
    outcome.REFUTED: ("REFUTED", "bold red"),
    outcome.NOT_EXAMINED: ("-      ", "yellow"),
}
_INDENT = 11
_WRAPPED = ("name", "result", "why", "found", "get it with")
_COLUMN = {"base": "before", "trained": "after", "aligned": "aligned"}


def render(document: dict[str, Any], *, width: int = 80) -> str:
    """The report (see `summary.document`) as plain text."""
    stream = io.StringIO()
    _write(_console(stream, width), document)
    return stream.getvalue()


def show(document: dict[str, Any]) -> None:
    """Print the report to stdout, coloured where that is a terminal."""
    _write(_console(sys.stdout), document)


def show_verdicts(stored: Mapping[str, Any], marks: Sequence[str] = ()) -> None:
    """Print verdicts as stored, what explains them, and what has to be known beside them (`run.outcome.marks`), alone."""
    console = _console(sys.stdout)
    listed, cause = stored["verdicts"], stored.get("cause", "")
    _write_verdicts(console, listed, cause)
    console.print(_headline(listed, outcome.headline(listed, cause=cause, marks=marks)))
    _write_hint(console, listed)


def show_answers(run: Run) -> None:
    """Print the answers alone."""
    _write_answers(_console(sys.stdout), summary.answers(run))


def show_exports(exports: list[dict[str, Any]]) -> None:
    """Print the table of exports alone (see `summary.exports`)."""
    _console(sys.stdout).print(_export_table(exports))


def show_table(headings: list[str], rows: list[list[str]]) -> None:
    """Print any small table. A heading that starts with `>` is a right-aligned column."""
    table = _table(headings)
    for row in rows:
        table.add_row(*(_plain(cell) for cell in row))
    _console(sys.stdout).print(table)


def show_facts(title: str, facts: Sequence[tuple[str, str]]) -> None:
    """Print a heading and facts under it, each with its label before it; one without a label is of the heading."""
    console = _console(sys.stdout)
    console.print(_plain(title, "bold"))
    width = max((len(label) for label, _ in facts), default=0)
    for label, text in facts:
        if not label or console.soft_wrap:
            _indented(console, f"{label:<{width}}  {text}" if label else text, 2)
        else:
            console.print(_columns((f"  {label:<{width}}  ", text)))


def _columns(parts: Sequence[str]) -> Table:
    """Texts side by side, of which the last has as many lines as it needs."""
    from rich.table import Table

    grid = Table.grid()
    for _ in parts[:-1]:
        grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row(*map(_plain, parts))
    return grid


def _console(stream: TextIO, width: int | None = None) -> Console:
    from rich.console import Console

    # A reader at a terminal gets lines that fit; what is read by something else (grep, a log) is not wrapped or cut.
    elsewhere = width is None and not stream.isatty()
    return Console(file=styled(stream), width=width, highlight=False, emoji=False, soft_wrap=elsewhere)


def _table(headings: list[str], title: str | None = None, *, tight: bool = False, wrapped: bool = False) -> Table:
    from rich import box
    from rich.table import Table

    padding = (0, 0) if tight else (0, 1)
    table = Table(
        box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False, title_style="bold", padding=padding
    )
    for heading in headings:
        name = heading.lstrip(">")
        justify: Literal["left", "right"] = "right" if heading.startswith(">") else "left"
        table.add_column(name, justify=justify, no_wrap=not wrapped and name not in _WRAPPED, overflow="fold")
    return table


def _plain(text: str, style: str = "") -> Any:
    """Text as it is: square brackets in a model's answer are no markup, and its control characters no orders."""
    from rich.text import Text

    return Text(visible(redact(text)), style=style)


def _write(console: Console, document: dict[str, Any]) -> None:
    rows, listed, exports = document["answers"], document["verdicts"], document["exports"]
    reports = [Report(**stage) for stage in document["stages"]]
    if rows:
        _write_answers(console, rows)
    if listed:
        tabled = [each for each in listed if each["outcome"] == outcome.PROVED and "[" in each["name"]]
        _write_verdicts(console, [each for each in listed if each not in tabled], document["cause"], len(tabled))
    if exports:
        console.print(_export_table(exports))
    if reports:
        console.print(_stage_table(reports))
    _write_files(console, document["run"], reports)
    for line in document["damaged"]:
        console.print(_plain(f"damaged: {line}", "bold red"))
    console.print(_headline(listed, document["conclusion"]) if listed else _plain(document["conclusion"]))
    if document["stopped"]:
        console.print(_plain(ended(document["stopped"]), "bold red"))
    elif document["outdated"]:
        console.print(_plain("a stage ran after these verdicts were written: verify again", "bold red"))
    console.print(_plain(f"verify again: finetune verify {_short(document['run'])}"), soft_wrap=True)
    _write_hint(console, listed)


def _write_answers(console: Console, rows: list[dict[str, Any]]) -> None:
    """A few questions of every set, each answer on one line, then the counts of all of them."""
    phases = summary.phases(rows)
    for name in sorted({row["set"] for row in rows}, key=summary.rank):
        members = [row for row in rows if row["set"] == name]
        kinds: dict[str, list[dict[str, Any]]] = {}
        for row in members:
            kinds.setdefault(str(row.get("kind") or ""), []).append(row)
        each = max(1, SHOWN.get(name, 2) // len(kinds))
        shown = [row for kind in kinds.values() for row in kind[:each]]
        console.print(_plain(SETS.get(name, name), "bold"))
        for row in shown:
            _line(
                console, "", f"{_one_line(row['prompt'])}  (expected: {row.get('match') or _one_line(row['answer'])})"
            )
            for phase in phases:
                _line(console, _COLUMN[phase], *_answer(row["phases"].get(phase)))
        if len(shown) < len(members):
            console.print(_plain(f"  and {len(members) - len(shown)} more in evaluate/answers.jsonl", "dim"))
        console.print()
    console.print(_score_table(rows, phases))


def _line(console: Console, label: str, text: str, style: str = "") -> None:
    _cut(console, f"  {label:<9}{text}" if label else f"  {text}", style)


def _cut(console: Console, text: str, style: str) -> None:
    """One line: cut at a terminal's width, whole anywhere else."""
    if console.soft_wrap:
        console.print(_plain(text, style))
    else:
        console.print(_plain(text, style), no_wrap=True, overflow="ellipsis")


def _answer(given: dict[str, Any] | None) -> tuple[str, str]:
    if given is None:
        return "", ""
    right = bool(given.get("correct"))
    cut = "..." if given.get("finish") == "length" else ""
    return f"{'+' if right else '-'} {_one_line(given['text'])}{cut}", "green" if right else "dim"


def _score_table(rows: list[dict[str, Any]], phases: list[str]) -> Table:
    headings = ["set", "kind", *(f">{_COLUMN[phase]}" for phase in phases)]
    table = _table(headings, "Right answers (+), mean log-probability a token of the right answer")
    scores = summary.scores(rows)
    for name, kind in dict.fromkeys((score.set, score.kind) for score in scores):
        group = {score.phase: score for score in scores if (score.set, score.kind) == (name, kind)}
        table.add_row(_plain(name), _plain(kind), *(_plain(_score(group.get(phase))) for phase in phases))
    return table


def _score(score: summary.Score | None) -> str:
    if score is None or not score.asked:
        return ""
    logprob = "" if score.logprob is None else f" {score.logprob:7.2f}"
    return f"{score.right}/{score.asked}{logprob}"


def _write_verdicts(console: Console, verdicts: list[dict[str, Any]], cause: str | None, tabled: int = 0) -> None:
    """What explains the refuted ones; then each, the refuted first: the number against its bound, why, and what to do.
    `tabled` more are proved and stand in a table."""
    width = max((len(verdict["name"]) for verdict in verdicts), default=0)
    console.print(_plain("Verdicts", "bold"))
    if cause:
        _indented(console, f"{sentence(cause)}.", 2, "bold red")
    for verdict in ordered(verdicts):
        said = outcome.outcome(verdict)
        state, style = _STATES[said]
        told = held(verdict) if said != outcome.NOT_EXAMINED else ""
        console.print(_plain(f"  {state}  {verdict['name']:<{width}}  {told}".rstrip(), style))
        if said == outcome.PROVED:  # the sentence of any other is worth more lines than that of a success
            _cut(console, f"{' ' * _INDENT}{verdict['why']}", "dim")
            continue
        _indented(console, verdict["why"], _INDENT)
        if verdict.get("remedy"):
            _indented(console, f"What to do: {verdict['remedy']}", _INDENT, "bold")
    if tabled:
        more = f"{tabled} verdicts on exports, in the table below (all of them: finetune verify)"
        console.print(_plain(f"  proved   {more}", "green"))
    console.print()


def _indented(console: Console, text: str, by: int, style: str = "") -> None:
    """A text in as many lines as it needs, each indented; in one where no terminal is."""
    from rich.padding import Padding

    if console.soft_wrap:
        console.print(_plain(f"{' ' * by}{text}", style))
    else:
        console.print(Padding(_plain(text, style), (0, 0, 0, by)))


def _headline(verdicts: list[dict[str, Any]], text: str) -> Any:
    return _plain(text, "bold green" if outcome.holds(map(outcome.outcome, verdicts)) else "bold red")


def _write_hint(console: Console, verdicts: list[dict[str, Any]]) -> None:
    """Where more is said of what is refuted."""
    if outcome.of(verdicts, outcome.REFUTED):
        console.print(_plain("what a verdict means: finetune explain NAME"), soft_wrap=True)


def _export_table(exports: list[dict[str, Any]]) -> Table:
    headings = ["format", ">size", ">load", ">tokens/s", ">KL mean", ">KL max", ">same", ">probes", "verdict"]
    title = "Exports: tokens/s read/written, KL divergence from the model before (nats),\n"
    title += "greedy answers that are the same token by token, probes still answered"
    table = _table(headings, title, tight=True)
    for each in exports:
        apart, same, kept = each["distributions"], each["greedy"], each["learned"]
        passed = each["passed"]
        verdict = "" if passed is None else outcome.PROVED if passed else outcome.REFUTED
        table.add_row(
            _plain(each["hop"]),
            _plain(human(each["bytes"]) if each["bytes"] else ""),
            _plain(duration(each["load_seconds"])),
            _plain("/".join(_speed(each[f"{kind}_tokens_per_second"]) for kind in ("prompt", "generation"))),
            *(_plain(small(apart[key]) if apart else "") for key in ("mean", "max")),
            _plain(f"{same['equal']}/{same['compared']}"),
            _plain(f"{kept['kept']}/{kept['known']}"),
            _plain(verdict, "green" if passed else "bold red"),
        )
    return table


def _speed(value: float | None) -> str:
    return "?" if value is None else f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def _stage_table(reports: list[Report]) -> Table:
    table = _table(["stage", ">time", ">peak memory", "result"], "Stages")
    for report in reports:
        peaks = " + ".join(human(size) + (" GPU" if kind == "device" else "") for kind, size in report.peak.items())
        table.add_row(_plain(report.stage), _plain(duration(report.seconds)), _plain(peaks), _plain(result(report)))
    table.add_row(_plain("all"), _plain(duration(sum(report.seconds for report in reports))), "", "")
    return table


def show_comparison(compared: dict[str, Any]) -> None:
    """Print two runs side by side (see `compare.compare`)."""
    _write_comparison(_console(sys.stdout), compared)


def render_comparison(compared: dict[str, Any], *, width: int = 80) -> str:
    """The comparison as plain text."""
    stream = io.StringIO()
    _write_comparison(_console(stream, width), compared)
    return stream.getvalue()


def _write_comparison(console: Console, compared: dict[str, Any]) -> None:
    from finetune.report.compare import setting, told

    for side in ("a", "b"):
        each = compared[side]
        style = {True: "green", False: "bold red"}.get(each["passed"], "")
        console.print(_plain(f"{side.upper()}  {each['name']}: {each['status']}", style), soft_wrap=True)
        console.print(_plain(f"   {each['run']}", "dim"), soft_wrap=True)
        for line in (each["cause"], *each["marks"], *each["damaged"]):
            if line:
                _indented(console, line, 3)
    console.print()
    changed = [[each["key"], setting(each["a"]), setting(each["b"])] for each in compared["recipe"]]
    _write_side_by_side(console, "Recipe keys that differ", ["key", "A", "B"], changed)
    outcomes = [
        [each["name"], *(_outcome(each, side) for side in ("a", "b")), each["wanted"]] for each in compared["verdicts"]
    ]
    _write_side_by_side(console, "Verdicts that differ", ["check", "A", "B", "wanted"], outcomes)
    differing = [each for each in compared["metrics"] if each["difference"] != 0]
    numbers = [
        [each["group"], each["label"], *(told(each, side) for side in ("a", "b", "difference"))] for each in differing
    ]
    _write_side_by_side(console, "Numbers that differ", ["of", "number", ">A", ">B", ">difference"], numbers)
    console.print(_plain(f"{len(compared['metrics']) - len(differing)} numbers are the same", "dim"))
    console.print()
    answers = compared["answers"]
    console.print(_plain(f"Answers that differ at the end: {len(answers)}", "bold"))
    for each in answers[:_ANSWERS]:
        _line(console, "", f"{_one_line(each['prompt'])}  (expected: {_one_line(each['answer'])})")
        for side in ("a", "b"):
            _line(console, side.upper(), *_answer(each[side]))
    if len(answers) > _ANSWERS:
        console.print(_plain(f"  and {len(answers) - _ANSWERS} more in the page", "dim"))


def _outcome(verdict: dict[str, Any], side: str) -> str:
    return f"{verdict[side]} ({verdict[f'{side}_measured']})" if verdict[f"{side}_measured"] else verdict[side]


def _write_side_by_side(console: Console, title: str, headings: list[str], rows: list[list[str]]) -> None:
    if not rows:
        console.print(_plain(f"{title}: none", "bold"))
        console.print()
        return
    table = _table(headings, title, wrapped=True)
    for row in rows:
        table.add_row(*(_plain(cell) for cell in row))
    console.print(table)


def _write_files(console: Console, run: str, reports: list[Report]) -> None:
    console.print(_plain("Files", "bold"))
    console.print(_plain(f"  {run}"), soft_wrap=True)
    for report in reports:
        tops = list(dict.fromkeys("/".join(name.split("/")[:2]) for name in report.artifacts))
        for name in tops:
            console.print(_plain(f"    {name}"), soft_wrap=True)
    console.print()


def _one_line(text: Any) -> str:
    line = " ".join(str(text).split())
    return line if len(line) <= 160 else line[:157] + "..."


def _short(run: str) -> str:
    here = Path.cwd()
    return str(Path(run).relative_to(here)) if Path(run).is_relative_to(here) else run
