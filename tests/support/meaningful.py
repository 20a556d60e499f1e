"""A pytest plugin of this project's own specs: a bound that proves nothing, which others are told of, fails them."""

from __future__ import annotations

from collections.abc import Generator

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    vacuous = [text for kind, text in getattr(item, "notes", ()) if kind == "vacuous"]
    if report.when == "call" and report.passed and vacuous:
        report.outcome, report.longrepr = "failed", "\n".join(vacuous)
    return report
