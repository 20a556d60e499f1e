"""The stages, one module each, named as in `finetune.run.plan`; they never import each other.

A stage is a function `run(recipe, run) -> Result` that reads the run directory and writes into it.
"""

from typing import Any

# A finished stage's result: `metrics`, `artifacts` (paths), `notes`, and `peak` where it knows more than the process's memory.
Result = dict[str, Any]
