"""``cascade-rcnn check DATA --model CHECKPOINT``, ``check DATA --folds 3``: which annotations are probably wrong."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cascade_rcnn.config import Config, DataConfig, Orientation
from cascade_rcnn.data.formats.open import describe_split, disjoint_splits, open_split
from cascade_rcnn.data.records import DataSplit
from cascade_rcnn.data.split_levels import with_range
from cascade_rcnn.errors import DataError, UserError
from cascade_rcnn.inference.detector import Detector, load
from cascade_rcnn.labels.evidence import Evidence
from cascade_rcnn.labels.folds import judge_by_folds, small_recipe
from cascade_rcnn.labels.judge import judge_split, refuse_whole_pixels
from cascade_rcnn.labels.rank import Suspect, found_again, rank
from cascade_rcnn.labels.report import show, write_tables
from cascade_rcnn.labels.review import write_review
from cascade_rcnn.labels.sheet import draw_sheet
from cascade_rcnn.messages import few_names, printable
from cascade_rcnn.progress import progress_bar
from cascade_rcnn.runtime.network import exported_file
from cascade_rcnn.training.data import unusable_images

_KNOWS_ENOUGH = 0.6  # share of the annotations that are found again
_OURS = ("labels.csv", "labels.json", "suspects.png", "review")  # what an earlier run has left is replaced


@dataclass(frozen=True)
class LabelCheck:
    """What ``run_label_check`` goes by."""

    model: Path | None = None  # checkpoint that judges, or with folds: whose recipe they train
    folds: int = 0  # 0: the checkpoint itself judges
    recipe: Config | None = None  # of the folds; None: the checkpoint's, else the small one
    out: Path = Path("label_errors")
    orientation: Orientation | None = None  # None: as the checkpoint or the recipe has it
    range: str | None = None
    device: str = "auto"


def run_label_check(root: Path, settings: LabelCheck) -> list[Suspect]:
    """The command: prints the first suspects of each kind, and writes all of them below ``settings.out``.

    ``labels.csv`` and ``labels.json``, the contact sheet ``suspects.png``, and ``review/`` for CVAT and Label Studio.
    The data set itself is only read.

    Raises:
        UserError: neither model nor folds, an ``out`` that holds other things, data or a checkpoint that do not fit.
    """
    if settings.model is None and not settings.folds:
        raise UserError("nothing to judge the labels by: give --model CHECKPOINT or --folds 3")
    if settings.folds == 1:
        raise UserError("--folds 1: no image would be left to learn from; give 2 or more, or --model alone")
    if settings.model is not None and exported_file(settings.model) is not None:
        raise UserError(
            f"{printable(settings.model)}: an exported network cannot be asked about given boxes; give the checkpoint "
            "that it was made from"
        )
    out = settings.out
    _refuse_foreign(out)
    detector = load(settings.model, device=settings.device) if settings.model is not None else None
    recipe = settings.recipe or (detector.config if detector else None)
    if recipe is not None:
        refuse_whole_pixels(recipe)
    usual = (recipe or small_recipe(1)).data
    data = replace(usual, orientation=settings.orientation or usual.orientation, range=settings.range or usual.range)
    split = open_split(root, "+".join(disjoint_splits(root)), strict=False, orientation=data.orientation)
    print(f"{printable(root)}: {describe_split(split)}")
    split = _usable(split, data)
    if settings.folds:
        data, _ = with_range(data, split)
        learnt = len(split) * (settings.folds - 1) // settings.folds
        recipe = replace(recipe or small_recipe(learnt), data=data)
        evidence = judge_by_folds(split, settings.folds, recipe, out / "folds", device=settings.device)
    else:
        assert detector is not None
        detector.config = replace(detector.config, data=data)
        evidence = _judge(detector, split)
    suspects = rank(evidence)
    _say_how_good(evidence)
    out.mkdir(parents=True, exist_ok=True)
    _remove_earlier(out)
    write_tables(split, suspects, out)
    if suspects:
        draw_sheet(split, suspects, data=data).save(out / "suspects.png")
        write_review(split, suspects, out / "review", data=data)
        show(split, suspects)
    _say_where(split, suspects, out)
    return suspects


def _usable(split: DataSplit, data: DataConfig) -> DataSplit:
    """The split without the images that cannot be read, which are named: folds would end an hour later."""
    reasons = unusable_images(split, data)
    if len(reasons) == len(split):
        raise DataError(
            f"{printable(split.root)}: none of the {len(split)} images can be used, the first: "
            f"{next(iter(reasons.values()), 'there is none')}; 'cascade-rcnn check' without a model lists them"
        )
    if reasons:
        print(
            f"{len(reasons):,} of {len(split):,} images cannot be used and are left out: "
            f"{few_names(reasons.values(), most=3)}",
            file=sys.stderr,
        )
    return replace(split, records=[record for row, record in enumerate(split.records) if row not in reasons])


def _judge(detector: Detector, split: DataSplit) -> list[Evidence]:
    """What the checkpoint itself says; it is told where it has seen these labels before."""
    trained = detector.config.data
    if trained.root and Path(trained.root).resolve() == split.root.resolve():
        print(
            f"the checkpoint was trained on split {trained.train!r} of these data: it has learnt some of their errors "
            "and finds fewer of them there; with --folds 3 no image is judged by a model that saw it",
            file=sys.stderr,
        )
    evidence = []
    with progress_bar(len(split)) as advance:
        for one in judge_split(detector, split):
            evidence.append(one)
            advance(1)
    return evidence


def _say_how_good(evidence: Sequence[Evidence]) -> None:
    """A judge that knows little takes most boxes for boxes around nothing."""
    share = found_again(evidence)
    print(f"{share:.0%} of the annotated boxes are found again with their class")
    if share < _KNOWS_ENOUGH:
        print(
            "that is too little to trust what is suspected: give a better --model, or with --folds a --config that "
            "trains longer",
            file=sys.stderr,
        )


def _say_where(split: DataSplit, suspects: Sequence[Suspect], out: Path) -> None:
    folder = printable(out)
    if not suspects:
        print(f"no annotation looks wrong; {folder} has the empty tables")
        return
    images = len({suspect.image for suspect in suspects})
    print(f"{len(suspects):,} suspects in {images:,} images; the annotations are as they were. Written to {folder}:")
    print("  labels.csv, labels.json  every suspect;  suspects.png  the first of each kind")
    print("  review/  for CVAT (annotations.xml) and Label Studio (tasks.json): docs/labels.md says how to open it")
    if split.has_masks:
        print("  the data have masks; only their boxes were looked at, and review/ holds boxes alone")


def _refuse_foreign(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"{printable(out)}: is a file; give a folder as --out")
    there = sorted(path.name for path in out.iterdir()) if out.exists() else []
    if strange := [name for name in there if name not in (*_OURS, "folds")]:
        raise UserError(f"{printable(out)}: holds other things ({few_names(strange, most=3)}); give a new --out")


def _remove_earlier(out: Path) -> None:
    """What an earlier check has written; the folds' trainings stay, to be used again."""
    for name in _OURS:
        path = out / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
