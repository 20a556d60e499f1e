"""What a result was made with is known by what its stage can reach: an edit there is seen and named, one elsewhere is not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from pathlib import Path

import pytest

from finetune.backends import BACKENDS
from finetune.checks import CHECKS
from finetune.recipe.exports import FORMATS
from finetune.recipe.quantizers import QUANTIZERS
from finetune.run import fingerprint as code_module
from finetune.run.fingerprint import ROOT, UNKNOWN, Code, changes, code_of, digest, libraries
from finetune.run.fingerprint.scan import scan
from finetune.run.fingerprint.tree import DATA, DOORS, LEFT_OUT, Tree
from finetune.run.plan import STAGES
from finetune.serving import SERVERS

RUN = {stage.name: stage.reference for stage in STAGES}
EXPORTS = [row.module for row in FORMATS.values()]
EVALUATE = (RUN["evaluate"], BACKENDS["fake"])
# What a stage must reach on torch, beside what is named as a text, in a function or in a process of its own.
MUST = {
    "fetch": "core/hub.py models/licenses.py models/license_texts/MIT.txt models/sources.py models/tiny.py "
    "models/dequantize.py",
    "prepare": "data/checks.py data/encode.py data/sources.py data/templates_jinja/chatml.jinja backends/torch/tokenizer.py",
    "rehearse": "export/__init__.py run/evidence.py",
    "train": "training/job.py training/estimate.py backends/torch/training.py backends/torch/sft.py core/signals.py",
    "align": "training/job.py backends/torch/training.py backends/torch/dpo.py",
    "evaluate": "evaluation/answers.py data/encode.py data/templates.py data/templates_jinja/llama3.jinja "
    "backends/torch/inference.py",
    "merge": "backends/torch/merging.py backends/torch/loading.py",
    "measure": "experiments/worker.py experiments/invariance/worker.py experiments/invariance/measure.py "
    "experiments/serving.py backends/torch/training.py",
    "export": "export/__init__.py checks/__init__.py run/evidence.py",
    "compare": "experiments/worker.py parity/observe.py parity/comparison.py parity/divergence.py backends/torch/merging.py",
}
SHOWN = ("cli/", "core/console.py", "stages/pipeline.py", "report/", "testing/")
# What modules that stages reach take from those that are left out.
TAKEN = {
    "finetune": {"__version__"},
    "finetune.core.console": {"progress", "say"},
    "finetune.recipe.load": {"dump", "load", "load_mapping"},
    # For the cause that is told above stored verdicts, which no stage tells: `judged` stands beside the `results` of which
    # the card of an export is made.
    "finetune.run.plan": {"plan"},
}


def files(code: Code) -> set[str]:
    return {path.removeprefix("finetune/") for path in code.modules}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the package, to be edited, with a cache of its own; it is looked at anew whenever it is asked about."""
    monkeypatch.setenv("FT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(code_module, "_tree", Tree)
    left = shutil.ignore_patterns("__pycache__", "testing", "page", "shipped")
    return Path(shutil.copytree(ROOT, tmp_path / "finetune", ignore=left))


# -- what a stage reaches --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", RUN)
def test_a_stage_reaches_what_it_computes_with(stage: str) -> None:
    found = files(code_of(RUN[stage], BACKENDS["torch"]))

    assert set(MUST[stage].split()) <= found
    assert {f"stages/{stage}.py", "backends/__init__.py", "run/directory.py"} <= found


@pytest.mark.parametrize("stage", RUN)
def test_a_stage_reaches_nothing_that_only_shows_nor_another_stage(stage: str) -> None:
    found = files(code_of(RUN[stage], BACKENDS["torch"], *EXPORTS))

    assert [path for path in found if path.startswith(SHOWN)] == []
    assert {path for path in found if path.startswith("stages/")} == {"stages/__init__.py", f"stages/{stage}.py"}
    checks = {path for path in found if path.startswith("checks/")}
    around = {"checks/__init__.py", "checks/remedies.py", "checks/causes.py"}  # what is around every check
    assert checks == (around if stage == "export" else set())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_that_is_not_chosen_is_not_reached(backend: str) -> None:
    """Except for what the chosen one borrows."""
    shared = ("__init__", "failing", "weight_updates", {"fake": "fake/", "ollama": "llamacpp/"}.get(backend, backend))
    borrowed = {"mlx": {"torch/__init__.py", "torch/tokenizer.py"}, "torch": {"adapters.py"}}.get(backend, set())
    found = {path.removeprefix("backends/") for path in files(code_of(RUN["evaluate"], BACKENDS[backend]))}
    found &= {path.relative_to(ROOT / "backends").as_posix() for path in (ROOT / "backends").rglob("*.py")}

    assert len(found) >= 5
    assert [path for path in found - borrowed if not path.startswith((backend, *shared))] == []
    assert borrowed <= found


def test_every_verb_of_mlx_is_reached_although_its_modules_are_named_by_their_last_part() -> None:
    verbs = ("config", "inference", "loading", "merging", "tensors", "tokenizer", "training")

    assert {f"backends/mlx/{verb}.py" for verb in verbs} <= files(code_of(BACKENDS["mlx"]))


def test_a_module_that_runs_in_a_process_of_its_own_is_reached() -> None:
    assert "export/gguf_convert.py" in files(code_of(RUN["export"], FORMATS["gguf"].module))


def test_everything_is_reached_that_a_whole_run_loads(town: Path, tmp_path: Path) -> None:
    """A fresh process tells after every stage what has been imported since the one before."""
    program = """
import json, sys
from pathlib import Path
from finetune.core import memory
from finetune.run import manifest
from finetune.training import estimate  # as the pipeline does around the stages
from finetune.run.fingerprint import libraries, scan, scans, tree  # as `execute` does, to know what a stage computes with
from finetune.stages import doors
from finetune.data import sources
from finetune.stages.pipeline import run_directory, run_stages
from support.town import recipe
seen, new = set(sys.modules), {}
def listen(moment, stage, report):
    if moment == "done":
        new[stage.name] = sorted(set(sys.modules) - seen)
        seen.update(sys.modules)
wanted = recipe(Path(sys.argv[1]), Path(sys.argv[2]), export=["bundle"])
run_stages(wanted, run_directory(wanted), listener=listen)
print(json.dumps(new))
"""
    path = os.pathsep.join([str(ROOT.parent), str(Path(__file__).parents[1])])
    done = subprocess.run(
        [sys.executable, "-c", program, str(town), str(tmp_path)],
        capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    loaded = json.loads(done.stdout.splitlines()[-1])
    assert len(loaded) >= 9
    bundle = FORMATS["bundle"].module
    chosen = {"rehearse": [bundle], "export": [bundle, *(row.parts for row in CHECKS)]}  # its card tells the verdicts
    for stage, modules in loaded.items():
        reached = files(code_of(RUN[stage], BACKENDS["fake"], *chosen.get(stage, ())))
        known = {_dotted(path) for path in {*reached, *LEFT_OUT}}
        ours = {name for name in modules if name.partition(".")[0] == "finetune"}
        assert ours - known == set(), stage


def _dotted(path: str) -> str:
    return ".".join(["finetune", *path.removesuffix(".py").split("/")]).removesuffix(".__init__")


# -- edits -----------------------------------------------------------------------------------------------------------


def edit(file: Path, change: Callable[[str], str]) -> None:
    text = file.read_text(encoding="utf-8")
    assert change(text) != text
    file.write_text(change(text), encoding="utf-8")


@pytest.mark.parametrize(
    "path",
    [
        "evaluation/answers.py",
        "stages/evaluate.py",
        "backends/fake/__init__.py",
        "data/templates_jinja/chatml.jinja",
        "run/directory.py",
    ],
)
def test_an_edit_of_what_is_reached_is_seen_and_named(package: Path, path: str) -> None:
    before = code_of(*EVALUATE, root=package)
    edit(package / path, lambda text: f"{text}\nADDED = 1\n")
    after = code_of(*EVALUATE, root=package)

    assert digest(after) != digest(before)
    assert changes(asdict(before), after) == [f"finetune/{path} changed"]


@pytest.mark.parametrize(
    "path",
    ["checks/rows.py", "cli/run.py", "report/wording.py", "stages/train.py", "backends/torch/sft.py", *LEFT_OUT],
)
def test_an_edit_elsewhere_changes_nothing(package: Path, path: str) -> None:
    before = code_of(*EVALUATE, root=package)
    edit(package / path, lambda text: f"{text}\nADDED = 1\n")

    assert code_of(*EVALUATE, root=package) == before


def test_comments_blank_lines_docstrings_and_imports_for_types_change_nothing(package: Path) -> None:
    before = code_of(*EVALUATE, root=package)
    edit(package / "evaluation/answers.py", lambda text: "# why\n" + text.replace("\n\n\n", "\n\n\n# a reason\n\n\n"))
    edit(package / "core/arithmetic.py", lambda text: '"""Other words."""\n' + text.partition("\n")[2])
    edit(package / "data/encode.py", lambda text: text + "\nif TYPE_CHECKING:\n    from finetune.checks import rows\n")

    assert code_of(*EVALUATE, root=package) == before


def test_what_an_edit_newly_reaches_counts_too(package: Path) -> None:
    before = code_of(*EVALUATE, root=package)
    edit(
        package / "evaluation/answers.py",
        lambda text: (
            f"{text}\ndef f():\n    from finetune.recipe import schedule; from finetune.cli import machine as doctor\n"
        ),
    )
    after = code_of(*EVALUATE, root=package)

    assert changes(asdict(before), after)[:2] == [
        "finetune/evaluation/answers.py changed",
        "finetune/cli/machine.py is new",
    ]
    assert changes(asdict(after), before)[0] == "finetune/evaluation/answers.py changed"
    assert "finetune/cli/machine.py is gone" in changes(asdict(after), before)


def test_a_file_that_is_no_python_yet_counts_by_its_bytes(package: Path) -> None:
    edit(package / "evaluation/answers.py", lambda text: f"{text}\n<<<<<<< ours\n")
    before = code_of(*EVALUATE, root=package)
    edit(package / "evaluation/answers.py", lambda text: text.replace("ours", "theirs"))

    assert changes(asdict(before), code_of(*EVALUATE, root=package)) == ["finetune/evaluation/answers.py changed"]


# -- how a file is read ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "runs", "calls"),
    [
        ("import json, numpy.linalg", "numpy", ""),
        ("import finetune.data.encode", "finetune.data.encode finetune.data finetune", ""),
        ("from finetune import run", "finetune:run", ""),
        ("from finetune.run import Run, digest as d", "finetune.run:Run finetune.run:digest", ""),
        ("from finetune.run import *", "finetune.run", ""),
        ("from . import encode", "finetune.data:encode", ""),
        ("from ..run import Run", "finetune.run:Run", ""),
        ("try:\n    import torch\nexcept ImportError:\n    import mlx", "torch mlx", ""),
        ("class A:\n    from trl import B", "trl", ""),
        ("def f():\n    import torch\n    from finetune.run import Run", "", "torch finetune.run:Run"),
        ("async def f():\n    import torch", "", "torch"),
        ("if TYPE_CHECKING:\n    import torch\nelse:\n    import numpy", "numpy", ""),
        ("if typing.TYPE_CHECKING:\n    from finetune.run import Run", "", ""),
        ("T = {'a': 'finetune.run:Run'}", "", "finetune.run:Run"),
        ("load('finetune.run')", "", "finetune.run"),
        ("f = lambda: load('finetune.run:Run')", "", "finetune.run:Run"),
        ("load(f'finetune.run:{name}')", "", "finetune.run"),
        ("load(f'finetune.data.{name}')", "", "finetune.data.*"),
        ("find(f'finetune.{kind}')", "", ""),
        ("say('finetune.run is imported')", "", ""),
        ('"""finetune.run"""\ndef f():\n    "finetune.run:Run"', "", ""),
    ],
)
def test_a_file_says_what_it_imports_when_it_is_run_and_when_it_is_called(source: str, runs: str, calls: str) -> None:
    found = scan(source.encode(), "finetune.data.x", is_package=False, is_door=False)

    assert (" ".join(found.runs), " ".join(found.calls)) == (runs, calls)


def test_a_package_s_own_file_imports_relative_to_itself() -> None:
    assert scan(b"from .a import b", "finetune.data", is_package=True, is_door=False).runs == ("finetune.data.a:b",)


def test_the_table_of_a_door_names_nothing_and_its_functions_do() -> None:
    source = (
        b"TABLE = {'a': 'finetune.a:b'}\ndef f():\n    return load('finetune.c:d')\ng = lambda: load('finetune.e:f')"
    )

    assert scan(source, "finetune.x", is_package=False, is_door=True).calls == ("finetune.c:d", "finetune.e:f")


def test_of_a_package_above_only_what_importing_it_imports_counts(tmp_path: Path) -> None:
    tree = {
        "__init__.py": "",
        "p/__init__.py": "from finetune import eager\ndef f():\n    from finetune import lazy\n    import torch",
        "p/inside.py": "",
        "user.py": "from finetune.p import f",
        "eager.py": "import numpy",
        "lazy.py": "",
    }
    for name, text in tree.items():
        (tmp_path / "finetune" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "finetune" / name).write_text(text)
    inside, user = (Tree(tmp_path / "finetune").reach([f"finetune.{name}:x"]) for name in ("p.inside", "user"))

    assert (set(inside[0]), inside[1]) == ({f"finetune/{x}.py" for x in ("p/inside", "p/__init__", "eager")}, ["numpy"])
    assert {"finetune/lazy.py", "finetune/eager.py"} < set(user[0]) and set(user[1]) == {"numpy", "torch"}


def test_a_reference_to_nothing_is_refused() -> None:
    for name in ("finetune.stages.evalute:run", "no_such_package:Backend"):
        with pytest.raises(ValueError, match=f"there is no module for '{name}'"):
            code_of(name)


# -- what is left out ------------------------------------------------------------------------------------------------


def everything() -> Code:
    """All that any run can reach: every stage with every backend, export and server."""
    return code_of(*RUN.values(), *BACKENDS.values(), *EXPORTS, *(row.start for row in SERVERS.values()))


def test_little_is_left_out_and_all_of_it_exists() -> None:
    assert len(LEFT_OUT) <= 4
    assert [path for path in [*LEFT_OUT, *DOORS, *DATA] if not (ROOT / path).is_file()] == []
    assert [path for path in DATA.values() if not (ROOT / path).is_dir()] == []


def test_nothing_that_computes_is_taken_from_what_is_left_out() -> None:
    taken: dict[str, set[str]] = {}
    for path in files(everything()):
        if path.endswith(".py"):
            module = _dotted(path)
            found = scan((ROOT / path).read_bytes(), module, is_package="__init__" in path, is_door=path in DOORS)
            for name in (*found.runs, *found.calls):
                source, _, attribute = name.partition(":")
                if _file(source) in LEFT_OUT and not _file(f"{source}.{attribute}"):
                    taken.setdefault(source, set()).add(attribute)

    assert taken == TAKEN


def _file(module: str) -> str | None:
    """The path of a module below the package, or None."""
    place = ROOT.joinpath(*module.split(".")[1:])
    found = [file for file in (place / "__init__.py", place.with_name(f"{place.name}.py")) if file.is_file()]
    return found[0].relative_to(ROOT).as_posix() if found else None


def test_every_file_that_is_no_python_is_computed_with_or_known_not_to_be() -> None:
    """Shipped data are in a fingerprint as every data file is."""
    others = {path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*") if path.suffix not in (".py", ".pyc")}
    others = {path for path in others if (ROOT / path).is_file()}
    known = (*(f"{folder}/" for folder in DATA.values()), "data/shipped/", "examples/", "report/page/")

    assert len(others) >= 20
    assert [path for path in others if not path.startswith(known)] == ["py.typed"]


def test_only_the_names_of_entry_points_are_made_of_the_package_s_own_name() -> None:
    """`f"finetune.{kind}"` cannot be followed; anything longer is."""
    found = [path.name for path in ROOT.rglob("*.py") if 'f"finetune.{' in path.read_text(encoding="utf-8")]

    assert found == ["lookup.py"]


# -- libraries -------------------------------------------------------------------------------------------------------


def test_every_library_that_a_run_can_import_is_in_one_of_the_two_tables() -> None:
    """And no other. The names are read from the source, so that no library needs to be installed."""
    _, imports = code_module._tree(ROOT).reach(
        [
            *(*RUN.values(), *BACKENDS.values(), *EXPORTS),
            *(row.start for row in SERVERS.values()),
            *(row.reference for row in QUANTIZERS.values()),
        ]
    )

    assert set(imports) == {*libraries.DISTRIBUTIONS, *libraries.WITHOUT_RESULT}
    assert not set(libraries.DISTRIBUTIONS) & set(libraries.WITHOUT_RESULT)


def test_a_version_is_what_the_installation_says() -> None:
    for name in {name for names in libraries.DISTRIBUTIONS.values() for name in names}:
        try:
            expected = installed(name)
        except PackageNotFoundError:
            expected = None
        assert libraries.version(name) == expected, name
    assert libraries.version("jinja2") is not None


def test_libraries_count_with_those_that_they_compute_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "version", lambda name: None if name == "datasets" else f"{name}-1")
    found = libraries.versions(["trl", "filelock", "something_new"])

    assert found == {name: f"{name}-1" for name in ("accelerate", "something_new", "trl")}


def test_an_upgrade_is_seen_and_told_with_both_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    on_torch = (RUN["evaluate"], BACKENDS["torch"])
    has = {"jinja2": "3.1.6", "torch": "2.13.0+cpu", "numpy": "2.4.6"}
    monkeypatch.setattr(libraries, "version", has.get)
    before = code_of(*on_torch)
    has |= {"jinja2": "3.2.0", "torch": "2.13.0", "transformers": "5.24.0"}
    del has["numpy"]
    after = code_of(*on_torch)

    assert digest(after) != digest(before)
    assert sorted(changes(asdict(before), after)) == [
        "jinja2 3.1.6 -> 3.2.0", "numpy 2.4.6 is gone", "torch 2.13.0+cpu -> 2.13.0", "transformers 5.24.0 is new",
    ]  # fmt: skip


# -- what is told ----------------------------------------------------------------------------------------------------


def test_libraries_are_told_before_files_and_the_nearest_file_first() -> None:
    now = Code(modules={"p/b.py": "2", "p/a.py": "2"}, libraries={"torch": "2"}, python="3.11")
    before = Code(modules={"p/a.py": "1", "p/b.py": "1"}, libraries={"torch": "1"}, python="3.11")

    assert changes(asdict(before), now) == ["torch 1 -> 2", "p/b.py changed", "p/a.py changed"]
    assert changes(json.loads(json.dumps(asdict(now))), now) == []
    assert changes(None, now) == [UNKNOWN]


def test_another_python_is_told_without_the_files_that_it_reads_otherwise() -> None:
    before = Code(modules={"p/a.py": "1"}, libraries={}, python="3.11")
    now = replace(before, python="3.13", modules={"p/a.py": "2"})

    assert changes(asdict(before), now) == ["Python 3.11 -> 3.13"]
    assert digest(now) != digest(before)


def test_the_order_in_which_files_are_reached_is_no_part_of_the_digest() -> None:
    one, other = (
        Code(modules=dict(modules), libraries={}, python="3.11")
        for modules in ((("a", "1"), ("b", "2")), (("b", "2"), ("a", "1")))
    )

    assert digest(one) == digest(other)
