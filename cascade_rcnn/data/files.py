"""Reading files that anyone may have written: every failure is a ``DataError`` that names the file and the reason.

Image files become uint8 RGB pixels, with the size checked before anything is decoded. Pillow decodes: it reads every
format that data sets come in, its JPEG decoder is the one that torchvision uses (equal bytes, equal speed on 158 COCO
images), and torchvision's own decoders are deprecated since 0.29.

The EXIF orientation is NOT applied. Annotations count pixels of the file as it is stored (COCO's ``width`` and
``height`` do), and a reader that silently turned the picture would shift every box; ``cascade-rcnn check`` names
images whose orientation tag disagrees with their annotation.
"""

from __future__ import annotations

import json
import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cascade_rcnn.errors import DataError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

DEFAULT_MAX_PIXELS = 100_000_000

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm"})
# Words for the same split; a name may carry a year (train2017)
_SAME_SPLIT = (("train", "training"), ("val", "valid", "validation", "dev"), ("test", "testing"))


def shown(value: object) -> str:
    """A value from a file as it may stand in a one-line message: quoted, printable, short."""
    text = ascii(value) if not isinstance(value, str) or not value.isprintable() else f"'{value}'"
    return text if len(text) <= 120 else text[:100] + "..."


def printable(path: object) -> str:
    """A path or text for a one-line message: control characters and bytes that are not UTF-8 become escapes."""
    text = str(path)
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


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


class _SharedByThreads:
    """Pillow's limit and Python's filters of warnings: the first reader inside changes them, the last puts them back.

    Each for itself would put back what another thread had changed, and the whole program be left without them.
    """

    def __init__(self) -> None:
        self._lock, self._inside, self._before = threading.Lock(), 0, ExitStack()

    def enter(self) -> None:
        from PIL import Image

        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._before.callback(setattr, Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
                Image.MAX_IMAGE_PIXELS = None
                self._before.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._before.close()


_shared = _SharedByThreads()


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """Pillow reads a file of any size, without warnings: sizes are judged by us, before anything is decoded, and odd
    metadata has no say over the pixels.
    """
    _shared.enter()
    try:
        yield
    finally:
        _shared.leave()


def image_size(path: Path) -> tuple[int, int] | None:
    """(height, width) from an image file's header, as stored (EXIF not applied); None where there is no image."""
    from PIL import Image

    with quiet_pillow():
        try:
            with Image.open(path) as image:
                return image.height, image.width
        except Exception:  # a damaged header makes the many decoders raise whatever they like
            return None


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
    with_year = [n for n in names for w in words if n.lower().startswith(w) and n[len(w):].strip("-_").isdigit()]
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


def read_image(path: str | Path, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> Tensor:
    """Decode an image file: uint8 [3, H, W], RGB, stored channels-last.

    Grey, palette, alpha (dropped), CMYK and 16-bit files (their high byte) become RGB; of an animation the first frame.

    Raises:
        DataError: missing, unreadable, truncated, of a kind that is no picture, or above ``max_pixels`` by its header.
    """
    with _opened(path, max_pixels) as picture:
        pixels = _rgb(picture, path)
    import torch  # checking and converting annotations needs no torch

    return torch.from_numpy(pixels).permute(2, 0, 1)  # a view: [3, H, W] over [H, W, 3] in memory


@contextmanager
def _opened(path: str | Path, max_pixels: int) -> Iterator[Image.Image]:
    """Open by header, refuse what is too large, and turn whatever a decoder may raise into one line."""
    from PIL import Image

    try:
        with quiet_pillow(), Image.open(path) as picture:
            if picture.width * picture.height > max_pixels:
                raise DataError(f"{path}: {picture.width}x{picture.height} is more than data.max_pixels "
                                f"{max_pixels}; raise it or make the image smaller")
            yield picture
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{path}: no such image file; check the data set's root folder") from None
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ...: all mean a damaged file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: cannot be read as an image ({reason}); replace it or take it out of the "
                        "annotations") from error


def _rgb(picture: Image.Image, path: str | Path) -> NDArray[np.uint8]:
    """Pixels [H, W, 3] of an opened picture."""
    if picture.mode.startswith("I"):  # 16 bits per pixel (Pillow's own conversion would clip it at 255)
        deep = np.clip(np.asarray(picture), 0, 65535).astype(np.uint16)
        return np.repeat((deep >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
    if picture.mode == "F":
        raise DataError(f"{path}: holds floating-point pixels, whose range is unknown; convert it to 8 bits")
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")
    if picture.mode != "RGB":
        picture = picture.convert("RGB")
    return np.array(picture)
