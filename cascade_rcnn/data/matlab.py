"""MATLAB files of strangers: structures as plain nested arrays, every failure a ``DataError``."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from cascade_rcnn.data import files
from cascade_rcnn.errors import DataError


def read_mat(path: Path) -> dict[str, Any]:
    """The variables of a .mat file (not version 7.3). Raises ``DataError`` where it cannot be read."""
    from scipy.io import loadmat  # type: ignore[import-untyped,unused-ignore]

    files.read_bytes(path)  # a file that is missing or empty gets its own message
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content: dict[str, Any] = loadmat(str(path))
    except Exception as error:  # a damaged file makes scipy's reader raise whatever it likes, MemoryError included
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise DataError(f"{files.printable(path)}: not a readable MATLAB file ({reason})") from None
    return {key: value for key, value in content.items() if not key.startswith("__")}


def unwrap(value: Any) -> Any:
    """The content of MATLAB's nested 1 x 1 cells and character rows."""
    while isinstance(value, np.ndarray) and value.size == 1:
        value = value.reshape(-1)[0]
    return value


def text(value: Any) -> str:
    """A MATLAB text. Raises ``ValueError`` where it is something else."""
    value = unwrap(value)
    if not isinstance(value, str):
        raise ValueError(f"{files.shown(value)} where a text is wanted")
    return str(value)
