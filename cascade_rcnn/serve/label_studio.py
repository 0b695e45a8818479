"""Label Studio's machine-learning API, under ``/label-studio``: tasks in, regions out, for the project's own labels.

Label Studio asks ``/health``, tells its labelling interface and address by ``/setup``, and sends tasks to ``/predict``.
Pictures are read from the Label Studio server alone (its address is given when the service starts), with the key of the
environment; those of other hosts only with ``--allow-urls``, by the rules of ``fetch.py``.
"""

from __future__ import annotations

import asyncio
import json
import sys
import urllib.error
import urllib.parse
import urllib.request
import xml.parsers.expat
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import Any

from fastapi import FastAPI, Request

from cascade_rcnn.errors import UserError
from cascade_rcnn.inference.as_dataset import label_studio_regions
from cascade_rcnn.inference.detections import Detections
from cascade_rcnn.messages import few_names, one_line, shown
from cascade_rcnn.serve.fetch import fetch_url
from cascade_rcnn.serve.settings import ServeSettings

API_KEY = "LABEL_STUDIO_API_KEY"  # the name that Label Studio's own programs read
PREFIX = "/label-studio"
_REGIONS = {"rectanglelabels": "rectangle", "polygonlabels": "polygon"}  # tags whose regions a detector can give


@dataclass
class Interface:
    """What a project's labelling interface asks for."""

    image: str = ""  # key of the picture's address in a task's data
    to_name: str = ""
    controls: dict[str, str] = field(default_factory=dict)  # kind (rectangle, polygon) -> the tag's name
    labels: dict[str, dict[str, str]] = field(default_factory=dict)  # kind -> our class name, folded -> their label

    def kind(self, *, masks: bool) -> str:
        """The kind of regions to give: polygons where there are masks and a tag for them, else rectangles."""
        wanted = ("polygon", "rectangle") if masks else ("rectangle",)
        return next((kind for kind in wanted if kind in self.controls), "")


def read_interface(text: str) -> Interface:
    """The tags of a labelling interface that concern a detector.

    Raises:
        UserError: no XML, or without an Image tag and RectangleLabels or PolygonLabels for it.
    """
    found = Interface()
    open_controls: list[str] = []

    def start(tag: str, attributes: dict[str, str]) -> None:
        tag = tag.lower()
        if tag == "image" and not found.image:
            found.image, found.to_name = attributes.get("value", "").removeprefix("$"), attributes.get("name", "")
        open_controls.append(_REGIONS.get(tag, open_controls[-1] if tag == "label" and open_controls else ""))
        kind = open_controls[-1]
        if tag in _REGIONS:
            found.controls.setdefault(kind, attributes.get("name", ""))
        elif tag == "label" and kind and "value" in attributes:
            for name in (attributes["value"], attributes.get("alias", "")):
                found.labels.setdefault(kind, {}).setdefault(name.casefold(), attributes["value"])

    def refuse(*_: Any) -> None:
        raise UserError("label_config: a document type declaration is not read")

    parser = xml.parsers.expat.ParserCreate()
    parser.StartElementHandler = start
    parser.EndElementHandler = lambda _: open_controls.pop()
    parser.StartDoctypeDeclHandler = refuse
    try:
        parser.Parse(text, True)
    except (xml.parsers.expat.ExpatError, ValueError) as error:
        raise UserError(f"label_config: not XML ({one_line(error)})") from error
    if not found.image or not found.controls:
        raise UserError(
            "label_config: it needs an Image tag and a RectangleLabels or PolygonLabels tag for it; "
            "'cascade-rcnn predict --as label-studio' writes one"
        )
    return found


def shared_classes(interface: Interface, class_names: Sequence[str], *, masks: bool) -> tuple[str, dict[int, str]]:
    """The kind of regions, and the project's label for each of the detector's classes that it has.

    Raises:
        UserError: no such tag for a detector without masks, or not one class in common; names both lists.
    """
    kind = interface.kind(masks=masks)
    if not kind:
        raise UserError("label_config: it has PolygonLabels only, and this detector has no masks: add RectangleLabels")
    theirs = interface.labels.get(kind, {})
    labels = {number: theirs[name.casefold()] for number, name in enumerate(class_names) if name.casefold() in theirs}
    if not labels:
        raise UserError(
            f"label_config: its labels ({few_names(list(dict.fromkeys(theirs.values())))}) and the detector's classes "
            f"({few_names(list(class_names))}) have none in common: rename the labels, or give them alias=CLASS"
        )
    return kind, labels


def prediction(
    detections: Detections, interface: Interface, kind: str, labels: dict[int, str], *, version: str
) -> dict[str, Any]:
    """One task's prediction; its score is that of the least sure region, which Label Studio can sort by."""
    known = [row for row, label in enumerate(detections.labels.tolist()) if label in labels]
    kept = detections[known]
    regions = label_studio_regions(kept, labels, polygons=kind == "polygon")
    for region in regions:
        region["from_name"], region["to_name"] = interface.controls[kind], interface.to_name
    score = float(kept.scores.min()) if len(kept) else 0.0
    return {"model_version": version, "score": score, "result": regions}


def fetch_task_image(
    address: str, *, server: str, key: str, max_bytes: int, allow_urls: bool, timeout: float = 30.0
) -> bytes:
    """The picture of a task: from the Label Studio server, or with ``allow_urls`` from the public internet.

    Raises:
        UserError: an address elsewhere, or one that cannot be fetched.
    """
    try:
        whole = urllib.parse.urljoin(server.rstrip("/") + "/", address)
        elsewhere = urllib.parse.urlsplit(whole)[:2] != urllib.parse.urlsplit(server)[:2]
    except ValueError:  # https://[
        raise UserError(f"{shown(address)}: not an address") from None
    if elsewhere:
        if not allow_urls:
            raise UserError(
                f"{shown(address)}: not on the Label Studio server {server}; start the service with --allow-urls, "
                "or let Label Studio serve the picture (storage with 'treat every bucket object as a source file')"
            )
        return fetch_url(whole, max_bytes=max_bytes)[1]
    request = urllib.request.Request(whole, headers={"User-Agent": "cascade-rcnn"})
    if key:
        request.add_header("Authorization", _authorization(server, key))
    try:
        with _OPENER.open(request, timeout=timeout) as answer:
            content: bytes = answer.read(max_bytes + 1)
    except urllib.error.HTTPError as error:
        hint = f"; set {API_KEY} to an access token of Label Studio" if error.code in (401, 403) else ""
        raise UserError(f"{shown(address)}: Label Studio answers {error.code}{hint}") from None
    except (urllib.error.URLError, HTTPException, OSError, ValueError) as error:
        raise UserError(f"{shown(address)}: cannot be fetched from Label Studio ({one_line(error)[:100]})") from None
    if len(content) > max_bytes:
        raise UserError(f"{shown(address)}: more than {max_bytes} bytes")
    return content


def _authorization(server: str, key: str) -> str:
    """The header for a key: a legacy token as it is, a personal access token (a JWT) exchanged for a short-lived one.

    Raises:
        UserError: Label Studio does not take the token.
    """
    if key.count(".") != 2:
        return f"Token {key}"
    body = json.dumps({"refresh": key}).encode()
    address = urllib.parse.urljoin(server.rstrip("/") + "/", "api/token/refresh")
    request = urllib.request.Request(address, data=body, headers={"Content-Type": "application/json"})
    try:
        with _OPENER.open(request, timeout=10) as answer:
            return f"Bearer {json.loads(answer.read(100_000))['access']}"
    except (urllib.error.URLError, HTTPException, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{API_KEY}: Label Studio does not take this token ({one_line(error)[:100]})") from None


class _SameServer(urllib.request.HTTPRedirectHandler):
    """A redirect to another server would take the key there."""

    def redirect_request(self, request: Any, answer: Any, code: int, text: str, headers: Any, url: str) -> Any:
        if urllib.parse.urlsplit(url)[:2] != urllib.parse.urlsplit(request.full_url)[:2]:
            return None
        return super().redirect_request(request, answer, code, text, headers, url)


_OPENER = urllib.request.build_opener(_SameServer)


Look = Callable[[bytes], Awaitable[Detections]]


class TaskError(Exception):
    """What Label Studio is told instead of predictions."""


@dataclass(frozen=True, kw_only=True)
class Backend:
    """A detector as Label Studio's model; ``look`` decodes a file and looks at it.

    It raises UserError for a file that is no picture, and the service's own errors.
    """

    look: Look
    settings: ServeSettings
    version: str
    class_names: Sequence[str]
    masks: bool

    def wanted(self, label_config: object) -> tuple[Interface, str, dict[int, str]]:
        """The interface, the kind of regions, and the label of each class. Raises TaskError."""
        try:
            interface = read_interface(str(label_config or ""))
            return (interface, *shared_classes(interface, self.class_names, masks=self.masks))
        except UserError as error:
            raise TaskError(str(error)) from None

    def read(self, task: dict[str, Any], interface: Interface) -> bytes:
        """The file of a task's picture. Raises UserError."""
        data = task.get("data")
        address = data.get(interface.image) if isinstance(data, dict) else None
        if not address:
            raise UserError(f"task {shown(task.get('id'))}: no {shown(interface.image)} in its data")
        settings = self.settings
        return fetch_task_image(
            str(address),
            server=settings.label_studio,
            key=settings.label_studio_key,
            max_bytes=settings.max_bytes,
            allow_urls=settings.allow_urls,
        )

    async def predict(self, body: dict[str, Any]) -> dict[str, Any]:
        """Regions for each task, in the tasks' order; a task whose picture cannot be read has none, and is told."""
        tasks = body.get("tasks")
        if not isinstance(tasks, list) or not all(isinstance(task, dict) for task in tasks):
            raise TaskError("tasks: expected a list of tasks")
        interface, kind, labels = self.wanted(body.get("label_config"))
        results: list[dict[str, Any]] = []
        for task in tasks:
            try:
                found = await self.look(await asyncio.to_thread(self.read, task, interface))
            except UserError as error:
                print(f"label studio: {error}", file=sys.stderr, flush=True)
                if len(tasks) == 1:
                    raise TaskError(str(error)) from None
                results.append({"model_version": self.version, "score": 0.0, "result": []})
                continue
            results.append(prediction(found, interface, kind, labels, version=self.version))
        return {"results": results, "model_version": self.version}


def add_label_studio(app: FastAPI, backend: Backend) -> None:
    """The routes below ``/label-studio``."""

    @app.get(f"{PREFIX}/health")
    @app.get(PREFIX, include_in_schema=False)
    async def health() -> dict[str, str]:
        """What Label Studio asks before it connects."""
        return {"status": "UP", "model_class": "cascade-rcnn"}

    @app.post(f"{PREFIX}/setup")
    async def setup(request: Request) -> dict[str, str]:
        """Label Studio tells the labelling interface; refused where it has no class in common with the detector."""
        schema = (await _json(request)).get("schema")
        if schema:  # empty when the connection is only tried
            backend.wanted(schema)
        return {"model_version": backend.version}

    @app.post(f"{PREFIX}/predict")
    async def predict(request: Request) -> dict[str, Any]:
        """Regions for each task, in the tasks' order."""
        return await backend.predict(await _json(request))

    @app.post(f"{PREFIX}/webhook", status_code=201)
    @app.post(f"{PREFIX}/train", status_code=201)
    async def ignored() -> dict[str, str]:
        """Annotations that were made: the detector does not learn from them here."""
        return {"status": "ignored"}


async def _json(request: Request) -> dict[str, Any]:
    """The body of a request of Label Studio, at most 10 MB."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > 10_000_000:
            raise TaskError("more than 10 MB")
        parts.append(part)
    try:
        body = json.loads(b"".join(parts))
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise TaskError("expected a JSON object, as Label Studio sends it")
    return body
