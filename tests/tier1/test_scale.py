"""Tests with a real model take the size that fits the machine, and none where nothing fits."""

from __future__ import annotations

import pytest

from finetune.testing import scale
from finetune.testing.scale import FLOOR, GIB, choose


@pytest.fixture(autouse=True)
def _no_models_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FT_TEST_MODEL", "FT_E2E_MODEL_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("memory", "batch", "steps"),
    [
        (FLOOR, 1, 6),
        (4 * GIB - 1, 1, 6),
        (4 * GIB, 3, 2),
        (8 * GIB - 1, 3, 2),
        (8 * GIB, 6, 1),
        (512 * GIB, 6, 1),
    ],
)
def test_the_batch_grows_with_memory_and_a_step_sees_as_many_rows(memory, batch, steps):
    chosen = choose(memory)
    assert chosen is not None
    assert (chosen.per_device_train_batch_size, chosen.gradient_accumulation_steps) == (batch, steps)
    assert batch * steps == 6
    assert chosen.model == "smollm2-135m"


@pytest.mark.parametrize("memory", [0, GIB, FLOOR - 1])
def test_below_the_floor_there_is_no_scale(memory):
    assert choose(memory) is None


def test_free_memory_is_measured_where_none_is_given(monkeypatch):
    monkeypatch.setattr(scale, "available", lambda: 5 * GIB)
    assert choose() == choose(5 * GIB) != choose(9 * GIB)
    monkeypatch.setattr(scale, "available", lambda: GIB)
    assert choose() is None


@pytest.mark.parametrize(
    ("test", "e2e", "model"),
    [("", "", "smollm2-135m"), ("gpt2", "", "gpt2"), ("", "owner/chat", "owner/chat"), ("gpt2", "owner/chat", "gpt2")],
)
def test_another_model_can_be_named_by_either_variable(monkeypatch, test, e2e, model):
    monkeypatch.setenv("FT_TEST_MODEL", test)
    monkeypatch.setenv("FT_E2E_MODEL_ID", e2e)
    chosen = choose(5 * GIB)
    assert chosen is not None
    assert chosen.model == model
    assert model in chosen.why
    assert "5.0 GiB free" in chosen.why


def test_a_named_model_does_not_lower_the_floor(monkeypatch):
    monkeypatch.setenv("FT_TEST_MODEL", "tiny")
    assert choose(FLOOR - 1) is None
