"""The page in a real browser: choosing, dropping, camera, sliders, keys, downloads, narrow and wide, light and dark.

Needs ``pip install playwright`` and a Chromium (``CHROMIUM=/usr/bin/chromium``); ``SCREENSHOTS=DIR`` keeps pictures.
"""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("uvicorn", reason="needs pip install 'cascade-rcnn[serve]'")
pytest.importorskip("playwright", reason="needs pip install playwright")
import uvicorn
from playwright import sync_api

from cascade_rcnn.config import Config, DataConfig
from cascade_rcnn.data.synthetic_shapes import draw_scene
from cascade_rcnn.inference.detector import Detector, load
from cascade_rcnn.serve.app import create_app
from cascade_rcnn.serve.protocol import Protocol
from cascade_rcnn.serve.settings import ServeSettings
from tiny import TINY, tiny_model

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome") or ""
FLAGS = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A service of the smallest network, or of the checkpoint that ``CHECKPOINT`` names."""
    if "CHECKPOINT" in os.environ:
        detector = load(os.environ["CHECKPOINT"], device="cpu")
    else:
        model = replace(TINY, score_threshold=0.0, max_detections=20)
        config = Config(model=model, data=DataConfig(short_side=(96,), long_side=160, workers=0))
        detector = Detector(tiny_model(score_threshold=0.0, max_detections=20), config, ("cat", "dog", "eel"))
    app = create_app(detector, ServeSettings(max_pixels=2_000_000))
    server = uvicorn.Server(uvicorn.Config(app, port=0, http=Protocol, ws="none", log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture(params=[(400, "light"), (400, "dark"), (1600, "light"), (1600, "dark")], ids=str)
def page(request: pytest.FixtureRequest, browser: Any, address: str) -> Iterator[Any]:
    width, scheme = request.param
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, accept_downloads=True)
    opened = context.new_page()
    opened.faults, opened.choosers = [], []
    opened.on("filechooser", lambda one: opened.choosers.append(one))  # early: the browser must know in time
    opened.on("pageerror", lambda error: opened.faults.append(str(error)))
    opened.on(
        "request",
        lambda one: None if one.url.startswith((address, "blob:", "data:")) else opened.faults.append(one.url),
    )
    opened.goto(address)
    _until(opened, "model !== null")
    yield opened
    assert opened.faults == []
    context.close()


def test_an_export_offers_no_stages(page: Any, address: str) -> None:
    assert page.is_visible("#stages-row") and page.is_visible("#stages-keys")
    told = page.request.get(f"{address}model").json() | {"choose_stages": False}
    page.route("**/model", lambda route: route.fulfill(json=told))
    asked: list[str] = []
    page.on("request", lambda one: asked.append(one.url))
    page.reload()
    _until(page, "model !== null")
    assert not page.is_visible("#stages-row") and not page.is_visible("#stages-keys")
    _choose(page, picture())
    assert _count(page) >= 0 and f"{address}predict" in asked
    page.keyboard.press("1")
    assert not any("stages=" in one for one in asked)


def _until(page: Any, expression: str) -> None:
    """Playwright's own wait compiles strings in the page, which the page's content security policy forbids."""
    for _ in range(600):
        if page.evaluate(expression):
            return
        time.sleep(0.05)
    raise AssertionError(f"never: {expression}")


def picture(seed: int = 0, size: int = 96) -> bytes:
    content = io.BytesIO()
    shapes = draw_scene(np.random.default_rng(seed), size=size, objects=(3, 5))[0]
    Image.fromarray(shapes).resize((640, 640)).save(content, "PNG")
    return content.getvalue()


def _keep(page: Any, name: str) -> None:
    folder = os.environ.get("SCREENSHOTS")
    if folder:
        size, scheme = page.viewport_size["width"], page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
        page.screenshot(path=Path(folder) / f"{name}_{size}_{'dark' if scheme else 'light'}.png", full_page=True)


def _choose(page: Any, content: bytes, name: str = "a.png") -> None:
    page.set_input_files("#file", {"name": name, "mimeType": "image/png", "buffer": content})


def _count(page: Any) -> int:
    _until(page, "/of \\d+ objects/.test(document.getElementById('count').textContent)")
    return int(page.text_content("#count").split()[0])


_PAINTED = """(() => {
  const c = document.getElementById("overlay");
  return c.getContext("2d").getImageData(0, 0, c.width, c.height).data.filter((v, i) => i % 4 === 3 && v).length;
})()"""


def _painted(page: Any) -> int:
    """Pixels of the overlay that are not clear."""
    return int(page.evaluate(_PAINTED))


def _set(page: Any, slider: str, value: float) -> None:
    page.evaluate("([id, value]) => { const one = document.getElementById(id); one.value = value;"
                  "one.dispatchEvent(new Event('input', {bubbles: true})) }", [slider, value])  # fmt: skip


def _download(page: Any, button: str) -> bytes:
    with page.expect_download() as started:
        page.click(button)
    return Path(started.value.path()).read_bytes()


def test_a_chosen_picture_its_sliders_keys_and_downloads(page: Any) -> None:
    _keep(page, "empty")
    _choose(page, picture())
    _set(page, "score", 0.0)
    everything = _count(page)
    assert everything > 0 and _painted(page) > 0
    _keep(page, "found")
    with_labels = _painted(page)
    page.keyboard.press("l")
    assert not page.is_checked("#labels") and _painted(page) != with_labels
    page.keyboard.press("m")
    assert not page.is_checked("#masks")
    _keep(page, "plain")
    for key in "lm":
        page.keyboard.press(key)
    page.keyboard.press("1")
    _until(page, "found[1] !== undefined")
    assert page.text_content("#stages-value") == "1"
    page.keyboard.press(str(page.evaluate("model.stages")))
    listed = json.loads(_download(page, "#save-json"))
    assert len(listed) == everything and listed[0]["file_name"] == "a.png" and "runs" not in listed[0]
    coco = json.loads(_download(page, "#save-coco"))
    assert len(coco["annotations"]) == everything and coco["images"][0]["width"] == 640
    assert {one["category_id"] for one in coco["annotations"]} == {one["id"] for one in coco["categories"]}
    assert Image.open(io.BytesIO(_download(page, "#save-picture"))).size == (640, 640)
    _set(page, "score", 1.0)
    assert _count(page) == 0 and json.loads(_download(page, "#save-json")) == []
    page.keyboard.press("-")
    assert page.text_content("#score-value") == "0.95"


def test_the_page_fits_its_width(page: Any) -> None:
    _choose(page, picture())
    _count(page)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    for control in ("#choose", "#camera", "#score", "#labels", "#save-json"):
        box = page.locator(control).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= page.viewport_size["width"]
    image, overlay = page.locator("#picture").bounding_box(), page.locator("#overlay").bounding_box()
    assert overlay == pytest.approx(image, abs=1)


def test_everything_is_reached_by_the_keyboard(page: Any) -> None:
    _choose(page, picture())
    _count(page)
    seen = set()
    for _ in range(20):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("document.activeElement.id"))
    assert {"choose", "camera", "score", "stages", "labels", "masks", "save-json", "save-coco", "save-picture"} <= seen


def test_the_key_o_opens_a_file(page: Any) -> None:
    page.keyboard.press("o")
    for _ in range(200):
        if page.choosers:
            break
        page.wait_for_timeout(50)
    page.choosers[0].set_files({"name": "o.png", "mimeType": "image/png", "buffer": picture()})
    _count(page)
    assert page.get_attribute("#picture", "alt") == "o.png"


def test_a_dropped_picture(page: Any) -> None:
    content = base64.b64encode(picture(1)).decode()
    transfer = page.evaluate_handle(
        "text => { const made = new DataTransfer(), bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0));"
        "made.items.add(new File([bytes], 'dropped.png', {type: 'image/png'})); return made }", content)  # fmt: skip
    page.dispatch_event("#stage", "drop", {"dataTransfer": transfer})
    _count(page)
    assert page.get_attribute("#picture", "alt") == "dropped.png"


def test_the_camera(page: Any) -> None:
    page.keyboard.press("c")
    _until(page, "document.getElementById('video').videoWidth > 0")
    _keep(page, "camera")
    page.click("#shoot")
    _count(page)
    assert page.is_hidden("#video") and page.is_visible("#picture")
    assert page.evaluate("stream === null")


def test_errors_are_said_and_go_with_the_next_picture(page: Any) -> None:
    _choose(page, b"no picture", "b.png")
    _until(page, "document.getElementById('error').textContent !== ''")
    assert "b.png: no picture of a known kind" in page.text_content("#error")
    assert page.is_disabled("#save-json") and _painted(page) == 0
    assert page.is_hidden("#picture") and "cannot show" in page.text_content("#hint")
    _keep(page, "error")
    _choose(page, picture())
    _count(page)
    assert page.text_content("#error") == ""
    assert page.is_visible("#picture") and page.is_enabled("#save-picture")


def test_a_picture_that_only_the_service_reads(page: Any) -> None:
    content = io.BytesIO()
    Image.open(io.BytesIO(picture())).save(content, "TIFF")
    _choose(page, content.getvalue(), "a.tif")
    assert _count(page) >= 0 and "cannot show" in page.text_content("#hint")
    assert page.is_enabled("#save-json") and page.is_disabled("#save-picture")
