"""The four files that every run leaves about itself: report.json, junit.xml, report.md and report.html."""

from __future__ import annotations

from typing import Any

from finetune.core.files import write_text
from finetune.core.text import json_text
from finetune.report import html, junit, markdown, summary
from finetune.run import Run

HTML = "report.html"


def render(document: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """What report.json holds, and the text of every file by its name, of a report (see `summary.document`)."""
    plain: dict[str, Any] = summary.portable(document)
    return plain, {
        "report.json": json_text(plain, indent=2, allow_nan=False) + "\n",
        "junit.xml": junit.render(document),
        "report.md": markdown.render(document),
        HTML: html.render(document),
    }


def write(run: Run, texts: dict[str, str]) -> None:
    """Put the files of `render` into the run. Raises OSError where it cannot be written into."""
    for name, text in texts.items():
        write_text(run.path / name, text)
        run.written.add(name)
