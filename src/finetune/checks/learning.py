"""Does the model know now what it was taught, in other words too, and does it stop when it has said it?"""

from __future__ import annotations

from typing import Any

from finetune import evidence
from finetune.checks import Verdict, judge, missing, silence
from finetune.recipe import Recipe
from finetune.run import Run

ANSWERS = "evaluate/answers.jsonl"


def check(recipe: Recipe, run: Run) -> list[Verdict]:
    expect = recipe.expect
    if not (run.path / ANSWERS).is_file():
        return [missing("learned_as_trained", ">", expect.learned_min, "share", ANSWERS, "the probes were not asked")]
    answers = evidence.read_rows(run, ANSWERS, "evaluate")
    if not answers:
        return [missing("learned_as_trained", ">", expect.learned_min, "share", ANSWERS, "no question was asked")]
    final = list(answers[0]["phases"])[-1]
    if final == "base":
        return [missing("learned_as_trained", ">", expect.learned_min, "share", ANSWERS, "nothing was trained")]
    trained = [a for a in answers if a["set"] == "probes" and a["kind"] == "trained"]
    other_words = [a for a in answers if a["set"] == "probes" and a["kind"] != "trained"]
    unseen = [a for a in answers if a["set"] == "unseen"]
    verdicts = [
        _learned("learned_as_trained", trained, final, expect.learned_min, "asked as in training"),
        _learned("learned_paraphrased", other_words, final, expect.learned_min, "asked in words never trained"),
    ]
    share, control = improved(trained, final), improved(unseen, final)
    net = None if share is None or control is None else share - control
    verdicts.append(
        judge(
            "learned_net", net, ">", expect.unseen_margin_min, "share", ANSWERS,
            "no untrained facts (evaluate.unseen) to compare with" if control is None
            else f"share improved less the share of untrained facts 'improved' ({control:.2f})",
        )
    )  # fmt: skip
    stopped = sum(a["phases"][final]["finish"] == "stop" for a in trained)
    verdicts.append(
        judge(
            "stops_by_itself", stopped / len(trained) if trained else None, ">=", expect.stopped_min, "share", ANSWERS,
            f"{stopped} of {len(trained)} answers ended with the end-of-turn token",
        )
    )  # fmt: skip
    return verdicts


def improved(answers: list[dict[str, Any]], final: str) -> float | None:
    """Of the questions wrong before, the share now right *and* with a likelier expected answer. None without any."""
    wrong = [a for a in answers if not a["phases"]["base"]["correct"]]
    if not wrong:
        return None
    better = [
        a
        for a in wrong
        if a["phases"][final]["correct"] and a["phases"][final]["logprob"] > a["phases"]["base"]["logprob"]
    ]
    return len(better) / len(wrong)


def _learned(name: str, answers: list[dict[str, Any]], final: str, bound: float, how: str) -> Verdict:
    share = improved(answers, final)
    if share is None:
        why = "no such probes" if not answers else "every probe was right before training; they prove nothing"
        return missing(name, ">", bound, "share", ANSWERS, why)
    likelier = sum(a["phases"][final]["logprob"] > a["phases"]["base"]["logprob"] for a in answers)
    right = sum(a["phases"][final]["correct"] for a in answers)
    why = f"{how}: {right} of {len(answers)} right after, expected answer likelier in {likelier}"
    why += silence([a["phases"][final]["text"] for a in answers])
    return judge(name, share, ">", bound, "share improved", ANSWERS, why)
