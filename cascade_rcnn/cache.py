"""The folder for everything that can be downloaded or rebuilt: downloaded weights, compiled code, results of checks."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_folder(part: str = "") -> Path:
    """``CASCADE_RCNN_CACHE`` if set, else ``cascade-rcnn`` in the system's cache folder; ``part`` is a folder in it."""
    named = os.environ.get("CASCADE_RCNN_CACHE")
    if named:
        root = Path(named).expanduser()
    elif sys.platform == "win32":
        root = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "cascade-rcnn"
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cascade-rcnn"
    return root / part if part else root
