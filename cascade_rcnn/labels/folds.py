"""Cross-validation: each image is judged by a small detector that was trained on the others.

A detector that has seen a wrong label may have learnt it, and then agrees with it. With F folds the images are dealt
into F parts, and the detector of a part learns from the F - 1 others.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from cascade_rcnn.config import Config, DataConfig, ModelConfig, TrainConfig
from cascade_rcnn.data.formats.write import write_coco
from cascade_rcnn.data.records import DataSplit, ImageRecord
from cascade_rcnn.errors import DataError
from cascade_rcnn.inference.detector import load
from cascade_rcnn.labels.evidence import Evidence
from cascade_rcnn.labels.judge import judge_split
from cascade_rcnn.messages import printable
from cascade_rcnn.train import train


def small_recipe(images: int) -> Config:
    """What the folds train on so many images unless told otherwise, from ImageNet weights.

    Small enough for a processor: about 1,500 passes of an image, but every image twice. That is less than a detector
    needs to be good, and enough to see what is out of place.
    """
    return Config(
        model=ModelConfig(
            backbone="tf_efficientnet_lite0",
            frozen_stages=-1,
            fpn_channels=96,
            head_channels=256,
            anchor_scales=(4.0,),
            rpn_samples=128,
            roi_samples=128,
            train_proposals=500,
            test_proposals=500,
            max_detections=300,
        ),
        data=DataConfig(short_side=(320,), long_side=512, workers=2),
        train=TrainConfig(
            optimizer="adamw",
            lr=1e-3,
            weight_decay=0.05,
            norm_weight_decay=False,
            images_per_step=8,
            batch_size=8,
            warmup_steps=40,
            schedule="cosine",
            milestones=(),
            clip_grad_norm=10.0,
            epochs=min(20, max(2, round(1500 / max(1, images)))),
            evaluate_every=0,
        ),
    )


def deal(count: int, folds: int, *, seed: int = 0) -> NDArray[np.int64]:
    """The fold 0..F-1 of each of ``count`` images: at random, their sizes differing by one at most."""
    return np.random.default_rng(seed).permutation(count) % folds


def judge_by_folds(split: DataSplit, folds: int, recipe: Config, out: Path, *, device: str = "auto") -> list[Evidence]:
    """Train ``folds`` detectors below ``out`` and give the evidence on each image, in the split's order.

    A fold whose training is done is not trained again, one that was interrupted goes on; other annotations, images or
    settings make a folder of their own.

    Raises:
        DataError: fewer images than folds; whatever the training refuses.
    """
    if len(split) < folds:
        raise DataError(f"{printable(split.root)}: {len(split)} images for {folds} folds; give fewer --folds")
    out = out / _fingerprint(split, folds, recipe)
    fold_of = deal(len(split), folds)
    write_parts(split, fold_of, out / "data")
    evidence: dict[int, Evidence] = {}
    for fold in range(folds):
        rows = np.flatnonzero(fold_of == fold)
        print(f"fold {fold + 1} of {folds}: learns from {len(split) - len(rows):,} images, judges {len(rows):,}")
        others = "+".join(f"fold{other}" for other in range(folds) if other != fold)
        checkpoint = _train(recipe, out / "data", others, out / f"without_fold{fold}", device)
        detector = load(checkpoint, device=device)
        part = replace(split, records=[split.records[row] for row in rows])
        evidence |= dict(zip(rows.tolist(), judge_split(detector, part)))
    return [evidence[row] for row in range(len(split))]


def _fingerprint(split: DataSplit, folds: int, recipe: Config) -> str:
    """Of all that the trainings depend on: what was learnt from old labels must not judge the new ones."""
    digest = hashlib.sha256(repr((folds, recipe, split.class_names)).encode())
    for record in split.records:
        digest.update(f"{record.path}\n{record.height} {record.width}\n".encode("utf-8", "surrogateescape"))
        for values in (record.boxes, record.labels, record.ignore):
            digest.update(values.tobytes())
    return digest.hexdigest()[:12]


def write_parts(split: DataSplit, fold_of: NDArray[np.int64], out: Path) -> None:
    """The images of each fold as a COCO split ``fold0``, ``fold1``, ...; pictures are linked."""
    for fold in range(int(fold_of.max()) + 1):
        records = [_renamed(split.records[row], row) for row in np.flatnonzero(fold_of == fold).tolist()]
        write_coco(replace(split, name=f"fold{fold}", format="coco", records=records), out)


def _renamed(record: ImageRecord, row: int) -> ImageRecord:
    """Under a name that tells it apart, even where two splits have files of the same name."""
    name = f"{row:06d}_{PurePosixPath(record.file_name.replace(chr(92), '/')).name}"
    crowds = {key: value for key, value in record.attributes.items() if key == "iscrowd"}
    return replace(record, file_name=name, image_id=row + 1, attributes=crowds)


def _train(recipe: Config, root: Path, splits: str, out: Path, device: str) -> Path:
    config = replace(
        recipe,
        data=replace(recipe.data, root=str(root), train=splits, val=splits),
        train=replace(recipe.train, evaluate_every=0),
    )
    return train(config, out=out, resume=out.exists(), device=None if device == "auto" else device)
