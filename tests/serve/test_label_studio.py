"""The service as Label Studio meets it: its requests as documented, pictures from its server, its labels."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest

pytest.importorskip("fastapi", reason="needs pip install 'cascade-rcnn[serve]'")
pytest.importorskip("multipart", reason="needs pip install 'cascade-rcnn[serve]'")

from test_serve import Client, checkpoint, detector, picture  # noqa: F401 - fixtures

from cascade_rcnn.errors import ConfigError, UserError
from cascade_rcnn.inference.detector import Detector
from cascade_rcnn.serve.label_studio import fetch_task_image, read_interface, shared_classes
from cascade_rcnn.serve.settings import ServeSettings

BOXES = """<View>
  <Image name="photo" value="$image" zoom="true"/>
  <RectangleLabels name="boxes" toName="photo"><Label value="Dog"/><Label value="Katze" alias="cat"/></RectangleLabels>
</View>"""
POLYGONS = BOXES.replace("RectangleLabels", "PolygonLabels")


class _Server(http.server.BaseHTTPRequestHandler):
    """A Label Studio server as far as pictures go; a personal access token is exchanged first."""

    seen: ClassVar[list[tuple[str, str]]] = []

    def do_GET(self) -> None:
        key = self.headers.get("Authorization", "")
        self.seen.append((self.path, key))
        if self.path == "/moved.png":
            self.send_response(302)
            self.send_header("Location", "http://127.0.0.1:9/elsewhere.png")
            self.end_headers()
        elif key not in ("Token secret", "Bearer short"):
            self.send_error(401)
        elif self.path == "/data/upload/1/a.png":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(picture())
        else:
            self.send_error(404)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200 if body == {"refresh": "a.b.c"} else 401)
        self.end_headers()
        self.wfile.write(b'{"access": "short"}')

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Server) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()
        thread.join()


@pytest.fixture
def client(detector: Detector, server: str) -> Iterator[Client]:  # noqa: F811
    made = Client(detector, label_studio=server, label_studio_key="secret")
    yield made
    made.close()


def _request(*addresses: str, config: str = BOXES) -> dict[str, Any]:
    """What Label Studio posts to /predict."""
    tasks = [{"id": 7 + i, "data": {"image": one}, "annotations": []} for i, one in enumerate(addresses)]
    return {
        "tasks": tasks,
        "model_version": None,
        "project": "1.1700000000",
        "label_config": config,
        "params": {"login": None, "password": None, "context": None},
    }


def _predict(client: Client, body: dict[str, Any]) -> Any:
    return client.ask("POST", "/label-studio/predict", json=body)


def test_it_connects(client: Client) -> None:
    assert client.ask("GET", "/label-studio/health").json()["status"] == "UP"
    setup = {"project": "1.1", "schema": BOXES, "hostname": "http://localhost:8080", "access_token": "x"}
    answer = client.ask("POST", "/label-studio/setup", json=setup)
    assert answer.status_code == 200 and answer.json()["model_version"].startswith("cascade-rcnn ")
    assert client.ask("POST", "/label-studio/webhook", json={"action": "ANNOTATION_CREATED"}).status_code == 201


def test_boxes_in_the_projects_own_labels(client: Client, detector: Detector) -> None:  # noqa: F811
    config = BOXES.replace('<Label value="Dog"/>', "")
    answer = _predict(client, _request("/data/upload/1/a.png", config=config))
    assert answer.status_code == 200
    (result,) = answer.json()["results"]
    found = detector.predict(picture())
    wanted = [one for one in found if one.names[0] == "cat"]
    assert 0 < len(wanted) == len(result["result"]) < len(found)  # dogs and eels are not asked for
    assert result["score"] == pytest.approx(min(float(one.scores[0]) for one in wanted))
    for region, one in zip(result["result"], wanted):
        assert (region["from_name"], region["to_name"], region["type"]) == ("boxes", "photo", "rectanglelabels")
        assert region["value"]["rectanglelabels"] == ["Katze"]
        assert (region["original_width"], region["original_height"]) == (120, 90)
        x, y, width, height = (region["value"][key] for key in ("x", "y", "width", "height"))
        assert -0.01 < x < x + width < 100.01 and -0.01 < y < y + height < 100.01
        if detector.config.model.masks == "none":
            assert x == pytest.approx(float(one.boxes[0, 0]) / 1.2, abs=1e-3)


def test_polygons_where_the_interface_has_them(client: Client) -> None:
    (result,) = _predict(client, _request("/data/upload/1/a.png", config=POLYGONS)).json()["results"]
    assert result["result"] and all(one["type"] == "polygonlabels" for one in result["result"])
    assert all(len(one["value"]["points"]) >= 3 and one["value"]["closed"] for one in result["result"])


def test_a_picture_that_is_missing_costs_its_own_task_only(client: Client, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = "/data/upload/1/a.png", "/data/upload/1/gone.png"
    results = _predict(client, _request(bad, good)).json()["results"]
    assert [bool(one["result"]) for one in results] == [False, True]
    assert "gone.png': Label Studio answers 404" in capsys.readouterr().err
    alone = _predict(client, _request(bad))
    assert alone.status_code == 422 and "gone.png" in alone.json()["detail"]


def test_pictures_count_among_what_requests_hold(
    detector: Detector,  # noqa: F811
    server: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ServeSettings, "max_held", 7 * 120 * 90)  # the pixels alone
    client = Client(detector, label_studio=server, label_studio_key="secret")
    try:
        answer = _predict(client, _request("/data/upload/1/a.png"))
        assert answer.status_code == 413 and "too large together" in answer.json()["detail"]
        assert "held_bytes 0.0" in client.ask("GET", "/metrics").text
    finally:
        client.close()


def test_keys(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"server": server, "max_bytes": 100_000, "allow_urls": False}
    path = "/data/upload/1/a.png"
    assert fetch_task_image(path, key="secret", **options) == picture()
    assert fetch_task_image(path, key="a.b.c", **options) == picture()
    with pytest.raises(UserError, match="answers 401; set LABEL_STUDIO_API_KEY to an access token"):
        fetch_task_image(path, key="", **options)
    with pytest.raises(UserError, match="LABEL_STUDIO_API_KEY: Label Studio does not take this token"):
        fetch_task_image(path, key="x.y.z", **options)
    with pytest.raises(UserError, match="more than 10 bytes"):
        fetch_task_image(path, key="secret", **{**options, "max_bytes": 10})


def test_what_is_no_address_is_said(server: str) -> None:
    with pytest.raises(UserError, match="not an address"):
        fetch_task_image("https://[", server=server, key="", max_bytes=1000, allow_urls=True)


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:9/a.png", "//127.0.0.1:9/a.png", "file:///etc/passwd", "s3://bucket/a.png"]
)
def test_the_key_goes_nowhere_else(server: str, address: str) -> None:
    seen = len(_Server.seen)
    with pytest.raises(UserError, match="not on the Label Studio server"):
        fetch_task_image(address, server=server, key="secret", max_bytes=1000, allow_urls=False)
    with pytest.raises(UserError, match="answers 302"):
        fetch_task_image("/moved.png", server=server, key="secret", max_bytes=1000, allow_urls=False)
    assert [path for path, _ in _Server.seen[seen:]] == ["/moved.png"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("", "not XML"),
        ("<View><Image name='i' value='$image'/></View>", "needs an Image tag and a RectangleLabels"),
        (
            BOXES.replace("Dog", "Horse").replace("cat", "cow"),
            r"\(Horse, Katze\).*\(cat, dog, eel\) have none in common",
        ),
        ("<!DOCTYPE x [<!ENTITY a 'b'>]>" + BOXES, "document type"),
    ],
)
def test_interfaces_that_do_not_fit_are_refused_in_one_line(client: Client, config: str, message: str) -> None:
    answer = _predict(client, _request("/data/upload/1/a.png", config=config))
    assert answer.status_code == 422
    with pytest.raises(UserError, match=message):
        shared_classes(read_interface(config), ("cat", "dog", "eel"), masks=True)
    assert "\n" not in answer.json()["detail"]


def test_a_detector_without_masks_needs_rectangles() -> None:
    with pytest.raises(UserError, match="PolygonLabels only"):
        shared_classes(read_interface(POLYGONS), ("cat",), masks=False)
    both = BOXES.replace("</View>", "") + POLYGONS.split('zoom="true"/>')[1]
    assert shared_classes(read_interface(both), ("cat",), masks=False) == ("rectangle", {0: "Katze"})
    assert shared_classes(read_interface(both), ("cat",), masks=True) == ("polygon", {0: "Katze"})


def test_nothing_is_offered_without_the_option(detector: Detector) -> None:  # noqa: F811
    plain = Client(detector)
    assert plain.ask("GET", "/label-studio/health").status_code == 404
    plain.close()
    with pytest.raises(ConfigError, match="label-studio 'localhost'"):
        ServeSettings(label_studio="localhost")


@pytest.mark.parametrize("body", ["[]", "nothing", '{"tasks": 3}', '{"tasks": [1]}', '{"tasks": [{"data": 3}]}'])
def test_other_bodies_are_refused(client: Client, body: str) -> None:
    answer = client.ask("POST", "/label-studio/predict", content=body)
    assert answer.status_code == 422 and answer.headers["content-type"] == "application/problem+json"


def test_basic_authentication_is_taken(detector: Detector, server: str) -> None:  # noqa: F811
    guarded = Client(detector, label_studio=server, api_key="k")
    assert guarded.ask("GET", "/label-studio/health").status_code == 401
    assert guarded.ask("GET", "/label-studio/health", auth=("anyone", "k")).status_code == 200
    guarded.close()
