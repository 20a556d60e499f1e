"""A server on the loopback interface that fails whoever asks it: with an error, by hanging up, or by never answering."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

WAYS = ("error", "hangs up", "never answers")


@contextmanager
def failing(way: str) -> Iterator[tuple[str, list[str]]]:
    """Fail requests in one of WAYS until the block ends: the server's address, and the paths that were asked for."""
    over, paths = threading.Event(), list[str]()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            self.close_connection = True
            if way == "never answers":
                over.wait()
            elif way == "error":
                self.send_error(500)

        do_POST = do_PUT = do_HEAD = do_GET

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", paths
    finally:
        over.set()
        server.shutdown()
        server.server_close()
        thread.join()
