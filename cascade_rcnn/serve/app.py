"""The HTTP service: ``POST /predict``, a page at ``/``, and what an orchestrator asks for.

Errors are ``application/problem+json`` (RFC 9457) with one line in ``detail``; no answer names a path of this machine.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import importlib.resources
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
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from cascade_rcnn import __version__
from cascade_rcnn.errors import UserError
from cascade_rcnn.inference.detections import Detections
from cascade_rcnn.inference.detector import Detector
from cascade_rcnn.inference.exported import ExportedNetwork
from cascade_rcnn.serve.batching import Batcher, QueueFullError
from cascade_rcnn.serve.label_studio import Backend, TaskError, add_label_studio
from cascade_rcnn.serve.pictures import PictureTooLargeError, decode, size_of
from cascade_rcnn.serve.receive import Memory, ServiceError, Share, received
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
        held = Gauge("held_bytes", "Bytes of files and pixels of requests under way", registry=self.collected)
        held.set_function(lambda: service.memory.used)


class _Service:
    """The detector and what surrounds it while the app runs."""

    def __init__(self, detector: Detector, settings: ServeSettings) -> None:
        self.detector, self.settings = detector, settings
        self.exported = isinstance(detector.model, ExportedNetwork)
        model = detector.config.model
        self.stages = (self.exported and model.stop_after_stage) or len(model.stage_ious)
        self.batcher: Batcher | None = None
        self.ready = False
        self.memory = Memory(settings.max_held)
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
    async def detect(content: bytes) -> Detections:
        with service.memory.share() as share:
            share.take(len(content))
            return (await _detect(service, [await _decode(service, content, share)], 0))[0]

    async def look(content: bytes) -> Detections:
        try:
            return await _limited(detect(content), service.settings.timeout)
        finally:
            service.memory.tidy()

    async def refused(_: Request, error: Exception) -> Response:
        return _problem(422, str(error))

    app.add_exception_handler(TaskError, refused)
    backend = Backend(
        look=look,
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

    async def left(_: Request, error: Exception) -> Response:  # nobody reads it; without, each would be a failure
        return _problem(400, "the client has left")

    async def unknown(_: Request, error: Exception) -> Response:
        return _problem(500, f"the service failed ({type(error).__name__}); its log has more")

    app.add_exception_handler(ServiceError, known)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(ClientDisconnect, left)
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
        try:
            answer = await _limited(_predict(service, request, score, stages, masks), service.settings.timeout)
        finally:
            service.memory.tidy()
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
        "choose_stages": not service.exported and service.stages > 1,
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
    if service.batcher.waiting >= service.settings.max_queue:
        raise _full(service.batcher.full())  # before anything is read or decoded
    with service.memory.share() as share:
        images, names = [], []
        for name, content in await received(service.settings, request, share):
            try:
                images.append(await _decode(service, content, share))
            except PictureTooLargeError as error:
                raise ServiceError(413, f"{name}: {error}") from None
            except UserError as error:
                raise ServiceError(422, f"{name}: {error}") from None
            names.append(name)
        found = await _detect(service, images, stages)
        return {"images": await asyncio.to_thread(_answers, service, names, found, score, masks)}


async def _decode(service: _Service, content: bytes, share: Share) -> NDArray[np.uint8]:
    """The pixels of a file; what decoding needs is reserved before it begins."""
    max_pixels = service.settings.max_pixels
    width, height = await asyncio.to_thread(size_of, content, max_pixels=max_pixels)
    share.take(7 * width * height)  # Pillow's own pixels, 4 bytes each, and the array
    pixels = await asyncio.to_thread(decode, content, max_pixels=max_pixels)
    share.give(4 * width * height)
    return pixels


def _full(error: QueueFullError) -> ServiceError:
    return ServiceError(429, str(error), {"Retry-After": str(math.ceil(error.retry_after))})


async def _detect(service: _Service, images: list[NDArray[np.uint8]], stages: int) -> list[Detections]:
    if not service.ready or service.batcher is None:
        raise ServiceError(503, "starting or stopping", {"Retry-After": "1"})
    try:
        found = await service.batcher.detect(images, stages)
    except QueueFullError as error:
        raise _full(error) from None
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
