"""From a name to a checkpoint of ours: fetched once, converted by the safe reader, kept in the cache."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import sys
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO

from cascade_rcnn.cache import cache_folder
from cascade_rcnn.errors import CheckpointError
from cascade_rcnn.messages import one_line, printable
from cascade_rcnn.zoo.catalog import Published, config_of_detectron2, find, find_loadable, of_file
from cascade_rcnn.zoo.download import fetch
from cascade_rcnn.zoo.identity import another_network

_FILES = (".safetensors", ".pth", ".pkl", ".pt", ".pt2", ".onnx", ".xml")
ANOTHER_FOLDER = "free some space there, or name another folder in CASCADE_RCNN_CACHE"


def models_folder() -> Path:
    """Where converted weights are kept."""
    return cache_folder("models")


def resolve(checkpoint: str | Path) -> Path:
    """The file of a checkpoint that is given as a path, or by the name of published weights (fetched when first used).

    What lies on the disk wins over a name; a path into the cache is the name of what lies there. Raises
    CheckpointError: neither; or the weights cannot be fetched or read.
    """
    path = Path(checkpoint)
    if is_name(path) or (path.absolute().parent == models_folder().absolute() and _is_kept(path)):
        return by_name(path.as_posix() if is_name(path) else path.stem)
    return path


def _is_kept(path: Path) -> bool:
    entry = find(path.stem)
    return entry is not None and _place(entry).name == path.name


def is_name(checkpoint: str | Path) -> bool:
    """Whether this can only be a name: not on the disk, one word without an ending of a file, or one of the list."""
    path = Path(checkpoint)
    if path.exists() or path.is_absolute():
        return False
    if len(path.parts) != 1:
        entry = find(path.as_posix())
        config = path.with_suffix("") if path.suffix in (".yaml", ".py") else path
        return entry is not None and config.as_posix() == config_of_detectron2(entry)
    return path.suffix.lower() not in _FILES or find(str(path)) is not None


def by_name(name: str) -> Path:
    """The converted checkpoint of that name, from the cache or fetched now; one that cannot be read is fetched anew.

    To read it through costs about a second per GB.
    """
    entry = find_loadable(name)
    kept = _place(entry)
    if _has(kept):
        return kept
    with _one_process(kept):
        if not _has(kept, told=True):  # another process may have made it while we waited
            _make(entry, kept)
    return kept


def _has(kept: Path, *, told: bool = False) -> bool:
    """Whether the cache has this checkpoint, whole and of a version that this program reads; ``told``: say why not."""
    from cascade_rcnn.checkpoint import load_checkpoint

    if not kept.is_file():
        return False
    try:
        load_checkpoint(kept)
    except CheckpointError as error:
        if told:
            print(f"{printable(str(error).partition(';')[0])}: it is fetched anew", file=sys.stderr)
        return False
    return True


@contextlib.contextmanager
def fetched(checkpoint: str | Path) -> Iterator[Path]:
    """A checkpoint as its library wrote it: a path as it is, a name fetched for this use.

    Raises CheckpointError as ``resolve`` does.
    """
    if not is_name(checkpoint):
        yield Path(checkpoint)
        return
    entry = find_loadable(Path(checkpoint).as_posix())
    with _one_process(_place(entry)):
        raw = _fetch(entry)
        yield raw
        raw.unlink()


def _place(entry: Published) -> Path:
    return models_folder() / f"{entry.name}.safetensors"


def _fetch(entry: Published) -> Path:
    """The file of the entry, in the cache under the entry's name."""
    print(f"{entry.name}: weights by {entry.library}; licence: {entry.license or 'not stated'}", file=sys.stderr)
    raw = models_folder() / f"{entry.name}{Path(entry.file).suffix}"
    fetch(entry, raw)
    return raw


def _make(entry: Published, kept: Path) -> None:
    """Fetch, convert, compare with what the name promises; only then it stands in the cache under its name."""
    from cascade_rcnn.checkpoint import load_checkpoint
    from cascade_rcnn.convert.checkpoint import run_convert

    raw = _fetch(entry)
    unproven = kept.with_name(f".{entry.name}.unproven.safetensors")
    report = io.StringIO()
    try:
        with contextlib.redirect_stdout(report):
            run_convert(raw, unproven, overwrite=True)
        if other := another_network(entry, load_checkpoint(unproven).config.model):
            unproven.unlink()
            raise CheckpointError(f"{raw}: holds another network than its name says ({other})")
    except CheckpointError as error:
        if str(error).startswith(f"{unproven}: cannot be written"):
            reason: BaseException = error
            while reason.__context__ is not None:  # down to the system's own words
                reason = reason.__context__
            raise CheckpointError(
                f"{printable(kept)}: cannot be written ({one_line(reason)}); the file that was fetched is kept; "
                f"{ANOTHER_FOLDER}"
            ) from error
        raise CheckpointError(f"{error}; {_way_out(entry)}") from error
    unproven.replace(kept)
    raw.unlink()
    text = report.getvalue().replace(str(unproven), str(kept))
    with contextlib.suppress(OSError):  # for who wants to know what was decided; nothing reads it
        kept.with_suffix(".txt").write_text(text, encoding="utf-8")


def _way_out(entry: Published) -> str:
    if not entry.hash and not entry.sha256:
        return "nothing is published to verify it by: delete it, to fetch it again"
    return "its digest is right, so fetching it again changes nothing: take other weights ('cascade-rcnn models')"


@contextlib.contextmanager
def _one_process(path: Path) -> Iterator[None]:
    """Let one process of many fetch ``path``; the others wait until it is done.

    The lock belongs to an open file, which its holder deletes at the end: a waiting process may find itself with the
    lock of a file that is gone. It opens the new one and waits again.
    """
    lock = path.with_name(f".{path.name}.lock")
    told = False
    while (file := _open_locked(lock)) is None:
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


def _open_locked(lock: Path) -> IO[bytes] | None:
    """The file, open and locked; None where another process has the lock. Raises CheckpointError: no such folder."""
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(lock.open("a+b"))
            if _locked(file.fileno()) and _is_still(lock, file):
                stack.pop_all()
                return file
    except OSError as error:
        raise CheckpointError(
            f"{printable(lock.parent)}: cannot be written ({one_line(error)}); {ANOTHER_FOLDER}"
        ) from error
    return None


def _is_still(lock: Path, file: IO[bytes]) -> bool:
    with contextlib.suppress(OSError):
        return os.fstat(file.fileno()).st_ino == lock.stat().st_ino
    return False


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
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            print(
                f"{printable(models_folder())}: its file system has no locks ({one_line(error)}): let one process "
                "fetch the weights before you start several",
                file=sys.stderr,
            )
        return True

    def _unlock(descriptor: int) -> None:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)


def published_for(checkpoint: Path) -> Published | None:
    """The entry whose weights a checkpoint holds unchanged: it was converted from them. None for any other."""
    from safetensors import SafetensorError, safe_open

    from cascade_rcnn.checkpoint import find_checkpoint

    try:
        path = find_checkpoint(resolve(checkpoint))
        with safe_open(path, framework="np") as file:
            origin = json.loads((file.metadata() or {}).get("extra", "{}")).get("converted_from", {})
        return of_file(str(origin["file"]), str(origin["sha256"]))
    except (CheckpointError, SafetensorError, OSError, ValueError, KeyError, AttributeError):
        return None


def cached() -> dict[str, int]:
    """Names of the weights in the cache, and their bytes."""
    return {path.stem: path.stat().st_size for path in _files() if _is_whole(path)}


def unfinished() -> int:
    """Bytes in the cache of what is no whole checkpoint: parts of downloads, files that could not be converted."""
    reports = {path.with_suffix(".txt") for path in _files() if _is_whole(path)}
    return sum(path.stat().st_size for path in _files() if not _is_whole(path) and path not in reports)


def _files() -> list[Path]:
    folder = models_folder()
    try:
        return sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    except OSError as error:
        raise CheckpointError(
            f"{printable(folder)}: cannot be read ({one_line(error)}); name another folder in CASCADE_RCNN_CACHE"
        ) from error


def _is_whole(path: Path) -> bool:
    return path.suffix == ".safetensors" and not path.name.startswith(".")


def _belongs(path: Path, names: Collection[str]) -> bool:
    return any(path.name.lstrip(".").startswith(f"{name}.") for name in names)


def clear(names: Collection[str] | None = None) -> tuple[int, list[str]]:
    """Delete what is in the cache; returns the bytes that are free now, and names that another process is fetching.

    ``names``: only the weights of these names, whole or not. Raises CheckpointError: files that cannot be deleted.
    """
    freed, busy = 0, list[str]()
    for lock in models_folder().glob(".*.safetensors.lock"):
        name = lock.name[1 : -len(".safetensors.lock")]
        if names is not None and name not in names:
            continue
        if (file := _open_locked(lock)) is None:
            busy.append(name)
        else:
            _unlock(file.fileno())
            file.close()
    for path in _files():
        if _belongs(path, busy) or (names is not None and not _belongs(path, names)):
            continue
        try:
            size = path.stat().st_size
            path.unlink(missing_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"{printable(path)}: cannot be deleted ({one_line(error)}); make its folder writable"
            ) from error
        freed += size
    return freed, busy
