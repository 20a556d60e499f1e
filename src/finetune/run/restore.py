"""A run whose log or manifest was damaged or changed, made fit to go on with: what can be told from elsewhere is told again,
what was there is set aside, and both are said."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import partial

from finetune.core.errors import FinetuneError, NewerError, first_line
from finetune.run import evidence, layout, seal
from finetune.run.directory import EVENTS, MANIFEST, Run
from finetune.run.plan import BY_NAME, models_before
from finetune.run.report import Report, made_of

ASIDE = "damaged"  # how a file ends that was set aside


def refuse_newer(run: Run) -> None:
    """Raise NewerError where a later version has written into a run: one that cannot read it must not make it again."""
    reads: list[Callable[[], object]] = [
        run.log,
        run.manifest,
        *(partial(run.report, stage) for stage in layout.REPORTS),
    ]
    for read in reads:
        try:
            read()
        except NewerError:
            raise
        except FinetuneError:  # damaged, and so made again
            continue


def restore(run: Run) -> list[str]:
    """Set a log aside that cannot be read or is not what was sealed, and write one of what the stages' reports and the
    trainers' own logs say; likewise a manifest. Returns a sentence for each; none for
    a sound run."""
    said = []
    fault = None
    try:
        lines = run.log()
    except FinetuneError as error:
        lines, fault = [], seal.Found(file=EVENTS, why=f"cannot be read: {first_line(error)}")
    try:
        manifest = run.manifest()
        why = "" if seal.own(run, manifest, lines) else "was changed after it was written"
    except FinetuneError as error:
        manifest, why = {}, f"cannot be read: {first_line(error)}"
    if why:
        manifest = {}
        said.append(f"{MANIFEST} {why}: it is made again (what was there: {_aside(run, MANIFEST)})")
    if fault := fault or next(seal.log_faults(manifest, lines), None):
        reports = [report for stage in BY_NAME if (report := _sound(run, stage))]
        name = _aside(run, EVENTS)
        run.event("log_restored", why=str(fault), aside=name)
        for report in reports:
            _tell_again(run, report, models_before(BY_NAME[report.stage]))
        said.append(f"{fault}: the log is made again from reports and trainer logs (what was there: {name})")
        if manifest.get("seal"):
            seal.update_manifest(run, seal={"lines": 0, "last": "", "files": manifest["seal"]["files"]})
    return said


def _aside(run: Run, name: str) -> str:
    if not (run.path / name).exists():
        return "nothing"
    number = 1
    while (run.path / f"{name}.{number}.{ASIDE}").exists():
        number += 1
    os.replace(run.path / name, run.path / f"{name}.{number}.{ASIDE}")
    return f"{name}.{number}.{ASIDE}"


def _sound(run: Run, stage: str) -> Report | None:
    """The report of a stage that left what it says; one of any other is left to be found when the stage's turn comes."""
    try:
        report = run.report(stage)
    except FinetuneError:
        return None
    return report if report and not seal.changed(run, report) else None


def _tell_again(run: Run, report: Report, needs: Iterable[str]) -> None:
    run.event(
        "stage_started",
        stage=report.stage,
        fingerprint=report.fingerprint,
        started=report.started,
        of=made_of(run, needs),
    )
    logs = {"train": layout.TRAIN_LOGS, "align": layout.ALIGN_LOGS}.get(report.stage)
    if logs:
        run.event("training", stage=report.stage, resumed_from=report.metrics.get("resumed_from"))
        for step in evidence.read(run, logs):
            run.event("step", stage=report.stage, **step)  # at the time when it was taken
    run.write_report(report)
