"""Measured trainings: what only an experiment can show, each in processes of its own."""

MEMORY_STEPS = (
    2  # of a training whose memory is measured: the second has gradients, optimizer state and activations at once
)
FRESH_TEXTS = 8  # held-out texts that a fresh process scores again
