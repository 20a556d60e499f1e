"""What any correct trainer leaves unchanged, measured on a tiny copy of a recipe's model, in float32, on the CPU.

    shrink   the tiny copy, and a few short rows
    measure  the experiments, each pair of trainings that must agree; the evidence
    trials   what a process of its own does for it

`finetune.checks.invariance` reads the evidence.
"""

MEASURED = "measure/invariance.json"
NAMES = ("accumulation", "checkpointing", "packing", "padding", "order", "merge")
