"""A NAME wherever a command takes a checkpoint; a wrong one, and no network, are one line each."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import locations
from brought import NAMES, SPLITS, coco, write_json
from cascade_rcnn.checkpoint import load_checkpoint
from cascade_rcnn.cli import main
from cascade_rcnn.convert.checkpoint import run_convert
from cascade_rcnn.errors import UserError
from cascade_rcnn.models.cascade_rcnn import CascadeRCNN
from cascade_rcnn.zoo import download
from foreign_checkpoints import small_state
from loopback import Server, use_list

NAME = "cascade_mask_rcnn_small_1x_cats"
CLASSES = (*NAMES, "eel")

COMMANDS: dict[str, list[str]] = {
    "predict": ["predict", NAME, "data/val/011.jpg", "--out", "found"],
    "evaluate": ["evaluate", NAME, "--data", "data"],
    "analyze": ["analyze", NAME, "--data", "data", "--out", "report"],
    "analyze two": ["analyze", "two.safetensors", NAME, "--data", "data", "--out", "report", "--resamples", "2"],
    "check": ["check", "data", "--model", NAME, "--out", "labels"],
    "export": ["export", NAME, "--to", "torch", "--out", "exported"],
    "serve": ["serve", NAME],
    "config": ["config", NAME],
    "convert": ["convert", NAME, "mine.safetensors"],
    "convert --classes-from": ["convert", "small.pth", "mine.safetensors", "--classes-from", NAME],
    "train": ["train", "recipe.py", "--data", "data", "--out", "run", "--train.init", NAME],
}


_SMALL_PICTURES = "test_pipeline = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=(160, 120))]\n"


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("published") / "small.pth"
    torch.manual_seed(0)
    torch.save({"state_dict": small_state(), "meta": {"CLASSES": CLASSES, "cfg": _SMALL_PICTURES}}, path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def converted(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("converted")
    (folder / "small.pth").write_bytes(content)
    run_convert(folder / "small.pth", folder / "two.safetensors")
    return (folder / "two.safetensors").read_bytes()


@pytest.fixture
def server(content: bytes) -> Iterator[Server]:
    made = Server(content)
    yield made
    made.close()


@pytest.fixture
def place(server: Server, converted: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to work in: data, a recipe, the list with the server's file, an empty cache."""
    digest = hashlib.sha256(server.content).hexdigest()
    entry: dict[str, Any] = {
        "name": NAME,
        "library": "mmdetection",
        "url": f"{server.address}/small_{digest[:8]}.pth",
        "hash": digest[:8],
        "hash_of": "sha256",
        "box_ap": 41.2,
        "mask_ap": 35.9,
        "license": "Apache-2.0",
        "source": "made here",
    }
    for split, seeds in SPLITS.items():
        write_json(
            tmp_path / f"data/annotations/instances_{split}.json", coco(tmp_path / "data" / split, seeds, names=CLASSES)
        )
    (tmp_path / "recipe.py").write_text(
        "from cascade_rcnn.config import *\n"
        "config = Config(model=ModelConfig(backbone='resnet18', pretrained=False, masks='every', fpn_channels=32,\n"
        "    head_channels=16, mask_channels=32), data=DataConfig(short_side=(96,), long_side=128),\n"
        "    train=TrainConfig(batch_size=1, max_steps=1))\n"
    )
    (tmp_path / "small.pth").write_bytes(server.content)
    (tmp_path / "two.safetensors").write_bytes(converted)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CASCADE_RCNN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CASCADE_RCNN_MIRROR", raising=False)
    monkeypatch.setattr(download.time, "sleep", lambda _: None)
    with use_list(tmp_path / "list.json", entry):
        yield tmp_path


def _run(command: str, name: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    if command.startswith("analyze"):
        pytest.importorskip("matplotlib", reason="needs pip install 'cascade-rcnn[plots]'")
    code = main([name if word == NAME else word for word in COMMANDS[command]])
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.mark.parametrize("command", COMMANDS)
def test_a_wrong_name_gets_the_nearest_in_one_line_and_nothing_is_written(
    command: str, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cascade_rcnn.analysis.stages.run_stages", None)  # nothing is measured before
    before = sorted(place.rglob("*"))
    code, _, said = _run(command, NAME.replace("small", "smal"), capsys)
    assert code == 2
    nearest = NAME if command != "config" else "cascade_mask_rcnn_r50_fpn_1x_coco"  # of the recipes
    assert said.count("\n") == 1 and f"did you mean {nearest}" in said and NAME in said, said
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize("command", COMMANDS)
def test_offline_is_one_line_with_address_and_place(
    command: str, place: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    server.http.server_close()
    server.http.socket.close()
    code, _, said = _run(command, NAME, capsys)
    assert code == 2
    lines = [line for line in said.splitlines() if not line.startswith(("downloading", f"{NAME}: weights by"))]
    assert len(lines) == 1 and server.address in lines[0] and "CASCADE_RCNN_MIRROR" in lines[0], said
    (file,) = re.findall(r"put it at (\S+),", lines[0])
    if command == "config":
        shutil.copy(place / "small.pth", file)
        assert _run(command, NAME, capsys)[0] == 0, "the place that the line names is the right one"
    assert not (place / "run").exists() and not (place / "mine.safetensors").exists()


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ("config", "convert --classes-from")])
def test_a_wrong_name_is_refused_before_torch_is_imported(command: str, place: Path) -> None:
    words = ["wrong_name_of_weights" if word == NAME else word for word in COMMANDS[command]]
    program = (
        "import sys; from cascade_rcnn.cli import main\n"
        f"assert main({words!r}) == 2\nassert 'torch' not in sys.modules and 'torchvision' not in sys.modules"
    )
    environment = os.environ | {"PYTHONPATH": str(locations.REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, cwd=place)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("error: wrong_name_of_weights: neither a file nor the name of published weights")


_SLOW = [pytest.param(word, marks=pytest.mark.slow if word in ("export", "analyze") else []) for word in COMMANDS]


@pytest.mark.parametrize("command", _SLOW)
def test_a_name_is_taken(
    command: str, place: Path, server: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if command == "serve":
        uvicorn = pytest.importorskip("uvicorn")
        monkeypatch.setattr(uvicorn.Server, "run", lambda self: setattr(self, "started", True))
    code, out, said = _run(command, NAME, capsys)
    assert code == 0, said
    assert len(server.requests) == 1
    assert f"{NAME}: weights by mmdetection; licence: Apache-2.0" in said
    if command == "evaluate":
        assert "bbox AP: " in out and " here, 41.2 published by mmdetection (COCO)" in out
        assert "segm AP: " in out and " here, 35.9 published by mmdetection (COCO)" in out
    if command == "train":
        assert f"weights of {NAME}; classes that it knows already: cat, dog, eel" in out + said
    if command.startswith("convert"):
        one, other = load_checkpoint("mine.safetensors"), load_checkpoint("two.safetensors")
        assert one.class_names == other.class_names and one.config == other.config
        assert all(torch.equal(one.state[key], other.state[key]) for key in other.state)
        assert not list((place / "cache").rglob("*.pth"))


def test_an_export_begins_with_a_name(
    place: Path, server: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``test_a_name_is_taken`` goes on to its end, which takes minutes."""

    def stop(model: CascadeRCNN, **_: object) -> None:
        raise UserError("tracing")

    monkeypatch.setattr("cascade_rcnn.export.network.trace", stop)
    code, _, said = _run("export", NAME, capsys)
    assert code == 2 and said.splitlines()[-1] == "error: tracing"


@pytest.mark.parametrize("command", ["train", "benchmark --config", "check data --config"])
def test_published_weights_are_no_recipe(command: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.split(), NAME]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith(f"error: {NAME}: published weights, not a recipe"), said
    assert f"--train.init {NAME}" in said and f"cascade-rcnn config {NAME}" in said


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            "config faster_rcnn_r50_fpn_2x_cocoo",
            ["did you mean faster_rcnn_r50_fpn_1x_coco", "published weights are called faster_rcnn_r50_fpn_2x_coco"],
        ),
        ("config swin_tiny", ["published weights are called swin_mask_rcnn_swin_tiny_patch4_window7"]),
        ("train cascade_rcnn_r50_fpn_1x_coc", ["did you mean cascade_rcnn_r50_fpn_1x_coco", "lists all names\n"]),
        ("train configs/cascade_rcnn_r50_dcn.py", ["no such config file", "lists all names\n"]),
        (
            "train cascade_rcnn_r50_fpn_1x_coco_20200316-3dc56deb",
            ["'cascade-rcnn train cascade_rcnn_r50_fpn_1x_coco' is the recipe of that training"],
        ),
        (
            "train mask_rcnn_r50_fpn_2x_coco",
            ["cascade-rcnn config mask_rcnn_r50_fpn_2x_coco > mine.py", "--train.init mask_rcnn_r50_fpn_2x_coco'"],
        ),
        ("train mask_rcnn_r50_fpn_carafe_1x_coco", ["cannot be loaded", "(CARAFE upsampling)"]),
        ("evaluate cascade_mask_rcnn_swin_s --data x", ["did you mean swin_cascade_mask_rcnn_swin_small_patch4_win"]),
        ("evaluate finetune --data x", ["a recipe whose weights nobody has published; 'cascade-rcnn train finetune"]),
    ],
)
def test_a_word_of_the_other_list_says_what_to_do_with_it(
    words: str, told: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words.split()) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("error: ") and all(part in said for part in told), said
    if "--train.init" not in "".join(told):
        assert "--train.init mask" not in said


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("swinn", "did you mean swin?"),
        ("detr", "'cascade-rcnn models' lists all of them"),
        ("faster_rcnn_r50_fpn_2x_cocoo", "did you mean faster_rcnn_r50_fpn_2x_coco or"),
    ],
)
def test_a_word_that_no_name_has_gets_the_nearest(word: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", word]) == 2
    assert capsys.readouterr().err.startswith(f"error: no published weights have '{word}' in their name; {told}")


def test_only_the_word_that_no_name_has_is_corrected(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "r50", "casacde"]) == 2
    assert "did you mean r50 cascade?" in capsys.readouterr().err


def test_a_conversion_of_a_name_takes_what_one_of_a_file_takes(
    place: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["convert", NAME, "mine.safetensors", "--classes", "ant", "bee", "cow"]
    assert main(words) == 0
    assert load_checkpoint("mine.safetensors").class_names == ("ant", "bee", "cow")


def test_a_name_that_is_too_long_is_one_line(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "a" * 300, "data/val/011.jpg"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "name too long" in said


@pytest.mark.parametrize("dash", ["\u2013", "\u2014", "\u2212"])
def test_a_long_dash_from_a_web_page_is_named(dash: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "cascade_rcnn_r50_fpn_1x_coco", "street.jpg", f"{dash}out", "found"]) == 2
    said = capsys.readouterr().err
    assert said == f"error: {dash}out begins with a long dash instead of two hyphens: write --out\n"
