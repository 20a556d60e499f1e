"""Measured trainings: what only an experiment can show, each in processes of its own."""
