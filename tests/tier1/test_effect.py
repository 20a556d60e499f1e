"""The count of steps that moved nothing."""

from finetune.backends.effect import Effect


def counted(*steps):
    effect = Effect(1e-3, b"first")
    for rate, weights in steps:
        effect.stepped(rate, weights)
    return effect.without


def test_a_step_that_changes_the_weights_is_none():
    assert counted((1e-3, b"second"), (1e-3, b"third")) == 0


def test_a_step_that_leaves_the_weights_as_they_were_is_counted_the_first_one_too():
    assert counted((1e-3, b"first")) == 1
    assert counted((1e-3, b"second"), (1e-3, b"second"), (1e-3, b"third"), (1e-3, b"third")) == 2


def test_a_step_of_warmup_or_of_a_schedules_end_may_round_to_nothing():
    assert counted((0.0, b"first"), (9e-5, b"first")) == 0
    assert counted((1e-4, b"first")) == 1


def test_a_learning_rate_of_zero_asks_for_no_movement():
    effect = Effect(0.0, b"first")
    effect.stepped(0.0, b"first")
    assert effect.without == 0
