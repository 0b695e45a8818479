"""Exported networks (ONNX, OpenVINO, ``torch.export``) in the place of a model: the same batches in, detections out.

``cascade-rcnn export`` writes a folder with the network and, inside the network's file, the configuration and class
names as JSON under ``METADATA``. B images, D detections.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from cascade_rcnn.config import Config
from cascade_rcnn.errors import CheckpointError, UserError
from cascade_rcnn.messages import one_line, printable
from cascade_rcnn.recipes import config_from_dict
from cascade_rcnn.structures import ImageBatch, RawDetections

METADATA = "cascade_rcnn"
NAMES = {"onnx": "model.onnx", "openvino": "model.xml", "torch": "model.pt2"}
INPUTS = ("pixels", "sizes", "scales")
OUTPUTS = ("boxes", "scores", "labels", "valid", "masks")

Run = Callable[[Mapping[str, NDArray[Any]]], Mapping[str, NDArray[Any]]]


@dataclass(frozen=True)
class ExportInfo:
    """What an exported network says of itself."""

    config: Config
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    thresholds: dict[str, float]
    size: tuple[int, int] | None  # (height, width) of its only input size; None: any multiples of 32
    batch: int | None  # its only batch size; None: any
    int8: bool

    def to_json(self) -> str:
        """The text that the network's file carries."""
        fields = {name: getattr(self, name) for name in ("class_names", "category_ids", "thresholds", "size", "batch")}
        return json.dumps({"version": 1, "config": self.config.to_dict(), "int8": self.int8, **fields})


def read_info(text: str, path: Path) -> ExportInfo:
    """The inverse of ``ExportInfo.to_json``. Raises CheckpointError where it is none."""
    try:
        fields = json.loads(text)
        version = fields.pop("version")
        if version != 1:
            raise CheckpointError(f"{printable(path)}: exported by a newer version ({version}); update cascade-rcnn")
        size = fields["size"]
        return ExportInfo(
            config=config_from_dict(fields["config"], source=printable(path)),
            class_names=tuple(fields["class_names"]),
            category_ids=tuple(fields["category_ids"]),
            thresholds=dict(fields["thresholds"]),
            size=None if size is None else (int(size[0]), int(size[1])),
            batch=fields["batch"],
            int8=bool(fields["int8"]),
        )
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise CheckpointError(
            f"{printable(path)}: was not written by 'cascade-rcnn export' (no settings in it); export the checkpoint"
        ) from error


def exported_file(path: str | Path) -> Path | None:
    """The network's file that ``path`` means: itself, or the one in an export's folder; None for anything else."""
    path = Path(path)
    if path.suffix.lower() in (".onnx", ".pt2", ".xml"):
        return path
    found = [path / name for name in NAMES.values() if (path / name).is_file()]
    return found[0] if found else None


def usual_device(path: str | Path, device: str) -> str:
    """The device of a command: ``auto`` is the CPU for an exported network, which runs nowhere else."""
    return "cpu" if device == "auto" and exported_file(path) is not None else device


def padded(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Pixels [B, 3, h, w] with zeros right and below, up to ``size`` (H, W)."""
    return F.pad(pixels, (0, size[1] - pixels.shape[-1], 0, size[0] - pixels.shape[-2]))


class ExportedNetwork(nn.Module):
    """Runs an exported network on batches; has no weights of its own, and is always on the CPU.

    ``score_threshold`` and ``max_detections`` leave out more than the network does by itself.
    """

    score_threshold: float = 0.0
    max_detections: int | None = None

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError: no such file, a damaged one, or another program's; UserError: no runtime for it."""
        super().__init__()
        self.path = path
        if not path.is_file():
            raise CheckpointError(f"{printable(path)}: no such file; export a checkpoint with 'cascade-rcnn export'")
        opener = {".onnx": _open_onnx, ".xml": _open_openvino, ".pt2": _open_torch}[path.suffix.lower()]
        try:
            self._run, self.runtime, text = opener(path)
        except (UserError, CheckpointError):
            raise
        except Exception as error:  # runtimes raise kinds of their own
            raise CheckpointError(f"{printable(path)}: cannot be loaded ({one_line(error)[:200]})") from error
        self.info = read_info(text, path)
        self.canvas = self.info.size
        self.eval()

    def detect(self, images: ImageBatch) -> RawDetections:
        """As ``CascadeRCNN.detect``; a fixed batch is filled up with empty images, a fixed size with padding."""
        count = len(images)
        if self.info.batch is None or count == self.info.batch:
            return self._detect(images)
        parts = [self._detect(_rows(images, start, self.info.batch)) for start in range(0, count, self.info.batch)]
        return _joined(parts, count)

    def _detect(self, images: ImageBatch) -> RawDetections:
        pixels = images.pixels
        if self.info.size is not None:
            height, width = self.info.size
            if pixels.shape[-2] > height or pixels.shape[-1] > width:
                raise UserError(
                    f"{printable(self.path)}: an input of {pixels.shape[-2]} x {pixels.shape[-1]} for a network of "
                    f"{height} x {width}; export with --dynamic, or with a square --size"
                )
            pixels = padded(pixels, self.info.size)
        feed = {"pixels": pixels.contiguous().numpy(), "sizes": images.sizes.numpy()}
        if images.scales is not None:
            feed["scales"] = images.scales.numpy()
        found = {name: torch.from_numpy(np.asarray(value)) for name, value in self._run(feed).items()}
        rows = slice(self.max_detections)  # sorted by descending score
        masks = found.get("masks")
        return RawDetections(
            found["boxes"][:, rows],
            found["scores"][:, rows],
            found["labels"][:, rows],
            (found["valid"].bool() & (found["scores"] > self.score_threshold))[:, rows],
            masks=None if masks is None else masks[:, rows],
            scales=images.scales,
        )


def _rows(images: ImageBatch, start: int, count: int) -> ImageBatch:
    """Rows of a batch, filled up to ``count`` with copies of the last one."""
    rows = torch.arange(start, start + count).clamp(max=len(images) - 1)
    scales = None if images.scales is None else images.scales[rows]
    return ImageBatch(images.pixels[rows], images.sizes[rows], images.original_sizes[rows], scales=scales)


def _joined(parts: list[RawDetections], count: int) -> RawDetections:
    def join(name: str) -> Tensor | None:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else torch.cat(values)[:count]

    fields: dict[str, Any] = {name: join(name) for name in (*OUTPUTS, "scales")}
    return RawDetections(**fields)


def _missing(name: str) -> UserError:
    extra = {"onnxruntime": "onnx", "openvino": "openvino"}[name]
    return UserError(f"the package {name} is missing: pip install 'cascade-rcnn[{extra}]'")


def _open_onnx(path: Path) -> tuple[Run, str, str]:
    try:
        import onnxruntime
    except ImportError as error:
        raise _missing("onnxruntime") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    text = session.get_modelmeta().custom_metadata_map.get(METADATA, "")

    def run(feed: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        return dict(zip(names, session.run(names, dict(feed))))

    return run, f"ONNX Runtime {onnxruntime.__version__}", text


def _open_openvino(path: Path) -> tuple[Run, str, str]:
    try:
        import openvino
    except ImportError as error:
        raise _missing("openvino") from error
    core = openvino.Core()
    model = core.read_model(path)
    text = model.get_rt_info([METADATA]).astype(str) if model.has_rt_info([METADATA]) else ""
    # bfloat16, which the runtime would take by itself where the processor has it, is not what was measured
    hints = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = core.compile_model(model, "CPU", hints)

    def run(feed: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        outputs = compiled(dict(feed))
        return {output.get_any_name(): np.array(outputs[output]) for output in compiled.outputs}

    return run, f"OpenVINO {openvino.__version__.partition('-')[0]}", text


def _open_torch(path: Path) -> tuple[Run, str, str]:
    extra = {METADATA: ""}
    program = torch.export.load(path, extra_files=extra)
    network = program.module()

    def run(feed: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        with torch.inference_mode():
            found = network(*(torch.from_numpy(feed[name]) for name in INPUTS if name in feed))
        return {name: value.numpy() for name, value in zip(OUTPUTS, found)}

    return run, f"torch.export, torch {torch.__version__}", str(extra[METADATA])
