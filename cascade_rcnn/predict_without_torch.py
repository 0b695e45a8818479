"""The command ``predict`` where torch is not installed: images through an exported network.

What is written equals what ``cascade_rcnn.predict`` writes.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from cascade_rcnn.data.image_ids import ids_by_name
from cascade_rcnn.data.images import to_array
from cascade_rcnn.errors import DataError, UserError
from cascade_rcnn.inference.media import InputFile, collect, listed_endings
from cascade_rcnn.inference.predictions_file import ResultsFile, results_path
from cascade_rcnn.messages import printable
from cascade_rcnn.progress import progress_bar
from cascade_rcnn.runtime.detections import ArrayDetections
from cascade_rcnn.runtime.detector import load


def run_predict_without_torch(
    network: str | Path,
    inputs: Sequence[str | Path],
    *,
    out: Path,
    score: float | None = None,
    draw: bool = True,
    polygons: bool = False,
    batch_size: int = 1,
    settings: dict[str, Any] | None = None,
) -> Path:
    """Drawings and ``predictions.json`` of files and folders; returns the json's path.

    ``settings`` are those of ``cascade_rcnn.runtime.detector.load``.

    Raises:
        UserError: an input, network or folder that cannot be used, or not one readable image.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{printable(out)}: is a file; give a folder as --out")
    others: Counter[str] = Counter()
    files = list(collect([Path(one) for one in inputs], leave_out=out, others=others))
    images = [file for file in files if not file.is_video]
    if not images:
        raise UserError("only videos are given: they need PyTorch, which is not installed: pip install cascade-rcnn")
    if videos := len(files) - len(images):
        print(f"{_counted(videos, 'video')} left out: they need PyTorch, which is not installed", file=sys.stderr)
    detector = load(network, **(settings or {}))
    print(detector.choices())
    score = (0.0 if detector.thresholds else 0.3) if score is None else score
    if others:
        print(f"left out, being no images: {listed_endings(others)}", file=sys.stderr)
    ids = ids_by_name([file.name for file in images])
    data, skipped, objects, drawn = detector.config.data, list[str](), 0, 0
    with ResultsFile(results_path(out, (1, 1))) as results, progress_bar(len(images)) as advance:
        for batch in _batches(iter(images), batch_size):
            readable = []
            for file in batch:
                try:
                    readable.append((file, to_array(file.path, max_pixels=data.max_pixels, range=data.range)))
                except DataError as error:
                    skipped.append(str(error))
                    print(f"skipped: {error}", file=sys.stderr)
            found = detector.predict([pixels for _, pixels in readable], batch_size=batch_size)
            for (file, _), detections in zip(readable, found):
                detections.image_id = ids.get(file.name)
                results.add(_entries(file, detections, polygons=polygons))
                objects, sure = objects + len(detections), detections[detections.scores >= score]
                drawn += len(sure)
                if draw:
                    _draw(file, sure, out / "drawings" / file.drawing)
            advance(len(batch))
        if len(skipped) == len(images):  # leaves an earlier predictions.json as it is
            raise DataError(f"none of the {len(images)} files could be read; first: {skipped[0]}")
    print(f"{objects} objects in {_counted(len(images) - len(skipped), 'image')}: {printable(results.path)}")
    if draw:
        print(f"drawings: {printable(out / 'drawings')} ({drawn} of the objects, with a score of {score:g} or more)")
    if skipped:
        print(f"{len(skipped)} files could not be read and were skipped", file=sys.stderr)
    return results.path


def _counted(number: int, what: str) -> str:
    return f"1 {what}" if number == 1 else f"{number} {what}s"


def _entries(file: InputFile, detections: ArrayDetections, *, polygons: bool) -> Iterator[dict[str, Any]]:
    rows = zip(detections.labels.tolist(), detections.names, detections.to_coco(polygons=polygons))
    return ({"file_name": file.name, "label": label, "category": name, **result} for label, name, result in rows)


def _draw(file: InputFile, shown: ArrayDetections, target: Path) -> None:
    if target.exists() and target.samefile(file.path):
        raise UserError(f"{printable(target)}: the drawing would overwrite the image itself; choose another --out")
    shown.save(target)


def _batches(files: Iterator[InputFile], size: int) -> Iterator[list[InputFile]]:
    while batch := list(islice(files, size)):
        yield batch
