"""`finetune serve`: a run's model behind an OpenAI-compatible server."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

import click

from finetune.cli.options import FILE, echo, stored_recipe, stored_run
from finetune.core import console
from finetune.core.errors import MissingError, UsageError

if TYPE_CHECKING:
    from finetune.recipe import Recipe
    from finetune.run import Run
    from finetune.serving.access import Access
    from finetune.serving.models import Found

NEWEST = "last"
LOOPBACK = ("127.0.0.1", "::1", "localhost")
_HELP = """\b
Backends:
  torch     transformers' server on the model as it was trained.
  llamacpp  llama.cpp's server on the run's GGUF export.
  mlx       mlx-lm's server on the run's MLX export.
"""


@click.command("serve", epilog=_HELP)
@click.argument("run", type=FILE)
@click.option(
    "--from-checkpoint", "checkpoint", is_flag=False, flag_value=NEWEST, metavar="[CHECKPOINT]", type=FILE,
    help="Serve a checkpoint: the newest, or the one named [default: the final model].",
)  # fmt: skip
@click.option(
    "--backend", type=click.Choice(["torch", "llamacpp", "mlx"]), default="torch", show_default=True,
    help="Whose server it is.",
)  # fmt: skip
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 for all of them.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="Port to listen on; 0: any free one."
)
@click.option(
    "--allowed-host", "allowed_hosts", multiple=True, metavar="NAME[:PORT]",
    help="Another name that clients know this server by, as behind a proxy; repeatable. Loopback names and --host are.",
)  # fmt: skip
@click.option(
    "--allowed-origin", "allowed_origins", multiple=True, metavar="URL",
    help="Web pages that may ask, such as http://localhost:3000; repeatable.",
)  # fmt: skip
@click.option(
    "--api-key-env",
    metavar="VARIABLE",
    help="Ask for the key that this environment variable holds (as a Bearer token).",
)
@click.option("--api-key-file", type=FILE, help="Ask for one of the keys in a file, one a line.")
@click.option(
    "--export", "export", metavar="FORMAT[:VARIANT]",
    help="For llamacpp and mlx: which export [default: the one nearest to the model].",
)  # fmt: skip
@click.option("--anyway", is_flag=True, help="Serve it though it was not proved, or is not as it was made.")
@click.option(
    "--proof", is_flag=True, hidden=True, help="What is answered is to prove the run: it needs no verdicts yet."
)
def command(
    run: str,
    checkpoint: str | None,
    backend: str,
    host: str,
    port: int,
    allowed_hosts: tuple[str, ...],
    allowed_origins: tuple[str, ...],
    api_key_env: str | None,
    api_key_file: str | None,
    export: str | None,
    anyway: bool,
    proof: bool,
) -> int:
    """Answer OpenAI's API with the model of a run, until Ctrl-C or SIGTERM.

    RUN is a run directory, a name under ./runs, or a recipe whose run is meant. Once it can answer it prints its address
    on stdout; a client finds /v1/models, /v1/completions, /v1/chat/completions and /health there. The model's name is the
    recipe's.

    It answers to this machine's own names and to no web page, unless others are allowed. On an address that other machines
    reach it asks for a key.

    Ends with 1 where a verdict on the run is refuted or missing, or a file to be loaded is not the one that was made; with
    4 where the model's own server dies again and again.
    """
    from finetune.core import processes
    from finetune.serving import base_url, bind, check_installed, serve, until_stopped
    from finetune.serving.models import whole

    stored = stored_run(run)
    recipe = stored_recipe(stored)
    if recipe.backend == "fake":
        raise UsageError(f"{stored.path} was made with the backend 'fake', which has no weights that could be served")
    found = _found(stored, recipe, backend, checkpoint, export)
    check_installed(backend)
    from finetune.serving.access import access, check_reach

    key_file = None if api_key_file is None else Path(api_key_file)
    asked = access(host, allowed_hosts, allowed_origins, key_env=api_key_env, key_file=key_file)
    with until_stopped(), bind(host, port) as held:
        check_reach(held.getsockname()[0], asked)
        address, stdout = base_url(held), sys.stdout

        def ready() -> None:
            _tell(address, recipe.name, found.what, backend, asked)
            with redirect_stdout(stdout):
                processes.tell(address)

        _check(found, stored, recipe, proof=proof, anyway=anyway)
        with redirect_stdout(sys.stderr):  # stdout has the address, and nothing else
            serve(backend, whole(found, stored, recipe), stored, recipe, held, asked, ready)
    return 0


def _check(found: Found, run: Run, recipe: Recipe, *, proof: bool, anyway: bool) -> None:
    """Raise RefusedError for a model that is not to be handed out; with `anyway`, say so."""
    from finetune.lifecycle import handout
    from finetune.models import files
    from finetune.serving.models import loaded

    for place in loaded(found, run, recipe):
        if place.is_dir():
            files.check(place)
    reasons = [] if proof else [*handout.unproved(run, recipe), *map(str, handout.unsealed(run))]
    reasons += map(str, handout.changed(run, loaded(found, run, recipe)))
    reasons = list(dict.fromkeys(reasons))
    if not anyway:
        handout.refuse(run, f"{found.what} of {run.path} is not served", reasons)
    for reason in reasons:
        echo(f"warning: serving although: {reason}", err=True)


def _found(run: Run, recipe: Recipe, backend: str, checkpoint: str | None, export: str | None) -> Found:
    from finetune.serving import SERVERS, models

    kind = SERVERS[backend].format
    if kind is None:
        if export is not None:
            raise UsageError(f"--export goes with --backend llamacpp or mlx; '{backend}' serves the model as trained")
        if checkpoint is None:
            return models.final(run, recipe)
        return models.from_checkpoint(run, recipe, _checkpoint(run, recipe, checkpoint))
    if checkpoint is not None:
        raise UsageError(
            f"--from-checkpoint goes with --backend torch: '{backend}' serves exports, which are made of the final model"
        )
    return models.exported(run, kind, export)


def _checkpoint(run: Run, recipe: Recipe, wanted: str) -> Path:
    """A checkpoint of the alignment, else of the training; `train/checkpoint-20` says which where both have one."""
    from finetune.run import checkpoints
    from finetune.stages.pipeline import checkpoint

    if checkpoints.is_checkpoint(run.path / wanted):
        return run.path / wanted
    failures = []
    for stage, section in (("align", recipe.align), ("train", recipe.train)):
        if section is None:
            continue
        try:
            return checkpoint(recipe, run, stage, wanted)
        except MissingError as error:
            failures.append(error)
    if wanted == NEWEST or not failures:
        raise MissingError(
            f"{run.path} has no checkpoint. One is kept where the recipe has train.save_strategy 'steps' or 'epoch'; the "
            "final model is served without --from-checkpoint"
        )
    there = [path for stage in ("train", "align") for path in checkpoints.stored(run.path / stage)]
    known = ", ".join(str(path.relative_to(run.path)) for path in there) or "none"
    raise MissingError(f"no checkpoint at {wanted}. Those of {run.path}: {known}.")


def _tell(address: str, name: str, what: str, backend: str, asked: Access) -> None:
    """How to use the server, on stderr."""
    question = json.dumps({"messages": [{"role": "user", "content": "Hello"}]})
    key = " -H 'Authorization: Bearer KEY'" if asked.keys else ""
    console.say(f"serving {what} of '{name}' with {backend}. Ask it with:")
    console.say(f"  curl {address}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '{question}'")
    console.say("Stop it with Ctrl-C.")
    if asked.keys and asked.host not in LOOPBACK:
        console.say(f"note: it listens on {asked.host}: keys and answers cross the network unencrypted")
