"""Readers and writers of data sets, one file per format; ``open.py`` recognises which one a folder holds."""

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    """``open_split`` and ``splits`` are importable from here as before; lazily, for ``open`` imports every reader."""
    if name in ("open_split", "splits"):
        return getattr(import_module("cascade_rcnn.data.formats.open"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
