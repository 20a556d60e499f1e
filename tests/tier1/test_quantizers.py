"""Quantizers as rows: which there are, what fits beside one, what one costs in memory."""

from __future__ import annotations

from typing import Any

import pytest

from finetune.checks import parameters
from finetune.core import lookup
from finetune.core.errors import UsageError
from finetune.recipe import Recipe, load_mapping
from finetune.recipe.quantizers import QUANTIZERS, Quantizer, quantizer
from finetune.run import evidence
from finetune.run.outcome import PROVED
from finetune.run.plan import BY_NAME
from finetune.stages.doors import made_with
from finetune.training.estimate import EMBEDDED, by_stage

ROW = Quantizer(
    name="acme", help="Two bits.", bits=2.0, backends=("torch",), devices=("cpu",), extra="acme", module="acme.bits"
)


def asked(**changes: Any) -> Recipe:
    model = {"path": "smollm2-135m", "quantization": "nf4", **changes.pop("model", {})}
    return load_mapping({"model": model, "data": {"path": "shipped:quorra/train.jsonl"}, **changes})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"backend": "mlx"}, "'model.quantization: nf4' is for the backend torch, not 'mlx'; leave it out"),
        ({"backend": "fake"}, "is for the backend torch, not 'fake'"),
        ({"model": {"device": "mps"}}, "computes on cpu or cuda, not on 'mps'"),
        ({"train": {"method": "full"}}, "holds weights that 'train.method: full' would train; use lora"),
        (
            {"train": {"lora": {"init_lora_weights": "pissa"}}},
            "'train.lora.init_lora_weights: pissa' would change; use true",
        ),
        ({"model": {"quantization": "nf5"}}, "unknown quantizer 'nf5'. Did you mean 'nf4'? Known: nf4"),
    ],
)
def test_what_does_not_fit_beside_a_quantizer_is_refused_by_name(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError) as caught:
        asked(**changes)
    assert told in str(caught.value)


def test_the_base_alone_is_quantized() -> None:
    assert evidence.model_settings(asked())["quantization"] == "nf4"
    assert "quantization" not in evidence.model_settings(asked(), merged=True)
    assert "quantization" not in evidence.model_settings(asked(model={"quantization": None}))


def test_the_estimate_counts_the_bits_of_linear_layers_and_leaves_the_rest() -> None:
    config = EMBEDDED["smollm2-135m"]
    plain = by_stage(asked(model={"quantization": None}), config)["train"]
    held = by_stage(asked(), config)["train"]
    linear = 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536)  # SmolLM2-135M: 30 layers

    assert plain.weights - held.weights == pytest.approx(linear * (4 - 4.5 / 8), abs=1)
    assert (held.trainable, held.activations) == (plain.trainable, plain.activations)
    assert (
        by_stage(asked(), config, method="full")["train"].weights
        == by_stage(asked(model={"quantization": None}), config, method="full")["train"].weights
    )


def test_another_package_adds_a_row_by_an_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    real = lookup.reference
    monkeypatch.setattr(
        lookup, "reference", lambda kind, name, table: f"{__name__}:ROW" if name == "acme" else real(kind, name, table)
    )
    assert quantizer("acme") is ROW
    assert asked(model={"quantization": "acme"}).model.quantization == "acme"


def test_every_row_says_what_it_is() -> None:
    for name, row in QUANTIZERS.items():
        assert (row.name, bool(row.help), bool(row.backends), 0 < row.bits < 16) == (name, True, True, True)


def test_what_carries_a_quantizer_out_is_code_of_those_stages_alone_that_use_it() -> None:
    train = BY_NAME["train"]
    plain, held = (made_with(train, asked(model={"quantization": name})) for name in (None, "nf4"))
    module = "finetune/backends/torch/quantizers/nf4.py"

    assert module in held.modules and module not in plain.modules
    assert ROW.reference == "acme.bits"


@pytest.mark.parametrize(
    ("facts", "proved"),
    [
        ({"quantized_parameters": 1000, "quantized_bytes": 562.5}, True),
        ({"quantized_parameters": 1000, "quantized_bytes": 1000}, False),
        ({"quantized_parameters": 0, "quantized_bytes": 0}, False),
        ({}, False),
    ],
    ids=["as the row says", "in eight bits", "none", "not told"],
)
def test_a_base_that_is_not_held_as_asked_is_refuted(monkeypatch: pytest.MonkeyPatch, facts: Any, proved: bool) -> None:
    monkeypatch.setattr(type(parameters.SFT), "facts", lambda self, run: facts)
    assert (parameters._quantized(asked(), None).outcome == PROVED) == proved  # type: ignore[arg-type]
