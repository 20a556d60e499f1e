"""A user's repository with nothing but a recipe on the fake backend, its data, and a folder of specs."""

from __future__ import annotations

import subprocess
from pathlib import Path

from finetune.recipe import dump
from support import town

PLAIN = """\
test_id: {id}
project_dir: project
config: recipe.yaml
gpu_requirement: 0
"""


def make(root: Path, **specs: str) -> Path:
    """A git repository in `root` with `project/recipe.yaml` and `specs/NAME.yaml` for each text given; all committed."""
    project = town.build(_made(root / "project"))
    recipe = town.only_training(project, root / "elsewhere")
    # Paths relative to the recipe, as in a repository that is cloned to another place.
    (project / "recipe.yaml").write_text(dump(recipe).replace(f"{project}/", ""), encoding="utf-8")
    for name, text in specs.items():
        (_made(root / "specs") / f"{name}.yaml").write_text(text, encoding="utf-8")
    git(root, "init", "--quiet")
    git(root, "add", ".")
    git(root, "-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "--quiet", "-m", "specs")
    return root


def plain(name: str, more: str = "") -> str:
    """A spec that trains, and whatever else it says."""
    return PLAIN.format(id=name) + more


def git(root: Path, *arguments: str) -> str:
    """What git prints in a repository."""
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
