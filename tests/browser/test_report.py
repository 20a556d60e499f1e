"""report.html in a browser: offline, from a file, in light and dark, on a desk and on a phone, by keyboard.

Screenshots are left in reports/screenshots.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from finetune.core.files import write_text
from finetune.report import compare
from finetune.run import Run
from support.pages import DESK, PHONE, SCREENSHOTS, Open, open_all

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
