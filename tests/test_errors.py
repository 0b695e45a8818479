"""What people get wrong: each is one line that names the file, the value and the way out, with exit code 2 and nothing
written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from cascade_rcnn.checkpoint import save_checkpoint
from cascade_rcnn.cli import main
from cascade_rcnn.config import Config, DataConfig, ModelConfig
from cascade_rcnn.data.synthetic_shapes import generate_shapes
from cascade_rcnn.models.build import build_model

TINY = Config(
    model=ModelConfig(backbone="resnet18", pretrained=False, fpn_channels=8, head_channels=8),
    data=DataConfig(short_side=(64,), long_side=96, workers=0),
)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate_shapes(tmp_path_factory.mktemp("shapes") / "data", train_images=4, val_images=2, size=64)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trained") / "best.safetensors"
    save_checkpoint(path, build_model(TINY.model, 2).state_dict(), config=TINY, class_names=("cat", "dog"))
    return path


@pytest.fixture
def place(tmp_path: Path, shapes: Path, trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a data set, a checkpoint, an image and a result of earlier work, which is where one stands."""
    shutil.copytree(shapes, tmp_path / "data")
    os.link(trained, tmp_path / "best.safetensors")
    Image.new("RGB", (64, 64)).save(tmp_path / "photo.png")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "earlier.txt").write_text("earlier work", encoding="utf-8")
    (tmp_path / "none.json").write_text("[]", encoding="utf-8")
    (tmp_path / "empty").mkdir()
    (tmp_path / "recipe.py").write_text(
        f"from cascade_rcnn.config import Config, DataConfig, ModelConfig, TrainConfig\nconfig = {TINY!r}\n",
        encoding="utf-8",
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def refused(place: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must fail as a mistake of the user; returns its line."""

    def run(*words: str) -> str:
        before = _contents(place)
        capsys.readouterr()
        assert main(words) == 2
        error = capsys.readouterr().err
        lines = [line for line in error.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and error.endswith(lines[0] + "\n"), error
        assert "Traceback" not in error and before.items() <= _contents(place).items()
        return lines[0]

    return run


def _contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file: writing the same again would show too."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def _annotations(place: Path, split: str = "train") -> Path:
    (path,) = [path for path in (place / "data").rglob("*.json") if split in path.name]
    return path


def _change(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    values = json.loads(path.read_text(encoding="utf-8"))
    change(values)
    path.write_text(json.dumps(values), encoding="utf-8")


def _says(line: str, *parts: str) -> None:
    assert [part for part in parts if part not in line] == [], line


TRAIN = ("train", "recipe.py", "--data", "data", "--out", "out")


@pytest.mark.parametrize(
    "words",
    [
        ("train", "recipe.py", "--data", "nowhere", "--out", "out"),
        ("train", "nowhere.py", "--data", "data", "--out", "out"),
        ("check", "nowhere"),
        ("evaluate", "nowhere.safetensors", "--data", "data", "--out", "out/metrics.json"),
        ("evaluate", "best.safetensors", "--data", "nowhere", "--out", "out/metrics.json"),
        ("predict", "nowhere.safetensors", "photo.png", "--out", "out"),
        ("predict", "best.safetensors", "nowhere.png", "--out", "out"),
        ("score", "--format", "coco", "--truth", "nowhere.json", "--results", "none.json", "--out", "out/m.json"),
        ("convert", "nowhere.pth", "out/new.safetensors"),
        ("convert-data", "nowhere", "out/new", "--to", "coco"),
        ("config", "nowhere.py"),
    ],
    ids=" ".join,
)
def test_what_is_not_there_is_named(words: tuple[str, ...], refused: Callable[..., str]) -> None:
    _says(refused(*words), "nowhere")


@pytest.mark.parametrize(
    "words",
    [
        ("train", "recipe.py", "--data", "empty", "--out", "out"),
        ("check", "empty"),
        ("evaluate", "best.safetensors", "--data", "empty"),
        ("predict", "best.safetensors", "empty", "--out", "out"),
        ("predict", "empty", "photo.png", "--out", "out"),
        ("train", "empty", "--data", "data", "--out", "out"),
        ("convert-data", "empty", "out/new", "--to", "coco"),
        ("score", "--format", "voc", "--truth", "empty", "--results", "empty"),
        ("score", "--format", "kitti", "--truth", "empty", "--results", "empty"),
        ("score", "--format", "widerface", "--truth", "empty", "--results", "empty"),
    ],
    ids=" ".join,
)
def test_an_empty_folder_is_named(words: tuple[str, ...], refused: Callable[..., str]) -> None:
    _says(refused(*words), "empty")


WRONG_JSON = ["", "{", "[]", "3", '{"images": 3, "annotations": [], "categories": []}', "\x00"]


@pytest.mark.parametrize("text", WRONG_JSON)
@pytest.mark.parametrize("command", ["train", "score"])
def test_wrong_json_names_the_file(text: str, command: str, place: Path, refused: Callable[..., str]) -> None:
    path = _annotations(place)
    path.write_text(text, encoding="utf-8")
    score = ("score", "--format", "coco", "--truth", str(path), "--results", "none.json")
    _says(refused(*(TRAIN if command == "train" else score)), path.name)


@pytest.mark.parametrize("text", WRONG_JSON)
def test_wrong_json_is_in_the_report_of_check(text: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _annotations(place)
    path.write_text(text, encoding="utf-8")
    assert main(["check", "data"]) == 1
    assert path.name in capsys.readouterr().out.replace("\n", "")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "earlier work",
        '[{"image_id": 1}]',
        '[{"image_id": 1, "category_id": 1, "bbox": [0, 0, "x", 1], "score": 1}]',
        '[{"image_id": 1, "category_id": 1, "bbox": [0, 0, 1], "score": 1}]',
    ],
)
def test_wrong_results_name_the_file(text: str, place: Path, refused: Callable[..., str]) -> None:
    (place / "results.json").write_text(text, encoding="utf-8")
    truth = str(_annotations(place))
    _says(refused("score", "--format", "coco", "--truth", truth, "--results", "results.json"), "results.json")


def test_an_unknown_category_names_file_and_id(place: Path, refused: Callable[..., str]) -> None:
    path = _annotations(place)
    _change(path, lambda values: values["annotations"][0].update(category_id=97))
    _says(refused(*TRAIN), path.name, "97", "--fix")


def test_degenerate_boxes_everywhere_leave_nothing_to_train_on(place: Path, refused: Callable[..., str]) -> None:
    def empty_all(values: dict[str, Any]) -> None:
        for annotation in values["annotations"]:
            annotation.update(bbox=[5, 5, 0, 0], segmentation=[])

    path = _annotations(place)
    _change(path, empty_all)
    _says(refused(*TRAIN), "data")


@pytest.mark.parametrize("box", [[float("nan"), 0, 5, 5], [0, 0, 5], None, ["a", 0, 5, 5]])
def test_a_box_that_is_none_names_file_and_annotation(box: Any, place: Path, refused: Callable[..., str]) -> None:
    path = _annotations(place)
    _change(path, lambda values: values["annotations"][0].update(bbox=box, segmentation=[]))
    _says(refused(*TRAIN), path.name)


@pytest.mark.parametrize(
    "content", [b"", b"no image", b"\x89PNG\r\n\x1a\n" + bytes(50)], ids=["empty", "text", "header only"]
)
def test_a_corrupted_image_is_named_and_earlier_predictions_stay(
    content: bytes, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "photo.png").write_bytes(content)
    (place / "out" / "predictions.json").write_text("earlier work", encoding="utf-8")
    assert main(["predict", "best.safetensors", "photo.png", "--out", "out"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and "photo.png" in error
    assert (place / "out" / "predictions.json").read_text(encoding="utf-8") == "earlier work"


def test_a_data_set_of_corrupted_images_does_not_train(place: Path, refused: Callable[..., str]) -> None:
    images = [path for path in (place / "data").rglob("*") if path.suffix in (".png", ".jpg")]
    for path in images:
        path.write_bytes(path.read_bytes()[:40])
    _says(refused(*TRAIN), "data")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--train.epochz", "3"), ("--train.epochz", "did you mean --train.epochs")),
        (("--train.epochs", "many"), ("--train.epochs", "many", "a whole number")),
        (("--model.stage-ious", "1.5"), ("model.stage_ious", "1.5")),
        (("--data.train", "trian"), ("trian", "train")),
    ],
)
def test_a_wrong_override_names_option_and_value(
    words: tuple[str, ...], said: tuple[str, ...], refused: Callable[..., str]
) -> None:
    _says(refused(*TRAIN, *words), *said)


def _foreign_safetensors(path: Path) -> None:
    save_file({"backbone.conv1.weight": torch.zeros(2, 2)}, path)


def _pickle(path: Path) -> None:
    torch.save({"state_dict": {"backbone.conv1.weight": torch.zeros(2, 2)}}, path)


def _text(path: Path) -> None:
    path.write_text("not a checkpoint", encoding="utf-8")


def _half(path: Path) -> None:
    content = Path("best.safetensors").read_bytes()
    path.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth"])
@pytest.mark.parametrize("write", [_foreign_safetensors, _pickle, _text, _half])
@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_a_checkpoint_of_another_kind_is_named(
    write: Callable[[Path], None], name: str, command: str, place: Path, refused: Callable[..., str]
) -> None:
    write(place / name)
    rest = ("photo.png", "--out", "out") if command == "predict" else ("--data", "data", "--out", "out/metrics.json")
    line = refused(command, name, *rest)
    _says(line, name)
    if name.endswith(".pth"):
        _says(line, "cascade-rcnn convert")


@pytest.mark.parametrize("write", [_foreign_safetensors, _pickle, _text])
def test_what_cannot_be_converted_is_named_and_writes_nothing(
    write: Callable[[Path], None], place: Path, refused: Callable[..., str]
) -> None:
    write(place / "model.pth")
    _says(refused("convert", "model.pth", "out/new.safetensors"), "model.pth")


def test_classes_of_checkpoint_and_data_that_differ_are_both_shown(refused: Callable[..., str]) -> None:
    _says(refused("evaluate", "best.safetensors", "--data", "data"), "cat", "dog", "circle")


def test_training_does_not_overwrite_an_earlier_run(place: Path, refused: Callable[..., str]) -> None:
    shutil.copy(place / "best.safetensors", place / "out" / "last.safetensors")
    _says(refused(*TRAIN), "out", "--resume")
