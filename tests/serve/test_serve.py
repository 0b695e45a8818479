"""The service as its clients meet it: answers, limits, hostile input, a full queue, an orderly end."""

from __future__ import annotations

import asyncio
import io
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="needs pip install 'cascade-rcnn[serve]'")
pytest.importorskip("multipart", reason="needs pip install 'cascade-rcnn[serve]'")
import httpx

import locations
from cascade_rcnn.checkpoint import save_checkpoint
from cascade_rcnn.config import Config, DataConfig
from cascade_rcnn.errors import ConfigError, UserError
from cascade_rcnn.inference.detector import Detector, load
from cascade_rcnn.serve import receive
from cascade_rcnn.serve.app import create_app
from cascade_rcnn.serve.batching import Batcher, QueueFullError
from cascade_rcnn.serve.fetch import fetch_url
from cascade_rcnn.serve.settings import ServeSettings
from tiny import TINY, tiny_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("serve") / "tiny.safetensors"
    config = Config(model=TINY, data=DataConfig(short_side=(96,), long_side=160, workers=0))
    save_checkpoint(path, tiny_model().state_dict(), config=config, class_names=("cat", "dog", "eel"))
    return path


@pytest.fixture(scope="module")
def detector(checkpoint: Path) -> Detector:
    return load(checkpoint, device="cpu", score_threshold=0.0, max_detections=20)


class Client:
    """Requests to an app within this process, its start and end included."""

    def __init__(self, detector: Detector, **settings: Any) -> None:
        self.app = create_app(detector, ServeSettings(**settings))
        self.loop = asyncio.new_event_loop()
        self.context = self.app.router.lifespan_context(self.app)
        self.loop.run_until_complete(self.context.__aenter__())

    def close(self) -> None:
        self.loop.run_until_complete(self.context.__aexit__(None, None, None))
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()

    def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        return self.ask_many(1, method, path, **options)[0]

    def ask_many(self, count: int, method: str, path: str, **options: Any) -> list[httpx.Response]:
        async def go() -> list[httpx.Response]:
            transport = httpx.ASGITransport(app=self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
                return await asyncio.gather(*(client.request(method, path, **options) for _ in range(count)))

        return self.loop.run_until_complete(go())


@pytest.fixture
def client(detector: Detector) -> Iterator[Client]:
    made = Client(detector, max_bytes=200_000, max_pixels=100_000, max_files=3)
    yield made
    made.close()


def picture(size: tuple[int, int] = (120, 90), kind: str = "PNG", **options: Any) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, kind, **options)
    return content.getvalue()


def test_a_file_is_answered_as_predict_does(client: Client, detector: Detector, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    wanted = detector.predict(tmp_path / "a.png")
    answer = client.ask("POST", "/predict", files={"file": ("a.png", picture())})
    (image,) = answer.json()["images"]
    assert answer.status_code == 200 and len(image["detections"]) == len(wanted) > 0
    assert (image["file_name"], image["width"], image["height"]) == ("a.png", 120, 90)
    for found, known, name in zip(image["detections"], wanted.to_coco(), wanted.names):
        assert found["bbox"] == pytest.approx(known["bbox"], abs=1e-3) and found["category"] == name
        assert found["segmentation"]["size"] == [90, 120]


def test_a_body_without_a_form_and_several_files(client: Client) -> None:
    assert len(client.ask("POST", "/predict", content=picture()).json()["images"]) == 1
    files = [("x", ("one.png", picture())), ("y", ("two.jpg", picture((50, 60), "JPEG")))]
    images = client.ask("POST", "/predict", files=files).json()["images"]
    assert [image["file_name"] for image in images] == ["one.png", "two.jpg"] and images[1]["width"] == 50


def test_score_stages_and_masks_are_chosen_by_the_client(client: Client, detector: Detector) -> None:
    everything = client.ask("POST", "/predict", content=picture()).json()["images"][0]["detections"]
    limit = sorted(one["score"] for one in everything)[len(everything) // 2]
    some = client.ask("POST", f"/predict?score={limit}&masks=false", content=picture()).json()["images"][0][
        "detections"
    ]
    assert 0 < len(some) < len(everything) and "segmentation" not in some[0]
    first = client.ask("POST", "/predict?stages=1", content=picture()).json()["images"][0]["detections"]
    assert first != everything
    assert client.ask("POST", "/predict", content=picture()).json()["images"][0]["detections"] == everything


def test_a_turned_photograph_is_answered_upright(client: Client) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = client.ask("POST", "/predict", content=picture((120, 90), "JPEG", exif=exif)).json()["images"][0]
    assert (image["width"], image["height"]) == (90, 120)


@pytest.mark.parametrize(
    ("request_", "status", "words"),
    [
        ({"content": b""}, 422, "no picture"),
        ({"content": b"GIF89a but no picture"}, 422, "image: "),
        ({"content": picture()[:300]}, 422, "image: damaged"),
        ({"content": picture((400, 300))}, 413, "200000 are accepted|120000 pixels|more than"),
        ({"content": b"0" * 300_000}, 413, "at most 200000"),
        ({"files": {"f": ("../../etc/passwd", b"root:x:0:0")}}, 422, "^passwd: no picture"),
        ({"files": [("f", ("a.png", picture()))] * 4}, 413, "Too many files"),
        ({"data": {"text": "no file"}, "files": {}}, 422, "no picture"),
        ({"content": b"--x", "headers": {"content-type": "multipart/form-data"}}, 422, "boundary"),
        ({"json": {"url": "http://127.0.0.1/"}}, 403, "--allow-urls"),
        ({"content": b"[" * 9000, "headers": {"content-type": "application/json"}}, 422, "expected a picture"),
    ],
)
def test_what_cannot_be_answered_is_a_problem_in_one_line(
    client: Client, request_: dict[str, Any], status: int, words: str
) -> None:
    answer = client.ask("POST", "/predict", **request_)
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    detail = answer.json()["detail"]
    assert re.search(words, detail) and "\n" not in detail and "/root" not in detail and "site-packages" not in detail


@pytest.mark.parametrize("query", ["score=2", "score=x", "stages=-1", "stages=9", "masks=perhaps"])
def test_a_wrong_query_names_the_field(client: Client, query: str) -> None:
    answer = client.ask("POST", f"/predict?{query}", content=picture())
    assert answer.status_code == 422 and query.partition("=")[0] in answer.json()["detail"]


def test_hostile_bytes_never_end_in_a_failure_of_the_service(client: Client) -> None:
    """Pictures of several kinds with bytes changed, cut out, doubled or made up."""
    rng = random.Random(0)
    whole = [picture(kind=kind) for kind in ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP")]
    for number in range(120):
        content = bytearray(whole[number % len(whole)])
        for _ in range(rng.choice((1, 5, 50))):
            content[rng.randrange(len(content))] = rng.randrange(256)
        start = rng.randrange(len(content))
        damaged = [bytes(content), bytes(content[:start]), bytes(content[start:]), rng.randbytes(start)][number % 4]
        answer = client.ask("POST", "/predict", content=damaged)
        assert answer.status_code in (200, 413, 422), (number, answer.text)


def test_a_key_guards_all_but_the_page_and_the_probes(detector: Detector) -> None:
    client = Client(detector, api_key="secret")
    try:
        assert client.ask("POST", "/predict", content=picture()).status_code == 401
        assert client.ask("GET", "/metrics", headers={"X-API-Key": "secreT"}).status_code == 401
        assert client.ask("POST", "/predict", content=picture(), headers={"X-API-Key": "secret"}).status_code == 200
        assert client.ask("GET", "/model", headers={"Authorization": "Bearer secret"}).status_code == 200
        assert [client.ask("GET", path).status_code for path in ("/", "/health", "/ready")] == [200, 200, 200]
    finally:
        client.close()


def test_what_an_orchestrator_asks(client: Client) -> None:
    client.ask("POST", "/predict", content=picture())
    assert client.ask("GET", "/health").json() == {"status": "ok"}
    assert client.ask("GET", "/ready").json() == {"status": "ready"}
    assert client.ask("GET", "/model").json()["classes"] == ["cat", "dog", "eel"]
    said = client.ask("GET", "/metrics").text
    assert 'requests_total{path="/predict",status="200"} 1.0' in said and "images_total 1.0" in said
    assert client.ask("GET", "/nothing").status_code == 404


def test_the_page_asks_no_other_host(client: Client) -> None:
    answer = client.ask("GET", "/")
    assert (
        "text/html" in answer.headers["content-type"]
        and "default-src 'self'" in answer.headers["content-security-policy"]
    )
    assert "http://" not in answer.text and "https://" not in answer.text


def _waits(seconds: float, seen: list[int]) -> Any:
    def detect(images: Any, stages: int) -> list[Any]:
        seen.append(len(images))
        time.sleep(seconds)
        if any(image is None for image in images):
            raise UserError("no such image")
        return [(id(image), stages) for image in images]

    return detect


def test_images_that_come_together_share_a_batch() -> None:
    seen: list[int] = []

    async def go() -> list[Any]:
        batcher = Batcher(_waits(0.01, seen), max_batch=4, max_delay=0.2, max_queue=100)
        batcher.start()
        images: list[Any] = [np.zeros((1, 1, 3), np.uint8) for _ in range(10)]
        found = await asyncio.gather(*(batcher.detect([image], stages=0) for image in images))
        await batcher.stop()
        return [one[0] == (id(image), 0) for one, image in zip(found, images)]

    assert all(asyncio.run(go()))
    assert seen[:2] == [4, 4] and sum(seen) == 10


def test_other_stages_go_into_another_batch_and_one_failure_spoils_no_other() -> None:
    seen: list[int] = []

    async def go() -> list[Any]:
        batcher = Batcher(_waits(0.0, seen), max_batch=8, max_delay=0.05, max_queue=100)
        batcher.start()
        asked = [batcher.detect(["a"], 1), batcher.detect([None], 1), batcher.detect(["b"], 2)]  # type: ignore[list-item]
        found = await asyncio.gather(*asked, return_exceptions=True)
        await batcher.stop()
        return found

    found = asyncio.run(go())
    assert found[0][0][1] == 1 and found[2][0][1] == 2 and isinstance(found[1], UserError)


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    async def go() -> float:
        batcher = Batcher(_waits(0.05, []), max_batch=1, max_delay=0.0, max_queue=2)
        batcher.start()
        first = asyncio.ensure_future(batcher.detect(["a", "b"]))  # type: ignore[list-item]
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError) as caught:
            await batcher.detect(["c"])  # type: ignore[list-item]
        await first
        await batcher.stop()
        return caught.value.retry_after

    assert asyncio.run(go()) >= 1


def test_a_full_queue_is_429_with_retry_after(detector: Detector) -> None:
    client = Client(detector, max_queue=1, max_batch=1)
    try:
        answers = client.ask_many(6, "POST", "/predict", content=picture())
        refused = [answer for answer in answers if answer.status_code == 429]
        assert refused and {answer.status_code for answer in answers} == {200, 429}
        assert int(refused[0].headers["retry-after"]) >= 1
    finally:
        client.close()


def test_what_requests_hold_in_memory_is_bounded(detector: Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    """One request of 120 x 90 pixels needs 7 bytes for each while it is decoded."""
    monkeypatch.setattr(ServeSettings, "max_held", 2 * (len(picture()) + 7 * 120 * 90))
    client = Client(detector, max_batch=1)
    try:
        answers = client.ask_many(6, "POST", "/predict", content=picture())
        refused = [answer for answer in answers if answer.status_code == 429]
        assert refused and {answer.status_code for answer in answers} == {200, 429}
        assert int(refused[0].headers["retry-after"]) >= 1
        files = [("f", ("a.png", picture()))] * 6
        assert client.ask("POST", "/predict", files=files).status_code == 413
        assert client.ask("POST", "/predict", content=picture()[:300]).status_code == 422
        assert client.ask("POST", "/predict", content=picture()).status_code == 200
        assert "held_bytes 0.0" in client.ask("GET", "/metrics").text
    finally:
        client.close()


def test_memory_that_pictures_took_goes_back_to_the_system(detector: Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    trims: list[int] = []
    monkeypatch.setattr(receive, "_malloc_trim", lambda: trims.append)
    monkeypatch.setattr(receive, "_WORTH_TRIMMING", 3 * 7 * 120 * 90)
    monkeypatch.setattr(receive, "_IDLE", 0.05)
    client = Client(detector)
    try:
        counts = []
        for _ in range(5):
            assert client.ask("POST", "/predict", content=picture()).status_code == 200
            client.loop.run_until_complete(asyncio.sleep(0.2))
            counts.append(len(trims))
        assert counts == [0, 0, 1, 1, 1]
    finally:
        client.close()


def test_a_jpeg_of_thousands_of_scans_is_refused(client: Client) -> None:
    """Each would cost a pass over all pixels, and takes some hundred bytes."""
    whole = picture(kind="JPEG", progressive=True)
    first = whole.index(b"\xff\xda")
    second = whole.index(b"\xff\xda", first + 2)
    assert client.ask("POST", "/predict", content=whole).status_code == 200
    answer = client.ask("POST", "/predict", content=whole[:second] + whole[first:second] * 201 + whole[second:])
    assert answer.status_code in (413, 422) and "scans" in answer.json()["detail"]


def test_a_client_that_leaves_is_no_failure(client: Client) -> None:
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/predict",
        "query_string": b"",
        "headers": [],
        "http_version": "1.1",
    }
    client.loop.run_until_complete(client.app(scope, receive, send))
    assert sent[0]["status"] == 400


def test_a_late_answer_is_504(detector: Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client(detector, timeout=0.05)
    try:
        monkeypatch.setattr(detector, "predict", lambda *_, **__: time.sleep(0.3) or [])
        assert client.ask("POST", "/predict", content=picture()).status_code == 504
    finally:
        client.close()


@pytest.mark.parametrize(
    "changes",
    [{"max_batch": 0}, {"max_pixels": -1}, {"timeout": 0}, {"max_delay": -1}, {"api_key": "kéy"}, {"api_key": "a b"}],
)
def test_limits_out_of_range_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ServeSettings(**changes)


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "http://127.0.0.1:1/a.png",
        "http://[::1]/",
        "http://169.254.169.254/",
        "ftp://a/b",
        "",
        "https://[",
    ],
)
def test_addresses_within_the_network_are_not_fetched(url: str) -> None:
    with pytest.raises(UserError, match=r"^url: "):
        fetch_url(url, max_bytes=1000)


def test_the_command_serves_and_ends_in_order(checkpoint: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "cascade_rcnn", "serve", str(checkpoint), "--port", str(port), "--device", "cpu"]
    environment = os.environ | {"PYTHONPATH": str(locations.REPOSITORY)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(300):
            try:
                if httpx.get(address + "/ready").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.1)
        answer = httpx.post(address + "/predict", files={"file": ("a.png", picture())}, timeout=30)
        assert answer.status_code == 200
        process.send_signal(signal.SIGTERM)
        out, error = process.communicate(timeout=30)
    finally:
        process.kill()
    assert address in out and "Traceback" not in error
    assert process.returncode in (0, -signal.SIGTERM, 128 + signal.SIGTERM)
    assert json.loads(answer.text)["images"][0]["width"] == 120
