"""An exported network in its runtime (ONNX Runtime, OpenVINO): arrays in, arrays out, without torch.

``cascade-rcnn export`` writes a folder with the network and, inside the network's file, the configuration and class
names as JSON under ``METADATA``. B images, D detections.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cascade_rcnn.config import Config
from cascade_rcnn.errors import CheckpointError, UserError
from cascade_rcnn.messages import one_line, printable
from cascade_rcnn.recipes import config_from_dict

METADATA = "cascade_rcnn"
NAMES = {"onnx": "model.onnx", "openvino": "model.xml", "torch": "model.pt2"}
INPUTS = ("pixels", "sizes")  # uint8 [B, 3, H, W], RGB, zero where padded; int64 [B, 2], height and width within it
OUTPUTS = ("boxes", "scores", "labels", "valid", "masks")  # [B, D, 4], [B, D] ..., [B, D, m, m] where there are masks

Arrays = Mapping[str, NDArray[Any]]
Run = Callable[[Arrays], Arrays]
Opener = Callable[[Path, int], tuple[Run, str, str]]  # path and threads to: run, the runtime's name, the metadata


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

    def kind(self) -> str:
        """Its numbers and its input size, for a line."""
        numbers = "8-bit integers" if self.int8 else "float32"
        return f"{numbers}, {'any size' if self.size is None else f'input {self.size[0]} x {self.size[1]}'}"


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


def refuse_setting(info: ExportInfo, path: Path, **wanted: float | None) -> None:
    """Raises UserError for a setting of ``load`` that the network does not hold; None is as exported."""
    inside = info.config.model
    for name, value in wanted.items():
        has = getattr(inside, name)
        if value is None:
            continue
        possible = {"score_threshold": value >= has, "max_detections": value <= has, "stop_after_stage": value == has}
        if not possible[name]:
            raise UserError(
                f"{name} {value}: {printable(path)} was exported with {has}; export the checkpoint again with "
                f"--model.{name.replace('_', '-')} {value}"
            )


class RuntimeNetwork:
    """An exported network, opened."""

    def __init__(self, path: Path, *, threads: int = 0, others: Mapping[str, Opener] | None = None) -> None:
        """``threads`` 0: one for each core. ``others``: how files of other endings are opened.

        Raises:
            CheckpointError: no such file, a damaged one, or another program's.
            UserError: no runtime for it.
        """
        self.path = path
        if not path.is_file():
            raise CheckpointError(f"{printable(path)}: no such file; export a checkpoint with 'cascade-rcnn export'")
        openers: dict[str, Opener] = {".onnx": _open_onnx, ".xml": _open_openvino, **(others or {})}
        opener = openers.get(path.suffix.lower())
        if opener is None:
            raise UserError(
                f"{printable(path)}: needs PyTorch, which is not installed; export with --to onnx or openvino"
            )
        try:
            self.run, self.runtime, text = opener(path, threads or _cores())
        except (UserError, CheckpointError):
            raise
        except Exception as error:  # runtimes raise kinds of their own
            if path.suffix.lower() == ".xml" and not path.with_suffix(".bin").is_file():
                raise CheckpointError(
                    f"{printable(path)}: its weights {printable(path.with_suffix('.bin').name)} are not beside it; "
                    "copy both files of the export"
                ) from error
            raise CheckpointError(
                f"{printable(path)}: cannot be loaded ({one_line(error)[:200]}); copy or export it once more"
            ) from error
        self.info = read_info(text, path)

    def detect(self, pixels: NDArray[np.uint8], sizes: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """``OUTPUTS`` of a batch; a fixed batch is filled up with copies, a fixed size with padding.

        Raises:
            UserError: larger images than the network takes.
        """
        pixels = self._padded(pixels)
        count, step = len(pixels), self.info.batch or len(pixels)
        parts = []
        for start in range(0, count, step):
            rows = np.minimum(np.arange(start, start + step), count - 1)
            whole = step == count
            feed = (pixels, sizes) if whole else (np.ascontiguousarray(pixels[rows]), sizes[rows])
            parts.append(self.run(dict(zip(INPUTS, feed))))
        if len(parts) == 1:
            return {name: np.asarray(value)[:count] for name, value in parts[0].items()}
        return {name: np.concatenate([part[name] for part in parts])[:count] for name in parts[0]}

    def _padded(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        if self.info.size is None:
            return np.ascontiguousarray(pixels)
        height, width = self.info.size
        below, right = height - pixels.shape[2], width - pixels.shape[3]
        if below < 0 or right < 0:
            raise UserError(
                f"{printable(self.path)}: an input of {pixels.shape[2]} x {pixels.shape[3]} for a network of "
                f"{height} x {width}; export with --dynamic, or with a square --size"
            )
        return np.pad(pixels, ((0, 0), (0, 0), (0, below), (0, right))) if below or right else pixels


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _missing(name: str) -> UserError:
    extra = {"onnxruntime": "onnx", "openvino": "openvino"}[name]
    return UserError(f"the package {name} is missing: pip install {name}, or 'cascade-rcnn[{extra}]'")


def _open_onnx(path: Path, threads: int) -> tuple[Run, str, str]:
    try:
        import onnxruntime
    except ImportError as error:
        raise _missing("onnxruntime") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    text = session.get_modelmeta().custom_metadata_map.get(METADATA, "")

    def run(feed: Arrays) -> Arrays:
        return dict(zip(names, session.run(names, dict(feed))))

    return run, f"ONNX Runtime {onnxruntime.__version__}", text


def _open_openvino(path: Path, threads: int) -> tuple[Run, str, str]:
    try:
        import openvino
    except ImportError as error:
        raise _missing("openvino") from error
    core = openvino.Core()
    model = core.read_model(path)
    text = model.get_rt_info([METADATA]).astype(str) if model.has_rt_info([METADATA]) else ""
    # bfloat16, which the runtime would take by itself where the processor has it, is not what was measured
    hints = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    compiled = core.compile_model(model, "CPU", hints)

    def run(feed: Arrays) -> Arrays:
        outputs = compiled(dict(feed))
        return {output.get_any_name(): np.array(outputs[output]) for output in compiled.outputs}

    return run, f"OpenVINO {openvino.__version__.partition('-')[0]}", text
