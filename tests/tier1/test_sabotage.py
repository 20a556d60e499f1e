"""The bench of the sabotages: its table, patches in processes that know nothing of them, changes to what stages left."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import os
import shutil
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import psutil
import pytest

import finetune
import sabotage
from finetune.core import processes
from finetune.core.files import digest, write_jsonl
from finetune.run.plan import BY_NAME
from finetune.stages.pipeline import preview, run_directory, run_stages
from finetune.stages.runner import fingerprint
from sabotage import baseline, fork_server, import_hook, starting
from sabotage.context import Context, as_if_written_so
from support import town

WRAPPED = """
from sabotage.context import Context

def shout(context: Context) -> None:
    context.wrap("textwrap:shorten", lambda original, text, width: original(text, width).upper())
    context.wrap("fractions:Fraction.limit_denominator", lambda original, self, most=1: "patched")
"""


def test_every_sabotage_says_what_it_does_and_where_it_happens():
    table = sabotage.table()
    assert len(table) >= 14
    for row in table.values():
        context = Context()
        row.apply(context)
        assert context.recipe or context.patches or context.changes, row.name
        assert row.what.endswith("."), row.name
        assert row.baseline in baseline.BASELINES
        assert set(context.changes) <= set(BY_NAME)


def test_two_sabotages_of_one_name_are_refused():
    with pytest.raises(ValueError, match="two sabotages called 'learning rate 0'"):
        sabotage.sabotage("learning rate 0")(lambda context: None)


@pytest.mark.parametrize(
    "before", ["", "import textwrap, fractions; ", "from importlib.util import find_spec; find_spec('fractions'); "]
)
def test_a_patch_reaches_processes_that_know_nothing_of_it_and_their_children(tmp_path, before):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "wrapped.py").write_text(WRAPPED, encoding="utf-8")
    start = tmp_path / "start"
    start.mkdir()
    shutil.copyfile(starting.__file__, start / "sitecustomize.py")
    use = "import textwrap; from fractions import Fraction; "
    use += "print(textwrap.shorten('a b', 9), Fraction(1, 3).limit_denominator())"
    nested = f"import subprocess, sys; subprocess.run([sys.executable, '-P', '-c', {before + use!r}], check=True)"
    path = f"{start}:{tmp_path / 'own'}:{baseline.environment()['PYTHONPATH']}"
    for code in (before + use, nested):
        environment = {**baseline.environment(), "PYTHONPATH": path, starting.PATCHES: "wrapped:shout"}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.stdout == "A B patched\n", done.stderr


THINGS = """
LIMIT = 3

class Thing:
    size = property(lambda self: 1)

    def own(self, a, *, b=2):
        return a + b

    @staticmethod
    def loose(a):
        return a

    @classmethod
    def of(cls, a):
        return cls.__name__ + a
"""


@pytest.fixture
def things(monkeypatch):
    """Patch a module of constants and of functions of every kind; gives it."""

    def patched(change):
        module = types.ModuleType("things")
        exec(THINGS, module.__dict__)
        monkeypatch.setitem(sys.modules, "things", module)
        context = Context()
        change(context)
        import_hook.patch(module, enumerate(context.patches), import_hook.Reach())
        return module

    return patched


@pytest.mark.parametrize(
    ("name", "call", "gives"),
    [
        ("own", lambda thing: thing().own(1, b=4), ["Thing", 1, {"b": 4}, 5]),
        ("loose", lambda thing: thing().loose(7), [7, {}, 7]),
        ("loose", lambda thing: thing.loose(7), [7, {}, 7]),
        ("of", lambda thing: thing.of("!"), [type, "!", {}, "Thing!"]),
    ],
)
def test_a_patch_is_handed_the_original_and_whatever_that_would_have_been_given(things, name, call, gives):
    def told(original, *arguments, **named):
        return [*arguments, named, original(*arguments, **named)]

    module = things(lambda context: context.wrap(f"things:Thing.{name}", told))
    found = call(module.Thing)

    if name != "loose":
        assert found[0] is module.Thing or type(found[0]) is module.Thing
        found, gives = found[1:], gives[1:]
    assert found == gives


def test_a_patched_function_still_says_its_name_and_what_it_takes(things):
    thing = things(lambda context: context.wrap("things:Thing.own", lambda original, *_, **__: None)).Thing
    assert (thing.own.__qualname__, str(inspect.signature(thing.own))) == ("Thing.own", "(self, a, *, b=2)")


def test_what_is_no_function_is_replaced_by_what_is_made_of_it(things):
    def change(context):
        context.put("things:LIMIT", lambda original: original + 1)
        context.put("things:Thing.size", lambda original: property(lambda self: 10 * original.fget(self)))

    module = things(change)
    assert (module.LIMIT, module.Thing().size) == (4, 10)


@pytest.mark.parametrize("target", ["things:LIMIT", "things:Thing.size"])
def test_calls_of_what_is_no_function_cannot_be_handed_on(things, target):
    with pytest.raises(TypeError, match=f"{target} is no function; `put`"):
        things(lambda context: context.wrap(target, lambda original: None))


def test_every_function_of_ours_that_a_sabotage_patches_is_there():
    """Those of libraries are found missing when they are carried out."""
    ours = set()
    for row in sabotage.table().values():
        context = Context()
        row.apply(context)
        ours |= {each.target for each in context.patches if each.target.startswith("finetune.")}
    missing = []
    for target in ours:
        module, _, attribute = target.partition(":")
        names = ast.parse(Path(importlib.util.find_spec(module).origin).read_text(encoding="utf-8")).body
        for part in attribute.split("."):
            found = [each for each in names if part in _bound(each)]
            names = found[0].body if found and isinstance(found[0], ast.ClassDef) else []
        missing += [target] if not found else []
    assert len(ours) >= 30
    assert missing == []


def _bound(statement):
    """The names that a statement of a module binds."""
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return {(each.asname or each.name).split(".")[0] for each in statement.names}
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {statement.name}
    return set()


def test_a_changed_file_is_taken_for_what_the_stage_wrote(tmp_path):
    recipe = town.only_training(town.build(tmp_path / "town"), tmp_path / "runs")
    run = run_directory(recipe)
    run_stages(recipe, run, ["prepare"])
    file = run.path / "prepare" / "train.jsonl"
    before = fingerprint(BY_NAME["train"], recipe, run)
    write_jsonl(file, [{"row": 0}])
    as_if_written_so(run, "prepare")
    assert fingerprint(BY_NAME["train"], recipe, run) != before
    report = run.require("prepare")
    assert report.artifacts["prepare/train.jsonl"] == digest(file)
    assert [each.runs for each in preview(recipe, run, ["prepare"])] == [False] * 2


# -- warm starts -------------------------------------------------------------------------------------------------------

SAID = """
import json, os, sys, textwrap, time
what = [sys.argv[1:], os.getcwd(), os.environ.get("MARK"), textwrap.shorten("a b", 9), "xml.dom" in sys.modules, os.getpid()]
what.append(os.environ.get("FT_LIFELINE"))
print(json.dumps(what), flush=True)
print(sys.stdin.read(), end="", file=sys.stderr)
time.sleep(60 if sys.argv[1:] == ["wait"] else 0)
sys.exit(7)
"""


@pytest.fixture
def start(tmp_path):
    """A server of warm starts that has imported `xml.dom`, and a way to start a module of the package by it."""
    own = tmp_path / "own"
    for folder in (own / "finetune", tmp_path / "start"):
        folder.mkdir(parents=True)
    (own / "wrapped.py").write_text(WRAPPED, encoding="utf-8")
    shutil.copyfile(starting.__file__, tmp_path / "start" / "sitecustomize.py")
    for module in Path(finetune.__file__).parent.iterdir():
        (own / "finetune" / module.name).symlink_to(module)
    (own / "finetune" / "said.py").write_text(SAID, encoding="utf-8")
    path = os.pathsep.join([str(tmp_path / "start"), str(own), baseline.environment()["PYTHONPATH"]])
    environment = {**baseline.environment(), "PYTHONPATH": path}
    with tempfile.TemporaryDirectory() as short:
        server = Path(short) / "s"
        with fork_server.serving(server, environment, ["xml.dom"]):
            environment |= {starting.SOCKET: str(server)}
            yield lambda *words, **more: subprocess.Popen(
                [sys.executable, "-P", "-m", "finetune.said", *words], env={**environment, **more}, cwd=tmp_path, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )  # fmt: skip


def test_a_warm_process_is_what_was_asked_for_with_the_libraries_there(start, tmp_path):
    process = start("a", "b c", MARK="here", **{starting.PATCHES: "wrapped:shout"})
    out, err = process.communicate("hello", timeout=30)

    assert json.loads(out)[:5] == [["a", "b c"], str(tmp_path), "here", "A B", True]
    assert json.loads(out)[5] != process.pid
    assert (err, process.returncode) == ("hello", 7)


def test_a_warm_process_takes_no_file_of_its_own_for_its_parents_lifeline(start):
    process = start(**{processes.LIFELINE: "9"}, MARK="here")
    out, _ = process.communicate("", timeout=30)

    assert json.loads(out)[2] == "here"
    assert json.loads(out)[6] is None


def test_without_a_server_a_process_starts_cold(start):
    process = start(**{starting.SOCKET: "/nowhere"})
    out, _ = process.communicate("", timeout=30)

    assert json.loads(out)[3:6] == ["a b", False, process.pid]
    assert process.returncode == 7


def test_a_warm_process_ends_when_the_one_it_stands_for_is_killed(start):
    process = start("wait")
    copy = psutil.Process(json.loads(process.stdout.readline())[5])
    process.kill()
    process.communicate()

    copy.wait(timeout=10)
