"""The seeded ResNet-50 cascades of mmdetection (tests/models/test_parity.py), exported at their usual size: minutes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import locations
from cascade_rcnn.convert.checkpoint import run_convert
from cascade_rcnn.export import report
from cascade_rcnn.export.command import run_export
from cascade_rcnn.export.report import match
from cascade_rcnn.inference.detector import load

DATA = locations.FIXTURES / "parity"
sys.path.insert(0, str(DATA))
from seeded_weights import seeded_state_dict  # noqa: E402

CASES = [
    ("mmdet_cascade_rcnn_r50_fpn", "onnx", (800, 1088)),
    ("mmdet_cascade_mask_rcnn_r50_fpn", "onnx", (800, 1088)),
    ("mmdet_cascade_rcnn_r50_fpn", "openvino", None),
    ("mmdet_cascade_mask_rcnn_r50_fpn", "openvino", (800, 1088)),
    ("mmdet_cascade_rcnn_r50_fpn", "torch", (800, 1088)),
    ("mmdet_cascade_mask_rcnn_r50_fpn", "torch", (800, 1088)),
]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("name", "to", "size"), CASES)
def test_seeded_cascades_equal_pytorch(
    name: str, to: str, size: tuple[int, int] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "IMAGES", 2)
    monkeypatch.setattr(report, "ROUNDS", 1)  # what it takes is measured elsewhere
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime" if to == "onnx" else to)
    manifest = json.loads((DATA / f"{name}.manifest.json").read_text())
    state = {key: torch.from_numpy(value) for key, value in seeded_state_dict(manifest).items()}
    torch.save({**manifest.get("wrapper", {}), manifest["state_key"]: state}, tmp_path / "seeded.pth")
    checkpoint = tmp_path / "converted.safetensors"
    run_convert(tmp_path / "seeded.pth", checkpoint)
    (tmp_path / "seeded.pth").unlink()
    folder = run_export(checkpoint, to=to, size=size)
    equality = json.loads((folder / "report.json").read_text())["equality"]
    assert equality["matched"] >= 0.99 * equality["detections"] > 0
    assert equality.get("mask_iou_mean", 1.0) > 0.99
    pixels = np.array(Image.open(DATA / "synthetic.png").convert("RGB"))
    one, other = load(folder).predict(pixels), load(checkpoint, device="cpu").predict(pixels)
    assert len(match(one, other)) >= 0.99 * max(len(one), len(other)) > 0
