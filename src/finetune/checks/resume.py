"""Is a run that was interrupted and resumed the same run?"""

from __future__ import annotations

from finetune.checks import Part, Verdict, judge, missing, worst
from finetune.recipe import Recipe
from finetune.run import Run, evidence, layout
from finetune.run.records.measured import Resumed

MEASURED = layout.RESUME.path


def _check(recipe: Recipe, run: Run) -> list[Verdict]:
    found = evidence.read(run, layout.RESUME)
    return [_losses(run, found), _weights(found), _parameters(run, found)]


def _losses(run: Run, found: Resumed) -> Verdict:
    """The losses of the log against those of the same steps trained again."""
    name, unit = "resume_losses", "nats"
    straight, again = found["losses"], found["losses_resumed"]
    span = f"steps {found['from_step'] + 1} to {found['to_step']}"
    steps = evidence.steps(run, "train")
    logged = {str(step["step"]): step["loss"] for step in steps if step["step"] > found["from_step"]}
    if repr(straight) != repr(logged) or not steps or steps[-1]["step"] != found["to_step"]:  # NaN is itself there
        why = f"{span}: the losses held against those resumed are not the {len(logged)} that the training logged"
        return missing(name, "==", 0, unit, MEASURED, why)
    if not straight or set(straight) != set(again):
        why = f"{span}: {len(straight)} losses uninterrupted, {len(again)} resumed"
        if again and (first := min(map(int, again))) != found["from_step"] + 1:
            why += f"; what should go on from step {found['from_step']} began at step {first}"
        return missing(name, "==", 0, unit, MEASURED, why)
    distance = worst(abs(straight[step] - again[step]) for step in straight)
    why = f"largest difference between the losses of {span}, uninterrupted and resumed in a new process"
    return judge(name, distance, "==", 0, unit, MEASURED, why)


def _weights(found: Resumed) -> Verdict:
    differing = found["tensors_differing"]
    why = f"of {found['tensors']} trained tensors, bit by bit" + (f"; first: {differing[0]}" if differing else "")
    count = len(differing) if found["tensors"] else None
    return judge("resume_weights", count, "==", 0, "tensors differ", MEASURED, why)


def _parameters(run: Run, found: Resumed) -> Verdict:
    name, unit = "resume_parameters", "parameters more or less"
    before, after = found["parameters"], found["parameters_resumed"]
    trained = evidence.read(run, layout.SFT)["metrics"]["trainable_parameters"]
    if before != trained:
        why = f"{before} parameters are said to have been trained uninterrupted, and the training says {trained}"
        return missing(name, "==", 0, unit, MEASURED, why)
    more = abs(after - before) if before and after else None
    why = f"{before or 0:,} parameters trained uninterrupted, {after or 0:,} resumed"
    return judge(name, more, "==", 0, unit, MEASURED, why)


PARTS: tuple[Part, ...] = (
    Part(
        check=_check,
        owes=lambda recipe: ("resume_losses", "resume_weights", "resume_parameters"),
        evidence=MEASURED,
    ),
)
