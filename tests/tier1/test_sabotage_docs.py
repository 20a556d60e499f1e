"""docs/sabotage.md: its examples work as they stand, and its tables have every name there is."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest

import sabotage
from sabotage import files, targets
from sabotage.context import Context
from sabotage.import_hook import install
from tools import sabotage_docs

PAGE = (Path(__file__).parents[2] / "docs" / "sabotage.md").read_text(encoding="utf-8")
EXAMPLE = next(block for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "weights_rounded" in block)


@pytest.fixture
def own(monkeypatch):
    """The module that the docs show, imported, and what it put into the table."""
    monkeypatch.setattr(sabotage, "_TABLE", {})
    module = types.ModuleType("my_sabotages")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(EXAMPLE, module.__dict__)
    return dict(sabotage._TABLE)


def test_the_examples_of_the_docs_are_two_sabotages_that_a_process_can_install(own):
    assert [row.reference for row in own.values()] == [
        "my_sabotages:weights_rounded",
        "my_sabotages:ends_of_long_rows_lost",
    ]
    patched, changed = Context(), Context()
    for row, context in zip(own.values(), (patched, changed), strict=True):
        row.apply(context)
    assert [each.target for each in patched.patches] == [targets.ADAMW_STEP]
    assert list(changed.changes) == ["prepare"]
    before = list(sys.meta_path)
    install("my_sabotages:ends_of_long_rows_lost")
    assert sys.meta_path == before


def test_the_examples_run_as_they_are_named(own):
    for name in own:
        assert f'"{name}"' in PAGE.partition("--also my_sabotages ")[2].partition("\n")[0]
        assert f"\n{name}: caught, " in PAGE
        assert f"\n  {own[name].what}\n" in PAGE


def test_every_named_place_is_told_with_what_it_takes():
    rows = sabotage_docs.places()
    assert {row[0].strip("`") for row in rows} == {name for name in vars(targets) if name.isupper()}
    assert [row[0] for row in rows if not row[2]] == []


def test_every_helper_for_files_is_told_with_what_it_does():
    told = {row[0].strip("`").partition("(")[0] for row in sabotage_docs.helpers()}
    assert told >= {"change_rows", "change_gguf_metadata", "rewrite_weights", "Gguf"}
    assert [row[0] for row in sabotage_docs.helpers() if not row[1]] == []
    assert all(name in PAGE for name in vars(files) if name.isupper())
