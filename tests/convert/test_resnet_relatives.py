"""RegNets and deformable ResNets of mmdetection and detectron2 become networks of ours."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from cascade_rcnn.checkpoint import load_checkpoint
from cascade_rcnn.config import ModelConfig
from cascade_rcnn.convert.checkpoint import run_convert
from cascade_rcnn.convert.infer_config import backbone_of
from cascade_rcnn.convert.key_tables import rename
from cascade_rcnn.errors import CheckpointError
from cascade_rcnn.models.backbone import Backbone
from cascade_rcnn.models.build import build_model
from cascade_rcnn.structures import ImageBatch
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
    entries = [entry for entry in published() if "regnetx" in entry.name and entry.library == "mmdetection"]
    entries = [entry for entry in entries if not entry.missing]
    assert len(entries) == 22
    theirs = [entry for entry in published() if "regnet" in entry.name and entry.library == "detectron2"]
    assert len(theirs) == 6 and not any(entry.missing for entry in theirs)
    assert {re.search(r"regnetx_([\d.]+[MG]F)", entry.name)[1] for entry in entries} == set(SIZES)  # type: ignore[index]


def _detectron2s_regnet_key(key: str) -> str:
    match = re.fullmatch(r"(s\d\.b\d+)\.(conv(\d)|downsample|se)\.(conv|bn|fc1|fc2)\.(.+)", key)
    if match is None:
        return "backbone.bottom_up." + key  # the stem
    block, layer, number, kind, rest = match.groups()
    letter = "abc"[int(number) - 1] if number else ""
    inner = {"conv": f"f.{letter}", "bn": f"f.{letter}_bn", "fc1": "f.se.f_ex.0", "fc2": "f.se.f_ex.2"}[kind]
    if layer == "downsample":
        inner = {"conv": "proj", "bn": "bn"}[kind]
    return f"backbone.bottom_up.{block}.{inner}.{rest}"


def _regnet_by_its_definition(state: dict[str, torch.Tensor], x: torch.Tensor, group_width: int) -> list[torch.Tensor]:
    """Outputs of the four stages, from detectron2's weights (Radosavovic et al., arXiv 2003.13678)."""

    def convolved(x: torch.Tensor, conv: str, norm: str, stride: int = 1, groups: int = 1) -> torch.Tensor:
        weight = state[f"backbone.bottom_up.{conv}.weight"]
        x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2, groups=groups)
        mean, var, scale, shift = (
            state[f"backbone.bottom_up.{norm}.{name}"] for name in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, mean, var, scale, shift)

    x = convolved(x, "stem.conv", "stem.bn", stride=2).relu()
    outputs = []
    for stage in range(1, 5):
        number = 1
        while f"backbone.bottom_up.s{stage}.b{number}.f.a.weight" in state:
            block, stride = f"s{stage}.b{number}", 2 if number == 1 else 1
            shortcut = convolved(x, f"{block}.proj", f"{block}.bn", stride) if number == 1 else x
            y = convolved(x, f"{block}.f.a", f"{block}.f.a_bn").relu()
            y = convolved(y, f"{block}.f.b", f"{block}.f.b_bn", stride, y.shape[1] // group_width).relu()
            squeeze = f"backbone.bottom_up.{block}.f.se.f_ex."
            if f"{squeeze}0.weight" in state:
                s = F.conv2d(
                    y.mean((2, 3), keepdim=True), state[f"{squeeze}0.weight"], state[f"{squeeze}0.bias"]
                ).relu()
                y = y * F.conv2d(s, state[f"{squeeze}2.weight"], state[f"{squeeze}2.bias"]).sigmoid()
            x = (shortcut + convolved(y, f"{block}.f.c", f"{block}.f.c_bn")).relu()
            number += 1
        outputs.append(x)
    return outputs


@pytest.mark.parametrize(("name", "group_width"), [("regnetx_004", 16), ("regnety_004", 8)])
def test_detectron2s_regnets_give_what_their_weights_say(tmp_path: Path, name: str, group_width: int) -> None:
    torch.manual_seed(0)
    body = Backbone(name).body
    regnet = {}
    for key, value in body.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            regnet[_detectron2s_regnet_key(key)] = torch.rand_like(value) + (0.5 if "running_var" in key else -0.5)
    state = {key: value for key, value in foreign_state(D2).items() if "bottom_up" not in key} | regnet
    for level, channels in enumerate(body.feature_info.channels()[-4:], start=2):
        state[f"backbone.fpn_lateral{level}.weight"] = torch.rand(32, channels, 1, 1)
    torch.save({"model": state}, tmp_path / "source.pth")
    run_convert(tmp_path / "source.pth", tmp_path / "ours.safetensors")
    made = load_checkpoint(tmp_path / "ours.safetensors")
    assert made.config.model.backbone.startswith(f"{name}.")

    ours = build_model(made.config.model, 3).eval()
    ours.load_state_dict(made.state)
    pixels = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8)
    mean, std = torch.tensor([103.53, 116.28, 123.675]), torch.tensor([57.375, 57.12, 58.395])
    sizes = torch.tensor([[64, 96]])
    theirs = (pixels.flip(1) - mean[:, None, None]) / std[:, None, None]  # BGR
    with torch.no_grad():
        # the difference of the means lies in the first bias, so a border that is padded with zeros differs: look inside
        found = ours.backbone(ours.normalize(ImageBatch(pixels, sizes, sizes)))
        for one, other in zip(found, _regnet_by_its_definition(regnet, theirs, group_width), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


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
