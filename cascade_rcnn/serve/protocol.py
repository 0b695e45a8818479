"""HTTP/1.1 as uvicorn speaks it, with time limits for clients that send or read too slowly, and problems as JSON.

uvicorn waits forever for the rest of a request's head, and for clients that do not read their answer.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_CONNECTIONS = 512  # at once; each may need a file descriptor more, of 1,024 that many systems give
HEAD_SECONDS = 10.0  # until a request's line and headers are complete
READ_SECONDS = 30.0  # until a client takes the next part of its answer
LINGER_SECONDS = 5.0  # for a client that still sends a body which has been answered


class Protocol(H11Protocol):
    """One connection."""

    _head: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None
    _linger: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client is there: too many are sent away."""
        super().connection_made(transport)
        self._head = self.loop.call_later(HEAD_SECONDS, self._late)
        if len(self.connections) > MAX_CONNECTIONS:
            self._refuse("503 Service Unavailable", "too many connections", "Retry-After: 5\r\n")

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone, or was sent away."""
        for timer in (self._head, self._unread, self._linger):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Part of a request; the clock for its head runs from the first byte and is not set back by the next."""
        if self.transport.is_closing():
            return
        super().data_received(data)
        complete = self.conn.their_state is not h11.IDLE
        if complete and self._head is not None:
            self._head.cancel()
            self._head = None
        elif not complete and self._head is None:
            self._head = self.loop.call_later(HEAD_SECONDS, self._late)

    def pause_writing(self) -> None:
        """The client does not take what has been written."""
        super().pause_writing()
        self._unread = self.loop.call_later(READ_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """It took it."""
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def on_response_complete(self) -> None:
        """Answered, perhaps before the whole body was here: a body without an end must not keep the connection."""
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY and not self.transport.is_closing():
            self._linger = self.loop.call_later(LINGER_SECONDS, self.transport.close)

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP."""
        self._refuse("400 Bad Request", "this is not a valid HTTP/1.1 request")

    def _late(self) -> None:
        self._head = None
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self._refuse("408 Request Timeout", f"no complete request within {HEAD_SECONDS:g} seconds")

    def _refuse(self, status: str, detail: str, headers: str = "") -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE, h11.ERROR):  # else an answer is under way
            body = json.dumps({"type": "about:blank", "status": int(status[:3]), "detail": detail})
            head = f"HTTP/1.1 {status}\r\nContent-Type: application/problem+json\r\nContent-Length: {len(body)}\r\n"
            self.transport.write(f"{head}{headers}Connection: close\r\n\r\n{body}".encode())
        cycle: Any = self.cycle
        if cycle is not None:  # what still works on a request of this connection learns that its client has gone
            cycle.disconnected = True
            cycle.message_event.set()
        self.transport.close()
