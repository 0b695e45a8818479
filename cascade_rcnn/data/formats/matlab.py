"""MATLAB files of strangers: structures as plain nested arrays, every failure a ``DataError``."""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
import threading
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from cascade_rcnn.data import files
from cascade_rcnn.errors import DataError
from cascade_rcnn.messages import printable, shown

# Kept because scipy's reader is compiled code that a damaged download can end with a segmentation fault: the training
# would stop without a word. A process of its own tries each file first.
_TRIAL = """
import os, sys, warnings
from scipy.io import loadmat
warnings.simplefilter("ignore")
for line in sys.stdin:
    try:
        loadmat(os.fsdecode(bytes.fromhex(line)))
    except Exception:
        pass  # said by the reading in the program itself
    print("survived", flush=True)
"""
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
        raise DataError(f"{printable(path)}: not a readable MATLAB file ({reason})") from None
    return {key: value for key, value in content.items() if not key.startswith("__")}


class _Trial:
    """A process that reads files so that this one need not crash; it stays for the next file unless one kills it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def survives(self, path: Path) -> bool:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _TRIAL],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        overdue = threading.Timer(_TRIAL_SECONDS, process.kill)
        overdue.start()
        try:
            process.stdin.write(os.fsencode(path.absolute()).hex() + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        finally:
            overdue.cancel()
        if not answer:
            self.end()
        return bool(answer)

    def end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            with suppress(BrokenPipeError):
                process.communicate()


_trial = _Trial()
atexit.register(_trial.end)


def _try_elsewhere(path: Path) -> None:
    if not _trial.survives(path):
        raise DataError(
            f"{printable(path)}: crashes the reader of MATLAB files, or takes it more than "
            f"{_TRIAL_SECONDS} s: it is damaged, fetch it again"
        )


def unwrap(value: Any) -> Any:
    """The content of MATLAB's nested 1 x 1 cells and character rows."""
    while isinstance(value, np.ndarray) and value.size == 1:
        value = value.reshape(-1)[0]
    return value


def text(value: Any) -> str:
    """A MATLAB text. Raises ``ValueError`` where it is something else."""
    value = unwrap(value)
    if not isinstance(value, str):
        raise ValueError(f"{shown(value)} where a text is wanted")
    return str(value)
