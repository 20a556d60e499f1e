"""report.html in a browser: offline, from a file, in light and dark, on a desk and on a phone, by keyboard.

Screenshots are left in reports/screenshots.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from finetune.checks import verify
from finetune.core.files import write_text
from finetune.report import compare, files, summary
from finetune.run import Run
from finetune.stages.pipeline import run_directory, run_stages
from support.records import refuted, restate
from support.town import as_if_written_so, build, edit_rows, recipe

SCREENSHOTS = Path(__file__).parents[2] / "reports" / "screenshots"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
GET_PLAYWRIGHT = "the Python package playwright is not there; get it with: python -m pip install playwright"
GET_BROWSER = "no Chromium or Chrome is there; get one with: apt-get install chromium, or: playwright install chromium"
DESK, PHONE = {"width": 1280, "height": 900}, {"width": 360, "height": 780}
NASTY = "<script>document.title = 'broken'</script><img src=x onerror=\"document.title = 'broken'\"> " + "long" * 60

# The ratio of text to what is behind it (WCAG 2.2, 1.4.3), for every element with text of its own; the worst first.
CONTRASTS = """() => {
  const channels = (text) => text.match(/[\\d.]+/g).map(Number);
  const luminance = ([r, g, b]) => [r, g, b].map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const found = channels(getComputedStyle(at).backgroundColor);
      if (found.length < 4 || found[3] > 0) return found;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const element of document.body.querySelectorAll("*")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    const box = element.getBoundingClientRect();
    if (!own || box.width < 2 || box.height < 2 || element.closest("script, style, svg")) continue;
    const [a, b] = [luminance(channels(getComputedStyle(element).color)), luminance(behind(element))].sort((x, y) => y - x);
    found.push([(a + 0.05) / (b + 0.05), element.tagName, element.className, element.textContent.trim().slice(0, 40)]);
  }
  return found.sort((x, y) => x[0] - y[0]);
}"""
# What sticks out of the window on the right and is in nothing that scrolls.
STICKS_OUT = """() => [...document.body.querySelectorAll("*")]
  .filter((e) => e.getBoundingClientRect().right > innerWidth + 0.5 && !e.closest(".scroll, .unseen, .skip"))
  .map((e) => `${e.tagName} ${e.className}`)"""


class Opened(NamedTuple):
    page: Any
    problems: list[str]
    requests: list[str]


Open = Callable[..., Opened]


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
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


def open_all(page: Any) -> int:
    """Open every fold of a page; how many there are."""
    count: int = page.evaluate("() => { const all = [...document.querySelectorAll('details')];"
                               "all.forEach((each) => { each.open = true; }); return all.length; }")  # fmt: skip
    return count


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_the_page_loads_nothing_complains_of_nothing_and_is_pictured(
    opened: Open, passed: Run, failed: Run, size: dict[str, int], scheme: str
) -> None:
    for name, run in (("passed", passed), ("failed", failed)):
        page, problems, requests = opened(run.path / "report.html", size, scheme)
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        width = "narrow" if size is PHONE else "desktop"
        page.screenshot(path=SCREENSHOTS / f"{name}-{width}-{scheme}.png", full_page=True)
        open_all(page)

        assert problems == []
        assert requests == [(run.path / "report.html").as_uri()]
        assert page.title() != "broken"


@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
def test_nothing_sticks_out_of_the_window_even_when_all_is_open(
    opened: Open, failed: Run, size: dict[str, int]
) -> None:
    page = opened(failed.path / "report.html", size).page

    assert open_all(page) >= 8
    assert page.evaluate("document.documentElement.scrollWidth") == size["width"]
    assert page.evaluate(STICKS_OUT) == []


def test_the_first_look_tells_whether_it_worked_and_what_is_wrong(opened: Open, failed: Run) -> None:
    page = opened(failed.path / "report.html", PHONE).page

    assert page.locator("h1").inner_text() == "failed"
    assert re.fullmatch(r"✗\s*2 of \d+ checks refuted, 1 not examined", page.locator(".status").inner_text().strip())
    assert page.locator(".status").bounding_box()["y"] < 200
    assert page.locator(".facts").get_by_text("Taught facts right").is_visible()
    wrong = page.locator("details.verdict.bad")
    assert wrong.count() == 2
    assert all(wrong.nth(i).get_by_text("three of them").is_visible() for i in range(2))
    headings = page.locator("h2").all_inner_texts()
    assert headings == [
        "Verdicts", "What it learned", "Curves", "Exports", "Time and memory", "Make it again", "Recipe", "Environment",
    ]  # fmt: skip


def test_charts_are_drawn_with_the_points_of_the_run(opened: Open, failed: Run) -> None:
    page = opened(failed.path / "report.html").page
    curves = json.loads((failed.path / "report.json").read_text(encoding="utf-8"))["curves"]
    drawn = page.eval_on_selector_all(
        "path.line",
        "paths => paths.map((p) => [p.closest('figure').id, p.getAttribute('d').match(/[ML]/g).length, "
        "p.getBoundingClientRect().width, p.ownerSVGElement.getBoundingClientRect().height])",
    )

    expected = {
        f"{stage}-{name}": sum(isinstance(point.get(name), float | int) for point in curve["points"])
        for stage, curve in curves.items()
        for name in ("loss", "learning_rate", "grad_norm", "tokens_per_second")
    }
    assert expected["train-loss"] == 9
    assert expected["train-grad_norm"] == 12
    assert {name: count for name, count, *_ in drawn if name in expected} == expected
    assert all(width > 150 and height > 100 for _, _, width, height in drawn)
    assert page.locator("path.bad").count() == 1
    assert page.locator("path.bad").bounding_box()["height"] > 100
    assert page.get_by_text("not a finite number at 3 steps: 7, 8, 9").first.is_visible()


def test_the_value_under_the_pointer_is_shown(opened: Open, passed: Run) -> None:
    page = opened(passed.path / "report.html").page
    chart = page.locator("#train-loss")
    chart.get_by_role("img").hover(position={"x": 3, "y": 40})
    first = json.loads((passed.path / "report.json").read_text(encoding="utf-8"))["curves"]["train"]["points"][0][
        "loss"
    ]

    assert chart.locator(".read").inner_text() == f"step 1: {first:.4g}"
    page.mouse.move(0, 0)
    assert chart.locator(".read").inner_text() == ""


def test_the_keyboard_reaches_every_fold_and_every_scrolling_box_in_order(opened: Open, failed: Run) -> None:
    page = opened(failed.path / "report.html").page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the results"
    assert page.locator(".skip").bounding_box()["x"] >= 0
    wanted = page.evaluate(
        "() => [...document.querySelectorAll('nav a, summary, [tabindex]')].filter((e) => e.checkVisibility()"
        " && !e.closest('details:not([open]) > :not(summary)')).map((e, i) => { e.dataset.place = i; return i; })"
    )
    reached = []
    for _ in wanted:
        page.keyboard.press("Tab")
        reached.append(page.evaluate("Number(document.activeElement.dataset.place)"))

    assert len(wanted) >= 15
    assert reached == wanted


def test_a_fold_opens_by_keyboard(opened: Open, passed: Run) -> None:
    page = opened(passed.path / "report.html").page
    fold = page.locator("details.verdict.good").first
    assert fold.locator("table").is_hidden()
    fold.locator("summary").focus()
    page.keyboard.press("Enter")

    assert fold.locator("table").is_visible()
    assert fold.locator("tbody tr").count() > 10


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_stands_out_from_what_is_behind_it(opened: Open, failed: Run, scheme: str) -> None:
    page = opened(failed.path / "report.html", DESK, scheme).page
    open_all(page)
    found = page.evaluate(CONTRASTS)

    assert len(found) > 200
    assert [each for each in found if each[0] < 4.5] == []


def test_on_paper_everything_that_proves_something_is_open_and_nothing_is_dark(opened: Open, failed: Run) -> None:
    page = opened(failed.path / "report.html", DESK, "dark").page
    proved = page.locator("details.verdict.good tbody tr")
    assert proved.count() > 60
    assert not proved.last.is_visible()
    page.emulate_media(media="print", color_scheme="dark")

    assert proved.first.is_visible()
    assert proved.last.is_visible()
    assert page.locator("details.verdict.open td").last.is_visible()
    assert not page.locator("nav").is_visible()
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(27, 31, 36)"
    assert page.pdf().startswith(b"%PDF")


def test_dark_mode_changes_the_colours(opened: Open, passed: Run) -> None:
    def colours(scheme: str) -> list[str]:
        page = opened(passed.path / "report.html", DESK, scheme).page
        wanted = (("body", "backgroundColor"), ("body", "color"), (".chart path.line", "stroke"), (".status", "color"))
        return [page.eval_on_selector(place, f"(e) => getComputedStyle(e).{name}") for place, name in wanted]

    light, dark = colours("light"), colours("dark")

    assert all(one != other for one, other in zip(light, dark, strict=True))


def test_a_phone_names_the_cells_that_have_lost_their_column(opened: Open, passed: Run) -> None:
    page = opened(passed.path / "report.html", PHONE).page
    cell = page.locator("table.answers td[data-label='After training']").first

    assert page.evaluate("(e) => getComputedStyle(e, '::before').content", cell.element_handle()) == '"After training"'
    above = page.locator("table.answers td[data-label='Expected']").first.bounding_box()
    assert (cell.bounding_box()["x"], cell.bounding_box()["y"] > above["y"]) == (above["x"], True)
    assert cell.get_attribute("role") == "cell"
    assert page.locator("table.answers").first.bounding_box()["width"] <= 360


def test_two_runs_side_by_side(opened: Open, passed: Run, failed: Run, tmp_path: Path) -> None:
    path = tmp_path / "both.html"
    write_text(path, compare.render(compare.compare(passed, failed)))
    for size, scheme in ((PHONE, "light"), (DESK, "dark")):
        page, problems, requests = opened(path, size, scheme)
        open_all(page)
        page.screenshot(
            path=SCREENSHOTS / f"compared-{'narrow' if size is PHONE else 'desktop'}-{scheme}.png", full_page=True
        )

        assert (problems, requests) == ([], [path.as_uri()])
        assert page.evaluate("document.documentElement.scrollWidth") == size["width"]
        assert page.evaluate(STICKS_OUT) == []
        assert [each for each in page.evaluate(CONTRASTS) if each[0] < 4.5] == []
        assert page.locator("#train-loss path.line").count() == 2
        assert page.locator("#verdicts tbody tr").count() == 3
