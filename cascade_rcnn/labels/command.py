"""``cascade-rcnn check DATA --model CHECKPOINT``, ``check DATA --folds 3``: which annotations are probably wrong."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from cascade_rcnn.config import Config, DataConfig
from cascade_rcnn.data.formats.open import describe_split, disjoint_splits, open_split
from cascade_rcnn.data.records import DataSplit
from cascade_rcnn.errors import UserError
from cascade_rcnn.inference.detector import Detector, load
from cascade_rcnn.labels.evidence import Evidence
from cascade_rcnn.labels.folds import judge_by_folds, small_recipe
from cascade_rcnn.labels.judge import judge_split
from cascade_rcnn.labels.rank import Suspect, rank
from cascade_rcnn.labels.report import show, write_tables
from cascade_rcnn.labels.review import write_review
from cascade_rcnn.labels.sheet import draw_sheet
from cascade_rcnn.messages import few_names, printable
from cascade_rcnn.progress import progress_bar

_OURS = ("labels.csv", "labels.json", "suspects.png", "review")  # what an earlier run has left is replaced


@dataclass(frozen=True)
class LabelCheck:
    """What ``run_label_check`` goes by."""

    model: Path | None = None  # checkpoint that judges, or with folds: whose recipe they train
    folds: int = 0  # 0: the checkpoint itself judges
    recipe: Config | None = None  # of the folds; None: the checkpoint's, else the small one
    out: Path = Path("label_errors")
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
    out = settings.out
    _refuse_foreign(out)
    split = open_split(root, "+".join(disjoint_splits(root)), strict=False)
    print(f"{printable(root)}: {describe_split(split)}")
    evidence, data = _judge(split, settings)
    suspects = rank(evidence)
    out.mkdir(parents=True, exist_ok=True)
    _remove_earlier(out)
    show(split, suspects)
    write_tables(split, suspects, out)
    draw_sheet(split, suspects, data=data).save(out / "suspects.png")
    write_review(split, suspects, out / "review", data=data)
    print(f"all {len(suspects):,} in {printable(out)}")
    return suspects


def _judge(split: DataSplit, settings: LabelCheck) -> tuple[list[Evidence], DataConfig]:
    """The evidence on each image, and how pictures were read."""
    if settings.folds:
        recipe = settings.recipe or (_load(settings).config if settings.model else small_recipe())
        evidence = judge_by_folds(split, settings.folds, recipe, settings.out / "folds", device=settings.device)
        return evidence, recipe.data
    detector = _load(settings)
    if line := _has_seen(detector.config.data, split):
        print(f"{printable(settings.model)} {line}", file=sys.stderr)
    with progress_bar(len(split)) as advance:
        evidence = []
        for one in judge_split(detector, split):
            evidence.append(one)
            advance(1)
    return evidence, detector.config.data


def _load(settings: LabelCheck) -> Detector:
    assert settings.model is not None
    return load(settings.model, device=settings.device)


def _has_seen(trained: DataConfig, split: DataSplit) -> str:
    """A line of warning where the checkpoint was trained on these very data."""
    if not trained.root or Path(trained.root).resolve() != split.root.resolve():
        return ""
    return (
        f"was trained on split {trained.train!r} of these data: it has learnt some of their errors, and finds fewer "
        "of them there; with --folds 3 no image is judged by a model that saw it"
    )


def _refuse_foreign(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"{printable(out)}: is a file; give a folder as --out")
    strange = [path.name for path in sorted(out.iterdir()) if path.name not in (*_OURS, "folds")] if out.exists() else []
    if strange:
        raise UserError(f"{printable(out)}: holds other things ({few_names(strange, most=3)}); give a new folder as --out")


def _remove_earlier(out: Path) -> None:
    """What an earlier check has written; the folds' trainings stay, to be used again."""
    for name in _OURS:
        path = out / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
