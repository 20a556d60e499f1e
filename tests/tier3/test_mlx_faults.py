"""A sound MLX export, broken by hand in one place: the verdict that guards the place fails and says why."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.chain import copied, finished, tiny_recipe

HOP = "mlx"


@pytest.fixture(scope="module")
def chain(family, tiny_model, tmp_path_factory):
    family("mlx")
    with pytest.MonkeyPatch.context() as patch:
        yield finished(tiny_recipe(tiny_model("llama"), tmp_path_factory.mktemp("mlx-faults"), [HOP]), patch)


@pytest.fixture
def exported(chain):
    """The export's folder, put back after the test."""
    folder = chain.run.path / "export" / "mlx"
    back = copied(chain, folder)
    yield folder
    back()


def edit(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def kinds(found: dict[str, str]) -> set[str]:
    assert all(name.endswith(f"[{HOP}]") for name in found), found
    return {name.partition("[")[0] for name in found}


def test_a_sound_export_passes_every_verdict(chain, exported):
    assert chain.compared() == {}
    seen = json.loads((chain.run.path / "compare" / "mlx.json").read_text())
    assert seen["learned"] == {"known": 6, "kept": 6, "lost": []}
    assert seen["greedy"]["equal"] == seen["greedy"]["compared"] >= 6
    assert seen["distributions"]["mean"] < 1e-9


def test_a_swapped_template_fails(chain, exported):
    template = exported / "chat_template.jinja"
    template.write_text(template.read_text().replace("assistant\\n", "bot\\n"))
    found = chain.compared()
    assert kinds(found) == {"prompt_parity", "template_carried"}
    assert "the chat template in the export is not that of the training" in found[f"prompt_parity[{HOP}]"]


def test_another_base_of_the_position_encoding_fails_and_is_named(chain, exported):
    """What mlx-lm makes of a config that names the base as transformers 5 does: its own default."""
    edit(exported / "config.json", lambda config: config.update(rope_theta=10000.0, rope_parameters=None))
    found = chain.compared()
    assert kinds(found) >= {"distribution_parity", "constants_parity"}
    assert "rope_theta is 321.0 in the model, 10000.0 in the export" in found[f"distribution_parity[{HOP}]"]


def test_a_removed_end_of_turn_token_fails(chain, exported):
    edit(exported / "config.json", lambda config: config.update(eos_token_id=60))
    edit(exported / "tokenizer_config.json", lambda config: config.update(eos_token="<|endoftext|>"))
    (exported / "generation_config.json").unlink(missing_ok=True)
    found = chain.compared()
    assert "stop_parity" in kinds(found)
    assert "eos_token_id is 2 in the model" in found[f"stop_parity[{HOP}]"]
