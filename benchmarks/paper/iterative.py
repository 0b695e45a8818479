"""Why three rounds of one head lose AP where the paper's gain (table 1): scores, boxes and what NMS leaves, apart.

    python3 benchmarks/paper/iterative.py WORK            # or WORK/larger

Looks at the one-stage detector of seed 0 that run.py has trained in WORK. Round k is given the boxes of round k - 1
(round 1 the proposals); its classifier judges those, its regressor moves them. Beside it, how boxes drift through the
stages of the cascade of seed 0.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from explore import Network, eval_batches, nearest
from jobs import all_jobs, evaluated, settings_of
from product import LAST, coco_table, coco_truth, load_network, open_split, pairwise_iou, to_detections
from torch import Tensor

ROUNDS = 3
NEAR = 0.5  # a proposal is an object's if its IoU is at least this
CROWDED = 0.05  # an object is crowded if its box overlaps another's by this IoU


class Drift:
    """Of the proposals that cover an object, the share that cover it, another one, or none after each round."""

    def __init__(self) -> None:
        self.counts = torch.zeros(2, ROUNDS, 3)  # of objects alone and crowded: same, other, none

    def add(self, rounds: list[Tensor], valid: Tensor, truth: Any) -> None:
        """``rounds``: boxes [B, N, 4], the proposals first."""
        between = pairwise_iou(truth.boxes, truth.boxes) - torch.eye(truth.boxes.shape[1])
        between = between.masked_fill(~truth.valid[:, None] | ~truth.valid[:, :, None], 0)
        crowded = between.amax(dim=2) > CROWDED  # [B, G]
        before, own = nearest(rounds[0], truth)
        start = valid & (before >= NEAR)
        among = crowded.gather(1, own)
        for number, boxes in enumerate(rounds[1:]):
            best, now = nearest(boxes, truth)
            there = best >= NEAR
            for group, members in enumerate((start & ~among, start & among)):
                for kind, which in enumerate((there & (now == own), there & (now != own), ~there)):
                    self.counts[group, number, kind] += int((members & which).sum())

    def summary(self) -> dict[str, list[list[float]]]:
        shares = self.counts / self.counts.sum(dim=2, keepdim=True).clamp(min=1)
        return {name: (100 * shares[group]).tolist() for group, name in enumerate(("alone", "crowded"))}


@torch.inference_mode()
def look(model: Any, config: Any, names: tuple[str, ...], split: Any) -> tuple[dict[str, list[Any]], Drift]:
    """Results by ``boxes J, scores I``, and how boxes drift."""
    network, drift = Network(model), Drift()
    ways: dict[str, list[Any]] = defaultdict(list)
    for images, truth in eval_batches(split, config, 4):
        pyramid, boxes, valid = network.begin(images)
        rounds, scores = [boxes], []
        for _ in range(ROUNDS + 1):  # one more, whose scores are those of the last boxes
            logits, moved = network.head(0, pyramid, rounds[-1], valid, images.sizes)
            scores.append(logits)
            rounds.append(moved)
        drift.add(rounds[: ROUNDS + 1], valid, truth)
        for j in range(1, ROUNDS + 1):
            for i in range(1, ROUNDS + 2):
                raw = network.select([scores[i - 1]], rounds[j], valid)
                for found in to_detections(raw, images, names):
                    ways[f"boxes {j}, scores {i}"] += found.to_coco()
    return ways, drift


@torch.inference_mode()
def drift_of_stages(model: Any, config: Any, split: Any) -> Drift:
    """How boxes drift through the three stages of a cascade, each with its own head."""
    network, drift = Network(model), Drift()
    for images, truth in eval_batches(split, config, 4):
        pyramid, boxes, valid = network.begin(images)
        rounds = [boxes]
        for k in range(ROUNDS):
            rounds.append(network.head(k, pyramid, rounds[-1], valid, images.sizes)[1])
        drift.add(rounds, valid, truth)
    return drift


def main(work: Path) -> None:
    settings = settings_of(work)
    job = all_jobs(settings)["single5-s0"]
    model, config, names = load_network(work / "trained" / job.name / LAST, device="cpu")
    split = open_split(work / "data" / job.data, config.data.val)
    config = evaluated(config, settings["data"][job.data])
    ways, drift = look(model, config, names, split)
    truth, found = coco_truth(split), {}
    for way, results in sorted(ways.items()):
        table = coco_table(truth, results, iou_type="bbox", max_detections=300)
        found[way] = {"AP": table.average_precision()} | {
            f"{short}{100 * iou:.0f}": measure(iou=iou)
            for short, measure in (("AP", table.average_precision), ("recall", table.average_recall))
            for iou in (0.5, 0.75, 0.9)
        }
        found[way] = {key: round(100 * float(value or 0), 2) for key, value in found[way].items()}
        print(way, json.dumps(found[way]), len(results), flush=True)
    cascade = load_network(work / "trained" / "cascade-s0" / LAST, device="cpu")[0]
    drifts = {"one head": drift.summary(), "cascade": drift_of_stages(cascade, config, split).summary()}
    print(json.dumps(drifts))
    (work / "iterative.json").write_text(
        json.dumps({"ways": found, "drift": drifts}, indent=1) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
