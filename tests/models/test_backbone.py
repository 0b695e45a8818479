"""Backbones from timm: features, freezing, styles, weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cascade_rcnn.config import ModelConfig
from cascade_rcnn.errors import CheckpointError, ConfigError
from cascade_rcnn.models.backbone import Backbone, about_weights
from cascade_rcnn.models.build import build_model, load_backbone_weights
from cascade_rcnn.models.fpn import FeaturePyramid

NETWORKS = (
    *("resnet18.tv_in1k", "vgg16.tv_in1k", "convnext_atto", "resnext50_32x4d.tv_in1k", "resnet10t", "regnetx_002"),
    *("mobilenetv4_conv_small_050", "efficientnet_lite0", "swin_tiny_patch4_window7_224", "mvitv2_tiny"),
    *("mambaout_femto", "hrnet_w18_small", "maxvit_rmlp_pico_rw_256"),
)
NAMED_STAGES = ("resnet18", "vgg16", "convnext", "resnext50", "resnet10t", "regnet", "swin", "mambaout", "maxvit")


@pytest.mark.parametrize("name", NETWORKS)
def test_features_have_strides_4_to_32(name: str) -> None:
    backbone = Backbone(name, frozen_stages=1 if name.startswith(NAMED_STAGES) else -1).eval()
    with torch.no_grad():
        features = backbone(torch.randn(1, 3, 64, 96))
    shapes = [(c, 64 // s, 96 // s) for c, s in zip(backbone.channels, (4, 8, 16, 32))]
    assert [tuple(f.shape[1:]) for f in features] == shapes


@pytest.mark.parametrize(
    "name", ["swin_tiny_patch4_window7_224", "hrnet_w18_small", "maxvit_rmlp_pico_rw_256", "halonet26t"]
)
def test_sides_may_be_any_number(name: str) -> None:
    backbone = Backbone(name, frozen_stages=-1, norm="batch").eval()
    with torch.no_grad():
        features = backbone(torch.randn(1, 3, 72, 88))
        whole = backbone(torch.randn(1, 3, 96, 64))
    for feature, stride in zip(features, (4, 8, 16, 32)):
        height, width = feature.shape[-2:]
        assert height in (72 // stride, -(-72 // stride)) and width in (88 // stride, -(-88 // stride))
    assert [f.shape[-2:] for f in whole] == [(24, 16), (12, 8), (6, 4), (3, 2)]


def test_channels_are_told_from_rows_by_the_networks_own_word() -> None:
    backbone = Backbone("mambaout_femto", frozen_stages=-1).eval()
    assert backbone.channels_last
    with torch.no_grad():  # as many rows as channels: the shape alone would mislead
        features = backbone(torch.randn(1, 3, 4 * backbone.channels[0], 32))
    assert [f.shape[1] for f in features] == backbone.channels
    assert features[0].shape == (1, backbone.channels[0], backbone.channels[0], 8)


@pytest.mark.parametrize(
    "name",
    [
        "hiera_tiny_224",
        "coatnet_nano_rw_224",
        "efficientformerv2_s0",
        "vit_tiny_patch16_224",
        "inception_v3",
        "botnet26t_256",
    ],
)
def test_networks_of_one_size_or_other_strides_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name}.*choose another network") as caught:
        Backbone(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("stages", "frozen"),
    [
        (-1, set()),
        (0, {"conv1", "bn1"}),
        (1, {"conv1", "bn1", "layer1"}),
        (2, {"conv1", "bn1", "layer1", "layer2"}),
        (4, {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4"}),
    ],
)
def test_stages_are_frozen_up_to_the_one_asked_for(stages: int, frozen: set[str]) -> None:
    backbone = Backbone("resnet18.tv_in1k", frozen_stages=stages)
    found = {name.split(".")[0] for name, p in backbone.body.named_parameters() if not p.requires_grad}
    trained = {name.split(".")[0] for name, p in backbone.body.named_parameters() if p.requires_grad}
    assert found == frozen and not found & trained


@pytest.mark.parametrize(
    ("norm", "moves", "learns"), [("frozen_statistics", False, True), ("frozen", False, False), ("batch", True, True)]
)
def test_norms_are_frozen_as_asked(norm: str, moves: bool, learns: bool) -> None:
    backbone = Backbone("resnet18.tv_in1k", norm=norm, frozen_stages=1).train()
    before = backbone.body.layer3[0].bn1.running_mean.clone()
    stem = backbone.body.bn1.running_mean.clone()
    backbone(torch.randn(2, 3, 64, 64))
    assert bool((backbone.body.layer3[0].bn1.running_mean != before).any()) == moves
    assert torch.equal(backbone.body.bn1.running_mean, stem)  # a frozen stage's statistics never move
    assert backbone.body.layer3[0].bn1.weight.requires_grad == learns


def test_caffe_style_strides_in_the_first_convolution() -> None:
    blocks = [Backbone("resnet50.tv_in1k", style=style).body.layer2[0] for style in ("pytorch", "caffe")]
    assert [(b.conv1.stride, b.conv2.stride) for b in blocks] == [((1, 1), (2, 2)), ((2, 2), (1, 1))]
    with pytest.raises(ConfigError, match="bottleneck"):
        Backbone("resnet18.tv_in1k", style="caffe")


def test_group_norm_replaces_batch_norm() -> None:
    kinds = [type(module) for module in Backbone("resnet18.tv_in1k", norm="group").modules()]
    assert torch.nn.BatchNorm2d not in kinds and torch.nn.GroupNorm in kinds


@pytest.mark.parametrize("name", ["resnet5000", "resnet50.no_such_weights", "deit_tiny_patch16_224"])
def test_an_unusable_network_is_one_line(name: str) -> None:
    with pytest.raises((ConfigError, CheckpointError)) as caught:
        Backbone(name, pretrained="no_such" in name)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_missing_imagenet_weights_say_where_to_put_a_file() -> None:
    with pytest.raises(CheckpointError, match=r"--model\.backbone-weights FILE") as caught:
        Backbone("resnet50.tv_in1k", pretrained=True)  # tests run without a network and with an empty cache
    assert "resnet50.tv_in1k" in str(caught.value) and "\n" not in str(caught.value)


def test_caffe_style_without_weights_says_what_to_do() -> None:
    with pytest.raises(CheckpointError, match="Caffe-style"):
        build_model(ModelConfig(style="caffe"), 3, pretrained=True)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_come_from_a_file(suffix: str, tmp_path: Path) -> None:
    source, path = Backbone("resnet18.tv_in1k"), tmp_path / f"weights{suffix}"
    state = {key: value.clone() for key, value in source.body.state_dict().items()}
    state["fc.weight"] = torch.zeros(1000, 512)  # a classifier's is left out
    if suffix == ".pth":
        torch.save(state, path)
    else:
        save_file(state, path)
    model = build_model(ModelConfig(backbone="resnet18.tv_in1k", backbone_weights=str(path)), 3, pretrained=True)
    assert torch.equal(model.backbone.body.layer4[1].conv2.weight, source.body.layer4[1].conv2.weight)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    backbone = Backbone("resnet18.tv_in1k")
    with pytest.raises(CheckpointError, match="no such file"):
        load_backbone_weights(backbone, tmp_path / "none.pth")
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "wrong.pth")
    with pytest.raises(CheckpointError, match=r"wrong.pth.*keys are missing.*another shape"):
        load_backbone_weights(backbone, tmp_path / "wrong.pth")


def test_a_network_without_named_stages_says_how_to_train_it() -> None:
    with pytest.raises(ConfigError, match=r"--model\.frozen-stages -1"):
        Backbone("mobilenetv3_small_050", frozen_stages=1)
    Backbone("mobilenetv3_small_050", frozen_stages=-1)


@pytest.mark.parametrize("size", [(64, 96), (72, 88)])  # the second does not halve evenly
def test_the_pyramid_is_the_same_with_and_without_gradients(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    fpn = FeaturePyramid([8, 16, 32, 64], channels=8)
    maps = [torch.randn(2, c, -(-size[0] // s), -(-size[1] // s)) for c, s in zip((8, 16, 32, 64), (4, 8, 16, 32))]
    slow, features = fpn(list(maps)), list(maps)
    with torch.no_grad():
        fast = fpn(features)
    assert not features  # emptied, so that memory is freed on the way
    assert all(torch.equal(a, b) for a, b in zip(slow, fast)) and len(fast) == 5


def test_stochastic_depth_is_what_the_configuration_says() -> None:
    images = torch.randn(1, 3, 64, 64)
    plain = Backbone("swin_tiny_patch4_window7_224", frozen_stages=-1, output_norms=True)  # timm's default is not 0
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(plain.train()(images), plain.eval()(images)))
        torch.manual_seed(0)
        dropping = Backbone("convnext_atto", frozen_stages=-1, drop_path=0.9)
        assert not torch.equal(dropping.train()(images)[3], dropping.eval()(images)[3])
    with pytest.raises(ConfigError, match="'vgg11' has no stochastic depth"):
        Backbone("vgg11", frozen_stages=-1, drop_path=0.1)


def test_a_map_that_is_no_multiple_of_the_window_is_padded_before_it_is_shifted() -> None:
    """Against the attention of one block computed window by window on the padded and rolled map."""
    torch.manual_seed(0)
    block = Backbone("swin_tiny_patch4_window7_224", frozen_stages=-1).body.layers_0.blocks[1].eval()
    assert block.shift_size == (3, 3)
    x = torch.randn(1, 9, 10, 96)
    padded = torch.zeros(1, 14, 14, 96)
    padded[:, :9, :10] = x
    rolled = padded.roll((-3, -3), dims=(1, 2))
    region = torch.zeros(14, 14)
    for row, rows in enumerate((slice(0, 7), slice(7, 11), slice(11, 14))):
        for column, columns in enumerate((slice(0, 7), slice(7, 11), slice(11, 14))):
            region[rows, columns] = 3 * row + column
    wanted = torch.zeros_like(rolled)
    with torch.no_grad():
        for top in (0, 7):
            for left in (0, 7):
                window = np.s_[top : top + 7, left : left + 7]
                mine = region[window].flatten()
                mask = torch.where(mine[:, None] == mine, 0.0, -100.0)[None]
                found = block.attn(rolled[:, window[0], window[1]].reshape(1, 49, 96), mask=mask)
                wanted[:, window[0], window[1]] = found.view(1, 7, 7, 96)
        torch.testing.assert_close(block._attn(x), wanted.roll((3, 3), dims=(1, 2))[:, :9, :10])


def test_stochastic_depth_that_a_network_lacks_is_no_failed_download() -> None:
    for pretrained in (False, True):
        with pytest.raises(ConfigError, match=r"model\.drop_path 0\.1: 'vgg16\.tv_in1k' has no stochastic depth"):
            Backbone("vgg16.tv_in1k", pretrained=pretrained, drop_path=0.1)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("convnext_tiny.fb_in1k", "licence: apache-2.0"),
        ("swin_tiny_patch4_window7_224", "licence: mit"),
        ("convnextv2_tiny.fcmae", "licence: cc-by-nc-4.0; not for commercial use"),
        ("test_resnet", "licence: "),
    ],
)
def test_the_licence_of_starting_weights_is_told(name: str, said: str) -> None:
    assert said in about_weights(name)
