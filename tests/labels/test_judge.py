"""What the network says of annotated boxes, in the data set's own pixels and classes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from cascade_rcnn.config import Config
from cascade_rcnn.data.formats.open import open_split
from cascade_rcnn.data.records import DataSplit
from cascade_rcnn.errors import DataError, UserError
from cascade_rcnn.inference.detector import Detector
from cascade_rcnn.labels.evidence import Evidence
from cascade_rcnn.labels.judge import judge_split
from cascade_rcnn.models.build import build_model
from cascade_rcnn.models.cascade import most_likely
from cascade_rcnn.structures import Proposals
from small_training import small_config, small_data
from tiny import squares, tiny_model


@pytest.fixture(scope="module")
def split() -> DataSplit:
    return open_split(small_data(), "val")


def _detector(names: tuple[str, ...], *, config: Config | None = None, seed: int = 0) -> Detector:
    config = config or small_config(model={"norm": "batch", "score_threshold": 0.0})
    torch.manual_seed(seed)
    return Detector.from_model(build_model(config.model, len(names)).eval(), config, names)


def test_the_stages_follow_given_boxes_as_they_follow_proposals() -> None:
    model = tiny_model().eval()
    images, targets = squares()
    proposals = Proposals(targets.boxes, targets.valid)
    with torch.no_grad():
        pyramid = model.pyramid(images)
        followed = model.cascade.follow(pyramid, proposals, images)
        boxes = targets.boxes
        for k, stage in enumerate(model.cascade.stages):
            there, _ = model.cascade._run_stage(k, pyramid, targets.boxes, targets.valid)
            logits, deltas = model.cascade._run_stage(k, pyramid, boxes, targets.valid)
            boxes = stage.move(deltas, boxes, most_likely(logits), images.sizes)
            torch.testing.assert_close(followed.unmoved[k], there.softmax(-1))
            torch.testing.assert_close(followed.probs[k], logits.softmax(-1))
            torch.testing.assert_close(followed.boxes[k], boxes)
    assert followed.boxes.shape == (3, 2, 4, 4) and followed.probs.shape == (3, 2, 4, 4)
    assert not torch.equal(followed.unmoved[1], followed.probs[1])


def test_evidence_has_the_annotations_of_each_image_in_its_pixels(split: DataSplit) -> None:
    given = list(judge_split(_detector(split.class_names), split))
    assert len(given) == len(split)
    for record, one in zip(split.records, given):
        np.testing.assert_array_equal(one.annotated.boxes, record.boxes)
        np.testing.assert_array_equal(one.labels, record.labels)
        assert one.annotated.moved.shape == (3, len(record.boxes), 4)
        assert (
            one.annotated.probs.shape == one.annotated.unmoved.shape == (3, len(record.boxes), len(split.class_names))
        )
        assert one.found.moved.shape == (3, len(one.scores), 4) and len(one.found_labels) == len(one.scores) > 0
        assert (np.abs(one.annotated.moved[0] - record.boxes).max() if len(record.boxes) else 0) < 64


def test_boxes_do_not_depend_on_the_size_that_the_network_sees(split: DataSplit) -> None:
    detector = _detector(split.class_names)
    once = next(iter(judge_split(detector, split)))
    data = dataclasses.replace(detector.config.data, test_short_side=128, long_side=128)
    detector.config = dataclasses.replace(detector.config, data=data)
    twice = next(iter(judge_split(detector, split)))
    np.testing.assert_array_equal(twice.annotated.boxes, once.annotated.boxes)
    assert twice.found.boxes.max() <= 64 and twice.annotated.moved.max() <= 64


def test_probabilities_are_the_data_sets_classes_whatever_the_models_order(split: DataSplit) -> None:
    own = next(iter(judge_split(_detector(split.class_names), split)))
    names = ("stranger", *reversed(split.class_names))
    detector = _detector(names)
    mixed = next(iter(judge_split(detector, split)))
    with torch.no_grad():  # its classes in the data's order: what the model itself says
        for head in detector.model.cascade.box_heads:
            order = [names.index(name) for name in (*split.class_names, "stranger")] + [len(names)]
            for tensor in (head.classifier.weight, head.classifier.bias):  # type: ignore[union-attr]
                tensor.copy_(tensor[order].clone())  # type: ignore[operator, index]
    detector.class_names = (*split.class_names, "stranger")
    sorted_ = next(iter(judge_split(detector, split)))
    np.testing.assert_allclose(mixed.annotated.probs, sorted_.annotated.probs, atol=1e-6)
    np.testing.assert_allclose(mixed.annotated.unmoved, sorted_.annotated.unmoved, atol=1e-6)
    assert mixed.annotated.probs.shape == own.annotated.probs.shape
    assert (mixed.found_labels < len(split.class_names)).all()


def test_a_class_that_neither_has_objects_nor_is_known_is_never_likely(split: DataSplit) -> None:
    more = dataclasses.replace(
        split, class_names=(*split.class_names, "unicorn"), category_ids=(*split.category_ids, 99)
    )
    for one in judge_split(_detector(split.class_names), more):
        assert (one.annotated.probs[..., -1] == 0).all() and (one.annotated.probs[..., :-1] > 0).all()


def test_a_class_that_the_checkpoint_does_not_know_is_refused(split: DataSplit) -> None:
    with pytest.raises(DataError, match="does not know"):
        next(iter(judge_split(_detector(split.class_names[:1]), split)))


def test_detectrons_whole_pixels_are_refused(split: DataSplit) -> None:
    config = small_config(model={"norm": "batch", "semantics": "paper"})
    with pytest.raises(UserError, match="semantics paper"):
        next(iter(judge_split(_detector(split.class_names, config=config), split)))


def test_an_image_without_objects_gives_evidence_on_its_detections(split: DataSplit) -> None:
    record = dataclasses.replace(
        split.records[0],
        boxes=np.zeros((0, 4)),
        labels=np.zeros(0, np.int64),
        ignore=np.zeros(0, np.bool_),
        areas=np.zeros(0),
        segmentations=None,
        attributes={},
    )
    one: Evidence = next(iter(judge_split(_detector(split.class_names), dataclasses.replace(split, records=[record]))))
    assert len(one) == 0 and one.annotated.moved.shape == (3, 0, 4) and len(one.scores) > 0
