"""8-bit integers for an exported network: calibrated with the user's own images, without training.

An ONNX file of the whole network goes in; an OpenVINO network (NNCF) or an ONNX file in QDQ form (ONNX Runtime) comes
out. Weights get one scale per output channel, activations one per tensor. Only layers with weights, and what lies
between those of backbone, FPN and RPN, become integers: everything about boxes stays in float32.

Which layers bear it is measured: one group of layers at a time is made integer, and what the network then finds is
compared with what it found before. Groups that change the detections too much stay in float. Sums of residual blocks
are such a group; ReLUs and what else lies between layers go with the layers whose outputs they read.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
import sys
import tempfile
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cascade_rcnn.errors import UserError
from cascade_rcnn.runtime.signal_stack import signal_stack_kept

Feed = Mapping[str, NDArray[Any]]  # the network's inputs by name, one image
Target = Literal["openvino", "onnx"]

CALIBRATION_IMAGES = 100
_MEASURED_IMAGES = 8  # at most, for the choice of the layers that stay in float
_LARGEST_CHANGE = {"openvino": 0.06, "onnx": 0.03}  # of a group that becomes integer, as `change` counts it
_CONFIDENT = 0.3  # score of the detections that are compared
# Parts of a network, by the names of their weights. The first convolution is a group of its own.
_GROUPS = (
    ("backbone", r"\bbackbone\."),
    ("FPN lateral", r"\bfpn\.lateral\."),
    ("FPN output", r"\bfpn\.output\."),
    ("RPN convolution", r"\brpn\.conv\b"),
    ("RPN outputs", r"\brpn\.(objectness|deltas)\."),
    ("box head outputs", r"\bbox_heads\.\d+\.(classifier|deltas)\."),
    ("box heads", r"\bbox_heads\."),
    ("mask heads", r"\bmask_heads\."),  # but for their last layer: each RoI takes its own class's weights there
)
_TRUNK = ("first convolution", "backbone", "FPN lateral", "FPN output", "RPN convolution", "RPN outputs")
_SUMS = "sums"  # of residual blocks and of FPN: a group too, for their ranges are wide
_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


class Found(NamedTuple):
    """Detections of one image."""

    boxes: NDArray[np.float32]  # [N, 4] xyxy
    scores: NDArray[np.float32]  # [N]
    labels: NDArray[np.int64]  # [N]
    masks: NDArray[np.float32] | None = None  # [N, 28, 28] probabilities within the boxes, if the network has masks


@dataclass(frozen=True)
class Layers:
    """What of a network can become integer: names of its nodes, by group."""

    groups: dict[str, list[str]]
    between: dict[str, frozenset[str]]  # ReLUs, poolings, ... of the trunk, and the groups whose outputs each reads

    def without(self, kept: Iterable[str]) -> list[str]:
        """The nodes to make integer when the groups ``kept`` stay in float: what lies behind those stays too."""
        kept = set(kept)
        weighted = (name for group, names in self.groups.items() if group not in kept for name in names)
        return [*weighted, *(name for name, reads in self.between.items() if not reads & kept)]


@dataclass(frozen=True)
class Quantised:
    """What was done."""

    changes: dict[str, float]  # what integers in one group alone change, 0..1
    kept: list[str]  # groups in float


def quantise(
    network: Path,
    out: Path,
    feeds: Sequence[Feed],
    *,
    to: Target,
    keep: Sequence[str] | None = None,
    say: Callable[[str], None] = print,
) -> Quantised:
    """Write the network ``out`` (``.xml`` for OpenVINO, ``.onnx``) with integers where they do no harm.

    ``feeds`` are network inputs of the user's images, prepared as for prediction; ``keep`` names the groups that stay
    in float, instead of measuring them (about three passes of 8 images per group).

    Raises:
        UserError: no images, an unknown group, or NNCF, OpenVINO or ONNX Runtime are missing.
    """
    if not feeds:
        raise UserError("--int8: the folder has no images to calibrate with; give about 100 like those of later use")
    backend = _backend(to, network)
    layers = find_layers(network)
    if unknown := set(keep or ()) - set(layers.groups):
        raise UserError(f"{sorted(unknown)[0]!r} is no group of layers: choose of {', '.join(layers.groups)}")
    measured = feeds[:: math.ceil(len(feeds) / _MEASURED_IMAGES)]
    changes = {} if keep is not None else measure_changes(backend, layers, measured, say=say)
    kept = list(keep) if keep is not None else [name for name, value in changes.items() if value > _LARGEST_CHANGE[to]]
    backend.write(out, feeds, layers.without(kept))
    left = "all of them, for each alone changes too much" if set(kept) == set(layers.groups) else ", ".join(kept)
    say(f"int8: {len(feeds)} images of calibration; in float: {left or 'no layer'}")
    return Quantised(changes, kept)


def measure_changes(
    backend: Backend, layers: Layers, feeds: Sequence[Feed], *, say: Callable[[str], None]
) -> dict[str, float]:
    """How much integers in each group alone change the detections (``change``, the mean over ``feeds``)."""
    with tempfile.TemporaryDirectory() as folder:
        before = [as_found(one) for one in backend.run(backend.network, feeds)]
        if not any((found.scores >= _CONFIDENT).any() for found in before):
            say(
                f"nothing with a score of {_CONFIDENT} or more in {len(feeds)} images of calibration: what "
                "integers change there shows little; measure the AP with --data DIR"
            )
        changes = {}
        for group in layers.groups:
            trial = Path(folder) / f"trial{backend.suffix}"
            backend.write(trial, feeds, layers.without(set(layers.groups) - {group}))
            after = [as_found(one) for one in backend.run(trial, feeds)]
            changes[group] = float(np.mean([change(old, new) for old, new in zip(before, after)]))
            say(f"int8 in {group} alone changes detections by {changes[group]:.1%}")
    return changes


def as_found(outputs: Mapping[str, NDArray[Any]]) -> Found:
    """Detections of the network's first image, without padding."""
    valid = outputs["valid"][0].astype(bool)
    masks = outputs["masks"][0][valid] if "masks" in outputs else None
    return Found(outputs["boxes"][0][valid], outputs["scores"][0][valid], outputs["labels"][0][valid], masks)


def change(before: Found, after: Found) -> float:
    """0 (equal) to 1 (nothing found again): the mean over the confident detections of both, each way.

    A detection counts by the best partner of its class: 1 - IoU, of boxes or of masks, whichever is less, plus the
    difference of the scores, at most 1.
    """
    losses = [*_losses(before, after), *_losses(after, before)]
    return float(np.mean(losses)) if losses else 0.0


def _losses(ones: Found, others: Found) -> Iterator[float]:
    for row in np.flatnonzero(ones.scores >= _CONFIDENT):
        same = np.flatnonzero(others.labels == ones.labels[row])
        if not len(same):
            yield 1.0
            continue
        iou = _iou(ones.boxes[row], others.boxes[same])
        loss = 1 - iou + np.abs(others.scores[same] - ones.scores[row])
        best = int(loss.argmin())
        if ones.masks is not None and others.masks is not None:
            loss[best] += max(0.0, iou[best] - _mask_iou(ones.masks[row], others.masks[same[best]]))
        yield float(min(1.0, loss[best]))


def _iou(box: NDArray[np.float32], boxes: NDArray[np.float32]) -> NDArray[np.float32]:
    """IoU [N] of a box [4] with boxes [N, 4]."""
    inside = np.clip(np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2]), 0, None).prod(axis=1)
    area, areas = (box[2:] - box[:2]).prod(), (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    iou: NDArray[np.float32] = inside / np.maximum(area + areas - inside, 1e-9)
    return iou


def _mask_iou(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Of two masks [28, 28], each in its own box: boxes are compared elsewhere."""
    inside, union = np.count_nonzero((one >= 0.5) & (other >= 0.5)), np.count_nonzero((one >= 0.5) | (other >= 0.5))
    return inside / union if union else 1.0


# The graph


def find_layers(network: Path) -> Layers:
    """The layers of an ONNX file by group, in their order, and what lies between those of the trunk."""
    import onnx

    graph = onnx.load(network, load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer}
    producer = {output: node for node in graph.node for output in node.output}
    layers: dict[str, str] = {}  # group by node
    trunk: list[Any] = []
    for node in graph.node:
        if node.op_type not in _WEIGHTED or len(node.input) < 2 or node.input[1] not in weights:
            continue
        group = next((group for group, pattern in _GROUPS if re.search(pattern, node.input[1])), None)
        if not trunk and node.op_type == "Conv":
            group = "first convolution"
        if group is not None:
            layers[node.name] = group
        if group in _TRUNK:
            trunk.append(node)
    if not trunk:
        raise UserError(f"{network}: no convolution with weights in it; quantise a network that 'export' has written")
    inside = _before(trunk, producer) - _before(trunk[:1], producer) - {node.name for node in trunk}
    layers |= {node.name: _SUMS for node in graph.node if node.op_type == "Add" and node.name in inside}
    groups: dict[str, list[str]] = {}
    for name, group in layers.items():
        groups.setdefault(group, []).append(name)
    between = {
        node.name: frozenset(layers[name] for name in _before([node], producer, until=layers) if name in layers)
        for node in graph.node
        if node.name in inside and node.name not in layers
    }
    return Layers(groups, between)


def _before(nodes: Iterable[Any], producer: Mapping[str, Any], *, until: Container[str] = ()) -> set[str]:
    """Names of all nodes that those read, directly or not, and not beyond the nodes ``until``."""
    seen: set[str] = set()
    waiting = [name for node in nodes for name in node.input]
    while waiting:
        node = producer.get(waiting.pop())
        if node is not None and node.name not in seen:
            seen.add(node.name)
            if node.name not in until:
                waiting.extend(node.input)
    return seen


# The runtimes


class Backend:
    """A runtime that can quantise a network and run it."""

    suffix = ""

    def __init__(self, network: Path) -> None:
        self.network = network

    def write(self, out: Path, feeds: Sequence[Feed], integer: Sequence[str]) -> None:
        """The network with the nodes ``integer`` in integers."""
        raise NotImplementedError

    def run(self, network: Path, feeds: Sequence[Feed]) -> Iterator[dict[str, NDArray[Any]]]:
        """Outputs by name."""
        raise NotImplementedError


def _backend(to: Target, network: Path) -> Backend:
    needed = ("nncf", "openvino", "onnx") if to == "openvino" else ("onnxruntime", "onnx")
    for name in needed:
        try:
            __import__(name)
        except ImportError as error:
            raise UserError(f"--int8 needs {name}: pip install {' '.join(needed)}") from error
    return _OpenVINO(network) if to == "openvino" else _OnnxRuntime(network)


class _OpenVINO(Backend):
    suffix = ".xml"

    def write(self, out: Path, feeds: Sequence[Feed], integer: Sequence[str]) -> None:
        import logging

        # NNCF imports the part of torch that builds extensions, which tells where CUDA is missing
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        import nncf
        import openvino
        from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, OverflowFix

        nncf.set_log_level(logging.ERROR)  # type: ignore[attr-defined]
        model = openvino.convert_model(self.network)
        wanted = set(integer)
        # An ONNX node with a bias becomes NAME/WithoutBiases and, for the sum, NAME.
        ignored = [
            node.get_friendly_name()
            for node in model.get_ordered_ops()
            if node.get_type_name() not in ("Constant", "Parameter", "Result")
            and node.get_friendly_name().partition("/")[0] not in wanted
        ]
        bars = contextlib.nullcontext() if sys.stdout.isatty() else contextlib.redirect_stdout(io.StringIO())
        with signal_stack_kept(), bars:
            made = nncf.quantize(  # draws bars, which a file would keep
                model,
                nncf.Dataset([dict(feed) for feed in feeds]),
                subset_size=len(feeds),
                ignored_scope=nncf.IgnoredScope(names=ignored, validate=False),
                # Processors without VNNI add two products in 16 bits: with half of the weights' range it is right there
                advanced_parameters=AdvancedQuantizationParameters(overflow_fix=OverflowFix.ENABLE),
            )
        openvino.save_model(made, out, compress_to_fp16=False)

    def run(self, network: Path, feeds: Sequence[Feed]) -> Iterator[dict[str, NDArray[Any]]]:
        import openvino

        with signal_stack_kept():
            compiled = openvino.Core().compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        for feed in feeds:
            outputs = compiled(dict(feed))
            yield {output.get_any_name(): np.array(outputs[output]) for output in compiled.outputs}


class _OnnxRuntime(Backend):
    suffix = ".onnx"

    def write(self, out: Path, feeds: Sequence[Feed], integer: Sequence[str]) -> None:
        import logging

        from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

        before = logging.root.manager.disable
        logging.disable(logging.WARNING)  # it advises what has been done to the network already
        try:
            quantize_static(
                self.network,
                out,
                _Reader(feeds),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                reduce_range=True,  # as OverflowFix above
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                # with the activations: a convolution's output is then rounded within what they leave of its range
                op_types_to_quantize=[*_WEIGHTED, "Relu", "Clip", "Add", "MaxPool", "Resize"],
                nodes_to_quantize=list(integer),
            )
        finally:
            logging.disable(before)

    def run(self, network: Path, feeds: Sequence[Feed]) -> Iterator[dict[str, NDArray[Any]]]:
        import onnxruntime

        session = onnxruntime.InferenceSession(str(network), providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        for feed in feeds:
            yield dict(zip(names, session.run(names, dict(feed))))


class _Reader:
    """Images one by one, as ONNX Runtime asks for them."""

    def __init__(self, feeds: Sequence[Feed]) -> None:
        self._feeds = iter(feeds)

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        feed = next(self._feeds, None)
        return None if feed is None else dict(feed)
