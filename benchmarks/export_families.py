"""Networks of each family, exported and compared with PyTorch: the table in docs/export.md.

    python3 benchmarks/export_families.py [--out FOLDER] [WORD ...]

Weights are random (seed 0), pictures are generated; the exports and their reports stay in FOLDER. With words, only the
rows that have one of them. A row takes from half a minute to some minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from cascade_rcnn.checkpoint import save_checkpoint
from cascade_rcnn.config import Config, DataConfig, ModelConfig
from cascade_rcnn.errors import UserError
from cascade_rcnn.export.command import run_export
from cascade_rcnn.models.build import build_model
from cascade_rcnn.models.cascade_rcnn import CascadeRCNN

SIZE = (96, 160)
BOTH = ("onnx", "openvino")
NARROW: dict[str, Any] = {"backbone": "test_resnet", "fpn_channels": 64, "head_channels": 128, "mask_channels": 32}
ONE_STAGE: dict[str, Any] = {"stage_ious": (0.5,), "class_agnostic_boxes": False}


@dataclass(frozen=True)
class Row:
    """A network, and what it is exported to."""

    name: str
    model: dict[str, Any] = field(default_factory=dict)
    formats: tuple[str, ...] = BOTH
    size: tuple[int, int] | None = SIZE
    batch: int | None = None
    classes: int = 8
    spread: float = 20.0  # of outputs; less where many scores would be 0 or 1, and rounding break their ties


ROWS = [
    Row(
        "ConvNeXt (atto), output norms, four convolutions with batch norm, boxes by class, masks at every stage",
        {"backbone": "convnext_atto", "output_norms": True, "box_head": "4conv1fc_bn", "norm": "batch"}
        | {"class_agnostic_boxes": False, "masks": "every", "frozen_stages": -1},
        size=None,
    ),
    Row(
        "RegNetX (200 MF), heads with group norm, seesaw loss",
        {"backbone": "regnetx_002", "box_head": "4conv1fc_gn", "class_loss": "seesaw"},
        size=None,
    ),
    Row(
        "Swin-T, output norms", {"backbone": "swin_tiny_patch4_window7_224", "output_norms": True, "frozen_stages": -1}
    ),
    Row(
        "semantics torchvision, one stage, boxes by class, NMS of all classes, masks",
        ONE_STAGE | {"semantics": "torchvision", "nms": "agnostic", "masks": "every"},
        size=None,
    ),
    Row(
        "semantics detectron2, focal loss, two of three stages, masks at every stage, 300 detections",
        {"semantics": "detectron2", "class_loss": "focal", "stop_after_stage": 2, "masks": "every"}
        | {"max_detections": 300},
        spread=1.5,
    ),
    Row(
        "ResNet-26 with deformable convolutions (modulated)",
        {"backbone": "resnet26", "deformable": "modulated"},
        formats=("torch",),
    ),
    Row(
        "semantics detectron2, focal loss",
        {"semantics": "detectron2", "class_loss": "focal"},
        formats=("torch",),
        spread=1.5,
    ),
    Row(
        "ResNet-26, style caffe, one mask head, two at once",
        {"backbone": "resnet26", "style": "caffe", "masks": "one"},
        formats=("onnx",),
        batch=2,
    ),
    Row("one class, one stage, boxes by class", ONE_STAGE, classes=1),
    Row(
        "one class, 300 detections, score threshold 0, masks",
        {"max_detections": 300, "score_threshold": 0.0, "masks": "every"},
        formats=("onnx",),
        size=None,
        classes=1,
    ),
    Row(
        "1,203 classes, boxes by class, 300 detections, three at once",
        {"class_agnostic_boxes": False, "max_detections": 300, "score_threshold": 0.0},
        formats=("onnx",),
        batch=3,
        classes=1203,
    ),
    Row(
        "semantics torchvision, one stage, masks",
        ONE_STAGE | {"semantics": "torchvision", "masks": "every"},
        ("torch",),
    ),
    Row(
        "ResNet-50, masks at every stage, usual widths",
        {"backbone": "resnet50", "masks": "every", "fpn_channels": 256, "head_channels": 1024, "mask_channels": 256},
    ),
]


def measure(row: Row, folder: Path) -> None:
    """Export to each format, and print what of PyTorch's detections comes back."""
    model = ModelConfig(**NARROW | {"pretrained": False} | row.model)
    config = Config(model=model, data=DataConfig(short_side=(96,), long_side=160))
    network = _random(model, row.classes, row.spread)
    checkpoint = folder / "network.safetensors"
    names = [f"class {number}" for number in range(row.classes)]
    save_checkpoint(checkpoint, network.state_dict(), config=config, class_names=names)
    for to in row.formats:
        try:
            out = run_export(checkpoint, to=to, out=folder / to, size=row.size, batch=row.batch)
        except UserError as error:
            said = f"refused: {error}"
        else:
            found = json.loads((out / "report.json").read_text(encoding="utf-8"))["equality"]
            masks = f", IoU of masks {found['mask_iou_mean']:.5f}" if "mask_iou_mean" in found else ""
            said = f"{found['matched']} of {found['detections']}{masks}"
        size = f"{row.size[0]} x {row.size[1]}" if row.size else "any"
        print(f"| {row.name} | {size} | {to} | {said} |", flush=True)


def _random(model: ModelConfig, classes: int, spread: float) -> CascadeRCNN:
    """Initial weights, with outputs that tell boxes apart: scores spread, boxes move."""
    torch.manual_seed(0)
    network = build_model(model, classes).eval()
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if name.endswith(("classifier.weight", "deltas.weight", "objectness.weight", "logits.weight")):
                weight.mul_(spread)
    return network


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--out", type=Path, default=Path("runs/export_families"))
    options = parser.parse_args()
    for number, row in enumerate(ROWS):
        if not options.words or any(word in row.name for word in options.words):
            folder = options.out / str(number)
            folder.mkdir(parents=True, exist_ok=True)
            measure(row, folder)


if __name__ == "__main__":
    main()
