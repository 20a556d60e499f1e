"""The bench of the sabotages: its table, patches in processes that know nothing of them, changes to what stages left."""

from __future__ import annotations

import subprocess
import sys

import pytest

from finetune.backends import child
from finetune.pipeline import preview, run_directory, run_stages
from finetune.run import digest, write_jsonl
from finetune.stages import BY_NAME, fingerprint
from finetune.testing import sabotage
from finetune.testing.sabotage import ground, hook
from finetune.testing.sabotage.scene import Scene, as_if_written_so
from support import town

WRAPPED = """
from finetune.testing.sabotage.scene import Scene

def shout(scene: Scene) -> None:
    scene.wrap("textwrap:shorten", lambda original: lambda text, width: original(text, width).upper())
    scene.wrap("fractions:Fraction.limit_denominator", lambda original: lambda self, most=1: "patched")
"""


def test_every_sabotage_says_what_it_does_and_where_it_happens():
    table = sabotage.table()
    assert len(table) >= 14
    for row in table.values():
        scene = Scene()
        row.apply(scene)
        assert scene.recipe or scene.patches or scene.changes, row.name
        assert row.what.endswith("."), row.name
        assert row.ground in ground.GROUNDS
        assert set(scene.changes) <= set(BY_NAME)


def test_two_sabotages_of_one_name_are_refused():
    with pytest.raises(ValueError, match="two sabotages called 'learning rate 0'"):
        sabotage.sabotage("learning rate 0")(lambda scene: None)


@pytest.mark.parametrize(
    "before", ["", "import textwrap, fractions; ", "from importlib.util import find_spec; find_spec('fractions'); "]
)
def test_a_patch_reaches_processes_that_know_nothing_of_it_and_their_children(tmp_path, before):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "wrapped.py").write_text(WRAPPED, encoding="utf-8")
    patches = hook.write(tmp_path / "patches", "wrapped:shout")
    use = "import textwrap; from fractions import Fraction; "
    use += "print(textwrap.shorten('a b', 9), Fraction(1, 3).limit_denominator())"
    nested = f"import subprocess, sys; subprocess.run([sys.executable, '-P', '-c', {before + use!r}], check=True)"
    path = f"{patches}:{tmp_path / 'own'}:{child.environment()['PYTHONPATH']}"
    for code in (before + use, nested):
        done = subprocess.run(
            [sys.executable, "-c", code], env={**child.environment(), "PYTHONPATH": path}, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.stdout == "A B patched\n", done.stderr


def test_a_changed_file_is_taken_for_what_the_stage_wrote(tmp_path):
    recipe = town.only_training(town.build(tmp_path / "town"), tmp_path / "runs")
    run = run_directory(recipe)
    run_stages(recipe, run, ["prepare"])
    file = run.path / "prepare" / "train.jsonl"
    before = fingerprint(BY_NAME["train"], recipe, run)
    write_jsonl(file, [{"row": 0}])
    as_if_written_so(run, "prepare")
    assert fingerprint(BY_NAME["train"], recipe, run) != before
    report = run.require("prepare")
    assert report.artifacts["prepare/train.jsonl"] == digest(file)
    assert [each.runs for each in preview(recipe, run, ["prepare"])] == [False] * 2
