"""What is measured against what: our network and torchvision's, with weights made from a rule."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from cascade_rcnn.benchmark import stopwatch
from cascade_rcnn.benchmark.peer import build_peer, freeze_peer
from cascade_rcnn.config import Config
from cascade_rcnn.export import network
from cascade_rcnn.export.quantise import Target, quantise
from cascade_rcnn.models.build import build_model
from cascade_rcnn.models.cascade_rcnn import CascadeRCNN
from cascade_rcnn.models.ops.capabilities import has_bfloat16_units
from cascade_rcnn.runtime.network import NAMES, ExportInfo, RuntimeNetwork
from cascade_rcnn.structures import ImageBatch, MaskCrops, Targets
from cascade_rcnn.training.weight_gradient import matrix_products_pay, use_matrix_products

CLASSES = 80
BACKWARD = "backward and optimizer"
OBJECTS = 8  # per image in a training step: COCO's mean is 7.3


@dataclass
class Contender:
    """A model under measurement: ``run`` is one call, ``seconds`` one number per round."""

    name: str
    run: Callable[[], Any]
    images: int
    seconds: list[float] = field(default_factory=list)
    core_seconds: list[float] = field(default_factory=list)  # all cores' time: comparable on a busy machine too
    parts: dict[str, list[float]] = field(default_factory=dict)
    macs: dict[str, float] = field(default_factory=dict)
    stopwatch: stopwatch.Stopwatch | None = None
    model: CascadeRCNN | None = None  # ours, to be watched while it runs
    peak_memory: int | None = None
    warm_up: float = 0.0
    dtype: torch.dtype | None = None  # of the products, where it is not the setting's


@dataclass(frozen=True)
class Setting:
    """What is measured, on what."""

    config: Config
    size: tuple[int, int]
    batch: int
    device: torch.device
    train: bool

    @property
    def dtype(self) -> torch.dtype:
        """What is chosen automatically: bfloat16 on GPUs; on CPUs with units for it a contender of its own shows it."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    @property
    def masks(self) -> bool:
        return self.config.model.masks != "none"


def images_of(setting: Setting) -> ImageBatch:
    pixels = torch.stack([stopwatch.synthetic_image(setting.size, seed=seed) for seed in range(setting.batch)])
    sizes = torch.tensor([setting.size] * setting.batch)
    return ImageBatch(pixels, sizes, sizes).to(setting.device)


def _boxes(setting: Setting) -> Tensor:
    """Objects [B, OBJECTS, 4] of 1/16 to 1/2 of the image's sides."""
    generator = torch.Generator().manual_seed(0)
    height, width = setting.size
    frame = torch.tensor([width, height, width, height])
    corner = torch.rand(setting.batch, OBJECTS, 2, generator=generator) * 0.5
    side = torch.rand(setting.batch, OBJECTS, 2, generator=generator) * 0.44 + 0.06
    return torch.cat((corner, corner + side), dim=2) * frame


def our_contenders(setting: Setting, *, compile: bool) -> list[Contender]:
    """Our model, first as its parts can be timed; on a GPU predictions are then repeated from recordings, as always."""
    found = [our_contender(setting)]
    if setting.device.type == "cuda" and not setting.train:
        found[0].name += ", without CUDA graphs"
        found.append(our_contender(setting, recorded=True))
    if setting.device.type == "cpu" and not setting.train and has_bfloat16_units():
        found.append(our_contender(setting, bfloat16=True))
    return [*found, our_contender(setting, compiled=True)] if compile else found


def our_contender(
    setting: Setting, *, compiled: bool = False, recorded: bool = False, bfloat16: bool = False
) -> Contender:
    """One way to run our model; ``bfloat16`` as ``--precision bf16`` does on a CPU."""
    model = build_model(setting.config.model, CLASSES)
    stopwatch.seed_weights(model)
    images = images_of(setting)
    name = setting.config.model.backbone.partition(".")[0]
    stages = len(setting.config.model.stage_ious)
    title = f"cascade-rcnn {name}, {stages} stages" if stages > 1 else f"cascade-rcnn {name}, 1 stage"
    if setting.masks:
        title += ", masks"
    if setting.train:
        model.to(setting.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if matrix_products_pay(setting.device):
            use_matrix_products(model)
        targets = targets_of(setting)
        run = _training_step(model, setting, lambda: model.loss(images, targets))
    else:
        model.eval().to(setting.device)

        def run() -> Any:
            half = torch.autocast("cpu", torch.bfloat16) if bfloat16 else setting.precision()
            with torch.inference_mode(), half:
                return model.detect(images)

    contender = Contender(title + ", compiled" * compiled + ", bfloat16" * bfloat16, run, setting.batch)
    contender.dtype = torch.bfloat16 if bfloat16 else None
    parts_are_timed = not (compiled or recorded or bfloat16)
    if parts_are_timed:
        watch = stopwatch.Stopwatch(setting.device)
        contender.macs = count_multiply_adds(model, setting, images, watch)
        contender.stopwatch, contender.model = watch, model
    if not setting.train:
        model.optimize_for_inference(bfloat16=bfloat16)
    if parts_are_timed:
        model.recorder = None
    if compiled:
        from cascade_rcnn.inference.compiled import compile_for_inference, compile_for_training

        if setting.train:
            compile_for_training(model, fixed_sizes=True)
        else:
            model = compile_for_inference(model)
    return contender


def runtime_contenders(setting: Setting, folder: Path) -> list[Contender]:
    """Our network in ONNX Runtime and OpenVINO, those that are installed, exported for this one size: in float, in
    bfloat16 (OpenVINO, on processors that have it), int8, and both.

    All layers become integers, calibrated on the images of the measurement: right for times, not for detections.

    Raises:
        UserError: onnx or onnxscript are not installed.
    """
    model = build_model(setting.config.model, CLASSES)
    stopwatch.seed_weights(model)
    model.eval().requires_grad_(False)
    model.backbone.fold_batch_norm()
    classes = tuple(f"class {number}" for number in range(CLASSES))
    info = ExportInfo(setting.config, classes, (), {}, setting.size, setting.batch, int8=False)
    onnx_file, openvino_file = (folder / NAMES[name] for name in ("onnx", "openvino"))
    network.write_onnx(network.trace(model, size=setting.size, batch=setting.batch), onnx_file, info)
    found = []
    if importlib.util.find_spec("onnxruntime") is not None:
        found += [_in_runtime(onnx_file, setting), _in_integers(onnx_file, setting, info, to="onnx")]
    if importlib.util.find_spec("openvino") is not None:
        network.write_openvino(onnx_file, openvino_file, info)
        found.append(_in_runtime(openvino_file, setting))
        if has_bfloat16_units():
            found.append(_in_runtime(openvino_file, setting, "bfloat16"))
        if importlib.util.find_spec("nncf") is not None:
            found.append(_in_integers(onnx_file, setting, info, to="openvino"))
            if has_bfloat16_units():
                found.append(_in_runtime(_integers_file(onnx_file, "openvino"), setting, "int8 and bfloat16"))
    return found


def _in_integers(onnx_file: Path, setting: Setting, info: ExportInfo, *, to: Target) -> Contender:
    target = _integers_file(onnx_file, to)
    pixels, sizes = _network_inputs(setting)
    quantise(onnx_file, target, [{"pixels": pixels, "sizes": sizes}], to=to, keep=(), say=lambda line: None)
    (network.mark_onnx if to == "onnx" else network.mark_openvino)(target, replace(info, int8=True))
    return _in_runtime(target, setting, "int8")


def _integers_file(onnx_file: Path, to: Target) -> Path:
    return onnx_file.with_name(f"int8_{NAMES[to]}")


_PRODUCTS = {"": None, "bfloat16": torch.bfloat16, "int8": torch.int8, "int8 and bfloat16": torch.int8}


def _in_runtime(path: Path, setting: Setting, numbers: str = "") -> Contender:
    """An exported network; ``numbers``: what it computes in, where that is not float32 (a key of ``_PRODUCTS``)."""
    opened = RuntimeNetwork(path, threads=torch.get_num_threads(), bfloat16="bfloat16" in numbers)
    pixels, sizes = _network_inputs(setting)
    name = ", ".join(filter(None, (f"the same in {opened.runtime}", numbers)))
    contender = Contender(name, lambda: opened.detect(pixels, sizes), setting.batch)
    contender.dtype = _PRODUCTS[numbers]
    return contender


def _network_inputs(setting: Setting) -> tuple[NDArray[Any], NDArray[Any]]:
    """An exported network's pixels [B, 3, H, W] and sizes [B, 2]."""
    images = images_of(setting)
    return images.pixels.contiguous().numpy(), images.sizes.numpy()


def contender(setting: Setting, who: str) -> Contender:
    """The model of ``who``: ours or peer."""
    return our_contender(setting) if who == "ours" else peer_contender(setting)


def targets_of(setting: Setting) -> Targets:
    """Objects of the images of a training step, eight in each."""
    boxes = _boxes(setting)
    valid = torch.ones(setting.batch, OBJECTS, dtype=torch.bool)
    labels = torch.arange(OBJECTS).expand(setting.batch, OBJECTS) % CLASSES
    masks = None
    if setting.masks:
        origins = boxes[..., [1, 0]].long()
        extents = (boxes[..., [3, 2]].ceil().long() - origins).clamp(min=1)
        areas = extents.prod(-1).flatten()
        offsets = (areas.cumsum(0) - areas).view(setting.batch, OBJECTS)
        largest = extents.flatten(0, 1).amax(0).tolist()
        masks = MaskCrops(
            torch.ones(int(areas.sum()), dtype=torch.uint8), offsets, origins, extents, (largest[0], largest[1])
        )
    return Targets(boxes, labels, valid, ~valid, masks).to(setting.device)


def _training_step(
    model: torch.nn.Module, setting: Setting, losses: Callable[[], dict[str, Tensor]]
) -> Callable[[], Any]:
    model.train()
    # A rate of nearly zero: the weights stay what they are from round to round, the work is the same.
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-12, momentum=0.9)

    def run() -> None:
        with setting.precision():
            total = torch.stack([*losses().values()]).sum()
        total.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    return run


def peer_options(setting: Setting) -> dict[str, Any]:
    """For torchvision's models: our numbers of boxes, and images as they are in evaluation too."""
    ours = setting.config.model
    return {
        "num_classes": CLASSES + 1,
        "rpn_post_nms_top_n_test": ours.test_proposals,
        "min_size": min(setting.size),
        "max_size": max(setting.size),
        "box_batch_size_per_image": ours.roi_samples,
        "box_detections_per_img": ours.max_detections,
    }


def peer_contender(setting: Setting) -> Contender:
    """torchvision's Faster or Mask R-CNN of ResNet-50, what pip can install."""
    model = build_peer(masks=setting.masks, options=peer_options(setting))
    stopwatch.seed_weights(model)
    model.to(setting.device).eval()
    batch = images_of(setting)
    images = [pixels.float() / 255 for pixels in batch.pixels]
    name = f"torchvision {'Mask' if setting.masks else 'Faster'} R-CNN resnet50"
    if setting.train:
        height, width = setting.size
        mask = torch.ones(OBJECTS, height, width, dtype=torch.uint8, device=setting.device)
        targets = [
            {"boxes": boxes.to(setting.device), "labels": torch.arange(1, OBJECTS + 1, device=setting.device)}
            | ({"masks": mask} if setting.masks else {})
            for boxes in _boxes(setting)
        ]
        step = _training_step(model, setting, lambda: model(images, targets))
        freeze_peer(model)
        return Contender(name, step, setting.batch)

    def run() -> Any:
        with torch.inference_mode(), setting.precision():
            return model(images)

    return Contender(name, run, setting.batch)


@contextlib.contextmanager
def watched(model: CascadeRCNN, watch: stopwatch.Stopwatch) -> Iterator[None]:
    """Names for the parts of one call. RoIAlign and heads are numbered by the stage that asks."""
    from cascade_rcnn.models import cascade as cascade_module
    from cascade_rcnn.models import rpn as rpn_module

    stage = 0

    def pooling(*_: Any, size: int = 7, **__: Any) -> str:
        return f"stage {stage + 1}: RoIAlign" if size == 7 else "masks: RoIAlign"

    def pooling_for_head(k: int, *_: Any, **__: Any) -> str:
        nonlocal stage
        stage = k
        return pooling()

    undo = [
        watch.watch(model, "normalize", "normalise"),
        watch.watch(model.backbone, "forward", "backbone"),
        watch.watch(model.fpn, "forward", "FPN"),
        watch.watch(model.rpn, "forward", "RPN convolutions"),
        watch.watch(rpn_module, "nms_keep", "RPN NMS"),
        watch.watch(model.cascade, "_pool_for_head", pooling_for_head),
        watch.watch(model.cascade, "_pool", pooling),
        watch.watch(cascade_module, "select_detections", "postprocess"),
        *(watch.watch(head, "forward", f"stage {k + 1}: head") for k, head in enumerate(model.cascade.box_heads)),
        *(watch.watch(head, "of_labels", "masks: head") for head in model.cascade.mask_heads),
    ]
    try:
        yield
    finally:
        for function in undo:
            function()


def count_multiply_adds(
    model: CascadeRCNN, setting: Setting, images: ImageBatch, watch: stopwatch.Stopwatch
) -> dict[str, float]:
    """Multiply-adds of each part of a forward pass. Backward has twice as many, fewer in frozen layers (left out)."""
    with FlopCounterMode(display=False) as counter, torch.no_grad(), watched(model, watch):
        watch.counter = counter
        model.loss(images, targets_of(setting)) if setting.train else model.detect(images)
    watch.counter = None
    watch.parts()
    if setting.train:
        watch.macs[BACKWARD] = 2 * sum(watch.macs.values())
    return watch.macs
