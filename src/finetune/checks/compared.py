"""Is what was compared what the run has, and what it was asked what the run asks? Parts of the check `parity`."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from finetune.checks import Part, Verdict, judge
from finetune.checks.asked import base_tokenizer
from finetune.core.errors import UsageError
from finetune.core.files import digest
from finetune.data import encode, templates
from finetune.evaluation.answers import is_correct
from finetune.parity import prompts, stored
from finetune.recipe import Recipe
from finetune.recipe.exports import parse
from finetune.run import Run, evidence, layout
from finetune.run.records.compared import Export, Given, Hop, Material
from finetune.run.report import digest_in

EXPORTS, MATERIAL = layout.EXPORTS.path, layout.MATERIAL.path
MERGED, ADAPTER = "merged", "adapter"


# -- the chain of a recipe ---------------------------------------------------------------------------------------------


def is_adapter(recipe: Recipe) -> bool:
    """Whether the final model of a recipe is an adapter on a base, which was merged. One that trains nothing can be
    exported only where an adapter was fetched."""
    return recipe.train is None or recipe.train.method == "lora"


def hops(recipe: Recipe) -> list[str]:
    """The models of the chain that are held against the one before."""
    return [*([MERGED] if is_adapter(recipe) else []), *recipe.export]


def runtime(recipe: Recipe, name: str) -> str:
    """The backend that runs a model of the chain."""
    return recipe.backend if name == MERGED else parse(name).format.backend or recipe.backend


# -- the exports -------------------------------------------------------------------------------------------------------


def _exports(recipe: Recipe, run: Run) -> list[Verdict]:
    """The list of exports against the recipe, and against the files."""
    listed = evidence.read(run, layout.EXPORTS)
    names = [entry["name"] for entry in listed]
    odd = [] if sorted(names) == sorted(recipe.export) else [f"listed are {names}, and the recipe has {recipe.export}"]
    odd += [f"{entry['name']}: {fault}" for entry in listed for fault in _faults(entry, run)]
    why = f"{len(listed)} exports are there as they are listed"
    if odd:
        why = odd[0] + (f"; {len(odd)} in all" if len(odd) > 1 else "")
    return [judge("exports_listed", len(odd), "==", 0, "entries off", EXPORTS, why)]


def _faults(entry: Export, run: Run) -> Iterator[str]:
    target, path = parse(entry["name"]), run.path / entry["path"]
    if entry["backend"] != target.format.backend:
        yield f"its backend is {entry['backend']}, not {target.format.backend}"
    if not path.is_relative_to(run.path / "export" / target.folder):
        yield f"{entry['path']} is not in export/{target.folder}"
    elif not path.exists():
        yield f"{entry['path']} is gone"
    else:
        whole = path.parent if path.name == "Modelfile" else path  # it names the weights beside it
        size = sum(file.stat().st_size for file in (whole, *whole.rglob("*")) if file.is_file())
        if size != entry["bytes"]:
            yield f"{entry['bytes']} bytes are listed, and {size} there"
        if _digest(whole, run) != entry["sha256"]:
            yield "its digest is that of other files"
        report, folder = run.require("export"), f"export/{target.folder}/"
        there = {name.removeprefix(folder): sha for name, sha in report.files.items() if name.startswith(folder)}
        if report.schema and entry.get("files") != there:
            yield "the files listed are not those that its stage left"


def _digest(path: Path, run: Run) -> str:
    """As the stage's report has it, which `artifacts_intact` holds against the files; taken again where it has none."""
    report = run.report("export")
    return (digest_in(report.files, path.relative_to(run.path).as_posix()) if report else None) or digest(path)


# -- the material ------------------------------------------------------------------------------------------------------


def _material(recipe: Recipe, run: Run) -> list[Verdict]:
    """What every model was asked, against the run: its questions, rows, template and tokens."""
    found = evidence.read(run, layout.MATERIAL)
    wanted = prompts.build(recipe, run, Path(evidence.fetched(run)["base"]))
    # Of the texts that come with this program another version had others, so their ids are what counts.
    odd: list[str] = [key for key in wanted if key not in _OWN and found[key] != wanted[key]]  # type: ignore[literal-required]
    odd += _otherwise(recipe, run, found)
    why = (
        f"{len(found['questions'])} questions, {len(found['rows'])} rows, {len(found['conversations'])} conversations "
    )
    why += "and the vocabulary are those of the run"
    if odd:
        why = f"not as the run has them: {', '.join(odd[:3])}"
    return [judge("asked_alike", len(odd), "==", 0, "parts otherwise", MATERIAL, why)]


_OWN = ("conversations", "texts", "odd_texts")


def _otherwise(recipe: Recipe, run: Run, found: Material) -> Iterator[str]:
    tokenizer = base_tokenizer(recipe, run)
    template = templates.ChatTemplate(name="run", source=evidence.chat_template(run))
    for each in found["conversations"]:
        try:
            ids = encode.prompt_ids(each["messages"], tokenizer=tokenizer, template=template, system=None)
        except UsageError:
            ids = None
        if ids != each["ids"]:
            yield f"the conversation '{each['name']}'"
    for text in (*found["texts"], *found["odd_texts"]):
        ids = tokenizer.encode(text["text"])
        if text["ids"] not in (ids, prompts.with_bos(tokenizer, ids)):
            yield f"the text {text['text'][:20]!r}"


# -- one model of the chain --------------------------------------------------------------------------------------------


def as_listed(name: str, recipe: Recipe, run: Run) -> list[Verdict]:
    """What was seen of a model against the list of exports, and its counts against its answers."""
    hop, asked = evidence.read(run, layout.comparison(name)), evidence.read(run, layout.MATERIAL)
    wanted = {**_listed(name, recipe, run), **_counts(asked, hop), **_of_answers(name, recipe, run, asked, hop)}
    found = _found(hop)
    odd = [key for key, value in wanted.items() if found[key] != value]
    if hop["dtype"] not in ("float32", recipe.model.dtype):
        odd.append("dtype")
        wanted["dtype"], found["dtype"] = recipe.model.dtype, hop["dtype"]
    why = f"it is the model that is listed, and {len(wanted)} of its facts and counts follow from the rest"
    if odd:
        why = f"{odd[0]} is {found[odd[0]]!r}, and should be {wanted[odd[0]]!r}"
    return [judge(f"compared_as_listed[{name}]", len(odd), "==", 0, "facts off", layout.comparison(name).path, why)]


def _listed(name: str, recipe: Recipe, run: Run) -> dict[str, Any]:
    facts: dict[str, Any] = {"path": layout.MERGED.path, "bytes": None, "mended": []}
    if name != MERGED:
        entry = next((each for each in evidence.read(run, layout.EXPORTS) if each["name"] == name), None)
        facts = {key: entry[key] if entry else "not listed" for key in ("path", "bytes", "mended")}
    place = run.path / str(facts["path"])
    if recipe.backend != "fake" and place.is_dir():
        size, count = stored.weight_bytes(place), stored.parameters(run.path / layout.MERGED.path)
        facts["bits"] = 8 * size / count if size and count else None
    return {
        **facts, "hop": name, "reference": ADAPTER if name == MERGED else MERGED, "backend": runtime(recipe, name),
    }  # fmt: skip


def _counts(asked: Material, hop: Hop) -> dict[str, Any]:
    texts = [*asked["texts"], *asked["odd_texts"]]
    whole = [*(text["ids"] for text in asked["texts"]), *asked["rows"]]
    conversed = sum(question["messages"] is not None for question in asked["questions"])
    return {
        "prompts.compared": len(asked["conversations"]) + len(texts),
        "vocabulary.compared": sum(len(text["ids"]) for text in asked["vocabulary"]),
        "greedy.compared": len(asked["questions"]),
        "answers": len(asked["questions"]),
        "greedy.gaps": hop["greedy"]["compared"] - hop["greedy"]["equal"],
        "stops.missing": [token for token in asked["ends"] if token not in hop["stops"]["at"]],
        **({"distributions.positions": sum(len(ids) - 1 for ids in whole if ids)} if hop["distributions"] else {}),
        **({"served.compared": min(prompts.SERVED, conversed)} if hop["served"] else {}),
    }


def _of_answers(name: str, recipe: Recipe, run: Run, asked: Material, hop: Hop) -> dict[str, Any]:
    """What the texts of the answers come to. Endings and probes are held against the answers of the model before, where
    those are kept too; and where every answer is the same, against these themselves."""
    questions, after, greedy = asked["questions"], hop["answers"], hop["greedy"]
    leaks = sum(word in answer["text"] for answer in after for word in asked["special"])
    found: dict[str, Any] = {"stop.leaks": leaks}
    before = None
    if name != MERGED and is_adapter(recipe):
        before = evidence.read(run, layout.comparison(MERGED))["answers"]
        found["greedy.equal"] = min(greedy["equal"], sum(map(operator.eq, before, after)))
    elif greedy["equal"] == greedy["compared"]:
        before, found["greedy.tokens_agreed"] = after, greedy["tokens"]
    if before is None:
        return found
    both = list(zip(questions, before, after, strict=False))
    ended = [now["finish"] for _, was, now in both if was["finish"] == "stop"]
    known = [_right(question, now) for question, was, now in both if _right(question, was)]
    counts = {"stop.compared": len(ended), "stop.stopped": ended.count("stop")}
    return {**found, **counts, "learned.known": len(known), "learned.kept": sum(known)}


def _right(question: Any, said: Given) -> bool:
    return question["set"] == "probes" and is_correct(said["text"], question["answer"], question["match"])


def _found(hop: Hop) -> dict[str, Any]:
    """The facts and counts of a hop, under the names of `as_listed`."""
    flat: dict[str, Any] = dict(hop)
    for part in ("prompts", "vocabulary", "greedy", "stops", "stop", "learned", "distributions", "served"):
        flat |= {f"{part}.{key}": value for key, value in (flat[part] or {}).items()}
    return {**flat, "answers": len(hop["answers"]), "greedy.gaps": len(hop["greedy"]["gaps"])}


def _owes_exports(recipe: Recipe) -> Iterable[str]:
    return ["exports_listed"] if recipe.export else []


def _owes_material(recipe: Recipe) -> Iterable[str]:
    return ["asked_alike"] if recipe.export else []


PARTS: tuple[Part, ...] = (
    Part(check=_exports, owes=_owes_exports, evidence=EXPORTS),
    Part(check=_material, owes=_owes_material, evidence=MATERIAL),
)
