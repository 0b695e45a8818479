"""Which box learns which object."""

import pytest
import torch

from cascade_rcnn.models import matching
from cascade_rcnn.models.boxes import pairwise_iou
from cascade_rcnn.models.matching import Matches, choose, match, normalizer
from cascade_rcnn.structures import Targets
from random_boxes import random_boxes


def targets_of(boxes: torch.Tensor, *, ignore: torch.Tensor | None = None) -> Targets:
    n = len(boxes)
    targets = Targets.empty(1, rows=n + 2)
    targets.boxes[0, :n] = boxes
    targets.valid[0, :n] = True
    if ignore is not None:
        targets.boxes[0, n : n + len(ignore)] = ignore
        targets.ignore[0, n : n + len(ignore)] = True
    return targets


def all_valid(boxes: torch.Tensor) -> torch.Tensor:
    return torch.ones(1, len(boxes), dtype=torch.bool)


def test_roles_follow_the_thresholds() -> None:
    truth = torch.tensor([[0.0, 0, 10, 10]])
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 6], [0, 0, 10, 4], [50, 50, 60, 60]])  # IoU 1, .6, .4, 0
    found = match(boxes[None], all_valid(boxes), targets_of(truth), positive_iou=0.7, negative_iou=0.5)
    assert found.positive[0].tolist() == [True, False, False, False]
    assert found.negative[0].tolist() == [False, False, True, True]


@pytest.mark.parametrize("rematch", [True, False])
def test_an_objects_best_boxes_are_positive_whatever_their_overlap(rematch: bool) -> None:
    truth = torch.tensor([[0.0, 0, 10, 10], [0, 0, 40, 10]])
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 20, 10], [30, 0, 50, 10]])
    found = match(
        boxes[None],
        all_valid(boxes),
        targets_of(truth),
        positive_iou=0.7,
        negative_iou=0.3,
        best_box_iou=0.3,
        rematch_best=rematch,
    )
    # The second box is the best for the wide object (IoU 0.5) and equally good for the narrow one.
    assert found.positive[0].tolist() == [True, True, False]
    assert found.index[0, 1].item() == (1 if rematch else 0)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    boxes, truth = random_boxes(300), random_boxes(20, seed=7)
    arguments = {"positive_iou": 0.5, "negative_iou": 0.3, "best_box_iou": 0.1}
    whole = match(boxes[None], all_valid(boxes), targets_of(truth), **arguments)
    monkeypatch.setattr(matching, "MAX_TABLE_CPU", 97)
    parts = match(boxes[None], all_valid(boxes), targets_of(truth), **arguments)
    assert torch.equal(whole.index, parts.index)
    assert torch.equal(whole.positive, parts.positive)
    assert torch.equal(whole.negative, parts.negative)
    assert whole.positive.sum() >= len(truth) - 2


@pytest.mark.parametrize("rematch", [True, False])
@pytest.mark.parametrize("table", [1 << 24, 500])
def test_a_gpus_way_of_all_images_at_once_finds_the_same(
    monkeypatch: pytest.MonkeyPatch, rematch: bool, table: int
) -> None:
    targets = Targets.empty(3, rows=12)
    targets.boxes[:] = torch.stack([random_boxes(12, seed=seed) for seed in (1, 2, 3)])
    targets.valid[:2, :7], targets.ignore[1:, 8:] = True, True  # the last image has no object
    boxes = torch.stack([random_boxes(200, seed=seed) for seed in (4, 5, 6)])
    boxes[0, 50:60] = boxes[0, 40:50]  # equal overlaps
    valid = torch.rand(3, 200) > 0.1
    arguments = {"positive_iou": 0.4, "negative_iou": 0.3, "best_box_iou": 0.05, "rematch_best": rematch}
    each = match(boxes, valid, targets, **arguments)
    monkeypatch.setattr(matching, "MAX_TABLE", table)
    monkeypatch.setattr(matching, "host_sync_is_free", lambda _: False)
    together = match(boxes, valid, targets, **arguments)
    assert each.positive[:2].any(dim=1).all() and not each.positive[2].any()
    for name in ("index", "positive", "negative"):
        assert torch.equal(getattr(each, name), getattr(together, name)), name


def test_negatives_inside_an_ignored_region_take_no_part() -> None:
    boxes = torch.tensor([[100.0, 100, 120, 120], [300, 300, 320, 320]])
    region = torch.tensor([[90.0, 90, 130, 130]])
    found = match(
        boxes[None], all_valid(boxes), targets_of(torch.zeros(0, 4), ignore=region), positive_iou=0.5, negative_iou=0.5
    )
    assert found.negative[0].tolist() == [False, True]


def test_a_negative_may_lie_half_inside_an_ignored_region() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10], [1.125, 0, 11.125, 10]])  # 0.4, 0.5, 0.5125 of each inside
    region = torch.tensor([[6.0, 0, 100, 100]])
    found = match(
        boxes[None], all_valid(boxes), targets_of(torch.zeros(0, 4), ignore=region), positive_iou=0.5, negative_iou=0.5
    )
    assert found.negative[0].tolist() == [True, True, False]


def test_boxes_that_are_not_valid_take_no_part() -> None:
    boxes, truth = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [50, 50, 60, 60]]), torch.tensor([[0.0, 0, 10, 10]])
    valid = torch.tensor([[False, True, False]])
    found = match(boxes[None], valid, targets_of(truth), positive_iou=0.95, negative_iou=0.5, best_box_iou=0.3)
    assert found.positive[0].tolist() == [False, True, False], "the best of the valid ones"
    assert not found.negative.any()


@pytest.mark.parametrize(("best_box_iou", "positive"), [(0.5, True), (0.51, False)])
def test_an_objects_best_box_needs_a_least_overlap(best_box_iou: float, positive: bool) -> None:
    boxes, truth = torch.tensor([[0.0, 0, 10, 5]]), torch.tensor([[0.0, 0, 10, 10]])  # IoU 0.5
    arguments = {"positive_iou": 0.7, "negative_iou": 0.3, "best_box_iou": best_box_iou}
    assert bool(match(boxes[None], all_valid(boxes), targets_of(truth), **arguments).positive) is positive


def test_an_image_without_objects_has_negatives_only() -> None:
    boxes = random_boxes(10)
    found = match(boxes[None], all_valid(boxes), Targets.empty(1), positive_iou=0.7, negative_iou=0.3, best_box_iou=0.0)
    assert not found.positive.any() and found.negative.all()


def test_match_indices_are_the_largest_overlap() -> None:
    boxes, truth = random_boxes(50), random_boxes(8, seed=3)
    found = match(boxes[None], all_valid(boxes), targets_of(truth), positive_iou=0.5, negative_iou=0.5)
    assert torch.equal(found.index[0], pairwise_iou(boxes, truth).argmax(dim=1))


def roles(positives: int, negatives: int, others: int) -> Matches:
    order = torch.randperm(positives + negatives + others)
    positive = (order < positives)[None]
    negative = ((order >= positives) & (order < positives + negatives))[None]
    return Matches(torch.zeros_like(order)[None], positive, negative)


@pytest.mark.parametrize(
    ("positives", "negatives", "others", "expected"),
    [(500, 500, 0, (16, 48)), (3, 500, 7, (3, 61)), (0, 20, 40, (0, 20)), (100, 0, 0, (16, 0)), (0, 0, 70, (0, 0))],
)
def test_samples_hold_at_most_a_quarter_positives(
    positives: int, negatives: int, others: int, expected: tuple[int, int]
) -> None:
    matches = roles(positives, negatives, others)
    rows, valid, positive, max_positives = choose(matches, 64, positive_share=0.25)
    assert (int(positive.sum()), int((valid & ~positive).sum())) == expected
    assert rows.shape[1] == min(64, positives + negatives + others)
    assert len(set(rows[0].tolist())) == rows.shape[1]  # nothing is taken twice
    assert not positive[:, max_positives:].any()
    assert matches.positive[0, rows[0, positive[0]]].all()
    assert matches.negative[0, rows[0, (valid & ~positive)[0]]].all()


def test_samples_beyond_the_number_of_boxes_take_all() -> None:
    rows, valid, positive, max_positives = choose(roles(30, 40, 0), 10**6, positive_share=0.25)
    assert rows.shape[1] == 70 and valid.all() and positive.sum() == 30 and max_positives == 70


def test_samples_are_drawn_evenly() -> None:
    torch.manual_seed(0)
    matches = Matches(torch.zeros(1, 40, dtype=torch.int64), torch.arange(40)[None] < 20, torch.arange(40)[None] >= 20)
    counts = torch.zeros(40)
    for _ in range(400):
        rows, valid, _, _ = choose(matches, 20, positive_share=0.5)
        counts[rows[0, valid[0]]] += 1
    assert counts.min() > 150 and counts.max() < 250  # expected 200, standard deviation 10


def test_a_sum_over_no_samples_is_divided_by_one() -> None:
    assert [normalizer(torch.tensor(count)).item() for count in (0, 1, 7)] == [1.0, 1.0, 7.0]


def test_an_overlap_equal_to_a_threshold_is_positive_or_no_negative() -> None:
    truth, boxes = torch.tensor([[0.0, 0, 10, 10]]), torch.tensor([[0.0, 0, 10, 5], [0, 0, 5, 5]])  # IoU 1/2 and 1/4
    found = match(boxes[None], all_valid(boxes), targets_of(truth), positive_iou=0.5, negative_iou=0.25)
    assert found.positive[0].tolist() == [True, False] and not found.negative.any()


def test_an_object_that_no_box_touches_has_no_best_box() -> None:
    truth, boxes = torch.tensor([[0.0, 0, 10, 10]]), torch.tensor([[50.0, 50, 60, 60], [70, 70, 80, 80]])
    found = match(
        boxes[None], all_valid(boxes), targets_of(truth), positive_iou=0.7, negative_iou=0.3, best_box_iou=0.0
    )
    assert not found.positive.any() and found.negative.all()
