"""What happens to an image between file and network: resize, jitter and crop, flip, colour.

H, W: (height, width) of the image at hand; G objects. Every step changes pixels and boxes together and writes down, per
output row and column, which source row and column it shows; masks follow later, object by object (``masks.py``).
Pixels go through torchvision's transforms v2, in uint8 and channels-last (twice as fast as planar).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from cascade_rcnn.config import DataConfig, SemanticsName
from cascade_rcnn.data.exact_resize import resize_like_opencv, resize_to_float, resize_with_pillow
from cascade_rcnn.data.masks import nearest_indices
from cascade_rcnn.data.sizes import Interpolation, detectron_scale, detectron_size, fitted_size, interpolation

SMALLEST_CROPPED_BOX = 1.0  # pixels; what a random crop leaves of an object below this is not learnt


@dataclass(slots=True)
class Sample:
    """An image on its way through the transforms."""

    image: Tensor  # uint8 [3, H, W]; float32 after the interpolation "float"
    boxes: NDArray[np.floating[Any]]  # [G, 4] xyxy in pixels of the image; arithmetic stays in the precision given
    keep: NDArray[np.bool_]  # [G], False where a crop has cut the object away
    rows: NDArray[np.int64]  # [H], source row shown in each row
    cols: NDArray[np.int64]  # [W], source column shown in each column
    canvas: tuple[int, int]  # (height, width) of the source that rows and columns count in: where masks are drawn
    scale: float | None = None  # of both axes, where they share one (Detectron)

    @staticmethod
    def of(image: Tensor, boxes: NDArray[np.floating[Any]]) -> Sample:
        """A sample before any transform."""
        height, width = image.shape[-2:]
        return Sample(
            image, boxes.copy(), np.ones(len(boxes), dtype=bool), np.arange(height), np.arange(width), (height, width)
        )

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)"""
        return int(self.image.shape[-2]), int(self.image.shape[-1])


def resize_as_detectron(sample: Sample, short_side: int, long_side: int, how: Interpolation) -> Sample:
    """Resize by one factor; a box's last pixel is scaled, not its end. Masks are drawn at the new size.

    Objects of one pixel's width or height are not kept. The polygons of an image that is already flipped move one
    original pixel to the left, as in Detectron, which flips them like its boxes though they end between pixels.
    """
    scale = detectron_scale(sample.size, short_side, long_side)
    size = detectron_size(sample.size, scale)
    one = np.array([0, 0, 1, 1], dtype=sample.boxes.dtype)
    boxes = (sample.boxes - one) * sample.boxes.dtype.type(scale) + one
    keep = sample.keep & (sample.boxes[:, 2:] - sample.boxes[:, :2] > 1).all(axis=1)
    rows, cols = np.arange(size[0]), np.arange(size[1])
    if sample.rows[0] > sample.rows[-1]:
        rows = rows[::-1]
    if sample.cols[0] > sample.cols[-1]:
        cols = cols[::-1] - round(scale)  # columns below 0 show nothing
    return Sample(resize_pixels(sample.image, size, how, scale), boxes, keep, rows, cols, size, scale)


def resize(sample: Sample, size: tuple[int, int], how: Interpolation = "fast") -> Sample:
    """Bilinear for pixels; boxes by each side's own factor; masks by nearest neighbour, or drawn at the new size where
    pixels are antialiased (detectron2's way).
    """
    height, width = sample.size
    factor = np.array([size[1] / width, size[0] / height] * 2, dtype=sample.boxes.dtype)
    limit = np.array([size[1], size[0]] * 2, dtype=sample.boxes.dtype)
    pixels, boxes = resize_pixels(sample.image, size, how), np.clip(sample.boxes * factor, 0, limit)
    if how in ("antialias", "pillow") and sample.canvas == sample.size:
        return Sample(pixels, boxes, sample.keep, np.arange(size[0]), np.arange(size[1]), size)
    rows, cols = nearest_indices(height, size[0]), nearest_indices(width, size[1])
    return replace(sample, image=pixels, boxes=boxes, rows=sample.rows[rows], cols=sample.cols[cols])


def resize_pixels(image: Tensor, size: tuple[int, int], how: Interpolation, scale: float = 0.0) -> Tensor:
    """uint8 [3, H, W] to uint8 [3, *size], bilinear; to float32 with ``how`` "float", which goes by ``scale``."""
    if tuple(image.shape[-2:]) == size:
        return image.float() if how == "float" else image
    if how == "opencv":
        return resize_like_opencv(image, size)
    if how == "float":
        return resize_to_float(image, size, scale)
    if how == "pillow":
        return resize_with_pillow(image, size)
    resized: Tensor = F.resize_image(image, list(size), antialias=how == "antialias")
    return resized


def crop(sample: Sample, top: int, left: int, height: int, width: int) -> Sample:
    """The part that starts at (top, left), at most (height, width) large; objects with nothing left are not kept."""
    bottom, right = min(top + height, sample.size[0]), min(left + width, sample.size[1])
    origin = np.array([left, top] * 2, dtype=sample.boxes.dtype)
    limit = np.array([right - left, bottom - top] * 2, dtype=sample.boxes.dtype)
    boxes = np.clip(sample.boxes - origin, 0, limit)
    visible = (boxes[:, 2:] - boxes[:, :2] >= SMALLEST_CROPPED_BOX).all(axis=1)
    return Sample(
        sample.image[:, top:bottom, left:right],
        boxes,
        sample.keep & visible,
        sample.rows[top:bottom],
        sample.cols[left:right],
        sample.canvas,
        sample.scale,
    )


def flip_horizontal(sample: Sample) -> Sample:
    """Mirror left and right."""
    width = sample.size[1]
    boxes = sample.boxes.copy()
    boxes[:, 0], boxes[:, 2] = width - sample.boxes[:, 2], width - sample.boxes[:, 0]
    return replace(sample, image=F.horizontal_flip_image(sample.image), boxes=boxes, cols=sample.cols[::-1])


def flip_vertical(sample: Sample) -> Sample:
    """Mirror top and bottom."""
    height = sample.size[0]
    boxes = sample.boxes.copy()
    boxes[:, 1], boxes[:, 3] = height - sample.boxes[:, 3], height - sample.boxes[:, 1]
    return replace(sample, image=F.vertical_flip_image(sample.image), boxes=boxes, rows=sample.rows[::-1])


def photometric(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Random brightness, contrast, saturation, hue and channel order (torchvision's, SSD's ranges)."""
    with torch.random.fork_rng(devices=[]):  # torchvision draws from torch's own generator: seed it from ours
        torch.manual_seed(int(rng.integers(2**31)))
        distorted: Tensor = v2.RandomPhotometricDistort()(image)
    return distorted


def _fitted(sample: Sample, short_side: int, long_side: int, how: Interpolation, semantics: SemanticsName) -> Sample:
    if semantics == "paper":
        return resize_as_detectron(sample, short_side, long_side, how)
    return resize(sample, fitted_size(sample.size, short_side, long_side), how)


def large_scale_jitter(
    sample: Sample,
    config: DataConfig,
    rng: np.random.Generator,
    how: Interpolation,
    semantics: SemanticsName = "mmdetection",
) -> Sample:
    """Fit the image into a square of ``long_side`` times a random factor, then crop to the square at random.

    What is smaller than the square stays so and is padded by the loader (Ghiasi et al., arXiv 2012.07177).
    """
    assert config.large_scale_jitter is not None
    low, high = config.large_scale_jitter
    side = max(int(config.long_side * rng.uniform(low, high) + 0.5), 1)
    sample = _fitted(sample, side, side, how, semantics)
    spare = [max(length - config.long_side, 0) for length in sample.size]
    top, left = (int(rng.integers(length + 1)) for length in spare)
    if not any(spare):
        return sample
    return crop(sample, top, left, config.long_side, config.long_side)


def resize_and_crop(sample: Sample, config: DataConfig, rng: np.random.Generator, how: Interpolation) -> Sample:
    """The crop before the usual resize, by which DETR (arXiv 2005.12872), Swin and ConvNeXt enlarge a part.

    Shorter side one of ``crop_short_side``, then height and width of the crop within ``crop_range``, and not above the
    image's; objects need not be left.
    """
    short_side = config.crop_short_side[int(rng.integers(len(config.crop_short_side)))]
    sample = resize(sample, fitted_size(sample.size, short_side, max(config.long_side, short_side)), how)
    low, high = config.crop_range
    height, width = (int(rng.integers(min(low, side), min(high, side) + 1)) for side in sample.size)
    top, left = (int(rng.integers(side - part + 1)) for side, part in zip(sample.size, (height, width)))
    return crop(sample, top, left, height, width)


def train_transform(
    sample: Sample, config: DataConfig, rng: np.random.Generator, *, semantics: SemanticsName = "mmdetection"
) -> Sample:
    """Crop, resize (one size, a choice, a range or jitter at large scale), flip, colour; random numbers from ``rng``.

    Detectron flips first: its boxes are mirrored within the original's pixels.
    """
    how = interpolation(config, semantics, training=True)
    if semantics == "paper":
        sample = _flip_at_random(sample, config, rng)
    if config.large_scale_jitter is not None:
        sample = large_scale_jitter(sample, config, rng, how, semantics)
    else:
        if config.crop and rng.random() < config.crop:
            sample = resize_and_crop(sample, config, rng, how)
        if config.short_side_mode == "range":
            short_side = int(rng.integers(min(config.short_side), max(config.short_side) + 1))
        else:
            short_side = config.short_side[int(rng.integers(len(config.short_side)))]
        sample = _fitted(sample, short_side, config.long_side, how, semantics)
    if semantics != "paper":
        sample = _flip_at_random(sample, config, rng)
    if config.photometric:
        sample.image = photometric(sample.image, rng)
    return sample


def _flip_at_random(sample: Sample, config: DataConfig, rng: np.random.Generator) -> Sample:
    if rng.random() < config.flip:
        sample = flip_horizontal(sample)
    if rng.random() < config.vertical_flip:
        sample = flip_vertical(sample)
    return sample


def test_transform(sample: Sample, config: DataConfig, *, semantics: SemanticsName = "mmdetection") -> Sample:
    """Resize to the size of test time."""
    short_side = config.test_short_side or max(config.short_side)
    how = interpolation(config, semantics, training=False)
    return _fitted(sample, short_side, config.long_side, how, semantics)


def resize_for_test(
    image: Tensor, config: DataConfig, *, semantics: SemanticsName = "mmdetection"
) -> tuple[Tensor, tuple[float, float]]:
    """An image as evaluation and prediction feed it.

    Args:
        image: uint8 [3, H, W].

    Returns:
        The resized image, uint8 [3, H', W'] (float32 as in the authors' release), and the factors (W' / W, H' / H) that
        take boxes there (theirs are equal).
    """
    sample = test_transform(Sample.of(image, np.zeros((0, 4))), config, semantics=semantics)
    if sample.scale is not None:
        return sample.image, (sample.scale, sample.scale)
    height, width = image.shape[-2:]
    return sample.image, (sample.size[1] / width, sample.size[0] / height)
