"""Image files become uint8 RGB pixels, with the size checked before anything is decoded.

Pillow decodes: it reads every format that data sets come in, its JPEG decoder is the one that torchvision uses (equal
bytes, equal speed on 158 COCO images), and torchvision's own decoders are deprecated since 0.29.

A picture has two views: *upright*, as viewers show it by its orientation tag (EXIF, TIFF, AVIF), and *stored*, as its
rows lie in the file. ``orientation.py`` decides which of them a label counts; without labels it is upright.
Pictures of more than 8 bits are brought to 8 by ``levels.py``.
"""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cascade_rcnn.data.levels import deep_pixels, is_deep, to_bytes
from cascade_rcnn.errors import DataError, UserError
from cascade_rcnn.messages import printable

if TYPE_CHECKING:
    from torch import Tensor


DEFAULT_MAX_PIXELS = 100_000_000
# What Pillow reads and people photograph, scan or draw
IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".bmp", ".dib", ".tif", ".tiff", ".webp", ".gif", ".avif"}
    | {".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".jpx", ".tga", ".ico", ".qoi"}
)
_ORIENTATION, _TIFF_WIDTH, _TIFF_HEIGHT = 0x0112, 256, 257  # tags
_MOST_EXIF = 1 << 20  # bytes
Frame = Literal["stored", "upright"]
Size = tuple[int, int]  # height, width
_sizes_are: ContextVar[Frame] = ContextVar("sizes_are", default="upright")


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


@dataclass(frozen=True)
class Header:
    """What an image file says of itself before anything is decoded."""

    height: int  # as stored
    width: int
    orientation: int  # 1 upright; 2, 4 mirrored; 3 upside down; 5 to 8 turned on the side
    deep: bool  # more than 8 bits per channel
    error: str = ""  # why the file is no image
    pages: int = 1  # or frames

    @property
    def stored(self) -> Size:
        return self.height, self.width

    @property
    def upright(self) -> Size:
        return (self.width, self.height) if self.orientation >= 5 else self.stored


def read_header(path: Path) -> Header:
    """Size, orientation and depth of an image file; ``error`` says why it is none."""
    with quiet_pillow():
        try:
            with Image.open(path) as picture:
                (height, width), orientation = _stored_size(picture), _orientation(picture)
                return Header(height, width, orientation, is_deep(picture), pages=_pages(picture))
        except Exception as error:  # decoders raise what they like on damaged headers
            try:
                empty = path.stat().st_size == 0
            except (OSError, ValueError):
                empty = False
            reason = "empty file" if empty else " ".join(str(error).split())
            return Header(0, 0, 1, False, reason.replace(str(path), path.name) or type(error).__name__)


def _pages(picture: Image.Image) -> int:
    return 1 if picture.format == "MPO" else getattr(picture, "n_frames", 1)  # cameras' previews are no second picture


def _stored_size(picture: Image.Image) -> Size:
    if picture.format == "TIFF":  # Pillow turns it by itself, and says so in its size from version 11.2 on
        tags = picture.tag_v2  # type: ignore[attr-defined]
        if isinstance(tags.get(_TIFF_HEIGHT), int) and isinstance(tags.get(_TIFF_WIDTH), int):
            return tags[_TIFF_HEIGHT], tags[_TIFF_WIDTH]
    return picture.height, picture.width


def _orientation(picture: Image.Image) -> int:
    """The tag of a picture not yet loaded; 1, upright, where there is none or it cannot be read (the pixels could)."""
    try:
        if picture.format == "TIFF":
            tag = picture.tag_v2.get(_ORIENTATION, 1)  # type: ignore[attr-defined]
        elif "exif" in picture.info or "Raw profile type exif" in picture.info:
            tag = picture.getexif().get(_ORIENTATION, 1)
        elif picture.format == "PNG" and (late := _late_exif(picture)):
            exif = Image.Exif()
            exif.load(late)
            tag = exif.get(_ORIENTATION, 1)
        else:
            return 1
        return tag if isinstance(tag, int) and 1 <= tag <= 8 else 1
    except Exception:  # odd metadata has no say over the pixels
        return 1


def _late_exif(picture: Image.Image) -> bytes:
    """The EXIF of a PNG file that has it behind the pixels, as the standard allows; only chunks' heads are read.

    Pillow would decode the picture to come there, whatever its size.
    """
    stream = picture.fp  # type: ignore[attr-defined]
    start = stream.tell()
    try:
        stream.seek(8)
        while len(head := stream.read(8)) == 8:
            length = int.from_bytes(head[:4], "big")
            if head[4:] == b"eXIf":
                return bytes(stream.read(min(length, _MOST_EXIF)))
            stream.seek(length + 4, 1)
        return b""
    finally:
        stream.seek(start)


@contextmanager
def sizes_in(frame: Frame) -> Iterator[None]:
    """What ``image_size`` gives within: readers of formats without sizes ask it where they need one."""
    token = _sizes_are.set(frame)
    try:
        yield
    finally:
        _sizes_are.reset(token)


def image_size(path: Path) -> Size | None:
    """(height, width) from an image file's header, upright unless within ``sizes_in``; None where there is no image."""
    header = read_header(path)
    if header.error:
        return None
    return header.upright if _sizes_are.get() == "upright" else header.stored


def lies_in_file(path: Path, x: float, y: float) -> bool:
    """Whether a point lies within the picture that is there: where it leaves the annotated size, that may be wrong."""
    size = image_size(path)
    return size is not None and x < size[1] and y < size[0]


def read_image(
    path: str | Path | ImageBytes,
    *,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    frame: Frame | Callable[[Size, int], Frame] = "upright",
    range: str = "auto",
) -> Tensor:
    """As ``read_pixels``, a tensor uint8 [3, H, W] stored channels-last."""
    import torch  # checking and converting annotations needs no torch

    pixels = read_pixels(path, max_pixels=max_pixels, frame=frame, range=range)
    return torch.from_numpy(pixels).permute(2, 0, 1)  # a view: [3, H, W] over [H, W, 3] in memory


def read_pixels(
    path: str | Path | ImageBytes,
    *,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    frame: Frame | Callable[[Size, int], Frame] = "upright",
    range: str = "auto",
) -> NDArray[np.uint8]:
    """Decode an image file: uint8 [H, W, 3], RGB.

    Grey, palette, alpha (dropped) and CMYK files become RGB; of an animation the first frame.

    Args:
        frame: the view wanted, or a function that decides it by the size as stored and the orientation tag.
        range: how levels of more than 8 bits become grey (``data.range``); auto: by the file's type.

    Raises:
        DataError: missing, unreadable, truncated, of a kind that is no picture, or above ``max_pixels`` by its header;
            levels of which nothing says what is black and white; what ``frame`` raises.
    """
    with _opened(path, max_pixels) as picture:
        stored, tag = _stored_size(picture), _orientation(picture)
        wanted = frame if isinstance(frame, str) else frame(stored, tag)
        turned_by_pillow = picture.format == "TIFF"
        pixels = _rgb(picture, path, range)
    if tag != 1 and (wanted == "upright") != turned_by_pillow:
        pixels = np.ascontiguousarray(turn_back(pixels, tag) if turned_by_pillow else turn(pixels, tag))
    return pixels


def turn(pixels: NDArray[Any], tag: int) -> NDArray[Any]:
    """Pixels [H, W, ...] as stored, turned upright by their orientation tag (a view)."""
    turned = pixels.swapaxes(0, 1) if tag in (5, 6, 7, 8) else pixels
    if tag in (3, 4, 7, 8):
        turned = turned[::-1]
    return turned[:, ::-1] if tag in (2, 3, 6, 7) else turned


def turn_back(pixels: NDArray[Any], tag: int) -> NDArray[Any]:
    """The inverse of ``turn``: only the quarter turns, 6 and 8, are not their own."""
    return turn(pixels, {6: 8, 8: 6}.get(tag, tag))


@contextmanager
def _opened(path: str | Path | ImageBytes, max_pixels: int) -> Iterator[Image.Image]:
    """Open by header, refuse what is too large, and turn whatever a decoder may raise into one line."""
    try:
        with quiet_pillow(), Image.open(path) as picture:
            if picture.width * picture.height > max_pixels:
                raise DataError(
                    f"{path}: {picture.width}x{picture.height} is more than max_pixels {max_pixels}; raise it "
                    "(train: --data.max-pixels N; predict, evaluate: --max-pixels N; Python: load(max_pixels=N)) "
                    "or make the image smaller"
                )
            yield picture
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{path}: no such image file; check the data set's root folder") from None
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ...: all mean a damaged file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{path}: cannot be read as an image ({reason}); replace it or take it out of the annotations"
        ) from error


def _reopened(path: str | Path | ImageBytes) -> Image.Image:
    return Image.open(path.again() if isinstance(path, ImageBytes) else path)


def _rgb(picture: Image.Image, path: str | Path | ImageBytes, range: str) -> NDArray[np.uint8]:
    """Pixels [H, W, 3] of an opened picture."""
    if is_deep(picture):
        levels = deep_pixels(picture, lambda: _reopened(path))
        grey = to_bytes(levels, range, where=printable(path))
        return np.repeat(grey[:, :, None], 3, axis=2) if grey.ndim == 2 else grey
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")
    if picture.mode != "RGB":
        picture = picture.convert("RGB")
    return np.array(picture)


def read_levels(path: str | Path | ImageBytes, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> NDArray[Any]:
    """The levels of a picture of more than 8 bits, [H, W] or [H, W, 3], in whatever view; raises ``DataError``."""
    with _opened(path, max_pixels) as picture:
        return deep_pixels(picture, lambda: _reopened(path))


def to_array(image: Any, *, max_pixels: int = DEFAULT_MAX_PIXELS, range: str = "auto") -> NDArray[np.uint8]:
    """Pixels uint8 [H, W, 3] RGB of a file, a ``PIL.Image``, uint8 array [H, W, 3] or [H, W], uint8 tensor [3, H, W].

    A file may be a path, its bytes, or an object that gives them (``open(..., "rb")``, ``io.BytesIO``). It is turned
    upright by its EXIF orientation, as every viewer shows it; a picture or array is taken as it is.
    Deeper pictures, and uint16 arrays where ``range`` is not auto, become grey by ``range`` (``data.range``).

    Raises:
        UserError: another type, dtype or shape, or a file that is missing, damaged or above ``max_pixels``.
    """
    if isinstance(image, bytes | bytearray | memoryview) or hasattr(image, "read"):
        return read_upright(ImageBytes.of(image), max_pixels=max_pixels, range=range)
    if isinstance(image, str | Path):
        return read_upright(Path(image), max_pixels=max_pixels, range=range)
    if isinstance(image, Image.Image):
        if image.mode[0] in "IF":
            if range == "auto":
                raise UserError(
                    f"picture of mode {image.mode}: its range is unknown; say it with load(range='0 4095') or "
                    "pass a uint8 array [H, W, 3]"
                )
            return _from_array(to_bytes(np.asarray(image), range, where=f"picture of mode {image.mode}"))
        return _not_empty(np.array(image.convert("RGB")))
    if isinstance(image, np.ndarray):
        if image.dtype == np.uint16 and range != "auto" and image.size:
            image = to_bytes(image, range, where=f"array of {image.dtype}")
        return _from_array(image)
    if type(image).__module__.partition(".")[0] == "torch":
        return _from_tensor(image)
    raise UserError(
        f"cannot predict on {type(image).__name__}: give a path, the bytes of a file, a PIL image, a uint8 array "
        "[H, W, 3] or a uint8 tensor [3, H, W]"
        + ("; cv2.imread gives None where it cannot read a file" if image is None else "")
    )


class ImageBytes(io.BytesIO):
    """An image file in memory, with the name that messages give it."""

    def __init__(self, content: bytes, name: str) -> None:
        super().__init__(content)
        self.name = name

    def __str__(self) -> str:
        return str(self.name)

    __repr__ = __str__  # Pillow's errors show it

    def again(self) -> io.BytesIO:
        """The same content from its beginning, for a second reader while the first is not done."""
        return io.BytesIO(self.getvalue())

    @classmethod
    def of(cls, source: Any) -> ImageBytes:
        """The whole content of bytes, or of a file object from where it stands.

        Raises:
            UserError: a file opened as text, or nothing (left) to read.
        """
        name = getattr(source, "name", None)
        name = printable(name) if isinstance(name, str) else f"{type(source).__name__} of an image"
        try:
            content = source.read() if hasattr(source, "read") else bytes(source)
        except UnicodeDecodeError:
            content = ""
        except (OSError, ValueError) as error:
            raise UserError(f"{name}: cannot be read ({error}); open it with mode 'rb'") from error
        if not isinstance(content, bytes | bytearray | memoryview):
            raise UserError(f"{name}: gives text, not bytes; open the file with mode 'rb'")
        if not len(content):
            raise UserError(f"{name}: holds no bytes; if it has been read before, call seek(0) first")
        return cls(bytes(content), name)


def _from_array(image: NDArray[Any]) -> NDArray[np.uint8]:
    shape = tuple(image.shape)
    if image.dtype != np.uint8:
        raise UserError(
            f"array of {image.dtype} {list(shape)}: need uint8 0..255; for floats 0..1 use (x * 255).astype('uint8')"
        )
    if image.ndim == 2:
        return _not_empty(np.repeat(image[:, :, None], 3, axis=2))
    if image.ndim == 3 and shape[2] in (1, 3):
        three = image if shape[2] == 3 else np.repeat(image, 3, axis=2)
        return _not_empty(np.require(three, requirements=["C", "W"]))  # writable: torch warns of views that are not
    hint = "; this looks like channels first: use .transpose(1, 2, 0)" if image.ndim == 3 and shape[0] in (1, 3) else ""
    raise UserError(f"array of shape {list(shape)}: need [H, W, 3] RGB or [H, W] grey{hint}")


def _from_tensor(image: Any) -> NDArray[np.uint8]:
    shape = list(image.shape)
    kind = str(image.dtype).removeprefix("torch.")
    if kind != "uint8":
        raise UserError(f"tensor of {kind} {shape}: need uint8 0..255; for floats 0..1 use (x * 255).to(torch.uint8)")
    if len(shape) == 3 and shape[0] in (1, 3):
        return _not_empty(np.ascontiguousarray(image.expand(3, -1, -1).permute(1, 2, 0).cpu().numpy()))
    hint = "; this looks like channels last: use .permute(2, 0, 1)" if len(shape) == 3 and shape[2] in (1, 3) else ""
    hint = "; give a batch as a list of images" if len(shape) == 4 else hint
    raise UserError(f"tensor of shape {shape}: need [3, H, W] RGB or [1, H, W] grey{hint}")


def _not_empty(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    if min(pixels.shape[:2]) == 0:
        raise UserError(f"image of {pixels.shape[1]}x{pixels.shape[0]} pixels: there is nothing to look at")
    return pixels


def read_upright(
    path: Path | ImageBytes, *, max_pixels: int = DEFAULT_MAX_PIXELS, range: str = "auto"
) -> NDArray[np.uint8]:
    """Decode a file to uint8 [H, W, 3] RGB, turned upright by its EXIF orientation."""
    if isinstance(path, Path) and path.is_dir():
        raise DataError(f"{printable(path)}: is a folder; give its files, or use the predict command")
    if isinstance(path, Path) and not path.exists():
        raise DataError(f"{printable(path)}: no such file; check the name")
    return read_pixels(path, max_pixels=max_pixels, range=range)
