"""How many planted label errors ``cascade-rcnn check DATA --folds 3`` finds, beside ObjectLab on the same detections.

    python3 -m pip install cleanlab matplotlib
    python3 benchmarks/label_errors.py --weights lite0.safetensors --data bccd=BCCD --data nuclei=NUCLEI@train:0-40

Errors are planted (``label_plant.py`` says which), three detectors are trained on the data as they then are, and each
image is judged by the one that has not seen it. Of every kind of error n are planted; the table says how many of the
first n suspects are among them (precision at n), the average precision of the ranking, and how many of the planted ones
are among the first 2 n. A missed object counts as found by a box that overlaps it by half.

ObjectLab (Tkachenko et al., "ObjectLab: automated diagnosis of mislabeled images in object detection data", 2023) is
cleanlab's own code, once with its own limits of the detections' scores and once with the best, by AP, of several that
are tried for each kind: small detectors are seldom as sure as its own limits want. It has no score for doubled boxes or
boxes around nothing: there its closest one stands, "swap" and "badloc". What the data's annotators have done wrong
counts against both.

``lite0.safetensors`` is what ``benchmarks/lite0.py`` makes. ``--work`` keeps trainings and evidence: a second call with
the same settings only ranks.
"""

from __future__ import annotations

import argparse
import pickle
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from label_plant import Planted, plant, write_planted

from cascade_rcnn.config import Config
from cascade_rcnn.data.formats.open import disjoint_splits, open_split
from cascade_rcnn.data.records import DataSplit
from cascade_rcnn.labels.evidence import Evidence, iou_matrix
from cascade_rcnn.labels.folds import judge_by_folds, small_recipe
from cascade_rcnn.labels.rank import KINDS, suspects_of

SIZES = {"bccd": (224, 320, 6), "nuclei": (256, 384, 5), "coco": (224, 320, 10)}  # short and long side, epochs
USUAL = (0.95, 0.5)  # ObjectLab's own limits of detections' scores: for "overlooked" and "swap", and for "badloc"
SURE, LEAST = (0.3, 0.5, 0.7), (0.1, 0.3)  # others that are tried
Ranking = list[tuple[float, bool, float]]  # score, whether it is a planted one, size of the object


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", action="append", required=True, metavar="NAME=DIR[@SPLIT]", help=", ".join(SIZES))
    parser.add_argument("--weights", type=Path, help="ImageNet weights of the backbone (none: random)")
    parser.add_argument("--work", type=Path, default=Path("label_errors_work"), metavar="DIR")
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="of what is planted")
    args = parser.parse_args(words)
    for entry in args.data:
        name, _, place = entry.partition("=")
        root, _, splits = place.partition("@")
        split, planted, evidence = gather(name, Path(root), splits, args)
        print(f"\n{name}: {len(split)} images, {sum(len(one) for one in evidence)} annotations\n")
        print(table(split, planted, evidence))


def gather(name: str, root: Path, splits: str, args: argparse.Namespace) -> tuple[DataSplit, Planted, list[Evidence]]:
    """Plant, train, judge; from the cache where that was done."""
    work = args.work / f"{name}-{args.seed}"
    split, planted = plant(open_split(root, splits or "+".join(disjoint_splits(root))), seed=args.seed)
    cache = work / "evidence.pkl"
    if not cache.exists():
        write_planted(split, planted, work / "planted")
        evidence = judge_by_folds(split, args.folds, _recipe(name, args.weights), work)
        cache.write_bytes(pickle.dumps(evidence))
    return split, planted, pickle.loads(cache.read_bytes())


def _recipe(name: str, weights: Path | None) -> Config:
    recipe, (short, long, epochs) = small_recipe(1), SIZES[name]
    model = replace(recipe.model, backbone_weights=str(weights or ""), pretrained=weights is not None)
    if weights is None:
        model = replace(model, norm="batch")
    data = replace(recipe.data, short_side=(short,), long_side=long, vertical_flip=0.5 * (name != "coco"), workers=0)
    return replace(recipe, model=model, data=data, train=replace(recipe.train, epochs=epochs, log_every=25))


def table(split: DataSplit, planted: Planted, evidence: Sequence[Evidence]) -> str:
    """Precision at n, average precision and recall at 2 n, for each kind and for each third of the sizes."""
    ours = our_rankings(planted, evidence)
    inputs = objectlab_inputs(evidence, len(split.class_names))
    theirs = {limits: objectlab_rankings(planted, inputs, *limits) for limits in [USUAL, *product(SURE, LEAST)]}
    usual = theirs[USUAL]
    best = {
        kind: max((one[kind] for one in theirs.values()), key=lambda ranking: measure(ranking, planted.count(kind))[1])
        for kind in KINDS
        if planted.count(kind)
    }
    lines = [
        "| kind | n | check: P@n, AP, R@2n | ObjectLab | at its best limits |",
        "|---|--:|---|---|---|",
    ]
    for kind in best:
        count = planted.count(kind)
        measured = [measure(each[kind], count) for each in (ours, usual, best)]
        cells = [", ".join(f"{value:.2f}" for value in values) for values in measured]
        lines.append(f"| {kind} | {count} | {' | '.join(cells)} |")
    lines += [
        "",
        "| found among the first n: check / ObjectLab at its best | small | medium | large |",
        "|---|--:|--:|--:|",
    ]
    for kind in best:
        mine, other = (by_size(planted, kind, each[kind]) for each in (ours, best))
        cells = [f"{a} / {b} of {n}" for (a, n), (b, _) in zip(mine, other)]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def measure(ranking: Ranking, count: int) -> tuple[float, float, float]:
    """(precision at n, average precision, recall at 2 n) of a ranking for ``count`` planted errors."""
    right = np.array([hit for _, hit, _ in sorted(ranking, key=lambda one: -one[0])], dtype=np.float64)
    found = np.cumsum(right)
    precision = found / np.arange(1, len(right) + 1)
    at = [found[min(place, len(right)) - 1] / count if len(right) else 0.0 for place in (count, 2 * count)]
    return float(at[0]), float((precision * right).sum() / count), float(at[1])


def by_size(planted: Planted, kind: str, ranking: Ranking) -> list[tuple[int, int]]:
    """Of each third of the planted errors by size: how many are among the first n, and how many there are."""
    if kind == "missed":
        sizes = np.array([_side(box) for _, box, _ in planted.missed])
    else:
        sizes = np.array(list(planted.rows[kind].values()))
    edges = [0, *np.quantile(sizes, (1 / 3, 2 / 3)), np.inf]
    first = sorted(ranking, key=lambda one: -one[0])[: len(sizes)]
    found = np.array([size for _, hit, size in first if hit])
    return [
        (int(((found > low) & (found <= high)).sum()), int(((sizes > low) & (sizes <= high)).sum()))
        for low, high in pairwise(edges)
    ]


def _side(box: Sequence[float]) -> float:
    return float(np.sqrt((box[2] - box[0]) * (box[3] - box[1])))


# Rankings


def our_rankings(planted: Planted, evidence: Sequence[Evidence]) -> dict[str, Ranking]:
    rankings: dict[str, Ranking] = {}
    for kind in KINDS:
        found = suspects_of(kind, evidence)
        if kind == "missed":
            rankings[kind] = _missed(planted, [(one.score, one.image, list(one.proposed_box or ())) for one in found])
        else:
            rankings[kind] = _of_rows(planted, kind, [(one.score, one.image, one.row) for one in found])
    return rankings


def _of_rows(planted: Planted, kind: str, found: Sequence[tuple[float, int, int]]) -> Ranking:
    rows = planted.rows[kind]
    return [(score, (image, row) in rows, rows.get((image, row), 0.0)) for score, image, row in found]


def _missed(planted: Planted, found: Sequence[tuple[float, int, list[float]]]) -> Ranking:
    """Each planted object is found once, by the best box that overlaps it by half."""
    left: dict[int, list[list[float]]] = {}
    for image, box, _ in planted.missed:
        left.setdefault(image, []).append(box)
    ranking: Ranking = []
    for score, image, box in sorted(found, key=lambda one: -one[0]):
        there = left.get(image, [])
        overlap = iou_matrix(np.array([box]), np.array(there))[0] if there else np.zeros(0)
        hit = bool(len(overlap)) and overlap.max() >= 0.5
        ranking.append((score, bool(hit), _side(there.pop(int(overlap.argmax()))) if hit else 0.0))
    return ranking


def objectlab_inputs(evidence: Sequence[Evidence], classes: int) -> Any:
    """What all of cleanlab's scores start from: similarities of annotations and detections."""
    from cleanlab.object_detection import rank as cleanlab

    labels = [{"bboxes": one.annotated.boxes, "labels": one.labels} for one in evidence]
    return cleanlab._get_valid_inputs_for_compute_scores(0.9, labels, [_by_class(one, classes) for one in evidence])


def objectlab_rankings(planted: Planted, inputs: Any, sure: float, least: float) -> dict[str, Ranking]:
    """cleanlab's scores are low where something is wrong; what it gives no score is no candidate.

    ``sure`` and ``least`` are its ``high_probability_threshold`` ("overlooked", "swap") and
    ``low_probability_threshold`` ("badloc"): detections of a lower score are not looked at.
    """
    from cleanlab.object_detection import rank as cleanlab

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        overlooked = cleanlab.compute_overlooked_box_scores(auxiliary_inputs=inputs, high_probability_threshold=sure)
        badloc = cleanlab.compute_badloc_box_scores(auxiliary_inputs=inputs, low_probability_threshold=least)
        swap = cleanlab.compute_swap_box_scores(auxiliary_inputs=inputs, high_probability_threshold=sure)
    missed = [
        (1 - float(score), image, box.tolist())
        for image, (scores, one) in enumerate(zip(overlooked, inputs))
        for score, box in zip(scores, one["pred_bboxes"])
        if not np.isnan(score)
    ]
    rows = {
        name: [(1 - float(score), image, row) for image, scores in enumerate(each) for row, score in enumerate(scores)]
        for name, each in (("badloc", badloc), ("swap", swap))
    }
    closest = {"shifted": "badloc", "class": "swap", "doubled": "swap", "nothing": "badloc"}
    rankings = {kind: _of_rows(planted, kind, rows[name]) for kind, name in closest.items()}
    return rankings | {"missed": _missed(planted, missed)}


def _by_class(one: Evidence, classes: int) -> Any:
    """An image's detections as cleanlab takes them: for each class its boxes and scores [D, 5]."""
    rows = np.concatenate([one.found.boxes, one.scores[:, None]], axis=1)
    each = np.empty(classes, dtype=object)
    for label in range(classes):
        each[label] = rows[one.found_labels == label]
    return each


if __name__ == "__main__":
    main()
