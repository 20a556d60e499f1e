"""`finetune explain`: what a verdict, a check, a stage or a key of the recipe means."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from finetune.cli.options import output_options, print_json
from finetune.core.errors import UsageError
from finetune.core.lookup import did_you_mean

if TYPE_CHECKING:  # pydantic would cost the command's help its start-up time
    from finetune.recipe.keys import Key


def _complete_name(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    return [name for name in sorted(_names()) if name.startswith(incomplete)]


@click.command("explain")
@click.argument("name", required=False, shell_complete=_complete_name)
@output_options
def command(name: str | None, as_json: bool) -> None:
    """Say what NAME means: a verdict (loss_end, distribution_parity[mlx]), a check (loss), a stage (train), or a key of the
    recipe (train.learning_rate, lora.r). A name that means several things is told as each. Without NAME, list all.
    """
    if name is None:
        listed = _listed()
        if as_json:
            print_json(listed)
        else:
            _show_list(listed)
        return
    found = list(_meanings(name))
    if not found:
        raise UsageError(
            f"nothing is called '{name}'.{did_you_mean(name.partition('[')[0], _names())} "
            "List everything that has a name with: finetune explain"
        )
    if as_json:
        print_json(found)
        return
    from finetune.report.terminal import show_facts

    for place, each in enumerate(found):
        click.echo("\n" * min(place, 1), nl=False)
        show_facts(*_told(each))


# -- looked up ---------------------------------------------------------------------------------------------------------


def _names() -> set[str]:
    from finetune.checks.explained import CHECK_OF, OF_CHECK
    from finetune.recipe.keys import keys
    from finetune.run.plan import BY_NAME

    known = keys()
    places = {place for key in known for place in key.places}
    return {*CHECK_OF, *OF_CHECK, *BY_NAME, *places, *(key.name for key in known)}


def _meanings(name: str) -> Iterator[dict[str, Any]]:
    """Everything that a name means. Raises UsageError where it is the end of several keys and names none of them."""
    from finetune.checks.explained import EXPLAINED, OF_CHECK
    from finetune.recipe.keys import keys, matching
    from finetune.run.plan import BY_NAME

    if name.partition("[")[0] in EXPLAINED:
        yield _verdict(name)
    if name in OF_CHECK:
        yield _check(name)
    if name in BY_NAME:
        yield _stage(name)
    found = list(matching(name, keys()))
    if len(found) > 1:
        places = ", ".join(key.places[0] for key in found)
        raise UsageError(f"several keys are called '{name}': {places}. Say which, as in: {found[0].places[0]}")
    yield from map(_key, found)


def _verdict(name: str) -> dict[str, Any]:
    from finetune.checks.explained import CHECK_OF, EXPLAINED
    from finetune.checks.remedies import REMEDIES

    bare = name.partition("[")[0]
    entry = EXPLAINED[bare]
    return {
        "kind": "verdict",
        "name": name,
        "check": CHECK_OF[bare],
        "measures": entry.measures,
        "evidence": list(entry.evidence),
        "bound": entry.bound,
        "why_it_fails": entry.fails,
        "what_to_do": REMEDIES[bare],
    }


def _check(name: str) -> dict[str, Any]:
    from finetune.checks import BY_NAME
    from finetune.checks.explained import OF_CHECK

    verdicts = {verdict: entry.measures for verdict, entry in OF_CHECK[name].items()}
    return {"kind": "check", "name": name, "help": BY_NAME[name].help, "verdicts": verdicts}


def _stage(name: str) -> dict[str, Any]:
    from finetune.run.plan import BY_NAME

    stage = BY_NAME[name]
    reads = [
        key
        for section in stage.sections
        for key in ([f"{section}.{each}" for each in stage.keys[section]] if section in stage.keys else [section])
    ]
    return {"kind": "stage", "name": name, "help": stage.help, "reads": reads, "needs": list(stage.needs)}


def _key(key: Key) -> dict[str, Any]:
    """A key; of a section, its keys too. Of a bound, the verdicts that are held to it."""
    from finetune.checks.explained import EXPLAINED
    from finetune.recipe.keys import PLACES

    named = re.compile(rf"(?<![\w.])({'|'.join(map(re.escape, key.places))})(?!\.?\w)")
    bound = [name for name, entry in EXPLAINED.items() if named.search(entry.bound)]
    found = {
        "kind": "section" if key.kind.startswith("section") else "key",
        "name": key.name,
        "type": key.kind,
        "default": key.defaults,
        "description": key.descriptions,
        "section": [section or "top level" for section in key.sections],
    }
    if found["kind"] == "section":
        found["keys"] = list(PLACES[key.places[0]].model_fields)
    return {**found, "verdicts": bound} if bound else found


def _listed() -> dict[str, Any]:
    from finetune.checks.explained import OF_CHECK
    from finetune.recipe.keys import SECTIONS, own_fields
    from finetune.run.plan import STAGES

    return {
        "checks": {name: list(entries) for name, entries in OF_CHECK.items()},
        "stages": [stage.name for stage in STAGES],
        "sections": {title.replace("`", ""): list(own_fields(model)) for title, model, _ in SECTIONS},
    }


# -- told --------------------------------------------------------------------------------------------------------------


def _told(found: dict[str, Any]) -> tuple[str, list[tuple[str, str]]]:
    """A heading, and what stands under it."""
    kind, name = found["kind"], found["name"]
    if kind == "verdict":
        return f"{name}: a verdict of the check {found['check']}", [
            ("measures", found["measures"]),
            ("read from", ", ".join(found["evidence"])),
            ("bound", found["bound"]),
            ("why it fails", found["why_it_fails"]),
            ("what to do", found["what_to_do"]),
        ]
    if kind == "check":
        return f"{name}: a check", [("", found["help"]), *found["verdicts"].items()]
    if kind == "stage":
        return f"{name}: a stage", [
            ("", found["help"]),
            ("reads", f"of the recipe: {', '.join(found['reads'])}"),
            ("runs after", ", ".join(found["needs"]) or "nothing"),
        ]
    return f"{', '.join(found['default'])}: a {kind} of the recipe", list(_of_key(found))


def _of_key(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    said = found["description"]
    alike = len(set(said.values())) == 1
    yield from ((("" if alike else place), text) for place, text in list(said.items())[: 1 if alike else None])
    yield "type", found["type"]
    values = list(found["default"].values())
    told = [f"{value} ({place})" for place, value in found["default"].items()]
    yield "default", values[0] if len(set(values)) == 1 else ", ".join(told)
    yield "section", " and ".join(found["section"])
    if "keys" in found:
        yield "keys", ", ".join(found["keys"])
    if "verdicts" in found:
        yield "bound of", ", ".join(found["verdicts"])


def _show_list(listed: dict[str, Any]) -> None:
    from finetune.report.terminal import show_facts

    show_facts("Checks and their verdicts", [(name, ", ".join(names)) for name, names in listed["checks"].items()])
    click.echo()
    show_facts("Stages", [("", ", ".join(listed["stages"]))])
    click.echo()
    show_facts("Keys of a recipe", [(name, ", ".join(names)) for name, names in listed["sections"].items()])
    click.echo("\nmore of each: finetune explain NAME")
