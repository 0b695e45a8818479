"""Published networks with other norms give their library's detections (tests/fixtures/parity).

mmdetection's GN with weight standardisation; detectron2's new baselines: batch norm in FPN, box head and mask head.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

import locations
from cascade_rcnn.convert.checkpoint import run_convert
from cascade_rcnn.inference.detector import load

DATA = locations.FIXTURES / "parity"
sys.path.insert(0, str(DATA))
from seeded_weights import seeded_state_dict  # noqa: E402

NAMES = {
    "mmdet_faster_rcnn_r50_fpn_gn_ws_all": "faster_rcnn_r50_fpn_gn_ws-all_1x_coco.pth",
    "detectron2_new_baselines_mask_rcnn_R_50_FPN_LSJ": "model_final_bb69de.pkl.pth",
}


@pytest.mark.parametrize("name", NAMES)
def test_detections_and_masks_equal_the_reference(tmp_path: Path, name: str) -> None:
    manifest = json.loads((DATA / f"{name}.manifest.json").read_text(encoding="utf-8"))
    state = {key: torch.from_numpy(value) for key, value in seeded_state_dict(manifest).items()}
    source, dest = tmp_path / NAMES[name], tmp_path / "ours.safetensors"
    torch.save({**manifest.get("wrapper", {}), manifest["state_key"]: state}, source)
    run_convert(source, dest)
    reference = np.load(DATA / f"{name}.npz")
    found = load(dest, device="cpu").predict(DATA / "synthetic.png")
    boxes, scores, labels = (torch.from_numpy(reference[key]) for key in ("boxes", "scores", "labels"))
    iou, index = (box_iou(boxes, found.boxes) * (labels[:, None] == found.labels)).max(dim=1)
    matched = (iou > 0.99) & ((scores - found.scores[index]).abs() < 1e-3)
    assert matched.sum() >= 99  # at the cap of 100 detections the last may swap with the next
    if "masks_packed" not in reference:
        assert found.masks is None
        return
    count, height, width = reference["mask_shape"].tolist()
    wanted = np.unpackbits(reference["masks_packed"], axis=1)[:, : height * width].reshape(count, height, width)
    assert found.masks is not None
    ours, wanted = found.masks[index][matched].numpy(), wanted[matched.numpy()].astype(bool)
    assert (ours != wanted).sum() / (ours | wanted).sum() < 0.005
