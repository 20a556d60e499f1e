"""What a stage chooses from tables for a recipe: the references that its code is known by, beside its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune.core.lookup import reference
from finetune.run.fingerprint import Code, code_of

if TYPE_CHECKING:
    from finetune.recipe import Recipe
    from finetune.run.plan import Stage

EXPORTING = ("rehearse", "export", "compare")


def made_with(stage: Stage, recipe: Recipe) -> Code:
    """The code that a stage computes with for a recipe: modules, libraries, Python."""
    return code_of(stage.reference, *_chosen(stage.name, recipe))


def _chosen(stage: str, recipe: Recipe) -> list[str]:
    from finetune.backends import BACKENDS
    from finetune.recipe.exports import targets
    from finetune.recipe.quantizers import quantizer

    more: list[str] = []
    backends = [recipe.backend]
    if name := recipe.model.quantization:
        more.append(quantizer(name).reference)
    if stage in EXPORTING:
        wanted = targets(recipe.export)
        more += [target.format.module for target in wanted]
        backends += [target.format.backend for target in wanted if target.format.backend]
    if stage == "export":
        from finetune.checks import CHECKS  # a bundle's card tells the verdicts on the training

        more += [check.parts for check in CHECKS if check.training and check.wanted(recipe)]
    if stage == "measure" and recipe.expect.serving:
        from finetune.serving import SERVERS

        more.append(SERVERS[recipe.backend].start)
    return [*(reference("backend", name, BACKENDS) for name in dict.fromkeys(backends)), *more]
