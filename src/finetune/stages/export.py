"""The merged model in the formats that the recipe lists, each in a folder of its own that appears whole or not at all."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from pathlib import Path
from typing import Any

from finetune import __version__
from finetune.core.console import progress
from finetune.core.errors import StageError
from finetune.core.files import aside, digest, digests
from finetune.export import Source, Target, exporter, parse, targets
from finetune.models import files
from finetune.recipe import Recipe, dump
from finetune.run import Run, evidence, layout
from finetune.run.records.compared import Export
from finetune.stages import Result

EXPORTED = "exported"  # the event that holds the digest of the list of exports


def run(recipe: Recipe, run: Run) -> Result:
    """Write `export/FORMAT-VARIANT/` for every target, and `export/exports.json`: name, path, bytes, seconds, mended."""
    folder = run.stage_dir("export")
    wanted = targets(recipe.export)
    for left in folder.iterdir():  # of an earlier export with another list
        if left.is_dir() and left.name not in {target.folder for target in wanted}:
            shutil.rmtree(left)
    done: dict[str, Path] = {}
    found: list[Export] = []
    before = {} if run.force else _before(run)
    with progress(len(wanted), "export") as bar:
        for number, target in enumerate(wanted, 1):
            source = _source(recipe, run, done)
            mark = _mark(recipe, run, target)
            entry = before.get(target.name)
            if entry is None or entry["made_from"] != mark:
                entry = _export(source, target, folder, mark)
            done[target.name] = run.path / entry["path"]
            found.append(entry)
            bar.update(number)
    file = evidence.write(run, layout.EXPORTS, found)
    run.event(EXPORTED, sha256=digest(file))
    return {
        "metrics": {"exports": len(found), "bytes": sum(entry["bytes"] for entry in found)},
        "artifacts": [file, *(folder / target.folder for target in wanted)],
        "notes": [f"{entry['name']}: {note}" for entry in found for note in (*entry["mended"], *entry["notes"])],
    }


def _before(run: Run) -> dict[str, Export]:
    """The exports that are there, by name, with every file as it was made: made from the same, they are not made again.

    The stage's report is gone when it runs again; that the list is the one it left is known from the log.
    """
    told, file = run.events(EXPORTED), run.path / layout.EXPORTS.path
    if not told or not file.is_file() or digest(file) != told[-1]["sha256"]:
        return {}
    return {
        entry["name"]: entry
        for entry in evidence.read(run, layout.EXPORTS)
        if entry.get("files") == digests(run.path / "export" / parse(entry["name"]).folder)
    }


def _mark(recipe: Recipe, run: Run, target: Target) -> str:
    """What an export depends on. A bundle also tells of the whole run, in its card."""
    merge = run.require("merge")
    parts: list[Any] = [__version__, merge.artifacts, recipe.name, recipe.template.model_dump(), target.name]
    if target.format.name == "bundle":
        parts += [merge.fingerprint, [report.started for name in ("train", "evaluate") if (report := run.report(name))]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _export(source: Source, target: Target, folder: Path, mark: str) -> Export:
    out = folder / target.folder
    begin = time.perf_counter()
    with aside(out) as partial:
        partial.mkdir()
        exported = exporter(target).export(source, target.variant, partial)
        inside = exported.path.resolve().relative_to(partial.resolve())
    path = out / inside
    return {
        "name": target.name,
        "path": path.relative_to(folder.parent).as_posix(),
        "backend": target.format.backend,
        "bytes": size(_whole(path)),
        "seconds": round(time.perf_counter() - begin, 3),
        "mended": list(exported.mended),
        "notes": list(exported.notes),
        "made_from": mark,
        "sha256": digest(_whole(path)),
        "files": digests(out),
    }


def _whole(path: Path) -> Path:
    """All of an export: what the runtime loads, and for a Modelfile its directory, with the weights that it names."""
    return path.parent if path.name == "Modelfile" else path


def size(path: Path) -> int:
    """Bytes of a file, or of all files in a directory."""
    return path.stat().st_size if path.is_file() else sum(f.stat().st_size for f in path.rglob("*") if f.is_file())


def _source(recipe: Recipe, run: Run, done: dict[str, Path]) -> Source:
    merged = run.path / layout.MERGED.path
    if not merged.is_dir():
        raise StageError(f"there is no merged model in {run.path}. Make it with: finetune merge RECIPE")
    model, adapter = evidence.final(run, recipe)
    for place in (merged, adapter):
        if place is not None:
            files.check(place)
    fetched = evidence.fetched(run)
    text = fetched.get("license_text")
    return Source(
        name=recipe.name,
        model=merged,
        base=model,
        adapter=adapter,
        system=recipe.template.system,
        license=fetched.get("license"),
        license_text=Path(run.path / text).read_text(encoding="utf-8") if text else None,
        trust_remote_code=recipe.model.trust_remote_code,
        done=dict(done),
        card=_card(recipe, run),
    )


def _card(recipe: Recipe, run: Run) -> dict[str, Any]:
    """What a model card tells: the recipe, the base, the verdicts on the training, the versions."""
    from finetune.checks import as_dict, results

    verdicts = as_dict(results(recipe, run, training=True))["verdicts"]
    return {
        "recipe": dump(recipe),
        "base_model": recipe.model.path,
        "verdicts": verdicts,
        "manifest": run.manifest(),
        "metrics": {name: report.metrics for name in ("train", "align", "evaluate") if (report := run.report(name))},
    }
