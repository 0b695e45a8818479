"""Which format a folder holds, what it contains, and one of its splits: ``open_split("data/coco", "train")``.

A split is named by the data set's own word or a synonym (val, valid); two are joined with a plus; a part is named by
per cent, ``train:0-90`` and ``train:90-100``, always the same images whatever the order of the list.

Two exports side by side (``train/`` and ``val/``, each a data set of its own) are one data set with those splits.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from cascade_rcnn.config import Orientation
from cascade_rcnn.data import files
from cascade_rcnn.data.formats.citypersons import citypersons_splits, read_citypersons
from cascade_rcnn.data.formats.classes import with_same_classes
from cascade_rcnn.data.formats.coco import coco_files, read_coco
from cascade_rcnn.data.formats.cvat import cvat_splits, read_cvat
from cascade_rcnn.data.formats.kitti import kitti_splits, read_kitti
from cascade_rcnn.data.formats.labelme import labelme_splits, read_labelme
from cascade_rcnn.data.formats.voc import read_voc, voc_splits
from cascade_rcnn.data.formats.widerface import read_widerface, widerface_splits
from cascade_rcnn.data.formats.yolo import read_yolo, yolo_splits
from cascade_rcnn.data.images import sizes_in
from cascade_rcnn.data.problems import READ_ANYWAY, Problems
from cascade_rcnn.data.records import DataSplit, ImageRecord
from cascade_rcnn.errors import DataError
from cascade_rcnn.messages import printable, shown

_Names = Callable[[Path], Iterable[str]]
_Reader = Callable[..., DataSplit]

# In this order; a COCO json beside another format's files wins, being what most tools export on purpose
_FORMATS: dict[str, tuple[_Names, _Reader, str]] = {
    "coco": (coco_files, read_coco, "COCO: annotations/instances_*.json, train/_annotations.coco.json, or a json file"),
    "citypersons": (
        citypersons_splits,
        read_citypersons,
        "CityPersons: annotations/anno_*.mat or gtBboxCityPersons/ with leftImg8bit/",
    ),
    "widerface": (widerface_splits, read_widerface, "WIDER FACE: wider_face_split/*_bbx_gt.txt, WIDER_train/images"),
    "kitti": (kitti_splits, read_kitti, "KITTI: training/label_2/*.txt with training/image_2"),
    "yolo": (yolo_splits, read_yolo, "YOLO: data.yaml, or classes.txt with images/ and labels/"),
    "cvat": (cvat_splits, read_cvat, "CVAT for images: annotations.xml with images/"),
    "voc": (voc_splits, read_voc, "VOC: Annotations/*.xml with JPEGImages/ and ImageSets/Main/*.txt"),
    "labelme": (labelme_splits, read_labelme, "labelme: a json beside each image"),
}


@dataclass(frozen=True, slots=True)
class _Export:
    """A data set in a folder that is named as a split."""

    folder: Path
    format: str
    split: str  # as its reader calls it


def recognise(root: Path | str) -> str:
    """The format of a data set: coco, citypersons, widerface, kitti, yolo, cvat, voc or labelme.

    Of exports side by side it is theirs ("coco, voc" where they differ). Raises ``DataError`` that lists what was
    looked for and what is there.
    """
    root = Path(root)
    if not (files.is_dir(root) or files.is_file(root)):
        raise DataError(f"{printable(root)}: no such folder; give the data set's folder")
    if name := _own_format(root):
        return name
    if exports := _side_by_side(root):
        return ", ".join(dict.fromkeys(export.format for export in exports.values()))
    raise DataError(_not_recognised(root))


def _own_format(root: Path) -> str | None:
    """The format of a folder as one data set; None where it is several side by side, or none."""
    name = _format_of(root)
    if name in ("yolo", "voc", "labelme"):  # these look into train/ and val/, and would miss one of another format
        formats = {export.format for export in _side_by_side(root).values()}
        return name if len(formats) < 2 else None
    return name


def _format_of(root: Path) -> str | None:
    return next((name for name, (find, _, _) in _FORMATS.items() if any(True for _ in find(root))), None)


def _side_by_side(root: Path) -> dict[str, _Export]:
    """The splits of data sets in the folders train/, val/, ...; a folder of one split gives it its name."""
    found: dict[str, _Export] = {}
    for child in files.subfolders(root) if files.is_dir(root) else []:
        outer, word = child.name, files.split_word(child.name)
        format = _format_of(child) if word else None
        if word and format is None:  # unzipped into a folder of its own
            below = [folder for folder in files.subfolders(child) if _format_of(folder)]
            child, format = (below[0], _format_of(below[0])) if len(below) == 1 else (child, None)
        if format is None:
            continue
        inner = list(_FORMATS[format][0](child))
        same = [name for name in inner if files.split_word(name) == word]
        if len(inner) == 1 or len(same) == 1:
            found[outer] = _Export(child, format, (same or inner)[0])
        else:
            found |= {f"{outer}_{name}": _Export(child, format, name) for name in inner}
    return found


def splits(root: Path | str) -> list[str]:
    """Names of the splits of a data set, as the data set writes them; what ``check``, ``train``, ``evaluate`` find."""
    root = Path(root)
    name = recognise(root)
    return list(_FORMATS[name][0](root) if _own_format(root) else _side_by_side(root))


def disjoint_splits(root: Path | str) -> list[str]:
    """The splits without those that repeat others: no trainval where train and val are there."""
    names = splits(root)
    have = {name.lower() for name in names}
    return [
        name
        for name in names
        if not (name.lower().endswith("trainval") and {name.lower()[:-8] + "train", name.lower()[:-8] + "val"} <= have)
    ]


def open_split(root: Path | str, split: str, *, strict: bool = True, orientation: Orientation = "auto") -> DataSplit:
    """Reads a split of a data set of any known format.

    Args:
        root: folder of the data set, or a COCO json file.
        split: a name, names joined with a plus, each perhaps with a part: ``2007_trainval+2012_trainval:0-50``.
        strict: raise the first problem that would ruin a training; else leave it out. Either way
            ``DataSplit.problems`` lists what was left out.
        orientation: ``data.orientation``: what a size counts that the annotation does not give and the file must.
    """
    root = Path(root)
    recognise(root)
    parts = []
    for word in split.split("+"):
        name, _, share = word.strip().partition(":")
        with sizes_in("stored" if orientation == "stored" else "upright"):
            part = _read(root, name, Problems(strict=strict))
        parts.append(_share(part, share, root) if share else part)
    return parts[0] if len(parts) == 1 else _join(parts, split)


def _read(root: Path, name: str, problems: Problems) -> DataSplit:
    if format := _own_format(root):
        return _FORMATS[format][1](root, name, problems=problems)
    exports = _side_by_side(root)
    chosen = files.resolve_split(list(exports), name, root)
    export = exports[chosen]
    split = _FORMATS[export.format][1](export.folder, export.split, problems=problems)
    return replace(split, name=chosen)


def _share(split: DataSplit, share: str, root: Path) -> DataSplit:
    """The images of a split from one per cent to another, in an order that only their names decide."""
    low, dash, high = share.replace("%", "").partition("-")
    try:
        start, end = float(low), float(high)
    except ValueError:
        start, end = 0.0, 0.0
    if not dash or not 0 <= start < end <= 100:
        raise DataError(
            f"{printable(root)}: part {shown(share)} of split {split.name!r} is not "
            "understood; write per cent from and to, e.g. train:0-90"
        )

    def place(record: ImageRecord) -> bytes:
        return hashlib.sha256(record.file_name.encode("utf-8", "surrogateescape")).digest()

    shuffled = sorted(range(len(split)), key=lambda number: place(split.records[number]))
    chosen = sorted(shuffled[_bound(len(split), start) : _bound(len(split), end)])
    if not chosen:
        raise DataError(
            f"{printable(root)}: part {share} of split {split.name!r} holds none of its {len(split)} images; "
            "take a larger part"
        )
    # The truth file speaks of all images: whoever scores a part writes its own (writers.coco_dict)
    return replace(split, name=f"{split.name}:{share}", records=[split.records[n] for n in chosen], truth=None)


def _bound(images: int, percent: float) -> int:
    """Where a per cent falls in a list; of few images both sides still get one, as 90 % of four."""
    if images < 2 or percent in (0, 100):
        return round(images * percent / 100)
    return min(max(round(images * percent / 100), 1), images - 1)


def _join(parts: list[DataSplit], name: str) -> DataSplit:
    first = max(parts, key=lambda part: len(part.class_names))
    for part in parts:
        if not set(part.class_names) <= set(first.class_names):
            raise DataError(
                f"{printable(first.root)}: splits {first.name!r} and {part.name!r} have different "
                f"classes ({', '.join(first.class_names)}; {', '.join(part.class_names)}); make them equal"
            )
    parts = with_same_classes([first, *parts])[1:]
    records = [record for part in parts for record in part.records]
    if len({record.image_id for record in records}) < len(records):
        records = [
            replace(record, image_id=f"{part.name}/{record.image_id}") for part in parts for record in part.records
        ]
    has_masks = any(part.has_masks for part in parts)
    if has_masks:
        records = [
            record if record.segmentations is not None else replace(record, segmentations=[None] * len(record.boxes))
            for record in records
        ]
    return replace(
        parts[0],
        name=name,
        records=records,
        truth=None,
        has_masks=has_masks,
        problems=[problem for part in parts for problem in part.problems],
    )


def describe(root: Path | str) -> str:
    """What a data set holds, one line per split: images, objects, ignore regions, classes."""
    root = Path(root)
    found = recognise(root)
    lines = [f"{printable(root)}: {found} format"]
    for name in splits(root):
        lines.append("  " + describe_split(open_split(root, name, strict=False)))
    return "\n".join(lines)


def describe_split(split: DataSplit) -> str:
    """``train: 205 images, 2724 objects, 3 classes (RBC, WBC, Platelets)``, and what was left out."""
    ignored = sum(int(record.ignore.sum()) for record in split.records)
    objects = sum(len(record.boxes) for record in split.records) - ignored
    classes = ", ".join(split.class_names[:8]) + (", ..." if len(split.class_names) > 8 else "")
    text = f"{split.name}: {_counted(len(split), 'image')}, {_counted(objects, 'object')}"
    text += f", {_counted(ignored, 'ignore region')}" if ignored else ""
    text += f", {_counted(len(split.class_names), 'class', 'classes')} ({classes})"
    text += ", masks" if split.has_masks else ""
    left_out = Counter(problem.kind for problem in split.problems if problem.kind not in READ_ANYWAY)
    return text + "".join(f", {number} x {kind}" for kind, number in left_out.items())


def _counted(number: int, one: str, many: str = "") -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def _not_recognised(root: Path) -> str:
    wanted = "; ".join(text for _, _, text in _FORMATS.values())
    inside = [(child, name) for child in files.subfolders(root) if (name := _format_of(child))]
    if len(inside) > 1:
        listed = ", ".join(f"{printable(child)} ({name})" for child, name in inside[:4])
        return f"{printable(root)}: no data set here, but several below: {listed}; name one of them"
    if inside:
        child, name = inside[0]
        return f"{printable(root)}: no data set here, but {printable(child)} is {name}: name that"
    if _is_folder_per_class(root):
        return (
            f"{printable(root)}: a folder per class holds no boxes and is not supported; draw boxes with a "
            "labelling tool (CVAT, Label Studio, labelImg) and export COCO, VOC or YOLO"
        )
    return (
        f"{printable(root)}: no known data set; looked for {wanted}. There is: {_tree(root)}; "
        "docs/data.md shows each layout"
    )


def _is_folder_per_class(root: Path) -> bool:
    folders = files.subfolders(root)
    inner = [child for folder in folders for child in files.subfolders(folder)] or folders
    return len(inner) >= 2 and all(files.list_files(folder) for folder in inner)


def _tree(root: Path) -> str:
    """The first entries of a folder and of its subfolders, in one line."""
    if not root.is_dir():
        return "a file"
    names = []
    for child in sorted(root.iterdir())[:8]:
        inner = ""
        if child.is_dir():
            below = sorted(grandchild.name for grandchild in child.iterdir())
            inner = "/ (" + ", ".join(below[:3]) + (", ..." if len(below) > 3 else "") + ")"
        names.append(child.name + inner)
    return printable(", ".join(names)) or "nothing"
