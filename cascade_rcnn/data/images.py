"""Image files to uint8 RGB pixels, with the size checked before anything is decoded.

Pillow decodes: it reads every format that data sets come in, its JPEG decoder is the one that torchvision uses (equal
bytes, equal speed on 158 COCO images), and torchvision's own decoders are deprecated since 0.29.

The EXIF orientation is NOT applied. Annotations count pixels of the file as it is stored (COCO's ``width`` and
``height`` do), and a reader that silently turned the picture would shift every box; ``cascade-rcnn check`` names
images whose orientation tag disagrees with their annotation.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from cascade_rcnn.errors import DataError

DEFAULT_MAX_PIXELS = 100_000_000


def read_image(path: str | Path, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> Tensor:
    """Decode an image file: uint8 [3, H, W], RGB, stored channels-last.

    Grey, palette, alpha (dropped), CMYK and 16-bit files (their high byte) become RGB; of an animation the first frame.

    Raises:
        DataError: missing, unreadable, truncated, of a kind that is no picture, or above ``max_pixels`` by its header.
    """
    with _opened(path, max_pixels) as picture:
        pixels = _rgb(picture, path)
    return torch.from_numpy(pixels).permute(2, 0, 1)  # a view: [3, H, W] over [H, W, 3] in memory


def read_size(path: str | Path, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> tuple[int, int]:
    """(height, width) from the header alone; raises as ``read_image`` does."""
    with _opened(path, max_pixels) as picture:
        return picture.height, picture.width


@contextmanager
def _opened(path: str | Path, max_pixels: int) -> Iterator[Image.Image]:
    """Open by header, refuse what is too large, and turn whatever a decoder may raise into one line."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # max_pixels is the limit here, not Pillow's
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on odd metadata, which has no say over the pixels
            with Image.open(path) as picture:
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
    finally:
        Image.MAX_IMAGE_PIXELS = limit


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
