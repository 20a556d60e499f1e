"""`finetune init`: a recipe and data that the user can edit."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import click

from finetune.cli.options import FILE, echo, output_options, print_json
from finetune.core.errors import UsageError

_SHIPPED = re.compile(r"shipped:([\w./-]+)")


@click.command("init")
@click.argument("target", required=False, default=".", type=FILE)
@click.option("--example", "name", metavar="NAME", default="quickstart", show_default=True, help="Which one to write.")
@click.option("--force", is_flag=True, help="Overwrite files that are there.")
@output_options
def command(target: str, name: str, force: bool, as_json: bool) -> None:
    """Write a commented recipe, and the data it uses next to it, to be edited.

    TARGET is a directory (a recipe.yaml is written into it) or a .yaml file; the current directory by default.
    """
    from finetune.data.sources import resolve
    from finetune.recipe.examples import example, examples

    path = Path(target)
    recipe = path if path.suffix in (".yaml", ".yml") else path / "recipe.yaml"
    text = example(name).read_text(encoding="utf-8")
    named = dict.fromkeys(_SHIPPED.findall(text))
    copies = {f"shipped:{each}": recipe.parent / "data" / Path(each).name for each in named}
    there = [str(file) for file in (recipe, *copies.values()) if file.exists()]
    if there and not force:
        raise UsageError(f"already there: {', '.join(there)}. Choose another place, or overwrite with --force")
    sources = {place: resolve(shipped) for shipped, place in copies.items()}
    recipe.parent.mkdir(parents=True, exist_ok=True)
    for place, source in sources.items():
        place.parent.mkdir(exist_ok=True)
        shutil.copyfile(source, place)
    recipe.write_text(_SHIPPED.sub(lambda found: f"data/{Path(found.group(1)).name}", text), encoding="utf-8")
    if as_json:
        print_json({"recipe": str(recipe), "data": [str(place) for place in sources]})
        return
    for file in (recipe, *sources):
        echo(f"wrote {file}")
    default = recipe == Path("recipe.yaml")
    echo(f"Edit them, then: finetune run{'' if default else f' {recipe}'}")
    click.echo(f"Other examples: {', '.join(each for each in examples() if each != name)}", err=True)
