"""Reading files that anyone may have written: every failure is a ``DataError`` that names the file and the reason."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cascade_rcnn.data.images import IMAGE_SUFFIXES
from cascade_rcnn.errors import DataError
from cascade_rcnn.messages import printable, shown

# Words for the same split; a name may carry a year (train2017)
_SAME_SPLIT = (("train", "training"), ("val", "valid", "validation", "dev"), ("test", "testing"))


def read_bytes(path: Path) -> bytes:
    """The content of a file. Raises ``DataError`` where it cannot be read or is empty."""
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        raise DataError(f"{printable(path)}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if not data.strip():
        raise DataError(f"{printable(path)}: the file is empty; restore it from where the data set came from")
    return data


def read_lines(path: Path, *, may_be_empty: bool = False) -> list[str]:
    """The lines of a text file, without line ends (any kind) and byte order mark.

    Bytes that are not UTF-8 survive as the surrogates that Python uses for such file names, so that a list may name
    any file that the disk can hold.
    """
    if may_be_empty and is_file(path) and path.stat().st_size == 0:
        return []
    try:
        data = path.read_bytes() if may_be_empty else read_bytes(path)
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{printable(path)}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{printable(path)}: the text is UTF-16; save it as UTF-8")
    text = data.decode("utf-8-sig", "surrogateescape")
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file (UTF-8 or UTF-16, byte order mark allowed)."""
    data = read_bytes(path)
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{printable(path)}: not valid JSON ({error}); restore or export it again") from None


def is_file(path: Path) -> bool:
    """Whether a file is there; names that the disk cannot hold are not."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def is_dir(path: Path) -> bool:
    """Whether a folder is there; names that the disk cannot hold are not."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def subfolders(path: Path) -> list[Path]:
    """Folders below a folder, sorted; none where it cannot be listed."""
    try:
        return sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))
    except OSError:
        return []


def list_files(folder: Path, suffixes: frozenset[str] | set[str] = IMAGE_SUFFIXES) -> list[Path]:
    """Files of a folder with one of the suffixes, sorted by name; none where it cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if Path(entry.name).suffix.lower() in suffixes]
    except OSError:
        return []
    return [folder / name for name in sorted(names)]


def safe_path(root: Path, folder: Path, name: object) -> Path:
    """The file ``name`` of ``folder``. Raises ``ValueError`` with a reason where it is no name below ``root``."""
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"image name {shown(name)} is not a name")
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        raise ValueError(f"image name {shown(name)} holds characters that no file name can") from None
    if "\0" in name:
        raise ValueError(f"image name {shown(name)} holds a zero character")
    # Lexically: links inside the data set may lead to another disk, names in an annotation file may not
    path = os.path.normpath(os.path.join(folder, name.replace("\\", "/")))  # noqa: PTH118
    base = os.path.normpath(root)
    if base != "." and not path.startswith(base.rstrip(os.sep) + os.sep):
        raise ValueError(f"image name {shown(name)} leads out of {printable(root)}")
    if base == "." and (path.startswith((os.sep, os.pardir + os.sep)) or os.path.splitdrive(path)[0]):
        raise ValueError(f"image name {shown(name)} leads out of the data set's folder")
    return Path(path)


def split_synonyms(name: str) -> tuple[str, ...]:
    """Words that mean the same split, the name itself first."""
    for words in _SAME_SPLIT:
        if name.lower() in words:
            return (name, *(word for word in words if word != name))
    return (name,)


def resolve_split(names: Sequence[str], wanted: str, root: Path) -> str:
    """The split of a data set that a user's word means: itself, a synonym, or the one that adds a year.

    Raises ``DataError`` that lists the splits and says how to hold a part out.
    """
    words = split_synonyms(wanted)
    for word in words:
        for name in names:
            if name.lower() == word.lower():
                return name
    with_year = [n for n in names for w in words if n.lower().startswith(w) and n[len(w) :].strip("-_").isdigit()]
    if len(with_year) == 1:
        return with_year[0]
    if wanted == "all" and len(names) == 1:
        return names[0]
    if len(with_year) > 1:
        raise DataError(f"{printable(root)}: split {shown(wanted)} could be {' or '.join(with_year)}; name one of them")
    have = ", ".join(names) or "none"
    part = next((n for n in names if n.lower().startswith("train")), names[0] if names else "all")
    raise DataError(
        f"{printable(root)}: no split {shown(wanted)} (there are: {have}); name one of them, or hold a part out: "
        f"--data.train {part}:0-90 --data.val {part}:90-100"
    )
