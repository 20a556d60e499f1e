"""The pytest plugin (entry point `finetune`): spec files as tests, and fixtures for tests that users write.

    specs/*.yaml, *.spec.yaml      collected as tests (ini option `finetune_specs` names other places)
    --on-cpu                       run specs that ask for GPUs on the CPU where there are too few
    --require NAME                 NAME is there: a test that would skip for want of it fails

Loaded in every pytest session where finetune is installed, so it imports nothing but pytest until a spec is met.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from finetune.testing.collector import SpecFile

DEFAULT_SPECS = ("specs/*.yaml", "specs/*.yml", "*.spec.yaml", "*.spec.yml")
MARKERS = {
    "integration": "a spec's run of the real command line (the default marker of a spec)",
    "smoke": "the fastest specs",
    "slow": "specs that take minutes",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("finetune")
    group.addoption(
        "--on-cpu",
        action="store_true",
        help="Run specs with a gpu_requirement on the CPU where there are too few GPUs, instead of skipping them.",
    )
    group.addoption(
        "--require",
        action="append",
        default=[],
        metavar="NAME",
        help="NAME (gpu, mlx, llamacpp, ...) is there, so a test skipped for want of it fails; repeatable.",
    )
    parser.addini("finetune_specs", f"Spec files, as patterns (default: {' '.join(DEFAULT_SPECS)}).", type="args")
    parser.addini("finetune_on_cpu", "As --on-cpu.", type="bool", default=False)


def pytest_configure(config: pytest.Config) -> None:
    from finetune.testing import fixtures

    for name, what in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {what}")
    config.pluginmanager.register(fixtures, "finetune-fixtures")


def required(config: pytest.Config) -> set[str]:
    """The names that the caller declared to be there."""
    declared = os.environ.get("FT_REQUIRE", "").split(",")
    return {name.strip() for name in (*declared, *config.getoption("--require")) if name.strip()}


def lacking(config: pytest.Config, name: str, reason: str) -> None:
    """Skip the test with the reason (say how to get it), or fail it where `name` was required."""
    if name in required(config):
        pytest.fail(f"'{name}' was required, but: {reason}", pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def skip_or_fail(pytestconfig: pytest.Config) -> Callable[[str, str], None]:
    """`skip_or_fail(name, reason)`: skip with the reason, or fail where `name` was required (`--require NAME`)."""
    return functools.partial(lacking, pytestconfig)


def patterns(config: pytest.Config) -> Iterable[str]:
    return config.getini("finetune_specs") or DEFAULT_SPECS


def is_spec(path: Path, config: pytest.Config) -> bool:
    """Whether a file is a spec: by its name and folders, never by what is in it, so that a typo cannot hide one."""
    return any(path.match(pattern) for pattern in patterns(config))


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> SpecFile | None:
    if file_path.suffix not in (".yaml", ".yml") or not is_spec(file_path, parent.config):
        return None
    from finetune.testing.collector import SpecFile

    return SpecFile.from_parent(parent, path=file_path)


def pytest_collect_directory(path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """A folder that is there for specs and has none is an error: it would be a green run of nothing."""
    folders = {Path(pattern).parent.name for pattern in patterns(parent.config)} - {""}
    if (
        path.name not in folders
        or any(path.rglob("*.py"))
        or any(is_spec(file, parent.config) for file in path.rglob("*"))
    ):
        return None
    from finetune.testing.collector import EmptyFolder

    return EmptyFolder.from_parent(parent, path=path)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Findings that fail nothing (vacuous bounds, warnings) travel with the report, from xdist's workers too."""
    report = yield
    if hasattr(item, "notes"):
        vars(report)["finetune_notes"] = item.notes if report.when == "call" else []
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [report for group in terminalreporter.stats.values() for report in group]
    specs = [report for report in reports if hasattr(report, "finetune_notes")]
    notes = [note for report in specs for note in report.finetune_notes]
    skipped = sum(report.skipped for report in specs)
    if skipped and not any(report.when == "call" for report in specs):
        notes.append(("warning", f"no spec was run: {skipped} skipped"))
    if notes:
        terminalreporter.section("finetune")
    for kind, text in notes:
        terminalreporter.write_line(f"{kind}: {text}", yellow=True)
