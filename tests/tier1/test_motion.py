"""What is told of the optimizer's steps: those that moved nothing, and how far the first one went."""

import math
from array import array

import pytest

from finetune.backends.weight_updates import Motion


def floats(*values):
    return array("f", values).tobytes()


def told(*steps, full=1e-3, fresh=True):
    motion = Motion(full, floats(1.0, 2.0), fresh=fresh)
    for rate, *weights in steps:
        motion.stepped(rate, floats(*weights))
    return motion.facts()


def test_a_step_that_changes_the_weights_has_an_effect():
    assert told((1e-3, 1.0, 2.5), (1e-3, 1.0, 3.0))["steps_without_effect"] == 0


def test_a_step_that_leaves_the_weights_as_they_were_is_counted_the_first_one_too():
    assert told((1e-3, 1.0, 2.0))["steps_without_effect"] == 1
    assert told((1e-3, 1.0, 3.0), (1e-3, 1.0, 3.0), (1e-3, 2.0, 3.0), (1e-3, 2.0, 3.0))["steps_without_effect"] == 2


def test_a_step_of_warmup_or_of_a_schedules_end_may_round_to_nothing():
    assert told((0.0, 1.0, 2.0), (9e-5, 1.0, 2.0))["steps_without_effect"] == 0
    assert told((1e-4, 1.0, 2.0))["steps_without_effect"] == 1


def test_a_learning_rate_of_zero_asks_for_no_movement():
    assert told((0.0, 1.0, 2.0), full=0.0) == {"steps_without_effect": 0}


def test_the_first_move_is_the_largest_one_over_the_rate_of_the_first_step_that_has_one():
    assert told((0.0, 1.0, 2.0), (0.5, 1.25, 1.0), (0.5, 9.0, 9.0))["first_move"] == pytest.approx(2.0)


def test_an_optimizer_with_a_past_tells_no_first_move():
    assert "first_move" not in told((0.5, 1.25, 1.0), fresh=False)


def test_a_first_move_to_nan_is_nan_wherever_the_weight_stands():
    for weights in ((float("nan"), 1.0), (9.0, float("nan"))):
        assert math.isnan(told((0.5, *weights))["first_move"])
