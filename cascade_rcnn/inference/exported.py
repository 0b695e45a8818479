"""Exported networks (ONNX, OpenVINO, ``torch.export``) in the place of a model: the same batches in, detections out.

Without torch, ``cascade_rcnn.runtime.detector`` does the same with arrays. B images, D detections.
"""

from __future__ import annotations

import inspect
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cascade_rcnn.errors import CheckpointError
from cascade_rcnn.messages import printable
from cascade_rcnn.runtime.network import INPUTS, METADATA, OUTPUTS, Arrays, Run, RuntimeNetwork, exported_file
from cascade_rcnn.structures import ImageBatch, RawDetections


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

    def __init__(self, path: Path, *, bfloat16: bool = False) -> None:
        """Raises CheckpointError: no such file, a damaged one, or another program's; UserError: no runtime for it."""
        super().__init__()
        self.network = RuntimeNetwork(
            path, threads=torch.get_num_threads(), bfloat16=bfloat16, others={".pt2": _open_torch}
        )
        self.runtime, self.info = self.network.runtime, self.network.info
        self.canvas = self.info.size
        self.eval()

    def detect(self, images: ImageBatch) -> RawDetections:
        """As ``CascadeRCNN.detect``."""
        found = self.network.detect(images.pixels.numpy(), images.sizes.numpy())
        rows = slice(self.max_detections)  # sorted by descending score
        fields = {name: torch.from_numpy(value)[:, rows] for name, value in found.items()}
        fields["valid"] = fields["valid"].bool() & (fields["scores"] > self.score_threshold)
        return RawDetections(**fields)


def _is_whole(path: Path) -> bool:
    """Whether it is an archive whose checksums are right: torch does not look, and would log its attempts."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, NotImplementedError):  # the latter: methods of compression that no byte of ours names
        return False


def _open_torch(path: Path, _: int) -> tuple[Run, str, str]:
    if not _is_whole(path):
        raise CheckpointError(f"{printable(path)}: is no whole file of torch.export; copy or export it once more")
    extra = {METADATA: ""}
    program = torch.export.load(path, extra_files=extra)
    unguarded = "check_guards" in inspect.signature(program.module).parameters
    # its guards assume two pixels or more on every level, which the operators do not need
    network = program.module(**({"check_guards": False} if unguarded else {}))

    def run(feed: Arrays) -> Arrays:
        with torch.inference_mode():
            found = network(*(torch.from_numpy(feed[name]) for name in INPUTS))
        return {name: value.numpy() for name, value in zip(OUTPUTS, found)}

    return run, f"torch.export, torch {torch.__version__}", str(extra[METADATA])
