"""Is a run that was interrupted and resumed the same run?"""

from __future__ import annotations

import json

from finetune.checks import Verdict, judge, missing, worst
from finetune.recipe import Recipe
from finetune.run import Run

MEASURED = "measure/resume.json"


def check(recipe: Recipe, run: Run) -> list[Verdict]:
    path = run.path / MEASURED
    if not path.is_file():
        return [missing("resume_losses", "==", 0, "nats", MEASURED, "nothing was trained again from a checkpoint")]
    found = json.loads(path.read_text(encoding="utf-8"))
    straight, again = found["losses"], found["losses_resumed"]
    span = f"steps {found['from_step'] + 1} to {found['to_step']}"
    verdicts = []
    if not straight or set(straight) != set(again):
        why = f"{span}: {len(straight)} losses uninterrupted, {len(again)} resumed"
        if again and (first := min(map(int, again))) != found["from_step"] + 1:
            why += f"; what should go on from step {found['from_step']} began at step {first}"
        verdicts.append(missing("resume_losses", "==", 0, "nats", MEASURED, why))
    else:
        distance = worst(abs(straight[step] - again[step]) for step in straight)
        why = f"largest difference between the losses of {span}, uninterrupted and resumed in a new process"
        verdicts.append(judge("resume_losses", distance, "==", 0, "nats", MEASURED, why))
    differing = found["tensors_differing"]
    why = f"of {found['tensors']} trained tensors, bit by bit" + (f"; first: {differing[0]}" if differing else "")
    count = len(differing) if found["tensors"] else None
    verdicts.append(judge("resume_weights", count, "==", 0, "tensors differ", MEASURED, why))
    before, after = found.get("parameters"), found.get("parameters_resumed")
    more = abs(after - before) if before and after else None
    why = f"{before or 0:,} parameters trained uninterrupted, {after or 0:,} resumed"
    verdicts.append(judge("resume_parameters", more, "==", 0, "parameters more or less", MEASURED, why))
    return verdicts
