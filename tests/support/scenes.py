"""One tiny scene written by hand in all six formats: an image with an object and an ignore region, an empty one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy.io
from PIL import Image

SIZES = {"a": (48, 64), "b": (40, 40)}  # height, width
OBJECT = (10.0, 5.0, 30.0, 25.0)  # xyxy
IGNORED = (32.0, 8.0, 60.0, 40.0)


def write_image(path: Path, name: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = SIZES[name]
    pixels = np.arange(height * width * 3, dtype=np.uint32).reshape(height, width, 3) % (251 if name == "a" else 241)
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


def write_text(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def _xywh(box: tuple[float, ...]) -> list[float]:
    return [box[0], box[1], box[2] - box[0], box[3] - box[1]]


def coco_content() -> dict[str, Any]:
    return {
        "images": [
            {"id": number, "file_name": f"{name}.png", "height": SIZES[name][0], "width": SIZES[name][1]}
            for number, name in enumerate("ab", start=7)
        ],
        "annotations": [
            {
                "id": 1,
                "image_id": 7,
                "category_id": 3,
                "bbox": _xywh(OBJECT),
                "area": 400,
                "iscrowd": 0,
                "segmentation": [[10, 5, 30, 5, 30, 25, 10, 25]],
            },
            {
                "id": 2,
                "image_id": 7,
                "category_id": 3,
                "bbox": _xywh(IGNORED),
                "area": 896,
                "iscrowd": 1,
                "segmentation": {"size": [48, 64], "counts": [32 * 48 + 8, 32, 48 * 64 - 32 * 48 - 40]},
            },
        ],
        "categories": [{"id": 3, "name": "Pedestrian"}],
    }


def write_coco(root: Path, content: dict[str, Any] | None = None, *, split: str = "train") -> Path:
    for name in "ab":
        write_image(root / split / f"{name}.png", name)
    write_text(root / "annotations" / f"instances_{split}.json", json.dumps(content or coco_content()))
    return root


def voc_xml(name: str) -> str:
    height, width = SIZES[name]
    objects = ""
    for box, difficult in ((OBJECT, 0), (IGNORED, 1)) if name == "a" else ():
        objects += (
            f"<object><name>Pedestrian</name><difficult>{difficult}</difficult><bndbox>"
            f"<xmin>{box[0] + 1:g}</xmin><ymin>{box[1] + 1:g}</ymin>"
            f"<xmax>{box[2]:g}</xmax><ymax>{box[3]:g}</ymax></bndbox></object>\n"
        )
    return (
        f"<annotation><filename>{name}.png</filename><size><width>{width}</width><height>{height}</height></size>\n"
        f"{objects}</annotation>\n"
    )


def write_voc(root: Path) -> Path:
    for name in "ab":
        write_image(root / "JPEGImages" / f"{name}.png", name)
        write_text(root / "Annotations" / f"{name}.xml", voc_xml(name))
    write_text(root / "ImageSets" / "Main" / "train.txt", "a\nb\n")
    return root


def write_kitti(root: Path) -> Path:
    for name in "ab":
        write_image(root / "training" / "image_2" / f"{name}.png", name)
    row = "{} {} {} -0.2 {:.2f} {:.2f} {:.2f} {:.2f} 1.8 0.5 1.2 1.8 1.4 8.4 0.01\n"
    text = row.format("Pedestrian", "0.00", 0, *OBJECT) + row.format("DontCare", -1, -1, *IGNORED)
    write_text(root / "training" / "label_2" / "a.txt", text)
    write_text(root / "training" / "label_2" / "b.txt", "")
    write_text(root / "ImageSets" / "train.txt", "a\nb\n")
    return root


def write_citypersons(root: Path) -> Path:
    entries = np.empty((1, 2), dtype=object)
    rows = [[1, *_xywh(OBJECT), 24000, *_xywh(OBJECT)], [0, *_xywh(IGNORED), 0, *_xywh(IGNORED)]]
    for number, name in enumerate("ab"):
        write_image(root / "leftImg8bit" / "train" / "ulm" / f"{name}.png", name)
        table = np.array(rows if name == "a" else np.zeros((0, 10)), dtype=np.uint16)
        entries[0, number] = {"cityname": "ulm", "im_name": f"{name}.png", "bbs": table}
    (root / "annotations").mkdir(parents=True)
    scipy.io.savemat(str(root / "annotations" / "anno_train.mat"), {"anno_train_aligned": entries})
    return root


def write_widerface(root: Path) -> Path:
    for name in "ab":
        write_image(root / "WIDER_train" / "images" / "0--Parade" / f"{name}.png", name)
    rows = [
        " ".join(f"{value:g}" for value in [*_xywh(box), 0, 0, 0, invalid, 0, 0])
        for box, invalid in ((OBJECT, 0), (IGNORED, 1))
    ]
    write_text(
        root / "wider_face_split" / "wider_face_train_bbx_gt.txt",
        f"0--Parade/a.png\n2\n{rows[0]} \n{rows[1]} \n0--Parade/b.png\n0\n0 0 0 0 0 0 0 0 0 0 \n",
    )
    return root


def write_yolo(root: Path) -> Path:
    """YOLO has no ignore regions: only the object is written."""
    for name in "ab":
        write_image(root / "images" / "train" / f"{name}.png", name)
    (x1, y1, x2, y2), (height, width) = OBJECT, SIZES["a"]
    write_text(
        root / "labels" / "train" / "a.txt",
        f"0 {(x1 + x2) / 2 / width!r} {(y1 + y2) / 2 / height!r} {(x2 - x1) / width!r} {(y2 - y1) / height!r}\n",
    )
    write_text(root / "labels" / "train" / "b.txt", "")
    write_text(root / "data.yaml", "path: .\ntrain: images/train\nnames:\n  0: Pedestrian\n")
    return root


WRITERS: dict[str, Callable[[Path], Path]] = {
    "coco": write_coco,
    "voc": write_voc,
    "kitti": write_kitti,
    "citypersons": write_citypersons,
    "widerface": write_widerface,
    "yolo": write_yolo,
}
