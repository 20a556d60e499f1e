"""Loaded by every Python process of a command that is to fail: carries out FT_FAULT in the first of them.

FT_FAULT is JSON: after `number` calls of `calls` ("rename", "sync"), `do` a signal's name, an error's name, or "count".
"""

import json
import os

_wanted = os.environ.pop("FT_FAULT", None)  # so that no child of that process sees it


def _install(wanted):
    import atexit
    import errno
    import signal
    import threading
    import time

    functions = {"rename": ("rename", "replace"), "sync": ("fsync",)}
    do, number, seen = wanted["do"], wanted.get("number", 0), [0]

    def act():
        if do == "SIGINT twice":
            process = os.getpid()
            threading.Thread(target=lambda: (time.sleep(0.02), os.kill(process, signal.SIGINT)), daemon=True).start()
            os.kill(process, signal.SIGINT)
        elif hasattr(signal, do):
            os.kill(os.getpid(), getattr(signal, do))
        elif do == "MemoryError":
            raise MemoryError
        elif do == "ConnectionError":
            raise ConnectionError("the other end is gone")
        elif hasattr(errno, do):
            raise OSError(getattr(errno, do), os.strerror(getattr(errno, do)))

    def counted(original):
        def call(*arguments, **more):
            seen[0] += 1
            if seen[0] == number or (wanted.get("for_good") and seen[0] > number > 0):
                act()
            return original(*arguments, **more)

        return call

    for kind in wanted["calls"]:
        for name in functions[kind]:
            setattr(os, name, counted(getattr(os, name)))
    if do == "count":
        begun = os.getpid()

        def tell():
            if os.getpid() == begun:
                with open(wanted["file"], "w") as stream:
                    stream.write(str(seen[0]))

        atexit.register(tell)
    if do == "clock":
        real, start = time.time, [0]

        def earlier():
            start[0] += 1
            return real() - (86_400 if start[0] > number else 0)

        time.time = earlier


if _wanted:
    _install(json.loads(_wanted))
