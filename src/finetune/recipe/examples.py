"""The recipes that come with the package, and the file that a command means."""

from __future__ import annotations

from pathlib import Path

from finetune.core.errors import UsageError
from finetune.core.lookup import did_you_mean

EXAMPLES = Path(__file__).parent.parent / "examples"


def examples() -> list[str]:
    """The names of the shipped recipes."""
    return sorted(path.stem for path in EXAMPLES.glob("*.yaml"))


def example(name: str) -> Path:
    """The shipped recipe of that name. Raises UsageError with the known names."""
    path = EXAMPLES / f"{name}.yaml"
    if path.stem not in examples():
        raise UsageError(f"no example '{name}'.{did_you_mean(name, examples())} Known: {', '.join(examples())}.")
    return path


def locate(recipe: str | None, config: str | None, shipped: str | None = None) -> Path:
    """The recipe file meant: the argument, --config, --example, or ./recipe.yaml. A directory stands for its own."""
    given = [value for value in (recipe, config, shipped) if value is not None]
    if len(set(given)) > 1:
        raise UsageError(f"more than one recipe given ({', '.join(given)}); name one")
    if shipped is not None:
        return example(shipped)
    if given:
        path = Path(given[0])
    elif Path("recipe.yaml").is_file():
        path = Path("recipe.yaml")
    else:
        raise UsageError("no recipe given, and no recipe.yaml here. Write one with: finetune init")
    return path / "recipe.yaml" if path.is_dir() else path
