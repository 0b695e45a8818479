"""Cascade R-CNN for today's PyTorch: high-quality object detection and instance segmentation.

    import cascade_rcnn

    detector = cascade_rcnn.load("runs/demo/best.safetensors")  # or the folder of a run
    detections = detector.predict("street.jpg")  # a path, Pillow image, array or tensor; or a list of them
    detections.save("found.jpg")

What needs torch is imported when it is first used: ``import cascade_rcnn`` alone takes no time. Where torch is not
installed, ``load`` takes exported networks, and detections hold NumPy's arrays.
Everything else is a verb in a module of its own: ``from cascade_rcnn.train import train``.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING

from cascade_rcnn.config import Config, DataConfig, ModelConfig, TrainConfig
from cascade_rcnn.errors import CheckpointError, ConfigError, DataError, UserError
from cascade_rcnn.recipes import load_config

if TYPE_CHECKING:
    from cascade_rcnn.inference.detections import Detections
    from cascade_rcnn.inference.detector import Detector, load

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "Config",
    "ConfigError",
    "DataConfig",
    "DataError",
    "Detections",
    "Detector",
    "ModelConfig",
    "TrainConfig",
    "UserError",
    "__version__",
    "load",
    "load_config",
]

_NEEDS_TORCH = {"Detections": "detections", "Detector": "detector", "load": "detector"}  # modules of ``inference``
_WITHOUT_TORCH = {"Detections": "ArrayDetections", "Detector": "ArrayDetector", "load": "load"}  # of ``runtime``


def __getattr__(name: str) -> object:
    if name not in _NEEDS_TORCH:
        raise AttributeError(f"module 'cascade_rcnn' has no attribute {name!r}; public names: {', '.join(__all__)}")
    if importlib.util.find_spec("torch") is None:  # exported networks run without it
        return getattr(importlib.import_module(f"cascade_rcnn.runtime.{_NEEDS_TORCH[name]}"), _WITHOUT_TORCH[name])
    return getattr(importlib.import_module(f"cascade_rcnn.inference.{_NEEDS_TORCH[name]}"), name)


def __dir__() -> list[str]:
    return list(__all__)
