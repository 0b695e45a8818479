"""Starting from a checkpoint with other classes."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from cascade_rcnn.checkpoint import save_checkpoint
from cascade_rcnn.config import Config
from cascade_rcnn.errors import CheckpointError
from cascade_rcnn.training.init_weights import start_from
from tiny import TINY, tiny_model


@pytest.mark.parametrize("agnostic", [True, False])
def test_known_classes_keep_their_rows_and_new_ones_begin_anew(tmp_path: Path, agnostic: bool) -> None:
    source = tiny_model(3, class_agnostic_boxes=agnostic)
    for parameter in source.parameters():
        torch.nn.init.normal_(parameter)
    path = tmp_path / "source.safetensors"
    save_checkpoint(path, source.state_dict(), config=Config(model=TINY), class_names=("cat", "dog", "cow"))
    model = tiny_model(4, class_agnostic_boxes=agnostic)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    said = start_from(model, path, ("cow", "bird", "cat", "fish"), TINY)
    assert "cow, cat" in said
    ours, theirs = model.cascade.box_heads[1], source.cascade.box_heads[1]
    assert torch.equal(ours.fc1.weight, theirs.fc1.weight)
    assert torch.equal(model.backbone.body.layer3[0].conv1.weight, source.backbone.body.layer3[0].conv1.weight)
    assert torch.equal(ours.classifier.weight[[0, 2, 4]], theirs.classifier.weight[[2, 0, 3]])  # with the background
    assert torch.equal(ours.classifier.weight[1], before["cascade.box_heads.1.classifier.weight"][1])
    masks, their_masks = model.cascade.mask_heads[0].logits, source.cascade.mask_heads[0].logits
    assert torch.equal(masks.bias[[0, 2]], their_masks.bias[[2, 0]])
    if agnostic:
        assert torch.equal(ours.deltas.weight, theirs.deltas.weight)
    else:
        assert torch.equal(ours.deltas.weight[8:12], theirs.deltas.weight[:4])


def test_how_often_other_classes_were_seen_is_not_taken_over(tmp_path: Path) -> None:
    source, model = (tiny_model(3, class_loss="seesaw") for _ in range(2))
    counts = [key for key in source.state_dict() if key.endswith("class_loss.counts")]
    assert counts
    for key in counts:
        source.state_dict()[key].copy_(torch.tensor([1000, 50, 7]))
    path = tmp_path / "source.safetensors"
    save_checkpoint(path, source.state_dict(), config=Config(model=TINY), class_names=("cat", "dog", "cow"))
    start_from(model, path, ("fish", "bird", "cat"), TINY)
    assert not any(model.state_dict()[key].any() for key in counts)
    start_from(tiny_model(3), path, ("fish", "bird", "cat"), TINY)  # a network without such counts


def test_another_network_is_refused_with_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "source.safetensors"
    save_checkpoint(path, tiny_model(3).state_dict(), config=Config(model=TINY), class_names=("a", "b", "c"))
    with pytest.raises(CheckpointError, match=r"source.safetensors: another network.*cascade-rcnn config"):
        start_from(tiny_model(3, fpn_channels=64), path, ("a", "b", "c"), TINY)
    with pytest.raises(CheckpointError, match=r"source.safetensors: another network"):  # in layers with rows per class
        start_from(tiny_model(2, head_channels=8), path, ("a", "b"), TINY)


def _source(path: Path, **changes: Any) -> Path:
    model = dataclasses.replace(TINY, **changes)
    state = tiny_model(3, **changes).state_dict()
    save_checkpoint(path, state, config=Config(model=model), class_names=("a", "b", "c"))
    return path


def test_weights_that_mean_something_else_are_refused(tmp_path: Path) -> None:
    """Caffe's ResNets have the keys and shapes of others, but BGR images and strides elsewhere."""
    names = ("a", "b", "c")
    path = tmp_path / "caffe.safetensors"
    other = Config(model=dataclasses.replace(TINY, style="caffe"))
    save_checkpoint(path, tiny_model(3).state_dict(), config=other, class_names=names)
    with pytest.raises(CheckpointError, match=r"caffe.safetensors: .* add --model\.style caffe$"):
        start_from(tiny_model(3), path, names, TINY)
    start_from(tiny_model(3), path, names, other.model)
    for key in ("backbone.body.layer3.0.conv2.offset.weight", "cascade.box_heads.1.norms.0.weight"):
        state = tiny_model(3).state_dict() | {key: torch.zeros(8)}
        save_checkpoint(path, state, config=Config(model=TINY), class_names=names)
        with pytest.raises(CheckpointError, match=rf"1 weights are missing, left over .*{re.escape(key)}\)"):
            start_from(tiny_model(3), path, names, TINY)


def test_what_is_left_out_and_learnt_otherwise_is_told(tmp_path: Path) -> None:
    path = _source(tmp_path / "source.safetensors", anchor_scales=(2.0,), semantics="detectron2", masks="every")
    changes: dict[str, Any] = {"stage_ious": (0.5,), "stage_stds": None, "masks": "none"}
    said = start_from(
        tiny_model(3, **changes), path, ("a", "b", "c"), dataclasses.replace(TINY, **changes)
    ).splitlines()
    assert said[1] == (
        "not in this recipe, and left out: box_heads.1, box_heads.2, mask_heads.0, mask_heads.1, mask_heads.2"
    )
    assert said[2:] == [
        "it has learnt with model.semantics detectron2, and this recipe has mmdetection; --model.semantics detectron2 "
        "keeps what it knows",
        "it has learnt with model.anchor_scales 2.0, and this recipe has 4.0; --model.anchor-scales 2.0 keeps what it "
        "knows",
    ]
    same = _source(tmp_path / "same.safetensors")
    assert "\n" not in start_from(tiny_model(3), same, ("a", "b", "c"), TINY)
