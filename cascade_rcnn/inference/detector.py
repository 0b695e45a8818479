"""``load`` a checkpoint as a ``Detector``, and ``predict`` images with it.

B images of a batch, D detections per image. Images are resized as in evaluation, boxes come back in original pixels by
each side's own factor.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, Literal, cast, overload

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
from cascade_rcnn.data.sizes import fitting
from cascade_rcnn.data.transforms import resize_for_test
from cascade_rcnn.distributed import choose_device
from cascade_rcnn.errors import CheckpointError, DataError, UserError
from cascade_rcnn.inference.detections import Detections
from cascade_rcnn.inference.exported import ExportedNetwork, padded
from cascade_rcnn.inference.run_model import Precision, choose_precision, detect, to_detections
from cascade_rcnn.inference.tiled import TiledDetections, open_rows, predict_tiles
from cascade_rcnn.inference.tiles import ArrayRows, Pyramid, Tiling
from cascade_rcnn.messages import printable, shown
from cascade_rcnn.models.build import build_model
from cascade_rcnn.models.cascade_rcnn import CascadeRCNN, NoInitialValues
from cascade_rcnn.models.ops.capabilities import has_bfloat16_units, triton_problem
from cascade_rcnn.models.ops.winograd import WinogradConv2d
from cascade_rcnn.runtime.network import exported_file, refuse_setting
from cascade_rcnn.runtime.settings import check_model_settings, check_path, checked_number
from cascade_rcnn.structures import ImageBatch
from cascade_rcnn.zoo.store import resolve

_PRECISIONS = {"fp32": "float32", "tf32": "float32 with products in TF32", "bf16": "bfloat16"}
ImageLike = str | Path | bytes | IO[bytes] | Image.Image | NDArray[np.uint8] | Tensor


def _changed(config: Config, model: dict[str, Any], data: dict[str, Any]) -> Config:
    """The recipe with those settings that are not None."""
    new_model = dataclasses.replace(config.model, **{name: value for name, value in model.items() if value is not None})
    new_data = dataclasses.replace(config.data, **{name: value for name, value in data.items() if value is not None})
    return dataclasses.replace(config, model=new_model, data=new_data)


def load(
    path: str | Path,
    *,
    device: str | torch.device = "auto",
    precision: Precision = "auto",
    compile: bool = False,
    score_threshold: float | None = None,
    max_detections: int | None = None,
    stop_after_stage: int | Literal["auto"] | None = None,
    max_pixels: int | None = None,
    range: str | None = None,
) -> Detector:
    """A detector from a ``.safetensors`` checkpoint, a run folder (its best, else its last), the name of published
    weights, or an exported network (``model.onnx``, ``model.xml``, ``model.pt2``, or the folder of an export).

    Published weights (``cascade-rcnn models`` lists them) are downloaded, converted and kept when first used.

    What is not None replaces what the checkpoint says: ``max_detections`` (raise it for dense scenes), ``range`` (of
    pictures of more than 8 bits: ``"0 4095"``), ``max_pixels`` (of an image that is decoded), ... ``precision`` auto is
    float32, on recent NVIDIA GPUs with TF32 products.

    ``predict`` applies the thresholds by class that ``analyze --set-thresholds`` wrote; ``score_threshold`` overrides.

    ``stop_after_stage`` "auto": on a CPU a proposal is taken no further once its score is a fifth of the threshold or
    less, which hardly changes what is found (docs/speed.md).

    ``compile`` makes code for each of the few sizes that images are padded to, when the first image of that size comes:
    that takes a minute and is told on stderr; what it finds is the same (docs/speed.md).

    Raises:
        CheckpointError: no such file or name, or one that is damaged or of another kind, or cannot be fetched.
        ConfigError: more stages than there are, a ``range`` that is none.
        UserError: a setting out of its range, a device or precision that is not there, or no compiler.
    """
    stops_early = stop_after_stage == "auto"
    model_settings: dict[str, Any] = {"score_threshold": score_threshold, "max_detections": max_detections}
    model_settings["stop_after_stage"] = None if stops_early else stop_after_stage
    _check_settings(path, model_settings, max_pixels, compile=compile)
    if (exported := exported_file(path)) is not None:
        _refuse_for_exported(exported, device=device, precision=precision, compile=compile, auto=stops_early)
        return _load_exported(exported, precision, model_settings, {"max_pixels": max_pixels, "range": range})
    chosen = choose_device(device)
    precision = choose_precision(precision, chosen)
    path = resolve(path)
    checkpoint = load_checkpoint(path)
    config = _changed(checkpoint.config, model_settings, {"max_pixels": max_pixels, "range": range})
    if stops_early:
        _refuse_to_stop_early(config, path, compile=compile)
    with NoInitialValues():
        model = build_model(config.model, len(checkpoint.class_names))
    _load_weights(model, checkpoint.state, path)
    model.cascade.drops_hopeless = stops_early
    checkpoint.state.clear()  # the file's pages are memory too, and the weights are about to be laid out anew
    model = model.to(chosen).optimize_for_inference(bfloat16=precision == "bf16")
    if compile:
        model, config = _compiled(model, config)
    detector = Detector(model, config, checkpoint.class_names, checkpoint.category_ids, precision=precision)
    if score_threshold is None:
        detector.thresholds = checked_thresholds(checkpoint.metadata.get("thresholds", {}), path)
    return detector


def _check_settings(path: object, model: dict[str, Any], max_pixels: int | None, *, compile: bool) -> None:
    check_path(path)
    check_model_settings(model, max_pixels)
    if not isinstance(compile, bool):
        raise UserError(f"compile {shown(compile)}: give True or False")


def _refuse_for_exported(
    path: Path, *, device: str | torch.device, precision: Precision, compile: bool, auto: bool
) -> None:
    """Settings that an exported network cannot have any more."""
    where = printable(path)
    if auto:
        raise UserError(f"{where}: an exported network takes all proposals through its stages; drop --stages auto")
    if str(device) not in ("auto", "cpu"):
        raise UserError(
            f"{where}: an exported network runs on the CPU here, not on {device}; load the checkpoint itself"
        )
    if precision not in ("auto", "fp32", "bf16"):
        raise UserError(f"{where}: exported in float32 (or --int8); for {precision} load the checkpoint itself")
    if compile:
        raise UserError(f"{where}: an exported network is not compiled by torch; drop --compile")


def _refuse_to_stop_early(config: Config, path: Path, *, compile: bool) -> None:
    if compile:
        raise UserError("--stages auto: compiled heads take a fixed number of proposals; drop it, or --compile")
    if config.model.semantics == "paper":
        raise UserError(
            f"--stages auto: {printable(path)} scores all proposals on the last stage's boxes (model.semantics paper), "
            "so none can be judged before; drop it"
        )


def _load_exported(path: Path, precision: Precision, model: dict[str, Any], data: dict[str, Any]) -> Detector:
    network = ExportedNetwork(path, bfloat16=precision == "bf16")
    info = network.info
    refuse_setting(info, path, **model)
    score, limit = model["score_threshold"], model["max_detections"]
    config = _changed(info.config, {**model, "stop_after_stage": None}, data)
    # it takes a network's place wherever batches are looked at
    detector = Detector(cast(CascadeRCNN, network), config, info.class_names, info.category_ids)
    network.score_threshold, network.max_detections = score or 0.0, limit
    detector.thresholds = dict(info.thresholds) if score is None else {}
    return detector


def _load_weights(model: CascadeRCNN, state: dict[str, Tensor], path: Path) -> None:
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{printable(path)}: its weights do not fit its own configuration ({reason}); "
            "use another copy of the checkpoint"
        ) from error


def checked_thresholds(written: Any, path: Path) -> dict[str, float]:
    """The thresholds of classes in a checkpoint, checked."""
    if not isinstance(written, dict) or not all(
        type(one) in (int, float) and 0 <= one <= 1 for one in written.values()
    ):
        raise CheckpointError(
            f"{printable(path)}: its thresholds {shown(written)} are no numbers from 0 to 1 by class; write them anew: "
            "cascade-rcnn analyze ... --set-thresholds"
        )
    return {str(name): float(value) for name, value in written.items()}


def _compiled(model: CascadeRCNN, config: Config) -> tuple[CascadeRCNN, Config]:
    """The compiled network, and its recipe with padding to a few sizes where that changes nothing."""
    from cascade_rcnn.inference.compiled import compile_for_inference

    model = compile_for_inference(model, multiple=config.data.pad_multiple)
    # The statistics of group norm would see the padding, as would Detectron's boxes: they may leave their image.
    sees_padding = config.model.norm == "group" or config.model.semantics == "paper"
    if config.data.pad_buckets is None and not sees_padding:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, pad_buckets=True))
    return model, config


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
        # the only input size (height, width) of an exported network; None: any
        self.canvas: tuple[int, int] | None = model.canvas if isinstance(model, ExportedNetwork) else None
        self.thresholds: dict[str, float] = {}  # by class: what ``predict`` leaves out (``analyze --set-thresholds``)

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
        own = f"; thresholds of its own for {len(self.thresholds)} classes" if self.thresholds else ""
        if isinstance(self.model, ExportedNetwork):
            return f"cpu: {self.model.network.kind()}{own}"
        model, data = self.model, self.config.data
        device = model.mean.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
        precision = choose_precision(self.precision, device)
        words = [_PRECISIONS[precision], "channels-last"]
        if self.config.model.norm != "group":
            words.append("batch norm folded")
        if device.type == "cuda":
            problem = triton_problem()
            words.append(f"no fused kernels ({problem})" if problem else "fused kernels, CUDA graphs")
        if any(isinstance(part, WinogradConv2d) for part in model.modules()):
            words.append("Winograd")
        if device.type == "cpu" and has_bfloat16_units() != (precision == "bf16"):
            words.append(
                "slower than float32 on this processor, which has no bfloat16 units"
                if precision == "bf16"
                else "the processor's bfloat16 units unused (--precision bf16)"
            )
        if model.cascade.drops_hopeless:
            on_cpu = device.type == "cpu"
            words.append("stages auto" if on_cpu else "all stages (--stages auto changes nothing on a GPU)")
        compiled = "not compiled (--compile)"
        if type(model) is not CascadeRCNN:
            sizes = bucket_sizes(data)
            compiled = f"compiled for {len(sizes)} sizes at most" if sizes else "compiled for each size"
        return f"{name}: {', '.join(words)}; {compiled}{own}"

    def to(self, device: str | torch.device) -> Detector:
        """Move the network to another device, in place; gives the detector itself. ``auto`` as in ``load``.

        Raises:
            UserError: no such device, one without the detector's precision, or a compiled network.
        """
        chosen = choose_device(device)
        if isinstance(self.model, ExportedNetwork):
            if chosen.type == "cpu" or str(device) == "auto":
                return self
            raise UserError(f"an exported network stays on the CPU; load the checkpoint itself for {device}")
        if type(self.model) is not CascadeRCNN and isinstance(self.model, CascadeRCNN):
            raise UserError(f"a compiled network stays on its device: load(..., device={str(device)!r}, compile=True)")
        choose_precision(self.precision, chosen)
        self.model.to(chosen)
        return self

    @overload  # a str is also a sequence of str, but is meant as one path
    def predict(  # type: ignore[overload-overlap]
        self,
        image: ImageLike,
        *,
        batch_size: int = 1,
        score_threshold: float | None = None,
        max_pixels: int | None = None,
        tile: int | None = None,
        overlap: float = 0.2,
        whole: bool = True,
        max_merged: int | None = None,
    ) -> Detections: ...

    @overload
    def predict(
        self,
        image: Sequence[ImageLike],
        *,
        batch_size: int = 1,
        score_threshold: float | None = None,
        max_pixels: int | None = None,
        tile: int | None = None,
        overlap: float = 0.2,
        whole: bool = True,
        max_merged: int | None = None,
    ) -> list[Detections]: ...

    def predict(
        self,
        image: ImageLike | Sequence[ImageLike],
        *,
        batch_size: int = 1,
        score_threshold: float | None = None,
        max_pixels: int | None = None,
        tile: int | None = None,
        overlap: float = 0.2,
        whole: bool = True,
        max_merged: int | None = None,
    ) -> Detections | list[Detections]:
        """Objects of one image, or of each image of a list.

        Args:
            image: a path, the bytes of a file or an open file (``"rb"``), a ``PIL.Image``, a uint8 array [H, W, 3] RGB
                or [H, W] grey, a uint8 tensor [3, H, W]; or a list of these, of any sizes. Files are turned upright by
                their EXIF orientation.
            batch_size: images of a list that go through the network at once.
            score_threshold: leave out detections below it. Those below the model's own threshold never come; lower that
                with ``load(..., score_threshold=)``.
            max_pixels: refuse to decode a larger file; None: as loaded. With ``tile`` it is read by windows instead.
            tile: look at tiles of so many pixels a side, and merge what is found (docs/huge.md); ``batch_size`` then
                counts tiles, and the network's limit of detections is one per tile.
            overlap: of neighbouring tiles, as a share of their side.
            whole: look at the picture at coarser resolutions too, for objects larger than the overlap.
            max_merged: keep the best so many of a picture that was cut into tiles; None: all.

        Raises:
            UserError: an image of a wrong type, dtype or shape, a file that cannot be read, a number out of its range.
        """
        checked_number("batch_size", batch_size, low=1, whole=True)
        checked_number("score_threshold", score_threshold, low=0, high=1)
        checked_number("max_pixels", max_pixels, low=1, whole=True)
        limit = self.config.data.max_pixels if max_pixels is None else max_pixels
        one_image = not isinstance(image, list | tuple)
        images = [cast(ImageLike, image)] if one_image else cast(Sequence[ImageLike], image)
        found: list[Detections] = []
        if tile is not None:
            tiling = Tiling(tile, overlap, whole, max_merged)
            found = [self._merged(one, tiling, batch_size, limit, score_threshold or 0) for one in images]
            return found[0] if one_image else found
        for start in range(0, len(images), batch_size):
            part = images[start : start + batch_size]
            arrays = [to_array(one, max_pixels=limit, range=self.config.data.range) for one in part]
            for one, pixels, detections in zip(part, arrays, self.look(arrays)):
                detections.image = Path(one) if isinstance(one, str | Path) else pixels
                if score_threshold is not None:
                    detections = detections[detections.scores >= score_threshold]
                found.append(detections)
        return found[0] if one_image else found

    def _merged(
        self, image: ImageLike, tiling: Tiling, batch_size: int, max_pixels: int, score_threshold: float
    ) -> Detections:
        """Objects of one image that is cut into tiles."""
        rows = open_rows(image, self.config, max_pixels=max_pixels)
        tiled = self.predict_tiled(Pyramid(rows, tiling), batch_size=batch_size)
        for line in tiled.told(score=2.0)[:1]:  # what is missing; partial objects are the rule with whole=False
            warnings.warn(line, UserWarning, stacklevel=3)
        detections = tiled[: int((tiled.scores >= score_threshold).sum())]
        detections.image = rows.pixels if isinstance(rows, ArrayRows) else None
        if isinstance(image, str | Path):
            detections.image = Path(image)
        return detections

    def predict_tiled(
        self,
        pyramid: Pyramid,
        *,
        batch_size: int = 1,
        advance: Callable[[int], None] | None = None,
        folder: Path | None = None,
    ) -> TiledDetections:
        """Objects of a picture that is cut into tiles, with masks in a temporary file (in ``folder``) until asked for.

        ``advance`` is called with the number of tiles done.
        """
        return predict_tiles(self.look, pyramid, self.config, batch_size=batch_size, advance=advance, folder=folder)

    def look(self, arrays: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        """One batch of pictures [H, W, 3] through the network."""
        images = self.prepare(arrays)
        raw = detect(self.model, images, self.precision)
        found = to_detections(raw, images, self.class_names, self.category_ids)
        if not self.thresholds:
            return found
        limits = torch.tensor([self.thresholds.get(name, 0.0) for name in self.class_names], dtype=torch.float64)
        return [one[one.scores.double() >= limits[one.labels]] for one in found]

    def prepare(self, arrays: Sequence[NDArray[np.uint8]]) -> ImageBatch:
        """Pictures [H, W, 3] as the network takes them: resized, padded to one size."""
        items = []
        for pixels in arrays:
            own_scale = self.config.model.semantics == "paper"
            data = fitting(self.config.data, pixels.shape[:2], self.canvas)
            resized, factors = resize_for_test(
                torch.from_numpy(pixels).permute(2, 0, 1), data, semantics=self.config.model.semantics
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
        buckets = () if isinstance(self.model, ExportedNetwork) else bucket_sizes(data)
        collated = Collate(data.pad_multiple, buckets=buckets)(items)
        assert not isinstance(collated, DataError)
        images = dataclasses.replace(collated[0], image_ids=())
        if self.canvas is not None:
            images.pixels = padded(images.pixels, self.canvas)
        return images
