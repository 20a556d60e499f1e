"""Which model of a run a server gets: the final one, a checkpoint, or an export; as one directory or file."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from finetune.backends import get
from finetune.core.console import say
from finetune.core.errors import MissingError, UsageError
from finetune.core.files import digest
from finetune.core.memory import need_disk
from finetune.export import sizes
from finetune.recipe import Recipe
from finetune.recipe.exports import FORMATS, parse
from finetune.run import Run, evidence, layout, seal
from finetune.run.directory import RECIPE

TRAININGS = ("train", "align")
MARK = 16  # digits of a digest in a folder's name


@dataclass(frozen=True, kw_only=True)
class Found:
    """A model to serve: a directory, or a GGUF file; with an adapter where the two are still apart. `what` says which
    model of the run it is, in a few words."""

    what: str
    path: Path
    adapter: Path | None = None


def final(run: Run, recipe: Recipe) -> Found:
    """The model after the last training; merged, where that was done since. Raises MissingError for one not finished."""
    for stage, wanted in zip(TRAININGS, (recipe.train, recipe.align), strict=True):
        if wanted is not None and run.report(stage) is None:
            again = f"finetune run {run.path / 'recipe.yaml'} --run {run.path}"
            raise MissingError(
                f"{run.path} has no final model: its stage '{stage}' has not finished. Go on with: {again}\n"
                "Its newest checkpoint is served with --from-checkpoint"
            )
    merged = run.path / "merge" / "model"
    if merged.is_dir() and _since_training(run, "merge"):
        return Found(what="the final model", path=merged)
    base, adapter = evidence.final(run, recipe)
    trained = recipe.train is not None or recipe.align is not None
    return Found(what="the final model" if trained else "the untrained model", path=base, adapter=adapter)


def from_checkpoint(run: Run, recipe: Recipe, checkpoint: Path) -> Found:
    """What a checkpoint holds: a whole model, or an adapter and the model that it was trained on."""
    inside = checkpoint.is_relative_to(run.path)
    what = f"checkpoint {checkpoint.relative_to(run.path) if inside else checkpoint}"
    if not (checkpoint / "adapter_config.json").is_file():
        return Found(what=what, path=checkpoint)
    phases = evidence.phases(run, recipe)
    aligned = recipe.align is not None and checkpoint.parent in (
        run.path / "align", *([Path(recipe.align.output_dir).resolve()] if recipe.align.output_dir else []),
    )  # fmt: skip
    base, _ = phases.get("trained", phases["base"]) if aligned else phases["base"]
    return Found(what=what, path=base, adapter=checkpoint)


def exported(run: Run, kind: str, wanted: str | None) -> Found:
    """An export of a format that the run has: the one named, or the one nearest to the model it was made from.

    Raises MissingError with the command that makes it.
    """
    if wanted is not None and parse(wanted).format.name != kind:
        raise UsageError(f"--export {wanted} is not an export of the format '{kind}', which this backend runs")
    name = None if wanted is None else parse(wanted).name
    make = f"finetune export {run.path} --to {name or (parse(kind).name)}"
    if not evidence.there(run, layout.EXPORTS) or run.report("export") is None:
        raise MissingError(f"{run.path} has no export in the format '{kind}'. Make one with: {make}")
    there = {entry["name"]: run.path / entry["path"] for entry in evidence.read(run, layout.EXPORTS)}
    there = {each: path for each, path in there.items() if parse(each).format.name == kind and path.exists()}
    order = ["", *FORMATS[kind].variants]
    names = sorted(there, key=lambda each: order.index(parse(each).variant))
    if not names or name not in (None, *names):
        has = f" It has {', '.join(names)}." if names else ""
        raise MissingError(f"{run.path} has no export {name or f'in the format {kind!r}'}.{has} Make it with: {make}")
    if not _since_training(run, "export"):
        raise MissingError(f"the exports of {run.path} are older than its training. Make them again with: {make}")
    return Found(what=f"the export {name or names[0]}", path=there[name or names[0]])


def loaded(found: Found, run: Run, recipe: Recipe) -> list[Path]:
    """The files and folders that a server of this model reads: what has to be as it was made."""
    template = [path] if (path := run.path / layout.CHAT_TEMPLATE.path).is_file() else []
    if found.adapter is None:
        return [run.path / RECIPE, *template, found.path]
    kept = _kept(run, found)
    return [run.path / RECIPE, *template, found.adapter, *([] if kept and _is_own(kept) else [found.path])]


def whole(found: Found, run: Run, recipe: Recipe) -> Path:
    """One directory with everything in it. Where there is an adapter it is merged into the base by the backend that
    trained it, once: the result stays in `RUN/serve`, under the digests of what it was made of and of itself."""
    if found.adapter is None:
        return found.path
    from filelock import FileLock

    folder = run.path / seal.SERVED
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        kept = _kept(run, found)
        if kept is not None and _is_own(kept):
            return kept
        if kept is not None:
            say(f"note: {kept.relative_to(run.path)} was changed after it was made; it is made again")
        for old in folder.glob(f"{_stem(found)}-" + "[0-9a-f]" * MARK + "-" + "[0-9a-f]" * MARK):
            shutil.rmtree(old)
        needed = sizes.merged(found.path, recipe.model.dtype)
        need_disk(folder, needed, "the model made one with its adapter", "choose another disk with --run DIR")
        making = folder / f".{_stem(found)}.making"
        shutil.rmtree(making, ignore_errors=True)
        try:
            get(recipe.backend).merge(found.path, found.adapter, making, **evidence.model_settings(recipe))
            return making.rename(folder / f"{_stem(found)}-{_mark(run, found)}-{digest(making)[:MARK]}")
        finally:
            shutil.rmtree(making, ignore_errors=True)


def _kept(run: Run, found: Found) -> Path | None:
    """The model that was made of the same before."""
    return next((run.path / seal.SERVED).glob(f"{_stem(found)}-{_mark(run, found)}-" + "[0-9a-f]" * MARK), None)


def _is_own(model: Path) -> bool:
    """Whether a model made for serving is the one that its name tells."""
    return digest(model)[:MARK] == model.name[-MARK:]


def _stem(found: Found) -> str:
    assert found.adapter is not None
    return f"{found.adapter.parent.name}-{found.adapter.name}"


def _mark(run: Run, found: Found) -> str:
    """What a model made for serving is made of."""
    assert found.adapter is not None
    fetched = evidence.fetched(run)
    base = json.dumps(fetched["files"]) if str(found.path) == fetched["base"] else digest(found.path)
    return hashlib.sha256(f"{digest(found.adapter)} {base}".encode()).hexdigest()[:MARK]


def _since_training(run: Run, stage: str) -> bool:
    """Whether a stage ran after the last training did."""
    done = run.report(stage)
    return done is not None and all(
        report.started < done.started for name in TRAININGS if (report := run.report(name)) is not None
    )
