"""Nothing silently wrong in a conversion: anchors, settings, heads, norms, names and nestings are read, refused, said.

Networks are small: mmdetection's and detectron2's key names around a ResNet-18's or -50's weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cascade_rcnn.checkpoint import Checkpoint, load_checkpoint
from cascade_rcnn.cli import main
from cascade_rcnn.config import ModelConfig
from cascade_rcnn.convert.anchors import from_detectron
from cascade_rcnn.convert.checkpoint import run_convert
from cascade_rcnn.convert.config_text import read_config_text
from cascade_rcnn.convert.values import change_eps, standardize_weights
from cascade_rcnn.errors import CheckpointError
from cascade_rcnn.models.anchors import AnchorGenerator
from cascade_rcnn.models.build import build_model
from foreign_checkpoints import CLASSES, D2, foreign_state, mmdetection_name, small_state

STRIDES = (4, 8, 16, 32, 64)


def text(**parts: str) -> str:
    """A config text of mmdetection whose parts can be replaced or extended."""
    given = {
        "backbone": "type='ResNet', depth=18, norm_cfg=dict(type='BN', requires_grad=True), norm_eval=True",
        "neck": "type='FPN', num_outs=5",
        "rpn": "type='RPNHead'",
        "anchors": "type='AnchorGenerator', scales=[8], ratios=[0.5, 1.0, 2.0], strides=[4, 8, 16, 32, 64]",
        "coder": "type='DeltaXYWHBBoxCoder', target_means=[0., 0., 0., 0.], target_stds=[0.1, 0.1, 0.2, 0.2]",
        "head": "type='Shared2FCBBoxHead', num_classes=3",
        "roi": "type='CascadeRoIHead'",
        "align": "type='RoIAlign', output_size=7, sampling_ratio=0",
        "test_rpn": "nms_pre=1000, max_per_img=1000, nms=dict(type='nms', iou_threshold=0.7), min_bbox_size=0",
        "test_rcnn": "score_thr=0.05, nms=dict(type='nms', iou_threshold=0.5), max_per_img=100",
        "resize": "type='Resize', scale=(1333, 800), keep_ratio=True",
    } | parts
    heads = ", ".join([f"dict({given['head']}, bbox_coder=dict({given['coder']}))"] * 3)
    return (
        f"model = dict(type='CascadeRCNN', backbone=dict({given['backbone']}), neck=dict({given['neck']}), "
        f"rpn_head=dict({given['rpn']}, anchor_generator=dict({given['anchors']})), roi_head=dict({given['roi']}, "
        f"bbox_roi_extractor=dict(type='SingleRoIExtractor', roi_layer=dict({given['align']})), bbox_head=[{heads}]), "
        f"test_cfg=dict(rpn=dict({given['test_rpn']}), rcnn=dict({given['test_rcnn']})))\n"
        f"test_pipeline = [dict(type='LoadImageFromFile'), dict({given['resize']})]\n{given.get('more', '')}"
    )


def convert(folder: Path, content: object, *, name: str = "source.pth", **options: Any) -> Checkpoint:
    torch.save(content, folder / name)
    run_convert(folder / name, folder / "dest.safetensors", overwrite=True, **options)
    return load_checkpoint(folder / "dest.safetensors")


def with_text(state: Mapping[str, Tensor], config: object, names: tuple[str, ...] = ("a", "b", "c")) -> dict[str, Any]:
    return {"state_dict": dict(state), "meta": {"CLASSES": names, "cfg": config}}


def anchor_sides(made: Checkpoint) -> list[list[float]]:
    """Sides of the anchors that the converted network makes, per level, for the ratio nearest to a square."""
    base = build_model(made.config.model, len(made.class_names)).rpn.anchors.base  # [levels, A, 4]
    area = (base[..., 2] - base[..., 0]) * (base[..., 3] - base[..., 1])
    return [sorted({round(float(side), 2) for side in level}) for level in area.sqrt()]


def more_anchors(state: dict[str, Tensor], number: int) -> dict[str, Tensor]:
    """With ``number`` anchors at each position, their rows telling them apart."""
    width = state["rpn_head.rpn_cls.weight"].shape[1]
    state["rpn_head.rpn_cls.weight"] = torch.arange(number).view(-1, 1, 1, 1).expand(-1, width, 1, 1).float().clone()
    state["rpn_head.rpn_cls.bias"] = torch.arange(number).float()
    state["rpn_head.rpn_reg.weight"] = state["rpn_head.rpn_cls.weight"].repeat_interleave(4, dim=0)
    state["rpn_head.rpn_reg.bias"] = torch.arange(number).float().repeat_interleave(4)
    return state


# Anchors


@pytest.mark.parametrize(
    ("setting", "number", "sides"),
    [
        ("base_sizes=[2, 4, 8, 16, 32], scales=[8]", 3, [[16], [32], [64], [128], [256]]),
        ("base_sizes=[8, 16, 24, 32, 64], scales=[4]", 3, [[32], [64], [96], [128], [256]]),
        ("octave_base_scale=4, scales_per_octave=1", 3, [[16], [32], [64], [128], [256]]),
        ("octave_base_scale=4, scales_per_octave=2", 6, [[round(4 * s, 2), round(4 * 2**0.5 * s, 2)] for s in STRIDES]),
        ("scales=[2.5]", 3, [[10], [20], [40], [80], [160]]),
    ],
)
def test_anchors_of_the_config_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str, number: int, sides: list[list[float]]
) -> None:
    anchors = f"type='AnchorGenerator', {setting}, ratios=[0.5, 1.0, 2.0], strides=[4, 8, 16, 32, 64]"
    made = convert(tmp_path, with_text(more_anchors(small_state(), number), text(anchors=anchors)))
    assert anchor_sides(made) == sides
    assert "(its config text)" in next(line for line in capsys.readouterr().out.splitlines() if "anchors: " in line)


def test_scales_before_ratios_are_put_in_our_order(tmp_path: Path) -> None:
    anchors = "type='AnchorGenerator', scales=[4, 8], ratios=[0.5, 1.0, 2.0], scale_major=False"
    made = convert(tmp_path, with_text(more_anchors(small_state(), 6), text(anchors=anchors)))
    theirs = [(scale, ratio) for scale in (4, 8) for ratio in (0.5, 1.0, 2.0)]
    ours = AnchorGenerator((4,), scales=(4, 8), ratios=(0.5, 1.0, 2.0)).base[0]  # [6, 4]
    for row, number in zip(ours, made.state["rpn.objectness.bias"].int().tolist()):
        scale, ratio = theirs[number]
        width, height = row[2] - row[0], row[3] - row[1]
        assert float(height / width) == pytest.approx(ratio) and float(height * width) == pytest.approx(
            (4 * scale) ** 2
        )
    assert torch.equal(made.state["rpn.deltas.bias"][::4], made.state["rpn.objectness.bias"])


def cell_anchors(sizes: tuple[tuple[float, ...], ...]) -> dict[str, Tensor]:
    """detectron2's buffers: sizes outside, ratios inside."""
    buffers = {}
    for level, own in enumerate(sizes):
        shapes = [((s * s / r) ** 0.5, (s * s * r) ** 0.5) for s in own for r in (0.5, 1.0, 2.0)]
        rows = torch.tensor([[-w / 2, -h / 2, w / 2, h / 2] for w, h in shapes])
        buffers[f"proposal_generator.anchor_generator.cell_anchors.{level}"] = rows
    return buffers


def test_anchors_of_detectron2s_buffers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = convert(tmp_path, {"model": foreign_state(D2) | cell_anchors(((8,), (16,), (32,), (64,), (128,)))})
    assert anchor_sides(made) == [[8], [16], [32], [64], [128]]
    made = convert(tmp_path, {"model": foreign_state(D2) | cell_anchors(((32,), (48,), (96,), (200,), (512,)))})
    assert anchor_sides(made) == [[32], [48], [96], [200], [512]]
    assert "32 48 96 200 512 pixels, ratios 0.5 1 2 (cell_anchors in the file)" in capsys.readouterr().out
    convert(tmp_path, {"model": foreign_state(D2)})
    assert "anchors: 32 64 128 256 512 pixels, ratios 0.5 1 2 (assumed" in capsys.readouterr().out


def test_two_sizes_of_detectron2_change_the_rows(tmp_path: Path) -> None:
    state = foreign_state(D2) | cell_anchors(tuple((6 * s, 8 * s) for s in STRIDES))
    head = "proposal_generator.rpn_head."
    for name, rows in (("objectness_logits", 1), ("anchor_deltas", 4)):
        weight = state[f"{head}{name}.weight"]
        state[f"{head}{name}.weight"] = torch.zeros(6 * rows, *weight.shape[1:])
        state[f"{head}{name}.bias"] = torch.arange(6).repeat_interleave(rows).float()
    made = convert(tmp_path, {"model": state})
    assert made.state["rpn.objectness.bias"].tolist() == [0, 3, 1, 4, 2, 5]  # ratio outside, size inside
    assert made.state["rpn.deltas.bias"][::4].tolist() == [0, 3, 1, 4, 2, 5]


def test_anchors_of_detectrons_settings() -> None:
    found = from_detectron("FPN: {FPN_ON: true, RPN_ANCHOR_START_SIZE: 16, RPN_ASPECT_RATIOS: [0.5, 1, 2]}")
    assert found is not None and str(found) == "16 32 64 128 256 pixels, ratios 0.5 1 2"
    assert from_detectron("MODEL: {}") is None


@pytest.mark.parametrize(
    "rows", [[[-8, -8, 8, 8], [-16, -4, 16, 4], [-10, -30, 10, 30]], [[0, 0, 16, 16], [0, 0, 8, 32], [0, 0, 32, 8]]]
)
def test_anchors_that_cannot_be_made_are_refused(tmp_path: Path, rows: list[list[float]]) -> None:
    name = "proposal_generator.anchor_generator.cell_anchors"
    buffers = {f"{name}.{level}": torch.tensor(rows).float() for level in range(5)}
    with pytest.raises(CheckpointError, match="no product of sizes and ratios"):
        convert(tmp_path, {"model": foreign_state(D2) | buffers})


def test_a_recipe_with_other_anchors_than_the_file_is_refused(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.py"
    recipe.write_text(
        "from cascade_rcnn.config import Config, ModelConfig\n"
        "config = Config(model=ModelConfig(semantics='detectron2', style='caffe', masks='one', "
        "fpn_channels=32, head_channels=16, mask_channels=32))\n"
    )
    state = foreign_state(D2) | cell_anchors(((8,), (16,), (32,), (64,), (128,)))
    with pytest.raises(CheckpointError, match=r"8 16 32 64 128 pixels.*drop --config"):
        convert(tmp_path, {"model": state}, config=str(recipe))


# Settings of the config text


IMPOSSIBLE = {
    "LegacyDeltaXYWHBBoxCoder": {"coder": "type='LegacyDeltaXYWHBBoxCoder'"},
    "target_means": {"coder": "type='DeltaXYWHBBoxCoder', target_means=[0.1, 0., 0., 0.]"},
    "clip_border": {"coder": "type='DeltaXYWHBBoxCoder', clip_border=False"},
    "rpn_head.bbox_coder.target_stds": {"rpn": "type='RPNHead', bbox_coder=dict(target_stds=[0.1, 0.1, 0.2, 0.2])"},
    "LegacyAnchorGenerator": {"anchors": "type='LegacyAnchorGenerator', scales=[8], center_offset=0.5"},
    "anchor_generator.strides": {"anchors": "type='AnchorGenerator', scales=[8], strides=[8, 16, 32, 64, 128]"},
    "num_outs = 6": {"neck": "type='FPN', num_outs=6"},
    "sampling_ratio = 2": {"align": "type='RoIAlign', output_size=7, sampling_ratio=2"},
    "aligned": {"align": "type='RoIAlign', output_size=7, sampling_ratio=0, aligned=False"},
    "RoIPool": {"align": "type='RoIPool', output_size=7"},
    "NormedLinear": {"head": "type='Shared2FCBBoxHead', cls_predictor_cfg=dict(type='NormedLinear', tempearture=20)"},
    "SeesawLoss": {"head": "type='Shared2FCBBoxHead', loss_cls=dict(type='SeesawLoss', p=0.8)"},
    "use_sigmoid": {"head": "type='Shared2FCBBoxHead', loss_cls=dict(type='FocalLoss', use_sigmoid=True)"},
    "num_classes = 7": {"head": "type='Shared2FCBBoxHead', num_classes=7"},
    "HybridTaskCascadeRoIHead": {"roi": "type='HybridTaskCascadeRoIHead'"},
    "interleaved": {"roi": "type='CascadeRoIHead', interleaved=True"},
    "PAFPN": {"neck": "type='mmdet.models.necks.PAFPN', num_outs=5"},
    "bilinear": {"neck": "type='FPN', num_outs=5, upsample_cfg=dict(mode='bilinear')"},
    "plugins": {"backbone": "type='ResNet', depth=18, plugins=[dict(cfg=dict(type='ContextBlock'))]"},
    "dcn": {"backbone": "type='ResNet', depth=18, dcn=dict(type='DCNv3', deform_groups=1)"},
    "DetectoRS_ResNet": {"backbone": "type='DetectoRS_ResNet', depth=18"},
    "dilations": {"backbone": "type='ResNet', depth=18, dilations=(1, 1, 1, 2)"},
}


@pytest.mark.parametrize("word", IMPOSSIBLE)
def test_settings_that_change_results_are_refused_by_name(tmp_path: Path, word: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        convert(tmp_path, with_text(small_state(), text(**IMPOSSIBLE[word])))
    said = str(caught.value)
    assert word in said and "--config" not in said and "\n" not in said
    assert not (tmp_path / "dest.safetensors").exists()


UNLIKE = {
    "keep_ratio": {"resize": "type='Resize', scale=(640, 640), keep_ratio=False"},
    "keep_ratio = False": {"resize": "type='Resize', scale=(640, 640)"},  # what version 3 takes it for
    "nms.iou_threshold = 0.9": {"test_rpn": "nms=dict(type='nms', iou_threshold=0.9)"},
    "nms_pre = 6000": {"test_rpn": "nms_pre=6000, max_per_img=1000"},
    "min_bbox_size": {"test_rpn": "min_bbox_size=4"},
    "mask_thr_binary": {"test_rcnn": "mask_thr_binary=0.3"},
    "CLAHE": {"resize": "type='Resize', scale=(640, 640), keep_ratio=True), dict(type='CLAHE'"},
}


@pytest.mark.parametrize("word", UNLIKE)
def test_test_settings_unlike_ours_are_refused_unless_a_recipe_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], word: str
) -> None:
    content = with_text(small_state(), text(**UNLIKE[word]))
    content["state_dict"] = {key: value for key, value in content["state_dict"].items() if "mask_head" not in key}
    with pytest.raises(CheckpointError, match=rf"{re.escape(word)}.*--config NAME"):
        convert(tmp_path, content)
    recipe = tmp_path / "mine.py"  # the way out that the message names
    recipe.write_text(
        "from cascade_rcnn.config import Config, ModelConfig\n"
        "config = Config(model=ModelConfig(backbone='resnet18', fpn_channels=32, head_channels=16))\n"
    )
    convert(tmp_path, content, config=str(recipe))
    assert "its config text says otherwise: " in (out := capsys.readouterr().out) and word.split(" = ")[0] in out


def test_what_is_not_taken_over_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head = (
        "type='Shared2FCBBoxHead', reg_decoded_bbox=True, loss_bbox=dict(type='BoundedIoULoss', loss_weight=10.0), "
        "my_own_switch=7"
    )
    made = convert(
        tmp_path,
        with_text(
            small_state(),
            text(
                head=head,
                test_rcnn="score_thr=0.001, max_per_img=300, nms=dict(type='nms', iou_threshold=0.6)",
                more="optimizer = dict(type='SGD', lr=0.02)\ntotal_epochs = 12\n"
                "train_cfg = dict(rcnn=[dict(sampler=dict(type='OHEMSampler', num=256))])\n",
            ),
        ),
    )
    out = capsys.readouterr().out
    for word in (
        *("loss_bbox.type = 'BoundedIoULoss'", "reg_decoded_bbox = True", "my_own_switch = 7 (not known here)"),
        *("sampler.type = 'OHEMSampler'", "not read (training, data, logging): optimizer, total_epochs"),
        *("max_detections 300", "nms_iou 0.6", "roi_samples 256"),
    ):
        assert word in out, word
    model = made.config.model
    assert (model.max_detections, model.nms_iou, model.score_threshold, model.roi_samples) == (300, 0.6, 0.001, 256)


@pytest.mark.parametrize("kind", ["GIoU", "DIoU", "CIoU"])
def test_an_iou_loss_of_the_boxes_is_taken_over(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    head = f"reg_decoded_bbox=True, loss_bbox=dict(type='{kind}Loss', loss_weight=10.0)"
    model = convert(tmp_path, with_text(small_state(), text(head=f"type='Shared2FCBBoxHead', {head}"))).config.model
    assert (model.box_loss, model.box_loss_weight) == (kind.lower(), 10.0)
    assert "reg_decoded_bbox" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("config", "scales"),
    [
        ('{"model": {"rpn_head": {"anchor_generator": {"scales": [4]}}}}', (4.0,)),
        (
            "detector = dict(rpn_head=dict(anchor_generator=dict(scales=[4])))\n"
            "model = dict(type='SoftTeacher', detector=detector)",
            (4.0,),
        ),
        ("model = dict(rpn_head=dict(anchor_generator=dict(scales=[2 * 2])))", (4.0,)),
        ("model = (", (8.0,)),
    ],
    ids=["json", "wrapped", "computed", "broken"],
)
def test_other_forms_of_the_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], config: str, scales: tuple[float, ...]
) -> None:
    made = convert(tmp_path, with_text(small_state(), config))
    assert made.config.model.anchor_scales == scales
    assert ("not understood" in capsys.readouterr().out) == (config == "model = (")


def test_sizes_of_the_test_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = convert(tmp_path, with_text(small_state(), text(resize="type='Resize', scale=1024, keep_ratio=True")))
    assert (made.config.data.short_side, made.config.data.long_side) == ((1024,), 1024)
    convert(tmp_path, with_text(small_state(), text(resize="type='Resize', scale_factor=2.0, keep_ratio=True")))
    assert "no (longer, shorter) scale in it" in capsys.readouterr().out


def test_names_of_early_versions() -> None:
    hints = read_config_text(
        "model = dict(rpn_head=dict(anchor_scales=[4], target_stds=[.1, .1, .2, .2]), "
        "roi_head=dict(num_stages=3, bbox_roi_extractor=dict(roi_layer=dict(type='RoIAlign', sample_num=2)), "
        "bbox_head=dict(target_stds=[.1, .1, .2, .2])))"
    )
    assert hints.anchors is not None and hints.anchors.sizes == ((16.0,), (32.0,), (64.0,), (128.0,), (256.0,))
    assert [said.partition(" = ")[0] for said in hints.impossible] == [
        "rpn_head.target_stds",
        "roi_head.bbox_roi_extractor.roi_layer.sample_num",
    ]
    assert hints.model["stage_stds"] == ((0.1, 0.1, 0.2, 0.2),) * 3  # one description for all stages


def test_settings_for_another_number_of_stages_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = convert(
        tmp_path,
        with_text(
            small_state(), text(more="model['a'] = 1\ntrain_cfg = dict(rcnn=[dict(assigner=dict(pos_iou_thr=0.4))])\n")
        ),
    )
    assert made.config.model.stage_ious == (0.5, 0.6, 0.7)
    assert "stage_ious: 0.4, for 3 stages" in capsys.readouterr().out


def test_usual_settings_leave_nothing_to_say() -> None:
    hints = read_config_text(text())
    assert (hints.left_out, hints.unlike, hints.impossible) == ([], [], [])
    assert hints.anchors is not None and hints.anchors.sizes[0] == (32.0,)


def test_a_config_of_dictionaries_is_read_like_a_text(tmp_path: Path) -> None:
    made = convert(tmp_path, with_text(small_state(), {"model": {"rpn_head": {"anchor_generator": {"scales": [4]}}}}))
    assert made.config.model.anchor_scales == (4.0,)


# Heads and norms


def test_outputs_for_objectness_are_refused_by_name(tmp_path: Path) -> None:
    state = small_state()
    for k in range(3):
        for part in ("weight", "bias"):
            key = f"roi_head.bbox_head.{k}.fc_cls.{part}"
            state[key] = torch.cat([state[key], state[key][:1]])  # K + 2
    with pytest.raises(CheckpointError, match="seesaw"):  # its masks know K classes
        convert(tmp_path, state)
    state = {key: value for key, value in state.items() if "mask_head" not in key}
    with pytest.raises(CheckpointError, match="seesaw"):  # only the names do
        convert(tmp_path, {"state_dict": state, "meta": {"CLASSES": ("a", "b", "c")}})
    made = convert(tmp_path, {"state_dict": state, "meta": {"CLASSES": ("a", "b", "c")}}, classes=list("abcd"))
    assert made.class_names == ("a", "b", "c", "d")  # the way out, where it knows four classes
    with pytest.raises(CheckpointError, match="seesaw"):
        convert(tmp_path, state | {"roi_head.bbox_head.0.loss_cls.cum_samples": torch.ones(4)})


def test_two_outputs_for_each_anchor_are_refused_by_name(tmp_path: Path) -> None:
    state = small_state()
    state["rpn_head.rpn_cls.weight"], state["rpn_head.rpn_cls.bias"] = torch.ones(6, 32, 1, 1), torch.ones(6)
    with pytest.raises(CheckpointError, match="softmax") as caught:
        convert(tmp_path, state)
    assert "--config" not in str(caught.value)


PARTS = {
    "deformable": "backbone.layer2.0.conv3.conv_offset.weight",
    "GCNet": "backbone.layer2.0.context_block.conv_mask.weight",
    "recursive FPN": "neck.rfp_modules.0.conv1.weight",
    "interleaved": "roi_head.mask_head.1.conv_res.conv.weight",
    "semantic": "roi_head.semantic_head.conv_logits.weight",
    "Cascade RPN": "rpn_head.stages.0.rpn_conv.weight",
    "PAFPN": "neck.pafpn_convs.0.conv.weight",
    "CARAFE": "neck.upsample_modules.0.channel_compressor.weight",
    "chain": "neck.1.refine.conv_out.conv.weight",
    "double head": "roi_head.bbox_head.0.conv_branch.0.conv1.weight",
    "SABL": "roi_head.bbox_head.0.reg_cls_fcs.0.weight",
    "PointRend": "roi_head.point_head.fcs.0.conv.weight",
    "ResNeSt": "backbone.layer1.0.conv2.fc1.weight",
    "Res2Net": "backbone.layer1.0.convs.0.weight",
    "transformer": "backbone.pos_embed",
    "ConvNeXt V2": "backbone.stages.0.0.grn.gamma",
    "HRNet": "backbone.stage2.0.branches.0.0.conv1.weight",
    "semantic branch": "sem_seg_head.p2.0.weight",
    "point-wise masks": "roi_heads.mask_head.coarse_head.reduce_spatial_dim_conv.weight",
    "one-stage": "bbox_head.retina_cls.weight",
    "sigmoids": "roi_heads.box_predictor.0.freq_weight",
    "stem of three": "backbone.bottom_up.stem.conv1_1.weight",
    "another proposal network": "proposal_generator.centernet_head.bbox_tower.0.weight",
}


@pytest.mark.parametrize("name", PARTS)
def test_parts_without_counterpart_are_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=name) as caught:
        convert(tmp_path, {"state_dict": small_state() | {PARTS[name]: torch.ones(2, 2)}})
    said = str(caught.value)
    assert PARTS[name] in said and "--config" not in said and "\n" not in said


def test_a_one_stage_detector_is_not_taken_for_a_backbone(tmp_path: Path) -> None:
    state = {key: value for key, value in small_state().items() if key.startswith(("backbone.", "neck."))}
    with pytest.raises(CheckpointError, match="one-stage"):
        convert(tmp_path, {"state_dict": state | {"bbox_head.cls_convs.0.conv.weight": torch.ones(2, 2)}})


@torch.no_grad()
def test_weight_standardisation_is_done_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = ModelConfig(
        backbone="resnet18", norm="group", box_head="4conv1fc_gn", fpn_channels=32, head_channels=16, mask_channels=32
    )
    torch.manual_seed(0)
    state = {
        mmdetection_name(key, "gn"): value * 0.01 + 0.02 * ("conv" in key) * torch.rand(())
        for key, value in build_model(config, CLASSES).state_dict().items()
    }
    ws = "conv_cfg=dict(type='ConvWS'), norm_cfg=dict(type='GN', num_groups=32)"
    backbone, neck = f"type='ResNet', depth=18, {ws}", f"type='FPN', num_outs=5, {ws}"
    head = f"type='Shared4Conv1FCBBoxHead', {ws}"
    places = {
        "everything": (text(backbone=backbone, neck=neck, head=head), r"backbone|neck|shared_convs"),
        "neck": (text(backbone="type='ResNet', norm_cfg=dict(type='GN')", neck=neck, head=head), r"neck|shared_convs"),
    }
    for config_text, standardized in places.values():
        made = convert(tmp_path, with_text(state, config_text))
        assert "weight standardisation (its config text)" in capsys.readouterr().out
        for key, value in made.state.items():
            theirs = mmdetection_name(key, "gn")
            wanted = state[theirs]
            if wanted.dim() == 4 and re.search(standardized, theirs):
                flat = wanted.double().flatten(1)
                mean = flat.mean(1, keepdim=True)
                std = ((flat - mean).square().sum(1, keepdim=True) / (flat.shape[1] - 1)).sqrt()
                wanted = ((flat - mean) / (std + 1e-5)).view_as(wanted).float()
            assert torch.allclose(value, wanted, rtol=1e-4, atol=1e-5), key
    by_name = convert(tmp_path, {"state_dict": state}, name="faster_rcnn_r50_fpn_gn_ws-all_1x.pth")
    asked = convert(tmp_path, {"state_dict": state}, weight_standardization=True)
    text_says = convert(tmp_path, with_text(state, places["everything"][0]))
    for other in (by_name, asked):
        assert all(torch.equal(other.state[key], value) for key, value in text_says.state.items())
    capsys.readouterr()
    plain = convert(tmp_path, {"state_dict": state})
    assert torch.equal(plain.state["fpn.output.0.weight"], state["neck.fpn_convs.0.conv.weight"])
    assert "assumed that there was none; --weight-standardization" in capsys.readouterr().out
    assert standardize_weights(dict(plain.state), ()) == 0


@torch.no_grad()
def test_another_eps_moves_into_the_scales(tmp_path: Path) -> None:
    norm = nn.BatchNorm2d(8, eps=1e-3).eval()
    for value in (norm.weight, norm.bias, norm.running_mean):
        nn.init.normal_(value)
    nn.init.uniform_(norm.running_var, 1e-4, 1e-2)
    state = {f"backbone.body.bn1.{key}": value.clone() for key, value in norm.state_dict().items()}
    x = torch.randn(2, 8, 3, 3)
    wanted = norm(x)
    change_eps(state, 1e-3)
    ours = nn.BatchNorm2d(8, eps=1e-5).eval()
    ours.load_state_dict({key.removeprefix("backbone.body.bn1."): value for key, value in state.items()})
    assert torch.allclose(ours(x), wanted, rtol=1e-4, atol=1e-5)
    backbone = "type='ResNet', depth=18, norm_cfg=dict(type='BN', eps=0.001)"
    made = convert(tmp_path, with_text(small_state(), text(backbone=backbone)))
    before = small_state()
    variance, key = before["backbone.bn1.running_var"], "backbone.body.bn1.weight"
    ratio = ((variance + 1e-5) / (variance + 1e-3)).sqrt()
    assert torch.allclose(made.state[key], before["backbone.bn1.weight"] * ratio, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("tracked", [True, False])
def test_batch_norm_of_detectron2s_neck_and_heads_is_folded(tmp_path: Path, tracked: bool) -> None:
    """As detectron2's new baselines have it, whose box and mask heads end without norms."""
    state = {
        key: value
        for key, value in foreign_state(D2).items()
        if not re.search(r"(box_head|box_predictor)\.[12]\.|fc2", key)
    }
    state = {re.sub(r"(box_head|box_predictor)\.0\.", r"\1.", key): value for key, value in state.items()}
    state["roi_heads.box_predictor.bbox_pred.weight"] = torch.rand(12, 16)
    state["roi_heads.box_predictor.bbox_pred.bias"] = torch.rand(12)
    names = [f"backbone.fpn_{kind}{n}" for kind in ("lateral", "output") for n in (2, 3, 4, 5)]
    names += [f"roi_heads.box_head.conv{i}" for i in (1, 2, 3, 4)]
    names += [f"roi_heads.mask_head.mask_fcn{i}" for i in (1, 2, 3, 4)]
    layers = {}
    for name in names:
        state.setdefault(f"{name}.weight", torch.randn(32, 32, 3, 3))
        state.pop(f"{name}.bias", None)
        weight, norm = state[f"{name}.weight"], nn.BatchNorm2d(32).eval()
        for value in (norm.weight, norm.bias, norm.running_mean):
            nn.init.normal_(value)
        nn.init.uniform_(norm.running_var, 0.1, 2)
        layers[name] = nn.Sequential(nn.Conv2d(weight.shape[1], 32, weight.shape[2], bias=False), norm)
        layers[name][0].weight.copy_(weight)
        counters = {
            f"{name}.norm.{key}": value for key, value in norm.state_dict().items() if tracked or "num" not in key
        }
        state |= counters
    made = convert(tmp_path, {"model": state})
    model = made.config.model
    assert (model.box_head, model.masks, model.norm, model.stage_ious) == ("4conv1fc", "every", "frozen", (0.5,))
    ours = {f"backbone.fpn_lateral{n}": f"fpn.lateral.{n - 2}" for n in (2, 3, 4, 5)}
    ours |= {f"backbone.fpn_output{n}": f"fpn.output.{n - 2}" for n in (2, 3, 4, 5)}
    ours |= {f"roi_heads.box_head.conv{i}": f"cascade.box_heads.0.convs.{i - 1}.0" for i in (1, 2, 3, 4)}
    ours |= {f"roi_heads.mask_head.mask_fcn{i}": f"cascade.mask_heads.0.convs.{i - 1}" for i in (1, 2, 3, 4)}
    for theirs, name in ours.items():
        weight, bias = made.state[f"{name}.weight"], made.state[f"{name}.bias"]
        x = torch.rand(1, weight.shape[1], 5, 5)
        assert torch.allclose(nn.functional.conv2d(x, weight, bias), layers[theirs](x), rtol=1e-3, atol=1e-3), name


@torch.no_grad()
def test_a_deep_stem_with_pooled_shortcuts(tmp_path: Path) -> None:
    """ResNetV1d of mmdetection: three convolutions as stem, average pooling before a shortcut's convolution."""
    config = ModelConfig(backbone="resnet18d", fpn_channels=32, head_channels=16)
    ours = build_model(config, CLASSES).state_dict()
    theirs = {}
    for key, value in ours.items():
        name = key.replace("backbone.body.conv1.", "backbone.stem.").replace("backbone.body.bn1.", "backbone.stem.7.")
        theirs[name if name != key else mmdetection_name(key)] = value
    made = convert(tmp_path, {"state_dict": theirs})
    assert made.config.model.backbone.startswith("resnet18d")
    assert all(torch.equal(made.state[key], value) for key, value in ours.items() if "num_batches" not in key)
    model = build_model(made.config.model, CLASSES)
    pool: Any = model.backbone.body.layer2[0].downsample[0]  # mmdetection's settings of it
    assert (pool.kernel_size, pool.stride, pool.ceil_mode, pool.count_include_pad) == (2, 2, True, False)
    assert not isinstance(model.backbone.body.layer1[0].downsample, nn.Sequential)


# Names


def eighty_outputs(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for key in state:
        if "fc_cls" in key:
            state[key] = torch.zeros(81, *state[key].shape[1:])
        if "conv_logits" in key:
            state[key] = torch.zeros(80, *state[key].shape[1:])
    return state


def test_fewer_names_than_outputs_keep_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = convert(
        tmp_path, {"state_dict": eighty_outputs(small_state()), "meta": {"CLASSES": ("bolt", "nut", "gear")}}
    )
    assert made.class_names[:4] == ("bolt", "nut", "gear", "unused 4") and len(made.class_names) == 80
    assert "77 further outputs" in capsys.readouterr().out
    made = convert(tmp_path, {"state_dict": eighty_outputs(small_state())})
    assert made.class_names[0] == "person" and "assumed to be COCO's" in capsys.readouterr().out


def test_one_name_written_without_its_comma(tmp_path: Path) -> None:
    state = {
        key: v[:2] if "fc_cls" in key else v[:1] if "conv_logits" in key else v for key, v in small_state().items()
    }
    assert convert(tmp_path, {"state_dict": state, "meta": {"CLASSES": "cat"}}).class_names == ("cat",)


NAME_FILES = {
    "names.txt": "bolt\n\nnut\r\ngear\n",
    "coco.json": json.dumps(
        {"categories": [{"id": 9, "name": "gear"}, {"id": 2, "name": "bolt"}, {"id": 5, "name": "nut"}]}
    ),
    "list.json": '["bolt", "nut", "gear"]',
    "data.yaml": "names: {0: bolt, 1: nut, 2: gear}\n",
    "data.yml": "names: [bolt, nut, gear]\n",
}


@pytest.mark.parametrize("name", NAME_FILES)
def test_class_names_from_a_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(NAME_FILES[name], encoding="utf-8")
    made = convert(tmp_path, {"state_dict": small_state()}, classes_from=tmp_path / name)
    assert made.class_names == ("bolt", "nut", "gear")
    assert made.category_ids == ((2, 5, 9) if name == "coco.json" else (1, 2, 3))
    again = convert(tmp_path, {"state_dict": small_state()}, classes_from=tmp_path / "dest.safetensors")
    assert (again.class_names, again.category_ids) == (made.class_names, made.category_ids)


def test_class_names_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model." + key: value for key, value in small_state().items()}, tmp_path / "last.ckpt")
    dest = tmp_path / "ours.safetensors"
    command = ["convert", str(tmp_path / "last.ckpt"), str(dest), "--classes"]
    assert main([*command, "bolt", "nut"]) == 2 and not dest.exists()
    assert "2 classes were given and the network has 3" in capsys.readouterr().err
    assert main([*command, "bolt", "nut", "nut"]) == 2
    assert "'nut' is there twice" in capsys.readouterr().err
    assert main([*command, "bolt", "nut", "gear"]) == 0
    assert "the prefix model. was taken off" in capsys.readouterr().out
    assert load_checkpoint(dest).class_names == ("bolt", "nut", "gear")


@pytest.mark.parametrize("content", ["", "{", '{"images": []}', "[1, 2]"])
def test_files_without_names_are_refused(tmp_path: Path, content: str) -> None:
    for name in ("c.json", "c.yaml"):
        (tmp_path / name).write_text(content)
        with pytest.raises(CheckpointError, match=rf"{name}: no class names"):
            convert(tmp_path, {"state_dict": small_state()}, classes_from=tmp_path / name)


@pytest.mark.parametrize("name", ["model.onnx", "model.xml", "model.pt2"])
def test_class_names_are_not_read_from_an_export(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("<?xml version='1.0'?>\n<net name='a'>\n</net>\n")
    with pytest.raises(CheckpointError, match=rf"{name}: is an exported network; give the checkpoint"):
        convert(tmp_path, {"state_dict": small_state()}, classes_from=tmp_path / name)


# Nestings


@pytest.mark.parametrize(
    ("nest", "said"),
    [
        (lambda s: {"state_dict": {"model." + k: v for k, v in s.items()}, "epoch": 3}, "prefix model. "),
        (lambda s: {"model": {"module." + k: v for k, v in s.items()}}, "prefix module. "),
        (lambda s: {"state_dict": {"ema_model.module." + k: v for k, v in s.items()}}, "prefix ema_model.module. "),
        (lambda s: {"checkpoint": {"model": {"state_dict": s}}}, "under checkpoint.model.state_dict"),
        (lambda s: {"model": {"_orig_mod." + k: v for k, v in s.items()}}, "prefix _orig_mod. "),
        (
            lambda s: {
                "state_dict": {f"student.{k}": v + 1 for k, v in s.items()} | {f"teacher.{k}": v for k, v in s.items()}
            },
            "prefix teacher. ",
        ),
        (lambda s: {"model": s, "model_ema": {k: v + 1 for k, v in s.items()}}, "left out: model_ema"),
        (lambda s: {"state_dict": {k: v.double() for k, v in s.items()}}, ""),
    ],
    ids=range(8),
)
def test_weights_are_found_wherever_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], nest: Any, said: str
) -> None:
    state = small_state()
    made = convert(tmp_path, nest(state))
    assert said in capsys.readouterr().out
    for key, value in made.state.items():
        if not key.endswith("num_batches_tracked"):
            assert torch.equal(value, state[mmdetection_name(key)]), key


def test_two_networks_in_a_file_are_refused(tmp_path: Path) -> None:
    state = {prefix + key: value for prefix in ("first.", "second.") for key, value in small_state().items()}
    with pytest.raises(CheckpointError, match=r"2 networks.*first\., second\."):
        convert(tmp_path, {"state_dict": state})


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    state = {key: value.to(torch.int8) if value.ndim == 4 else value for key, value in small_state().items()}
    with pytest.raises(CheckpointError, match=r"are whole numbers \(.*torch\.int8\), as in a quantised network"):
        convert(tmp_path, {"state_dict": state})


def test_a_name_twice_in_the_metadata_is_refused_until_the_classes_are_named(tmp_path: Path) -> None:
    content = {"state_dict": small_state(), "meta": {"CLASSES": ("nut", "nut", "bolt")}}
    with pytest.raises(CheckpointError, match=r"names the class 'nut' twice.* with --classes"):
        convert(tmp_path, content)
    assert convert(tmp_path, content, classes=("nut", "nut 2", "bolt")).class_names == ("nut", "nut 2", "bolt")
