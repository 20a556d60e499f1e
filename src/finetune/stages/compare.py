"""Every hop of the chain, in its own runtime and process: adapter on base, merged, and each export against the merged."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from finetune import __version__
from finetune.backends import get, tokenizer_of
from finetune.core import memory
from finetune.core.console import progress
from finetune.core.lookup import load
from finetune.experiments.worker import in_fresh_process
from finetune.parity import comparison, prompts, stored
from finetune.recipe import Recipe
from finetune.run import Run, evidence, layout
from finetune.run.records.compared import Export, Hop, Material
from finetune.stages import Result

FOLDER = "compare"
ROOM = 1.5  # times the weights, that a model needs to be run


@dataclass(frozen=True, kw_only=True)
class Model:
    """One model of the chain; `path` is what the runtime loads, `prompts_from` where its template is."""

    name: str
    backend: str
    path: Path
    adapter: Path | None = None
    prompts_from: Path
    facts: Export | None = None


def run(recipe: Recipe, run: Run) -> Result:
    """Write `compare/material.json` and one `compare/HOP.json` for every model but the first (see `parity.hop`).

    A hop between the same two models, asked the same, is not taken again.
    """
    out = run.stage_dir(FOLDER)
    chain = _chain(recipe, run)
    asked = prompts.build(recipe, run, Path(evidence.fetched(run)["base"]))
    evidence.write(run, layout.MATERIAL, asked)
    rows = {model.name: layout.comparison(model.name) for model in chain}
    files = {name: run.path / row.path for name, row in rows.items()}
    marks = {model.name: _mark(recipe, run, model, asked) for model in chain}
    taken = {name for name, row in rows.items() if not run.force and _mark_of(run, row) == marks[name]}
    kept = {run.path / layout.MATERIAL.path, out / "report.json", *(files[name] for name in taken)}
    for left in set(out.iterdir()) - kept:
        left.unlink()
    first: dict[str, Any] | None = None
    reference: tuple[Model, dict[str, Any], Path] | None = None
    # Those before a hop that is to be taken are asked again too: they are what it is held against.
    needed = chain if any(model.name not in taken for model in chain[1:]) else []
    needed = [model for model in needed if model.name not in taken or model.name in ("adapter", "merged")]
    dtype = _dtype(recipe, run)
    with progress(len(needed), "compare") as bar:
        for number, model in enumerate(needed, 1):
            file = files[model.name].with_suffix(".npy")
            settings = evidence.model_settings(recipe, merged=model.adapter is None)
            seen = _observe({**settings, "dtype": dtype}, model, asked, first, file)
            first = first or seen
            if reference is not None:
                found = _evidence(recipe, run, asked, reference, (model, seen, file))
                evidence.write(run, rows[model.name], cast(Hop, {"mark": marks[model.name], "dtype": dtype, **found}))
            if reference is None or model.name == "merged":
                if reference is not None:
                    reference[2].unlink(missing_ok=True)
                reference = (model, seen, file)
            else:
                file.unlink(missing_ok=True)
            bar.update(number)
    if reference is not None:
        reference[2].unlink(missing_ok=True)
    written = [run.path / layout.MATERIAL.path, *(path for path in files.values() if path.is_file())]
    return {"metrics": {"hops": len(written) - 1}, "artifacts": written}


def _mark(recipe: Recipe, run: Run, model: Model, asked: Material) -> str:
    """What a hop depends on: the two models, what they are asked, how they are loaded."""
    merge = run.require("merge")
    settings = evidence.model_settings(recipe)
    parts = [
        __version__,
        model.name,
        model.facts["sha256"] if model.facts else None,
        merge.fingerprint,
        merge.artifacts,
        asked,
        settings,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _mark_of(run: Run, row: layout.Document[Hop]) -> str | None:
    try:
        found = evidence.maybe(run, row)
    except evidence.EvidenceError:
        return None  # damaged, or of an earlier version: taken again
    return found["mark"] if found else None


def _chain(recipe: Recipe, run: Run) -> list[Model]:
    base, adapter = evidence.final(run, recipe)
    merged = run.path / layout.MERGED.path
    models = [Model(name="merged", backend=recipe.backend, path=merged, prompts_from=merged)]
    if adapter is not None:
        own = adapter if (adapter / "tokenizer_config.json").is_file() else merged
        models.insert(0, Model(name="adapter", backend=recipe.backend, path=base, adapter=adapter, prompts_from=own))
    for entry in evidence.read(run, layout.EXPORTS):
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
    settings: dict[str, Any], model: Model, asked: Material, first: dict[str, Any] | None, file: Path
) -> dict[str, Any]:
    request = {
        "do": "observe",
        "backend": model.backend,
        "model": str(model.path),
        "adapter": str(model.adapter) if model.adapter else None,
        "prompts_from": str(model.prompts_from),
        "settings": settings,
        "material": asked,
        "answers": first["answers"] if first else None,
        "served": prompts.SERVED,
        "distributions": str(file),
    }
    request_file = file.with_suffix(".request.json")
    try:
        return in_fresh_process(request, request_file)
    finally:
        request_file.unlink(missing_ok=True)


def _dtype(recipe: Recipe, run: Run) -> str:
    """float32 where the model fits, whatever the training used: bounds shall measure the export, not the arithmetic."""
    stored = sum(file.stat().st_size for file in (run.path / layout.MERGED.path).glob("*.safetensors"))
    needed = stored * (1 if recipe.model.dtype == "float32" else 2)
    room = min((gpu.total for gpu in memory.gpus()), default=memory.available())
    return "float32" if needed * ROOM < room else recipe.model.dtype


def _evidence(
    recipe: Recipe,
    run: Run,
    asked: Material,
    reference: tuple[Model, dict[str, Any], Path],
    candidate: tuple[Model, dict[str, Any], Path],
) -> dict[str, Any]:
    before, expected, ours = reference
    model, found, theirs = candidate
    decode: Callable[[list[int]], str] = tokenizer_of(recipe, Path(evidence.fetched(run)["base"])).decode
    files = (ours, theirs) if expected["scores"] and found["scores"] else None
    return {
        "hop": model.name,
        "reference": before.name,
        "backend": model.backend,
        "path": model.path.relative_to(run.path).as_posix(),
        "bytes": model.facts["bytes"] if model.facts else None,
        "prompts": comparison.prompts(asked, found, decode),
        "vocabulary": comparison.vocabulary(asked, found, decode),
        "same_template": found["template"] == asked["template"],
        "stops": {"at": found["stops"], "missing": [token for token in asked["ends"] if token not in found["stops"]]},
        "bits": _bits(run, found["bytes"]),
        "distributions": comparison.distributions(asked, expected["answers"], *files, decode) if files else None,
        "greedy": comparison.greedy(asked, expected, found, files, decode),
        "answers": [{"text": each["text"], "finish": each["finish"]} for each in found["generated"]],
        "stop": comparison.stop(asked, expected, found),
        "learned": comparison.learned(asked, expected, found),
        "served": comparison.served(found, asked),
        "constants": comparison.constants(expected, found),
        **_merged(recipe, before, model),
        "adapter": _carried(recipe, run, model),
        "mended": model.facts["mended"] if model.facts else [],
        **{
            key: found[key]
            for key in ("load_seconds", "prompt_tokens_per_second", "generation_tokens_per_second", "peak_bytes")
        },
    }


def _bits(run: Run, size: int | None) -> float | None:
    """Bits that a weight of the merged model takes in files of this size."""
    count = stored.parameters(run.path / layout.MERGED.path)
    return 8 * size / count if size and count else None


def _merged(recipe: Recipe, before: Model, model: Model) -> dict[str, Any]:
    """`merge_factor`: how many times the adapter is in the merged weights. `merge`: how far each of them is from base +
    adapter. None where that cannot be told."""
    if before.adapter is None or model.backend != "torch":
        return {"merge_factor": None, "merge": None}
    places = before.path, before.adapter, model.path
    factor, exactness = (load(f"finetune.backends.torch.merging:{name}") for name in ("factor", "exactness"))
    settings = evidence.model_settings(recipe)
    return {"merge_factor": factor(*places, **settings), "merge": exactness(*places, **settings)}


def _carried(recipe: Recipe, run: Run, model: Model) -> dict[str, Any] | None:
    """The adapter inside an export against the trained one, tensor by tensor; None where there is none to carry."""
    trained, inside = evidence.final(run, recipe)[1], model.path / "adapter"
    if trained is None or not inside.is_dir():
        return None
    ours, theirs = (get(recipe.backend).tensors(place) for place in (trained, inside))
    other = [name for name, facts in ours.items() if name not in theirs or theirs[name].sha256 != facts.sha256]
    return {"compared": len(ours), "other": [*other, *(name for name in theirs if name not in ours)]}
