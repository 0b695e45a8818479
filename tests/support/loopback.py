"""A server on loopback that breaks, lies and disappears, and a list of published weights that names its file."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cascade_rcnn.zoo import catalog

NAME = "cascade_mask_rcnn_small_1x_cats"
Answer = Callable[[BaseHTTPRequestHandler], None]


class Server:
    """Serves one file; ``cut`` ends answers after so many bytes; without ``ranges`` it knows no requests for a part.

    ``answers`` are given first, one to each request: a status, or a function that writes the answer itself. ``go_on``,
    where it is not set, holds each answer back after its first megabyte.
    """

    def __init__(self, content: bytes) -> None:
        self.content, self.cut, self.ranges, self.status = content, [0] * 0, True, 200
        self.page = False
        self.go_on = threading.Event()
        self.go_on.set()
        self.answers: list[int | Answer] = []
        self.requests: list[tuple[str, str]] = []
        self.lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.http.serve_forever, daemon=True)
        self.thread.start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}"

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        wanted = handler.headers.get("Range", "")
        with self.lock:
            self.requests.append((handler.path, wanted))
            cut = self.cut.pop(0) if self.cut else None
            given = self.answers.pop(0) if self.answers else self.status
        if callable(given):
            given(handler)
            return
        if given != 200 or not handler.path.endswith((".pth", ".pkl")):
            handler.send_error(given if given != 200 else 404)
            return
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.ranges else 0
        body = self.content[start:]
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Length", str(len(body)))
        handler.send_header("Content-Type", "text/html" if self.page else "application/octet-stream")
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(self.content) - 1}/{len(self.content)}")
        handler.end_headers()
        body = body if cut is None else body[:cut]
        with contextlib.suppress(ConnectionError):  # a client that was killed
            handler.wfile.write(body[: 1 << 20])
            self.go_on.wait(60)
            handler.wfile.write(body[1 << 20 :])
        handler.close_connection = True

    def close(self) -> None:
        self.go_on.set()
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


@contextlib.contextmanager
def use_list(path: Path, *entries: dict[str, Any]) -> Iterator[None]:
    """A list of these entries instead of the published one."""
    with pytest.MonkeyPatch.context() as patch:
        set_list(patch, path, *entries)
        yield
    forget_list()


def set_list(patch: pytest.MonkeyPatch, path: Path, *entries: dict[str, Any]) -> None:
    path.write_text(json.dumps(entries))
    patch.setattr(catalog, "_LIST", path)
    forget_list()


def forget_list() -> None:
    catalog.published.cache_clear()
    catalog._by_spelling.cache_clear()
