"""What each stage says alone, from one pass, against passes that stop after it."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from cascade_rcnn.inference.run_model import detect, detect_each_stage
from cascade_rcnn.structures import RawDetections
from tiny import squares, tiny_model


def _equal(a: RawDetections, b: RawDetections) -> bool:
    pairs = [(a.boxes, b.boxes), (a.scores, b.scores), (a.labels, b.labels), (a.valid, b.valid)]
    return all(one.shape == other.shape and torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_stage_alone(stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = tiny_model().eval()
    cascade = model.cascade
    cascade.details = dataclasses.replace(cascade.details, score_threshold=0.0)
    images, _ = squares()
    found = detect_each_stage(model, images)
    assert len(found) == 4
    together = detect(model, images)
    assert together.valid.any() and _equal(found[-1], together)
    monkeypatch.setattr(cascade, "stages_at_test", stage + 1)
    monkeypatch.setattr(cascade, "_ensemble", lambda logits: logits[-1].softmax(dim=-1))
    assert _equal(found[stage], detect(model, images))
    assert not _equal(found[stage], together)
