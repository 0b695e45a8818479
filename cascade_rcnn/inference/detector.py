"""``load`` a checkpoint as a ``Detector``, and ``predict`` images with it.

B images of a batch, D detections per image. Images are resized as in evaluation, boxes come back in original pixels by
each side's own factor.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast, overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from cascade_rcnn.checkpoint import load_checkpoint
from cascade_rcnn.config import Config
from cascade_rcnn.data.dataset import Item
from cascade_rcnn.data.images import to_array
from cascade_rcnn.data.loader import Collate, bucket_sizes
from cascade_rcnn.data.transforms import resize_for_test
from cascade_rcnn.distributed import usable_device
from cascade_rcnn.errors import CheckpointError, DataError, UserError
from cascade_rcnn.inference.detections import Detections
from cascade_rcnn.inference.run_model import Precision, choose_precision, detect, to_detections
from cascade_rcnn.messages import printable
from cascade_rcnn.models.build import build_model
from cascade_rcnn.models.cascade_rcnn import CascadeRCNN, NoInitialValues
from cascade_rcnn.models.ops.capabilities import triton_problem
from cascade_rcnn.models.ops.winograd import WinogradConv2d
from cascade_rcnn.zoo.store import resolve

_PRECISIONS = {"fp32": "float32", "tf32": "float32 with products in TF32", "bf16": "bfloat16"}
ImageLike = str | Path | Image.Image | NDArray[np.uint8] | Tensor


def choose_device(device: str | torch.device = "auto") -> torch.device:
    """``auto`` takes a GPU if there is one.

    Raises:
        UserError: a device that torch does not know or that is not in this machine.
    """
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return usable_device(device)


def load(
    path: str | Path,
    *,
    device: str | torch.device = "auto",
    precision: Precision = "auto",
    compile: bool = False,
    score_threshold: float | None = None,
    max_detections: int | None = None,
    stop_after_stage: int | None = None,
    range: str | None = None,
) -> Detector:
    """A detector from a ``.safetensors`` checkpoint, a run folder (its best, else its last), or the name of published
    weights.

    Published weights (``cascade-rcnn models`` lists them) are downloaded, converted and kept when first used.

    ``score_threshold``, ``max_detections`` (raise it for dense scenes), ``stop_after_stage`` and ``range`` (of pictures
    of more than 8 bits: ``"0 4095"``) replace what the checkpoint says. ``precision`` auto is float32, on recent NVIDIA
    GPUs with TF32 products.

    ``compile`` makes code for each of the few sizes that images are padded to, when the first image of that size comes:
    that takes a minute and is told on stderr; what it finds is the same (docs/speed.md).

    Raises:
        CheckpointError: no such file or name, or one that is damaged or of another kind, or cannot be fetched.
        ConfigError: a setting out of its range.
        UserError: a device or precision that is not there, or no compiler.
    """
    chosen = choose_device(device)
    precision = choose_precision(precision, chosen)
    path = resolve(path)
    checkpoint = load_checkpoint(path)
    wanted = {
        "score_threshold": score_threshold,
        "max_detections": max_detections,
        "stop_after_stage": stop_after_stage,
    }
    changed: dict[str, Any] = {name: value for name, value in wanted.items() if value is not None}
    config = _changed(checkpoint.config, changed, range)
    with NoInitialValues():
        model = build_model(config.model, len(checkpoint.class_names))
    try:
        model.load_state_dict(checkpoint.state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{printable(path)}: its weights do not fit its own configuration ({reason}); "
            "use another copy of the checkpoint"
        ) from error
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


def _changed(config: Config, model: dict[str, Any], range: str | None) -> Config:
    data = config.data if range is None else dataclasses.replace(config.data, range=range)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **model), data=data)


class Detector:
    """A network with all that is needed to use it on any picture."""

    def __init__(
        self,
        model: CascadeRCNN,
        config: Config,
        class_names: Sequence[str],
        category_ids: Sequence[int] = (),
        *,
        precision: Precision = "auto",
    ) -> None:
        self.model = model
        self.config = config
        self.class_names = tuple(class_names)
        self.category_ids = tuple(category_ids)
        self.precision = precision

    @classmethod
    def from_model(
        cls, model: CascadeRCNN, config: Config, class_names: Sequence[str], category_ids: Sequence[int] = ()
    ) -> Detector:
        """A detector around a network in memory, e.g. in the middle of its training; it is left in its own mode."""
        return cls(model, config, class_names, category_ids)

    def __repr__(self) -> str:
        model = self.config.model
        stages = model.stop_after_stage or len(model.stage_ious)
        return (
            f"Detector({model.backbone}, {stages} stages, masks {model.masks}, {len(self.class_names)} classes: "
            f"{', '.join(self.class_names[:5])}{', ...' if len(self.class_names) > 5 else ''})"
        )

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
    def predict(
        self, image: Sequence[ImageLike], *, batch_size: int = 1, score_threshold: float | None = None
    ) -> list[Detections]: ...

    def predict(
        self, image: ImageLike | Sequence[ImageLike], *, batch_size: int = 1, score_threshold: float | None = None
    ) -> Detections | list[Detections]:
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
            arrays = [
                to_array(one, max_pixels=self.config.data.max_pixels, range=self.config.data.range) for one in part
            ]
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
            items.append(
                Item(
                    resized,
                    pixels.shape[:2],
                    0,
                    "",
                    np.zeros((0, 4), np.float32),
                    nothing,
                    nothing.astype(np.bool_),
                    None,
                    scale=factors[0] if own_scale else None,
                )
            )
        data = self.config.data
        collated = Collate(data.pad_multiple, buckets=bucket_sizes(data))(items)
        assert not isinstance(collated, DataError)
        images = dataclasses.replace(collated[0], image_ids=())
        return to_detections(detect(self.model, images, self.precision), images, self.class_names, self.category_ids)
