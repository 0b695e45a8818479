"""What each stage has learned, in the rows of table 3 and figure 5: what it is given, and how far it moves its boxes.

    python3 benchmarks/paper/stage_moves.py WORK [EVERY]

Looks with the networks that run.py has trained in WORK (or WORK/steps300): at training crops for the share of
positives, and at every second image of the evaluation split for the rest. ``way`` is how far a stage moves its boxes,
as a share of the way to their objects (least squares over the four deltas of boxes with an IoU of at least 0.5): 1 is
all of it. ``iou`` is the mean IoU after the stage of the boxes that began as proposals with an IoU of at least 0.5.
Writes WORK/stage_moves.json; what docs/paper.md shows lies in results/.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch
from explore import Hypotheses, Network, eval_batches, nearest
from jobs import all_jobs, evaluated, settings_of
from product import (
    LAST,
    DetectionDataset,
    Targets,
    coco_truth,
    encode_boxes,
    evaluate_coco,
    load_network,
    open_split,
    take,
    to_detections,
    train_loader,
)
from report import markdown
from torch import Tensor

ROWS = {
    "single5": "one stage, u = .5",
    "single6": "one stage, u = .6",
    "single7": "one stage, u = .7",
    "none": "three stages, neither",
    "iou": "rising IoU",
    "statistics": "statistics",
    "cascade": "both",
}
SHOWN = {"AP": ".1f", "positive": ".0f", "way": ".2f", "iou": ".3f"}
CROPS, BATCH = 64, 8
NEAR = 0.5


class Moves:
    """Of one stage: how far it moves its boxes towards their objects, and how well those fit then."""

    def __init__(self) -> None:
        self.along = self.whole = 0.0  # products of the true deltas with the predicted ones, and with themselves
        self.iou, self.boxes = 0.0, 0

    def add(self, boxes: Tensor, moved: Tensor, valid: Tensor, truth: Targets, *, followed: Tensor) -> None:
        """``boxes`` [B, N, 4] before the stage, ``moved`` after it; ``followed`` [B, N]: those whose IoU is counted."""
        best, own = nearest(boxes, truth)
        used, one = valid & (best >= NEAR), torch.ones(4)
        true, predicted = encode_boxes(boxes, take(truth.boxes, own), one)[used], encode_boxes(boxes, moved, one)[used]
        self.along += float((true * predicted).sum())
        self.whole += float((true * true).sum())
        self.iou += float(nearest(moved, truth)[0][followed].sum())
        self.boxes += int(followed.sum())

    def summary(self) -> dict[str, float]:
        return {"way": self.along / max(self.whole, 1e-9), "iou": self.iou / max(self.boxes, 1)}


@torch.inference_mode()
def moves(model: Any, config: Any, names: tuple[str, ...], split: Any) -> list[dict[str, float]]:
    """By stage: AP of its boxes by its own scores, the way it moves them, and how well they then fit."""
    network = Network(model)
    stages: list[tuple[Moves, list[Any]]] = [(Moves(), []) for _ in range(network.stages)]
    for images, truth in eval_batches(split, config, 4):
        pyramid, boxes, valid = network.begin(images)
        near = valid & (nearest(boxes, truth)[0] >= NEAR)
        for k, (own, results) in enumerate(stages):
            logits, moved = network.head(k, pyramid, boxes, valid, images.sizes)
            own.add(boxes, moved, valid, truth, followed=near)
            for found in to_detections(network.select([logits], moved, valid), images, names):
                results += found.to_coco()
            boxes = moved
    truth_of_split, summary = coco_truth(split), []
    for own, results in stages:
        metrics = evaluate_coco(truth_of_split, results, iou_type="bbox", max_detections=300)
        summary.append({"AP": 100 * float(metrics["bbox/AP"] or 0), **own.summary()})
    return summary


@torch.no_grad()
def positives(model: Any, config: Any, split: Any) -> list[float]:
    """By stage, the share in per cent of its boxes in training that count as positive at its own IoU."""
    loader = train_loader(DetectionDataset(split, config.data, training=True), batch_size=BATCH, workers=0, seed=10_000)
    hypotheses = Hypotheses(model.cascade)
    torch.manual_seed(0)
    model.train()
    for _, (images, targets) in zip(range(CROPS // BATCH), loader):
        model.loss(images, targets)
    model.eval()
    loader.close()
    shares = hypotheses.summary()["share"]
    return [100 * shares[f"stage{k}"][f"{stage.details.iou}"] for k, stage in enumerate(model.cascade.stages, start=1)]


def look(work: Path, name: str, settings: dict[str, Any], every: int) -> list[dict[str, float]]:
    """By stage, all numbers of one trained network."""
    job = all_jobs(settings)[name]
    model, config, names = load_network(work / "trained" / job.name / LAST, device="cpu")
    root = work / "data" / job.data
    held_out = open_split(root, config.data.val)
    held_out = dataclasses.replace(held_out, records=held_out.records[::every])
    stages = moves(model, evaluated(config, settings["data"][job.data]), names, held_out)
    for stage, share in zip(stages, positives(model, config, open_split(root, config.data.train))):
        stage["positive"] = share
    return stages


def table(found: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """What the file of results holds: the numbers, and the same as a table."""
    head = ["", "AP of each stage alone", "positive in training (%)", "way", "mean IoU after it"]
    lines = [
        [ROWS[row], *(" ".join(f"{stage[key]:{form}}" for stage in stages) for key, form in SHOWN.items())]
        for row, stages in found.items()
    ]
    return {"markdown": markdown(head, lines), "rows": found}


def main(work: Path, every: int) -> None:
    settings = settings_of(work)
    found = {}
    for row in ROWS:
        names = [f"{row}-s{seed}" for seed in settings["seeds"]]
        each = [look(work, name, settings, every) for name in names if (work / "trained" / name / LAST).is_file()]
        if not each:
            continue
        found[row] = [
            {key: round(sum(one[k][key] for one in each) / len(each), 3) for key in stage}
            for k, stage in enumerate(each[0])
        ]
        print(row, json.dumps(found[row]), flush=True)
    (work / "stage_moves.json").write_text(json.dumps(table(found), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 2)
