"""Each kind of error is found where it was planted, proposed to be mended as it was, and sound annotations are left."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from cascade_rcnn.labels.rank import KINDS, Kind, Suspect, explain, found_again, rank, shifted_scores, suspects_of
from perfect_cascade import Object, evidence

OBJECTS: list[Object] = [(10, 10, 50, 50, 0), (60, 12, 100, 60, 1), (20, 70, 90, 110, 2), (120, 20, 150, 44, 0)]
SHIFTED: Object = (24, 20, 64, 60, 0)
PLANTED: dict[Kind, list[Object]] = {
    "missed": OBJECTS[1:],
    "class": [(10, 10, 50, 50, 2), *OBJECTS[1:]],
    "shifted": [SHIFTED, *OBJECTS[1:]],
    "doubled": [*OBJECTS, (14, 12, 54, 52, 0)],
    "nothing": [*OBJECTS, (100, 70, 150, 110, 1)],
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_planted_error_is_the_only_suspect(kind: Kind) -> None:
    (suspect,) = rank([evidence(OBJECTS, OBJECTS), evidence(OBJECTS, PLANTED[kind])])
    assert (suspect.kind, suspect.image) == (kind, 1)
    assert suspect.row == {"missed": -1, "class": 0, "shifted": 0, "doubled": 4, "nothing": 4}[kind]
    assert 0.5 <= suspect.score <= 1


def test_what_is_proposed_mends_the_error() -> None:
    found = {kind: rank([evidence(OBJECTS, PLANTED[kind])])[0] for kind in KINDS}
    assert found["missed"].proposed_box == OBJECTS[0][:4] and found["missed"].proposed_label == 0
    assert found["class"].proposed_box == found["class"].box and found["class"].proposed_label == 0
    assert found["shifted"].proposed_box == pytest.approx(OBJECTS[0][:4], abs=0.5)
    assert found["shifted"].box == SHIFTED[:4] and found["shifted"].proposed_label == 0
    assert found["doubled"].proposed_box is None and found["nothing"].proposed_box is None


def test_sound_annotations_give_no_suspect() -> None:
    assert rank([evidence(OBJECTS, OBJECTS)]) == []


@pytest.mark.parametrize(("objects", "annotated"), [((), ()), (OBJECTS, ()), ((), OBJECTS)])
def test_images_without_objects_or_annotations(objects: list[Object], annotated: list[Object]) -> None:
    expected = ["missed"] * len(objects) + ["nothing"] * len(annotated)
    assert [one.kind for one in rank([evidence(objects, annotated)])] == expected
    assert rank([]) == []


def test_ignored_regions_are_never_suspected_and_hide_what_is_inside() -> None:
    crowd: Object = (0, 0, 110, 64, 0)  # around two objects
    given = evidence(OBJECTS, [crowd, *OBJECTS[2:]], ignore=[True, False, False])
    assert rank([given]) == []
    assert all(one.row != 0 for kind in KINDS for one in suspects_of(kind, [given]))


def test_an_object_beside_an_ignored_region_is_still_missed() -> None:
    region: Object = (35, 10, 75, 50, 0)  # overlaps the first object by a quarter
    (suspect,) = rank([evidence(OBJECTS[:1], [region], ignore=[True])])
    assert suspect.kind == "missed" and suspect.proposed_box == OBJECTS[0][:4]


def test_a_box_that_the_strict_classifier_takes_only_once_it_is_moved_lies_badly() -> None:
    given = evidence(OBJECTS, PLANTED["shifted"])
    accepted = given.annotated.unmoved.copy()
    accepted[-1] = given.annotated.probs[-1]  # the same movement, and it is content with where the box stands
    content = dataclasses.replace(given, annotated=dataclasses.replace(given.annotated, unmoved=accepted))
    assert shifted_scores(content)[0] < shifted_scores(given)[0] - 0.1
    unseen = dataclasses.replace(given, scores=np.zeros(4))  # no detection elsewhere
    assert shifted_scores(unseen)[0] < shifted_scores(given)[0] - 0.1


def test_a_badly_placed_box_is_no_missed_object() -> None:
    missed = suspects_of("missed", [evidence(OBJECTS, PLANTED["shifted"])])
    assert all(one.score < 0.1 for one in missed)


def test_of_two_boxes_around_one_object_the_worse_is_suspected() -> None:
    first, second = suspects_of("doubled", [evidence(OBJECTS, PLANTED["doubled"])])[:2]
    assert (first.row, second.row) == (4, 0) and first.score > second.score


def test_neighbours_that_overlap_are_not_doubled() -> None:
    crowded: list[Object] = [(10, 10, 50, 50, 0), (26, 10, 66, 50, 0)]
    assert rank([evidence(crowded, crowded)]) == []


def test_with_one_class_no_class_is_wrong() -> None:
    objects: list[Object] = [(*box[:4], 0) for box in OBJECTS]  # type: ignore[misc]
    given = evidence(objects, objects, classes=1)
    assert [one.score for one in suspects_of("class", [given])] == [0.0] * len(objects)
    assert all(one.proposed_label == 0 for one in suspects_of("class", [given]))


def test_an_annotation_is_listed_once_for_its_worst_fault() -> None:
    both: list[Object] = [(24, 20, 64, 60, 2), *OBJECTS[1:]]  # shifted and of another class
    listed = rank([evidence(OBJECTS, both)])
    assert [one.row for one in listed] == [0]
    scores = {kind: suspects_of(kind, [evidence(OBJECTS, both)])[0].score for kind in ("class", "shifted")}
    assert listed[0].score == max(scores.values()) and min(scores.values()) >= 0.5


def test_how_many_annotations_are_found_again_says_whether_the_judge_is_any_good() -> None:
    assert found_again([evidence(OBJECTS, OBJECTS)]) == 1 == found_again([])
    assert found_again([evidence(OBJECTS, PLANTED["class"])]) == 3 / 4
    assert found_again([evidence(OBJECTS, OBJECTS), evidence((), OBJECTS)]) == 1 / 2
    far: Object = (300, 300, 340, 340, 0)
    assert found_again([evidence(OBJECTS, [*OBJECTS, far])]) == 4 / 5
    assert found_again([evidence(OBJECTS, [*OBJECTS, far], ignore=[False] * 4 + [True])]) == 1


def test_suspects_come_by_kind_and_falling_score() -> None:
    listed = rank([evidence(OBJECTS, PLANTED[kind]) for kind in reversed(KINDS)])
    assert [one.kind for one in listed] == list(KINDS)
    weak = dataclasses.replace(evidence(OBJECTS, PLANTED["missed"]), scores=np.full(4, 0.7))
    twice = rank([weak, evidence(OBJECTS, PLANTED["missed"])])
    assert [one.image for one in twice] == [1, 0] and twice[0].score > twice[1].score


@pytest.mark.parametrize("seed", range(5))
def test_scores_lie_between_0_and_1(seed: int) -> None:
    random = np.random.default_rng(seed)

    def some(count: int) -> list[Object]:
        corners = random.uniform(0, 80, (count, 2))
        boxes = np.concatenate([corners, corners + random.uniform(0, 40, (count, 2))], axis=1)
        return [(*box, label) for box, label in zip(boxes.tolist(), random.integers(0, 3, count).tolist())]

    given = [evidence(some(8), some(10)), evidence(some(3), some(1))]
    scores = [one.score for kind in KINDS for one in suspects_of(kind, given)]
    assert len(scores) > 40 and min(scores) >= 0 and max(scores) <= 1


def test_annotations_and_detections_are_paired_one_to_one() -> None:
    close: list[Object] = [(10, 10, 50, 50, 0), (26, 10, 66, 50, 0)]
    explained = explain(evidence(close, [(14, 10, 54, 50, 0), close[1]]))
    assert explained.overlap.tolist() == pytest.approx([36 / 44, 1.0])
    assert explained.free.tolist() == [0, 0]
    left = explain(evidence(close, close[:1]))
    assert left.free.tolist() == [0, 1] and left.surety.tolist() == [0.95]


def test_a_suspect_is_plain_data() -> None:
    (suspect,) = rank([evidence(OBJECTS, PLANTED["missed"])])
    assert dataclasses.asdict(suspect) == {
        "kind": "missed",
        "score": pytest.approx(0.95),
        "image": 0,
        "row": -1,
        "box": None,
        "label": -1,
        "proposed_box": OBJECTS[0][:4],
        "proposed_label": 0,
    }
    assert isinstance(suspect, Suspect)
