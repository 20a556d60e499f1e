"""report.html on paper: what can be read on a screen with every fold open can be read there, black on white."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune.core.files import write_text
from finetune.report import compare
from finetune.run import Run
from support.pages import DESK, SCREENSHOTS, Open, open_all

# The width within the margins of A4 and of Letter, at 96 pixels an inch.
PAPERS = {"A4": 718, "Letter": 739}
# Left out on paper: what is pressed, what is there for who cannot see, and what a fold says in itself.
LEFT_OUT = "nav, .skip, .unseen, .read, details.verdict.bad .brief, script, style, svg title, svg desc"
# Every text of the page, by its node: where it is drawn, and what keeps it from being read; empty where nothing does.
TEXTS = """(leftOut) => {
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const luminance = (colour) => colour.match(/[\\d.]+/g).slice(0, 3).map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement;
    if (!node.textContent.trim() || element.closest(leftOut)) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    const boxes = [...range.getClientRects()].filter((box) => box.width > 0 && box.height > 0);
    const style = getComputedStyle(element);
    const faults = [];
    if (!boxes.length || !element.checkVisibility({ visibilityProperty: true, opacityProperty: true })) faults.push("unseen");
    if (boxes.some((box) => box.left < 0 || box.right > innerWidth + 0.5)) faults.push("off the paper");
    for (let at = element; at !== document.body; at = at.parentElement) {
      if (at.matches("svg, svg *") || getComputedStyle(at).overflow === "visible") continue;
      const frame = at.getBoundingClientRect();
      if (boxes.some((box) => box.right > frame.right + 0.5 || box.bottom > frame.bottom + 0.5)) faults.push("cut off");
    }
    const ink = luminance(element.closest("svg") ? style.fill : style.color);
    if (1.05 / (ink + 0.05) < 4.5) faults.push("pale");  // nothing is printed behind it
    found.push([node.textContent.trim(), faults.join(", ")]);
  }
  return found;
}"""


@pytest.fixture
def reports(passed: Run, failed: Run, tmp_path: Path) -> dict[str, Path]:
    both = tmp_path / "both.html"
    write_text(both, compare.render(compare.compare(passed, failed)))
    return {"passed": passed.path / "report.html", "failed": failed.path / "report.html", "both": both}


@pytest.mark.parametrize("name", ["passed", "failed", "both"])
@pytest.mark.parametrize("paper", PAPERS)
def test_on_paper_every_text_can_be_read_whole_in_dark_ink(
    opened: Open, reports: dict[str, Path], name: str, paper: str
) -> None:
    size = {"width": PAPERS[paper], "height": DESK["height"]}
    page = opened(reports[name], size, "dark").page
    page.emulate_media(media="print", color_scheme="dark")
    page.screenshot(path=SCREENSHOTS / f"{name}-{paper}.png", full_page=True)
    printed: list[list[str]] = page.evaluate(TEXTS, LEFT_OUT)

    assert len(printed) > (100 if name == "both" else 500)
    assert [(text[:60], fault) for text, fault in printed if fault] == []
    assert not page.locator("nav").is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") == size["width"]
    assert page.pdf(format=paper).startswith(b"%PDF")


def test_a_browser_that_cannot_show_a_closed_fold_opens_it_to_print_and_closes_it_after(
    opened: Open, failed: Run
) -> None:
    page = opened(failed.path / "report.html").page

    def folds() -> list[Any]:
        return list(page.eval_on_selector_all("details", "folds => folds.map((each) => each.open)"))

    before = folds()
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert set(before) == {True, False}
    assert folds() == [True] * len(before)
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert folds() == before
    assert open_all(page) == len(before)
