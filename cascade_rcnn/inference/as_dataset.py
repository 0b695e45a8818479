"""What was found in images, written as a data set that annotation tools and our own readers open.

One class per format; each writes image by image, so that memory does not grow with their number. Pictures are linked
(or copied), and written anew only where an orientation tag would have tools disagree on which side is up.

| format | masks with holes | masks of several parts | scores |
|---|---|---|---|
| coco | a slit leads into the hole | several polygons of one object | ``score`` of the annotation |
| yolo | a slit | one ring, its parts joined by slits | none: the format has no place for them |
| labelme | a slit | several shapes with one ``group_id`` | ``score`` and ``description`` of the shape |
| label-studio | a slit | several regions named part 1 of 2, ... | ``score`` of the region |
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cascade_rcnn.data.contours import Ring, joined, outlines, with_slits
from cascade_rcnn.data.images import read_header
from cascade_rcnn.drawing.annotations import class_color
from cascade_rcnn.errors import UserError
from cascade_rcnn.inference.detections import Detections
from cascade_rcnn.inference.predictions_file import ResultsFile
from cascade_rcnn.messages import printable, shown

Format = Literal["coco", "yolo", "labelme", "label-studio"]
SPLIT = "train"  # the name under which our own reader and others look for a data set of one part


@dataclass(frozen=True)
class FoundObject:
    """One detection as it is written."""

    label: int
    score: float
    box: tuple[float, float, float, float]  # xyxy, of the mask where there is one
    area: float  # of the mask, else of the box
    rings: list[Ring] | None  # one per part, holes cut in; None for a model without masks


@dataclass(frozen=True)
class FoundImage:
    """A picture that lies in the data set, with its objects."""

    name: str  # in the data set, with forward slashes
    height: int
    width: int
    objects: list[FoundObject]
    image_id: int | str | None  # where the user has said it


def dataset_writer(format: str, out: Path, *, checkpoint: str, copy: bool = False) -> DatasetWriter:
    """The writer of a format, into ``out``.

    Raises:
        UserError: another format, or a folder that holds something already.
    """
    kinds: dict[str, type[DatasetWriter]] = {
        "coco": _Coco,
        "yolo": _Yolo,
        "labelme": _Labelme,
        "label-studio": _LabelStudio,
    }
    if format not in kinds:
        raise UserError(f"data set format {shown(format)}: choose one of {', '.join(kinds)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(
            f"{printable(out)}: is there already, and old labels would stay among the new ones; remove it or choose "
            "another --out"
        )
    return kinds[format](out, checkpoint=checkpoint, copy=copy)


def _found_objects(detections: Detections, notes: Counter[str]) -> Iterator[FoundObject]:
    """Each detection as it is written; ``notes`` counts those that cover no pixel and are left out."""
    crops = detections.mask_crops()
    rows = zip(detections.boxes.double().tolist(), detections.scores.tolist(), detections.labels.tolist())
    for box, score, label in rows:
        area, rings = (box[2] - box[0]) * (box[3] - box[1]), None
        if detections.mask_probs is not None:
            crop = next(crops)
            area, rings = float(crop.pixels.sum()), [with_slits(part) for part in outlines(crop)]
            if rings:  # as annotations have it: the box of a mask is its extent
                corners = np.concatenate(rings)
                box = [*corners.min(axis=0).tolist(), *corners.max(axis=0).tolist()]
        if area <= 0:
            notes["objects without a pixel left out"] += 1
            continue
        yield FoundObject(label, score, (box[0], box[1], box[2], box[3]), area, rings)


class DatasetWriter:
    """Places pictures and hands their objects to ``write``; subclasses know a format."""

    flat = False  # folders of the names become part of the name
    folder = PurePosixPath(SPLIT)  # where pictures lie

    def __init__(self, out: Path, *, checkpoint: str, copy: bool) -> None:
        self.out, self.checkpoint, self.copy = out, checkpoint, copy
        self.images = self.objects = 0
        self.notes: Counter[str] = Counter()
        self._taken: set[str] = set()

    def begin(self, class_names: Sequence[str], category_ids: Sequence[int]) -> None:
        """Called once before the first image."""
        self.class_names = tuple(class_names)
        self.category_ids = tuple(category_ids) or tuple(range(1, len(class_names) + 1))
        self.out.mkdir(parents=True, exist_ok=True)
        self.open()

    def add(self, source: Path, name: str, pixels: NDArray[np.uint8] | None, detections: Detections) -> None:
        """Place the picture ``source``, whose upright pixels are [H, W, 3], and write its objects.

        Without pixels (of a picture larger than memory) one with an orientation tag is left out, and counted.
        """
        turned = _is_turned(source)
        if turned and pixels is None:
            self.notes["large pictures with an orientation tag left out; store them upright"] += 1
            return
        objects = list(_found_objects(detections, self.notes))
        name = self._new_name(name, turned)
        target = self.out / self.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if turned and pixels is not None:
            _save(pixels, target)
            self.notes["pictures with an orientation tag written anew, upright"] += 1
        else:
            place_picture(source, target, copy=self.copy)
        height, width = detections.size
        self.images += 1
        self.objects += len(objects)
        self.write(FoundImage(name, height, width, objects, detections.image_id))

    def finish(self) -> str:
        """Complete the files; one line that says what was written and how it is opened."""
        self.close()
        told = "".join(f"; {what}: {count}" for what, count in self.notes.items())
        images, objects = (
            f"{n} {word}{'s' * (n != 1)}" for n, word in ((self.images, "image"), (self.objects, "object"))
        )
        return f"{images}, {objects}{told}; {self.how_to_open()}"

    def open(self) -> None:
        """Before the first image."""

    def write(self, image: FoundImage) -> None:
        """One image and its objects."""
        raise NotImplementedError

    def close(self) -> None:
        """After the last image."""

    def how_to_open(self) -> str:
        """The end of the last line."""
        raise NotImplementedError

    def _new_name(self, name: str, turned: bool) -> str:
        """The name in the data set: labels lie in NAME.txt or NAME.json, so that endings do not tell names apart."""
        path = PurePosixPath(name.replace("/", "_") if self.flat else name)
        if turned and path.suffix.lower() not in (".jpg", ".jpeg", ".png"):
            path = path.with_name(path.name + ".png")
        unique, number = path, 1
        while str(unique.with_suffix("")).lower() in self._taken:
            number += 1
            unique = path.with_name(f"{path.stem}-{number}{path.suffix}")
        self._taken.add(str(unique.with_suffix("")).lower())
        self.notes["pictures renamed, to be told apart without their endings"] += unique.name != path.name
        self.notes += Counter()  # without zeros
        return str(unique)


class _Coco(DatasetWriter):
    def open(self) -> None:
        self._images: list[dict[str, Any]] = []
        self._annotations = ResultsFile(self.out / "annotations" / ".annotations.json")
        self._annotations.__enter__()

    def write(self, image: FoundImage) -> None:
        number = len(self._images) + 1 if image.image_id is None else image.image_id
        self._images.append({"id": number, "file_name": image.name, "height": image.height, "width": image.width})
        self._annotations.add(
            {
                "id": self._annotations.count + 1,
                "image_id": number,
                "category_id": self.category_ids[one.label],
                "bbox": [one.box[0], one.box[1], one.box[2] - one.box[0], one.box[3] - one.box[1]],
                "area": one.area,
                "iscrowd": 0,
                "score": one.score,
                **({} if one.rings is None else {"segmentation": [ring.reshape(-1).tolist() for ring in one.rings]}),
            }
            for one in image.objects
        )

    def close(self) -> None:
        self._annotations.__exit__(None, None, None)
        rows = self._annotations.path
        categories = [{"id": number, "name": name} for number, name in zip(self.category_ids, self.class_names)]
        head = {"info": {"description": f"found by {self.checkpoint}"}, "licenses": [], "categories": categories}
        target = rows.with_name(f"instances_{SPLIT}.json")
        with (
            target.open("w", encoding="utf-8", errors="backslashreplace") as whole,
            rows.open(encoding="utf-8") as part,
        ):
            whole.write(json.dumps(head)[:-1] + ',\n"images": ' + json.dumps(self._images) + ',\n"annotations": ')
            shutil.copyfileobj(part, whole)
            whole.write("}\n")
        rows.unlink()

    def how_to_open(self) -> str:
        return f"{_train_on(self.out)}; CVAT and FiftyOne import it as COCO"


class _Yolo(DatasetWriter):
    flat = True
    folder = PurePosixPath("images") / SPLIT

    def open(self) -> None:
        names = "".join(f"  {number}: {json.dumps(name)}\n" for number, name in enumerate(self.class_names))
        (self.out / "data.yaml").write_text(f"{SPLIT}: images/{SPLIT}\nnames:\n{names}", encoding="utf-8")
        (self.out / "labels" / SPLIT).mkdir(parents=True)

    def write(self, image: FoundImage) -> None:
        lines = []
        for one in image.objects:
            x1, y1, x2, y2 = one.box
            points = np.array([((x1 + x2) / 2, (y1 + y2) / 2), (x2 - x1, y2 - y1)])
            if one.rings is not None:
                points = joined(one.rings)
            fractions = (points / (image.width, image.height)).reshape(-1)
            lines.append(" ".join([str(one.label), *(f"{value:.8g}" for value in fractions)]) + "\n")
        label = self.out / "labels" / SPLIT / f"{PurePosixPath(image.name).stem}.txt"
        label.write_text("".join(lines), encoding="utf-8")

    def how_to_open(self) -> str:
        return f"{_train_on(self.out)}; CVAT and FiftyOne import it as (Ultralytics) YOLO by data.yaml; without scores"


class _Labelme(DatasetWriter):
    folder = PurePosixPath()

    def open(self) -> None:
        (self.out / "labels.txt").write_text("".join(f"{name}\n" for name in self.class_names), encoding="utf-8")

    def write(self, image: FoundImage) -> None:
        shapes: list[dict[str, Any]] = []
        for number, one in enumerate(image.objects, start=1):
            corners = np.array(one.box).reshape(2, 2)
            parts = [corners] if one.rings is None else one.rings
            shapes += [
                {
                    "label": self.class_names[one.label],
                    "points": ring.tolist(),
                    "group_id": number if len(parts) > 1 else None,
                    "description": f"score {one.score:.3f}",
                    "shape_type": "rectangle" if one.rings is None else "polygon",
                    "flags": {},
                    "mask": None,
                    "score": one.score,
                }
                for ring in parts
            ]
        content: dict[str, Any] = {
            "version": "5.5.0",
            "flags": {},
            "shapes": shapes,
            "imagePath": PurePosixPath(image.name).name,
            "imageData": None,
            "imageHeight": image.height,
            "imageWidth": image.width,
        }
        path = (self.out / image.name).with_suffix(".json")
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def how_to_open(self) -> str:
        folder = printable(self.out)
        return f"open it with: labelme {folder} --labels {folder}/labels.txt; {_train_on(self.out, 'all')}"


def label_studio_regions(detections: Detections, labels: Mapping[int, str], *, polygons: bool) -> list[dict[str, Any]]:
    """Label Studio's regions of detections, with the names of ``labels``; ``polygons`` needs masks, else boxes."""
    objects = _found_objects(detections, Counter())
    wanted = [one if polygons else dataclasses.replace(one, rings=None) for one in objects]
    return _regions(wanted, labels, size=detections.size)


def _regions(
    objects: Sequence[FoundObject], labels: Mapping[int, str], *, size: tuple[int, int]
) -> list[dict[str, Any]]:
    return [
        _region(one, f"{number}-{part}", ring, f"part {part} of {len(one.rings or [0])}", labels[one.label], size)
        for number, one in enumerate(objects, start=1)
        for part, ring in enumerate(one.rings or [np.array(one.box).reshape(2, 2)], start=1)
    ]


def _region(one: FoundObject, name: str, ring: Ring, part: str, label: str, size: tuple[int, int]) -> dict[str, Any]:
    height, width = size
    per_cent = ring / (width, height) * 100
    kind = "rectanglelabels" if one.rings is None else "polygonlabels"
    value: dict[str, Any] = {"points": per_cent.tolist(), "closed": True}
    if one.rings is None:
        (x1, y1), (x2, y2) = per_cent.tolist()
        value = {"x": x1, "y": y1, "width": x2 - x1, "height": y2 - y1, "rotation": 0}
    region = {
        "id": name,
        "type": kind,
        "from_name": "label",
        "to_name": "image",
        "original_width": width,
        "original_height": height,
        "image_rotation": 0,
        "score": one.score,
        "value": value | {kind: [label]},
    }
    return region if len(one.rings or [0]) == 1 else region | {"meta": {"text": [part]}}


class _LabelStudio(DatasetWriter):
    folder = PurePosixPath("images")

    def open(self) -> None:
        self._tasks = ResultsFile(self.out / "tasks.json")
        self._tasks.__enter__()
        self._masks = False

    def write(self, image: FoundImage) -> None:
        names = dict(enumerate(self.class_names))
        regions = _regions(image.objects, names, size=(image.height, image.width))
        self._masks = self._masks or any(one.rings is not None for one in image.objects)
        prediction: dict[str, Any] = {"model_version": self.checkpoint, "result": regions}
        if image.objects:
            prediction["score"] = min(one.score for one in image.objects)  # the least sure one is looked at first
        address = f"/data/local-files/?d={quote(f'images/{image.name}')}"
        self._tasks.add([{"data": {"image": address}, "predictions": [prediction]}])

    def close(self) -> None:
        self._tasks.__exit__(None, None, None)
        tag = "PolygonLabels" if self._masks else "RectangleLabels"
        labels = "".join(
            f"    <Label value={quoteattr(name)} background={quoteattr(_hex(class_color(label)))}/>\n"
            for label, name in enumerate(self.class_names)
        )
        (self.out / "label_config.xml").write_text(
            f'<View>\n  <Image name="image" value="$image"/>\n  <{tag} name="label" toName="image">\n{labels}'
            f"  </{tag}>\n</View>\n",
            encoding="utf-8",
        )

    def how_to_open(self) -> str:
        root = printable(self.out.resolve())
        return (
            "open it with: LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED=true "
            f"LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT={root} label-studio start; there make a project with "
            f"label_config.xml, add {root}/images as local storage (no sync), import tasks.json"
        )


def _hex(color: tuple[int, int, int]) -> str:
    return "#" + "".join(f"{part:02x}" for part in color)


def _train_on(out: Path, split: str = SPLIT) -> str:
    return (
        f"train on it with: cascade-rcnn train finetune --data {printable(out)} "
        f"--data.train {split}:0-90 --data.val {split}:90-100"
    )


def _is_turned(path: Path) -> bool:
    """Whether an orientation tag says that the stored picture is not upright."""
    return read_header(path).orientation > 1


def _save(pixels: NDArray[np.uint8], path: Path) -> None:
    options: dict[str, Any] = {} if path.suffix.lower() == ".png" else {"quality": 95, "subsampling": 0}
    Image.fromarray(pixels).save(path, **options)


def place_picture(source: Path, target: Path, *, copy: bool = False) -> None:
    """A hard link, which containers and archives take for a file of their own; else a link by name; else a copy."""
    source = source.resolve()
    for link in () if copy else (os.link, os.symlink):
        try:
            link(source, target)
            return
        except OSError:  # another disk, or a file system or user without links
            continue
    shutil.copyfile(source, target)
