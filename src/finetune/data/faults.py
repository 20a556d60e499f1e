"""Many faults, one error: at most twenty are listed."""

from __future__ import annotations

from finetune.core.errors import DataError

LISTED = 20


def raise_all(headline: str, faults: list[str]) -> None:
    """Raise DataError with the first faults and the count of the rest; nothing happens when there are none."""
    if faults:
        raise shorten(headline, faults)


def shorten(headline: str, faults: list[str]) -> DataError:
    """The DataError for these faults."""
    rest = len(faults) - LISTED
    return DataError(headline, faults[:LISTED] + ([f"... and {rest} more"] if rest > 0 else []))


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
