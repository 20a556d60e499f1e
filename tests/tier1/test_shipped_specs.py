"""The specs that the project ships, in its tests, its docs and its examples: each loads, means something, and can be chosen."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.testing.perplexity import RANDOM_TOKENS_FROM
from finetune.testing.plugin import MARKERS
from finetune.testing.spec.execute import recipe_of
from finetune.testing.spec.judge import NEEDED_FALL
from finetune.testing.spec.load import Case, load
from finetune.training.estimate import model_config
from support.stories import UNIGRAM_ENTROPY

ROOT = Path(__file__).parents[2]
FILES = sorted(
    path for path in (*(ROOT / "tests").glob("*/specs/*.y*ml"), *(ROOT / "src" / "finetune" / "examples").glob("*.y*ml"))
    if re.search(r"^test_id:", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
)  # fmt: skip
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```ya?ml\n(test_id: .*?)^```$", flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    """Every case of every spec; those of the pages have recipes that are not there."""
    folder = tmp_path_factory.mktemp("pages")
    files = [*FILES]
    for page in PAGES:
        for number, block in enumerate(BLOCK.findall(page.read_text(encoding="utf-8"))):
            files.append(folder / f"{page.stem}-{number}.yaml")
            files[-1].write_text(block, encoding="utf-8")
    return [case for file in files for case in load(file)]


def nothing(case: Case) -> float:
    """The least loss, in nats, that is known of a model which learned nothing on the case's data: ln(vocabulary), and what
    knowing only how often each token occurs comes to, where that was measured."""
    if case.file not in FILES:
        return UNIGRAM_ENTROPY  # that of the plainest texts there are; no recipe says which
    recipe = recipe_of(case, root=ROOT)
    config = model_config(recipe)
    assert config is not None, f"{case.file}: its vocabulary is not known here"
    measured = [UNIGRAM_ENTROPY] if recipe.data and recipe.data.paths == ["shipped:stories/train.jsonl"] else []
    return min([math.log(config["vocab_size"]), *measured])


def test_the_specs_of_two_tiers_and_two_pages_are_swept(shipped: list[Case]) -> None:
    assert {case.id for case in shipped} == {"stories", "stories_inference", "support_model"}
    assert [case.id for case in shipped].count("support_model") == 2


def test_no_bound_of_theirs_is_passed_by_a_model_that_learned_nothing(shipped: list[Case]) -> None:
    losses = [(case, case.spec.loss.final_max) for case in shipped if case.spec.loss.final_max is not None]
    served = [case.spec.inference for case in shipped if case.spec.inference is not None]

    assert len(losses) == len(shipped)
    assert [(case.id, bound) for case, bound in losses if bound >= NEEDED_FALL * nothing(case)] == []
    assert len(served) == 2
    assert [each for each in served if each.perplexity_max >= min(RANDOM_TOKENS_FROM.values())] == []


def test_smoke_selects_the_fastest_spec_alone(shipped: list[Case]) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        *map(str, FILES),
        "--collect-only",
        "-q",
        "-m",
        "smoke",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=50)
    steps = {case.id: recipe_of(case, root=ROOT).train.max_steps for case in shipped if case.file in FILES}

    assert done.returncode == 0, done.stdout
    assert re.findall(r"::(\w+)$", done.stdout, flags=re.MULTILINE) == [min(steps, key=lambda name: steps[name] or 0)]
    assert "1 deselected" in done.stdout


def test_their_markers_are_those_that_the_plugin_knows(shipped: list[Case]) -> None:
    assert {marker for case in shipped for marker in case.spec.markers} == MARKERS.keys()
