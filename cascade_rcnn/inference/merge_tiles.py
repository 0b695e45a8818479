"""What was found in overlapping tiles becomes one list: no object twice, none in halves.

A detection is *cut* if it reaches an inner border of its tile, else *whole*. Those of one tile are left alone among
themselves: the network's own suppression has seen to them. Between tiles:

1. Of two whole ones of a class that overlap by the network's own NMS limit, the better score stays.
2. A cut one gives way to a whole one that is the same object as far as its tile shows it: their boxes agree within that
   tile. The score does not matter, and of another class it must be half as sure at least: half a star looks like
   a triangle.
3. Cut ones that nobody has seen whole, and whose boxes agree where their tiles overlap, are joined: one box around
   them, the best score and its class, and for each point of the mask the surest of them.
4. What is cut and overlaps something better of its class by the NMS limit goes.

A coarser level adds only objects longer than what tiles of the finer one have in common: smaller ones lie whole there.

N candidates; boxes xyxy in pixels of the upright picture.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cascade_rcnn.inference.tiles import View

AGREE = 0.4  # IoU, within what a tile shows, of boxes that are the same object
_NEAR = 2.0  # pixels of a level: a box that ends so near a border is cut by it ...
_NEAR_SHARE = 0.1  # ... or within this share of its side
_LESS_SURE = 0.5  # of a cut one's score: a whole one of another class below it does not replace it
Boxes = NDArray[np.float64]


@dataclass(frozen=True)
class Candidates:
    """What was found, sorted by tile."""

    boxes: Boxes  # [N, 4]
    scores: NDArray[np.float64]  # [N]
    labels: NDArray[np.int64]  # [N]
    tiles: NDArray[np.int64]  # [N], rising: position in the list of views

    def __len__(self) -> int:
        return len(self.scores)


@dataclass(frozen=True)
class Merged:
    """The objects, by falling score."""

    boxes: Boxes  # [D, 4]
    scores: NDArray[np.float64]  # [D]
    labels: NDArray[np.int64]  # [D]
    members: list[NDArray[np.int64]]  # [D], the candidates that each is made of: mostly one
    partial: NDArray[np.bool_]  # [D], no tile shows it whole

    def best(self, most: int | None) -> Merged:
        """The first so many; None: all."""
        return Merged(
            self.boxes[:most], self.scores[:most], self.labels[:most], self.members[:most], self.partial[:most]
        )


def merge(candidates: Candidates, views: Sequence[View], *, common: int, nms_iou: float, agnostic: bool) -> Merged:
    """One list of objects.

    Args:
        common: pixels that neighbouring tiles share.
        nms_iou: the network's own limit; ``agnostic``: it suppresses across classes.
    """
    cut = _cut(candidates, views)
    alive = _large_enough(candidates, views, common)
    groups = np.zeros_like(candidates.labels) if agnostic else candidates.labels
    rivals, gives_way, pieces = _compare(candidates, views, cut, alive, groups, nms_iou)
    order = np.argsort(-candidates.scores, kind="stable")
    whole = alive & ~cut
    kept = _suppress(order[whole[order]], rivals, len(candidates))
    left = np.flatnonzero(alive & cut & ~gives_way)
    members = [*([row] for row in np.flatnonzero(kept)), *_join(left, pieces)]
    return _listed(candidates, [np.array(rows) for rows in members], groups, int(kept.sum()), nms_iou)


def _cut(candidates: Candidates, views: Sequence[View]) -> NDArray[np.bool_]:
    """Which of them reach an inner border of their tile."""
    if not len(candidates):
        return np.zeros(0, np.bool_)
    shown = _rects(views)[candidates.tiles]
    inner = np.array([view.inner for view in views])[candidates.tiles]
    factor = np.array([view.factor for view in views])[candidates.tiles]
    sides = np.tile(candidates.boxes[:, 2:] - candidates.boxes[:, :2], 2)
    near = np.maximum(_NEAR * factor[:, None], _NEAR_SHARE * sides)
    return np.asarray((inner & (np.abs(candidates.boxes - shown) <= near)).any(axis=1))


def _large_enough(candidates: Candidates, views: Sequence[View], common: int) -> NDArray[np.bool_]:
    """Which of them are not the finer level's affair."""
    factors = sorted({view.factor for view in views})
    finer = {factor: 0 if place == 0 else factors[place - 1] for place, factor in enumerate(factors)}
    least = np.array([finer[view.factor] * common for view in views] or [0])[candidates.tiles]
    longer = (candidates.boxes[:, 2:] - candidates.boxes[:, :2]).max(axis=1, initial=0.0)
    return np.asarray(longer >= least)


def _rects(views: Sequence[View]) -> Boxes:
    """What each tile shows of the picture [T, 4]."""
    return np.array([(max(v.x, 0), max(v.y, 0), v.right, v.bottom) for v in views], dtype=np.float64).reshape(-1, 4)


def _compare(
    candidates: Candidates,
    views: Sequence[View],
    cut: NDArray[np.bool_],
    alive: NDArray[np.bool_],
    groups: NDArray[np.int64],
    nms_iou: float,
) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.int64]]:
    """Pairs of whole ones that are rivals [E, 2], which cut ones give way, and pairs of pieces to be joined [P, 2]."""
    boxes, scores = candidates.boxes, candidates.scores
    rects = _rects(views)
    gives_way = np.zeros(len(candidates), np.bool_)
    rivals, pieces = [np.zeros((0, 2), np.int64)], [np.zeros((0, 2), np.int64)]
    rows_of = {int(tile): rows[alive[rows]] for tile, rows in _by_tile(candidates.tiles)}
    for one, other in _neighbours(rects, sorted(tile for tile, rows in rows_of.items() if len(rows))):
        a, b = rows_of[one], rows_of[other]
        touching = _iou(boxes[a], boxes[b])
        if not touching.any():
            continue
        same = groups[a][:, None] == groups[b]
        a_cut, b_cut = cut[a][:, None], cut[b][None]
        rivals.append(_pairs(a, b, ~a_cut & ~b_cut & same & (touching >= nms_iou)))
        a_shown, b_shown = _clip(boxes[a], rects[other]), _clip(boxes[b], rects[one])  # to what the other tile shows
        yields = a_cut & ~b_cut & (_iou(boxes[a], b_shown) >= AGREE)
        gives_way[a] |= (yields & (same | (scores[b] >= _LESS_SURE * scores[a][:, None]))).any(axis=1)
        yields = b_cut & ~a_cut & (_iou(a_shown, boxes[b]) >= AGREE)
        gives_way[b] |= (yields & (same | (scores[a][:, None] >= _LESS_SURE * scores[b]))).any(axis=0)
        if views[one].level == views[other].level:
            pieces.append(_pairs(a, b, a_cut & b_cut & same & (_iou(a_shown, b_shown) >= AGREE)))
    return np.concatenate(rivals), gives_way, np.concatenate(pieces)


def _by_tile(tiles: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """The rows of each tile that has any."""
    bounds = np.flatnonzero(np.diff(tiles, prepend=-1))
    for start, end in zip(bounds, [*bounds[1:], len(tiles)]):
        yield int(tiles[start]), np.arange(start, end)


def _neighbours(rects: Boxes, chosen: list[int]) -> Iterator[tuple[int, int]]:
    """Pairs of the chosen tiles that overlap; by their upper border, so that only near ones are looked at."""
    order = sorted(chosen, key=lambda tile: float(rects[tile, 1]))
    sorted_rects = rects[order]
    tops = sorted_rects[:, 1] if order else np.zeros(0)
    for place, tile in enumerate(order):
        x1, _, x2, y2 = rects[tile]
        end = int(np.searchsorted(tops, y2))
        near = sorted_rects[place + 1 : end]
        for offset in np.flatnonzero((near[:, 0] < x2) & (near[:, 2] > x1)):
            yield tile, order[place + 1 + int(offset)]


def _iou(first: Boxes, second: Boxes) -> NDArray[np.float64]:
    """IoU of each of [A, 4] with each of [B, 4]: [A, B]; 0 for empty boxes."""
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    common = np.clip(high - low, 0, None).prod(axis=2)
    areas = [np.clip(boxes[:, 2:] - boxes[:, :2], 0, None).prod(axis=1) for boxes in (first, second)]
    union = areas[0][:, None] + areas[1] - common
    overlap: NDArray[np.float64] = np.divide(common, union, out=np.zeros_like(common), where=common > 0)
    return overlap


def _clip(boxes: Boxes, rect: NDArray[np.float64]) -> Boxes:
    """Boxes [N, 4] cut to a rectangle; those beside it become empty."""
    return np.concatenate([np.maximum(boxes[:, :2], rect[:2]), np.minimum(boxes[:, 2:], rect[2:])], axis=1)


def _pairs(a: NDArray[np.int64], b: NDArray[np.int64], table: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Candidates [E, 2] of the cells that are set."""
    rows, columns = np.nonzero(table)
    return np.stack([a[rows], b[columns]], axis=1)


def _suppress(order: NDArray[np.int64], rivals: NDArray[np.int64], count: int) -> NDArray[np.bool_]:
    """Which of the whole ones stay: the best first, each takes its rivals out."""
    both = np.concatenate([rivals, rivals[:, ::-1]])
    both = both[np.argsort(both[:, 0], kind="stable")]
    begins = np.searchsorted(both[:, 0], np.arange(count + 1))
    kept, gone = np.zeros(count, np.bool_), np.zeros(count, np.bool_)
    for row in order.tolist():
        if not gone[row]:
            kept[row] = True
            gone[both[begins[row] : begins[row + 1], 1]] = True
    return kept


def _join(left: NDArray[np.int64], pieces: NDArray[np.int64]) -> list[list[int]]:
    """Groups of pieces that belong to one object."""
    parent = {int(row): int(row) for row in left}

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    for one, other in pieces.tolist():
        if one in parent and other in parent:
            parent[root(one)] = root(other)
    groups: dict[int, list[int]] = {}
    for row in parent:
        groups.setdefault(root(row), []).append(row)
    return list(groups.values())


def _listed(
    candidates: Candidates, members: list[NDArray[np.int64]], groups: NDArray[np.int64], whole: int, nms_iou: float
) -> Merged:
    """Objects by falling score; the first ``whole`` of the members are whole, the others are held against all."""
    best = np.array([rows[np.argmax(candidates.scores[rows])] for rows in members], dtype=np.int64)
    boxes = np.array(
        [[*candidates.boxes[rows, :2].min(axis=0), *candidates.boxes[rows, 2:].max(axis=0)] for rows in members]
    ).reshape(-1, 4)
    scores, kinds = candidates.scores[best], groups[best]
    stays = np.ones(len(members), np.bool_)
    by_score = whole + np.argsort(-scores[whole:], kind="stable")
    for row in by_score.tolist():
        before = np.flatnonzero(
            stays & (kinds == kinds[row]) & ((np.arange(len(stays)) < whole) | (scores > scores[row]))
        )
        stays[row] = not (_iou(boxes[row : row + 1], boxes[before]) >= nms_iou).any()
    chosen = np.flatnonzero(stays)
    chosen = chosen[np.argsort(-scores[chosen], kind="stable")]
    return Merged(
        boxes[chosen],
        scores[chosen],
        candidates.labels[best[chosen]],
        [members[row] for row in chosen.tolist()],
        chosen >= whole,
    )
