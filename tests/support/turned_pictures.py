"""Pictures with an orientation tag: dark noise with one bright rectangle each, to see whether a box is right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cascade_rcnn.config import DataConfig
from cascade_rcnn.data.dataset import read_record
from cascade_rcnn.data.masks import decode_window, pack_segmentation
from cascade_rcnn.data.records import DataSplit

TAG = 0x0112
Box = tuple[int, int, int, int]  # x1, y1, x2, y2


def scene(seed: int, size: tuple[int, int]) -> tuple[NDArray[np.uint8], Box]:
    """An upright picture of (height, width), and where its object lies."""
    rng = np.random.default_rng(seed)
    height, width = size
    pixels = rng.integers(0, 60, (height, width, 3), dtype=np.uint8)
    w, h = (2 * int(rng.integers(side // 12, side // 6)) for side in (width, height))  # even, to be halved exactly
    x, y = 2 * int(rng.integers(0, (width - w) // 2)), 2 * int(rng.integers(0, (height - h) // 2))
    pixels[y : y + h, x : x + w] = 230
    return pixels, (x, y, x + w, y + h)


def as_stored(upright: NDArray[Any], tag: int) -> NDArray[Any]:
    """The rows that a camera writes so that ``tag`` shows them upright; by the standard's words, one by one."""
    return np.ascontiguousarray(
        {
            1: lambda a: a,
            2: lambda a: a[:, ::-1],
            3: lambda a: a[::-1, ::-1],
            4: lambda a: a[::-1],
            5: lambda a: a.swapaxes(0, 1),
            6: lambda a: np.rot90(a, 1),  # to be turned by a quarter to the right
            7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
            8: lambda a: np.rot90(a, -1),
        }[tag](upright)
    )


def save(path: Path, upright: NDArray[Any], tag: int, **options: Any) -> None:
    """Writes a picture as stored, with its tag."""
    exif = Image.Exif()
    exif[TAG] = tag
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(as_stored(upright, tag)).save(path, **({"exif": exif} if tag != 1 else {}), **options)


def stored_box(box: Box, size: tuple[int, int], tag: int) -> Box:
    """An upright box in the picture as stored, found by its pixels."""
    mask = np.zeros(size, dtype=bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    rows, columns = np.nonzero(as_stored(mask, tag))
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


def write_coco(
    root: Path,
    tag: int,
    *,
    size: tuple[int, int] = (80, 60),
    labelled: str = "upright",
    rle: bool = False,
    sized: bool = True,
    suffix: str = ".png",
) -> Path:
    """Four tagged pictures of upright (height, width), labelled in one of the views, with masks."""
    images, rows = [], []
    for number in range(4):
        pixels, box = scene(number, size)
        save(root / "train" / f"{number}{suffix}", pixels, tag)
        view = size
        if labelled == "stored":
            box = stored_box(box, size, tag)
            view = size[::-1] if tag >= 5 else size
        x1, y1, x2, y2 = box
        image: dict[str, Any] = {"id": number, "file_name": f"{number}{suffix}"}
        images.append(image | ({"height": view[0], "width": view[1]} if sized else {}))
        counts = [y1 + x1 * view[0], *([y2 - y1, view[0] - (y2 - y1)] * (x2 - x1))]
        counts[-1] = view[0] * view[1] - sum(counts[:-1])
        mask = {"size": list(view), "counts": counts} if rle else [[x1, y1, x2, y1, x2, y2, x1, y2]]
        rows.append(
            {
                "id": number + 1,
                "image_id": number,
                "category_id": 1,
                "iscrowd": 0,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": (x2 - x1) * (y2 - y1),
                "segmentation": mask,
            }
        )
    content = {"images": images, "annotations": rows, "categories": [{"id": 1, "name": "thing"}]}
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / "annotations" / "instances_train.json").write_text(json.dumps(content))
    return root


def on_their_objects(split: DataSplit, data: DataConfig | None = None) -> tuple[int, int]:
    """How many boxes, and how many masks, cover a bright object exactly in the pixels that training reads."""
    boxes = masks = 0
    for record in split.records:
        pixels = read_record(record, split.format, data or DataConfig()).numpy().mean(axis=0)
        bright = pixels > 120
        for row, box in enumerate(record.boxes):
            x1, y1, x2, y2 = np.round(box).astype(int)
            boxes += bool(bright[y1:y2, x1:x2].mean() > 0.9 and bright.sum() < 1.2 * (x2 - x1) * (y2 - y1))
            mask = record.segmentations[row] if record.segmentations else None
            window = decode_window(pack_segmentation(mask), bright.shape) if mask else None
            if window is not None:
                inside = np.zeros_like(bright)
                part, top, left = window
                inside[top : top + part.shape[0], left : left + part.shape[1]] = part
                masks += bool((inside & bright).sum() > 0.9 * (inside | bright).sum())
    return boxes, masks
