"""A spec run for real: the command line in a process of its own, its output in a temporary directory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.core import processes
from finetune.core.errors import FinetuneError, StageError
from finetune.recipe import Recipe
from finetune.recipe import load as load_recipe
from finetune.run import Run, evidence, layout
from finetune.run.evidence import Step
from finetune.testing.spec.load import Case, recipe_file, repository
from finetune.testing.spec.model import EXAMPLE_PREFIX, Inference

if TYPE_CHECKING:
    from finetune.testing.perplexity import Perplexity

GRACE_SECONDS = 20.0  # a training that is told to stop saves a checkpoint first
REQUEST_SECONDS = 300.0


@dataclass(frozen=True, kw_only=True)
class Served:
    """What the served model wrote after the prompt, and its score (None where there was nothing to score)."""

    text: str
    score: Perplexity | None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a command left behind. `code` is None where it ran out of time; `seconds` is wall time. `served` is None where
    the spec asks for no inference or the command failed, `problem` says why inference came to nothing."""

    command: tuple[str, ...]
    run: Run
    code: int | None
    seconds: float
    stdout: str
    stderr: str
    served: Served | None = None
    problem: str = ""


def command(case: Case, directory: Path, *, root: Path) -> tuple[list[str], Path]:
    """The arguments of `finetune` for a case, and the folder that it starts in. Raises MissingError without a recipe,
    RecipeError for one with faults, the spec's own overrides among them."""
    recipe, file = recipe_of(case, root=root), recipe_file(case, _roots(case, root))
    source = [str(file)] if file is not None else ["--example", case.spec.config.removeprefix(EXAMPLE_PREFIX)]
    verb = "run" if case.spec.whole else "train" if recipe.train is not None else "align"
    arguments = [verb, *source, "--run", str(directory / "run")]
    for key, value in {**case.spec.overrides, **_redirected(recipe, directory)}.items():
        arguments += ["--set", f"{key}={json.dumps(value)}"]  # JSON is YAML
    return arguments, root if file is None else file.parent


def recipe_of(case: Case, *, root: Path) -> Recipe:
    """The recipe as the case runs it."""
    from finetune.recipe.examples import example

    file = recipe_file(case, _roots(case, root)) or example(case.spec.config.removeprefix(EXAMPLE_PREFIX))
    return load_recipe(file, [f"{key}={json.dumps(value)}" for key, value in case.spec.overrides.items()])


def _roots(case: Case, root: Path) -> Iterable[Path]:
    inside = repository(case.file)
    return [*([inside] if inside else []), root]


def _redirected(recipe: Recipe, directory: Path) -> dict[str, str]:
    """What the recipe would publish beside its run goes into the temporary directory too."""
    sections = {"train": recipe.train, "align": recipe.align}
    return {
        f"{name}.output_dir": str(directory / "published" / name)
        for name, section in sections.items()
        if section is not None and section.output_dir
    }


def execute(case: Case, directory: Path, *, root: Path) -> Outcome:
    """Run the case's command, and its inference where the command succeeded. Everything is written into `directory`."""
    arguments, folder = command(case, directory, root=root)
    line = processes.command("finetune", *arguments)
    texts = {name: directory / f"{name}.txt" for name in ("stdout", "stderr")}
    started = time.monotonic()
    with texts["stdout"].open("wb") as out, texts["stderr"].open("wb") as err:
        process = subprocess.Popen(
            line, cwd=folder, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True,
            env=processes.environment(),
        )  # fmt: skip
        try:
            code: int | None = process.wait(case.spec.timeout)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    seconds = time.monotonic() - started
    said = {name: path.read_text(encoding="utf-8", errors="replace") for name, path in texts.items()}
    run = Run(directory / "run")
    served, problem = None, ""
    if case.spec.inference is not None and code == 0:
        try:
            served = _inference(run, case.spec.inference)
        except FinetuneError as error:
            problem = str(error)
    return Outcome(
        command=("finetune", *arguments), run=run, code=code, seconds=seconds, served=served, problem=problem, **said
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    """Stop a command that is still running, and everything that it started."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _inference(run: Run, wanted: Inference) -> Served:
    """Serve the trained model as a user would, complete the prompt, and score what it wrote."""
    from finetune.serving import serving
    from finetune.testing.perplexity import perplexity

    checkpoint = "last" if wanted.backend == "torch" else None
    serve = serving(run, backend=wanted.backend, checkpoint=checkpoint, timeout=wanted.server_timeout, proof=True)
    with serve as url:
        text = _complete(url, wanted)
    if not text.strip():
        return Served(text=text, score=None)
    return Served(text=text, score=perplexity(text, wanted.prompt, scorer=wanted.scorer))


def _complete(url: str, wanted: Inference) -> str:
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    asked = wanted.model_dump(include={"prompt", "max_tokens", "temperature", "seed"})
    request = Request(f"{url}/v1/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"})
    try:
        with urlopen(request, timeout=REQUEST_SECONDS) as answer:
            return str(json.load(answer)["choices"][0]["text"])
    except HTTPError as error:
        raise StageError(f"the server answers {error.code}: {error.read().decode('utf-8', 'replace')[:500]}") from None
    except (OSError, ValueError, LookupError) as error:
        raise StageError(f"the server gives no completion: {error}") from None


def steps_logged(outcome: Outcome) -> list[Step] | None:
    """The entries of `trainer_logs.json`, or None where no training left one. Raises EvidenceError where it is damaged."""
    logs = (layout.TRAIN_LOGS, layout.ALIGN_LOGS)
    file = next((file for file in logs if evidence.there(outcome.run, file)), None)
    return None if file is None else evidence.read(outcome.run, file)
