"""What to do about a verdict that is refuted, by its name; and which cause explains several."""

from __future__ import annotations

from dataclasses import replace

from finetune.checks import Verdict

REMEDIES: dict[str, str] = {}


def with_remedy(verdict: Verdict) -> Verdict:
    """The verdict, with its remedy where it is refuted and has none of its own."""
    if not verdict.refuted or verdict.remedy:
        return verdict
    return replace(verdict, remedy=REMEDIES.get(verdict.name.partition("[")[0], ""))
