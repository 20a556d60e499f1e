"""One family of errors. Each child is also a standard type, carries an exit code, and its text is fit for a user:
it names the value, what is allowed, and the fix."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class FinetuneError(Exception):
    """Root of every error that a user can cause or mend. `exit_code` is what the command line ends with."""

    exit_code = 4


class UsageError(FinetuneError, ValueError):
    """A command line or an argument that makes no sense."""

    exit_code = 2


class Faults(UsageError):
    """Several faults found at once; `faults` lists them, one line each."""

    def __init__(self, headline: str, faults: list[str]) -> None:
        self.headline = headline
        self.faults = list(faults)
        super().__init__("\n".join([headline, *(f"  {fault}" for fault in faults)]))


class RecipeError(Faults):
    """A recipe that cannot be loaded: every fault, with file, line and path inside the recipe."""


class DataError(Faults):
    """A data set that cannot be trained on: every fault, with file and line."""


class MissingError(FinetuneError, FileNotFoundError):
    """Something is not there: a package, a tool, a model, a file. The text says how to get it."""

    exit_code = 3

    def __str__(self) -> str:  # OSError would print its arguments as a tuple
        return str(self.args[0]) if self.args else ""


class StageError(FinetuneError, RuntimeError):
    """A stage that failed while it ran."""

    exit_code = 4


class RefusedError(FinetuneError, RuntimeError):
    """What a run made is not handed out: it is not as it was made, or was not proved. `reasons` says why, a phrase each."""

    exit_code = 1

    def __init__(self, headline: str, reasons: list[str], ways: list[str]) -> None:
        self.reasons = list(reasons)
        super().__init__("\n".join([f"{headline}:", *(f"  {each}" for each in reasons), *ways]))


class NewerError(StageError):
    """A file that a later version of finetune wrote: it is neither read by guessing nor made again. The text says which."""


class ResourceError(StageError):
    """Too little memory or disk for what the recipe asks; raised before any work is lost."""


class LockedError(StageError):
    """Another process is writing into the run directory."""


class OutputError(FinetuneError, OSError):
    """Standard output takes nothing any more: its reader has gone, or its disk is full."""

    exit_code = 4

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class Interrupted(FinetuneError, KeyboardInterrupt):
    """Ctrl-C, after the work so far was saved; the text says how to resume."""

    exit_code = 130
