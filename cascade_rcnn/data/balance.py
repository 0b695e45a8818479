"""Images of rare classes more often: the repeat factors of LVIS (Gupta et al., arXiv 1908.03195, appendix B.1).

I images, N objects, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cascade_rcnn.data.dataset import PackedRecords
from cascade_rcnn.messages import few_names, printable


def class_factors(packed: PackedRecords, num_classes: int, threshold: float) -> NDArray[np.float64]:
    """How often each class wants its images [K]: max(1, sqrt(threshold / share of the images that show it)).

    Objects to ignore do not count. A class without any object has factor 1.
    """
    images, labels = _learnt(packed)
    shown = np.unique(images * num_classes + labels) % num_classes  # each class once for each image that shows it
    share = np.bincount(shown, minlength=num_classes) / max(len(packed), 1)
    wanted = np.sqrt(np.divide(threshold, share, out=np.ones(num_classes), where=share > 0))
    return np.maximum(wanted, 1.0)


def repeat_factors(packed: PackedRecords, num_classes: int, threshold: float) -> NDArray[np.float64]:
    """How often each image comes in an epoch on average [I]: as often as the rarest of its classes wants."""
    factors = np.ones(len(packed))
    images, labels = _learnt(packed)
    np.maximum.at(factors, images, class_factors(packed, num_classes, threshold)[labels])
    return factors


def about_repeats(packed: PackedRecords, class_names: Sequence[str], threshold: float) -> str:
    """One line that says what ``data.repeat_threshold`` changes."""
    factors = class_factors(packed, len(class_names), threshold)
    rare = [row for row in np.argsort(-factors, kind="stable").tolist() if factors[row] > 1]
    if not rare:
        return f"data.repeat_threshold {threshold:g}: every class is in more of the images than that; none is repeated"
    total = repeat_factors(packed, len(class_names), threshold).sum()
    names = few_names([f"{printable(class_names[row])} {factors[row]:.1f} times" for row in rare], most=5)
    return f"data.repeat_threshold {threshold:g}: an epoch has {total:.0f} images of {len(packed)}; images with {names}"


def draw_repeats(factors: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.int64]:
    """Images of one epoch, shuffled: each ``factors[i]`` times, rounded up or down at random so that the mean is right.

    The rounding is drawn for all images together (systematic sampling), so that the number of images is
    ``factors.sum()`` rounded up or down, and not by chance much larger or smaller.
    """
    order = rng.permutation(len(factors))
    ends = np.cumsum((factors % 1.0)[order])
    reached = np.floor(ends + rng.random()).astype(np.int64)
    counts = np.floor(factors[order]).astype(np.int64) + np.diff(reached, prepend=0)
    return rng.permutation(np.repeat(order, counts))


def _learnt(packed: PackedRecords) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Image and class of each object that is learnt."""
    images = np.repeat(np.arange(len(packed)), np.diff(packed.offsets.numpy()))
    learnt = ~packed.ignore.numpy()
    return images[learnt], packed.labels.numpy().astype(np.int64)[learnt]
