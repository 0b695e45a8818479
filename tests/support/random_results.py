"""A COCO ground truth and results made at random: classes, crowds, moved, doubled, swapped and strange boxes."""

from __future__ import annotations

from typing import Any

import numpy as np


def random_results(
    seed: int = 0, *, images: int = 40, classes: int = 3, objects: int = 6, crowds: bool = True
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(truth, results); about 1.5 detections for each object."""
    rng = np.random.default_rng(seed)
    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for image in range(1, images + 1):
        for _ in range(int(rng.integers(0, 2 * objects))):
            category, side = int(rng.integers(1, classes + 1)), float(np.exp(rng.uniform(2.2, 5.2)))
            box = [*rng.uniform(0, 400, 2).tolist(), side, side * float(rng.uniform(0.4, 2.5))]
            crowd = int(crowds and rng.random() < 0.05)
            annotations.append(
                {"id": len(annotations) + 1, "image_id": image, "category_id": category, "bbox": box,
                 "area": box[2] * box[3] * 0.8, "iscrowd": crowd}
            )  # fmt: skip
            for _ in range(int(rng.choice([0, 1, 1, 1, 2, 3]))):
                moved = (np.array(box) + rng.normal(0, rng.choice([0.03, 0.1, 0.3]), 4) * side).tolist()
                moved[2:] = [max(2.0, value) for value in moved[2:]]
                said = category if rng.random() < 0.85 else int(rng.integers(1, classes + 1))
                results.append({"image_id": image, "category_id": said, "bbox": moved, "score": float(rng.random())})
        for _ in range(int(rng.integers(0, 3))):
            box = [*rng.uniform(0, 400, 2).tolist(), *rng.uniform(5, 90, 2).tolist()]
            results.append(
                {"image_id": image, "category_id": int(rng.integers(1, classes + 1)), "bbox": box,
                 "score": float(rng.random() * 0.6)}
            )  # fmt: skip
    truth = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "height": 480, "width": 480} for i in range(1, images + 1)],
        "annotations": annotations,
        "categories": [{"id": k, "name": f"class {k}"} for k in range(1, classes + 1)],
    }
    return truth, results
