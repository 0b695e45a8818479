"""Image files become uint8 RGB pixels, with the size checked before anything is decoded.

Pillow decodes: it reads every
format that data sets come in, its JPEG decoder is the one that torchvision uses (equal bytes, equal speed on 158 COCO
images), and torchvision's own decoders are deprecated since 0.29.

The EXIF orientation is NOT applied. Annotations count pixels of the file as it is stored (COCO's ``width`` and
``height`` do), and a reader that silently turned the picture would shift every box; ``cascade-rcnn check`` names
images whose orientation tag disagrees with their annotation.
"""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

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
_EXIF_ORIENTATION = 0x0112


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


def read_image(path: str | Path | ImageBytes, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> Tensor:
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
def _opened(path: str | Path | ImageBytes, max_pixels: int) -> Iterator[Image.Image]:
    """Open by header, refuse what is too large, and turn whatever a decoder may raise into one line."""
    from PIL import Image

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


def _rgb(picture: Image.Image, path: str | Path | ImageBytes) -> NDArray[np.uint8]:
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


def to_array(image: Any, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> NDArray[np.uint8]:
    """Pixels uint8 [H, W, 3] RGB of a file, a ``PIL.Image``, uint8 array [H, W, 3] or [H, W], uint8 tensor [3, H, W].

    A file may be a path, its bytes, or an object that gives them (``open(..., "rb")``, ``io.BytesIO``). It is turned
    upright by its EXIF orientation, as every viewer shows it; a picture or array is taken as it is.

    Raises:
        UserError: another type, dtype or shape, or a file that is missing, damaged or above ``max_pixels``.
    """
    if isinstance(image, bytes | bytearray | memoryview) or hasattr(image, "read"):
        return read_upright(ImageBytes.of(image), max_pixels=max_pixels)
    if isinstance(image, str | Path):
        return read_upright(Path(image), max_pixels=max_pixels)
    if isinstance(image, Image.Image):
        if image.mode[0] in "IF":
            raise UserError(f"picture of mode {image.mode}: its range is unknown; pass a uint8 array [H, W, 3]")
        return _not_empty(np.array(image.convert("RGB")))
    if isinstance(image, np.ndarray):
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
        self._name = name

    def __str__(self) -> str:
        return self._name

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


def read_upright(path: Path | ImageBytes, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> NDArray[np.uint8]:
    """Decode a file to uint8 [H, W, 3] RGB, turned upright by its EXIF orientation."""
    if isinstance(path, Path) and path.is_dir():
        raise DataError(f"{printable(path)}: is a folder; give its files, or use the predict command")
    if isinstance(path, Path) and not path.exists():
        raise DataError(f"{printable(path)}: no such file; check the name")
    pixels: NDArray[np.uint8] = read_image(path, max_pixels=max_pixels).permute(1, 2, 0).numpy()
    turned = pixels.swapaxes(0, 1) if (orientation := _orientation(path)) in (5, 6, 7, 8) else pixels
    if orientation in (3, 4, 7, 8):
        turned = turned[::-1]
    if orientation in (2, 3, 6, 7):
        turned = turned[:, ::-1]
    return np.ascontiguousarray(turned)


def _orientation(path: Path | ImageBytes) -> int:
    """EXIF orientation 1..8; 1, upright, where there is none or it cannot be read (the pixels could be)."""
    try:
        with Image.open(path) as picture:
            return int(picture.getexif().get(_EXIF_ORIENTATION, 1))
    except (OSError, ValueError, SyntaxError, TypeError, Image.DecompressionBombError):
        return 1
