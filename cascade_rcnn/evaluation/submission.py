"""Detections in each benchmark's own submission format, as its server or ``cascade-rcnn score`` reads them."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cascade_rcnn.atomic_files import write_json
from cascade_rcnn.data.image_ids import coco_id, match_names
from cascade_rcnn.data.records import DataSplit, ImageRecord
from cascade_rcnn.errors import DataError
from cascade_rcnn.evaluation import read_results
from cascade_rcnn.messages import shown


def write_submission(format: str, split: DataSplit, detections: list[dict[str, Any]], out: Path) -> Path:
    """Writes detections (COCO results: image_id, category_id, bbox [x, y, w, h], score) below the folder ``out``.

    ``format`` is coco, voc, kitti, citypersons or widerface; ids are those of the split's records. Numbers keep their
    full precision. Images without detections get the empty file that their benchmark asks for. Returns what
    ``score --results`` takes. Raises ``DataError`` for an unknown format or id, or when ``out`` holds other results.
    """
    if format not in _WRITERS:
        raise DataError(f"submission format {format!r}: choose one of {', '.join(_WRITERS)}")
    rows: dict[Hashable, int] = {record.image_id: row for row, record in enumerate(split.records)}
    table = read_results.parse_results(detections, name="detections", images=rows, categories=split.category_ids)
    out.mkdir(parents=True, exist_ok=True)
    return _WRITERS[format](split, detections, table, out)


def voc_list_name(split: DataSplit) -> str:
    """The name of a VOC split's list in ``ImageSets/Main``: a split ``2007_test`` among several years is ``test``."""
    if split.truth is not None and not (split.truth / "ImageSets" / "Main" / f"{split.name}.txt").is_file():
        return split.name.split("_", 1)[-1]
    return split.name


def _write_coco(split: DataSplit, detections: list[dict[str, Any]], table: read_results.ResultTable, out: Path) -> Path:
    ids = [record.image_id for record in split.records]
    content = [
        {"image_id": ids[image], "category_id": category, "bbox": box, "score": score}
        | ({"segmentation": given["segmentation"]} if given.get("segmentation") else {})
        for image, category, box, score, given in zip(
            table.images.tolist(), table.categories.tolist(), table.boxes.tolist(), table.scores.tolist(), detections
        )
    ]
    write_json(out / "results.json", content, indent=1)
    return out / "results.json"


def _write_citypersons(
    split: DataSplit, detections: list[dict[str, Any]], table: read_results.ResultTable, out: Path
) -> Path:
    plain = [{key: value for key, value in one.items() if key != "segmentation"} for one in detections]
    return _write_coco(split, plain, table, out)


def _write_voc(split: DataSplit, _: list[dict[str, Any]], table: read_results.ResultTable, out: Path) -> Path:
    names = _names(split, "voc")
    listing = voc_list_name(split)
    corners = table.boxes.copy()
    corners[:, 2:] += corners[:, :2]  # the 0-based far edge is the 1-based last pixel
    corners[:, :2] += 1
    wanted = {}
    for label, class_name in zip(split.category_ids, split.class_names):
        rows = np.flatnonzero(table.categories == label)
        lines = [_line(names[table.images[row]], table.scores[row], *corners[row]) for row in rows]
        wanted[out / f"comp4_det_{listing}_{_file_name(class_name, blanks=True)}.txt"] = lines
    return _write_files(out, wanted, pattern=f"comp4_det_{listing}_*.txt")


def _write_kitti(split: DataSplit, _: list[dict[str, Any]], table: read_results.ResultTable, out: Path) -> Path:
    names = _names(split, "kitti")
    classes = dict(zip(split.category_ids, split.class_names))
    folder = out / "data"
    wanted: dict[Path, list[str]] = {folder / f"{name}.txt": [] for name in names}
    corners = table.boxes.copy()
    corners[:, 2:] += corners[:, :2]
    for image, category, box, score in zip(table.images, table.categories, corners, table.scores):
        # Truncation, occlusion, angle and the seven numbers of the 3D box are "not given"
        wanted[folder / f"{names[image]}.txt"].append(
            f"{classes[int(category)]} -1 -1 -10 {_line(*box)} -1 -1 -1 -1000 -1000 -1000 -10 {_line(score)}"
        )
    return _write_files(folder, wanted, pattern="*.txt")


def _write_widerface(split: DataSplit, _: list[dict[str, Any]], table: read_results.ResultTable, out: Path) -> Path:
    wanted = {}
    order = np.lexsort((-table.scores, table.images))  # the Python port needs sorted files
    ends = np.searchsorted(table.images[order], np.arange(len(split.records) + 1))
    for row, record in enumerate(split.records):
        place = PurePosixPath(record.file_name)
        if len(place.parts) != 2 or ".." in place.parts:
            raise DataError(f"image {record.file_name!r} is not EVENT/IMAGE.jpg: WIDER FACE submissions need that name")
        lines = [_line(*table.boxes[one], table.scores[one]) for one in order[ends[row] : ends[row + 1]]]
        wanted[out / place.parts[0] / f"{place.stem}.txt"] = [place.stem, str(len(lines)), *lines]
    return _write_files(out, wanted, pattern="*/*.txt")


_Writer = Callable[[DataSplit, list[dict[str, Any]], read_results.ResultTable, Path], Path]
_WRITERS: Mapping[str, _Writer] = {
    "coco": _write_coco,
    "voc": _write_voc,
    "kitti": _write_kitti,
    "citypersons": _write_citypersons,
    "widerface": _write_widerface,
}


def _write_files(folder: Path, wanted: Mapping[Path, list[str]], *, pattern: str) -> Path:
    """Writes text files; refuses a folder with others of their kind, which ``score`` would take as part of them."""
    for path in sorted(folder.glob(pattern)):
        if path not in wanted:
            raise DataError(f"{path} belongs to other results: give an empty folder or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    for path, lines in wanted.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return folder


def _names(split: DataSplit, format: str) -> list[str]:
    """Each image's name in a submission: its id in a data set of that format, else its file's name without suffix."""

    def name(record: ImageRecord) -> str:
        return str(record.image_id) if split.format == format else PurePosixPath(record.file_name).stem

    names = [_file_name(name(record)) for record in split.records]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"two images are called {twice!r}: a {format} submission needs one name for each")
    return names


def _file_name(name: str, *, blanks: bool = False) -> str:
    """A name that may stand in a file's name, and with ``blanks`` False in a line of words too."""
    bad = any(
        character in "/\\" or not character.isprintable() or (character.isspace() and not blanks) for character in name
    )
    if not name.strip() or name in (".", "..") or bad:
        raise DataError(f"{name!r} cannot stand in a text submission (blank or slash): rename it in the data set")
    return name


def _line(*values: str | float | np.float64 | NDArray[np.float64]) -> str:
    return " ".join(value if isinstance(value, str) else repr(float(value)) for value in values)


def submit_predictions(
    format: str,
    predictions: Path,
    names: Sequence[str],
    classes: tuple[Sequence[str], Sequence[int]],
    *,
    out: Path,
    ids: Mapping[str, int | str] | None = None,
) -> Path:
    """Write the detections of ``predictions`` on the images ``names`` in ``format`` below ``out``.

    ``classes`` are the names and their category ids. ``ids`` gives the image id of each name, for COCO and CityPersons,
    which know images by number (see ``submission_ids``); the others know them by name. Raises ``DataError`` as
    ``write_submission``.
    """
    ordered = sorted(names)
    if ids is None and format in ("coco", "citypersons"):
        ids = submission_ids(format, ordered)
    known = ids or {name: name if format == "widerface" else PurePosixPath(name).stem for name in ordered}
    found: list[dict[str, Any]] = json.loads(predictions.read_text(encoding="utf-8"))
    detections = [entry | {"image_id": known[entry["file_name"]]} for entry in found if entry["file_name"] in known]
    nothing = np.zeros(0)
    records = [
        ImageRecord(
            path=Path(name),
            file_name=name,
            image_id=known[name],
            height=0,
            width=0,
            boxes=nothing.reshape(0, 4),
            labels=nothing.astype(np.int64),
            ignore=nothing.astype(bool),
            areas=nothing,
        )
        for name in ordered
    ]
    split = DataSplit(format, "test", Path(), records, tuple(classes[0]), tuple(classes[1]))
    return write_submission(format, split, detections, out)


def submission_ids(
    format: str, names: Sequence[str], listed: Mapping[str, int | str] | None = None, *, where: str = ""
) -> dict[str, int | str]:
    """The image id of each name: from ``listed`` (ids by file name, of the file ``where``), or from COCO's own names.

    Raises:
        DataError: an id that is not known, or one that two images have.
    """
    ids: dict[str, int | str] = {}
    if listed is not None:
        ids = {name: listed[one] for name, one in match_names(names, listed, where=where).items()}
    elif format == "coco":
        ids = {name: number for name in names if (number := coco_id(name)) is not None}
    strange = [name for name in names if name not in ids]
    if strange:
        reason = f"is not among the images of {where}" if listed is not None else f"has no image id that {format} knows"
        way = "leave it out, or give the list of this split" if listed is not None else _WAY_TO_IDS[format]
        raise DataError(f"image {shown(strange[0])} ({len(strange)} of {len(names)}) {reason}: {way}")
    first: dict[int | str, str] = {}
    for name, image_id in ids.items():
        if image_id in first:
            raise DataError(
                f"images {shown(first[image_id])} and {shown(name)} would both be image {image_id} of the submission: "
                "predict on one of them only, or give --images-from"
            )
        first[image_id] = name
    return ids


_WAY_TO_IDS = {
    "coco": "add --images-from FILE with the data set's json that lists its images (image_info_test2017.json, "
    "instances_val.json)",
    "citypersons": "add --images-from val_gt.json, which lists the images",
}
