"""Connections of slow, broken and too many clients, with a server on a free port."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="needs pip install 'cascade-rcnn[serve]'")
import uvicorn

from cascade_rcnn.serve import protocol

LARGE = 30_000_000  # bytes, more than the system's buffers


async def _app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Answers at once, without waiting for the body; a large answer at ``/large``."""
    body = bytes(LARGE) if scope["path"] == "/large" else b"ok"
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    for name in ("HEAD_SECONDS", "READ_SECONDS", "LINGER_SECONDS"):
        monkeypatch.setattr(protocol, name, 0.3)
    monkeypatch.setattr(protocol, "MAX_CONNECTIONS", 3)
    config = uvicorn.Config(_app, port=0, http=protocol.Protocol, ws="none", lifespan="off", log_level="critical")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join()


def _connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=5)


def _everything(connection: socket.socket) -> bytes:
    content = b""
    try:
        while some := connection.recv(65536):
            content += some
    except ConnectionResetError:
        pass
    return content


def _problem(answer: bytes) -> dict[str, Any]:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"application/problem+json" in head and f"Content-Length: {len(body)}".encode() in head
    problem: dict[str, Any] = json.loads(body)
    assert head.startswith(f"HTTP/1.1 {problem['status']} ".encode())
    return problem


@pytest.mark.parametrize("first", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nX: "])
def test_a_head_that_does_not_end_is_408(first: bytes, port: int) -> None:
    with _connect(port) as connection:
        connection.sendall(first)
        time.sleep(0.2)
        if first:
            connection.sendall(b"a")  # does not set the clock back
        assert _problem(_everything(connection))["status"] == 408


def test_a_head_within_the_time_is_answered_and_the_connection_kept(port: int) -> None:
    with _connect(port) as connection:
        for _ in range(2):
            connection.sendall(b"GET / HT")
            time.sleep(0.1)
            connection.sendall(b"TP/1.1\r\nHost: a\r\n\r\n")
            answer = b""
            while not answer.endswith(b"ok"):
                answer += connection.recv(1000)
            assert answer.startswith(b"HTTP/1.1 200")
            time.sleep(0.4)


@pytest.mark.parametrize("sent", [b"\x16\x03\x01\x02\x00\r\n\r\n", b"GET / HTTP/1.1\r\nX Y: z\r\n\r\n"])
def test_what_is_no_http_is_a_problem_too(sent: bytes, port: int) -> None:
    with _connect(port) as connection:
        connection.sendall(sent)
        assert _problem(_everything(connection))["status"] == 400


def test_a_body_without_an_end_does_not_keep_the_connection(port: int) -> None:
    with _connect(port) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000000\r\n\r\n")
        began = time.monotonic()
        with pytest.raises(OSError):
            while time.monotonic() - began < 5:
                connection.sendall(b"a" * 1000)
                time.sleep(0.02)


def test_a_client_that_does_not_read_is_left(port: int) -> None:
    with _connect(port) as connection:
        connection.sendall(b"GET /large HTTP/1.1\r\nHost: a\r\n\r\n")
        time.sleep(0.8)
        assert len(_everything(connection)) < LARGE


def test_too_many_connections_are_sent_away(port: int) -> None:
    several = [_connect(port) for _ in range(3)]
    time.sleep(0.05)
    with _connect(port) as connection:
        answer = _everything(connection)
    assert _problem(answer)["status"] == 503 and b"Retry-After: 5" in answer
    for connection in several:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")
        connection.close()
