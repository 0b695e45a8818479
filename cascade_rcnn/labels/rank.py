"""From evidence to suspicion: five ways in which an annotation can be wrong, each with a score of its own in 0..1.

S stages, K classes, G annotated objects, D detections. Everything here is arrays in, scores out. ``explain`` first pairs
annotations with detections one to one, so that what is left over on either side stands out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from cascade_rcnn.labels.evidence import Evidence, Floats, Followed, Ints, iou_matrix, iou_of_pairs, share_inside

Kind = Literal["missed", "shifted", "class", "doubled", "nothing"]
KINDS: tuple[Kind, ...] = ("missed", "class", "shifted", "doubled", "nothing")
Box = tuple[float, float, float, float]

_TOUCHES = 0.1  # IoU from which a detection may be what an annotation means


@dataclass(frozen=True)
class Suspect:
    """One annotation that is probably wrong, or an object that nobody annotated."""

    kind: Kind
    score: float  # 0..1, comparable within a kind
    image: int  # row of the image
    row: int  # of the annotation in its image; -1 of a missed object
    box: Box | None  # as annotated, xyxy in original pixels; None of a missed object
    label: int  # as annotated; -1 of a missed object
    proposed_box: Box | None  # None: remove the annotation
    proposed_label: int


@dataclass(frozen=True)
class Explained:
    """Annotations and detections of an image, paired one to one."""

    detection: Ints  # [G], -1 where none is left for it
    overlap: Floats  # [G], IoU with it, 0 without
    annotation: Ints  # [D], -1 where the detection is nobody's


def explain(evidence: Evidence) -> Explained:
    """Pair annotations with detections so that overlap times score is largest in all, whatever their classes."""
    overlap = iou_matrix(evidence.annotated.boxes, evidence.found.boxes)  # [G, D]
    overlap = np.where(evidence.ignore[:, None], 0.0, overlap)
    worth = np.where(overlap >= _TOUCHES, overlap * evidence.scores, 0.0)
    rows, columns = linear_sum_assignment(worth, maximize=True)
    paired = worth[rows, columns] > 0
    rows, columns = rows[paired], columns[paired]
    detection = np.full(len(evidence), -1)
    annotation = np.full(len(evidence.scores), -1)
    detection[rows], annotation[columns] = columns, rows
    best = np.zeros(len(evidence))
    best[rows] = overlap[rows, columns]
    return Explained(detection, best, annotation)


def objectness(followed: Followed) -> Floats:
    """Probability [N] that a box is some object: the mean over the stages."""
    total: Floats = followed.probs.sum(axis=2).mean(axis=0)
    return total


def missed_scores(evidence: Evidence, explained: Explained) -> Floats:
    """How surely each detection [D] is an object that nobody annotated."""
    free = explained.annotation < 0
    covered = iou_matrix(evidence.found.boxes, evidence.annotated.boxes).max(axis=1, initial=0)
    ignored = share_inside(evidence.found.boxes, evidence.annotated.boxes[evidence.ignore]).max(axis=1, initial=0)
    scores: Floats = evidence.scores * (1 - covered) * free * (ignored < 0.5)
    return scores


def class_scores(evidence: Evidence) -> tuple[Floats, Ints]:
    """How surely each annotation [G] is of another class, and of which: what all stages say against it."""
    probs = evidence.annotated.probs.mean(axis=0)  # [G, K]
    own = _own(probs, evidence.labels)
    others = _without_own(probs, evidence.labels)
    best = others.argmax(axis=1) if others.shape[1] > 1 else np.zeros(len(own), np.int64)
    against = others.max(axis=1, initial=0)
    return against * (1 - own), best


def _own(probs: Floats, labels: Ints) -> Floats:
    return probs[np.arange(len(labels)), labels]


def _without_own(probs: Floats, labels: Ints) -> Floats:
    others = probs.copy()
    others[np.arange(len(labels)), labels] = 0
    return others


def shifted_scores(evidence: Evidence, explained: Explained) -> tuple[Floats, Floats]:
    """How surely each box [G] lies badly, and where it should lie [G, 4]: how far the cascade moves it."""
    final = evidence.annotated.moved[-1]
    stays = iou_of_pairs(evidence.annotated.boxes, final)
    return (1 - stays) * objectness(evidence.annotated), final


def nothing_scores(evidence: Evidence, explained: Explained) -> Floats:
    """How surely there is no object at each box [G]."""
    sure = np.where(explained.detection >= 0, evidence.scores[explained.detection], 0) if len(evidence.scores) else 0
    return (1 - objectness(evidence.annotated)) * (1 - explained.overlap * sure)


def doubled_scores(evidence: Evidence, explained: Explained) -> Floats:
    """How surely each box [G] repeats another one: the cascade moves both to the same place."""
    final = evidence.annotated.moved[-1]
    same = iou_matrix(final, final)
    before = iou_matrix(evidence.annotated.boxes, evidence.annotated.boxes)
    np.fill_diagonal(same, 0)
    np.fill_diagonal(before, 0)
    return np.maximum(same * before, 0).max(axis=1, initial=0)


def suspects_of(kind: Kind, evidence: Sequence[Evidence]) -> list[Suspect]:
    """Every candidate of one kind, in all images, the most suspicious first."""
    return sorted((one for image, e in enumerate(evidence) for one in _candidates(kind, image, e)), key=lambda o: -o.score)


def _candidates(kind, image, e):
    x = explain(e)
    if kind == "missed":
        for d, s in enumerate(missed_scores(e, x)):
            if s > 0:
                yield Suspect(kind, float(s), image, -1, None, -1, tuple(e.found.moved[-1][d].tolist()), int(e.found_labels[d]))
        return
    scores = {"class": lambda: class_scores(e)[0], "shifted": lambda: shifted_scores(e, x)[0], "nothing": lambda: nothing_scores(e, x), "doubled": lambda: doubled_scores(e, x)}[kind]()
    for g, s in enumerate(scores):
        if not e.ignore[g]:
            yield Suspect(kind, float(s), image, g, tuple(e.annotated.boxes[g].tolist()), int(e.labels[g]), None, 0)
