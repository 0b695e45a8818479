"""RegNets and deformable ResNets of mmdetection and detectron2 become networks of ours."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from cascade_rcnn.checkpoint import load_checkpoint
from cascade_rcnn.config import ModelConfig
from cascade_rcnn.convert.checkpoint import run_convert
from cascade_rcnn.convert.infer_config import backbone_of
from cascade_rcnn.convert.key_tables import rename
from cascade_rcnn.errors import CheckpointError
from cascade_rcnn.models.backbone import Backbone
from cascade_rcnn.models.build import build_model
from cascade_rcnn.zoo.catalog import published
from foreign_checkpoints import D2, foreign_state, mmdetection_name

SIZES = {"400MF": "004", "800MF": "008", "1.6GF": "016", "3.2GF": "032", "4GF": "040", "6.4GF": "064", "8GF": "080"}
SIZES["12GF"] = "120"


def _mmdetections_regnet_key(key: str) -> str:
    key = key.replace("stem.conv.", "conv1.").replace("stem.bn.", "bn1.")
    match = re.fullmatch(r"s(\d)\.b(\d+)\.(conv(\d)|downsample)\.(conv|bn)\.(.+)", key)
    if match is None:
        return "backbone." + key
    stage, block, _, number, kind, rest = match.groups()
    inner = f"{kind}{number}" if number else {"conv": "downsample.0", "bn": "downsample.1"}[kind]
    return f"backbone.layer{stage}.{int(block) - 1}.{inner}.{rest}"


@pytest.mark.parametrize("size", SIZES)
def test_a_regnet_is_told_by_its_shapes(size: str) -> None:
    with torch.device("meta"):
        ours = Backbone(f"regnetx_{SIZES[size]}").body.state_dict()
    theirs = {_mmdetections_regnet_key(key): value for key, value in ours.items()}
    assert "backbone.layer1.0.bn1.weight" in theirs and "backbone.layer2.0.downsample.1.weight" in theirs
    renamed, left_over = rename(theirs, "mmdetection")
    assert not left_over and {key.removeprefix("backbone.body.") for key in renamed} == set(ours)
    assert backbone_of(renamed)[0].startswith(f"regnetx_{SIZES[size]}.")


def test_every_listed_regnet_has_a_size_that_is_tested() -> None:
    entries = [entry for entry in published() if "regnetx" in entry.name and not entry.missing]
    assert len(entries) == 22
    assert {re.search(r"regnetx_([\d.]+[MG]F)", entry.name)[1] for entry in entries} == set(SIZES)  # type: ignore[index]


@pytest.mark.parametrize(
    ("kind", "groups", "stages"), [("plain", 1, (2, 3, 4)), ("modulated", 1, (2, 3, 4)), ("modulated", 4, (3, 4))]
)
@pytest.mark.parametrize("offset", ["conv2.conv_offset", "conv2_offset"], ids=["mmcv", "mmcv before 1.0"])
def test_mmdetections_deformable_convolutions_are_read(
    tmp_path: Path, kind: str, groups: int, stages: tuple[int, ...], offset: str
) -> None:
    config = ModelConfig(
        backbone="resnet50",
        deformable=kind,  # type: ignore[arg-type]
        deformable_groups=groups,
        deformable_stages=stages,
        fpn_channels=32,
        head_channels=16,
    )
    wanted = build_model(config, 3).state_dict()
    for key, value in wanted.items():
        if ".offset." in key:
            torch.nn.init.normal_(value)
    state = {mmdetection_name(key).replace("conv2.offset", offset): value for key, value in wanted.items()}
    torch.save({"state_dict": state}, tmp_path / "source.pth")
    run_convert(tmp_path / "source.pth", tmp_path / "ours.safetensors")
    made = load_checkpoint(tmp_path / "ours.safetensors")
    found = made.config.model
    assert (found.deformable, found.deformable_groups, found.deformable_stages) == (kind, groups, stages)
    offsets = [key for key in wanted if ".offset." in key]
    assert len(offsets) == 2 * sum((3, 4, 6, 3)[stage - 1] for stage in stages)
    assert all(torch.equal(made.state[key], wanted[key]) for key in offsets)


def test_detectron2s_deformable_convolutions_are_read(tmp_path: Path) -> None:
    state = foreign_state(D2)
    for key in [key for key in state if re.search(r"res[345]\.\d+\.conv2\.weight", key)]:
        place = key.replace("conv2.weight", "conv2_offset")
        state |= {f"{place}.weight": torch.rand(18, state[key].shape[1], 3, 3), f"{place}.bias": torch.rand(18)}
    torch.save({"model": state}, tmp_path / "source.pth")
    run_convert(tmp_path / "source.pth", tmp_path / "ours.safetensors")
    made = load_checkpoint(tmp_path / "ours.safetensors")
    assert (made.config.model.deformable, made.config.model.deformable_stages) == ("plain", (2, 3, 4))
    theirs = state["backbone.bottom_up.res4.5.conv2_offset.bias"]
    assert torch.equal(made.state["backbone.body.layer3.5.conv2.offset.bias"], theirs)


def test_offsets_of_no_known_number_are_refused(tmp_path: Path) -> None:
    model = build_model(ModelConfig(backbone="resnet50", fpn_channels=32, head_channels=16), 3)
    state = {mmdetection_name(key): value for key, value in model.state_dict().items()}
    state["backbone.layer2.0.conv2.conv_offset.weight"] = torch.ones(5, 128, 3, 3)
    torch.save({"state_dict": state}, tmp_path / "source.pth")
    with pytest.raises(CheckpointError, match=r"deformable convolutions have \[5\] offsets"):
        run_convert(tmp_path / "source.pth", tmp_path / "ours.safetensors")
