"""Small data sets as people bring them: pictures whose objects are rectangles of a class's colour, so that a box that
is read wrongly lies beside its object. ``on_their_objects`` counts the boxes that lie where they should.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cascade_rcnn.data.records import DataSplit

WIDTH, HEIGHT = 160, 120
NAMES = ("cat", "dog")
COLORS = ((230, 40, 40), (40, 60, 230))
SPLITS = {"train": (1, 2, 3), "val": (11, 12)}
Object = tuple[int, int, int, int, int]  # class, x, y, width, height


def objects(seed: int) -> list[Object]:
    """Two objects, one in each half of the picture."""
    random = np.random.default_rng(seed)
    found = []
    for number in range(2):
        wide, high = (int(value) for value in random.integers(24, 50, 2))
        x, y = int(random.integers(2, 78 - wide)) + 80 * number, int(random.integers(2, HEIGHT - 2 - high))
        found.append(((seed + number) % 2, x, y, wide, high))
    return found


def save_picture(path: Path, seed: int) -> Path:
    """The picture of a scene; the ending decides its format."""
    pixels = np.random.default_rng(seed).integers(90, 130, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    for label, x, y, wide, high in objects(seed):
        pixels[y : y + high, x : x + wide] = COLORS[label]
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = "PNG" if path.suffix.lower() == ".png" else "JPEG"
    Image.fromarray(pixels).save(path, kind, **({"quality": 95} if kind == "JPEG" else {}))
    return path


def on_their_objects(split: DataSplit) -> tuple[int, int]:
    """(boxes that tightly cover an object of their class's colour, all boxes that are to be learned)."""
    right = total = 0
    for record in split.records:
        pixels = np.asarray(Image.open(record.path).convert("RGB")).astype(int) if record.path.is_file() else None
        for box, label in zip(record.boxes[~record.ignore], record.labels[~record.ignore]):
            total += 1
            if pixels is None:
                continue
            color = np.array(COLORS[NAMES.index(split.class_names[label])])
            inside = np.abs(pixels - color).sum(axis=2) < 150
            x1, y1, x2, y2 = (round(float(value)) for value in box)
            around = inside[max(0, y1 - 6) : y2 + 6, max(0, x1 - 6) : x2 + 6].sum()
            crop = inside[max(0, y1) : y2, max(0, x1) : x2]
            right += bool(crop.size and crop.mean() > 0.9 and crop.sum() > 0.9 * around)
    return right, total


def coco(
    folder: Path,
    seeds: Sequence[int],
    *,
    names: Sequence[str] = NAMES,
    change: Callable[[dict[str, Any]], Any] | None = None,
) -> dict[str, Any]:
    """Pictures in ``folder`` and COCO's dict about them, masks included, perhaps changed."""
    images, annotations = [], []
    for seed in seeds:
        save_picture(folder / f"{seed:03d}.jpg", seed)
        images.append({"id": seed, "file_name": f"{seed:03d}.jpg", "width": WIDTH, "height": HEIGHT})
        for label, x, y, wide, high in objects(seed):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": seed,
                    "category_id": 1 + list(names).index(NAMES[label]),
                    "bbox": [x, y, wide, high],
                    "area": wide * high,
                    "iscrowd": 0,
                    "segmentation": [[x, y, x + wide, y, x + wide, y + high, x, y + high]],
                }
            )
    categories = [{"id": number, "name": name} for number, name in enumerate(names, start=1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    if change is not None:
        change(content)
    return content


def write_json(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def coco_set(root: Path, change: Callable[[dict[str, Any]], Any] | None = None) -> Path:
    """``annotations/instances_{train,val}.json`` with the folders train and val."""
    for split, seeds in SPLITS.items():
        write_json(root / "annotations" / f"instances_{split}.json", coco(root / split, seeds, change=change))
    return root


def yolo_box(seed: int) -> Iterator[tuple[int, float, float, float, float]]:
    """Class, x, y, width, height of each object as fractions, the corner first."""
    for label, x, y, wide, high in objects(seed):
        yield label, x / WIDTH, y / HEIGHT, wide / WIDTH, high / HEIGHT


def centred(label: int, x: float, y: float, wide: float, high: float) -> str:
    """A row of YOLO: class, centre, size."""
    return f"{label} {x + wide / 2:.6f} {y + high / 2:.6f} {wide:.6f} {high:.6f}"


def yolo_set(
    root: Path,
    row: Callable[..., str] = centred,
    *,
    yaml: str | None = "train: images/train\nval: images/val\nnames: [cat, dog]\n",
    images: str = "images/{split}",
    labels: str = "labels/{split}",
) -> Path:
    """YOLO's folders with a ``data.yaml``; ``row`` writes an object."""
    for split, seeds in SPLITS.items():
        for seed in seeds:
            save_picture(root / images.format(split=split) / f"{seed:03d}.jpg", seed)
            path = root / labels.format(split=split) / f"{seed:03d}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(row(*values) + "\n" for values in yolo_box(seed)), encoding="utf-8")
    if yaml is not None:
        (root / "data.yaml").write_text(yaml, encoding="utf-8")
    return root


def voc_corners(x: float, y: float, wide: float, high: float) -> str:
    return f"<bndbox><xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{x + wide}</xmax><ymax>{y + high}</ymax></bndbox>"


def voc_xml(seed: int, *, corners: Callable[..., str] = voc_corners, filename: str = "", flags: str = "") -> str:
    parts = [f"<annotation><filename>{filename or f'{seed:03d}.jpg'}</filename>"]
    parts.append(f"<size><width>{WIDTH}</width><height>{HEIGHT}</height></size>")
    for label, *box in objects(seed):
        parts.append(f"<object><name>{NAMES[label]}</name>{flags}{corners(*box)}</object>")
    return "".join(parts) + "</annotation>"


def voc_set(
    root: Path,
    *,
    images: str = "JPEGImages",
    annotations: str = "Annotations",
    lists: bool = True,
    line: str = "{name}",
    **xml: Any,
) -> Path:
    for split, seeds in SPLITS.items():
        for seed in seeds:
            save_picture(root / images.format(split=split) / f"{seed:03d}.jpg", seed)
            path = root / annotations.format(split=split) / f"{seed:03d}.xml"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(voc_xml(seed, **xml), encoding="utf-8")
        if lists:
            path = root / "ImageSets" / "Main" / f"{split}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(line.format(name=f"{seed:03d}") + "\n" for seed in seeds), encoding="utf-8")
    return root


def labelme_shapes(seed: int) -> list[dict[str, Any]]:
    return [
        {"label": NAMES[label], "points": [[x, y], [x + wide, y + high]], "group_id": None, "shape_type": "rectangle"}
        for label, x, y, wide, high in objects(seed)
    ]


def labelme_json(path: Path, seed: int, image: str, shapes: list[dict[str, Any]] | None = None) -> Path:
    content = {
        "version": "5.5.0",
        "flags": {},
        "shapes": labelme_shapes(seed) if shapes is None else shapes,
        "imagePath": image,
        "imageData": None,
        "imageHeight": HEIGHT,
        "imageWidth": WIDTH,
    }
    return write_json(path, content)


def cvat_box(label: str, x: int, y: int, wide: int, high: int) -> str:
    return f'<box label="{label}" occluded="0" xtl="{x}" ytl="{y}" xbr="{x + wide}" ybr="{y + high}" z_order="0"/>'


def cvat_xml(seeds: Sequence[int], shape: Callable[..., str] = cvat_box, *, more: str = "", extra: str = "") -> str:
    labels = "".join(f"<label><name>{name}</name></label>" for name in ("dog", "cat"))
    parts = [f"<annotations><version>1.1</version><meta><task><labels>{labels}</labels></task></meta>"]
    for number, seed in enumerate(seeds):
        shapes = "".join(shape(NAMES[label], *box) for label, *box in objects(seed))
        size = f'width="{WIDTH}" height="{HEIGHT}"'
        parts.append(f'<image id="{number}" name="{seed:03d}.jpg" {more} {size}>{shapes}{extra}</image>')
    return "".join(parts) + "</annotations>"
