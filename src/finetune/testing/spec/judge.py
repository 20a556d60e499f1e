"""What a spec asked for, held against what its command left behind."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from finetune.checks.expected import EXPECT_KEYS
from finetune.report.summary import verdicts
from finetune.report.terminal import number
from finetune.run import outcome as outcomes
from finetune.run.evidence import EvidenceError
from finetune.testing.spec.execute import Outcome, Served, steps_logged
from finetune.testing.spec.load import Case
from finetune.training.estimate import MIB

Kind = Literal["failed", "warning", "vacuous"]
NEEDED_FALL = 0.95  # of what a model that learned nothing scores: the fall that the check `loss` asks for by default
HEADROOM = 0.25  # over the value measured, where a bound is proposed
LAST_LINES = 15


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that a spec asked for, and what was measured. `key` is the spec's key, `why` a sentence."""

    kind: Kind | Literal["passed"]
    key: str
    why: str
    measured: float | None = None
    bound: float | None = None

    def text(self, case: Case) -> str:
        """`FILE:LINE: key: why`, as editors open it."""
        return f"{case.file}:{case.line(self.key)}: {self.key}: {self.why}"


def judge(case: Case, outcome: Outcome) -> list[Finding]:
    """Everything that the spec asks for, in its order. A command that failed is one finding, with its last words."""
    return [
        *_command(case, outcome),
        *_stderr(case, outcome),
        *(_results(case, outcome) if _ran(case, outcome) else ()),
    ]


def _ran(case: Case, outcome: Outcome) -> bool:
    """Whether there are results: also where `finetune run` ended with 1, which means that a check is refuted."""
    return outcome.code == 0 or (case.spec.whole and outcome.code == 1)


def _results(case: Case, outcome: Outcome) -> Iterator[Finding]:
    yield from _files(case, outcome)
    yield from _loss(case, outcome)
    yield from _verdicts(case, outcome)
    yield from _bounds(case, outcome)
    if case.spec.inference is not None:
        yield from _inference(case, outcome.served, outcome.problem)


def _held(key: str, measured: float | None, compare: str, bound: float, what: str, unit: str = "") -> Finding:
    """A finding from a number: None, NaN and infinity pass no bound."""
    good = measured is not None and math.isfinite(measured)
    passed = good and measured is not None and (measured <= bound if compare == "<=" else measured >= bound)
    shown = "nothing was measured" if measured is None else f"measured {number(measured)}"
    why = f"{what}: {shown}, bound {compare} {number(bound)} {unit}".rstrip()
    return Finding(kind="passed" if passed else "failed", key=key, why=why, measured=measured, bound=bound)


def _command(case: Case, outcome: Outcome) -> Iterator[Finding]:
    if _ran(case, outcome):
        return
    tail = "\n".join(f"    {line}" for line in outcome.stderr.strip().splitlines()[-LAST_LINES:])
    if outcome.code is None:
        limit = case.spec.timeout
        why = f"the command was stopped after {limit} s, and had run for {outcome.seconds:.1f} s; it said last:\n{tail}"
        yield Finding(kind="failed", key="timeout", why=why, measured=outcome.seconds, bound=limit)
        return
    why = f"`finetune {outcome.command[1]}` ended with exit code {outcome.code}, wanted 0; it said last:\n{tail}"
    yield Finding(kind="failed", key="config", why=why, measured=outcome.code, bound=0)


def _stderr(case: Case, outcome: Outcome) -> Iterator[Finding]:
    lines = outcome.stderr.splitlines()
    for field, kind in (("forbidden_patterns", "failed"), ("warn_patterns", "warning")):
        for index, pattern in enumerate(getattr(case.spec.stderr, field)):
            hit = next((line for line in lines if pattern in line), None)
            if hit is not None:
                why = f"standard error holds {pattern!r}: {hit.strip()[:200]}"
                yield Finding(kind=kind, key=f"stderr.{field}.{index}", why=why)  # type: ignore[arg-type]


def _files(case: Case, outcome: Outcome) -> Iterator[Finding]:
    run = outcome.run.path
    for index, pattern in enumerate(case.spec.expected_files):
        if not any(any(place.glob(pattern)) for place in (run / "train", run / "align", run) if place.is_dir()):
            why = f"no file '{pattern}' in the training's directory, nor in the run's"
            yield Finding(kind="failed", key=f"expected_files.{index}", why=why)


def _loss(case: Case, outcome: Outcome) -> Iterator[Finding]:
    wanted = case.spec.loss
    try:
        logged = steps_logged(outcome)
    except EvidenceError as error:
        yield Finding(kind="failed", key="min_steps_logged", why=str(error))
        return
    if logged is None:
        yield Finding(kind="failed", key="min_steps_logged", why="there is no trainer_logs.json with steps in it")
        return
    yield _held("min_steps_logged", len(logged), ">=", case.spec.min_steps_logged, "steps in trainer_logs.json")
    losses = [float(step["loss"]) for step in logged]
    bad = [index for index, loss in enumerate(losses) if not math.isfinite(loss)]
    if wanted.no_nan and bad:
        step = logged[bad[0]]["step"]
        why = f"{len(bad)} of {len(losses)} logged losses are NaN or infinite, the first at step {step}"
        yield Finding(kind="failed", key="loss.no_nan", why=why, measured=len(bad), bound=0)
    final = losses[-1] if losses else None
    if wanted.final_max is not None:
        yield _held("loss.final_max", final, "<=", wanted.final_max, "the final training loss", "nats")
        yield from _vacuous_loss(outcome, losses, wanted.final_max) if losses else ()
    if wanted.final_min is not None:
        yield _held("loss.final_min", final, ">=", wanted.final_min, "the final training loss", "nats")


def _vacuous_loss(outcome: Outcome, losses: list[float], bound: float) -> Iterator[Finding]:
    """A bound that a model passes which learned nothing proves nothing; it is honoured all the same."""
    report = outcome.run.report("prepare")
    metrics = report.metrics if report else {}
    nothing = {
        "its loss before training": losses[0],
        "knowing only how often each token occurs": metrics.get("unigram_entropy"),
        "ln(vocabulary)": metrics.get("uniform_entropy"),
    }
    known = {what: value for what, value in nothing.items() if value is not None and math.isfinite(value)}
    if not known or bound < min(known.values()):
        return
    meaningful = min(known.values()) * NEEDED_FALL
    final, near = losses[-1], losses[-1] * (1 + HEADROOM)
    hint = f", and {number(near)} is {HEADROOM:.0%} above what this run reached"
    why = (
        f"{number(bound)} is vacuous: a model that learned nothing passes it ("
        + "; ".join(f"{what}: {number(value)}" for what, value in known.items())
        + f"). A bound below {number(meaningful)} would mean something{hint if near < meaningful else ''}"
    )
    yield Finding(kind="vacuous", key="loss.final_max", why=why, measured=final, bound=bound)


def _verdicts(case: Case, outcome: Outcome) -> Iterator[Finding]:
    """The checks of the whole run, each verdict a finding at the spec's key that asked for it."""
    if not case.spec.whole:
        return
    stored = verdicts(outcome.run)
    listed = _chosen(case, outcome, stored["verdicts"]) if stored else []
    key = "expect" if case.spec.checks is None else "checks"
    if stored is None or not listed:
        yield Finding(kind="failed", key="expect", why="the run has no verdicts: no check was run")
        return
    refuted = outcomes.of(listed, outcomes.REFUTED)
    if refuted and stored["cause"]:
        yield Finding(kind="failed", key=key, why=stored["cause"])
    if not refuted and not outcomes.holds(map(outcomes.outcome, listed)):
        yield Finding(kind="failed", key=key, why=outcomes.count(listed))
    for verdict in listed:
        yield _verdict(case, verdict)


def _verdict(case: Case, verdict: Mapping[str, Any]) -> Finding:
    """A refuted verdict fails, and says what to do; one that was not examined warns: the spec asked for nothing there, or
    for something that the recipe has nothing to show of."""
    key, measured, said = _key(case, str(verdict["name"])), verdict["measured"], outcomes.outcome(verdict)
    if said == outcomes.NOT_EXAMINED:
        why = f"{verdict['name']} was not examined: {verdict['why']}. What to do: {verdict['remedy']}"
        return Finding(kind="warning", key=key, why=why)
    held = f"{'nothing' if measured is None else number(measured)}, bound {verdict['compare']} "
    why = f"{verdict['name']}: measured {held}{number(verdict['bound'])} {verdict['unit']} ({verdict['why']})"
    if said == outcomes.REFUTED and verdict["remedy"]:
        why += f". What to do: {verdict['remedy']}"
    kind: Literal["passed", "failed"] = "failed" if said == outcomes.REFUTED else "passed"
    return Finding(kind=kind, key=key, why=why, measured=measured, bound=verdict["bound"])


def _chosen(case: Case, outcome: Outcome, stored: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The verdicts of the checks that the spec names; all without a list of them."""
    if case.spec.checks is None:
        return stored
    from dataclasses import asdict

    from finetune.checks import results
    from finetune.recipe import load

    recipe = load(outcome.run.path / "recipe.yaml")
    return [asdict(verdict) for verdict in results(recipe, outcome.run, case.spec.checks)]


def _key(case: Case, name: str) -> str:
    """The spec's key that a verdict stands for."""
    plain, _, export = name.removesuffix("]").partition("[")
    spec, option = case.spec, EXPECT_KEYS.get(plain)
    if export:
        return f"parity.{spec.parity.index(export)}" if export in spec.parity else "parity"
    if spec.expect is not None and option in spec.expect.model_fields_set:
        return f"expect.{option}"
    if plain.startswith("resume") and spec.resume:
        return "resume"
    if option == "learned_min" and spec.learned is not None:
        return "learned.improved_min"
    return "expect" if spec.expect is not None else "checks" if spec.checks is not None else "learned"


def _bounds(case: Case, outcome: Outcome) -> Iterator[Finding]:
    wanted = case.spec.bounds
    reports = [report for name in ("train", "align") if (report := outcome.run.report(name)) is not None]
    peaks = {
        kind: max((report.peak[kind] for report in reports if kind in report.peak), default=None)
        for kind in ("process", "device")
    }
    if wanted.seconds_max is not None:
        yield _held("bounds.seconds_max", outcome.seconds, "<=", wanted.seconds_max, "wall time of the command", "s")
    if wanted.tokens_per_second_min is not None:
        speeds = [report.metrics["tokens_per_second"] for report in reports if report.metrics.get("tokens_per_second")]
        speed = min(speeds, default=None)
        yield _held(
            "bounds.tokens_per_second_min", speed, ">=", wanted.tokens_per_second_min, "training speed", "tokens/s"
        )
    for kind, limit in (("process", wanted.process_mib_max), ("device", wanted.device_mib_max)):
        if limit is not None:
            peak = peaks[kind]
            size = None if peak is None else peak / MIB
            yield _held(f"bounds.{kind}_mib_max", size, "<=", limit, f"peak memory of the {kind} in training", "MiB")


def _inference(case: Case, served: Served | None, problem: str) -> Iterator[Finding]:
    wanted = case.spec.inference
    assert wanted is not None
    if served is None:
        if problem:  # without one the command failed, which is a finding already
            yield Finding(kind="failed", key="inference", why=problem)
        return
    if served.score is None:
        yield Finding(kind="failed", key="inference.prompt", why=f"the model completes the prompt with {served.text!r}")
        return
    score = served.score
    about = f"perplexity of {served.text.strip()[:80]!r} by {score.scorer}"
    yield _held("inference.perplexity_max", score.value, "<=", wanted.perplexity_max, about)
    about = f"share of different tokens among the {score.tokens} of the completion"
    yield _held("inference.distinct_min", score.distinct, ">=", wanted.distinct_min, about)
    from finetune.testing.perplexity import RANDOM_TOKENS_FROM

    random = RANDOM_TOKENS_FROM.get(score.scorer)
    if random is not None and wanted.perplexity_max >= random:
        why = (
            f"{number(wanted.perplexity_max)} is vacuous: random tokens score {number(random)} and more with "
            f"{score.scorer}. A bound of {number(score.value * 2)}, twice what this run reached, would mean something"
        )
        yield Finding(kind="vacuous", key="inference.perplexity_max", why=why, measured=score.value)
