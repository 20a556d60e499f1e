"""Where it happens: the run's directory, its log, the files it may hold, and how they are read back."""

from finetune.run.directory import Run
from finetune.run.report import Report

__all__ = ["Report", "Run"]
