"""Cascade R-CNN for today's PyTorch: high-quality object detection and instance segmentation.

    import cascade_rcnn

    detector = cascade_rcnn.load("runs/demo/best.safetensors")  # or the folder of a run
    detections = detector.predict("street.jpg")  # a path, Pillow image, array or tensor; or a list of them
    detections.save("found.jpg")

Names are imported when they are first used, so that ``import cascade_rcnn`` alone loads neither torch nor timm.
Everything else is a verb in a module of its own: ``from cascade_rcnn.train import train``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cascade_rcnn.config import Config as Config
    from cascade_rcnn.config import DataConfig as DataConfig
    from cascade_rcnn.config import ModelConfig as ModelConfig
    from cascade_rcnn.config import TrainConfig as TrainConfig
    from cascade_rcnn.errors import CheckpointError as CheckpointError
    from cascade_rcnn.errors import ConfigError as ConfigError
    from cascade_rcnn.errors import DataError as DataError
    from cascade_rcnn.errors import UserError as UserError
    from cascade_rcnn.inference.detections import Detections as Detections
    from cascade_rcnn.inference.detector import Detector as Detector
    from cascade_rcnn.inference.detector import load as load
    from cascade_rcnn.recipes import load_config as load_config

__version__ = "0.1.0"

_MODULE_OF = {
    "load": "predict",
    "Detector": "predict",
    "Detections": "detections",
    "load_config": "recipes",
    "Config": "config",
    "ModelConfig": "config",
    "DataConfig": "config",
    "TrainConfig": "config",
    "UserError": "errors",
    "ConfigError": "errors",
    "DataError": "errors",
    "CheckpointError": "errors",
}

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


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'cascade_rcnn' has no attribute {name!r}; public names: {', '.join(__all__)}")
    return getattr(importlib.import_module(f"cascade_rcnn.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return list(__all__)
