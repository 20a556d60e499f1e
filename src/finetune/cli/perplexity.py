"""`finetune perplexity`: how well a text reads, as a reference model sees it."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from finetune.cli.options import FILE, output_options, print_json
from finetune.core.errors import MissingError, UsageError


@click.command("perplexity")
@click.argument("file", default="-", type=FILE)
@click.option("--prompt", default="", metavar="TEXT", help="What comes before the text; read, but not scored.")
@click.option(
    "--scorer",
    metavar="MODEL",
    help="The reference model [default: FT_SCORER, else gpt2 where it can be had, else smollm2-135m].",
)
@output_options
def command(file: str, prompt: str, scorer: str | None, as_json: bool) -> None:
    """Score a text (a FILE, or - for standard input) by a reference model.

    Lower reads better, but repetition scores low too: look at the share of different tokens. A newline at the end of
    the text is left out. What texts of known quality score is in docs/perplexity.md.
    """
    from finetune.testing import perplexity as scoring

    text = _read(file)
    found = scoring.perplexity(text, prompt, scorer=scorer)
    random = scoring.RANDOM_TOKENS_FROM.get(found.scorer)
    if as_json:
        print_json({**vars(found), "random_tokens_from": random})
        return
    click.echo(f"perplexity {found.value:.4g} by {found.scorer}, {found.tokens} tokens, {found.distinct:.0%} different")
    if found.whole is not None:
        click.echo(f"prompt and text together: {found.whole:.4g}")
    if random is not None and not found.value < random:
        click.echo(f"that is as bad as random tokens ({random:.4g} and more)")


def _read(file: str) -> str:
    if file != "-" and not Path(file).is_file():
        raise MissingError(f"no text at {file}. Name a file, or - for standard input")
    data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} is not UTF-8 text (byte {error.start})") from None
    return text.removesuffix("\n").removesuffix("\r")
