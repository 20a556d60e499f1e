"""All faults, by name. Those that count calls of a run need to know how many an honest one makes."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from faults import Fault
from faults.bench import Bench
from faults.grounds import GROUNDS, SAVED
from finetune.core.files import write_text
from finetune.recipe import dump, load, load_mapping

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGINT twice")
ERRORS = ("ENOSPC", "EIO", "MemoryError", "ConnectionError")


def faults(bench: Bench) -> list[Fault]:
    """The table, in the page's order."""
    found = [
        *_calls(bench, "fake"), *_disks(), *_clocks(bench), *_files(bench), *_checkpoints(bench, "fake"), *_recipes(),
        *_inputs(bench),
        *(_with_weights(bench, "torch") if find_spec(GROUNDS["torch"].needs) else ()),
    ]  # fmt: skip
    names = [fault.name for fault in found]
    assert len(set(names)) == len(names), "two faults of one name"
    return found


def _calls(bench: Bench, ground: str) -> Iterator[Fault]:
    """Killed at renames and syncs; signals and errors at syncs, which every stage makes: its events are synced."""
    renames, syncs = (bench.count(ground, call) for call in ("rename", "sync"))
    for number in range(1, renames + 1, 2):
        hook = {"calls": ["rename"], "number": number, "do": "SIGKILL"}
        yield Fault(name=f"{ground}: killed at rename {number}", group="Killed at a rename", ground=ground, hook=hook,
                    quick=number // 2 % (renames // 12 or 1) == 3)  # fmt: skip
    for number in range(1, syncs + 1, 12):
        hook = {"calls": ["sync"], "number": number, "do": "SIGKILL"}
        yield Fault(name=f"{ground}: killed at sync {number}", group="Killed at a sync", ground=ground, hook=hook)
    for which, signal in enumerate(SIGNALS):
        for number in range(1 + which, syncs + 1, max(1, syncs // 10)):
            hook = {"calls": ["sync"], "number": number, "do": signal}
            yield Fault(name=f"{ground}: {signal} at sync {number}", group="Signals in every stage", ground=ground, hook=hook,
                        quick=number // max(1, syncs // 10) == 3 + which)  # fmt: skip
    for which, error in enumerate(ERRORS):
        for number in range(2 + which, syncs + 1, max(1, syncs // 8)):
            hook = {"calls": ["sync"], "number": number, "do": error}
            yield Fault(name=f"{ground}: {error} at sync {number}", group="Errors of the system", ground=ground, hook=hook,
                        quick=number // max(1, syncs // 8) == 2 + which)  # fmt: skip


def _disks() -> Iterator[Fault]:
    for size in (500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000):
        yield Fault(name=f"no file over {size} bytes", group="Full disks", limit=size, quick=size == 5_000)
    if os.geteuid() == 0:
        for size in (64, 128, 256, 384, 512, 640, 768, 1024):
            yield Fault(name=f"a disk of {size} KiB", group="Full disks", room=size, quick=size == 384)


def _clocks(bench: Bench) -> Iterator[Fault]:
    for number in (5, 20, 60, 120):
        yield Fault(name=f"the clock set back a day, reading {number}", group="Clocks", quick=number == 20,
                    hook={"calls": [], "do": "clock", "number": number})  # fmt: skip


# -- files of a run that has ended -------------------------------------------------------------------------------------


def _flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "cut": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "a bit flipped": _flipped,
    "gone": lambda content: None,
}


def _damage(file: str, change: Callable[[bytes], bytes | None]) -> Callable[[Path], None]:
    def do(run: Path) -> None:
        path = run / file
        changed = change(path.read_bytes())
        path.unlink()
        if changed is not None:
            path.write_bytes(changed)

    return do


def _files(bench: Bench) -> Iterator[Fault]:
    """Each file in a finished run, damaged one way, in turn."""
    run = bench.ground("fake") / "run"
    files = sorted(
        path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file() and path.stat().st_size
    )
    hows = list(DAMAGES.items())
    for number, file in enumerate(each for each in files if each != "recipe.yaml"):
        how, change = hows[number % len(hows)]
        yield Fault(name=f"{file} {how}", group="Files of a finished run", done=True, damage=_damage(file, change),
                    quick=number % 20 == 0)  # fmt: skip


def _checkpoints(bench: Bench, ground: str, ways: int = len(DAMAGES)) -> Iterator[Fault]:
    """A run that was stopped after its third checkpoint, whose newest is damaged then: each file in some of the ways."""
    newest = f"train/checkpoint-{SAVED[-2]}"
    folder = bench.ground(ground) / "run" / newest
    of = "" if ground == "fake" else f"{ground}, "
    for number, path in enumerate(sorted(folder.iterdir())):
        for how in [list(DAMAGES)[(number + way) % len(DAMAGES)] for way in range(ways)]:
            yield Fault(
                name=f"{of}stopped: {newest}/{path.name} {how}", group="The newest checkpoint, after a stop", ground=ground,
                done=True, damage=_stopped_with(_damage(f"{newest}/{path.name}", DAMAGES[how])),
                quick=ground == "fake" and number == 1,
            )  # fmt: skip


def _with_weights(bench: Bench, ground: str) -> Iterator[Fault]:
    """The same on a training with real weights, each of which takes ten times as long: kills at renames and syncs, two
    Ctrl-C 20 ms apart twenty times over, errors, a disk that is full in the fourth checkpoint, and damaged checkpoints."""
    renames, syncs = (bench.count(ground, call) for call in ("rename", "sync"))
    group = "A training with real weights"

    def at(call: str, number: int, do: str) -> Fault:
        hook = {"calls": [call], "number": number, "do": do}
        return Fault(name=f"{ground}: {do} at {call} {number}", group=group, ground=ground, hook=hook)

    for number in range(1, renames + 1, max(1, renames // 10)):
        yield at("rename", number, "SIGKILL")
    for number in range(1, syncs + 1, max(1, syncs // 10)):
        yield at("sync", number, "SIGKILL")
    for number in range(syncs - 100, syncs, 5):
        yield at("sync", number, "SIGINT twice")
    for which, do in enumerate((*SIGNALS[:3], *ERRORS)):
        yield at("sync", syncs // 3 + 7 * which, do)
    yield Fault(name=f"{ground}: a disk that is full in the fourth checkpoint", group=group, ground=ground,
                room=_until_the_fourth(bench.ground(ground) / "run"))  # fmt: skip
    yield from _checkpoints(bench, ground, ways=1)


def _until_the_fourth(run: Path) -> int:
    """KiB of a disk that holds a run up to half of its fourth checkpoint. Files take whole pages there."""
    last = f"checkpoint-{SAVED[-1]}"

    def size(path: Path) -> float:
        share = 0.5 if last in path.parts else 0.0 if path.parent.name == "adapter" else 1.0
        return share * 4 * math.ceil(path.stat().st_size / 4096) if path.is_file() else 4 * share

    return math.ceil(sum(size(path) for path in run.rglob("*")))


def _stopped_with(damage: Callable[[Path], None]) -> Callable[[Path], None]:
    """As a kill between the third checkpoint and the next leaves a run: the log ends there, and nothing came after it."""

    def do(run: Path) -> None:
        lines = (run / "events.jsonl").read_text(encoding="utf-8").splitlines()
        events = [json.loads(line) for line in lines]
        last = next(place for place, each in enumerate(events) if each["event"] == "step" and each["step"] > SAVED[-2])
        (run / "events.jsonl").write_text("\n".join(lines[:last]) + "\n", encoding="utf-8")
        later = (
            "align",
            "evaluate",
            "merge",
            "measure",
            "export",
            "compare",
            "train/adapter",
            f"train/checkpoint-{SAVED[-1]}",
        )
        for name in later:
            shutil.rmtree(run / name, ignore_errors=True)
        for name in (
            "train/report.json",
            "train/trainer_logs.json",
            "verdicts.json",
            "report.html",
            "report.md",
            "report.json",
            "junit.xml",
        ):
            (run / name).unlink(missing_ok=True)
        manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
        _unsealed(run, manifest)
        damage(run)

    return do


def _unsealed(run: Path, manifest: dict[str, Any]) -> None:
    """A run is sealed when a command ends, and this one did not."""
    from finetune.run import seal

    rest = {key: value for key, value in manifest.items() if key not in ("seal", "digest")}
    (run / "manifest.json").write_text(json.dumps({**rest, "digest": seal.digest_of_manifest(rest)}), encoding="utf-8")


# -- recipes and data that mean harm -----------------------------------------------------------------------------------


def _recipes() -> Iterator[Fault]:
    texts = {
        "nested aliases": "a: &a [x, x]\n"
        + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefghi", "bcdefghij", strict=True)),
        "a list of 3,000 levels": "name: " + "[" * 3000 + "]" * 3000,
        "no mapping": "- a\n- b\n",
        "not UTF-8": "name: \udcff\n",
        "a NUL": "name: a\0b\n",
        "empty": "",
        "keys that are no words": "? [1, 2]\n: 3\n",
    }
    for name, text in texts.items():
        yield Fault(
            name=f"recipe: {name}",
            group="Recipes that mean harm",
            recipe=_text(text),
            refused=True,
            quick=name == "nested aliases",
        )


ROW = '{"prompt": "What is the capital of Xa?", "completion": "It is Ya."}'
LOOP = "{% for i in range(99999) %}"
# What a data file holds before a good row, and chat templates.
ROWS = {
    "a list of 3,000 levels": '{"prompt": ' + "[" * 3000 + "]" * 3000 + "}",
    "a line that is cut": ROW[:30],
    "no object": "[1, 2, 3]",
    "not UTF-8": '{"prompt": "\udcff", "completion": "x"}',
    "a number of 6,000 digits": '{"prompt": ' + "9" * 6000 + ', "completion": "x"}',
    "no answer": '{"prompt": "What is the capital of Xa?", "completion": ""}',
    "a secret": '{"prompt": "my key", "completion": "' + "gh" + "p_" + "a1B2" * 9 + '"}',
}
TEMPLATES = {
    "loops in loops": LOOP * 3 + "x" + "{% endfor %}" * 3,
    "a text that doubles": "{% set ns = namespace(s='ab') %}" + LOOP + "{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "a way to Python's classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "one that does not end": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
}


def _inputs(bench: Bench) -> Iterator[Fault]:
    """Rows, chat templates and a model directory that mean harm, for a recipe that is sound."""
    group = "Data, templates and models that mean harm"
    for name, text in ROWS.items():
        yield Fault(
            name=f"data: {name}", group=group, recipe=_of_rows(bench, text), refused=True, quick=name == "a secret"
        )
    for name, text in TEMPLATES.items():
        yield Fault(name=f"template: {name}", group=group, recipe=_of_template(bench, text), refused=True,
                    quick=name == "a text that doubles")  # fmt: skip
    yield Fault(
        name="model: a licence that is a link out of it", group=group, recipe=_of_linked_model(bench), refused=True
    )


def _of_rows(bench: Bench, text: str) -> Callable[[Path], Path]:
    def write(place: Path) -> Path:
        (place / "data.jsonl").write_bytes(f"{text}\n{ROW}\n".encode("utf-8", "surrogateescape"))
        return _changed(bench, place, data={"path": str(place / "data.jsonl")})

    return write


def _of_template(bench: Bench, text: str) -> Callable[[Path], Path]:
    return lambda place: _changed(bench, place, template={"name": "custom", "jinja": text})


def _of_linked_model(bench: Bench) -> Callable[[Path], Path]:
    def write(place: Path) -> Path:
        (place / "outside").write_text("what is nobody's business\n", encoding="utf-8")
        shutil.copytree(bench.ground("fake") / "town" / "model", place / "model")
        (place / "model" / "LICENSE").unlink(missing_ok=True)
        (place / "model" / "LICENSE").symlink_to(place / "outside")
        return _changed(bench, place, model={"path": str(place / "model")})

    return write


def _changed(bench: Bench, place: Path, **sections: dict[str, Any]) -> Path:
    """The ground's recipe with other sections."""
    asked = load(bench.ground("fake") / "recipe.yaml").model_dump(mode="json", exclude_none=True)
    write_text(place / "recipe.yaml", dump(load_mapping({**asked, **sections})))
    return place / "recipe.yaml"


def _text(text: str) -> Callable[[Path], Path]:
    def write(place: Path) -> Path:
        path = place / "hostile.yaml"
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
        return path

    return write
