"""From pictures to detections: ``load("best.safetensors").predict("street.jpg")``, and the command ``predict``.

B images of a batch, D detections per image. Images are resized as in evaluation, boxes come back in original pixels by
each side's own factor.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar, cast, overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from cascade_rcnn.checkpoint import load_checkpoint
from cascade_rcnn.config import Config
from cascade_rcnn.data.dataset import Item
from cascade_rcnn.data.files import printable
from cascade_rcnn.data.loader import Collate, bucket_sizes
from cascade_rcnn.data.transforms import resize_for_test
from cascade_rcnn.distributed import usable_device
from cascade_rcnn.errors import CheckpointError, DataError, UserError
from cascade_rcnn.inference.detections import (
    AS_SAVED,
    Detections,
    Inference,
    Precision,
    choose_precision,
    detect,
    to_detections,
)
from cascade_rcnn.inference.media import InputFile, VideoReader, VideoWriter, collect, to_array
from cascade_rcnn.inference.predictions_file import ResultsFile, join_shards, parse_shard, results_path
from cascade_rcnn.models.build import build_model
from cascade_rcnn.models.cascade_rcnn import CascadeRCNN, NoInitialValues
from cascade_rcnn.models.ops.roi_align import triton_problem
from cascade_rcnn.models.ops.winograd import WinogradConv2d
from cascade_rcnn.submit import submit_predictions
from cascade_rcnn.training.log import progress_bar

ImageLike = str | Path | Image.Image | NDArray[np.uint8] | Tensor
_T = TypeVar("_T")
_PRECISIONS = {"fp32": "float32", "tf32": "float32 with products in TF32", "bf16": "bfloat16"}
_AHEAD = 4  # batches decoded before they are needed


def choose_device(device: str | torch.device = "auto") -> torch.device:
    """``auto`` takes a GPU if there is one.

    Raises:
        UserError: a device that torch does not know or that is not in this machine.
    """
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return usable_device(device)


def load(path: str | Path, *, device: str | torch.device = "auto", precision: Precision = "auto", compile: bool = False,
         score_threshold: float | None = None, max_detections: int | None = None,
         stop_after_stage: int | None = None) -> Detector:
    """A detector from a ``.safetensors`` checkpoint or a run folder (its best, else its last).

    ``score_threshold``, ``max_detections`` (raise it for dense scenes) and ``stop_after_stage`` replace the
    checkpoint's own test-time settings. ``precision`` auto is float32, on recent NVIDIA GPUs with TF32 products.

    ``compile`` makes code for each of the few sizes that images are padded to, when the first image of that size comes:
    that takes a minute and is told on stderr; what it finds is the same (docs/speed.md).

    Raises:
        CheckpointError: no such file, or one that is damaged or of another kind.
        ConfigError: a setting out of its range.
        UserError: a device or precision that is not there, or no compiler.
    """
    chosen = choose_device(device)
    precision = choose_precision(precision, chosen)
    checkpoint = load_checkpoint(path)
    wanted = {"score_threshold": score_threshold, "max_detections": max_detections,
              "stop_after_stage": stop_after_stage}
    changed: dict[str, Any] = {name: value for name, value in wanted.items() if value is not None}
    config = dataclasses.replace(checkpoint.config, model=dataclasses.replace(checkpoint.config.model, **changed))
    with NoInitialValues():
        model = build_model(config.model, len(checkpoint.class_names))
    try:
        model.load_state_dict(checkpoint.state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{printable(path)}: its weights do not fit its own configuration ({reason}); "
                              "use another copy of the checkpoint") from error
    checkpoint.state.clear()  # the file's pages are memory too, and the weights are about to be laid out anew
    model = model.to(chosen).optimize_for_inference()
    if compile:
        from cascade_rcnn.inference.compiled import compile_for_inference

        model = compile_for_inference(model, multiple=config.data.pad_multiple)
        # The statistics of group norm would see the padding, as would Detectron's boxes: they may leave their image.
        sees_padding = config.model.norm == "group" or config.model.semantics == "paper"
        if config.data.pad_buckets is None and not sees_padding:
            config = dataclasses.replace(config, data=dataclasses.replace(config.data, pad_buckets=True))
    return Detector(model, config, checkpoint.class_names, checkpoint.category_ids, precision=precision)


class Detector:
    """A network with all that is needed to use it on any picture."""

    def __init__(self, model: CascadeRCNN, config: Config, class_names: Sequence[str], category_ids: Sequence[int] = (),
                 *, precision: Precision = "auto") -> None:
        self.model = model
        self.config = config
        self.class_names = tuple(class_names)
        self.category_ids = tuple(category_ids)
        self.precision = precision

    @classmethod
    def from_model(cls, model: CascadeRCNN, config: Config, class_names: Sequence[str],
                   category_ids: Sequence[int] = ()) -> Detector:
        """A detector around a network in memory, e.g. in the middle of its training; it is left in its own mode."""
        return cls(model, config, class_names, category_ids)

    def __repr__(self) -> str:
        model = self.config.model
        stages = model.stop_after_stage or len(model.stage_ious)
        return (f"Detector({model.backbone}, {stages} stages, masks {model.masks}, {len(self.class_names)} classes: "
                f"{', '.join(self.class_names[:5])}{', ...' if len(self.class_names) > 5 else ''})")

    def choices(self) -> str:
        """One line: the device, and what was chosen for it or forced."""
        model, data = self.model, self.config.data
        device = model.mean.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
        words = [_PRECISIONS[choose_precision(self.precision, device)], "channels-last"]
        words += ["batch norm folded"] * (self.config.model.norm != "group")
        if device.type == "cuda":
            words.append(f"no fused kernels ({problem})" if (problem := triton_problem()) else "fused kernels")
        words += ["Winograd"] * any(isinstance(part, WinogradConv2d) for part in model.modules())
        compiled = "not compiled (--compile)"
        if type(model) is not CascadeRCNN:
            sizes = bucket_sizes(data)
            compiled = f"compiled for {len(sizes)} sizes at most" if sizes else "compiled for each size"
            compiled += ", CUDA graphs" * (device.type == "cuda")
        return f"{name}: {', '.join(words)}; {compiled}"

    @overload  # a str is also a sequence of str, but is meant as one path
    def predict(  # type: ignore[overload-overlap]
        self, image: ImageLike, *, batch_size: int = 1, score_threshold: float | None = None
    ) -> Detections: ...

    @overload
    def predict(self, image: Sequence[ImageLike], *, batch_size: int = 1,
                score_threshold: float | None = None) -> list[Detections]: ...

    def predict(self, image: ImageLike | Sequence[ImageLike], *, batch_size: int = 1,
                score_threshold: float | None = None) -> Detections | list[Detections]:
        """Objects of one image, or of each image of a list.

        Args:
            image: a path, a ``PIL.Image``, a uint8 array [H, W, 3] RGB or [H, W] grey, a uint8 tensor [3, H, W]; or a
                list of these, of any sizes. Files are turned upright by their EXIF orientation.
            batch_size: images of a list that go through the network at once.
            score_threshold: leave out detections below it. Those below the model's own threshold never come; lower that
                with ``load(..., score_threshold=)``.

        Raises:
            UserError: an image of a wrong type, dtype or shape, or a file that cannot be read.
        """
        if not isinstance(image, list | tuple):
            return self.predict([cast(ImageLike, image)], score_threshold=score_threshold)[0]
        if batch_size < 1:
            raise UserError(f"batch_size {batch_size}: at least 1")
        found: list[Detections] = []
        for start in range(0, len(image), batch_size):
            part = image[start : start + batch_size]
            arrays = [to_array(one, max_pixels=self.config.data.max_pixels) for one in part]
            for one, pixels, detections in zip(part, arrays, self._detect(arrays)):
                detections.image = Path(one) if isinstance(one, str | Path) else pixels
                if score_threshold is not None:
                    detections = detections[detections.scores >= score_threshold]
                found.append(detections)
        return found

    def _detect(self, arrays: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        """One batch through the network."""
        items = []
        for pixels in arrays:
            own_scale = self.config.model.semantics == "paper"
            resized, factors = resize_for_test(
                torch.from_numpy(pixels).permute(2, 0, 1), self.config.data, semantics=self.config.model.semantics
            )
            nothing = np.zeros(0, np.int64)
            items.append(Item(resized, pixels.shape[:2], 0, "", np.zeros((0, 4), np.float32), nothing,
                              nothing.astype(np.bool_), None, scale=factors[0] if own_scale else None))
        data = self.config.data
        collated = Collate(data.pad_multiple, buckets=bucket_sizes(data))(items)
        assert not isinstance(collated, DataError)
        images = dataclasses.replace(collated[0], image_ids=())
        return to_detections(detect(self.model, images, self.precision), images, self.class_names, self.category_ids)


@dataclasses.dataclass
class PredictSummary:
    """What ``run_predict`` has done."""

    images: int = 0  # images and video frames looked at
    objects: int = 0
    drawn: int = 0  # objects that reach the score of the drawings
    skipped: list[str] = dataclasses.field(default_factory=list)  # one line for each file that could not be read
    results: Path = Path()


def run_predict(checkpoint: str | Path, inputs: Sequence[str | Path], *, out: Path, score: float = 0.3,
                draw: bool = True, device: str = "auto", inference: Inference = AS_SAVED, shard: str = "",
                submission: tuple[str, Path] | None = None) -> PredictSummary:
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
    detector = load(checkpoint, device=_own_device(device), precision=inference.precision, compile=inference.compile,
                    stop_after_stage=inference.stages, score_threshold=inference.score_threshold,
                    max_detections=inference.max_detections)
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

    def __init__(self, detector: Detector, results: ResultsFile, summary: PredictSummary, drawings: Path | None,
                 score: float, batch_size: int) -> None:
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
            return file, to_array(file.path, max_pixels=self.detector.config.data.max_pixels)
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
        print(f"drawings: {printable(out / 'drawings')} ({summary.drawn} of the objects, with a score of {score:g} or "
              "more; --score changes that)")
    if summary.skipped:
        print(f"{len(summary.skipped)} files could not be read and were skipped", file=sys.stderr)
