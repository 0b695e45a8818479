"""``--stages auto``: proposals without hope leave the cascade early, the others are judged as ever."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cascade_rcnn.models.cascade import HOPELESS, Cascade
from cascade_rcnn.models.cascade_rcnn import CascadeRCNN
from cascade_rcnn.structures import RawDetections
from tiny import squares, tiny_model


def _decided(**changes: Any) -> CascadeRCNN:
    """A network whose scores lie anywhere between 0 and 1, not all around 1 / K."""
    model = tiny_model(**changes).eval()
    with torch.no_grad():
        for head in model.cascade.box_heads:
            for layer in head.modules():
                if isinstance(layer, nn.Linear) and layer.out_features == 4:  # three classes and background
                    layer.weight.mul_(150.0)
    return model


def _run(model: CascadeRCNN, monkeypatch: pytest.MonkeyPatch, *, images: int = 1) -> tuple[RawDetections, list[int]]:
    """Detections, and how many boxes each stage has looked at."""
    counts = []
    plain = Cascade._run_stage

    def counted(self: Cascade, k: int, pyramid: list[Tensor], boxes: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        counts.append(int(valid.sum()))
        return plain(self, k, pyramid, boxes, valid)

    with monkeypatch.context() as patch:
        patch.setattr(Cascade, "_run_stage", counted)
        return model.detect(squares(images=images)[0]), counts


def test_detections_are_those_of_all_stages_in_a_fraction_of_their_work(monkeypatch: pytest.MonkeyPatch) -> None:
    # no detection hides another
    model = _decided(masks="none", score_threshold=0.5, test_proposals=300, max_detections=900, nms_iou=1.0)
    full, all_counts = _run(model, monkeypatch)
    model.cascade.drops_hopeless = True
    found, counts = _run(model, monkeypatch)
    assert all_counts[0] == all_counts[2] == counts[0] and 0 < counts[2] <= counts[1] < 0.95 * counts[0]
    ours, theirs = (
        torch.cat([one.boxes[0], 100 * one.scores[0, :, None], one.labels[0, :, None]], dim=1)[one.valid[0]]
        for one in (found, full)
    )  # [D, 6]
    distances = (ours[:, None] - theirs).abs().amax(dim=-1)
    assert 3 < len(ours) <= len(theirs) and distances.amin(dim=1).max() < 1e-2, "no detection of its own"


def test_where_all_have_hope_nothing_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _decided(score_threshold=0.0)
    full, _ = _run(model, monkeypatch, images=2)
    model.cascade.drops_hopeless = True
    found, counts = _run(model, monkeypatch, images=2)
    assert counts[0] == counts[2]
    assert torch.equal(full.boxes, found.boxes) and torch.equal(full.scores, found.scores)


def test_without_any_hope_there_are_no_detections(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(score_threshold=0.99).eval()  # knows nothing: scores of a quarter, above a fifth of 0.99
    model.cascade.drops_hopeless = True
    found, counts = _run(model, monkeypatch)
    assert found.valid.sum() == 0 and counts[2] > 0
    empty = torch.zeros(2, 5, dtype=torch.bool)
    logits = torch.full((2, 5, 4), -9.0)
    logits[..., 3] = 9.0
    boxes, valid, (left,) = model.cascade._hopeful(torch.ones(2, 5, 4), ~empty, [logits])
    assert boxes.shape == (2, 1, 4) and not valid.any() and left.shape == (2, 1, 4)


def test_images_of_a_batch_keep_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    cascade = _decided(score_threshold=0.5).cascade
    scores = torch.tensor([[0.05, 0.2, 0.09, 0.9], [0.3, 0.05, 0.05, 0.4]])
    valid = torch.tensor([[True, True, True, True], [True, True, True, False]])
    logits = torch.stack([scores, torch.zeros_like(scores), torch.zeros_like(scores), 1 - scores], dim=-1).log()
    boxes = torch.arange(8.0).view(2, 4, 1).expand(-1, -1, 4)
    kept, alive, (left,) = cascade._hopeful(boxes, valid, [logits])
    assert HOPELESS == 0.2
    assert alive.tolist() == [[True, True], [True, False]]
    assert kept[0, :, 0].tolist() == [1.0, 3.0] and kept[1, 0, 0] == 4.0
    assert left.softmax(dim=-1)[0, :, 0].tolist() == pytest.approx([0.2, 0.9])
