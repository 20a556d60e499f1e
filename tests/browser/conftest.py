"""A run that passed and one that failed, with their reports, and a browser that has no network."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune.checks import verify
from finetune.report import files, summary
from finetune.run import Run
from finetune.stages.pipeline import run_directory, run_stages
from support.pages import DESK, Open, Opened
from support.records import refuted, restate
from support.town import as_if_written_so, build, edit_rows, recipe

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
GET_PLAYWRIGHT = "the Python package playwright is not there; get it with: python -m pip install playwright"
GET_BROWSER = "no Chromium or Chrome is there; get one with: apt-get install chromium, or: playwright install chromium"
NASTY = "<script>document.title = 'broken'</script><img src=x onerror=\"document.title = 'broken'\"> " + "long" * 60


@pytest.fixture(scope="session")
def passed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A whole run of the fake backend, with a loss that is no number and an answer made of markup."""
    place = tmp_path_factory.mktemp("browser")
    wanted = recipe(build(place / "town"), place / "runs", export=["bundle"])
    run = run_directory(wanted)
    run_stages(wanted, run)
    assert verify(wanted, run)

    def spoil(rows: list[dict[str, Any]]) -> None:
        rows[1]["phases"]["trained"]["text"] = NASTY
        rows[1]["prompt"] = NASTY

    edit_rows(run, "evaluate/answers.jsonl", spoil)
    write(run)
    return run


@pytest.fixture(scope="session")
def failed(passed: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """That run with two refuted verdicts, one that was not examined, and three losses that are no numbers."""
    place = tmp_path_factory.mktemp("failed") / "failed"
    shutil.copytree(passed.path, place)
    run = Run(place)

    def diverge(events: list[dict[str, Any]]) -> None:
        for event in events:
            if event["event"] == "step" and event["stage"] == "train" and event["step"] in (7, 8, 9):
                event["loss"] = float("nan")

    edit_rows(run, "events.jsonl", diverge)
    as_if_written_so(run)
    said = refuted(measured=3, why=f"three of them: {NASTY}", remedy=f"mend it {NASTY}")
    unknown = {
        "outcome": "not examined",
        "passed": None,
        "measured": None,
        "remedy": "add evaluate.unseen: FILE (JSONL)",
    }
    restate(run, loss_finite=said, learned_parity__bundle=said, learned_net=unknown)
    write(run)
    return run


def write(run: Run) -> None:
    files.write(run, files.render(summary.document(run))[1])


@pytest.fixture(scope="session")
def browser(skip_or_fail: Callable[[str, str], None]) -> Iterator[Any]:
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        skip_or_fail("chromium", GET_PLAYWRIGHT)
    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        found = next(filter(None, map(shutil.which, BROWSERS)), own if Path(own).is_file() else None)
        if found is None:
            skip_or_fail("chromium", GET_BROWSER)
        launched = playwright.chromium.launch(executable_path=found)
        yield launched
        launched.close()


@pytest.fixture
def opened(browser: Any) -> Iterator[Open]:
    """`opened(path, size, scheme)`: the page, without a network; what it complained of and asked for is noted."""
    contexts = []

    def opened(path: Path, size: dict[str, int] = DESK, scheme: str = "light") -> Opened:
        context = browser.new_context(viewport=size, color_scheme=scheme, offline=True, reduced_motion="reduce")
        contexts.append(context)
        page = context.new_page()
        problems: list[str] = []
        requests: list[str] = []
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        return Opened(page, problems, requests)

    yield opened
    for context in contexts:
        context.close()
