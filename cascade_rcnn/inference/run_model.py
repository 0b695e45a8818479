"""Run the network on a batch in a chosen precision, and take its padded output apart into detections."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal, get_args
from weakref import WeakKeyDictionary

import torch

from cascade_rcnn.errors import UserError
from cascade_rcnn.inference.detections import Detections
from cascade_rcnn.inference.tiles import Tiling
from cascade_rcnn.messages import shown
from cascade_rcnn.models.detectron_rules import scale_boxes
from cascade_rcnn.structures import ImageBatch, RawDetections

if TYPE_CHECKING:
    from cascade_rcnn.models.cascade_rcnn import CascadeRCNN


Precision = Literal["auto", "fp32", "tf32", "bf16"]


@dataclass(frozen=True)
class Inference:
    """How the commands run the network; None: as the checkpoint says. See ``predict.load``."""

    batch_size: int = 1
    precision: Precision = "auto"
    compile: bool = False
    stages: int | Literal["auto"] | None = None  # stop after so many; "auto": where a proposal has no hope
    score_threshold: float | None = None
    max_detections: int | None = None
    max_pixels: int | None = None  # of an image that is decoded
    range: str | None = None  # of pictures of more than 8 bits (``data.range``)
    tiling: Tiling | None = None  # look at tiles of a picture; None: at the picture

    def of_load(self) -> dict[str, Any]:
        """The arguments of ``load`` in it."""
        names = ("precision", "compile", "score_threshold", "max_detections", "max_pixels", "range")
        return {name: getattr(self, name) for name in names} | {"stop_after_stage": self.stages}


AS_SAVED = Inference()


def choose_precision(precision: Precision, device: torch.device) -> Literal["fp32", "tf32", "bf16"]:
    """``auto``: float32, and on NVIDIA GPUs that have it (from Ampere on) with products in TF32.

    Raises:
        UserError: another word, or TF32 where there is none.
    """
    words = get_args(Precision)
    if precision not in words:
        raise UserError(f"precision {shown(precision)}: choose one of {', '.join(words)}")
    has_tf32 = device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 8
    if precision == "tf32" and not has_tf32:
        raise UserError(f"precision tf32: {device} has no such units; use auto, fp32 or bf16")
    if precision == "auto":
        return "tf32" if has_tf32 else "fp32"
    return precision


@contextmanager
def _arithmetic(device: torch.device, precision: Precision) -> Iterator[None]:
    """Products in that precision inside; box arithmetic stays in float32."""
    chosen = choose_precision(precision, device)
    if device.type != "cuda":
        with torch.autocast(device.type, torch.bfloat16, enabled=chosen == "bf16"):
            yield
        return
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = chosen != "fp32"
    try:
        with torch.autocast("cuda", torch.bfloat16, enabled=chosen == "bf16"):
            yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


_lock = Lock()
_predicting: WeakKeyDictionary[CascadeRCNN, int] = WeakKeyDictionary()  # threads inside, of networks that train


@contextmanager
def _evaluation_mode(model: CascadeRCNN) -> Iterator[None]:
    """The first thread inside takes a network out of its training mode, the last puts it back.

    Each for itself would put it back while another still predicts.
    """
    with _lock:
        inside = _predicting.get(model, 0)
        switches = bool(inside) or model.training
        if switches:
            _predicting[model] = inside + 1
        if model.training:
            model.eval()
    try:
        yield
    finally:
        with _lock:
            if switches:
                _predicting[model] -= 1
            if switches and not _predicting[model]:
                del _predicting[model]
                model.train()


def detect(model: CascadeRCNN, images: ImageBatch, precision: Precision = "auto") -> RawDetections:
    """Run a batch on the model's own device, in evaluation mode; the result is on the CPU.

    Threads may share a model, in training mode too.
    """
    with inference_mode(model, precision) as device:
        return model.detect(images.to(device, non_blocking=True)).to("cpu")


@contextmanager
def inference_mode(model: CascadeRCNN, precision: Precision = "auto") -> Iterator[torch.device]:
    """A network in evaluation mode, without gradients and in that precision; gives the device where it lies."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with _evaluation_mode(model), torch.inference_mode(), _arithmetic(device, precision):
        yield device


def detect_each_stage(model: CascadeRCNN, images: ImageBatch, precision: Precision = "auto") -> list[RawDetections]:
    """As ``detect``: what each stage says alone, and last what all say together; without masks."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with _evaluation_mode(model), torch.inference_mode(), _arithmetic(device, precision):
        on_device = images.to(device, non_blocking=True)
        pyramid = model.pyramid(on_device)
        proposals = model.rpn.propose(pyramid, on_device.sizes)
        return [one.to("cpu") for one in model.cascade.detect_each_stage(pyramid, proposals, on_device)]


def to_detections(
    raw: RawDetections, images: ImageBatch, class_names: Sequence[str], category_ids: Sequence[int] = ()
) -> list[Detections]:
    """Take a padded batch apart; boxes go from the network's input to original pixels, by each side's own factor.

    Those of Detectron's semantics (``raw.scales``) by one factor, which scales their last pixel.
    """
    results = []
    factors = images.original_sizes.double() / images.sizes.double()  # [B, 2] height, width
    for index, size in enumerate(images.original_sizes.tolist()):
        valid = raw.valid[index].cpu()
        scale = factors[index].flip(0).repeat(2).cpu()  # x, y, x, y
        limit = torch.tensor([size[1], size[0]] * 2, dtype=torch.float64)
        boxes = raw.boxes[index].cpu()[valid].double()
        if raw.scales is None:
            boxes = boxes * scale
        else:
            boxes = scale_boxes(boxes[None], 1 / raw.scales[index : index + 1].cpu().double())[0]
        boxes = torch.minimum(boxes, limit).clamp(min=0).float()
        results.append(
            Detections(
                boxes,
                raw.scores[index].cpu().float()[valid],
                raw.labels[index].cpu()[valid],
                (size[0], size[1]),
                tuple(class_names),
                mask_probs=None if raw.masks is None else raw.masks[index].cpu()[valid],
                image_id=images.image_ids[index] if images.image_ids else None,
                category_ids=tuple(category_ids),
                whole_pixels=raw.scales is not None,
            )
        )
    return results
