"""Reading files that anyone may have written: every failure is a ``DataError`` that names the file and the reason."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cascade_rcnn.data.images import IMAGE_SUFFIXES
from cascade_rcnn.data.images import read_image as read_image  # importable from here as before
from cascade_rcnn.errors import DataError
from cascade_rcnn.messages import printable, shown

# Words for the same split; a name may carry a year (train2017)
_SAME_SPLIT = (
    ("train", "training", "trn"),
    ("val", "valid", "validation", "validate", "dev", "eval"),
    ("test", "testing", "tst"),
)


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
    except UnicodeDecodeError:
        raise DataError(f"{printable(path)}: the text is not UTF-8; save it as UTF-8") from None
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
            names = [entry.name for entry in entries if _has_ending(entry.name, suffixes)]
    except OSError:
        return []
    return [folder / name for name in sorted(names)]


def _has_ending(name: str, suffixes: frozenset[str] | set[str]) -> bool:
    """Archives from macOS hold a ``._a.jpg`` beside each ``a.jpg``, which is no picture."""
    return os.path.splitext(name)[1].lower() in suffixes and not name.startswith("._")  # noqa: PTH122


def list_files_below(
    folder: Path,
    suffixes: frozenset[str] | set[str] = IMAGE_SUFFIXES,
    *,
    skip: frozenset[str] = frozenset(),
) -> list[Path]:
    """``list_files`` of a folder and all folders below it, except hidden ones and those named in ``skip``."""
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(
            name for name in folders if not name.startswith((".", "__MACOSX")) and name.lower() not in skip
        )
        below = Path(place)
        found += [below / name for name in sorted(names) if _has_ending(name, suffixes)]
    return found


def safe_path(root: Path, folder: Path, name: object) -> Path:
    """The file ``name`` of ``folder``. Raises ``ValueError`` with a reason where it is no name below ``root``.

    Nothing has to exist. The path is relative where ``root`` is, also for an absolute name.
    """
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
    if not os.path.isabs(path) and not path.startswith(os.pardir) and base == ".":  # noqa: PTH117
        return Path(path)
    whole, top = os.path.abspath(path), os.path.abspath(base)  # noqa: PTH100
    if not whole.startswith(top.rstrip(os.sep) + os.sep):
        there = "the data set's folder" if base == "." else printable(root)
        raise ValueError(f"image name {shown(name)} leads out of {there}")
    return Path(base) / os.path.relpath(whole, top) if not os.path.isabs(base) else Path(whole)  # noqa: PTH117


def split_synonyms(name: str) -> tuple[str, ...]:
    """Words that mean the same split, the name itself first."""
    for words in _SAME_SPLIT:
        if name.lower() in words:
            return (name, *(word for word in words if word != name))
    return (name,)


def split_word(name: str) -> str:
    """train, val or test where a folder or file name holds a word for one of them (val2017, Valid, train_images).

    Empty where it holds none, or words for several (train_and_val).
    """
    words = {word.rstrip("0123456789") for word in re.split(r"[^a-z0-9]+", name.lower())}
    found = [group[0] for group in _SAME_SPLIT if words & set(group)]
    return found[0] if len(found) == 1 else ""


def resolve_split(names: Sequence[str], wanted: str, root: Path) -> str:
    """The split of a data set that a user's word means, the one rule for all formats and commands.

    In this order: the name itself, a synonym (``valid`` for ``val``), a synonym with a year (``train2017``), the one
    name that holds such a word (``my_train``), or the only split there is for ``all``. Raises ``DataError`` that lists
    the splits and says how to hold a part out.
    """
    words = split_synonyms(wanted)
    for word in words:
        for name in names:
            if name.lower() == word.lower():
                return name
    with_year = [n for n in names for w in words if n.lower().startswith(w) and n[len(w) :].strip("-_").isdigit()]
    group = next((group[0] for group in _SAME_SPLIT if wanted.lower() in group), None)
    likely = with_year or [name for name in names if group and split_word(name) == group]
    if len(likely) == 1:
        return likely[0]
    if wanted == "all" and len(names) == 1:
        return names[0]
    if len(likely) > 1:
        raise DataError(f"{printable(root)}: split {shown(wanted)} could be {' or '.join(likely)}; name one of them")
    have = ", ".join(names) or "none"
    part = next((n for n in names if split_word(n) == "train"), names[0] if names else "all")
    raise DataError(
        f"{printable(root)}: no split {shown(wanted)} (there are: {have}); name one of them, or hold a part out: "
        f"--data.train {part}:0-90 --data.val {part}:90-100"
    )
