"""Augmentations of the user's own: a Python file with one ``transform``, of Albumentations or any function like it.

H, W: (height, width); G objects. The file is the user's code and is run, once in each loader process.
"""

from __future__ import annotations

import random
import runpy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cascade_rcnn.data.item import Item, Window, trimmed
from cascade_rcnn.errors import ConfigError, DataError
from cascade_rcnn.messages import one_line, printable, shown

Transform = Callable[..., Mapping[str, Any]]
_LEAST_VISIBLE = 0.1  # of an object's box; what a crop or rotation leaves of an object below this is not learnt


class AugmentError(DataError):
    """The user's transform fails or gives something else than an image with its boxes: no other image would help."""


class Augmentation:
    """The transform of a file, applied to items."""

    def __init__(self, path: str) -> None:
        """Raises ConfigError where the file cannot be used."""
        self._path = path
        self._transform, self._seed = _prepared(_load(path), path)

    def __call__(self, item: Item, rng: np.random.Generator) -> Item:
        """The item as the transform makes it, the same for the same state of ``rng``. Raises AugmentError."""
        image = np.ascontiguousarray(item.image.permute(1, 2, 0).numpy())  # [H, W, 3]
        given: dict[str, Any] = {
            "image": image,
            "bboxes": item.boxes.astype(np.float64),
            "rows": np.arange(len(item.boxes)),
        }
        drawn = [row for row, mask in enumerate(item.masks or []) if mask is not None]
        if drawn:
            windows = [window for window in item.masks or [] if window is not None]
            given["masks"] = [_whole(window, (image.shape[0], image.shape[1])) for window in windows]
        with _seeded(int(rng.integers(2**31)), self._seed):
            try:
                made = self._transform(**given)
            except (Exception, SystemExit) as error:  # whatever the user's code raises
                raise self._error(f"{type(error).__name__}: {one_line(error)}", item) from error
        pixels = made.get("image") if isinstance(made, Mapping) else None
        if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
            raise self._error(f"gives {_described(pixels)} as image, not uint8 [H, W, 3]{_HINT}", item)
        if not pixels.size:
            raise self._error(f"gives a picture without pixels, {list(pixels.shape)}", item)
        try:
            boxes = np.asarray(made["bboxes"], np.float32).reshape(-1, 4)
            numbers = np.asarray(made["rows"]).reshape(-1)
            rows = numbers.astype(np.int64)
            masks = dict(zip(drawn, made["masks"], strict=True)) if drawn else {}
        except (KeyError, TypeError, ValueError) as error:
            raise self._error(
                f"gives back other bboxes, rows or masks than it was given ({one_line(error)})", item
            ) from error
        if len(rows) != len(boxes) or not set(rows.tolist()) <= set(range(len(item.boxes))):
            raise self._error(f"gives {len(boxes)} bboxes and {len(rows)} rows, which must belong together", item)
        if (rows != numbers).any() or len(set(rows.tolist())) < len(rows):
            raise self._error("gives rows that come twice or are no whole numbers: one row for each box", item)
        if any(np.shape(mask) != pixels.shape[:2] for mask in masks.values()):
            raise self._error("gives masks of another size than its image", item)
        if reason := _wrong_boxes(boxes, pixels.shape[0], pixels.shape[1]):
            raise self._error(reason, item)
        return _taken_over(item, pixels, boxes, rows, masks)

    def __reduce__(self) -> tuple[type[Augmentation], tuple[str]]:
        """Loader processes run the file themselves: a function in it could not be sent to them."""
        return Augmentation, (self._path,)

    def _error(self, what: str, item: Item) -> AugmentError:
        return AugmentError(f"data.augment {printable(self._path)}: {what} (image {printable(item.path)})")


_INSTALL = "; pip install -U 'cascade-rcnn[albumentations]'"
_HINT = "; leave out Normalize and ToTensorV2, the network does both"


def _wrong_boxes(boxes: NDArray[np.float32], height: int, width: int) -> str:
    """What is wrong with boxes that a transform gives back; "" where nothing is."""
    if not np.isfinite(boxes).all():
        return "gives bboxes that are not finite"
    if len(boxes) and (np.abs(boxes) <= 1).all() and (boxes[:, 2:] - boxes[:, :2] < 1).any():  # no pixel wide
        return f"gives bboxes within 0 and 1 in a picture of {width} x {height}: give pixels (x1, y1, x2, y2)"
    outside = (boxes[:, 2:] <= boxes[:, :2]).any(axis=1)
    outside |= (boxes[:, 2:] <= 0).any(axis=1) | (boxes[:, :2] >= (width, height)).any(axis=1)
    if outside.any():
        shown_box = np.round(boxes[outside.argmax()], 1).tolist()
        return (
            f"gives the box {shown_box}, of which nothing is in its picture of {width} x {height}: give x1, y1, x2, y2 "
            "in pixels, and leave out objects that are gone, with their rows"
        )
    return ""


def _described(value: Any) -> str:
    shape = f" {list(value.shape)}" if hasattr(value, "shape") else ""
    return f"{getattr(value, 'dtype', type(value).__name__)}{shape}"


def _load(path: str) -> Any:
    if not Path(path).is_file():
        raise ConfigError(f"data.augment {shown(path)}: no such file; give a Python file with one 'transform'")
    try:
        content = runpy.run_path(path)
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        missing = isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == "albumentations"
        raise ConfigError(
            f"data.augment {printable(path)}: {type(error).__name__}: {one_line(error)}{_INSTALL if missing else ''}"
        ) from error
    if not callable(content.get("transform")):
        raise ConfigError(
            f"data.augment {printable(path)}: has no 'transform', an albumentations.Compose or a function"
        )
    return content["transform"]


def _prepared(transform: Any, path: str) -> tuple[Transform, Callable[[int], object] | None]:
    """The transform with our handling of boxes, and what seeds it; a plain function as it is."""
    try:
        import albumentations
    except ImportError:
        return transform, None
    if not isinstance(transform, albumentations.BasicTransform | albumentations.BaseCompose):
        return transform, None
    if not hasattr(albumentations.Compose, "set_random_seed"):
        version = getattr(albumentations, "__version__", "1")
        raise ConfigError(f"data.augment {printable(path)}: needs albumentations 2, and this is {version}{_INSTALL}")
    whole = isinstance(transform, albumentations.Compose)
    theirs = transform.processors["bboxes"].params if whole and "bboxes" in transform.processors else None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it wonders at boxes where no transform moves any
            boxes = albumentations.BboxParams(
                format="pascal_voc",
                label_fields=["rows"],
                clip=True,
                min_area=getattr(theirs, "min_area", 0.0),
                min_visibility=max(getattr(theirs, "min_visibility", 0.0), _LEAST_VISIBLE),
                min_width=max(getattr(theirs, "min_width", 0.0), 1),
                min_height=max(getattr(theirs, "min_height", 0.0), 1),
                check_each_transform=getattr(theirs, "check_each_transform", True),
                max_accept_ratio=getattr(theirs, "max_accept_ratio", None),
            )
            made = albumentations.Compose(
                transform.transforms if whole else [transform],
                bbox_params=boxes,
                p=transform.p if whole else 1.0,
                mask_interpolation=getattr(transform, "mask_interpolation", None),
            )
    except Exception as error:
        raise ConfigError(f"data.augment {printable(path)}: {type(error).__name__}: {one_line(error)}") from error
    return made, made.set_random_seed


@contextmanager
def _seeded(seed: int, own: Callable[[int], object] | None) -> Iterator[None]:
    """Python's, NumPy's and torch's global generators, and the transform's own, seeded; put back afterwards."""
    states = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    if own is not None:
        own(seed)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _whole(mask: Window, size: tuple[int, int]) -> NDArray[np.uint8]:
    """A mask [H, W] from its window."""
    pixels, top, left = mask
    whole = np.zeros(size, np.uint8)
    part = whole[max(top, 0) : top + pixels.shape[0], max(left, 0) : left + pixels.shape[1]]
    part[:] = (pixels > 0)[max(-top, 0) :, max(-left, 0) :][: part.shape[0], : part.shape[1]]
    return whole


def _taken_over(
    item: Item, pixels: NDArray[np.uint8], boxes: NDArray[np.float32], rows: NDArray[np.int64], masks: Mapping[int, Any]
) -> Item:
    """The item with the new picture; boxes of objects with a mask are no larger than what the mask shows."""
    height, width = pixels.shape[:2]
    boxes = np.clip(boxes, 0, np.array([width, height] * 2, np.float32))
    kept: list[int] = []
    windows: list[Window | None] = []
    for number, row in enumerate(rows.tolist()):
        window: Window | None = None
        if row in masks:
            drawn = (np.asarray(masks[row]) > 0).astype(np.uint8)
            if not drawn.any():
                continue
            window = trimmed(drawn, 0, 0)
            inner, top, left = window
            boxes[number, :2] = np.maximum(boxes[number, :2], (left, top))
            boxes[number, 2:] = np.minimum(boxes[number, 2:], (left + inner.shape[1], top + inner.shape[0]))
        if (boxes[number, 2:] - boxes[number, :2] >= 1).all():
            kept.append(number)
            windows.append(window)
    return replace(
        item,
        image=torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1),
        boxes=boxes[kept],
        labels=item.labels[rows[kept]],
        ignore=item.ignore[rows[kept]],
        masks=None if item.masks is None else windows,
    )
