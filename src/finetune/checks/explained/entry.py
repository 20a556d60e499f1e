"""One entry: what a verdict measures, in which files, what it is held to, and why it fails."""

from __future__ import annotations

from dataclasses import dataclass

from finetune.recipe.sections import Expect


@dataclass(frozen=True, kw_only=True)
class Explained:
    """`evidence` are paths inside the run (as in docs/architecture.md), or words for what lies outside; `bound` is what is
    measured, with its unit, and where the bound comes from."""

    measures: str
    evidence: tuple[str, ...]
    bound: str
    fails: str


def of_trainings(name: str, entry: Explained) -> dict[str, Explained]:
    """The entry of a verdict that speaks of either training: `{stage}` in its texts is `train`, or `align`, whose verdict's
    name begins with `dpo_`; `{rows}` is what it takes, `{file}` where that is."""
    parts = {
        "": {"stage": "train", "rows": "rows", "file": "prepare/train.jsonl"},
        "dpo_": {"stage": "align", "rows": "pairs", "file": "prepare/preferences.jsonl"},
    }
    return {
        prefix + name: Explained(
            measures=entry.measures.format(**words),
            evidence=tuple(path.format(**words) for path in entry.evidence),
            bound=entry.bound.format(**words),
            fails=entry.fails.format(**words),
        )
        for prefix, words in parts.items()
    }


def expect(key: str) -> str:
    """A key of `expect`, with its default."""
    default = Expect.model_fields[key].default
    return f"expect.{key} (no default)" if default is None else f"expect.{key} ({default:g} by default)"
