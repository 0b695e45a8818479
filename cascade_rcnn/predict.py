"""The command ``predict``: images, folders and videos to drawings and ``predictions.json``."""

from __future__ import annotations

import dataclasses
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from cascade_rcnn.data.images import to_array
from cascade_rcnn.errors import DataError, UserError
from cascade_rcnn.evaluation.submission import submit_predictions
from cascade_rcnn.inference.detections import Detections
from cascade_rcnn.inference.detector import Detector, load
from cascade_rcnn.inference.media import InputFile, VideoReader, VideoWriter, collect
from cascade_rcnn.inference.predictions_file import ResultsFile, join_shards, parse_shard, results_path
from cascade_rcnn.inference.run_model import AS_SAVED, Inference
from cascade_rcnn.messages import printable
from cascade_rcnn.progress import progress_bar

_T = TypeVar("_T")
_AHEAD = 4  # batches decoded before they are needed


@dataclasses.dataclass
class PredictSummary:
    """What ``run_predict`` has done."""

    images: int = 0  # images and video frames looked at
    objects: int = 0
    drawn: int = 0  # objects that reach the score of the drawings
    skipped: list[str] = dataclasses.field(default_factory=list)  # one line for each file that could not be read
    results: Path = Path()


def run_predict(
    checkpoint: str | Path,
    inputs: Sequence[str | Path],
    *,
    out: Path,
    score: float = 0.3,
    draw: bool = True,
    device: str = "auto",
    inference: Inference = AS_SAVED,
    shard: str = "",
    submission: tuple[str, Path] | None = None,
) -> PredictSummary:
    """The command ``predict``: drawings and ``predictions.json`` of files, folders (with subfolders) and videos.

    Args:
        out: folder for ``predictions.json`` and ``drawings/``, which repeats the folders of the inputs.
        score: draw detections from this score on; ``predictions.json`` has all that the model gives.
        shard: ``i/n`` looks at every n-th image only; under torchrun each process takes its own part by itself.
        submission: also write the result files of that benchmark (its name) into that folder; not with shards.

    Raises:
        UserError: an input, checkpoint or folder that cannot be used, or not one readable image.
    """
    out, paths = Path(out), [Path(path) for path in inputs]
    part = parse_shard(shard)
    _check_out(out, paths)
    if submission and part[1] > 1:
        raise UserError("--submission needs all images in one run: leave --shard away")
    files = list(islice(collect(paths, leave_out=out), part[0] - 1, None, part[1]))
    detector = load(
        checkpoint,
        device=_own_device(device),
        precision=inference.precision,
        compile=inference.compile,
        stop_after_stage=inference.stages,
        score_threshold=inference.score_threshold,
        max_detections=inference.max_detections,
        range=inference.range,
    )
    print(detector.choices())
    summary = PredictSummary(results=results_path(out, part))
    if part[1] > 1:
        summary.results.unlink(missing_ok=True)  # of an earlier run that was broken off: not to be joined with this one
    with ResultsFile(summary.results) as results:
        job = _Job(detector, results, summary, out / "drawings" if draw else None, score, inference.batch_size)
        job.run(files)
        if summary.skipped and not summary.images and part[1] == 1:  # leaves an earlier predictions.json as it is
            raise DataError(_nothing_read(summary))
    if part[1] > 1:
        summary.results = join_shards(out, part[1]) or summary.results
    _report(summary, out, score)
    if summary.skipped and not summary.images:
        raise DataError(_nothing_read(summary))
    if submission:
        names = [file.name for file in files if not file.is_video]
        classes = (detector.class_names, detector.category_ids)
        written = submit_predictions(submission[0], summary.results, names, classes, out=Path(submission[1]))
        print(f"submission: {printable(written)}")
    return summary


def _nothing_read(summary: PredictSummary) -> str:
    return f"none of the {len(summary.skipped)} files could be read; first: {summary.skipped[0]}"


def _own_device(device: str) -> str:
    """Under torchrun each process takes the GPU of its own number."""
    import os

    if device == "auto" and "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        return f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
    return device


def _check_out(out: Path, inputs: Sequence[Path]) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"{printable(out)}: is a file; give a folder as --out")
    for path in inputs:
        if path.is_dir() and out.exists() and path.samefile(out):
            raise UserError(f"{printable(out)}: is also the folder to look at; choose another one as --out")


class _Job:
    """The loop over files: decoding and drawing in threads, the network in between."""

    def __init__(
        self,
        detector: Detector,
        results: ResultsFile,
        summary: PredictSummary,
        drawings: Path | None,
        score: float,
        batch_size: int,
    ) -> None:
        self.detector, self.results, self.summary = detector, results, summary
        self.drawings, self.score, self.batch_size = drawings, score, batch_size
        self._pending: deque[Future[None]] = deque()

    def run(self, files: Sequence[InputFile]) -> None:
        images = [file for file in files if not file.is_video]
        videos = [file for file in files if file.is_video]
        with ThreadPoolExecutor(max_workers=4) as pool, progress_bar(len(images)) as advance:
            for batch in _batches(_ahead(pool, self._read, images, self.batch_size * _AHEAD), self.batch_size):
                readable = [(file, pixels) for file, pixels in batch if not isinstance(pixels, DataError)]
                for error in (pixels for _, pixels in batch if isinstance(pixels, DataError)):
                    self._skip(error)
                for (file, pixels), detections in zip(readable, self._predict([pixels for _, pixels in readable])):
                    self._keep(detections, {"file_name": file.name, **_known_id(file)})
                    if self.drawings is not None:
                        target = self.drawings / file.drawing
                        self._submit(pool.submit(self._draw, file, pixels, detections, target))
                advance(len(batch))
            while self._pending:
                self._pending.popleft().result()
        for file in videos:
            try:
                self._video(file)
            except DataError as error:
                self._skip(error)

    def _read(self, file: InputFile) -> tuple[InputFile, NDArray[np.uint8] | DataError]:
        try:
            data = self.detector.config.data
            return file, to_array(file.path, max_pixels=data.max_pixels, range=data.range)
        except DataError as error:
            return file, error

    def _predict(self, arrays: list[NDArray[np.uint8]]) -> list[Detections]:
        return self.detector.predict(arrays, batch_size=self.batch_size)

    def _keep(self, detections: Detections, facts: dict[str, Any]) -> None:
        self.summary.images += 1
        self.summary.objects += len(detections)
        self.summary.drawn += int((detections.scores >= self.score).sum())
        self.results.add(
            {**facts, "label": label, "category": name, **result}
            for label, name, result in zip(detections.labels.tolist(), detections.names, detections.to_coco())
        )

    def _submit(self, future: Future[None]) -> None:
        self._pending.append(future)
        while len(self._pending) > 4 * self.batch_size + 8:  # bounds the pictures in memory, raises what went wrong
            self._pending.popleft().result()

    def _draw(self, file: InputFile, pixels: NDArray[np.uint8], detections: Detections, target: Path) -> None:
        if target.exists() and target.samefile(file.path):
            raise UserError(f"{printable(target)}: the drawing would overwrite the image itself; choose another --out")
        shown = detections[detections.scores >= self.score]
        shown.image = pixels
        shown.save(target)

    def _video(self, file: InputFile) -> None:
        reader = VideoReader(file.path)
        writer = None if self.drawings is None else VideoWriter(self.drawings / file.drawing, reader.rate)
        number = 0
        try:
            with progress_bar(reader.frames, file.name) as advance:
                for frames in _batches(iter(reader), self.batch_size):
                    for detections in self._predict(frames):
                        self._keep(detections, {"file_name": file.name, "frame": number})
                        number += 1
                        if writer is not None:
                            writer.write(detections[detections.scores >= self.score].draw())
                    advance(len(frames))
        finally:
            reader.close()
            if writer is not None:
                writer.close()

    def _skip(self, error: DataError) -> None:
        self.summary.skipped.append(str(error))
        print(f"skipped: {error}", file=sys.stderr)


def _known_id(file: InputFile) -> dict[str, int]:
    """COCO names its images by their id: 000000397133.jpg is image 397133."""
    return {"image_id": int(file.path.stem)} if file.path.stem.isascii() and file.path.stem.isdigit() else {}


def _ahead(pool: ThreadPoolExecutor, function: Any, things: Iterable[_T], ahead: int) -> Iterator[Any]:
    """``map`` in threads, in order, at most ``ahead`` results waiting."""
    waiting: deque[Future[Any]] = deque()
    for thing in things:
        waiting.append(pool.submit(function, thing))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _batches(things: Iterator[_T], size: int) -> Iterator[list[_T]]:
    while batch := list(islice(things, size)):
        yield batch


def _report(summary: PredictSummary, out: Path, score: float) -> None:
    images = "1 image" if summary.images == 1 else f"{summary.images} images"
    print(f"{summary.objects} objects in {images}: {printable(summary.results)}")
    if (out / "drawings").is_dir():
        print(
            f"drawings: {printable(out / 'drawings')} ({summary.drawn} of the objects, with a score of {score:g} or "
            "more; --score changes that)"
        )
    if summary.skipped:
        print(f"{len(summary.skipped)} files could not be read and were skipped", file=sys.stderr)
