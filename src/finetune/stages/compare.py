"""Every hop of the chain, in its own runtime and process: adapter on base, merged, and each export against the merged."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune import evidence
from finetune.backends import get
from finetune.console import progress
from finetune.experiment import in_fresh_process
from finetune.lookup import load
from finetune.parity import hop, material
from finetune.recipe import Recipe
from finetune.run import Run, write_json
from finetune.stages import Result

FOLDER = "compare"


@dataclass(frozen=True, kw_only=True)
class Model:
    """One model of the chain; `path` is what the runtime loads, `prompts_from` where its template is."""

    name: str
    backend: str
    path: Path
    adapter: Path | None = None
    prompts_from: Path
    facts: dict[str, Any]


def run(recipe: Recipe, run: Run) -> Result:
    """Write `compare/material.json` and one `compare/HOP.json` for every model but the first (see `parity.hop`)."""
    out = run.stage_dir(FOLDER)
    shutil.rmtree(out)
    out.mkdir()
    chain = _chain(recipe, run)
    asked = material.build(recipe, run, run.path / "merge" / "model")
    write_json(run.path / material.FILE, asked)
    written = [run.path / material.FILE]
    first: dict[str, Any] | None = None
    reference: tuple[Model, dict[str, Any], Path] | None = None
    with progress(len(chain), "compare") as bar:
        for number, model in enumerate(chain, 1):
            file = out / f"{model.name.replace(':', '-')}.npy"
            seen = _observe(recipe, model, asked, first, file)
            first = first or seen
            if reference is not None:
                path = out / f"{model.name.replace(':', '-')}.json"
                write_json(path, _evidence(recipe, run, asked, reference, (model, seen, file)))
                written.append(path)
            if reference is None or model.name == "merged":
                if reference is not None:
                    reference[2].unlink(missing_ok=True)
                reference = (model, seen, file)
            else:
                file.unlink(missing_ok=True)
            bar.update(number)
    if reference is not None:
        reference[2].unlink(missing_ok=True)
    return {"metrics": {"hops": len(written) - 1}, "artifacts": written}


def _chain(recipe: Recipe, run: Run) -> list[Model]:
    base, adapter = evidence.final(run, recipe)
    merged = run.path / "merge" / "model"
    models = [Model(name="merged", backend=recipe.backend, path=merged, prompts_from=merged, facts={})]
    if adapter is not None:
        own = adapter if (adapter / "tokenizer_config.json").is_file() else merged
        models.insert(
            0, Model(name="adapter", backend=recipe.backend, path=base, adapter=adapter, prompts_from=own, facts={})
        )
    for entry in evidence.read_json(run, "export/exports.json", "export"):
        path = run.path / entry["path"]
        models.append(
            Model(
                name=entry["name"],
                backend=entry["backend"] or recipe.backend,
                path=path,
                prompts_from=path,
                facts=entry,
            )
        )
    return models


def _observe(
    recipe: Recipe, model: Model, asked: dict[str, Any], first: dict[str, Any] | None, file: Path
) -> dict[str, Any]:
    request = {
        "do": "observe",
        "backend": model.backend,
        "model": str(model.path),
        "adapter": str(model.adapter) if model.adapter else None,
        "prompts_from": str(model.prompts_from),
        # In float32 whatever the training used, so that the bounds measure the export and not the arithmetic.
        "settings": {**evidence.model_settings(recipe), "dtype": "float32"},
        "material": asked,
        "answers": first["answers"] if first else None,
        "served": material.SERVED,
        "distributions": str(file),
    }
    request_file = file.with_suffix(".request.json")
    try:
        return in_fresh_process(request, request_file)
    finally:
        request_file.unlink(missing_ok=True)


def _evidence(
    recipe: Recipe,
    run: Run,
    asked: dict[str, Any],
    reference: tuple[Model, dict[str, Any], Path],
    candidate: tuple[Model, dict[str, Any], Path],
) -> dict[str, Any]:
    before, expected, ours = reference
    model, found, theirs = candidate
    decode: Callable[[list[int]], str] = get(recipe.backend).tokenizer(run.path / "merge" / "model").decode
    files = (ours, theirs) if expected["scores"] and found["scores"] else None
    return {
        "hop": model.name,
        "reference": before.name,
        "backend": model.backend,
        "path": model.path.relative_to(run.path).as_posix(),
        "bytes": model.facts.get("bytes"),
        "prompts": hop.prompts(asked, found, decode),
        "distributions": hop.distributions(asked, expected["answers"], *files, decode) if files else None,
        "greedy": hop.greedy(asked, expected, found, files, decode),
        "stop": hop.stop(asked, expected, found),
        "learned": hop.learned(asked, expected, found),
        "served": hop.served(found, asked),
        "constants": hop.constants(expected, found),
        "merge_factor": _merge_factor(before, model),
        "mended": model.facts.get("mended", []),
        **{
            key: found[key]
            for key in ("load_seconds", "prompt_tokens_per_second", "generation_tokens_per_second", "peak_bytes")
        },
    }


def _merge_factor(before: Model, model: Model) -> float | None:
    """How many times the adapter is in the merged weights; None where that cannot be told."""
    if before.adapter is None or model.backend != "torch":
        return None
    factor = load("finetune.backends.torch.merging:factor")(before.path, before.adapter, model.path)
    return None if factor is None else float(factor)
