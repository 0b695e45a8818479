"""What --stages saves and costs: processor time of one thread and AP of a checkpoint on a split.

    python3 benchmarks/stages.py runs/demo/best.safetensors runs/demo/data [--split val] [--images 64]

Backbone and proposals of an image are computed once, then its cascade in each way, in turn; of two rounds the faster
one counts. Processor time, as another program on the machine shifts it less than the time on the wall.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

import torch

from cascade_rcnn import load
from cascade_rcnn.data.dataset import DetectionDataset
from cascade_rcnn.data.formats.open import open_split
from cascade_rcnn.data.loader import eval_loader
from cascade_rcnn.evaluation.evaluate_model import as_split, evaluate_results, match_classes
from cascade_rcnn.inference.run_model import to_detections
from cascade_rcnn.models import cascade as heads

SHARES = (0.1, 0.2, 0.4, 1.0)  # of the score threshold
ROUNDS = 2
KEYS = ("bbox/AP", "bbox/AP50", "bbox/AP75", "segm/AP")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--split", default="val")
    parser.add_argument("--images", type=int, default=1000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    detector = load(args.checkpoint, device="cpu")
    model, config, cascade = detector.model, detector.config, detector.model.cascade
    split = open_split(args.data, args.split)
    split = dataclasses.replace(split, records=split.records[: args.images])
    names, ids, absent = as_split(split, match_classes(detector.class_names, split, args.checkpoint))
    stages = len(cascade.box_heads)
    ways: dict[str, tuple[int, float]] = {"all stages": (stages, 0.0)}
    ways |= {f"--stages {count}": (count, 0.0) for count in range(1, stages)}
    ways |= {f"auto, {share:g} of the threshold": (stages, share) for share in SHARES}
    trunk = 0.0
    seconds = dict.fromkeys(ways, 0.0)
    results: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    dataset = DetectionDataset(split, config.data, training=False, semantics=config.model.semantics)
    for number, (images, _) in enumerate(eval_loader(dataset, workers=0)):
        if number == 0:
            model.detect(images)
        began = time.process_time()
        pyramid = model.pyramid(images)
        proposals = model.rpn.propose(pyramid, images.sizes)
        trunk += time.process_time() - began
        for way, (cascade.stages_at_test, share) in ways.items():
            cascade.drops_hopeless, heads.HOPELESS = share > 0, share
            taken = []
            for _ in range(ROUNDS):
                began = time.process_time()
                raw = cascade.detect(pyramid, proposals, images)
                taken.append(time.process_time() - began)
            seconds[way] += min(taken)
            found = [one for some in to_detections(raw, images, names, ids) for one in some.to_coco()]
            results[way] += [one for one in found if one["category_id"] != absent]
    count = len(split)
    print(f"{args.checkpoint} on {count} images of {args.data}, {1000 * trunk / count:.0f} ms before the cascade")
    for way, spent in seconds.items():
        metrics = evaluate_results(results[way], config, split)
        change = (trunk + spent) / (trunk + seconds["all stages"]) - 1
        aps = "  ".join(f"{key} {100 * value:.2f}" for key in KEYS if (value := metrics.get(key)) is not None)
        print(f"{way:28s}{1000 * (trunk + spent) / count:7.1f} ms {100 * change:+6.1f} %  {aps}")


if __name__ == "__main__":
    main()
