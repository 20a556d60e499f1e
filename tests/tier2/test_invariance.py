"""The invariances of the real trainer on a tiny model; and mistakes in it, each in a pair that then differs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.checks import Verdict, results
from finetune.core.files import write_text
from finetune.experiments.invariance import measure, tiny_copy, worker
from finetune.stages.pipeline import run_directory, run_stages
from sabotage import baseline

CHANGES = "sabotage.invariances"


def measured(recipe: Any) -> dict[str, Verdict]:
    run = run_directory(recipe)
    run_stages(recipe, run, ["prepare"])
    measure.write(recipe, run)
    return {each.name.removeprefix("invariant_"): each for each in results(recipe, run, ["invariance"])}


def failed(verdicts: dict[str, Verdict]) -> dict[str, str]:
    return {name: each.why for name, each in verdicts.items() if each.refuted}


def test_every_invariance_holds_on_a_tiny_llama_and_leaves_no_model_behind(tiny_recipe) -> None:
    recipe = tiny_recipe("llama")

    verdicts = measured(recipe)

    assert failed(verdicts) == {}
    assert len(verdicts) == 6
    assert [path.name for path in (run_directory(recipe).path / "measure").iterdir()] == ["invariance.json"]


def test_mistakes_of_the_trainer_fail_their_own_verdicts_and_no_other(
    tiny_recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mistakes = {"accumulation": "last_micro_batch", "packing": "pack_mask_lost", "merge": "merged_coarsely"}
    calls = "".join(f"install('{CHANGES}:{name}')\n" for name in mistakes.values())
    write_text(tmp_path / "sitecustomize.py", f"from sabotage.import_hook import install\n{calls}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), baseline.environment()["PYTHONPATH"]]))

    assert set(failed(measured(tiny_recipe("llama")))) == set(mistakes)


def positions_from_the_left(original: Callable[..., Any]) -> Callable[..., Any]:
    """Padding takes positions, as where nobody derives them from the mask."""

    def generate(self: Any, **more: Any) -> Any:
        import torch

        width = more["input_ids"].shape[1]
        return original(self, **more, position_ids=torch.arange(width).expand_as(more["input_ids"]))

    return generate


@pytest.mark.parametrize(("architecture", "shows"), [("gpt2", True), ("llama", False)])
def test_padding_that_takes_positions_shows_where_positions_are_absolute(
    tiny_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, shows: bool
) -> None:
    from transformers.generation.utils import GenerationMixin

    tiny_copy.copy(tiny_model(architecture), tmp_path / "copy")
    ids = [list(range(10 + number, 40 + 2 * number)) for number in range(12)]
    rows = tiny_copy.rows([{"input_ids": each, "labels": [-100] * 20 + each[20:]} for each in ids])
    asked = {"backend": "torch", "model": str(tmp_path / "copy"), "settings": {"device": "cpu"}, "rows": rows}
    honest = worker.together(asked)
    monkeypatch.setattr(GenerationMixin, "generate", positions_from_the_left(GenerationMixin.generate))

    found = worker.together(asked)

    assert honest["answers"] == pytest.approx(honest["answers_alone"], abs=1e-5)
    assert (found["answers"] != pytest.approx(found["answers_alone"], abs=1e-3)) == shows


def test_an_architecture_without_positions_is_said_not_to_pack(tmp_path: Path) -> None:
    from transformers import BloomConfig

    BloomConfig(vocab_size=600, hidden_size=64, n_layer=4, n_head=8, hidden_dropout=0.1).save_pretrained(tmp_path)

    config = tiny_copy.copy(tmp_path, tmp_path / "copy")

    assert (config["n_layer"], config["n_head"], config["hidden_dropout"]) == (2, 4, 0.0)
    assert "takes no positions" in tiny_copy.unpackable(tmp_path / "copy")
