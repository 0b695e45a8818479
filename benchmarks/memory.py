"""Peak memory of a training step and of a prediction, by the number of objects in the image.

    python3 benchmarks/memory.py [--size 800 1344] [--objects 10 100 1000 5000] [--device cpu] [--config NAME]
    python3 benchmarks/memory.py --predict [--megapixels 12] [--detections 300]

Each row runs in a process of its own. On a GPU the numbers are what torch had allocated at most; on a CPU the peak
resident set of the process, less what it had before the model was built.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import resource
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def _peak(device: str) -> float:
    """Most memory so far in GB."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def train_step(config_name: str, size: tuple[int, int], objects: int, device: str) -> dict[str, float]:
    """One forward and backward pass over one image with so many objects (with masks if the recipe has them)."""
    import torch

    from cascade_rcnn.models.build import build_model
    from cascade_rcnn.recipes import load_config
    from cascade_rcnn.structures import ImageBatch, MaskCrops, Targets

    before = _peak(device)
    torch.manual_seed(0)
    config = load_config(config_name)
    model = build_model(config.model, 80).to(device)
    height, width = size
    side = max(8.0, min(64.0, math.sqrt(height * width / objects)))  # dense scenes have small objects
    corners = torch.rand(1, objects, 2) * torch.tensor([width - side, height - side])
    boxes = torch.cat([corners, corners + side], dim=2)
    yes = torch.ones(1, objects, dtype=torch.bool)
    targets = Targets(boxes, torch.randint(0, 80, (1, objects)), yes, ~yes)
    if config.model.masks != "none":
        crop = int(side)
        areas = torch.arange(objects)[None] * crop * crop
        targets.masks = MaskCrops(
            torch.ones(objects * crop * crop, dtype=torch.uint8),
            areas,
            corners.flip(-1).long(),
            torch.full((1, objects, 2), crop),
            max_size=(crop, crop),
        )
    sizes = torch.tensor([[height, width]])
    images = ImageBatch(torch.randint(0, 256, (1, 3, height, width), dtype=torch.uint8), sizes, sizes)
    images, targets = images.to(device), targets.to(device)
    began = time.perf_counter()
    total = torch.stack(list(model.loss(images, targets).values())).sum()
    total.backward()  # type: ignore[no-untyped-call]
    seconds = time.perf_counter() - began
    return {"objects": objects, "memory_gb": _peak(device) - (0 if device != "cpu" else before), "seconds": seconds}


def predict(config_name: str, megapixels: float, detections: int, device: str) -> dict[str, float]:
    """Prediction of one large image until its masks are run lengths (an untrained model that keeps all it may)."""
    import numpy as np
    import torch

    from cascade_rcnn.inference.detector import Detector
    from cascade_rcnn.models.build import build_model
    from cascade_rcnn.recipes import load_config

    before = _peak(device)
    torch.manual_seed(0)
    config = load_config(config_name)
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, max_detections=detections, score_threshold=0.0, nms_iou=0.99)
    )
    model = build_model(config.model, 80).eval().to(device)
    detector = Detector.from_model(model, config, [f"class {number}" for number in range(80)])
    height = int(math.sqrt(megapixels * 1e6 * 3 / 4))
    image = np.random.default_rng(0).integers(0, 256, (height, height * 4 // 3, 3), dtype=np.uint8)
    began = time.perf_counter()
    found = detector.predict(image).to_coco()
    seconds = time.perf_counter() - began
    return {
        "detections": len(found),
        "megapixels": image.shape[0] * image.shape[1] / 1e6,
        "memory_gb": _peak(device) - (0 if device != "cpu" else before),
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="cascade_mask_rcnn_r50_fpn_1x_coco")
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1344))
    parser.add_argument("--objects", type=int, nargs="+", default=(10, 100, 1000, 5000))
    parser.add_argument("--predict", action="store_true")
    parser.add_argument("--megapixels", type=float, default=12.0)
    parser.add_argument("--detections", type=int, default=300)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--row", action="store_true", help="measure in this process and print JSON (used by itself)")
    args = parser.parse_args()
    if args.row:
        print(
            json.dumps(
                predict(args.config, args.megapixels, args.detections, args.device)
                if args.predict
                else train_step(args.config, tuple(args.size), args.objects[0], args.device)
            )
        )
        return
    for objects in args.objects[:1] if args.predict else args.objects:
        own = [] if args.predict else ["--objects", str(objects)]
        words = [sys.executable, __file__, *sys.argv[1:], "--row", *own]
        done = subprocess.run(words, check=True, capture_output=True, text=True)
        row = json.loads(done.stdout.splitlines()[-1])
        print(
            "  ".join(
                f"{key} {value:g}" if isinstance(value, int) else f"{key} {value:.2f}" for key, value in row.items()
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
