"""`finetune completion`: the shell's own script, for both names of the program."""

from __future__ import annotations

import os
from pathlib import Path

import click

INSTALL = {
    "bash": "finetune completion bash > ~/.finetune.bash && echo 'source ~/.finetune.bash' >> ~/.bashrc",
    "zsh": "finetune completion zsh > ~/.finetune.zsh && echo 'source ~/.finetune.zsh' >> ~/.zshrc",
    "fish": "finetune completion fish > ~/.config/fish/completions/finetune.fish",
}


@click.command("completion")
@click.argument("shell", required=False, type=click.Choice(sorted(INSTALL)))
def command(shell: str | None) -> None:
    """Print the completion script for SHELL (that of $SHELL by default), which also says how to install it.

    \b
    bash:  finetune completion bash > ~/.finetune.bash
           echo 'source ~/.finetune.bash' >> ~/.bashrc
    zsh:   the same with zsh and ~/.zshrc, after compinit
    fish:  finetune completion fish > ~/.config/fish/completions/finetune.fish
    """
    from click.shell_completion import get_completion_class

    from finetune.cli.app import cli

    name = shell or Path(os.environ.get("SHELL", "")).name
    kind = get_completion_class(name) if name in INSTALL else None
    if kind is None:
        raise click.UsageError(f"name a shell: {', '.join(sorted(INSTALL))}")
    scripts = [kind(cli, {}, program, f"_{program.upper()}_COMPLETE").source() for program in ("finetune", "ft")]
    click.echo("\n".join([*scripts, "# To install it:", f"#   {INSTALL[name]}", "# and open a new shell."]))
