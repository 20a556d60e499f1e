"""What every tier shares: the folder decides the marker, tier 1 has no network, and a skip needs a reason.

Which reasons are allowed where stands in skips.yaml; support/skips.py counts and judges.

A test that needs something which may be missing calls the fixture `skip_or_fail(name, reason)` of finetune's own pytest
plugin. Whoever knows that it is there says so with `--require NAME` (or FT_REQUIRE=NAME,NAME; `real-model` for all of
tier 2), and then its absence is a failure.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

from finetune.testing.plugin import required
from support import skips

pytest_plugins = ["pytester", "support.meaningful"]
pytest.register_assert_rewrite("contract", "support.ollama_contract")

TESTS = Path(__file__).parent
TIERS = ("tier1", "tier2", "tier3")
TIMEOUTS = {"tier1": 60}
REAL_MODEL = "real-model"

# Workers that each start a thread per core slow each other down; tests' own subprocesses inherit this.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))


def tier_of(item: pytest.Item) -> str | None:
    """The tier whose folder holds the test."""
    folders = item.path.relative_to(TESTS).parts[:1] if item.path.is_relative_to(TESTS) else ()
    return folders[0] if folders and folders[0] in TIERS else None


def pytest_configure(config: pytest.Config) -> None:
    skips.register(config)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    skips.mark(items)
    disabled = os.environ.get("FT_REAL_MODEL_ENABLE") == "0"
    reason = "FT_REAL_MODEL_ENABLE=0 turns tests with a real model off; unset it to run them"
    for item in items:
        tier = tier_of(item)
        if tier is None:
            continue
        item.add_marker(tier)
        if tier in TIMEOUTS and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(TIMEOUTS[tier]))
        if tier == "tier2" and disabled:
            if REAL_MODEL in required(config):
                raise pytest.UsageError(f"'{REAL_MODEL}' is required, but {reason}")
            item.add_marker(pytest.mark.skip(reason=reason))


class NetworkBlocked(RuntimeError):
    """A tier 1 test reached for the network. Not an OSError: code that tolerates a dead network must not hide it."""

    def __init__(self, target: object) -> None:
        super().__init__(f"tier 1 has no network, and this test reached for {target}; serve it from 127.0.0.1 instead")


def _is_loopback(host: object) -> bool:
    name = host.decode() if isinstance(host, bytes) else str(host or "localhost")
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name.partition("%")[0]).is_loopback
    except ValueError:
        return False


def _guard_address(original: Callable[..., Any]) -> Callable[..., Any]:
    def guarded(self: socket.socket, *args: Any) -> Any:
        address = args[-1]  # connect(address), sendto(data[, flags], address)
        if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_loopback(address[0]):
            raise NetworkBlocked(address)
        return original(self, *args)

    return guarded


def _guard_name(original: Callable[..., Any]) -> Callable[..., Any]:
    def guarded(host: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_loopback(host):
            raise NetworkBlocked(host)
        return original(host, *args, **kwargs)

    return guarded


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Around the whole of a tier 1 test, its fixtures included, only loopback addresses can be reached."""
    if tier_of(item) != "tier1":
        return (yield)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex", "sendto"):
            patch.setattr(socket.socket, name, _guard_address(getattr(socket.socket, name)))
        for name in ("getaddrinfo", "gethostbyname", "gethostbyname_ex"):
            patch.setattr(socket, name, _guard_name(getattr(socket, name)))
        return (yield)
