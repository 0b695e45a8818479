"""``load`` an exported network and ``predict`` with it where torch is not installed: numpy, pillow and its runtime.

B images of a batch, D detections per image. The same pixels go in, to the bit, and the same boxes come out as from the
network with torch around it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from cascade_rcnn.config import Config
from cascade_rcnn.data.exact_resize import opencv_resized, pillow_resized
from cascade_rcnn.data.images import to_array
from cascade_rcnn.data.sizes import fitted_size, fitting, interpolation
from cascade_rcnn.errors import CheckpointError, UserError
from cascade_rcnn.messages import printable
from cascade_rcnn.runtime.detections import ArrayDetections
from cascade_rcnn.runtime.network import ExportInfo, RuntimeNetwork, exported_file, refuse_setting
from cascade_rcnn.runtime.settings import check_model_settings, check_path, checked_number

Pixels = NDArray[np.uint8]
_WITH_TORCH = "pip install cascade-rcnn"


def load(
    path: str | Path,
    *,
    score_threshold: float | None = None,
    max_detections: int | None = None,
    max_pixels: int | None = None,
    range: str | None = None,
    threads: int = 0,
    **others: Any,
) -> ArrayDetector:
    """A detector from an exported network: ``model.onnx``, ``model.xml``, or the folder of an export.

    What is not None replaces what the network says. ``threads`` 0: one for each core.

    Raises:
        CheckpointError: no such file, a damaged one, or a checkpoint, which needs torch.
        TypeError: a setting that ``cascade_rcnn.load`` does not have either.
        UserError: a setting that the network does not hold, or that needs torch.
    """
    check_path(path)
    file = exported_file(path)
    if file is None:
        raise _no_network(Path(path))
    stages = others.pop("stop_after_stage", None)
    given = {"score_threshold": score_threshold, "max_detections": max_detections}
    check_model_settings({**given, "stop_after_stage": None if stages == "auto" else stages}, max_pixels)
    checked_number("threads", threads, low=0, whole=True)
    if stages == "auto":
        raise UserError(
            f"{printable(file)}: an exported network takes all proposals through its stages; drop --stages auto"
        )
    usual = {"device": ("auto", "cpu"), "precision": ("auto", "fp32", "bf16"), "compile": (False,)}
    for name, value in others.items():
        if name not in usual:
            raise TypeError(f"load() got an unexpected keyword argument {name!r}")
        if value not in usual[name]:
            raise UserError(f"{name} {value}: exported networks run on the CPU as they were written; drop it")
    network = RuntimeNetwork(file, threads=threads, bfloat16=others.get("precision") == "bf16")
    info = network.info
    refuse_setting(info, file, score_threshold=score_threshold, max_detections=max_detections, stop_after_stage=stages)
    changes: dict[str, Any] = {
        name: value for name, value in (("max_pixels", max_pixels), ("range", range)) if value is not None
    }
    config = dataclasses.replace(info.config, data=dataclasses.replace(info.config.data, **changes))
    if interpolation(config.data, config.model.semantics, training=False) not in _RESIZERS:
        raise UserError(
            f"{printable(file)}: its images are resized by PyTorch's own rule (semantics {config.model.semantics}), "
            f"which is not installed: {_WITH_TORCH}"
        )
    detector = ArrayDetector(network, config)
    detector.score_threshold, detector.max_detections = score_threshold or 0.0, max_detections
    if score_threshold is not None:
        detector.thresholds = {}
    return detector


def _no_network(path: Path) -> CheckpointError:
    """Why this is none, and what to give in its place."""
    weights_of = path.with_suffix(".xml")
    if path.suffix.lower() == ".bin" and weights_of.is_file():
        return CheckpointError(f"{printable(path)}: holds the weights of {printable(weights_of.name)}; give that file")
    if path.is_dir():
        return CheckpointError(
            f"{printable(path)}: no exported network in this folder (model.onnx, or model.xml with model.bin); "
            f"a checkpoint needs PyTorch, which is not installed: {_WITH_TORCH}"
        )
    return CheckpointError(
        f"{printable(path)}: is no exported network (model.onnx, model.xml); checkpoints need PyTorch, which is not "
        f"installed: {_WITH_TORCH}"
    )


class ArrayDetector:
    """An exported network with all that is needed to use it on any picture."""

    def __init__(self, network: RuntimeNetwork, config: Config) -> None:
        info: ExportInfo = network.info
        self.network, self.config = network, config
        self.class_names, self.category_ids = info.class_names, info.category_ids
        self.canvas = info.size
        self.thresholds = dict(info.thresholds)  # by class: what ``predict`` leaves out
        self.score_threshold = 0.0
        self.max_detections: int | None = None

    def __repr__(self) -> str:
        return f"ArrayDetector({printable(self.network.path)}, {len(self.class_names)} classes)"

    def choices(self) -> str:
        """One line: the runtime and its numbers."""
        own = f"; thresholds of its own for {len(self.thresholds)} classes" if self.thresholds else ""
        return f"cpu: {self.network.kind()}, without PyTorch{own}"

    @overload  # a str is also a sequence of str, but is meant as one path
    def predict(  # type: ignore[overload-overlap]
        self,
        image: str | Path | bytes | Pixels,
        *,
        batch_size: int = 1,
        score_threshold: float | None = None,
        max_pixels: int | None = None,
    ) -> ArrayDetections: ...

    @overload
    def predict(
        self,
        image: Sequence[Any],
        *,
        batch_size: int = 1,
        score_threshold: float | None = None,
        max_pixels: int | None = None,
    ) -> list[ArrayDetections]: ...

    def predict(
        self,
        image: Any,
        *,
        batch_size: int = 1,
        score_threshold: float | None = None,
        max_pixels: int | None = None,
        tile: int | None = None,
        overlap: float = 0.2,  # this and the following go with a tile, and change nothing without
        whole: bool = True,
        max_merged: int | None = None,
    ) -> ArrayDetections | list[ArrayDetections]:
        """As ``Detector.predict``, for everything but tensors and tiles.

        Raises:
            UserError: an image of a wrong type, dtype or shape, or a file that cannot be read.
        """
        if tile is not None:
            raise UserError(f"tile {tile}: tiles need PyTorch, which is not installed: {_WITH_TORCH}")
        checked_number("batch_size", batch_size, low=1, whole=True)
        checked_number("score_threshold", score_threshold, low=0, high=1)
        checked_number("max_pixels", max_pixels, low=1, whole=True)
        one_image = not isinstance(image, list | tuple)
        images = [image] if one_image else image
        data = self.config.data
        found: list[ArrayDetections] = []
        for start in range(0, len(images), batch_size):
            part = images[start : start + batch_size]
            limit = data.max_pixels if max_pixels is None else max_pixels
            arrays = [to_array(one, max_pixels=limit, range=data.range) for one in part]
            for one, pixels, detections in zip(part, arrays, self.look(arrays)):
                detections.image = Path(one) if isinstance(one, str | Path) else pixels
                if score_threshold is not None:
                    detections = detections[detections.scores >= score_threshold]
                found.append(detections)
        return found[0] if one_image else found

    def look(self, arrays: Sequence[Pixels]) -> list[ArrayDetections]:
        """One batch of pictures [H, W, 3] through the network."""
        pixels, sizes = self.prepare(arrays)
        outputs = self.network.detect(pixels, sizes)
        return [self._detections(outputs, row, sizes[row], one.shape[:2]) for row, one in enumerate(arrays)]

    def prepare(self, arrays: Sequence[Pixels]) -> tuple[Pixels, NDArray[np.int64]]:
        """Pictures [H, W, 3] as the network takes them: pixels [B, 3, H, W], and sizes [B, 2] within the padding."""
        config = self.config
        resize = _RESIZERS[interpolation(config.data, config.model.semantics, training=False)]
        resized = []
        for pixels in arrays:
            size = (pixels.shape[0], pixels.shape[1])
            data = fitting(config.data, size, self.canvas)
            wanted = fitted_size(size, data.test_short_side or max(data.short_side), data.long_side)
            resized.append(resize(pixels, wanted) if wanted != size else pixels)
        sizes = np.array([one.shape[:2] for one in resized], dtype=np.int64)
        multiple = config.data.pad_multiple
        height, width = (-(-int(side) // multiple) * multiple for side in sizes.max(axis=0))
        batch = np.zeros((len(resized), 3, height, width), dtype=np.uint8)
        for row, one in enumerate(resized):
            batch[row, :, : one.shape[0], : one.shape[1]] = one.transpose(2, 0, 1)
        return batch, sizes

    def _detections(
        self, outputs: dict[str, NDArray[Any]], row: int, size: NDArray[np.int64], original: tuple[int, ...]
    ) -> ArrayDetections:
        """One image's detections in its own pixels, by each side's own factor."""
        labels, scores = outputs["labels"][row], outputs["scores"][row]
        kept = outputs["valid"][row].astype(bool) & (scores > self.score_threshold)
        if self.max_detections is not None:  # sorted by descending score
            kept[self.max_detections :] = False
        limits = np.array([self.thresholds.get(name, 0.0) for name in self.class_names], dtype=np.float64)  # [K]
        kept &= scores.astype(np.float64) >= limits[labels]
        height, width = original[0], original[1]
        factors = np.array([height, width], dtype=np.float64) / size.astype(np.float64)
        boxes = outputs["boxes"][row][kept].astype(np.float64) * factors[[1, 0, 1, 0]]
        boxes = np.clip(boxes, 0, np.array([width, height] * 2, dtype=np.float64)).astype(np.float32)
        masks = outputs.get("masks")
        return ArrayDetections(
            boxes,
            scores[kept],
            labels[kept],
            (height, width),
            self.class_names,
            mask_probs=None if masks is None else masks[row][kept],
            category_ids=self.category_ids,
        )


_RESIZERS = {"opencv": opencv_resized, "pillow": pillow_resized}
