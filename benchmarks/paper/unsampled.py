"""Why figure 4's shares fall at stage 3 here: the boxes of each stage at test, where nothing is sampled.

    python3 benchmarks/paper/unsampled.py WORK [EVERY]

In training a stage takes at most a quarter of positives, and the next one learns from what it took. Looks at every
fourth image of the evaluation split with the cascade of seed 0 that run.py has trained in WORK.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import torch
from explore import HYPOTHESIS_IOUS, Network, eval_batches, nearest
from jobs import all_jobs, evaluated, settings_of
from product import LAST, load_network, open_split


@torch.inference_mode()
def main(work: Path, every: int) -> None:
    settings = settings_of(work)
    job = all_jobs(settings)["cascade-s0"]
    model, config, _ = load_network(work / "trained" / job.name / LAST, device="cpu")
    split = open_split(work / "data" / job.data, config.data.val)
    split = dataclasses.replace(split, records=split.records[::every])
    config = evaluated(config, settings["data"][job.data])
    network = Network(model)
    overlaps: list[list[torch.Tensor]] = [[] for _ in range(network.stages + 1)]
    for images, truth in eval_batches(split, config, 4):
        pyramid, boxes, valid = network.begin(images)
        for k in range(network.stages + 1):
            overlaps[k].append(nearest(boxes, truth)[0][valid])
            if k < network.stages:
                boxes = network.head(k, pyramid, boxes, valid, images.sizes)[1]
    for k, parts in enumerate(overlaps):
        best = torch.cat(parts)
        shares = {f"{iou}": round(100 * float((best >= iou).float().mean()), 1) for iou in HYPOTHESIS_IOUS}
        print("proposals" if k == 0 else f"after stage {k}", len(best), json.dumps(shares))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 4)
