"""Files that are written whole or not at all: to a temporary name, flushed, renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cascade_rcnn.errors import CheckpointError
from cascade_rcnn.messages import one_line


def replace_file(path: Path, write: Callable[[Path], None], verify: Callable[[Path], None] | None = None) -> None:
    """Let ``write`` fill a temporary file, flush it to disk, ``verify`` it, and rename it over ``path``.

    If anything fails, the file at ``path`` is unchanged and the temporary file is removed. The temporary name is
    fixed, so the next save overwrites what a killed process left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        _flush(temporary)
        if verify is not None:
            verify(temporary)
        temporary.replace(path)
        _flush(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: object, *, indent: int = 2) -> None:
    """Write a strict JSON file atomically. Raises CheckpointError when it cannot be written."""
    text = json.dumps(value, indent=indent, allow_nan=False) + "\n"
    with clear_failure(path):
        replace_file(path, lambda temporary: _write_text(temporary, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _flush(path: Path) -> None:
    """Ask the operating system to put a file, or the names in a folder, onto the disk."""
    folder = path.is_dir()
    if folder and os.name != "posix":
        return  # only POSIX systems open folders
    descriptor = os.open(path, os.O_RDONLY if folder else os.O_RDWR)  # Windows only flushes writable files
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def umask() -> int:
    mask = os.umask(0o077)  # the umask can only be read by setting it
    os.umask(mask)
    return mask


@contextmanager
def clear_failure(path: Path) -> Iterator[None]:
    """Turn an operating system error about a failed write into one line that says how to fix it."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and type(error).__name__ != "SafetensorError":  # JSON needs no safetensors
            raise
        before = "the file from before is unchanged" if path.exists() else "nothing was left behind"
        raise CheckpointError(
            f"{path}: cannot be written ({one_line(error)}); {before}; free some space or make the "
            "folder writable, or write to another; then resume a training with --resume"
        ) from error
