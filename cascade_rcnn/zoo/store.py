"""From a name to a checkpoint of ours: fetched once, converted by the safe reader, kept in the cache."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from cascade_rcnn.cache import cache_folder
from cascade_rcnn.checkpoint import find_checkpoint
from cascade_rcnn.errors import CheckpointError
from cascade_rcnn.messages import one_line, printable
from cascade_rcnn.zoo.catalog import Published, find, find_loadable, of_file
from cascade_rcnn.zoo.download import fetch


def models_folder() -> Path:
    """Where converted weights are kept."""
    return cache_folder("models")


def resolve(checkpoint: str | Path) -> Path:
    """The file of a checkpoint that is given as a path, or by the name of published weights (fetched when first used).

    What lies on the disk wins over a name. Raises CheckpointError: neither; or the weights cannot be fetched or read.
    """
    path = Path(checkpoint)
    if path.exists() or not _is_name(checkpoint):
        return path
    return by_name(str(checkpoint))


def _is_name(checkpoint: str | Path) -> bool:
    """Whether this can only be a name: one word without an ending of a file, or one that the list has."""
    path = Path(checkpoint)
    if path.is_absolute() or len(path.parts) != 1:
        return False
    return path.suffix.lower() not in (".safetensors", ".pth", ".pkl", ".pt", ".onnx") or find(str(path)) is not None


def by_name(name: str) -> Path:
    """The converted checkpoint of that name, from the cache or fetched now."""
    entry = find_loadable(name)
    kept = models_folder() / f"{entry.name}.safetensors"
    if kept.is_file():
        return kept
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with _one_process(kept):
            if not kept.is_file():  # another process may have made it while we waited
                _make(entry, kept)
    except OSError as error:
        raise CheckpointError(
            f"{printable(kept.parent)}: cannot be written ({one_line(error)}); name another in CASCADE_RCNN_CACHE"
        ) from error
    return kept


def _make(entry: Published, kept: Path) -> None:
    from cascade_rcnn.convert.checkpoint import run_convert

    print(f"{entry.name}: weights by {entry.library}; licence: {entry.license or 'not stated'}", file=sys.stderr)
    raw = kept.with_name(entry.name + Path(entry.file).suffix)
    fetch(entry, raw)
    report = io.StringIO()
    with contextlib.redirect_stdout(report):
        run_convert(raw, kept)
    kept.with_suffix(".txt").write_text(report.getvalue(), encoding="utf-8")
    raw.unlink()


@contextlib.contextmanager
def _one_process(path: Path) -> Iterator[None]:
    """Let one process of many fetch ``path``; the others wait until it is done.

    The lock belongs to an open file, which its holder deletes at the end: a waiting process may find itself with the
    lock of a file that is gone. It opens the new one and waits again.
    """
    lock = path.with_name(f".{path.name}.lock")
    told = False
    while True:
        file = lock.open("a+b")
        if _locked(file.fileno()):
            with contextlib.suppress(OSError):
                if os.fstat(file.fileno()).st_ino == lock.stat().st_ino:
                    break
        file.close()
        if not told:
            print(f"waiting for another process that fetches {path.stem}", file=sys.stderr)
            told = True
        time.sleep(0.2)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows does not delete what is open
            lock.unlink()
        _unlock(file.fileno())
        file.close()


if os.name == "nt":  # pragma: no cover
    import msvcrt

    def _locked(descriptor: int) -> bool:
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        except OSError:
            return False
        return True

    def _unlock(descriptor: int) -> None:
        msvcrt.locking(descriptor, msvcrt.LK_UNLCK, 1)  # type: ignore[attr-defined,unused-ignore]

else:
    import fcntl

    def _locked(descriptor: int) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _unlock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_UN)


def published_for(checkpoint: Path) -> Published | None:
    """The entry whose weights a checkpoint holds unchanged: it was converted from them. None for any other."""
    from safetensors import SafetensorError, safe_open

    try:
        path = find_checkpoint(resolve(checkpoint))
        with safe_open(path, framework="np") as file:
            origin = json.loads((file.metadata() or {}).get("extra", "{}")).get("converted_from", {})
        return of_file(str(origin["file"]), str(origin["sha256"]))
    except (CheckpointError, SafetensorError, OSError, ValueError, KeyError, AttributeError):
        return None


def cached() -> dict[str, int]:
    """Names of the weights in the cache, and their bytes."""
    folder = models_folder()
    if not folder.is_dir():
        return {}
    return {path.stem: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))}


def clear() -> int:
    """Delete the weights in the cache, and parts of interrupted downloads; returns the bytes that are free now."""
    freed = 0
    folder = models_folder()
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.is_file():
            freed += path.stat().st_size
            path.unlink()
    return freed
