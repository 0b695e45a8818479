"""MATLAB files of strangers: structures as plain nested arrays, every failure a ``DataError``."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from cascade_rcnn.data import files
from cascade_rcnn.errors import DataError

# scipy's reader is compiled code that a damaged file can crash: a process of its own tries first.
_TRIAL = "import sys, warnings; warnings.simplefilter('ignore'); from scipy.io import loadmat; loadmat(sys.argv[1])"
_TRIAL_SECONDS = 300


def read_mat(path: Path) -> dict[str, Any]:
    """The variables of a .mat file (not version 7.3). Raises ``DataError`` where it cannot be read."""
    from scipy.io import loadmat  # type: ignore[import-untyped,unused-ignore]

    files.read_bytes(path)  # a file that is missing or empty gets its own message
    _try_elsewhere(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content: dict[str, Any] = loadmat(str(path))
    except Exception as error:  # a damaged file makes scipy's reader raise whatever it likes, MemoryError included
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise DataError(f"{files.printable(path)}: not a readable MATLAB file ({reason})") from None
    return {key: value for key, value in content.items() if not key.startswith("__")}


def _try_elsewhere(path: Path) -> None:
    """Let another process crash instead of this one. What it can say itself is left to the reading here."""
    try:
        trial = subprocess.run(
            [sys.executable, "-c", _TRIAL, str(path)], capture_output=True, timeout=_TRIAL_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise DataError(f"{files.printable(path)}: not read within {_TRIAL_SECONDS} s; fetch it again") from None
    if trial.returncode not in (0, 1):
        raise DataError(f"{files.printable(path)}: crashes the reader of MATLAB files: it is damaged, fetch it again")


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
