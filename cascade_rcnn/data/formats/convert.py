"""``cascade-rcnn convert-data SRC DST --to coco|voc|yolo``: a data set in another layout, pictures linked."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from cascade_rcnn.config import Orientation
from cascade_rcnn.data.formats.open import describe_split, disjoint_splits, open_split
from cascade_rcnn.data.formats.write import write_coco, write_voc, write_yolo, write_yolo_index
from cascade_rcnn.data.orientation import settle
from cascade_rcnn.data.records import DataSplit
from cascade_rcnn.errors import DataError
from cascade_rcnn.messages import printable, shown

_WRITERS = {"coco": write_coco, "voc": write_voc, "yolo": write_yolo}


def convert_data(
    src: Path, dst: Path, *, to: str, orientation: Orientation = "auto"
) -> tuple[list[DataSplit], Counter[str]]:
    """Writes all splits of ``src`` into the empty folder ``dst`` in the format ``to``.

    Pictures whose labels count the pixels as stored against their orientation tag are written upright, their labels
    turned along, so that the copy means the same to every program.

    Returns the splits and what was counted on the way: images linked or copied, objects that the format cannot hold.
    Raises ``DataError`` where ``dst`` is not empty, ``to`` unknown, the source broken, or a picture's orientation open.
    """
    if to not in _WRITERS:
        raise DataError(f"--to {shown(to)}: choose coco, voc or yolo")
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise DataError(f"{printable(dst)}: not an empty folder; name a new one")
    counts: Counter[str] = Counter()
    splits = [
        settle(open_split(src, name, orientation=orientation), orientation, sizes=to != "yolo")
        for name in disjoint_splits(src)
    ]
    dst.mkdir(parents=True, exist_ok=True)
    for split in splits:
        counts.update(_WRITERS[to](split, dst))
        counts.update(f"left out: {problem.kind}" for problem in split.problems)
    if to == "yolo":
        write_yolo_index(splits, dst)
    return splits, +counts


def run_convert_data(src: Path, dst: Path, *, to: str, orientation: Orientation = "auto") -> int:
    """The command: converts, and prints what was written and how. Returns the exit code 0."""
    splits, counts = convert_data(src, dst, to=to, orientation=orientation)
    for split in splits:
        print(describe_split(split))
    for what, number in counts.items():
        print(f"  {number:,} {what}")
    print(f"written to {printable(dst)} as {to}; train with --data {printable(dst)}")
    return 0
