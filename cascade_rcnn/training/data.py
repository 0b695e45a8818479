"""The images of a training: to learn from and to evaluate on."""

from __future__ import annotations

import dataclasses

from cascade_rcnn import distributed
from cascade_rcnn.check.images import check_image
from cascade_rcnn.config import Config, DataConfig
from cascade_rcnn.data.dataset import DetectionDataset
from cascade_rcnn.data.files import is_file
from cascade_rcnn.data.formats.open import open_split
from cascade_rcnn.data.orientation import refuse_undecided
from cascade_rcnn.data.problems import KINDS, Problems
from cascade_rcnn.data.records import DataSplit, ImageRecord
from cascade_rcnn.errors import DataError
from cascade_rcnn.messages import few_names, printable
from cascade_rcnn.training.log import RunLog


def training_dataset(config: Config, split: DataSplit) -> DetectionDataset:
    """The split as the network sees it in training.

    Raises DataError if there is nothing to learn, or no mask for a recipe with mask heads.
    """
    masks = config.model.masks != "none"
    if masks and not split.has_masks:
        raise DataError(
            f"{split.root}: the recipe has mask heads, split {split.name!r} has no masks; use a box recipe "
            "such as cascade_rcnn_r50_fpn_1x_coco, or --model.masks none"
        )
    images = config.data
    if config.train.compile and images.pad_buckets is None:
        images = dataclasses.replace(images, pad_buckets=True)
    return DetectionDataset(split, images, training=True, masks=masks, semantics=config.model.semantics)


def open_validation(config: Config, log: RunLog) -> DataSplit:
    """The split to evaluate on, without the images that cannot be used, which are named.

    An evaluation reads every image: one that is missing or damaged would end the training after its first epoch.
    Raises DataError where more than ``train.max_bad_images`` or all of them cannot be used.
    """
    split = open_split(config.data.root, config.data.val, orientation=config.data.orientation)
    refuse_undecided(split, config.data.orientation)
    found = unusable_images(split, config.data) if distributed.rank() == 0 else {}
    unusable = distributed.broadcast(found)
    if not unusable:
        return split
    limit = config.train.max_bad_images
    reasons = few_names(unusable.values(), most=3)
    how_many = f"{len(unusable)} of the {len(split)} images of split {split.name!r}"
    if len(unusable) == len(split) or len(unusable) > limit:
        raise DataError(
            f"{printable(split.root)}: {how_many} cannot be used (train.max_bad_images is {limit}): {reasons}; "
            "'cascade-rcnn check' lists all; --train.evaluate-every 0 trains without evaluation"
        )
    log.say(f"{how_many} cannot be used and are left out of every evaluation: {reasons}")
    usable = [record for row, record in enumerate(split.records) if row not in unusable]
    return dataclasses.replace(split, records=usable)


def unusable_images(split: DataSplit, data: DataConfig) -> dict[int, str]:
    """The rows of a split's images that an evaluation could not read, as ``check`` finds them, with the reason."""
    reasons = {row: _problem(split, record, data) for row, record in enumerate(split.records)}
    return {row: reason for row, reason in reasons.items() if reason}


def _problem(split: DataSplit, record: ImageRecord, data: DataConfig) -> str:
    if not is_file(record.path):
        return f"{printable(record.path)} is not there"
    problems = Problems(strict=False)
    check_image(record, split.format, problems, data=data)
    errors = [problem for problem in problems.items if KINDS[problem.kind].severity == "error"]
    return f"{errors[0].message}" if errors else ""
