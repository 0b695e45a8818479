"""The command ``predict``: images, folders and videos to drawings and ``predictions.json``."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from cascade_rcnn.data.image_ids import ImageId, ids_by_name, match_names, read_image_ids
from cascade_rcnn.data.images import to_array
from cascade_rcnn.data.windows import georeference
from cascade_rcnn.distributed import choose_device
from cascade_rcnn.errors import DataError, UserError
from cascade_rcnn.evaluation.submission import submission_ids, submit_predictions
from cascade_rcnn.inference.as_dataset import DatasetWriter, dataset_writer
from cascade_rcnn.inference.detections import Detections
from cascade_rcnn.inference.detector import Detector, load
from cascade_rcnn.inference.exported import usual_device
from cascade_rcnn.inference.geojson import FeaturesFile
from cascade_rcnn.inference.media import InputFile, VideoReader, VideoWriter, collect, listed_endings
from cascade_rcnn.inference.predictions_file import ResultsFile, join_shards, parse_shard, results_path
from cascade_rcnn.inference.run_model import AS_SAVED, Inference
from cascade_rcnn.inference.tiled import TiledDetections, open_rows
from cascade_rcnn.inference.tiles import ArrayRows, Pyramid, Tiling
from cascade_rcnn.messages import printable
from cascade_rcnn.progress import progress_bar
from cascade_rcnn.runtime.settings import checked_number

_T = TypeVar("_T")
_MOST_DRAWN = 2000  # objects on the drawing of a picture that was cut into tiles
_AHEAD = 4  # batches decoded before they are needed


@dataclasses.dataclass
class PredictSummary:
    """What ``run_predict`` has done."""

    images: int = 0  # images and video frames looked at
    objects: int = 0
    drawn: int = 0  # objects that reach the score of the drawings
    skipped: list[str] = dataclasses.field(default_factory=list)  # one line for each file that could not be read
    results: Path = Path()
    dataset: Path | None = None  # folder of the data set of what was found
    features: Path | None = None  # GeoJSON of georeferenced pictures


@dataclasses.dataclass(frozen=True)
class Outputs:
    """What ``run_predict`` writes beside drawings, and how."""

    polygons: bool = False  # masks in predictions.json as polygons instead of RLE
    as_dataset: str = ""  # coco, yolo, labelme or label-studio: also a data set of that format, in a folder of its name
    copy_images: bool = False  # into that data set, instead of linking them
    images_from: Path | None = None  # a json that lists the images with their ids
    submission: tuple[str, Path] | None = None  # the result files of that benchmark, into that folder


ONLY_PREDICTIONS = Outputs()


def run_predict(
    checkpoint: str | Path,
    inputs: Sequence[str | Path],
    *,
    out: Path,
    score: float | None = None,
    draw: bool = True,
    device: str = "auto",
    inference: Inference = AS_SAVED,
    shard: str = "",
    outputs: Outputs = ONLY_PREDICTIONS,
) -> PredictSummary:
    """The command ``predict``: drawings and ``predictions.json`` of files, folders (with subfolders) and videos.

    Args:
        out: folder for ``predictions.json``, ``drawings/``, which repeats the folders of the inputs, and the data set.
        score: draw, and write into a data set, detections from this score on; ``predictions.json`` has all that the
            model gives. None: 0.3, or 0 for a checkpoint with thresholds of its own (``analyze --set-thresholds``).
        shard: ``i/n`` looks at every n-th image only; under torchrun each process takes its own part by itself.
        outputs: polygons, a data set, the benchmark's result files; the last two not with shards.

    Raises:
        UserError: an input, checkpoint or folder that cannot be used, or not one readable image.
    """
    out, paths = Path(out), [Path(path) for path in inputs]
    checked_number("score", score, low=0, high=1)
    checked_number("batch_size", inference.batch_size, low=1, whole=True)
    part = parse_shard(shard)
    _check_out(out, paths)
    _check_outputs(outputs, part)
    others: Counter[str] = Counter()
    everything = list(collect(paths, leave_out=out, others=others))
    ids = _image_ids([file.name for file in everything if not file.is_video], outputs)
    dataset = _dataset(outputs, out, everything, checkpoint)
    chosen = choose_device(usual_device(checkpoint, device), share_gpus=True)
    detector = load(checkpoint, device=chosen, **inference.of_load())
    print(detector.choices())
    score = (0.0 if detector.thresholds else 0.3) if score is None else score
    if others and part[0] == 1:
        print(f"left out, being no images or videos: {listed_endings(others)}", file=sys.stderr)
    summary = PredictSummary(results=results_path(out, part))
    if part[1] > 1:
        summary.results.unlink(missing_ok=True)  # of an earlier run that was broken off: not to be joined with this one
    job = _Job(detector, summary, score, inference.batch_size, drawings=out / "drawings" if draw else None)
    job.ids, job.polygons, job.dataset, job.tiling = ids, outputs.polygons, dataset, inference.tiling
    with ResultsFile(summary.results) as results:
        job.run(everything[part[0] - 1 :: part[1]], results)
        if summary.skipped and not summary.images and part[1] == 1:  # leaves an earlier predictions.json as it is
            raise DataError(_nothing_read(summary))
    if part[1] > 1:
        summary.results = join_shards(out, part[1]) or summary.results
    _report(summary, out, score)
    if summary.skipped and not summary.images:
        raise DataError(_nothing_read(summary))
    _report_outputs(summary, job)
    if outputs.submission:
        _submit(outputs.submission, summary, everything, detector, ids)
    return summary


def _report_outputs(summary: PredictSummary, job: _Job) -> None:
    if job.tiling is not None:
        _report_features(summary, job)
    if job.dataset is not None:
        summary.dataset = job.dataset.out
        print(f"data set: {printable(job.dataset.out)}: {job.dataset.finish()}")


def _report_features(summary: PredictSummary, job: _Job) -> None:
    """Where the GeoJSON is; one of an earlier run does not stay beside the results of this one."""
    path = job.results.path.with_suffix(".geojson")
    if summary.features is None:
        path.unlink(missing_ok=True)
        return
    assert job.features is not None
    lost = job.features.over_date_line
    without = f"; {lost} without geometry, as they lie across the date line" if lost else ""
    print(f"on the map: {printable(path)}{without}")


def _submit(
    submission: tuple[str, Path],
    summary: PredictSummary,
    files: Sequence[InputFile],
    detector: Detector,
    ids: dict[str, ImageId],
) -> None:
    """The result files of a benchmark; images that could not be read have the empty result."""
    format, folder = submission
    names = [file.name for file in files if not file.is_video]
    classes = (detector.class_names, detector.category_ids)
    known = ids if format in _NUMBERED else None
    written = submit_predictions(format, summary.results, names, classes, out=Path(folder), ids=known)
    print(f"submission: {printable(written)}")


_NUMBERED = ("coco", "citypersons")  # benchmarks that know images by number


def _image_ids(names: Sequence[str], outputs: Outputs) -> dict[str, ImageId]:
    """The id of each image whose id is known: from the user's list, else from COCO's own file names.

    Raises:
        DataError: a submission needs an id that is not known, or two images would have the same.
    """
    listed = read_image_ids(outputs.images_from) if outputs.images_from else None
    where = printable(outputs.images_from)
    format = outputs.submission[0] if outputs.submission else ""
    if format in _NUMBERED:
        ids = submission_ids(format, names, listed, where=where)
    elif listed is not None:
        ids = {name: listed[one] for name, one in match_names(names, listed, where=where).items()}
    else:
        ids = ids_by_name(names)
    if listed is not None:
        missing = len(listed) - len(ids)
        print(
            f"{where}: {len(ids)} of {len(names)} images have an id there"
            + (f"; {missing} of its {len(listed)} images are not looked at" if missing else "")
        )
    return ids


def _check_outputs(outputs: Outputs, part: tuple[int, int]) -> None:
    if part[1] > 1:
        for wanted, option in ((outputs.submission, "--submission"), (outputs.as_dataset, "--as")):
            if wanted:
                raise UserError(f"{option} needs all images in one run: drop --shard (or torchrun)")
    if outputs.copy_images and not outputs.as_dataset:
        raise UserError("--copy-images is about the data set that --as writes: add --as coco, or leave it away")


def _dataset(outputs: Outputs, out: Path, files: Sequence[InputFile], checkpoint: str | Path) -> DatasetWriter | None:
    if not outputs.as_dataset:
        return None
    folder, name = out / outputs.as_dataset, Path(checkpoint).name
    writer = dataset_writer(outputs.as_dataset, folder, checkpoint=name, copy=outputs.copy_images)
    videos = sum(file.is_video for file in files)
    if videos == len(files):
        raise UserError("--as writes a data set of images and there are only videos: save their frames as images first")
    if videos:
        writer.notes["videos left out"] += videos
    return writer


def _nothing_read(summary: PredictSummary) -> str:
    return f"none of the {len(summary.skipped)} files could be read; first: {summary.skipped[0]}"


def _check_out(out: Path, inputs: Sequence[Path]) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"{printable(out)}: is a file; give a folder as --out")
    for path in inputs:
        if path.is_dir() and out.exists() and path.samefile(out):
            raise UserError(f"{printable(out)}: is also the folder to look at; choose another one as --out")


class _Job:
    """The loop over files: decoding and drawing in threads, the network in between."""

    def __init__(
        self, detector: Detector, summary: PredictSummary, score: float, batch_size: int, *, drawings: Path | None
    ) -> None:
        self.detector, self.summary, self.score, self.batch_size = detector, summary, score, batch_size
        self.drawings = drawings
        self.ids: dict[str, ImageId] = {}
        self.polygons = False
        self.dataset: DatasetWriter | None = None
        self.tiling: Tiling | None = None
        self.features: FeaturesFile | None = None
        self._pending: deque[Future[None]] = deque()

    def run(self, files: Sequence[InputFile], results: ResultsFile) -> None:
        self.results = results
        images = [file for file in files if not file.is_video]
        videos = [file for file in files if file.is_video]
        if self.dataset is not None:
            self.dataset.begin(self.detector.class_names, self.detector.category_ids)
        if self.tiling is not None:
            with ExitStack() as self._open_files:
                for file in images:
                    self._tiled(file, self.tiling)
            images = []
        with ThreadPoolExecutor(max_workers=4) as pool, progress_bar(len(images)) as advance:
            for batch in _batches(_ahead(pool, self._read, images, self.batch_size * _AHEAD), self.batch_size):
                readable = [(file, pixels) for file, pixels in batch if not isinstance(pixels, DataError)]
                for error in (pixels for _, pixels in batch if isinstance(pixels, DataError)):
                    self._skip(error)
                for (file, pixels), detections in zip(readable, self._predict([pixels for _, pixels in readable])):
                    detections.image_id = self.ids.get(file.name)
                    self._keep(detections, {"file_name": file.name})
                    sure = detections[detections.scores >= self.score]
                    if self.dataset is not None:
                        self.dataset.add(file.path, file.name, pixels, sure)
                    if self.drawings is not None:
                        target = self.drawings / file.drawing
                        self._submit(pool.submit(self._draw, file, pixels, sure, target))
                advance(len(batch))
            while self._pending:
                self._pending.popleft().result()
        for file in videos:
            try:
                self._video(file)
            except DataError as error:
                self._skip(error)

    def _tiled(self, file: InputFile, tiling: Tiling) -> None:
        """One picture by its tiles: as large as it may be, no more of it is in memory than a row of them."""
        data = self.detector.config.data
        try:
            rows = open_rows(file.path, self.detector.config, max_pixels=data.max_pixels)
            pyramid = Pyramid(rows, tiling)
            found = self._look_at_tiles(file, pyramid)
        except UserError as error:  # of this file, or rasterio is missing: smaller files go without it
            self._skip(error)
            return
        facts = {"file_name": file.name}
        where, why_not = georeference(file.path)
        self.summary.images += 1
        for part in found.parts():
            part.image_id = self.ids.get(file.name)
            self._write(part, facts)
            if where is not None:
                self._features_file().add_detections(part, where, facts)
        for line in (*getattr(rows, "notes", ()), *found.told(self.score), *([why_not] if why_not else [])):
            print(f"{printable(file.name)}: {line}", file=sys.stderr)
        sure = int((found.scores >= self.score).sum())
        if self.dataset is not None:
            pixels = rows.pixels if isinstance(rows, ArrayRows) else None
            part = found[:sure]
            part.image_id = self.ids.get(file.name)
            self.dataset.add(file.path, file.name, pixels, part)
        if self.drawings is not None:
            self._draw_overview(file, found, sure)

    def _look_at_tiles(self, file: InputFile, pyramid: Pyramid) -> TiledDetections:
        name, done = printable(file.name), 0
        height, width = pyramid.size
        levels = ", ".join(f"1/{factor}" for factor in pyramid.factors[1:])
        coarser = f", the picture at {levels} among them" if levels else ""
        print(f"{name}: {width:,} x {height:,} pixels, {pyramid.count:,} tiles{coarser}")

        def moved(count: int) -> None:
            nonlocal done
            done += count
            advance(count)

        with progress_bar(pyramid.count, f"tiles of {name}") as advance:
            try:
                return self.detector.predict_tiled(
                    pyramid, batch_size=self.batch_size, advance=moved, folder=self.results.path.parent
                )
            except KeyboardInterrupt:
                print(
                    f"interrupted after {done:,} of {pyramid.count:,} tiles of {name}: nothing of this picture is "
                    f"written; {printable(self.results.partial)} has the pictures before it",
                    file=sys.stderr,
                )
                raise

    def _features_file(self) -> FeaturesFile:
        """Opened for the first georeferenced picture."""
        if self.features is None:
            path = self.results.path.with_suffix(".geojson")
            self.features = self._open_files.enter_context(FeaturesFile(path))
            self.summary.features = path
        return self.features

    def _draw_overview(self, file: InputFile, found: TiledDetections, sure: int) -> None:
        """The picture shrunk to what a screen shows, with its best objects."""
        pixels, factor = found.overview()
        shown = found[: min(sure, _MOST_DRAWN)]
        if sure > _MOST_DRAWN:
            print(f"{printable(file.name)}: the drawing has the best {_MOST_DRAWN:,} of {sure:,} objects")
        shown = dataclasses.replace(shown, boxes=shown.boxes / factor, size=pixels.shape[:2])
        assert self.drawings is not None
        self._draw(file, pixels, shown, self.drawings / file.drawing)

    def _read(self, file: InputFile) -> tuple[InputFile, NDArray[np.uint8] | DataError]:
        try:
            data = self.detector.config.data
            return file, to_array(file.path, max_pixels=data.max_pixels, range=data.range)
        except DataError as error:
            return file, error

    def _predict(self, arrays: list[NDArray[np.uint8]]) -> list[Detections]:
        if self.tiling is not None:
            tiled = [self.detector.predict_tiled(Pyramid(ArrayRows(one), self.tiling)) for one in arrays]
            return [found[: len(found)] for found in tiled]
        return self.detector.predict(arrays, batch_size=self.batch_size)

    def _keep(self, detections: Detections, facts: dict[str, Any]) -> None:
        self.summary.images += 1
        self._write(detections, facts)

    def _write(self, detections: Detections, facts: dict[str, Any]) -> None:
        self.summary.objects += len(detections)
        self.summary.drawn += int((detections.scores >= self.score).sum())
        self.results.add(
            {**facts, "label": label, "category": name, **result}
            for label, name, result in zip(
                detections.labels.tolist(), detections.names, detections.to_coco(polygons=self.polygons)
            )
        )

    def _submit(self, future: Future[None]) -> None:
        self._pending.append(future)
        while len(self._pending) > 4 * self.batch_size + 8:  # bounds the pictures in memory, raises what went wrong
            self._pending.popleft().result()

    def _draw(self, file: InputFile, pixels: NDArray[np.uint8], shown: Detections, target: Path) -> None:
        if target.exists() and target.samefile(file.path):
            raise UserError(f"{printable(target)}: the drawing would overwrite the image itself; choose another --out")
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

    def _skip(self, error: UserError) -> None:
        self.summary.skipped.append(str(error))
        print(f"skipped: {error}", file=sys.stderr)


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
