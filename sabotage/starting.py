"""How a process of a run starts: patched, and warm. The bench copies this file, as `sitecustomize.py`, into a folder on
PYTHONPATH, so Python imports it in every process; it imports nothing but the standard library before it knows more.

Where a server for warm starts is there (see `warm`), a process of ours asks it for a copy of itself that has the heavy
libraries imported already, lends it its files, and waits for its exit code.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import sys

SOCKET = "FT_SABOTAGE_SOCKET"
# The sabotage (`module:function`), the first stage that its patches act in, the folder in which their calls are counted.
PATCHES, SINCE, CALLS = "FT_SABOTAGE_PATCHES", "FT_SABOTAGE_SINCE", "FT_SABOTAGE_CALLS"
LENGTH = struct.Struct("!I")
LOST = 70  # the exit code where the copy died without one


def patch() -> None:
    """Install the patches of the sabotage that this run is for."""
    if reference := os.environ.get(PATCHES):
        from sabotage.import_hook import install

        install(reference, os.environ.get(SINCE, ""), os.environ.get(CALLS, ""))


def hand_over(module: str, arguments: list[str]) -> None:
    """Have a warm copy run `python -m module`, and end as it ends. Returns only where there is no server."""
    try:
        link = socket.socket(socket.AF_UNIX)
        link.connect(os.environ[SOCKET])
    except OSError:
        return
    request = {
        "module": module,
        "arguments": arguments,
        "environment": dict(os.environ),
        "path": sys.path,
        "cwd": os.getcwd(),
    }
    data = json.dumps(request).encode()
    socket.send_fds(link, [LENGTH.pack(len(data))], [0, 1, 2])
    link.sendall(data)
    code = link.recv(1)
    os._exit(code[0] if code else LOST)


if __name__ == "sitecustomize":
    words = sys.orig_argv
    place = words.index("-m") if "-m" in words[:4] else 0
    if place and words[place + 1].split(".")[0] == "finetune" and SOCKET in os.environ:
        hand_over(words[place + 1], words[place + 2 :])
    patch()
