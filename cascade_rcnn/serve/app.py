"""The HTTP service: ``POST /predict``, a page at ``/``, and what an orchestrator asks for.

Errors are ``application/problem+json`` (RFC 9457) with one line in ``detail``; no answer names a path of this machine.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import importlib.resources
import json
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import numpy as np
from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from numpy.typing import NDArray
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException

from cascade_rcnn import __version__
from cascade_rcnn.errors import UserError
from cascade_rcnn.inference.detections import Detections
from cascade_rcnn.inference.detector import Detector
from cascade_rcnn.inference.exported import ExportedNetwork
from cascade_rcnn.serve.batching import Batcher, QueueFullError
from cascade_rcnn.serve.fetch import fetch_url
from cascade_rcnn.serve.label_studio import Backend, TaskError, add_label_studio
from cascade_rcnn.serve.pictures import PictureTooLargeError, decode
from cascade_rcnn.serve.settings import ServeSettings

_T = TypeVar("_T")
_OPEN = ("/", "/health", "/ready")  # without a key
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; style-src 'self' 'unsafe-inline'; "
    "script-src 'self' 'unsafe-inline'; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; "
    "form-action 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class ServiceError(Exception):
    """An error that the client is told about."""

    def __init__(self, status: int, detail: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status, self.detail, self.headers = status, detail, headers or {}


class _Metrics:
    """Counters for Prometheus; a registry of their own, so that two apps in a process do not meet."""

    def __init__(self, service: _Service) -> None:
        self.collected = CollectorRegistry()
        self.requests = Counter("requests", "Answered requests", ["path", "status"], registry=self.collected)
        self.images = Counter("images", "Images looked at", registry=self.collected)
        self.objects = Counter("objects", "Objects found", registry=self.collected)
        self.seconds = Histogram("request_seconds", "Seconds until the answer to /predict", registry=self.collected)
        queue = Gauge("queue_images", "Images that wait", registry=self.collected)
        queue.set_function(lambda: service.batcher.waiting if service.batcher else 0)


class _Service:
    """The detector and what surrounds it while the app runs."""

    def __init__(self, detector: Detector, settings: ServeSettings) -> None:
        self.detector, self.settings = detector, settings
        self.exported = isinstance(detector.model, ExportedNetwork)
        self.stages = 1 if self.exported else len(detector.config.model.stage_ious)  # to choose from
        self.batcher: Batcher | None = None
        self.ready = False
        self.metrics = _Metrics(self)

    def detect(self, images: Sequence[NDArray[np.uint8]], stages: int) -> list[Detections]:
        """Called in the one thread that runs the network."""
        if self.exported:  # its stages are fixed
            return self.detector.predict(list(images), batch_size=len(images))
        cascade: Any = self.detector.model.cascade
        before = cascade.stages_at_test
        cascade.stages_at_test = stages or before
        try:
            return self.detector.predict(list(images), batch_size=len(images))
        finally:
            cascade.stages_at_test = before

    async def start(self) -> None:
        settings = self.settings
        self.batcher = Batcher(
            self.detect, max_batch=settings.max_batch, max_delay=settings.max_delay, max_queue=settings.max_queue
        )
        self.batcher.start()
        await self.batcher.detect([np.zeros((64, 64, 3), np.uint8)])  # the first pass sets things up
        self.ready = True

    async def stop(self) -> None:
        self.ready = False
        if self.batcher is not None:
            await self.batcher.stop()


def create_app(detector: Detector, settings: ServeSettings | None = None) -> FastAPI:
    """The service around a detector, an ASGI application for uvicorn or any other server."""
    service = _Service(detector, settings or ServeSettings())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        yield
        await service.stop()

    app = FastAPI(title="cascade-rcnn", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    _add_errors(app)
    _add_middleware(app, service)
    _add_routes(app, service)
    if service.settings.label_studio:
        _add_label_studio(app, service)
    return app


def _add_label_studio(app: FastAPI, service: _Service) -> None:
    async def detect(images: list[NDArray[np.uint8]]) -> list[Detections]:
        return await _limited(_detect(service, images, 0), service.settings.timeout)

    async def refused(_: Request, error: Exception) -> Response:
        return _problem(422, str(error))

    app.add_exception_handler(TaskError, refused)
    backend = Backend(
        detect=detect,
        settings=service.settings,
        version=f"cascade-rcnn {__version__}",
        class_names=service.detector.class_names,
        masks=service.detector.config.model.masks != "none",
    )
    add_label_studio(app, backend)


def _problem(status: int, detail: str, headers: dict[str, str] | None = None) -> JSONResponse:
    body = {"type": "about:blank", "status": status, "detail": " ".join(detail.split())}
    return JSONResponse(body, status, headers=headers, media_type="application/problem+json")


def _add_errors(app: FastAPI) -> None:
    async def known(_: Request, error: Exception) -> Response:
        assert isinstance(error, ServiceError)
        return _problem(error.status, error.detail, error.headers)

    async def http(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return _problem(error.status_code, str(error.detail), dict(error.headers or {}))

    async def invalid(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        return _problem(422, f"{'.'.join(str(part) for part in first['loc'][1:])}: {first['msg']}")

    async def unknown(_: Request, error: Exception) -> Response:
        return _problem(500, f"the service failed ({type(error).__name__}); its log has more")

    app.add_exception_handler(ServiceError, known)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(Exception, unknown)


def _credentials(header: str) -> str:
    """The key of ``Bearer KEY``, or the password of basic authentication (the only one that Label Studio sends)."""
    kind, _, value = header.partition(" ")
    if kind.lower() != "basic":
        return header.removeprefix("Bearer ")
    try:
        return base64.b64decode(value, validate=True).decode().partition(":")[2]
    except ValueError:
        return ""


def _add_middleware(app: FastAPI, service: _Service) -> None:
    key = service.settings.api_key

    @app.middleware("http")
    async def guard(request: Request, call: Callable[[Request], Awaitable[Response]]) -> Response:
        given = request.headers.get("x-api-key") or _credentials(request.headers.get("authorization", ""))
        path = request.url.path
        if key and path not in _OPEN and not hmac.compare_digest(given.encode(), key.encode()):
            answer: Response = _problem(401, "a key is needed: send X-API-Key", {"WWW-Authenticate": "Bearer"})
        else:
            answer = await call(request)
        known = path if path in {"/", "/predict", "/health", "/ready", "/metrics", "/model"} else "other"
        service.metrics.requests.labels(known, str(answer.status_code)).inc()
        answer.headers.update(_HEADERS)
        return answer


def _add_routes(app: FastAPI, service: _Service) -> None:
    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> str:
        return importlib.resources.files("cascade_rcnn.serve").joinpath("page.html").read_text(encoding="utf-8")

    @app.get("/health")
    async def health() -> dict[str, str]:
        """The process answers."""
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> dict[str, str]:
        """The network is loaded and takes requests."""
        if not service.ready:
            raise ServiceError(503, "starting or stopping")
        return {"status": "ready"}

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        return Response(generate_latest(service.metrics.collected), media_type=CONTENT_TYPE_LATEST)

    @app.get("/model")
    async def model() -> dict[str, Any]:
        """What is served, and its limits."""
        return describe(service)

    @app.post("/predict", openapi_extra=_UPLOAD)
    async def predict(
        request: Request,
        score: float = Query(0.0, ge=0, le=1, description="leave out detections below"),
        stages: int = Query(0, ge=0, description="use the first stages of the cascade only; 0: all"),
        masks: bool = Query(True, description="with run lengths of masks, where the network has masks"),
    ) -> Response:
        """Objects of each file of a multipart form (any field names), or of an image as the whole body."""
        began = time.perf_counter()
        answer = await _limited(_predict(service, request, score, stages, masks), service.settings.timeout)
        service.metrics.seconds.observe(time.perf_counter() - began)
        return JSONResponse(answer)


_UPLOAD = {
    "requestBody": {
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {"file": {"type": "array", "items": {"type": "string", "format": "binary"}}},
                }
            },
            "image/*": {"schema": {"type": "string", "format": "binary"}},
        }
    }
}


def describe(service: _Service) -> dict[str, Any]:
    """What ``/model`` answers."""
    config, settings = service.detector.config, service.settings
    return {
        "version": __version__,
        "classes": list(service.detector.class_names),
        "stages": service.stages,
        "masks": config.model.masks != "none",
        "score_threshold": config.model.score_threshold,
        "max_detections": config.model.max_detections,
        "backbone": config.model.backbone,
        "limits": {
            "bytes": settings.max_bytes,
            "files": settings.max_files,
            "pixels": settings.max_pixels,
            "seconds": settings.timeout,
            "urls": settings.allow_urls,
        },
    }


async def _limited(work: Awaitable[_T], timeout: float) -> _T:
    try:
        return await asyncio.wait_for(work, timeout)
    except (TimeoutError, asyncio.TimeoutError):
        raise ServiceError(504, f"no answer within {timeout:g} seconds") from None


async def _predict(service: _Service, request: Request, score: float, stages: int, masks: bool) -> dict[str, Any]:
    if not service.ready or service.batcher is None:
        raise ServiceError(503, "starting or stopping", {"Retry-After": "1"})
    if stages and service.exported:
        raise ServiceError(422, f"stages {stages}: an exported network always runs the stages it was exported with")
    if stages > service.stages:
        raise ServiceError(422, f"stages {stages}: the cascade has {service.stages}")
    images, names = [], []
    for name, content in await _received(service, request):
        try:
            images.append(await asyncio.to_thread(decode, content, max_pixels=service.settings.max_pixels))
        except PictureTooLargeError as error:
            raise ServiceError(413, f"{name}: {error}") from None
        except UserError as error:
            raise ServiceError(422, f"{name}: {error}") from None
        names.append(name)
    found = await _detect(service, images, stages)
    return {"images": await asyncio.to_thread(_answers, service, names, found, score, masks)}


async def _detect(service: _Service, images: list[NDArray[np.uint8]], stages: int) -> list[Detections]:
    if not service.ready or service.batcher is None:
        raise ServiceError(503, "starting or stopping", {"Retry-After": "1"})
    try:
        found = await service.batcher.detect(images, stages)
    except QueueFullError as error:
        raise ServiceError(429, str(error), {"Retry-After": str(math.ceil(error.retry_after))}) from None
    service.metrics.images.inc(len(found))
    return found


def _answers(
    service: _Service, names: Sequence[str], found: Sequence[Detections], score: float, masks: bool
) -> list[dict[str, Any]]:
    answers = []
    for name, detections in zip(names, found):
        kept = detections[detections.scores >= score]
        if not masks:
            kept.mask_probs = None
        service.metrics.objects.inc(len(kept))
        results = [
            {"label": label, "category": category, **result}
            for label, category, result in zip(kept.labels.tolist(), kept.names, kept.to_coco())
        ]
        height, width = kept.size
        answers.append({"file_name": name, "height": height, "width": width, "detections": results})
    return answers


async def _received(service: _Service, request: Request) -> list[tuple[str, bytes]]:
    """Name and content of each file of the request, within the limits of bytes and files."""
    settings = service.settings
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > settings.max_bytes:
        raise ServiceError(413, f"{length} bytes: at most {settings.max_bytes} are accepted")
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        return [await _from_url(settings, await _body(request, min(settings.max_bytes, 10_000)))]
    if kind != "multipart/form-data":
        content = await _body(request, settings.max_bytes)
        if not content:
            raise ServiceError(422, "no picture: send it as the body, or as files of a multipart form")
        return [("image", content)]
    return await _from_form(request, settings)


async def _body(request: Request, limit: int) -> bytes:
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise ServiceError(413, f"more than {limit} bytes")
        parts.append(part)
    return b"".join(parts)


async def _from_form(request: Request, settings: ServeSettings) -> list[tuple[str, bytes]]:
    size, receive = 0, request._receive

    async def counted() -> Any:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > settings.max_bytes:
            raise ServiceError(413, f"more than {settings.max_bytes} bytes")
        return message

    request._receive = counted
    try:
        async with request.form(max_files=settings.max_files, max_fields=16) as form:
            files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
            if not files:
                raise ServiceError(422, "no file in the form")
            return [(_shown(file.filename), await file.read()) for file in files]
    except (MultiPartException, HTTPException) as error:
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
        return await asyncio.to_thread(fetch_url, str(url), max_bytes=settings.max_bytes)
    except UserError as error:
        raise ServiceError(422, str(error)) from None
