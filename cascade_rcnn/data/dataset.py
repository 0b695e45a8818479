"""From records to samples: the annotations of a split in flat arrays, and one image of it as the network sees it.

I images, N objects, G objects of one image. 118,000 images and 860,000 objects as Python objects cost gigabytes, and
every worker process that touches their reference counts copies them; flat arrays are shared by all workers and cost
their bytes once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from cascade_rcnn.config import DataConfig, SemanticsName
from cascade_rcnn.data.augment import Augmentation, AugmentError
from cascade_rcnn.data.copy_paste import paste_objects
from cascade_rcnn.data.images import read_image
from cascade_rcnn.data.item import Item as Item  # importable from here too
from cascade_rcnn.data.item import Window as Window
from cascade_rcnn.data.masks import decode_window, pack_segmentations, transform_window
from cascade_rcnn.data.mosaic import SCALES, mosaic
from cascade_rcnn.data.orientation import FORMATS_WITHOUT_SIZES, OrientationError, annotated_size, view_decider
from cascade_rcnn.data.records import DataSplit, ImageRecord
from cascade_rcnn.data.sizes import fitting
from cascade_rcnn.data.transforms import Sample, test_transform, train_transform
from cascade_rcnn.errors import DataError

_REPLACEMENTS = 20  # images tried in place of an unreadable one before giving up


class SampleKey(NamedTuple):
    """What a dataset needs to make a sample: the index of an image, and the seed of its augmentation."""

    image: int
    seed: tuple[int, ...] = ()


def read_record(record: ImageRecord, split_format: str, config: DataConfig) -> Tensor:
    """The picture of a record as its labels count it, uint8 [3, H, W]: what training and evaluation see, and drawings.

    Raises:
        DataError: as ``read_image``; a size that differs from the annotation's; ``OrientationError`` where nothing
            decides the view.
    """
    view = view_decider(
        annotated_size(record, split_format),
        config.orientation,
        path=str(record.path),
        sizeless=split_format in FORMATS_WITHOUT_SIZES,
    )
    return read_image(record.path, max_pixels=config.max_pixels, frame=view, range=config.range)


class DetectionDataset(Dataset[Item]):
    """Images of a split as the network sees them.

    Only flat arrays are kept, not the split's records, so that worker processes share them. Boxes without width or
    height are dropped (``degenerate`` counts them). Ignore regions become ``Targets.ignore`` with
    ``config.ignore_regions``, else they are left out, i.e. background, as mmdetection treats COCO's crowds.
    """

    def __init__(
        self,
        split: DataSplit,
        config: DataConfig,
        *,
        training: bool,
        masks: bool = False,
        semantics: SemanticsName = "mmdetection",
        canvas: tuple[int, int] | None = None,
    ) -> None:
        """``masks``: give instance masks too, where the split has them. ``canvas``: the largest (height, width) of test
        time, of an exported network; images are fitted into it.

        Raises:
            DataError: no images, or no image with objects where ``config.keep_empty`` is False; no masks where
                ``config.copy_paste`` needs them.
        """
        self.config, self.training, self.semantics, self.canvas = config, training, semantics, canvas
        self._sizeless = split.format in FORMATS_WITHOUT_SIZES
        self.class_names = split.class_names
        self.masks = masks and split.has_masks
        self._pastes = training and config.copy_paste > 0
        self.packed = pack_records(
            split.records,
            masks=self.masks or (self._pastes and split.has_masks),
            keep_ignored=config.ignore_regions,
            keep_empty=config.keep_empty or not training,
        )
        if not len(self.packed):
            what = "images" if not split.records else "images with objects to learn (and data.keep_empty is False)"
            raise DataError(f"{split.root}: split {split.name!r} has no {what}")
        self._augmentation: Augmentation | None = None  # of this process
        if training and config.augment:
            self._augmentation = Augmentation(config.augment)
        self._donors = self.packed.images_with_masks() if self._pastes else np.zeros(0, np.int64)
        if self._pastes and not len(self._donors):
            raise DataError(
                f"{split.root}: data.copy_paste {config.copy_paste} cuts objects out along their masks, and split "
                f"{split.name!r} has none; set data.copy_paste 0, or data.large_scale_jitter instead"
            )

    def __len__(self) -> int:
        return len(self.packed)

    @property
    def degenerate(self) -> int:
        """Boxes that were dropped for having no width or height within their image."""
        return self.packed.dropped

    def __getitem__(self, key: SampleKey | int) -> Item:
        """One image by its index, or in training by index and seed.

        An image that cannot be read is listed in the item's ``bad``. In training another one stands in for it;
        otherwise the item is black, and what is found in it is to be left out.

        Raises:
            DataError: in training, none of the images tried in its place can be read either.
        """
        key = SampleKey(key) if isinstance(key, int) else key
        if not self.training:
            return self._load_or_black(key.image)
        index, bad = key.image, []
        for attempt in range(_REPLACEMENTS):
            rng = np.random.default_rng((*key.seed, attempt))
            try:
                item = self._mosaic(index, rng) if self._is_mosaic(rng) else self._load(index, rng, self._read(index))
            except (OrientationError, AugmentError):
                raise  # of which another picture would not free the user
            except DataError as error:
                bad.append((self.packed.path(index), str(error)))
                index = int(rng.integers(len(self)))  # another image, so that the batch keeps its size
                continue
            if self._pastes:
                item = self._with_pasted(item, rng)
            item.bad = bad + item.bad
            return item
        raise DataError(f"{bad[0][1]} ({_REPLACEMENTS} images in a row could not be used)")

    def _is_mosaic(self, rng: np.random.Generator) -> bool:
        return self.config.mosaic > 0 and rng.random() < self.config.mosaic

    def _mosaic(self, index: int, rng: np.random.Generator) -> Item:
        """The image with three others at random, as large as it would be alone; unreadable ones leave grey."""
        factor = rng.uniform(*SCALES)
        own, items, bad = self.config, [self._load_at(factor, index, rng)], []
        size = [min(round(side / factor), own.long_side) for side in items[0].image.shape[1:]]
        shorter = size.index(min(size))
        size[shorter] = min(size[shorter], max(own.short_side))  # rounded twice, it may be a pixel more
        others: list[Item | None] = []
        for other in rng.integers(len(self), size=3).tolist():
            try:
                others.append(self._load_at(factor, other, rng))
            except (OrientationError, AugmentError):
                raise
            except DataError as error:
                bad.append((self.packed.path(other), str(error)))
                others.append(None)
        made = mosaic([*items, *others], (size[0], size[1]), rng)
        made.bad = bad + made.bad
        return made

    def _load_at(self, factor: float, index: int, rng: np.random.Generator) -> Item:
        sides = tuple(max(round(side * factor), 32) for side in self.config.short_side)
        smaller = replace(self.config, short_side=sides, long_side=max(round(self.config.long_side * factor), *sides))
        return self._load(index, rng, self._read(index), smaller)

    def _with_pasted(self, item: Item, rng: np.random.Generator) -> Item:
        """By chance with objects of another image; as it is where that one cannot be read, which ``bad`` then says."""
        if rng.random() < self.config.copy_paste:
            index = int(self._donors[rng.integers(len(self._donors))])
            try:
                item = paste_objects(item, self._load(index, rng, self._read(index)), rng)
            except (OrientationError, AugmentError):
                raise
            except DataError as error:
                item.bad = [(self.packed.path(index), str(error))]
        return item if self.masks else replace(item, masks=None)

    def _load_or_black(self, index: int) -> Item:
        try:
            image, bad = self._read(index), []
        except OrientationError:
            raise
        except DataError as error:
            image, bad = torch.zeros((3, 32, 32), dtype=torch.uint8), [(self.packed.path(index), str(error))]
        item = self._load(index, None, image)
        item.bad = bad
        return item

    def __getitems__(self, keys: Sequence[SampleKey | int]) -> list[Item] | DataError:
        """A batch of items for the loader; an error travels as a value, so that its one line stays one line."""
        try:
            return [self[key] for key in keys]
        except DataError as error:
            return DataError(str(error))

    def _read(self, index: int) -> Tensor:
        path = self.packed.path(index)
        annotated = self.packed.annotated_size(index) if not self._sizeless else None
        view = view_decider(annotated, self.config.orientation, path=path, sizeless=self._sizeless)
        return read_image(path, max_pixels=self.config.max_pixels, frame=view, range=self.config.range)

    def _load(
        self, index: int, rng: np.random.Generator | None, image: Tensor, config: DataConfig | None = None
    ) -> Item:
        """Transform an image with its objects: at random with a generator, as for the test without."""
        size, decode = (int(image.shape[1]), int(image.shape[2])), self.masks or self._pastes
        start, end = self.packed.offsets[index : index + 2].tolist()
        # mmdetection scales boxes in float32, detectron2 in float64: where overlaps tie, the last bit decides.
        precision = np.float64 if self.semantics == "detectron2" else np.float32
        sample = Sample.of(image, self.packed.boxes[start:end].numpy().astype(precision))
        if rng is None:
            sample = test_transform(sample, fitting(self.config, size, self.canvas), semantics=self.semantics)
        else:
            sample = train_transform(sample, config or self.config, rng, semantics=self.semantics)
        kept = np.flatnonzero(sample.keep & (sample.boxes[:, 2:] > sample.boxes[:, :2]).all(axis=1))
        item = Item(
            image=sample.image,
            original_size=size,
            image_id=self.packed.image_id(index),
            path=self.packed.path(index),
            boxes=sample.boxes[kept].astype(np.float32),
            labels=self.packed.labels[start:end].numpy()[kept].astype(np.int64),
            ignore=self.packed.ignore[start:end].numpy()[kept],
            masks=[self._mask(index, start + int(row), size, sample) for row in kept] if decode else None,
            scale=sample.scale,
        )
        return item if rng is None or self._augmentation is None else self._augmentation(item, rng)

    def _mask(self, index: int, row: int, size: tuple[int, int], sample: Sample) -> Window | None:
        try:
            window = decode_window(self.packed.segmentation(row), size, sample.canvas)
        except DataError as error:
            raise DataError(f"{self.packed.path(index)}: {error}") from None
        return None if window is None else transform_window(*window, sample.rows, sample.cols)


@dataclass
class PackedRecords:
    """The fields of all records that a loader needs. Tensors, because those can move to memory shared by processes."""

    boxes: Tensor  # float64 [N, 4], xyxy in original pixels, clipped to the image where its size is known
    labels: Tensor  # int32 [N]
    ignore: Tensor  # bool [N]
    offsets: Tensor  # int64 [I + 1], objects of image i: offsets[i] .. offsets[i + 1]
    sizes: Tensor  # int32 [I, 2], (height, width) by the annotation, else the file's, 0 where neither says
    sized: Tensor  # bool [I], the size is the annotation's own
    paths: Tensor  # uint8, UTF-8 of all paths (surrogateescape)
    path_offsets: Tensor  # int64 [I + 1]
    ids: Tensor  # uint8, all image ids, "i" + digits or "s" + text
    id_offsets: Tensor  # int64 [I + 1]
    segmentations: Tensor  # uint8, ``masks.pack_segmentations`` of all objects
    segmentation_offsets: Tensor  # int64 [N + 1]; [1] when there are no masks
    dropped: int = 0  # degenerate boxes left out
    ignored: int = 0  # ignore regions left out, treated as background

    def __len__(self) -> int:
        return len(self.sizes)

    def share(self) -> None:
        """Move the arrays to shared memory: a spawned worker then gets a handle instead of a copy."""
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, Tensor):
                value.share_memory_()  # type: ignore[no-untyped-call]

    def path(self, index: int) -> str:
        return _text(self.paths, self.path_offsets, index).decode("utf-8", "surrogateescape")

    def annotated_size(self, index: int) -> tuple[int, int] | None:
        """(height, width) where the annotation itself gives them: its boxes count pixels of an image of that size."""
        height, width = self.sizes[index].tolist()
        return (height, width) if self.sized[index] and height > 0 and width > 0 else None

    def image_id(self, index: int) -> int | str:
        kind, value = (text := _text(self.ids, self.id_offsets, index).decode())[0], text[1:]
        return int(value) if kind == "i" else value

    def segmentation(self, row: int) -> bytes:
        """Packed mask of an object by its row, b"" when there is none."""
        if len(self.segmentation_offsets) == 1:
            return b""
        return _text(self.segmentations, self.segmentation_offsets, row)

    def images_with_masks(self) -> NDArray[np.int64]:
        """Images with an object that has a mask, as a sorted array of indices."""
        if len(self.segmentation_offsets) == 1:
            return np.zeros(0, np.int64)
        drawn = np.diff(self.segmentation_offsets.numpy()) > 0
        images: NDArray[np.int64] = np.repeat(np.arange(len(self)), np.diff(self.offsets.numpy()))
        return np.unique(images[drawn])

    def shapes(self) -> NDArray[np.float64]:
        """Width over height of every image [I], 1 where the annotation does not say."""
        sizes = self.sizes.numpy().astype(np.float64)
        known = (sizes > 0).all(axis=1)
        return np.divide(sizes[:, 1], sizes[:, 0], out=np.ones(len(sizes)), where=known)


def pack_records(records: Iterable[ImageRecord], *, masks: bool, keep_ignored: bool, keep_empty: bool) -> PackedRecords:
    """Flatten records, without degenerate boxes (no width or height within the image).

    Args:
        masks: keep segmentations.
        keep_ignored: keep ignore regions as such; otherwise they are left out (treated as background).
        keep_empty: keep images without any object to learn.
    """
    boxes, labels, ignore, counts, sizes, sized = [], [], [], [], [], []
    paths, ids, segmentations = [], [], []
    dropped = ignored = 0
    for record in records:
        clipped = _clipped(record)
        solid = ((clipped[:, 2:] - clipped[:, :2]) > 0).all(axis=1)  # False for NaN too
        wanted = solid & (np.ones_like(solid) if keep_ignored else ~record.ignore)
        if not keep_empty and not (wanted & ~record.ignore).any():
            continue
        dropped += int((~solid).sum())
        ignored += int((solid & ~wanted).sum())
        rows = np.flatnonzero(wanted)
        boxes.append(clipped[rows])
        labels.append(record.labels[rows].astype(np.int32))
        ignore.append(record.ignore[rows])
        counts.append(len(rows))
        sizes.append((record.height, record.width))
        sized.append(record.sized)
        paths.append(str(record.path).encode("utf-8", "surrogateescape"))
        ids.append((f"i{record.image_id}" if isinstance(record.image_id, int) else f"s{record.image_id}").encode())
        if masks:
            given = record.segmentations or [None] * len(record.boxes)
            source = record.source or str(record.path)
            segmentations += pack_segmentations(
                [None if record.ignore[row] else given[row] for row in rows], source=source
            )
    flat_boxes = np.concatenate(boxes) if boxes else np.zeros((0, 4))
    return PackedRecords(
        boxes=torch.from_numpy(flat_boxes),
        labels=torch.from_numpy(np.concatenate(labels) if labels else np.zeros(0, np.int32)),
        ignore=torch.from_numpy(np.concatenate(ignore) if ignore else np.zeros(0, bool)),
        offsets=_offsets(counts),
        sizes=torch.tensor(sizes, dtype=torch.int32).reshape(-1, 2),
        sized=torch.tensor(sized, dtype=torch.bool),
        paths=_joined(paths),
        path_offsets=_offsets(map(len, paths)),
        ids=_joined(ids),
        id_offsets=_offsets(map(len, ids)),
        segmentations=_joined(segmentations),
        segmentation_offsets=_offsets(map(len, segmentations)),
        dropped=dropped,
        ignored=ignored,
    )


def _clipped(record: ImageRecord) -> NDArray[np.float64]:
    boxes = np.asarray(record.boxes, dtype=np.float64).reshape(-1, 4)
    if record.height <= 0 or record.width <= 0:
        return boxes
    return np.clip(boxes, 0, np.array([record.width, record.height] * 2, dtype=np.float64))


def _offsets(lengths: Iterable[int]) -> Tensor:
    return torch.from_numpy(np.cumsum(np.fromiter((0, *lengths), dtype=np.int64)))


def _joined(parts: list[bytes]) -> Tensor:
    return torch.from_numpy(np.frombuffer(b"".join(parts), dtype=np.uint8).copy())


def _text(buffer: Tensor, offsets: Tensor, index: int) -> bytes:
    start, end = offsets[index : index + 2].tolist()
    return buffer[start:end].numpy().tobytes()
