"""AP of parts of the objects: by size, aspect, crowding, and nearness to the border of the image.

As COCO does for sizes: objects of the other parts are ignored, and so are detections that find nothing and would
themselves belong to another part.
"""

from __future__ import annotations

import numpy as np

from cascade_rcnn.analysis.matches import average_precisions, match, mean_ap
from cascade_rcnn.analysis.scenes import Bools, Floats, Found, Ints, Truth, box_ious, image_slices

SIZES = (("small (area to 32^2)", 0.0, 32.0**2), ("medium", 32.0**2, 96.0**2), ("large (from 96^2)", 96.0**2, 1e10))


def slice_aps(truth: Truth, found: Found) -> dict[str, dict[str, dict[str, float | int | None]]]:
    """``{"size": {"small ...": {"AP": .., "AP50": .., "AP75": .., "objects": n}, ...}, "aspect": ..., ...}``."""
    result: dict[str, dict[str, dict[str, float | int | None]]] = {}
    for kind, parts in _parts(truth, found).items():
        result[kind] = {}
        for name, (objects, detections) in parts.items():
            matches = match(truth, found, left_out=~objects, outside=~detections)
            values = average_precisions(truth, found, matches)
            result[kind][name] = {
                "AP": mean_ap(values),
                "AP50": mean_ap(values[:, :1]),
                "AP75": mean_ap(values[:, 5:6]),
                "objects": int(matches.counted.sum()),
            }
    return result


def _parts(truth: Truth, found: Found) -> dict[str, dict[str, tuple[Bools, Bools]]]:
    """Which objects and detections belong to each part."""
    areas = found.boxes[:, 2] * found.boxes[:, 3]
    sizes = {
        name: ((truth.areas >= low) & (truth.areas <= high), (areas >= low) & (areas <= high))
        for name, low, high in SIZES  # both ends count, as in COCO
    }
    aspect = {
        "wide (more than 2 : 1)": (_aspect(truth.boxes) > 2, _aspect(found.boxes) > 2),
        "between": (_between(_aspect(truth.boxes)), _between(_aspect(found.boxes))),
        "tall (more than 1 : 2)": (_aspect(truth.boxes) < 0.5, _aspect(found.boxes) < 0.5),
    }
    ours = crowding(truth, truth.image, truth.boxes, itself=True)
    theirs = crowding(truth, found.image, found.boxes, itself=False)
    crowded = {
        "alone (touches no other object)": (ours == 0, theirs == 0),
        "touching (IoU below 0.2)": ((ours > 0) & (ours < 0.2), (theirs > 0) & (theirs < 0.2)),
        "crowded (IoU from 0.2)": (ours >= 0.2, theirs >= 0.2),
    }
    ours_at, theirs_at = (at_border(truth, truth.image, truth.boxes), at_border(truth, found.image, found.boxes))
    border = {"at the border": (ours_at, theirs_at), "inside": (~ours_at, ~theirs_at)}
    known = bool((truth.sizes > 0).all())  # without sizes nobody knows where the border is
    return {"size": sizes, "aspect": aspect, "crowding": crowded} | ({"border": border} if known else {})


def _aspect(boxes: Floats) -> Floats:
    """Width over height [N]."""
    return boxes[:, 2] / np.maximum(boxes[:, 3], 1e-9)


def _between(aspect: Floats) -> Bools:
    inside: Bools = (aspect >= 0.5) & (aspect <= 2)
    return inside


def at_border(truth: Truth, image: Ints, boxes: Floats) -> Bools:
    """[N], whether a box comes within 1 % of the image's side of its border."""
    height, width = truth.sizes[image].T
    x1, y1 = boxes[:, 0], boxes[:, 1]
    x2, y2 = x1 + boxes[:, 2], y1 + boxes[:, 3]
    near: Bools = (x1 <= 0.01 * width) | (y1 <= 0.01 * height) | (x2 >= 0.99 * width) | (y2 >= 0.99 * height)
    return near


def crowding(truth: Truth, image: Ints, boxes: Floats, *, itself: bool) -> Floats:
    """The highest IoU [N] of each box with an object of its image (``image`` rises), any class.

    Of an object: with another one. Of a detection: with the second nearest, the nearest being what it is meant for.
    """
    result = np.zeros(len(boxes))
    count = len(truth.image_ids)
    for rows, things in zip(image_slices(image, count), image_slices(truth.image, count)):
        others = truth.boxes[things][~truth.crowd[things]] if not itself else truth.boxes[things]
        if len(others) < 2 or rows.start == rows.stop:
            continue
        overlaps = box_ious(boxes[rows, None], others[None])  # [n, m]
        if itself:
            np.fill_diagonal(overlaps, 0.0)
            result[rows] = overlaps.max(axis=1)
        else:
            result[rows] = np.partition(overlaps, -2, axis=1)[:, -2]
    return result
