"""From evidence to suspicion: five ways in which an annotation can be wrong, each with a score of its own in 0..1.

S stages, K classes, G annotated objects, D detections. Everything here is arrays in, scores out. What a cascade adds to
the usual comparison with detections: each annotated box has gone through the stages as a proposal. So we know where
three regressors in a row would rather have it, and what three classifiers, trained at rising IoU, say of it as it
stands and as it is moved. The formulas are as simple as they could be; ``benchmarks/label_errors.py`` measures them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.optimize import linear_sum_assignment

from cascade_rcnn.labels.evidence import Evidence, Floats, Ints, iou_matrix, iou_of_pairs, share_inside

Kind = Literal["missed", "class", "shifted", "doubled", "nothing"]
KINDS: tuple[Kind, ...] = ("missed", "class", "shifted", "doubled", "nothing")
Box = tuple[float, float, float, float]

LISTED_FROM = 0.5  # score
# What a formula below gives where every second suspect was an error that had been planted (benchmarks/label_errors.py):
# a power of each takes this to 0.5, so that scores of different kinds can be compared.
_EVERY_SECOND: dict[Kind, float] = {"missed": 0.5, "class": 0.2, "shifted": 0.3, "doubled": 0.45, "nothing": 0.98}
_TOUCHES = 0.1  # IoU from which a detection may be what an annotation means


@dataclass(frozen=True)
class Suspect:
    """One annotation that is probably wrong, or an object that nobody annotated."""

    kind: Kind
    score: float  # 0..1; from 0.5 on about every second one is an error, or more
    image: int  # row of the image
    row: int  # of the annotation in its image; -1 of a missed object
    box: Box | None  # as annotated, xyxy in original pixels; None of a missed object
    label: int  # as annotated; -1 of a missed object
    proposed_box: Box | None  # None: remove the annotation
    proposed_label: int


@dataclass(frozen=True)
class Explained:
    """Annotations and detections of an image, paired one to one: what is left over on either side stands out."""

    overlap: Floats  # [G], IoU of an annotation with its detection, 0 where none is left for it
    surety: Floats  # [G], score of that detection
    free: Floats  # [D], 1 for a detection that is nobody's, else 0


def rank(evidence: Sequence[Evidence]) -> list[Suspect]:
    """All suspects from ``LISTED_FROM`` on, by kind and falling score; an annotation is listed once, for its worst.

    ``evidence`` is one image after the other; ``Suspect.image`` counts them.
    """
    listed = [one for one in suspects_of("missed", evidence) if one.score >= LISTED_FROM]
    worst: dict[tuple[int, int], Suspect] = {}
    for kind in KINDS[1:]:
        for one in suspects_of(kind, evidence):
            before = worst.get((one.image, one.row))
            if one.score >= LISTED_FROM and (before is None or one.score > before.score):
                worst[one.image, one.row] = one
    listed += worst.values()
    return sorted(listed, key=lambda one: (KINDS.index(one.kind), -one.score, one.image, one.row))


def suspects_of(kind: Kind, evidence: Sequence[Evidence]) -> list[Suspect]:
    """Every candidate of one kind, however weak, the most suspicious first."""
    found = (one for image, one_image in enumerate(evidence) for one in _candidates(kind, image, one_image))
    return sorted(found, key=lambda one: -one.score)


def _candidates(kind: Kind, image: int, evidence: Evidence) -> Iterator[Suspect]:
    scores = _SCORES[kind](evidence) ** (np.log(0.5) / np.log(_EVERY_SECOND[kind]))
    if kind == "missed":
        boxes, labels = evidence.found.boxes, evidence.found_labels
        for row, score in enumerate(scores):
            if score > 0:
                yield Suspect(kind, float(score), image, -1, None, -1, _box(boxes[row]), int(labels[row]))
        return
    other, moved = likelier_labels(evidence), evidence.annotated.moved[-1]
    for row in np.flatnonzero(~evidence.ignore).tolist():
        box, label = _box(evidence.annotated.boxes[row]), int(evidence.labels[row])
        proposed = {"class": box, "shifted": _box(moved[row])}.get(kind)
        proposed_label = int(other[row]) if kind == "class" else label
        yield Suspect(kind, float(scores[row]), image, row, box, label, proposed, proposed_label)


def _box(box: Floats) -> Box:
    x1, y1, x2, y2 = box.tolist()
    return x1, y1, x2, y2


def explain(evidence: Evidence) -> Explained:
    """Pair annotations with detections so that overlap times score is largest in all, whatever their classes."""
    overlap = iou_matrix(evidence.annotated.boxes, evidence.found.boxes)  # [G, D]
    usable = (overlap >= _TOUCHES) & ~evidence.ignore[:, None]
    worth = np.where(usable, overlap * evidence.scores, 0.0)
    rows, columns = linear_sum_assignment(worth, maximize=True)
    rows, columns = rows[worth[rows, columns] > 0], columns[worth[rows, columns] > 0]
    explained = Explained(np.zeros(len(evidence)), np.zeros(len(evidence)), np.ones(len(evidence.scores)))
    explained.overlap[rows] = overlap[rows, columns]
    explained.surety[rows] = evidence.scores[columns]
    explained.free[columns] = 0
    return explained


def missed_scores(evidence: Evidence) -> Floats:
    """How surely each detection [D] is an object that nobody annotated.

    It is left over when annotations and detections are paired, and covers none of the annotations, neither where they
    are nor where the cascade would have them (a badly placed box is another error than a missing one).
    """
    found, annotated = evidence.found.boxes, evidence.annotated
    covered = np.maximum(iou_matrix(found, annotated.boxes), iou_matrix(found, annotated.moved[-1]))
    covered = np.where(evidence.ignore, 0.0, covered)  # [D, G]; of these regions only the inside counts
    ignored = share_inside(found, annotated.boxes[evidence.ignore]).max(axis=1, initial=0) >= 0.5
    free = explain(evidence).free * ~ignored
    scores: Floats = evidence.scores * free * (1 - covered.max(axis=1, initial=0) ** 2)
    return scores


def class_scores(evidence: Evidence) -> Floats:
    """How surely each annotation [G] is of another class: what all stages say for the likeliest other one, and against
    its own.
    """
    probs = evidence.annotated.probs.mean(axis=0)  # [G, K]
    own = probs[np.arange(len(evidence)), evidence.labels]
    scores: Floats = _of_others(evidence).max(axis=1, initial=0) * (1 - own)
    return scores


def likelier_labels(evidence: Evidence) -> Ints:
    """The likeliest class [G] other than the annotated one; that itself where there is no other."""
    others = _of_others(evidence)
    return np.where(others.max(axis=1, initial=0) > 0, others.argmax(axis=1), evidence.labels)


def _of_others(evidence: Evidence) -> Floats:
    """Mean class probabilities [G, K], 0 for the annotated class."""
    others: Floats = evidence.annotated.probs.mean(axis=0)
    others[np.arange(len(evidence)), evidence.labels] = 0
    return others


def found_again(evidence: Sequence[Evidence]) -> float:
    """Share of all annotations that a detection of their class overlaps by half: whether the judge is any good."""
    total = hits = 0
    for one in evidence:
        same = one.labels[:, None] == one.found_labels
        overlap = np.where(same, iou_matrix(one.annotated.boxes, one.found.boxes), 0.0)
        hits += int((overlap.max(axis=1, initial=0) >= 0.5)[~one.ignore].sum())
        total += int((~one.ignore).sum())
    return hits / total if total else 1.0


def movement(evidence: Evidence) -> Floats:
    """How far [G] the stages move each annotated box: 1 minus its mean IoU with where each of them puts it."""
    annotated = evidence.annotated
    moved: Floats = 1 - iou_of_pairs(annotated.boxes[None], annotated.moved).mean(axis=0)
    return moved


def shifted_scores(evidence: Evidence) -> Floats:
    """How surely each box [G] lies badly, by three witnesses.

    The cascade moves it; the strictest classifier takes it for an object once it is moved, but not where it stands; the
    detection that is paired with it lies elsewhere.
    """
    explained, annotated = explain(evidence), evidence.annotated
    gained = annotated.probs[-1].sum(axis=1) - annotated.unmoved[-1].sum(axis=1)
    elsewhere = (1 - explained.overlap) * explained.surety
    scores: Floats = np.clip((movement(evidence) + 0.5 * gained + 0.5 * elsewhere) / 2, 0, 1)
    return scores


def doubled_scores(evidence: Evidence) -> Floats:
    """How surely each box [G] repeats another one: the cascade moves both to one place, this one from further away."""
    annotated, moves = evidence.annotated, movement(evidence)
    final = annotated.moved[-1]
    same = np.sqrt(iou_matrix(annotated.boxes, annotated.boxes) * iou_matrix(final, final))  # [G, G]
    np.fill_diagonal(same, 0)
    same[:, evidence.ignore] = 0
    worse = 1 / (1 + np.exp(-5 * (moves[:, None] - moves[None])))
    scores: Floats = (same * worse).max(axis=1, initial=0)
    return scores


def nothing_scores(evidence: Evidence) -> Floats:
    """How surely there is no object at each box [G].

    Even the laxest classifier, trained from IoU 0.5 on, sees none there. That no detection touches it counts a tenth of
    that.
    """
    annotated = evidence.annotated
    touched = iou_matrix(annotated.boxes, evidence.found.boxes).max(axis=1, initial=0)
    some = annotated.unmoved[0].sum(axis=1)
    scores: Floats = np.clip(1 - (some + 0.1 * touched) / 1.1, 0, 1)  # rounding may leave the range
    return scores


_SCORES: dict[Kind, Callable[[Evidence], Floats]] = {
    "missed": missed_scores,
    "class": class_scores,
    "shifted": shifted_scores,
    "doubled": doubled_scores,
    "nothing": nothing_scores,
}
