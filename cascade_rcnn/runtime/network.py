"""An exported network in its runtime (ONNX Runtime, OpenVINO): arrays in, arrays out, without torch.

``cascade-rcnn export`` writes a folder with the network and, inside the network's file, the configuration and class
names as JSON under ``METADATA``. B images, D detections.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cascade_rcnn.config import Config
from cascade_rcnn.errors import CheckpointError, ConfigError, UserError
from cascade_rcnn.messages import few_names, one_line, printable
from cascade_rcnn.recipes import config_from_dict
from cascade_rcnn.runtime.seal import check_seal
from cascade_rcnn.runtime.signal_stack import signal_stack_kept

METADATA = "cascade_rcnn"
_ENDINGS = (".onnx", ".xml", ".pt2")
NAMES = {"onnx": "model.onnx", "openvino": "model.xml", "torch": "model.pt2"}
INPUTS = ("pixels", "sizes")  # uint8 [B, 3, H, W], RGB, zero where padded; int64 [B, 2], height and width within it
EXACT = "rois_"  # further outputs of OpenVINO's networks, so named and numbered: what must be float32, and nobody reads
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
    weights: int | None = None  # CRC-32 of the weights, where they lie in a file of their own

    def to_json(self) -> str:
        """The text that the network's file carries."""
        names = ("class_names", "category_ids", "thresholds", "size", "batch", "weights")
        fields = {name: getattr(self, name) for name in names}
        return json.dumps({"version": 1, "config": self.config.to_dict(), "int8": self.int8, **fields})

    def kind(self, *, bfloat16: bool = False) -> str:
        """Its numbers and its input size, for a line."""
        numbers = ["8-bit integers"] if self.int8 else [] if bfloat16 else ["float32"]
        numbers += ["bfloat16"] if bfloat16 else []
        size = "any size" if self.size is None else f"input {self.size[0]} x {self.size[1]}"
        return f"{' and '.join(numbers)}, {size}"


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
            thresholds={str(name): float(value) for name, value in fields["thresholds"].items()},
            size=None if size is None else (int(size[0]), int(size[1])),
            batch=None if fields["batch"] is None else int(fields["batch"]),
            weights=fields.get("weights"),
            int8=bool(fields["int8"]),
        )
    except ConfigError as error:
        raise CheckpointError(f"{error}; export the checkpoint again with this version of cascade-rcnn") from error
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise CheckpointError(
            f"{printable(path)}: was not written by 'cascade-rcnn export' (no settings in it); export the checkpoint"
        ) from error


def exported_file(path: str | Path) -> Path | None:
    """The network's file that ``path`` means: itself, or the one in an export's folder; None for anything else.

    In a folder without a checkpoint the file may have been renamed, where it is the only one. Raises UserError where
    there are several.
    """
    path = Path(path)
    if not path.is_dir():
        return path if path.suffix.lower() in _ENDINGS else None
    found = [path / name for name in NAMES.values() if (path / name).is_file()]
    if not found and not any(path.glob("*.safetensors")):
        others = [file for file in path.iterdir() if file.suffix.lower() in _ENDINGS and file.is_file()]
        others = [file for file in others if file.suffix.lower() != ".xml" or file.with_suffix(".bin").is_file()]
        if len(others) > 1:
            names = few_names(sorted(file.name for file in others))
            raise UserError(f"{printable(path)}: holds several networks ({names}); give the file of one of them")
        found = others
    return found[0] if found else None


def refuse_setting(info: ExportInfo, path: Path, **wanted: float | None) -> None:
    """Raises UserError for a setting of ``load`` that the network does not hold; None is as exported."""
    inside = info.config.model
    for name, value in wanted.items():
        if value is None:
            continue
        every = len(inside.stage_ious)  # what 0 stages mean
        has = getattr(inside, name)
        if name == "stop_after_stage":
            has = has or every
        possible = {
            "score_threshold": value >= has,
            "max_detections": value <= has,
            "stop_after_stage": (value or every) == has,
        }
        if not possible[name]:
            raise UserError(
                f"{name} {value}: {printable(path)} was exported with {has}; export the checkpoint again with "
                f"--model.{name.replace('_', '-')} {value}"
            )


_OFFER = "; the processor's bfloat16 units unused (--precision bf16)"


class RuntimeNetwork:
    """An exported network, opened."""

    def __init__(
        self, path: Path, *, threads: int = 0, bfloat16: bool = False, others: Mapping[str, Opener] | None = None
    ) -> None:
        """``threads`` 0: one for each core. ``bfloat16``: what is not integer, by OpenVINO on processors that have it.
        ``others``: how files of other endings are opened.

        Raises:
            CheckpointError: no such file, a damaged one, or another program's.
            UserError: no runtime for it, or one without bfloat16.
        """
        self.path = path
        if not path.is_file():
            raise CheckpointError(f"{printable(path)}: no such file; export a checkpoint with 'cascade-rcnn export'")
        if bfloat16 and path.suffix.lower() != ".xml":
            raise UserError(
                f"precision bf16: {printable(path)} has the numbers that it was written with; load the checkpoint "
                "itself, or export it with --to openvino"
            )
        self.bfloat16 = bfloat16
        from_openvino = partial(_open_openvino, bfloat16=bfloat16)
        openers: dict[str, Opener] = {".onnx": _open_onnx, ".xml": from_openvino, **(others or {})}
        opener = openers.get(path.suffix.lower())
        if opener is None:
            raise UserError(
                f"{printable(path)}: needs PyTorch, which is not installed; export with --to onnx or openvino"
            )
        check_seal(path)
        try:
            self.run, self.runtime, text = opener(path, threads or _cores())
        except UserError:
            raise
        except Exception as error:  # runtimes raise kinds of their own
            raise CheckpointError(
                f"{printable(path)}: cannot be loaded ({one_line(error)[:200]}); copy or export it once more"
            ) from error
        self.info = read_info(text, path)
        if path.suffix.lower() == ".xml":
            check_weights(path, self.info)

    def kind(self) -> str:
        """What computes, in which numbers and for which size, for a line."""
        offer = "" if self.bfloat16 or self.path.suffix.lower() != ".xml" or not _has_bfloat16() else _OFFER
        return f"{self.runtime}, {self.info.kind(bfloat16=self.bfloat16)}{offer}"

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


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with path.open("rb") as file:
        while part := file.read(1 << 22):
            value = zlib.crc32(part, value)
    return value


def check_weights(path: Path, info: ExportInfo) -> None:
    """Raises CheckpointError where the weights beside ``path`` are not those that were written with it."""
    weights = path.with_suffix(".bin")
    if info.weights is not None and checksum(weights) != info.weights:
        raise CheckpointError(
            f"{printable(path)}: {printable(weights.name)} beside it is damaged or of another export; copy both files "
            "of one export"
        )


def _check_names(path: Path, inputs: Sequence[str], outputs: Sequence[str], text: str) -> None:
    """Raises CheckpointError for a network of ours that another program has given other inputs or outputs."""
    if text and (set(inputs) != set(INPUTS) or not set(OUTPUTS[:4]) <= set(outputs)):
        raise CheckpointError(
            f"{printable(path)}: has the inputs {few_names(inputs)} and the outputs {few_names(outputs)}, where an "
            f"export has {', '.join(INPUTS)}, and {', '.join(OUTPUTS[:4])}: another program changed it; export it anew"
        )


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
    # a name that is no UTF-8 cannot be handed over
    network = str(path) if str(path).isprintable() else path.read_bytes()
    session = onnxruntime.InferenceSession(network, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    text = session.get_modelmeta().custom_metadata_map.get(METADATA, "")
    _check_names(path, [one.name for one in session.get_inputs()], names, text)

    def run(feed: Arrays) -> Arrays:
        return dict(zip(names, session.run(names, dict(feed))))

    return run, f"ONNX Runtime {onnxruntime.__version__}", text


def _has_bfloat16() -> bool:
    """Whether OpenVINO knows units for it in this processor."""
    import openvino

    with signal_stack_kept():
        return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _open_openvino(path: Path, threads: int, *, bfloat16: bool) -> tuple[Run, str, str]:
    try:
        import openvino
    except ImportError as error:
        raise _missing("openvino") from error
    with path.open("rb") as file:
        if b"<net" not in file.read(1000):  # the runtime would try all formats that it knows, and log each failure
            raise CheckpointError(f"{printable(path)}: is no network of OpenVINO; give model.xml of an export")
    weights = path.with_suffix(".bin")
    if not weights.is_file():
        raise CheckpointError(
            f"{printable(path)}: its weights {printable(weights.name)} are not beside it; copy both files of the export"
        )
    core = openvino.Core()
    try:
        model = core.read_model(path)
    except RuntimeError as error:
        reason = re.sub(r"(Exception from|Check '.*?' failed at) \S+:\d+:\s*", "", one_line(error))[:200]
        raise CheckpointError(
            f"{printable(path)}: cannot be read with {printable(weights.name)} beside it ({reason}); copy both files "
            "of one export"
        ) from error
    text = model.get_rt_info([METADATA]).astype(str) if model.has_rt_info([METADATA]) else ""
    inputs, names = ([one.get_any_name() for one in ports] for ports in (model.inputs, model.outputs))
    _check_names(path, inputs, names, text)
    if bfloat16 and not _has_bfloat16():
        raise UserError("precision bf16: this processor has no bfloat16 units; drop it")
    if bfloat16 and not any(name.startswith(EXACT) for name in names):
        raise UserError(
            f"precision bf16: {printable(path)} would round its boxes to bfloat16 (an older export); export it anew"
        )
    # By itself the runtime takes bfloat16 where the processor has it; what sorts and selects boxes stays in float32
    hints = {"INFERENCE_PRECISION_HINT": "bf16" if bfloat16 else "f32", "INFERENCE_NUM_THREADS": threads}
    with signal_stack_kept():
        compiled = core.compile_model(model, "CPU", hints)
    one_at_a_time = Lock()  # all calls share one request, whose outputs the next call overwrites

    def run(feed: Arrays) -> Arrays:
        with one_at_a_time:
            outputs = compiled(dict(feed))
            named = {output.get_any_name(): output for output in compiled.outputs}
            return {name: np.array(outputs[named[name]]) for name in OUTPUTS if name in named}

    return run, f"OpenVINO {openvino.__version__.partition('-')[0]}", text
