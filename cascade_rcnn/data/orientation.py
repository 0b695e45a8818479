"""Which view of a picture its labels count, and how labels go from one view to the other.

One rule for training, evaluation, ``check``, ``--fix``, ``convert-data`` and every drawing: the size that the
annotation itself gives decides. Where that fits both views (a square picture, one that is mirrored or upside down)
nothing in the file can say, and the user is asked (``data.orientation``). YOLO, KITTI, WIDER FACE and CityPersons give
no size; their pictures are read upright, as the trainers and tools of these formats do, which read with OpenCV or a
browser.

G objects of a picture; sizes are (height, width).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cascade_rcnn.config import Orientation
from cascade_rcnn.data.files import is_file
from cascade_rcnn.data.images import Frame, Header, Size, read_header, turn
from cascade_rcnn.data.masks import nearest_indices, segmentation_area
from cascade_rcnn.data.problems import Problem
from cascade_rcnn.data.records import DataSplit, ImageRecord, Segmentation
from cascade_rcnn.data.rle import decode_rle, encode_rle
from cascade_rcnn.errors import DataError
from cascade_rcnn.messages import printable

FORMATS_WITHOUT_SIZES = frozenset({"yolo", "kitti", "citypersons", "widerface"})
WAY_OUT = (
    "say --orientation upright if it was labelled as viewers show it, else stored "
    "(in training --data.orientation upright)"
)


class OrientationError(DataError):
    """A picture of which nothing says how it was labelled; unlike a damaged one it is not to be passed over."""


def view_of(
    annotated: Size | None, stored: Size, tag: int, wanted: Orientation, *, sizeless: bool = False
) -> Frame | Literal["undecided", "differs"]:
    """The view that labels count.

    Args:
        annotated: the size that the annotation itself gives, None where it gives none.
        stored: size of the picture as stored.
        tag: its orientation, 1 to 8.
        wanted: ``data.orientation``, asked where the size does not decide.
        sizeless: the format has no sizes at all.

    Returns:
        ``differs`` where the annotation speaks of a picture of another size.
    """
    upright = stored[::-1] if tag >= 5 else stored
    if annotated is not None:
        if annotated not in (stored, upright):
            return "differs"
        if stored != upright:
            return "stored" if annotated == stored else "upright"
    if tag == 1:
        return "upright"
    if wanted != "auto":
        return wanted
    return "upright" if sizeless and annotated is None else "undecided"


def annotated_size(record: ImageRecord, split_format: str) -> Size | None:
    """(height, width) where the record's annotation gives them by itself."""
    if split_format in FORMATS_WITHOUT_SIZES or not record.sized or not (record.height and record.width):
        return None
    return record.height, record.width


def record_view(
    record: ImageRecord, split_format: str, header: Header, wanted: Orientation
) -> Frame | Literal["undecided", "differs"]:
    """``view_of`` a record and its picture."""
    sizeless = split_format in FORMATS_WITHOUT_SIZES
    annotated = annotated_size(record, split_format)
    return view_of(annotated, header.stored, header.orientation, wanted, sizeless=sizeless)


def view_decider(
    annotated: Size | None, wanted: Orientation, *, path: str, sizeless: bool
) -> Callable[[Size, int], Frame]:
    """For ``read_image``: decides by what the opened file says.

    The function raises ``OrientationError`` where nothing decides, ``DataError`` where the sizes differ.
    """

    def decide(stored: Size, tag: int) -> Frame:
        view = view_of(annotated, stored, tag, wanted, sizeless=sizeless)
        if view == "undecided":
            raise OrientationError(undecided(path, stored, tag) + f"; {WAY_OUT}")
        if view == "differs":
            assert annotated is not None
            raise DataError(
                f"{printable(path)}: is {stored[1]}x{stored[0]}"
                + (f" ({stored[0]}x{stored[1]} upright)" if tag >= 5 else "")
                + f", the annotation says {annotated[1]}x{annotated[0]}; run cascade-rcnn check on the data"
            )
        return view

    return decide


def undecided(path: object, stored: Size, tag: int) -> str:
    """What cannot be decided, without the way out."""
    return (
        f"{printable(path)}: {stored[1]} x {stored[0]} with orientation tag {tag}, and the annotation does not say "
        "whether its boxes count the pixels as stored or upright"
    )


def settle(split: DataSplit, wanted: Orientation, *, sizes: bool = True) -> DataSplit:
    """The split with every picture's labels in a view that the copy itself shows, for whoever writes it elsewhere.

    Pictures whose labels count the stored pixels, and those whose size would not say that theirs are upright, are
    marked to be written upright (``ImageRecord.turn``), the former's labels turned along; all others stay.

    ``sizes``: the copy gives the annotation's sizes. Without them nobody could see there that a picture is of another
    size than was labelled: those that were resized are scaled, others are left out and join ``DataSplit.problems``.

    Raises:
        OrientationError: the first picture that nothing decides.
    """
    records, problems = [], list(split.problems)
    for record in split.records:
        header = read_header(record.path) if is_file(record.path) else None
        if header is None or header.error:
            records.append(record)
            continue
        view = record_view(record, split.format, header, wanted)
        fitted, why = (record, "") if view != "differs" or sizes else fit_resized(record, header, wanted)
        if "undecided" in (view, why):
            raise OrientationError(undecided(record.path, header.stored, header.orientation) + f"; {WAY_OUT}")
        if fitted is None:
            text = (
                f"{record.file_name} is {header.width} x {header.height}, labelled at {record.width} x {record.height}"
            )
            problems.append(Problem("size-mismatch", record.source, printable(text)))
            continue
        records.append(settled(record, header, view) if view in ("stored", "upright") else fitted)
    return replace(split, records=records, problems=problems)


def fit_resized(
    record: ImageRecord, header: Header, wanted: Orientation
) -> tuple[ImageRecord | None, Literal["", "undecided", "other"]]:
    """The labels of a picture that is of another size than annotated, scaled to it and, if they count the stored
    pixels, turned upright.

    None, with a word why: ``undecided`` where only the user can say which view was labelled, ``other`` where the
    picture is of another shape: cropped, padded, squashed, or another picture altogether.
    """
    annotated = (record.height, record.width)
    views: dict[Frame, Size] = {"upright": header.upright}
    if header.orientation != 1:
        views["stored"] = header.stored
    fits = [view for view, size in views.items() if _is_resized(annotated, size)]
    if not fits:
        return None, "other"
    if len(fits) > 1 and wanted == "auto":
        return None, "undecided"
    view = fits[0] if len(fits) == 1 or wanted == "auto" else wanted
    return settled(scaled_record(record, views[view]), header, view), ""


def _is_resized(old: Size, new: Size) -> bool:
    """Whether one size is the other times a factor, up to the rounding of a side."""
    wide, high = new[1] / old[1], new[0] / old[0]
    if 0.9 < wide < 1.1 and max(abs(old[0] - new[0]), abs(old[1] - new[1])) > 1:
        return False  # nobody resizes by so little: a margin was cut off
    return abs(old[0] * wide - new[0]) <= 1 or abs(old[1] * high - new[1]) <= 1


def refuse_undecided(split: DataSplit, wanted: Orientation) -> None:
    """Raises ``OrientationError`` for the first picture that nothing decides; reads headers only."""
    if wanted != "auto" or split.format in FORMATS_WITHOUT_SIZES:
        return
    for record in split.records:
        header = read_header(record.path)
        if not header.error and record_view(record, split.format, header, wanted) == "undecided":
            raise OrientationError(undecided(record.path, header.stored, header.orientation) + f"; {WAY_OUT}")


def settled(record: ImageRecord, header: Header, view: Frame) -> ImageRecord:
    """A record of one picture as ``settle`` leaves it, where ``view`` is what its labels count."""
    if header.orientation == 1:
        return record
    if view == "stored":
        return turned_record(record, header.stored, header.orientation)
    ambiguous = header.stored == header.upright  # the copy's own size could not say it
    return replace(record, turn=header.orientation) if ambiguous else record


def turned_record(record: ImageRecord, stored: Size, tag: int) -> ImageRecord:
    """Labels that count the stored pixels, turned with the picture, which is marked to be written upright."""
    upright = stored[::-1] if tag >= 5 else stored
    masks = record.segmentations
    return replace(
        record,
        height=upright[0],
        width=upright[1],
        boxes=turn_boxes(record.boxes, stored, tag),
        segmentations=None if masks is None else [mask and turn_mask(mask, stored, tag) for mask in masks],
        attributes={
            name: turn_boxes(values, stored, tag) if name.endswith("boxes") else values
            for name, values in record.attributes.items()
        },
        sized=True,
        turn=tag,
    )


def turn_points(points: NDArray[np.float64], stored: Size, tag: int) -> NDArray[np.float64]:
    """Points [N, 2] (x, y) in the picture as stored, where they lie upright."""
    height, width = stored
    x, y = points[:, 0], points[:, 1]
    if tag in (5, 6, 7, 8):
        x, y, height, width = y, x, width, height
    if tag in (3, 4, 7, 8):
        y = height - y
    if tag in (2, 3, 6, 7):
        x = width - x
    return np.stack([x, y], axis=1)


def turn_boxes(boxes: NDArray[Any], stored: Size, tag: int) -> NDArray[np.float64]:
    """Boxes [G, 4] xyxy as ``turn_points``."""
    corners = turn_points(np.asarray(boxes, dtype=np.float64).reshape(-1, 2), stored, tag).reshape(-1, 2, 2)
    return np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)


def turn_mask(mask: Segmentation, stored: Size, tag: int) -> Segmentation:
    """Polygons point by point; run lengths pixel by pixel, those of another size left as they are."""
    if isinstance(mask, dict):
        if tuple(mask["size"]) != stored:
            return mask
        return encode_rle(turn(decode_rle(mask), tag))
    return [
        turn_points(np.asarray(polygon, dtype=np.float64).reshape(-1, 2), stored, tag).reshape(-1).tolist()
        for polygon in mask
    ]


def scaled_record(record: ImageRecord, size: Size) -> ImageRecord:
    """Labels of a picture that was resized to ``size``: boxes and polygons by each side's factor, run lengths by
    nearest neighbour.
    """
    old = (record.height, record.width)
    factor = np.array([size[1] / old[1], size[0] / old[0]])

    def scale(mask: Segmentation) -> Segmentation:
        if isinstance(mask, dict):
            if tuple(mask["size"]) != old:
                return mask
            pixels = decode_rle(mask)
            return encode_rle(pixels[nearest_indices(old[0], size[0])][:, nearest_indices(old[1], size[1])])
        return [(np.asarray(polygon).reshape(-1, 2) * factor).reshape(-1).tolist() for polygon in mask]

    masks = record.segmentations
    scaled = replace(
        record,
        height=size[0],
        width=size[1],
        boxes=record.boxes * np.tile(factor, 2),
        areas=record.areas * factor.prod(),
        segmentations=None if masks is None else [mask and scale(mask) for mask in masks],
        attributes={
            name: values * np.tile(factor, 2) if name.endswith("boxes") else values
            for name, values in record.attributes.items()
        },
    )
    for row, mask in enumerate(scaled.segmentations or ()):
        if isinstance(mask, dict):
            scaled.areas[row] = segmentation_area(mask)
    return scaled
