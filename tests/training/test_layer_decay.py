"""The learning rate of each layer, beside the table of ConvNeXt's authors."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from cascade_rcnn.config import TrainConfig
from cascade_rcnn.errors import ConfigError
from cascade_rcnn.models.build import build_model
from cascade_rcnn.recipes import load_config
from cascade_rcnn.training.layer_decay import rate_factors
from cascade_rcnn.training.optim import Updater, build_optimizer
from tiny import squares


@pytest.fixture(scope="module")
def tiny() -> nn.Module:
    with torch.device("meta"):
        return build_model(load_config("cascade_mask_rcnn_convnext_t_fpn_3x_coco").model, 80)


def test_groups_of_convnext(tiny: nn.Module) -> None:
    factors = rate_factors((name for name, _ in tiny.named_parameters()), 0.7)
    body = "backbone.body."
    for name, group in {
        body + "stem_0.weight": 0,
        body + "stem_1.bias": 0,
        body + "stages_0.blocks.2.gamma": 1,
        body + "stages_1.downsample.1.weight": 2,
        body + "stages_1.blocks.0.norm.bias": 2,
        body + "stages_2.downsample.0.weight": 3,
        body + "stages_2.blocks.2.conv_dw.weight": 3,
        body + "stages_2.blocks.3.conv_dw.weight": 4,
        body + "stages_2.blocks.8.mlp.fc2.bias": 5,
        body + "stages_3.downsample.1.weight": 6,
        body + "stages_3.blocks.2.gamma": 6,
        "backbone.output_norms.0.weight": 7,
        "fpn.lateral.0.weight": 7,
        "cascade.box_heads.2.fc1.weight": 7,
    }.items():
        assert factors[name] == pytest.approx(0.7 ** (7 - group)), name
    assert factors.keys() == dict(tiny.named_parameters()).keys()


def test_a_longer_third_stage_has_more_groups() -> None:
    names = [f"backbone.body.stages_{stage}.blocks.{block}.gamma" for stage in range(4) for block in range(27)]
    factors = rate_factors([*names, "backbone.body.stem_0.weight", "rpn.conv.weight"], 0.8)
    assert factors["backbone.body.stem_0.weight"] == pytest.approx(0.8**13)
    assert factors["backbone.body.stages_2.blocks.26.gamma"] == pytest.approx(0.8**2)
    assert factors["backbone.body.stages_3.blocks.0.gamma"] == pytest.approx(0.8)
    assert factors["rpn.conv.weight"] == 1


def test_resnets_and_swins_have_groups_too_others_are_refused() -> None:
    swin = rate_factors([f"backbone.body.layers_{i}.blocks.1.norm1.bias" for i in range(4)], 0.5)
    resnet = rate_factors([f"backbone.body.layer{i}.0.conv1.weight" for i in range(1, 5)], 0.5)
    assert [*swin.values()] == [*resnet.values()] == [0.5**4, 0.5**3, 0.5**2, 0.5]
    with pytest.raises(ConfigError, match="layer_decay is for ConvNeXt, Swin and ResNet"):
        rate_factors(["backbone.body.features_3.weight", "fpn.lateral.0.weight"], 0.5)
    with pytest.raises(ConfigError, match="layer_decay 0"):
        TrainConfig(layer_decay=0.0)


class _Net(nn.Module):
    """Names as in ConvNeXt, one number each."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.body = body = nn.Module()
        for name in ("stem_0", "stages_0", "stages_1", "stages_2", "stages_3"):
            setattr(body, name, nn.Linear(1, 1))
        self.fpn = nn.Linear(1, 1)


def test_a_step_moves_each_layer_by_its_own_rate() -> None:
    net = _Net()
    net.backbone.body.stem_0.requires_grad_(False)
    before = {name: value.detach().clone() for name, value in net.named_parameters()}
    train = TrainConfig(optimizer="adamw", weight_decay=0.0, layer_decay=0.5)
    updater = Updater(net, train, lr=0.1, device=torch.device("cpu"))
    updater.backward(sum(value.sum() for value in net.parameters()))  # type: ignore[arg-type]
    updater.step(0.5)  # Adam's first step is as long as the rate
    moved = {name: float((before[name] - value.detach()).abs()) for name, value in net.named_parameters()}
    assert moved["backbone.body.stem_0.weight"] == 0
    for name, power in {"stages_0.weight": 4, "stages_2.bias": 2, "stages_3.weight": 1}.items():
        assert moved[f"backbone.body.{name}"] == pytest.approx(0.05 * 0.5**power, rel=1e-4)
    assert moved["fpn.weight"] == pytest.approx(0.05, rel=1e-4)


def test_tables_of_positions_go_without_decay_as_norms_do() -> None:
    net = nn.Module()
    net.relative_position_bias_table = nn.Parameter(torch.zeros(4, 2))
    net.weight = nn.Parameter(torch.zeros(4, 2))
    decayed, free = sorted(
        build_optimizer(net, TrainConfig(weight_decay=0.1, norm_weight_decay=False), lr=1, fused=False).param_groups,
        key=lambda group: -group["weight_decay"],
    )
    assert decayed["params"][0] is net.weight and free["params"][0] is net.relative_position_bias_table


@pytest.mark.parametrize("backbone", ["convnext_atto", "swin_tiny_patch4_window7_224"])
def test_a_step_of_a_network_with_all_that_its_recipe_asks_for(backbone: str) -> None:
    size = "convnext_t" if backbone.startswith("convnext") else "swin_t"
    recipe = load_config(f"cascade_mask_rcnn_{size}_fpn_3x_coco")
    small = {"backbone": backbone, "fpn_channels": 32, "head_channels": 64, "mask_channels": 32, "roi_samples": 32}
    torch.manual_seed(0)
    model = build_model(dataclasses.replace(recipe.model, pretrained=False, drop_path=0.0, **small), 3)
    updater = Updater(model, recipe.train, lr=recipe.train.lr, device=torch.device("cpu"))
    losses = model.loss(*squares(side=96))
    updater.backward(torch.stack(list(losses.values())).sum())
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without and all(p.requires_grad for p in model.parameters())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert updater.step(1.0).isfinite()
    moved = {name: float((p.detach() - before[name]).abs().max()) for name, p in model.named_parameters()}
    stem = "stem_0" if backbone.startswith("convnext") else "patch_embed.proj"
    ratio = moved[f"backbone.body.{stem}.weight"] / moved["cascade.box_heads.0.convs.0.0.weight"]
    groups = 3 + 2 + 1  # two for the six blocks of the third stage
    assert ratio == pytest.approx(recipe.train.layer_decay**groups, rel=0.05)
