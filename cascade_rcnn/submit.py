"""From ``predictions.json`` to a benchmark's own result files: for test images, whose truth only its server has."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from cascade_rcnn.data.records import DataSplit, ImageRecord
from cascade_rcnn.evaluation.submission import write_submission


def submit_predictions(
    format: str, predictions: Path, names: Sequence[str], classes: tuple[Sequence[str], Sequence[int]], *, out: Path
) -> Path:
    """Write the detections of ``predictions`` on the images ``names`` in ``format`` below ``out``.

    ``classes`` are the names and their category ids. COCO's image ids are the file names' digits, CityPersons' count
    the images by name from 1, the others' are the names without ending. Raises ``DataError`` as ``write_submission``.
    """
    ordered = sorted(names)
    ids: dict[str, int | str] = {}
    for number, name in enumerate(ordered, start=1):
        stem = PurePosixPath(name).stem
        digits = stem.rpartition("_")[2]
        by_digits = int(digits) if digits.isdecimal() else number
        ids[name] = {"coco": by_digits, "citypersons": number}.get(format, stem if format != "widerface" else name)
    found: list[dict[str, Any]] = json.loads(predictions.read_text(encoding="utf-8"))
    detections = [entry | {"image_id": ids[entry["file_name"]]} for entry in found if entry["file_name"] in ids]
    nothing = np.zeros(0)
    records = [
        ImageRecord(
            path=Path(name), file_name=name, image_id=ids[name], height=0, width=0, boxes=nothing.reshape(0, 4),
            labels=nothing.astype(np.int64), ignore=nothing.astype(bool), areas=nothing,
        )
        for name in ordered
    ]  # fmt: skip
    split = DataSplit(format, "test", Path(), records, tuple(classes[0]), tuple(classes[1]))
    return write_submission(format, split, detections, out)
