"""A checkpoint's network as an exported program: traced by ``torch.export``, then ONNX, then OpenVINO.

B images (dynamic, or fixed), H, W: the network's input (multiples of 32), D detections.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn

from cascade_rcnn.checkpoint import load_checkpoint
from cascade_rcnn.config import Config
from cascade_rcnn.errors import UserError
from cascade_rcnn.messages import one_line
from cascade_rcnn.models.build import build_model
from cascade_rcnn.models.cascade_rcnn import CascadeRCNN, NoInitialValues
from cascade_rcnn.runtime.network import EXACT, INPUTS, METADATA, OUTPUTS, ExportInfo, check_weights, checksum
from cascade_rcnn.runtime.seal import SEAL, UNSEALED, seal
from cascade_rcnn.structures import ImageBatch

OPSET = 18  # the first with all operators that the network needs
MULTIPLE = 32  # of the input's sides


class Detect(nn.Module):
    """What is exported: pixels uint8 [B, 3, H, W] and sizes int64 [B, 2] to boxes [B, D, 4], scores, labels, valid and,
    where the network has masks, their probabilities [B, D, 28, 28]; all in pixels of the input.
    """

    def __init__(self, model: CascadeRCNN) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        found = self.model._detect(ImageBatch(pixels, sizes, sizes))
        outputs = (found.boxes, found.scores, found.labels, found.valid, found.masks)
        return tuple(one for one in outputs if one is not None)


def network_of(path: Path, config: Config, *, to: str) -> CascadeRCNN:
    """The network of a checkpoint as it is exported: for inference, batch norms folded.

    Raises:
        CheckpointError: as ``load_checkpoint``.
        UserError: a setting that cannot be exported.
    """
    refuse_unexportable(config, to=to)
    checkpoint = load_checkpoint(path)
    with NoInitialValues():
        model = build_model(config.model, len(checkpoint.class_names))
    model.load_state_dict(checkpoint.state)
    model.eval().requires_grad_(False)
    model.backbone.fold_batch_norm()
    _fix_padding(model)
    return model


class _PaddedConv(nn.Module):
    """TensorFlow's "same" convolution where the stride divides the input's sides: its padding is a constant then.

    timm's own computes it from the sides, of which an exporter for any size makes expressions that take minutes.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.options = (conv.stride, 0, conv.dilation, conv.groups)
        self.padding: list[int] = []
        for size, stride, dilation in reversed(list(zip(conv.kernel_size, conv.stride, conv.dilation))):
            total = max((size - 1) * dilation + 1 - stride, 0)
            self.padding += [total // 2, total - total // 2]

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, self.padding), self.weight, self.bias, *self.options)


def _fix_padding(model: CascadeRCNN) -> None:
    """Input sides are multiples of 32, and so every stride divides the sides that it meets."""
    for parent in list(model.backbone.modules()):
        for name, child in parent.named_children():
            if isinstance(child, Conv2dSame):
                setattr(parent, name, _PaddedConv(child))


def refuse_unexportable(config: Config, *, to: str) -> None:
    """Raises UserError for a network that no exporter can follow, or that would compute something else there."""
    if config.model.nms == "soft":
        raise UserError(
            "model.nms soft: soft-NMS goes on box by box, which no format here can hold; export with --model.nms class"
        )
    if config.model.semantics == "paper":
        raise UserError(
            "model.semantics paper: the authors' rules (resizing in float, boxes of whole pixels) are not exported; "
            "predict with the checkpoint itself"
        )
    if config.model.deformable != "none" and to != "torch":
        raise UserError(
            f"model.deformable {config.model.deformable}: ONNX has deformable convolutions from operator set 19 on; "
            f"{OPSET} is written: export with --to torch"
        )


def trace(model: CascadeRCNN, *, size: tuple[int, int] | None, batch: int | None) -> Any:
    """The network as a ``torch.export.ExportedProgram``; None leaves size or batch dynamic.

    Raises:
        UserError: a backbone whose own code decides by values or sizes.
    """
    height, width = size or (192, 256)
    images = batch or 2
    pixels = torch.zeros(images, 3, height, width, dtype=torch.uint8)
    sizes = torch.tensor([[height, width]] * images)
    count = torch.export.Dim("batch")
    of_pixels: dict[int, Any] = {} if batch else {0: count}
    if size is None:  # as multiples: the sides of all levels are then simple expressions
        of_pixels |= {2: MULTIPLE * torch.export.Dim("rows"), 3: MULTIPLE * torch.export.Dim("columns")}
    shapes = (of_pixels or None, None if batch else {0: count})
    with torch.no_grad(), _quiet():
        try:
            program = torch.export.export(Detect(model), (pixels, sizes), dynamic_shapes=shapes, strict=False)
        except Exception as error:
            hint = "; give its input a fixed --size H W" if size is None else ""
            raise UserError(f"the network cannot be traced ({' '.join(str(error).split())[:200]}){hint}") from error
    for part in program.graph_module.modules():
        if isinstance(part, torch.fx.GraphModule):
            for node in part.graph.nodes:
                node.meta.pop("stack_trace", None)  # lines of source with the paths of this machine
    return program


def write_torch(program: Any, path: Path, info: ExportInfo) -> None:
    """A ``.pt2`` file for ``torch.export.load``. Raises OSError where it cannot be written."""
    content = io.BytesIO()  # torch's own writer ends the process where the disk is full
    torch.export.save(program, content, extra_files={METADATA: info.to_json()})
    with path.open("wb") as file:
        file.write(content.getbuffer())


def write_onnx(program: Any, path: Path, info: ExportInfo) -> None:
    """An ONNX file of standard operators, checked, with the settings in its metadata.

    Raises:
        UserError: onnx or onnxscript, which torch's exporter needs, are not installed.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"the package {error.name} is missing: pip install 'cascade-rcnn[onnx]'") from error
    with torch.no_grad(), _quiet():
        try:
            made = torch.onnx.export(
                program,
                (),
                dynamo=True,
                opset_version=OPSET,
                input_names=list(INPUTS),
                output_names=list(OUTPUTS[: len(program.graph_signature.user_outputs)]),
                custom_translation_table={
                    torch.ops.aten.sort.stable: _sort_stable,
                    torch.ops.torchvision.roi_align.default: _roi_align,
                },
                verbose=False,
            )
        except Exception as error:  # exporters raise kinds of their own
            reason = one_line(error)[:200]
            raise UserError(f"torch {torch.__version__} cannot write it as ONNX ({reason}); update torch") from error
    assert made is not None
    made.save(path, external_data=False)
    network = onnx.load(path)
    _name_sides(network.graph)
    _save_onnx(network, path, info)


def _save_onnx(network: Any, path: Path, info: ExportInfo) -> None:
    import onnx

    onnx.checker.check_model(network, full_check=True)
    onnx.helper.set_model_props(network, {METADATA: info.to_json(), SEAL: UNSEALED})
    onnx.save(network, path)
    seal(path)


def _name_sides(graph: Any) -> None:
    """Who opens the file elsewhere reads [batch, 3, height, width]: the exporter writes expressions many lines long."""
    sides = {"pixels": ("batch", "", "height", "width")}
    for value in (*graph.input, *graph.output):
        named = sides.get(value.name, ("batch", "detections"))
        for side, name in zip(value.type.tensor_type.shape.dim, named):
            if side.HasField("dim_param"):
                side.dim_param = name


def _sort_stable(values: Any, *, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
    """``aten.sort.stable`` by TopK, which puts the earlier of two equal values first."""
    import onnxscript

    op: Any = onnxscript.opset18

    axis = dim % len(values.shape)
    count = op.Slice(op.Shape(values), [axis], [axis + 1], [0])
    return op.TopK(values, count, axis=axis, largest=int(descending), sorted=1)


def _roi_align(
    features: Any,
    rois: Any,
    spatial_scale: float,
    pooled_height: int,
    pooled_width: int,
    sampling_ratio: int,
    aligned: bool,
) -> Any:
    """``torchvision.roi_align``; boxes are gathered, as OpenVINO would round slices of them to bfloat16."""
    import onnxscript

    op: Any = onnxscript.opset18

    return op.RoiAlign(
        features,
        op.Gather(rois, [1, 2, 3, 4], axis=1),
        op.Cast(op.Gather(rois, 0, axis=1), to=7),
        coordinate_transformation_mode="half_pixel" if aligned else "output_half_pixel",
        mode="avg",
        output_height=pooled_height,
        output_width=pooled_width,
        sampling_ratio=max(sampling_ratio, 0),
        spatial_scale=spatial_scale,
    )


def _keep_boxes_exact(model: Any) -> None:
    """Make outputs of the boxes that RoIAlign reads: OpenVINO computes what outputs are made of in float32, up to the
    layers with weights. bfloat16 has no odd numbers above 256, and so no such pixels.
    """
    pools = [node for node in model.get_ordered_ops() if node.get_type_name() == "ROIAlign"]
    for number, node in enumerate(pools):
        for port in (1, 2):  # boxes, and the image of each, which would be rounded from 256 on
            value = node.input_value(port)
            value.get_tensor().add_names({f"{EXACT}{number}_{port}"})
            model.add_outputs(value)


def write_openvino(onnx_file: Path, path: Path, info: ExportInfo) -> None:
    """OpenVINO's IR (``.xml`` and ``.bin``) of an ONNX file, weights in float32.

    Raises:
        UserError: openvino is not installed.
    """
    try:
        import openvino
    except ImportError as error:
        raise UserError("the package openvino is missing: pip install 'cascade-rcnn[openvino]'") from error
    _save_openvino(openvino.convert_model(onnx_file), path, info)


def mark_openvino(path: Path, info: ExportInfo) -> None:
    """Write the settings into an IR that a quantiser has made."""
    import openvino

    model = openvino.Core().read_model(path)
    marked = path.with_name("marked.xml")
    _save_openvino(model, marked, info)
    del model
    marked.replace(path)
    marked.with_suffix(".bin").replace(path.with_suffix(".bin"))


def _save_openvino(model: Any, path: Path, info: ExportInfo) -> None:
    """Both files of an IR; the first names the checksum of the second, which must be written to know it."""
    import openvino

    _keep_boxes_exact(model)
    try:
        openvino.save_model(model, path, compress_to_fp16=False)
        info = replace(info, weights=checksum(path.with_suffix(".bin")))
        model.set_rt_info(info.to_json(), [METADATA])
        model.set_rt_info(UNSEALED, [SEAL])
        openvino.save_model(model, path, compress_to_fp16=False)
        seal(path)
    except RuntimeError as error:  # the disk is full, say
        raise OSError(one_line(error)) from error
    check_weights(path, info)


def mark_onnx(path: Path, info: ExportInfo) -> None:
    """Check an ONNX file that a quantiser has made, and write the settings into it."""
    import onnx

    _save_onnx(onnx.load(path), path, info)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporters speak of their own steps and deprecations."""
    level = logging.root.manager.disable
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(level)
