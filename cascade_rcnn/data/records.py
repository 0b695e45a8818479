"""What every reader gives: one record per image, one split per list of images, and the problems it met.

Readers (``coco.py``, ``voc.py``, ...) know a format and nothing else; everything behind them knows records only.
Only NumPy here: checking and converting annotations needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cascade_rcnn.data.problems import Problem

# COCO's own spelling: a list of polygons [[x1, y1, x2, y2, ...], ...] or an RLE {"size": [h, w], "counts": str | list}
Segmentation = list[list[float]] | dict[str, Any]


@dataclass(slots=True)
class ImageRecord:
    """One image and its G objects, in pixels of the original image as its labels count them (``orientation.py``)."""

    path: Path  # where the file lies
    file_name: str  # as the data set names it, for messages and submissions
    image_id: int | str
    height: int  # 0 when the annotation does not say
    width: int
    boxes: NDArray[np.float64]  # [G, 4] xyxy, width = x2 - x1
    labels: NDArray[np.int64]  # [G], index into the split's class names (0 for regions of no class)
    ignore: NDArray[np.bool_]  # [G], not to be learned: crowd, DontCare, difficult, invalid
    areas: NDArray[np.float64]  # [G], of the mask where there is one, else of the box
    segmentations: list[Segmentation | None] | None = None  # [G], None when the data set has no masks
    # [G] each; the format's own facts: "iscrowd", "difficult", "truncated", "occluded", "visible_boxes" [G, 4], "ids"
    attributes: dict[str, NDArray[Any]] = field(default_factory=dict)
    source: str = ""  # file (and line or index) of the annotation, for messages
    sized: bool = True  # False: height and width are the file's own, the annotation gives none
    turn: int = 1  # orientation tag (EXIF's 1..8) that whoever copies the picture writes into its pixels


@dataclass(slots=True)
class DataSplit:
    """A list of images with one vocabulary of class names."""

    format: str  # a name of ``data.formats.open``: "coco", "voc", "yolo", ...
    name: str  # "train", "val", "test", or the data set's own word
    root: Path  # the folder the user named
    records: list[ImageRecord]
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]  # [K], the data set's own id of each class (1..K where it has none)
    truth: Path | None = None  # what ``score --truth`` takes for this split
    has_masks: bool = False
    problems: list[Problem] = field(default_factory=list)  # what the reader met and left out (empty boxes, ...)

    def __len__(self) -> int:
        return len(self.records)


# What can be wrong with a data set: one row per kind, how severe it is and what to do about it.
#
# Readers leave out what cannot be learnt from (an empty box) and count it; what would silently change the data set (an
# unknown category, a repeated image id) refuses the training. ``check`` reads without refusing and reports everything.


def empty_record(
    path: Path, name: str, image_id: int | str, size: tuple[int, int], *, source: str, sized: bool
) -> ImageRecord:
    """An image of ``size`` (height, width; 0 where unknown) without objects; ``sized``: the annotation says it."""
    none = np.zeros(0)
    return ImageRecord(
        path,
        name,
        image_id,
        *size,
        boxes=np.zeros((0, 4)),
        labels=none.astype(np.int64),
        ignore=none.astype(np.bool_),
        areas=none,
        source=source,
        sized=sized,
    )
