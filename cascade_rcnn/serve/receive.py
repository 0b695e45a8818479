"""Files of a request, received within the limits; what a service holds in memory for strangers is bounded."""

from __future__ import annotations

import asyncio
import ctypes
import functools
import json
from collections.abc import Callable
from typing import Any

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import Request

from cascade_rcnn.errors import UserError
from cascade_rcnn.serve.fetch import fetch_url
from cascade_rcnn.serve.settings import ServeSettings


class ServiceError(Exception):
    """An error that the client is told about."""

    def __init__(self, status: int, detail: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status, self.detail, self.headers = status, detail, headers or {}


_WORTH_TRIMMING = 256_000_000  # bytes given back since the last time
_IDLE = 1.0  # seconds after a request until the service looks whether it is idle


class Memory:
    """Bytes that requests under way hold, files and pixels together: without a limit, many large ones would end it.

    What they gave back the C library keeps for itself, in each thread's arena; :meth:`tidy` hands it to the system.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0
        self._given = 0  # since the last trim
        self._due: asyncio.TimerHandle | None = None

    def share(self) -> Share:
        """What one request holds, nothing as yet."""
        return Share(self)

    def give(self, count: int) -> None:
        """Let go of bytes that a request held."""
        self.used -= count
        self._given += count

    def tidy(self) -> None:
        """Called when a request has ended: gives memory back once there is much of it and nobody waits."""
        if self._due is None and self._given >= _WORTH_TRIMMING and _malloc_trim() is not None:
            self._due = asyncio.get_running_loop().call_later(_IDLE, self._trim)

    def _trim(self) -> None:
        self._due = None
        trim = _malloc_trim()
        if trim is None:
            return
        if self.used and self._given < 2 * self.limit:  # busy: what is free now is used again soon
            self.tidy()
            return
        self._given = 0
        asyncio.get_running_loop().run_in_executor(None, trim, 0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    """glibc's ``malloc_trim``; other C libraries have none."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None


class Share:
    """The part of one request; given back at the end of its ``with``."""

    def __init__(self, memory: Memory) -> None:
        self._memory, self.used = memory, 0

    def take(self, count: int) -> None:
        """Raises ServiceError: 413 if this request alone is too large, 429 if all together are."""
        memory = self._memory
        if memory.used + count > memory.limit:
            if self.used + count > memory.limit:
                raise ServiceError(413, "the files of this request are too large together: send them one by one")
            raise ServiceError(429, "too much is being received and decoded", {"Retry-After": "1"})
        memory.used += count
        self.used += count

    def give(self, count: int) -> None:
        """Let go of a part."""
        self._memory.give(count)
        self.used -= count

    def __enter__(self) -> Share:
        return self

    def __exit__(self, *_: object) -> None:
        self.give(self.used)


async def received(settings: ServeSettings, request: Request, share: Share) -> list[tuple[str, bytes]]:
    """Name and content of each file of the request. Raises ServiceError: beyond a limit, no file, a broken form."""
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > settings.max_bytes:
        raise ServiceError(413, f"{length} bytes: at most {settings.max_bytes} are accepted")
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        return [await _from_url(settings, await _body(request, min(settings.max_bytes, 10_000), share))]
    if kind != "multipart/form-data":
        content = await _body(request, settings.max_bytes, share)
        if not content:
            raise ServiceError(422, "no picture: send it as the body, or as files of a multipart form")
        return [("image", content)]
    return await _from_form(request, settings, share)


async def _body(request: Request, limit: int, share: Share) -> bytes:
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        share.take(len(part))
        if size > limit:
            raise ServiceError(413, f"more than {limit} bytes")
        parts.append(part)
    return b"".join(parts)


async def _from_form(request: Request, settings: ServeSettings, share: Share) -> list[tuple[str, bytes]]:
    size, receive = 0, request._receive

    async def counted() -> Any:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > settings.max_bytes:
            raise ServiceError(413, f"more than {settings.max_bytes} bytes")
        share.take(len(message.get("body", b"")))
        return message

    request._receive = counted
    try:
        async with request.form(max_files=settings.max_files, max_fields=16) as form:
            files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
            if not files:
                raise ServiceError(422, "no file in the form")
            return [(_shown(file.filename), await file.read()) for file in files]
    except (MultiPartException, HTTPException, ValueError) as error:  # ValueError: a charset that cannot decode
        if isinstance(error, ValueError):
            raise ServiceError(422, "the form cannot be read") from None
        detail = error.message if isinstance(error, MultiPartException) else str(error.detail)
        raise ServiceError(413 if "Too many" in detail else 422, detail) from None


def _shown(name: str | None) -> str:
    """A client's name of its file, without folders, short and printable."""
    plain = (name or "image").replace("\\", "/").rpartition("/")[2]
    return "".join(c if c.isprintable() else "?" for c in plain)[:120] or "image"


async def _from_url(settings: ServeSettings, body: bytes) -> tuple[str, bytes]:
    try:
        url = json.loads(body)["url"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ServiceError(422, 'expected a picture, a multipart form, or {"url": ADDRESS}') from None
    if not settings.allow_urls:
        raise ServiceError(403, "addresses are not fetched: the service was started without --allow-urls")
    try:
        name, content = await asyncio.to_thread(fetch_url, str(url), max_bytes=settings.max_bytes)
    except UserError as error:
        raise ServiceError(422, str(error)) from None
    return _shown(name), content
