"""What each stage of a trained cascade does to the boxes (the paper's figures 1 and 4), on a data set.

    python3 benchmarks/cascade.py RUN DATA [SPLIT]

Prints the share of boxes that overlap some object by an IoU of at least 0.5 ... 0.9: the RPN's proposals, which are
stage 1's input, and the boxes after each stage. AP after each stage: cascade-rcnn evaluate RUN --data DATA --stages 1
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cascade_rcnn.data.dataset import DetectionDataset
from cascade_rcnn.data.formats.open import open_split
from cascade_rcnn.data.loader import eval_loader
from cascade_rcnn.inference.detector import load
from cascade_rcnn.models.boxes import pairwise_iou

IOUS = (0.5, 0.6, 0.7, 0.8, 0.9)


def main(run: str, data: str, split: str = "") -> None:
    detector = load(run)
    cascade: Any = detector.model.cascade
    cascade.mask_heads = cascade.mask_heads[:0]
    stages = len(cascade.box_heads)
    met: list[list[Tensor]] = [[] for _ in range(stages + 1)]  # per stage: each box's best IoU
    boxes_of: list[Tensor] = []
    pool, last = cascade._pool_for_head, cascade.stages[cascade.stages_at_test - 1]
    move_every_class = last.move_every_class

    def pool_and_look(k: int, pyramid: list[Tensor], boxes: Tensor, valid: Tensor) -> Any:
        boxes_of.append(boxes[0][valid[0]])
        return pool(k, pyramid, boxes, valid)

    def move_and_look(*arguments: Any) -> Tensor:
        boxes: Tensor = move_every_class(*arguments)
        boxes_of.append(boxes[0].flatten(0, -2))
        return boxes

    cascade._pool_for_head, last.move_every_class = pool_and_look, move_and_look
    chosen = open_split(data, split or detector.config.data.val)
    dataset = DetectionDataset(chosen, detector.config.data, training=False, semantics=detector.config.model.semantics)
    loader = eval_loader(dataset)
    for images, targets in loader:
        boxes_of.clear()
        detector.model.detect(images)
        truth = targets.boxes[0][targets.valid[0]]
        if len(truth):
            for stage, boxes in enumerate(boxes_of):
                met[stage].append(pairwise_iou(boxes, truth).amax(dim=1))
    loader.close()
    print("boxes        " + "".join(f"  IoU >= {iou}" for iou in IOUS))
    for stage, parts in enumerate(met):
        best = torch.cat(parts)
        name = f"after stage {stage}" if stage else "proposals"
        print(f"{name:13}" + "".join(f"{100 * float((best >= iou).float().mean()):10.1f} %" for iou in IOUS))


if __name__ == "__main__":
    main(*sys.argv[1:])
