"""The learning rates that a run is held against, and transformers' own."""

from __future__ import annotations

import pytest
import torch
from transformers import TrainingArguments, get_scheduler

from finetune.recipe.schedule import learning_rate
from finetune.recipe.sections import Optimization

KINDS = Optimization.model_fields["lr_scheduler_type"].annotation.__args__
STEPS = 40


@pytest.mark.parametrize("warmup", [0, 0.1, 7, STEPS - 1])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_schedule_of_a_trainer(kind, warmup, tmp_path):
    asked = TrainingArguments(str(tmp_path), warmup_steps=warmup, lr_scheduler_type=kind, use_cpu=True)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-3)
    scheduler = get_scheduler(kind, optimizer, num_warmup_steps=asked.get_warmup_steps(STEPS), num_training_steps=STEPS)
    for step in range(1, STEPS + 1):
        assert learning_rate(kind, 3e-3, warmup, step, STEPS) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        scheduler.step()


def test_a_rate_of_zero_stays_zero():
    assert {learning_rate(kind, 0.0, 0, step, STEPS) for kind in KINDS for step in (1, 20)} == {0.0}
