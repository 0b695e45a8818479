"""Exported networks without torch: the same pixels in and the same detections out, to the bit, as with torch."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

pytest.importorskip("onnx", reason="needs pip install 'cascade-rcnn[onnx]'")
pytest.importorskip("onnxruntime", reason="needs pip install 'cascade-rcnn[onnx]'")

import cascade_rcnn
from cascade_rcnn.cli import main
from cascade_rcnn.config import ModelConfig
from cascade_rcnn.data.exact_resize import opencv_resized
from cascade_rcnn.errors import CheckpointError, UserError
from cascade_rcnn.inference.detector import load as load_with_torch
from cascade_rcnn.predict_without_torch import run_predict_without_torch
from cascade_rcnn.runtime.detector import load
from handmade_network import CLASSES, handmade_network
from locations import REPOSITORY


def _pictures(*sizes: tuple[int, int]) -> list[NDArray[np.uint8]]:
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


@pytest.fixture
def network(tmp_path: Path) -> Path:
    return handmade_network(tmp_path / "model.onnx")


VARIANTS: list[dict[str, Any]] = [
    {},
    {"size": (96, 128)},
    {"size": (128, 96), "batch": 2},
    {"model": ModelConfig(semantics="detectron2")},  # Pillow's resizing
    {"thresholds": {"cat": 0.6, "dog": 0.1}},
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_says_what_it_says_with_torch(tmp_path: Path, variant: dict[str, Any]) -> None:
    path = handmade_network(tmp_path / "model.onnx", **variant)
    ours, theirs = load(path, threads=1), load_with_torch(path)
    pictures = _pictures((96, 150), (300, 200), (77, 400), (96, 128), (31, 20))
    for one, other in zip(ours.predict(pictures, batch_size=3), theirs.predict(pictures, batch_size=3), strict=True):
        assert len(one) == len(other) > 1 and one.size == other.size and one.names == other.names
        for name in ("boxes", "scores", "labels", "mask_probs", "masks"):
            mine, his = getattr(one, name), getattr(other, name).numpy()
            assert isinstance(mine, np.ndarray) and mine.dtype == his.dtype and np.array_equal(mine, his), name
        assert one.to_coco() == other.to_coco() and one.polygons()[0][0].tolist() == other.polygons()[0][0].tolist()
        assert np.array_equal(np.asarray(one.draw()), np.asarray(other.draw())) and repr(one) == repr(other)


def test_pixels_are_prepared_as_with_torch(network: Path) -> None:
    pictures = _pictures((333, 500), (97, 96))
    pixels, sizes = load(network).prepare(pictures)
    batch = load_with_torch(network).prepare(pictures)
    assert np.array_equal(pixels, batch.pixels.numpy()) and np.array_equal(sizes, batch.sizes.numpy())


def test_detections_are_taken_as_tensors_are(network: Path) -> None:
    found = load(network).predict(_pictures((96, 150))[0])
    assert len(found) == 5 and found[0].names == ["cat"] and len(found[-2:]) == 2
    assert found[found.scores > 0.4].names == ["cat", "dog", "eel"] and [one.names for one in found][1] == ["dog"]
    for index in (7, [True], [0.5], "cat"):
        with pytest.raises(IndexError):
            found[index]  # type: ignore[index]
    assert found.enlarged(2).boxes[0, 0] == 2 * found.boxes[0, 0]


def test_settings(network: Path) -> None:
    pictures = _pictures((96, 150))
    assert len(load(network, max_detections=2).predict(pictures[0])) == 2
    assert len(load(network, score_threshold=0.6).predict(pictures)[0]) == 2
    assert "without PyTorch" in load(network, device="cpu", precision="auto").choices()
    for settings, words in (
        ({"max_detections": 1000}, "--model.max-detections 1000"),
        ({"stop_after_stage": 1}, "was exported with 3; export .* --model.stop-after-stage 1"),
        ({"device": "cuda"}, "device cuda: exported networks run on the CPU as they were written; drop it"),
    ):
        with pytest.raises(UserError, match=words):
            load(network, **settings)
    with pytest.raises(UserError, match="tile 96: tiles need PyTorch"):
        load(network).predict(pictures[0], tile=96)  # type: ignore[call-overload]
    whole = load(network).predict(pictures[0], overlap=0.1, whole=False)  # type: ignore[call-overload]
    assert np.array_equal(whole.boxes, load(network).predict(pictures[0]).boxes), "those go with tiles"
    with pytest.raises(TypeError, match="'overlapp'"):
        load(network).predict(pictures[0], overlapp=0.1)  # type: ignore[call-overload]


def test_what_needs_torch_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.pt2").write_bytes(b"")
    with pytest.raises(UserError, match=r"model\.pt2: needs PyTorch, which is not installed; export with --to onnx"):
        load(tmp_path / "model.pt2")
    with pytest.raises(CheckpointError, match="checkpoints need PyTorch"):
        load("runs/demo")
    path = handmade_network(tmp_path / "own.onnx", model=ModelConfig(semantics="torchvision"))
    with pytest.raises(UserError, match=r"PyTorch's own rule \(semantics torchvision\)"):
        load(path)


def test_both_commands_write_the_same(network: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    (photos / "more").mkdir(parents=True)
    for name, pixels in zip(("000000000007.png", "more/b.png"), _pictures((96, 150), (120, 90))):
        Image.fromarray(pixels).save(photos / name)
    (photos / "broken.jpg").write_bytes(b"none")
    assert main(["predict", str(network), str(photos), "--out", str(tmp_path / "with")]) == 0
    run_predict_without_torch(network, [photos], out=tmp_path / "without")
    first, second = tmp_path / "with", tmp_path / "without"
    names = [sorted(file.relative_to(out) for file in out.rglob("*")) for out in (first, second)]
    assert names[0] == names[1]
    for name in ("predictions.json", "drawings/more/b.png"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


@pytest.mark.parametrize("variant", [{}, {"size": (96, 128)}, {"size": (128, 96), "batch": 2}])
@pytest.mark.parametrize("size", [(96, 150), (300, 200), (77, 400), (500, 40)])
def test_the_lines_for_other_programs(
    variant: dict[str, Any], size: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of docs/export.md, as they stand there; OpenCV need not be installed."""

    def resize(image: NDArray[np.uint8], to: tuple[int, int], *, interpolation: int) -> NDArray[np.uint8]:
        return opencv_resized(image, (to[1], to[0]))

    def imread(path: str) -> NDArray[np.uint8]:
        return np.asarray(Image.open(path))[..., ::-1]

    monkeypatch.setitem(sys.modules, "cv2", SimpleNamespace(imread=imread, resize=resize, INTER_LINEAR=1))
    monkeypatch.chdir(tmp_path)
    Image.fromarray(_pictures(size)[0]).save("street.jpg")
    found = load(handmade_network(tmp_path / "model.onnx", **variant)).predict("street.jpg")
    text = (REPOSITORY / "docs" / "export.md").read_text(encoding="utf-8")
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "onnxruntime" in block]
    said: dict[str, Any] = {}
    exec(code, said)
    assert said["labels"] == found.names
    if "size" not in variant:  # where that is smaller, the picture may be a pixel larger or smaller in it
        assert np.array_equal(said["scores"], found.scores)
    np.testing.assert_allclose(said["scores"], found.scores, atol=1e-2)
    inside = np.clip(said["boxes"], 0, (size[1], size[0], size[1], size[0]))  # some end outside
    np.testing.assert_allclose(inside, found.boxes, atol=1e-3)


def test_videos_alone_are_refused_before_the_network_is_opened(tmp_path: Path) -> None:
    (tmp_path / "street.mp4").write_bytes(b"frames")
    with pytest.raises(UserError, match="only videos are given: they need PyTorch"):
        run_predict_without_torch(tmp_path / "absent.onnx", [tmp_path], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


_BLOCKED = """
import sys
# what is not there after pip install --no-deps cascade-rcnn && pip install numpy pillow onnxruntime
for name in "torch torchvision timm safetensors faster_coco_eval rich yaml scipy onnx onnxscript".split():
    sys.modules[name] = None
import numpy, cascade_rcnn
from cascade_rcnn.cli import main
found = cascade_rcnn.load("model.onnx").predict("photo.png")
assert isinstance(found, cascade_rcnn.Detections) and isinstance(found.boxes, numpy.ndarray)
assert found.masks.shape == (5, 120, 160)
found.save("drawn.jpg")
assert main(["predict", "model.onnx", "photo.png", "--out", "out"]) == 0
assert main(["predict", "model.onnx", "photo.png", "--out", "tiles", "--tile", "96"]) == 2
assert main(["predict", "best.safetensors", "photo.png", "--out", "none"]) == 2
assert main(["predict", "model.onnx", "photo.png", "--out", "rings", "--polygons"]) == 2
assert main(["evaluate", "model.onnx", "--data", "."]) == 2
assert main(["predict", "--help"]) == 0
"""


def test_all_of_it_without_the_packages(network: Path, tmp_path: Path) -> None:
    Image.fromarray(_pictures((120, 160))[0]).save(tmp_path / "photo.png")
    package = str(Path(cascade_rcnn.__file__).resolve().parents[1])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", _BLOCKED],
        cwd=tmp_path,
        text=True,
        capture_output=True,
        timeout=120,
        env={"PYTHONPATH": package, "PATH": ""},
    )
    assert done.returncode == 0, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 4 and done.stderr.count("\n") == 4, done.stderr
    for line, word in zip(
        errors, ("--tile needs PyTorch", "checkpoints need PyTorch", "scipy", "'evaluate' needs PyTorch")
    ):
        assert word in line
    with_torch = load_with_torch(network).predict(tmp_path / "photo.png")
    written = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [one["score"] for one in written] == with_torch.scores.tolist()
    assert [one["segmentation"] for one in written] == [one["segmentation"] for one in with_torch.to_coco()]
    assert [one["category"] for one in written] == [CLASSES[label] for label in with_torch.labels.tolist()]


def _code_of_the_page(about: str) -> list[str]:
    """The blocks of Python under a heading of docs/export.md, about street.png."""
    section = (
        (REPOSITORY / "docs" / "export.md").read_text(encoding="utf-8").split(f"\n## {about}\n")[1].split("\n## ")[0]
    )
    return [
        block.replace("street.jpg", "street.png") for block in re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    ]


@pytest.mark.parametrize("variant", [{}, {"size": (128, 96), "batch": 2}])
def test_the_lines_for_another_program_find_the_same(
    variant: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cv2", reason="the page resizes with it")
    monkeypatch.chdir(tmp_path)
    path = handmade_network(tmp_path / "model.onnx", **variant)
    (pixels,) = _pictures((75, 120))
    Image.fromarray(pixels).save("street.png")
    ours = load(path).predict("street.png")
    onnx_code, mask_code, openvino_code = _code_of_the_page("In another program")
    names: dict[str, Any] = {}
    exec(onnx_code + mask_code, names)
    assert np.allclose(names["boxes"].clip(0, (120, 75) * 2), ours.boxes, atol=1e-3)
    assert np.array_equal(names["scores"], ours.scores) and names["labels"] == [CLASSES[label] for label in ours.labels]
    inside = (names["boxes"] == names["boxes"].clip(0, (120, 75) * 2)).all(axis=1)
    assert inside.sum() > 1
    for row in np.flatnonzero(inside):
        assert (names["masks"][row] == ours.masks[row]).mean() > 0.999

    pytest.importorskip("openvino")
    from cascade_rcnn.export.network import write_openvino
    from cascade_rcnn.runtime.network import RuntimeNetwork

    write_openvino(path, tmp_path / "model.xml", RuntimeNetwork(path).info)
    found = names["found"]
    exec(openvino_code, names)
    assert names["about"]["class_names"] == list(CLASSES)
    assert np.allclose(names["found"]["boxes"], found["boxes"], atol=1e-4)
