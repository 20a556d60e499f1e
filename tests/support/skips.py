"""Every test is accounted for: executed, emulated, or skipped for a reason that tests/skips.yaml lists.

A pytest plugin, registered by tests/conftest.py. Under pytest-xdist the controller counts and judges, the workers mark.

A test is `emulated` where it, or a fixture of its, works on the fake backend or a stand-in server: it has the marker, or
its code names something of STAND_INS. A test of the fake backend itself counts as emulated, too.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import CodeType, FunctionType, MappingProxyType, ModuleType
from typing import Any

import pytest

TESTS = Path(__file__).parents[1]
FILE = TESTS / "skips.yaml"
TIERS = ("tier1", "tier2", "tier3", "browser")
MARKER = "emulated"
STAND_INS = (
    "support.town", "support.hub", "support.ollama", "support.project", "finetune.backends.fake",
    "finetune.backends.fake.model", "finetune.backends.fake.rows", "finetune.backends.fake.training",
)  # fmt: skip
_FAKE = re.compile(r"""^fake$|\bbackend\W{1,4}fake\b""")


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One entry of skips.yaml. `most` is None for `all`, `session` None where any will do, "none" outside of nox."""

    tiers: tuple[str, ...]
    reason: str
    most: int | None
    why: str
    session: str | None = None
    platform: str | None = None

    def allows(self, tier: str, reason: str, session: str | None, platform: str) -> bool:
        """Whether a skip of this reason may be here at all."""
        named = self.session is None or (
            session is None if self.session == "none" else re.search(self.session, session or "") is not None
        )
        here = self.platform is None or re.search(self.platform, platform) is not None
        return tier in self.tiers and named and here and re.search(self.reason, reason) is not None


def rules(file: Path = FILE) -> list[Rule]:
    """The entries of a file. Raises pytest.UsageError for one that is none."""
    from ruamel.yaml import YAML

    return [_rule(entry, number) for number, entry in enumerate(YAML(typ="safe").load(file) or [], 1)]


def _rule(entry: Mapping[str, Any], number: int) -> Rule:
    known = {"tier", "reason", "most", "why", "session", "platform"}
    tiers = [entry["tier"]] if isinstance(entry.get("tier"), str) else entry.get("tier") or []
    most = entry.get("most")
    whole = isinstance(entry.get("reason"), str) and entry.get("why") and tiers and set(tiers) <= set(TIERS)
    if not whole or set(entry) - known or not (most == "all" or (isinstance(most, int) and most > 0)):
        raise pytest.UsageError(f"{FILE.name}: entry {number} is no rule: {dict(entry)}")
    return Rule(
        tiers=tuple(tiers),
        reason=entry["reason"],
        most=None if most == "all" else most,
        why=entry["why"],
        session=entry.get("session"),
        platform=entry.get("platform"),
    )


def judge(
    skipped: Sequence[tuple[str, str]], allowed: Sequence[Rule], *, session: str | None, platform: str = sys.platform
) -> list[str]:
    """What is wrong with these skips (node id, reason), one sentence each."""
    counted: Counter[Rule] = Counter()
    unlisted: dict[tuple[str, str], list[str]] = defaultdict(list)
    for node, reason in skipped:
        tier = tier_of(node)
        rule = next((rule for rule in allowed if rule.allows(tier, reason, session, platform)), None)
        if rule is None:
            unlisted[tier, reason].append(node)
        else:
            counted[rule] += 1
    faults = [
        f"{len(nodes)} skipped in {tier} for a reason that {FILE.name} does not list: {reason!r} (first: {nodes[0]})"
        for (tier, reason), nodes in unlisted.items()
    ]
    return faults + [
        f"{count} skipped for {rule.reason!r}, and {FILE.name} allows {rule.most}"
        for rule, count in counted.items()
        if rule.most is not None and count > rule.most
    ]


def tier_of(node: str) -> str:
    """The folder of tests/ that a node id is in."""
    return next((part for part in Path(node.partition("::")[0]).parts if part in TIERS), "elsewhere")


# -- what is emulated --------------------------------------------------------------------------------------------------


def is_emulated(item: pytest.Item) -> bool:
    """Whether a test or one of its fixtures works on a stand-in."""
    if item.get_closest_marker(MARKER):
        return True
    fixtures = getattr(getattr(item, "_fixtureinfo", None), "name2fixturedefs", {})
    functions = [getattr(item, "function", None), *(each.func for defined in fixtures.values() for each in defined)]
    return any(_works_on_a_stand_in(found) for each in functions if (found := inspect.unwrap(each) if each else None))


@cache
def _works_on_a_stand_in(function: Any) -> bool:
    return _search(function, set())


def _search(function: Any, seen: set[Any]) -> bool:
    """Whether the code of a function, or of functions of the same module that it names, names something of STAND_INS."""
    code = getattr(function, "__code__", None)
    if code is None or code in seen:
        return False
    seen.add(code)
    if function.__module__ in STAND_INS:
        return True
    for name in _names(code):
        found = function.__globals__.get(name)
        if name in STAND_INS:  # imported inside
            return True
        if isinstance(found, ModuleType) and found.__name__ in STAND_INS:
            return True
        if getattr(found, "__module__", None) in STAND_INS:
            return True
        if isinstance(found, FunctionType) and found.__module__ == function.__module__ and _search(found, seen):
            return True
        if isinstance(found, str) and _FAKE.search(found):
            return True
    return any(isinstance(constant, str) and _FAKE.search(constant) for constant in _constants(code))


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _constants(code: CodeType) -> Iterator[Any]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _constants(constant)
        elif isinstance(constant, tuple):
            yield from constant
        else:
            yield constant


# -- the plugin --------------------------------------------------------------------------------------------------------


class Accounting:
    """Counts what became of every test, and fails a session over a skip that is not allowed."""

    def __init__(self, allowed: Sequence[Rule], environment: Mapping[str, str] = MappingProxyType(os.environ)) -> None:
        self.allowed, self.session = allowed, environment.get("NOX_CURRENT_SESSION")
        self.ran: dict[str, bool] = {}  # node id: whether it was emulated
        self.skipped: dict[str, str] = {}
        self.faults: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            self.skipped[report.nodeid] = _reason(report)
        elif report.when == "call" or report.failed:
            self.ran[report.nodeid] = MARKER in report.keywords

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A module that is skipped whole."""
        if report.skipped:
            self.skipped[report.nodeid] = _reason(report)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        self.faults = judge(list(self.skipped.items()), self.allowed, session=self.session)
        if self.faults and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.write_line(self.line())
        for fault in self.faults:
            terminalreporter.write_line(f"not accounted for: {fault}", red=True)

    def line(self) -> str:
        """All tests in one line."""
        emulated = sum(self.ran.values())
        reasons = Counter(re.split(r"[.;(]", reason)[0].strip()[:60] for reason in self.skipped.values())
        why = f" ({', '.join(f'{count}: {reason}' for reason, count in reasons.most_common())})" if reasons else ""
        executed = len(self.ran) - emulated
        return f"accounted for: {executed} executed, {emulated} emulated, {len(self.skipped)} skipped{why}"


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    found = report.longrepr
    text = found[2] if isinstance(found, tuple) else str(found)
    return text.removeprefix("Skipped: ")


def register(config: pytest.Config, file: Path = FILE) -> None:
    """What tests/conftest.py does when pytest starts: the marker everywhere, the accounting where it is judged."""
    config.addinivalue_line("markers", f"{MARKER}: works on the fake backend or a stand-in server")
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Accounting(rules(file)), "accounting")


def mark(items: Sequence[pytest.Item]) -> None:
    for item in items:
        if is_emulated(item) and not item.get_closest_marker(MARKER):
            item.add_marker(MARKER)
