"""How much memory a step of a training takes, by a rough count, and what a machine has for it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cascade_rcnn.config import Config

# GB per image and megapixel of a training step in bfloat16, and what does not depend on them, without and with masks.
# Cascade R-CNN with ResNet-50 took 12.5 and 17.7 GB at 16 images of 0.87 megapixels on an H200 (benchmarks/NOTES.md).
_GB_PER_MEGAPIXEL, _GB_PER_MEGAPIXEL_MASKS, _GB_FIXED = 0.85, 1.2, 1.0
_GPU_SHARE = 0.8  # of a GPU's memory that may be planned with
# The same without a GPU, in float32, fitted to the peaks of five trainings of ``finetune_small`` (docs/trainings.md):
# 4.0, 4.6, 6.4, 9.6 and 16.4 GB with up to 1.1, 1.4, 2.4, 3.7 and 6.9 megapixels a pass; none is off by more than 4 %.
_CPU_GB_PER_MEGAPIXEL, _CPU_GB_FIXED = 2.2, 1.5
_RAM_SHARE = 0.6  # the rest is for the processes that load images, and for other programs


@dataclass(frozen=True)
class Machine:
    """What the choices need to know of the machine that trains."""

    gpu_memory: float | None = None  # GB of each GPU; None: no GPU
    memory: float | None = None  # GB for a training without a GPU; None: not known
    bfloat16: bool = False  # a processor that multiplies bfloat16 itself

    @property
    def planned(self) -> float:
        """GB that a step may take."""
        if self.gpu_memory is not None:
            return _GPU_SHARE * self.gpu_memory
        return math.inf if self.memory is None else _RAM_SHARE * self.memory

    @property
    def words(self) -> str:
        """``the GPU's 24 GB``."""
        return (
            f"this machine's {self.memory:.0f} GB" if self.gpu_memory is None else f"the GPU's {self.gpu_memory:.0f} GB"
        )


def step_memory(
    config: Config, images: NDArray[np.float64], short: float, long: float, batch: int, machine: Machine
) -> float:
    """GB of a training step, by a rough count."""
    megapixels = batch * _padded(images, short, long, batch) / 1e6
    if machine.gpu_memory is None:
        masks = _GB_PER_MEGAPIXEL_MASKS / _GB_PER_MEGAPIXEL if config.model.masks != "none" else 1.0
        return _CPU_GB_FIXED + _CPU_GB_PER_MEGAPIXEL * masks * megapixels
    rate = _GB_PER_MEGAPIXEL if config.model.masks == "none" else _GB_PER_MEGAPIXEL_MASKS
    return _GB_FIXED + rate * (2 if config.train.precision == "fp32" else 1) * megapixels


def _padded(images: NDArray[np.float64], short: float, long: float, batch: int) -> float:
    """Pixels that an image of a batch is padded to, at most: wide and high images may meet in one."""
    if not len(images):
        return short * long
    scale = np.minimum(short / images.min(axis=1), long / images.max(axis=1))
    sides = np.ceil(np.round(images * scale[:, None]) / 32) * 32  # [N, 2]
    return float(sides.prod(axis=1).max() if batch == 1 else sides.max(axis=0).prod())
