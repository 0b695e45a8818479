"""Whether more steps change the paper's table 3 (rising IoU and statistics) and figure 4: heads alone, for longer.

    python3 benchmarks/paper/longer_heads.py WORK [STEPS ...]

The features and proposals of some images are computed once, by the cascade of seed 0 that run.py has trained in WORK;
only the three heads are trained on them, from nothing, for each number of steps (100 and 400), each setting (neither,
one of both, both) and each seed of config.yaml. Small enough for a laptop; what it shows is the difference between
settings, not how good a detector gets. Started again, it goes on where it was.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from explore import Hypotheses, eval_batches
from jobs import Job, all_jobs, evaluated, job_config, settings_of
from product import (
    LAST,
    DetectionDataset,
    build,
    coco_truth,
    evaluate_coco,
    load_network,
    open_split,
    to_detections,
    train_loader,
)

BATCH, TRAIN_BATCHES, EVALUATED, RATE, WARMUP = 8, 16, 66, 1e-3, 30
ROWS = ("none", "iou", "statistics", "cascade")


@torch.no_grad()
def features(model: Any, images: Any, targets: Any, *, training: bool) -> tuple[Any, ...]:
    """What the heads need of a batch: maps (float16), proposals, images and objects."""
    pyramid = model.pyramid(images)
    proposals = (
        model.rpn.loss(pyramid, images.sizes, targets)[1] if training else model.rpn.propose(pyramid, images.sizes)
    )
    return [one.half() for one in pyramid], proposals, images, targets


def train_heads(cascade: Any, batches: list[tuple[Any, ...]], steps: int, seed: int = 0) -> None:
    cascade.train()
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(cascade.parameters(), lr=RATE, weight_decay=0.05)
    for step in range(steps):
        factor = min(1.0, (step + 1) / WARMUP) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = RATE * factor
        pyramid, proposals, images, targets = batches[int(torch.randint(len(batches), ()))]
        loss = sum(cascade.loss([one.float() for one in pyramid], proposals, images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(cascade.parameters(), 10.0)
        optimizer.step()
    cascade.eval()


@torch.no_grad()
def evaluate(cascade: Any, batches: list[tuple[Any, ...]], split: Any) -> dict[str, float]:
    results = []
    for pyramid, proposals, images, _ in batches:
        raw = cascade.detect([one.float() for one in pyramid], proposals, images)
        for found in to_detections(raw, images, split.class_names):
            results += found.to_coco()
    metrics = evaluate_coco(coco_truth(split), results, iou_type="bbox", max_detections=300)
    return {
        name: round(100 * float(metrics[f"bbox/{key}"] or 0), 2)
        for name, key in (("AP", "AP"), ("AP50", "AP50"), ("AP75", "AP75"), ("AP90", "AP@0.90"))
    }


@torch.no_grad()
def shares(cascade: Any, batches: list[tuple[Any, ...]]) -> dict[str, dict[str, float]]:
    """Per cent of the boxes that enter each stage in training, by the IoU that they reach (figure 4)."""
    hypotheses = Hypotheses(cascade)
    cascade.train()
    torch.manual_seed(0)
    for pyramid, proposals, images, targets in batches:
        cascade.loss([one.float() for one in pyramid], proposals, images, targets)
    cascade.eval()
    for stage in cascade.stages:
        del stage.sample
    found = hypotheses.summary()["share"]
    return {name: {iou: round(100 * share, 1) for iou, share in own.items()} for name, own in found.items()}


def main(work: Path, numbers: list[int]) -> None:
    settings = settings_of(work)
    jobs = all_jobs(settings)
    model, config, names = load_network(work / "trained" / "cascade-s0" / LAST, device="cpu")
    root = work / "data" / jobs["cascade-s0"].data
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, root=str(root)))
    loader = train_loader(
        DetectionDataset(open_split(root, "train"), config.data, training=True), batch_size=BATCH, workers=0, seed=1
    )
    batches = [features(model, *pair, training=True) for pair, _ in zip(loader, range(TRAIN_BATCHES))]
    split = open_split(root, "val")
    split = dataclasses.replace(split, records=split.records[:: max(1, len(split) // EVALUATED)])
    whole = evaluated(config, settings["data"][jobs["cascade-s0"].data])
    held_out = [features(model, *pair, training=False) for pair in eval_batches(split, whole, 4)]
    print(f"features of {BATCH * len(batches)} and {len(split)} images", flush=True)
    out = work / "longer_heads.json"
    found = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else []
    done = {(one["row"], one["steps"], one["seed"]) for one in found}
    for seed, steps, row in itertools.product(settings["seeds"], numbers, ROWS):
        if (row, steps, seed) in done:
            continue
        job: Job = jobs[f"{row}-s{seed}"]
        own = job_config(job, settings, work=work, weights=work, images=532, loaders=0)
        torch.manual_seed(seed)
        cascade = build(own.model, len(names)).cascade
        train_heads(cascade, batches, steps, seed)
        one = {"row": row, "steps": steps, "seed": seed, **evaluate(cascade, held_out, split)}
        found.append(one | {"shares": shares(cascade, batches)})
        print(json.dumps(found[-1]), flush=True)
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(word) for word in sys.argv[2:]] or [100, 400])
