"""Suspects as files that annotation tools open, for a person to accept or refuse; the data set itself stays as it is.

``OUT/review`` holds the images with suspects (linked) and

* ``annotations.xml`` for CVAT ("CVAT for images 1.1"): every annotation as it is, and each proposal as a box of its own
  whose label ends in a question mark (``RBC?``; ``remove?`` where a box should go), with kind and score as attributes;
  ``cvat_labels.json`` is the label constructor's raw text.
* ``tasks.json`` for Label Studio: the annotations, and as a prediction the same with the proposals carried out, each
  changed region with its score and reason; ``label_config.xml`` is the labelling interface.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote
from xml.etree import ElementTree
from xml.sax.saxutils import quoteattr

from PIL import Image

from cascade_rcnn.config import DataConfig
from cascade_rcnn.data.dataset import read_record
from cascade_rcnn.data.images import read_header
from cascade_rcnn.data.records import DataSplit, ImageRecord
from cascade_rcnn.drawing.annotations import class_color
from cascade_rcnn.inference.as_dataset import place_picture
from cascade_rcnn.labels.rank import Suspect
from cascade_rcnn.labels.report import describe

REMOVE = "remove?"


@dataclass(frozen=True)
class _Page:
    """One image of the review."""

    name: str  # below ``images``
    record: ImageRecord
    size: tuple[int, int]  # height, width
    suspects: list[Suspect]


def write_review(split: DataSplit, suspects: Sequence[Suspect], out: Path, *, data: DataConfig) -> None:
    """Write the folder ``out``, which must not be there yet. Images come in the order of their first suspect."""
    by_image: dict[int, list[Suspect]] = {}
    for suspect in suspects:
        by_image.setdefault(suspect.image, []).append(suspect)
    (out / "images").mkdir(parents=True)
    pages = [_place(split, image, found, out / "images", data) for image, found in by_image.items()]
    _write_cvat(split, pages, out)
    _write_label_studio(split, pages, out)


def _place(split: DataSplit, image: int, suspects: list[Suspect], folder: Path, data: DataConfig) -> _Page:
    """Link the picture; one that tools would turn is written anew, as its labels count it."""
    record = split.records[image]
    name = f"{image:06d}_{PurePosixPath(record.file_name.replace(chr(92), '/')).name}"
    header = read_header(record.path)
    size = (record.height, record.width) if record.height else (header.height, header.width)
    if header.orientation > 1:
        name = str(PurePosixPath(name).with_suffix(".png"))
        pixels = read_record(record, split.format, data).permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / name)
        size = pixels.shape[:2]
    else:
        place_picture(record.path, folder / name)
    return _Page(name, record, size, suspects)


# CVAT


def _write_cvat(split: DataSplit, pages: Sequence[_Page], out: Path) -> None:
    names = split.class_names
    given = [_cvat_label(name, label) for label, name in enumerate(names)]
    asked = [_cvat_label(f"{name}?", label, attributes=_ATTRIBUTES) for label, name in enumerate(names)]
    labels = [*given, *asked, _cvat_label(REMOVE, len(names), attributes=_ATTRIBUTES)]
    (out / "cvat_labels.json").write_text(json.dumps(labels, indent=1) + "\n", encoding="utf-8")
    root = ElementTree.Element("annotations")
    ElementTree.SubElement(root, "version").text = "1.1"
    listed = ElementTree.SubElement(ElementTree.SubElement(ElementTree.SubElement(root, "meta"), "task"), "labels")
    for label in labels:
        element = ElementTree.SubElement(listed, "label")
        ElementTree.SubElement(element, "name").text = label["name"]
        ElementTree.SubElement(element, "color").text = label["color"]
    for number, page in enumerate(pages):
        height, width = page.size
        facts = {"id": str(number), "name": page.name, "width": str(width), "height": str(height)}
        image = ElementTree.SubElement(root, "image", facts)
        for box, label in zip(page.record.boxes.tolist(), page.record.labels.tolist()):
            _cvat_box(image, box, names[label])
        for suspect in page.suspects:
            name = f"{names[suspect.proposed_label]}?" if suspect.proposed_box else REMOVE
            element = _cvat_box(image, suspect.proposed_box or suspect.box, name)
            for key, text in (("kind", suspect.kind), ("score", f"{suspect.score:.3f}")):
                ElementTree.SubElement(element, "attribute", {"name": key}).text = text
    ElementTree.indent(root)
    content = ElementTree.tostring(root, encoding="unicode")
    (out / "annotations.xml").write_text(f'<?xml version="1.0" encoding="utf-8"?>\n{content}\n', encoding="utf-8")


_ATTRIBUTES = [
    {"name": name, "mutable": False, "input_type": "text", "default_value": "", "values": [""]}
    for name in ("kind", "score")
]


def _cvat_label(name: str, label: int, *, attributes: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """A label as CVAT's constructor takes it; of a proposal it has its class's colour."""
    return {"name": name, "color": _hex(label), "type": "any", "attributes": list(attributes)}


def _cvat_box(image: ElementTree.Element, box: Any, label: str) -> ElementTree.Element:
    corners = {key: f"{value:.2f}" for key, value in zip(("xtl", "ytl", "xbr", "ybr"), box)}
    return ElementTree.SubElement(
        image, "box", {"label": label, "source": "manual", "occluded": "0", **corners, "z_order": "0"}
    )


def _hex(label: int) -> str:
    return "#" + "".join(f"{part:02x}" for part in class_color(label))


# Label Studio


def _write_label_studio(split: DataSplit, pages: Sequence[_Page], out: Path) -> None:
    tasks = []
    for page in pages:
        by_row = {suspect.row: suspect for suspect in page.suspects if suspect.row >= 0}
        given = [
            _region(split, page, str(row), box, label)
            for row, (box, label) in enumerate(zip(page.record.boxes.tolist(), page.record.labels.tolist()))
        ]
        changed = [
            region
            for row, region in enumerate(given)
            for region in ([region] if row not in by_row else _proposal(split, page, by_row[row], str(row)))
        ]
        missed = [suspect for suspect in page.suspects if suspect.row < 0]
        for number, suspect in enumerate(missed):
            changed += _proposal(split, page, suspect, f"missed-{number}")
        tasks.append(
            {
                "data": {"image": f"/data/local-files/?d={quote(f'images/{page.name}')}"},
                "annotations": [{"result": given}],
                "predictions": [
                    {
                        "model_version": "cascade-rcnn check",
                        "score": max(suspect.score for suspect in page.suspects),
                        "result": changed,
                    }
                ],
            }
        )
    (out / "tasks.json").write_text(json.dumps(tasks, indent=1) + "\n", encoding="utf-8")
    labels = "".join(
        f"    <Label value={quoteattr(name)} background={quoteattr(_hex(label))}/>\n"
        for label, name in enumerate(split.class_names)
    )
    (out / "label_config.xml").write_text(
        '<View>\n  <Image name="image" value="$image"/>\n  <RectangleLabels name="label" toName="image">\n'
        f"{labels}  </RectangleLabels>\n</View>\n",
        encoding="utf-8",
    )


def _proposal(split: DataSplit, page: _Page, suspect: Suspect, name: str) -> list[dict[str, Any]]:
    """The region that should stand there, with score and reason; none where the annotation should go."""
    if suspect.proposed_box is None:
        return []
    region = _region(split, page, name, suspect.proposed_box, suspect.proposed_label)
    return [region | {"score": suspect.score, "meta": {"text": [describe(suspect, split.class_names)]}}]


def _region(split: DataSplit, page: _Page, name: str, box: Sequence[float], label: int) -> dict[str, Any]:
    height, width = page.size
    x1, y1, x2, y2 = (100 * value / side for value, side in zip(box, (width, height, width, height)))
    return {
        "id": name,
        "type": "rectanglelabels",
        "from_name": "label",
        "to_name": "image",
        "original_width": width,
        "original_height": height,
        "image_rotation": 0,
        "value": {
            "x": x1,
            "y": y1,
            "width": x2 - x1,
            "height": y2 - y1,
            "rotation": 0,
            "rectanglelabels": [split.class_names[label]],
        },
    }
