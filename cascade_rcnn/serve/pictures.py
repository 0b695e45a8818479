"""Pictures from strangers: bounded in bytes, frames and pixels before anything is decoded."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from cascade_rcnn.data.images import quiet_pillow
from cascade_rcnn.errors import UserError
from cascade_rcnn.messages import one_line

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")  # a phone's MPO opens as JPEG


class PictureTooLargeError(UserError):
    """More pixels than the service decodes."""


MAX_SCANS = 200  # of a progressive JPEG; encoders write some ten, and each costs a pass over all pixels

_T = TypeVar("_T")


def size_of(content: bytes, *, max_pixels: int) -> tuple[int, int]:
    """Width and height as the file says, without decoding. Raises as :func:`decode`."""
    return _opened(content, max_pixels, lambda picture: picture.size)


def decode(content: bytes, *, max_pixels: int) -> NDArray[np.uint8]:
    """Pixels uint8 [H, W, 3] RGB, upright. Raises PictureTooLargeError; UserError: no picture, damaged, not 8 bits."""
    return _opened(content, max_pixels, lambda picture: np.array(ImageOps.exif_transpose(picture).convert("RGB")))


def _opened(content: bytes, max_pixels: int, use: Callable[[Image.Image], _T]) -> _T:
    if not content:
        raise UserError("the file is empty")
    Image.init()
    with quiet_pillow():
        try:
            with Image.open(io.BytesIO(content), formats=[kind for kind in FORMATS if kind in Image.OPEN]) as picture:
                width, height = picture.size
                if width * height > max_pixels:
                    raise PictureTooLargeError(f"{width} x {height} pixels: at most {max_pixels} are accepted")
                if picture.mode[0] in "IF":
                    raise UserError(f"mode {picture.mode}: its range is unknown; send 8 bits per channel")
                if picture.format in ("JPEG", "MPO") and content.count(b"\xff\xda") > MAX_SCANS:
                    raise UserError(f"a JPEG of more than {MAX_SCANS} scans: save it anew")
                return use(picture)
        except UnidentifiedImageError as error:
            raise UserError(f"no picture of a known kind ({', '.join(FORMATS)})") from error
        except UserError:
            raise
        except Exception as error:  # Pillow's decoders raise nearly anything for damaged files
            raise UserError(f"damaged ({one_line(error)[:120]})") from error
