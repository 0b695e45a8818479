"""mmdetection's configs with ConvNeXt and Swin: equal to our recipes, what is listed, what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from cascade_rcnn.config import Config
from cascade_rcnn.convert.config_files import read_config_file
from cascade_rcnn.convert.config_text import read_config_text
from cascade_rcnn.convert.mmdet_config import recipe_from_mmdetection
from cascade_rcnn.errors import ConfigError
from cascade_rcnn.recipes import load_config

FIXTURES = Path(__file__).parent.parent / "fixtures" / "mmdet_config"
CONVNEXT = f"_base_ = '{FIXTURES}/convnext.py'\n"
# With a SwinTransformer of mmdetection's own, whose weights are decayed by their names.
SWIN = (
    CONVNEXT
    + """
model = dict(backbone=dict(
    _delete_=True, type='SwinTransformer', embed_dims=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24], window_size=7,
    mlp_ratio=4, qkv_bias=True, qk_scale=None, drop_rate=0., attn_drop_rate=0., drop_path_rate=0.2, patch_norm=True,
    out_indices=(0, 1, 2, 3), with_cp=False, convert_weights=True,
    init_cfg=dict(type='Pretrained', checkpoint='https://example.org/swin_tiny_patch4_window7_224.pth')))
free = dict(decay_mult=0.)
optim_wrapper = dict(_delete_=True, type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(custom_keys={'absolute_pos_embed': free, 'relative_position_bias_table': free, 'norm': free}))
"""
)


def written(folder: Path, text: str) -> Path:
    path = folder / "mine.py"
    path.write_text(text, encoding="utf-8")
    return path


def our_recipe(name: str, **train: object) -> Config:
    config = load_config(name)
    return dataclasses.replace(config, published="", train=dataclasses.replace(config.train, **train))  # type: ignore[arg-type]


def test_convnext_is_our_recipe_but_for_the_longer_warmup_of_mmdetection_3() -> None:
    recipe = recipe_from_mmdetection(FIXTURES / "convnext.py")
    assert recipe.config == our_recipe("cascade_mask_rcnn_convnext_t_fpn_3x_coco", warmup_steps=1000)
    weights, images, precision = recipe.report()
    assert "convnext-tiny_3rdparty_32xb128-noema_in1k_20220301-795e9634.pth" in weights
    assert "averaged" in weights
    assert "min_size" in images
    assert "AmpOptimWrapper" in precision


def test_swin_is_our_recipe_and_the_decay_of_biases_is_listed(tmp_path: Path) -> None:
    recipe = recipe_from_mmdetection(written(tmp_path, SWIN))
    assert recipe.config == our_recipe("cascade_mask_rcnn_swin_t_fpn_3x_coco", warmup_steps=1000)
    listed = [line for line in recipe.report() if "min_size" not in line]
    assert len(listed) == 1
    assert "biases and batch norms" in listed[0]


AUTHORS_2X = """
sizes = [(1333, 480), (1333, 800)]
last = dict(type='Resize', img_scale=sizes, multiscale_mode='value', override=True, keep_ratio=True)
train_pipeline = [
    dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True),
    dict(type='RandomFlip', flip_ratio=0.5),
    dict(type='AutoAugment', policies=[
        [dict(type='Resize', img_scale=sizes, multiscale_mode='value', keep_ratio=True)],
        [dict(type='Resize', img_scale=[(400, 1333), (500, 1333)], multiscale_mode='value', keep_ratio=True),
         dict(type='RandomCrop', crop_type='absolute_range', crop_size=(384, 600), allow_negative_crop=True), last]]),
    dict(type='Normalize', **norm), dict(type='Pad', size_divisor=32), dict(type='DefaultFormatBundle'),
    dict(type='Collect', keys=['img'])]
test_pipeline = [dict(type='LoadImageFromFile'), dict(type='MultiScaleFlipAug', img_scale=(1333, 800), flip=False,
    transforms=[dict(type='Resize', keep_ratio=True), dict(type='RandomFlip'), dict(type='Normalize', **norm)])]
data = dict(train=dict(pipeline=train_pipeline), val=dict(pipeline=test_pipeline), test=dict(pipeline=test_pipeline))
optimizer_config = dict(_delete_=True, type='DistOptimizerHook', update_interval=2, grad_clip=None, coalesce=True,
    bucket_size_mb=-1, use_fp16=True)
fp16 = None
"""
NORM = "norm = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)\n"


def authors(backbone: str, optimizer: str) -> str:
    """A config as the authors of Swin and ConvNeXt write it, for mmdetection 2."""
    return (
        f"_base_ = '{FIXTURES}/old.py'\n{NORM}{AUTHORS_2X}\n"
        f"model = dict(pretrained=None, backbone=dict(_delete_=True, {backbone}))\n"
        f"optimizer = dict(_delete_=True, type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05, {optimizer})\n"
    )


def test_the_authors_own_swin_config_of_2x(tmp_path: Path) -> None:
    swin = (
        "type='SwinTransformer', embed_dim=128, depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32], window_size=7, "
        "ape=False, drop_path_rate=0.3, patch_norm=True, use_checkpoint=True, "
        "pretrained='https://example.org/swin_base_patch4_window7_224_22k.pth'"
    )
    free = "dict(decay_mult=0.)"
    decay = f"paramwise_cfg=dict(custom_keys={{'relative_position_bias_table': {free}, 'norm': {free}}})"
    config = recipe_from_mmdetection(written(tmp_path, authors(swin, decay))).config
    assert config.model.backbone == "swin_base_patch4_window7_224.ms_in22k"
    assert (config.model.output_norms, config.model.drop_path, config.model.frozen_stages) == (True, 0.3, -1)
    assert (config.data.crop, config.data.crop_short_side, config.data.short_side) == (0.5, (400, 500), (480, 800))
    assert (config.train.optimizer, config.train.norm_weight_decay, config.train.layer_decay) == ("adamw", False, 1.0)
    assert (config.train.accumulate, config.train.activation_checkpointing) == (2, True)


def test_the_authors_own_convnext_config_of_2x(tmp_path: Path) -> None:
    convnext = (
        "type='ConvNeXt', in_chans=3, depths=[3, 3, 27, 3], dims=[256, 512, 1024, 2048], drop_path_rate=0.8, "
        "layer_scale_init_value=1.0, out_indices=[0, 1, 2, 3], "
        "init_cfg=dict(type='Pretrained', checkpoint='convnext_xlarge_22k_224.pth')"
    )
    decay = (
        "constructor='LearningRateDecayOptimizerConstructor', "
        "paramwise_cfg=dict(decay_rate=0.7, decay_type='layer_wise', num_layers=12)"
    )
    recipe = recipe_from_mmdetection(written(tmp_path, authors(convnext, decay)))
    assert recipe.config.model.backbone == "convnext_xlarge.fb_in22k"
    assert (recipe.config.model.drop_path, recipe.config.train.layer_decay) == (0.8, 0.7)
    assert not recipe.config.train.norm_weight_decay
    assert not any("weights" in line for line in recipe.report())
    assert any("half precision" in line for line in recipe.report())


@pytest.mark.parametrize(
    ("text", "setting", "value"),
    [
        ("model = dict(backbone=dict(arch='base', init_cfg=dict(checkpoint='convnext-base_3rdparty_in21k_1-2.pth')))\n"
         "optim_wrapper = dict(paramwise_cfg={'num_layers': 12})", "model.backbone", "convnext_base.fb_in22k"),
        ("model = dict(backbone=dict(_delete_=True, type='mmcls.ConvNeXt', out_indices=(0, 1, 2, 3), "
         "gap_before_final_norm=False, arch=dict(depths=[3, 3, 27, 3], channels=[96, 192, 384, 768])))\n"
         "optim_wrapper = dict(paramwise_cfg={'num_layers': 12})", "model.backbone", "convnext_small.fb_in1k"),
        ("model = dict(backbone=dict(init_cfg=None))", "model.pretrained", False),
        ("model = dict(backbone=dict(frozen_stages=1))", "model.frozen_stages", 1),
        ("model = dict(backbone=dict(frozen_stages=0))", "model.frozen_stages", -1),
        ("model = dict(backbone=dict(with_cp=True))", "train.activation_checkpointing", True),
        ("optim_wrapper = dict(dtype='bfloat16')", "train.precision", "bf16"),
        ("randomness = dict(seed=1, deterministic=True)", "train.deterministic", True),
        ("_base_.train_pipeline[3].prob = [0.25, 0.75]", "data.crop", 0.75),
        ("_base_.train_pipeline[3].transforms[1][1].crop_size = (300, 400)", "data.crop_range", (300, 400)),
        ("x = _base_.train_dataloader.dataset\ntrain_dataloader = dict(dataset=dict(_delete_=True, "
         "type='ClassBalancedDataset', oversample_thr=1e-3, dataset=x))", "data.repeat_threshold", 1e-3),
        ("x = _base_.train_dataloader.dataset\ntrain_dataloader = dict(dataset=dict(_delete_=True, "
         "type='ConcatDataset', datasets=[dict(x, type='VOCDataset', ann_file='VOC2007/ImageSets/Main/trainval.txt'), "
         "dict(x, type='VOCDataset', ann_file='VOC2012/ImageSets/Main/train.txt')]))",
         "data.train", "2007_trainval+2012_train"),
        ("val_dataloader = dict(dataset=dict(ann_file='ImageSets/Main/test.txt'))", "data.val", "test"),
    ],
)  # fmt: skip
def test_settings_that_are_taken_over(tmp_path: Path, text: str, setting: str, value: object) -> None:
    text = text.replace("_base_.train_pipeline", "_base_.train_dataloader.dataset.pipeline")
    config = recipe_from_mmdetection(written(tmp_path, CONVNEXT + text)).config
    section, _, name = setting.partition(".")
    assert getattr(getattr(config, section), name) == value


# As in mmdetection's strong baselines.
SYNCED = """
n = dict(type='SyncBN', requires_grad=True)
m = dict(type='FCNMaskHead', num_classes=80, norm_cfg=dict(type='MMSyncBN', requires_grad=True))
model = dict(backbone=dict(_delete_=True, type='ResNet', depth=50, frozen_stages=-1, norm_cfg=n, norm_eval=False),
    neck=dict(norm_cfg=n), roi_head=dict(mask_head=[m, m, m]))
optim_wrapper = dict(constructor=None, paramwise_cfg=dict(_delete_=True))
"""


def test_batch_norm_in_fpn_and_mask_heads_is_taken_over(tmp_path: Path) -> None:
    model = recipe_from_mmdetection(written(tmp_path, CONVNEXT + SYNCED)).config.model
    assert (model.norm, model.fpn_and_mask_norms, model.box_head) == ("sync", True, "4conv1fc_bn")
    assert not recipe_from_mmdetection(FIXTURES / "convnext.py").config.model.fpn_and_mask_norms


@pytest.mark.parametrize(
    ("was", "becomes", "said"),
    [
        (
            "norm_cfg=dict(type='MMSyncBN', requires_grad=True)",
            "norm_cfg=None",
            "roi_head.mask_head.norm_cfg.type = None (here SyncBN, as the backbone",
        ),
        ("MMSyncBN", "BN", "roi_head.mask_head.norm_cfg.type = 'BN' (here SyncBN"),
        ("neck=dict(norm_cfg=n)", "neck=dict()", "neck.norm_cfg.type = None (here SyncBN"),
        ("neck=dict(norm_cfg=n)", "neck=dict(norm_cfg=n, no_norm_on_lateral=True)", "neck.no_norm_on_lateral = True"),
        (
            "neck=dict(norm_cfg=n)",
            "neck=dict(norm_cfg=dict(type='SyncBN', requires_grad=False))",
            "neck.norm_cfg.requires_grad = False",
        ),
        ("norm_eval=False", "norm_eval=True", "neck.norm_cfg.type = 'SyncBN' (here none"),
    ],
)
def test_batch_norm_in_some_places_only_is_refused(tmp_path: Path, was: str, becomes: str, said: str) -> None:
    assert was in SYNCED
    with pytest.raises(ConfigError) as caught:
        recipe_from_mmdetection(written(tmp_path, CONVNEXT + SYNCED.replace(was, becomes)))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model = dict(backbone=dict(_delete_=True, type='ResNet', depth=50))\n"
         "optim_wrapper = dict(constructor=None, paramwise_cfg=dict(_delete_=True))",
         "roi_head.bbox_head.norm_cfg.type = 'SyncBN' (here BN, as the backbone"),
        ("model = dict(backbone=dict(_delete_=True, type='ResNet', depth=50))",
         "LearningRateDecayOptimizerConstructor' (here for a ConvNeXt)"),
        ("model = dict(backbone=dict(arch='nano'))", "backbone.arch = 'nano'"),
        ("model = dict(backbone=dict(gap_before_final_norm=True))", "gap_before_final_norm = True"),
        ("model = dict(backbone=dict(_delete_=True, type='mmpretrain.ConvNeXt'))", "backbone.out_indices = -1"),
        ("model = dict(backbone=dict(out_indices=[1, 2, 3]))", "out_indices"),
        ("model = dict(backbone=dict(use_grn=True))", "backbone.use_grn = True"),
        ("model = dict(backbone=dict(norm_cfg=dict(type='BN')))", "backbone.norm_cfg.type = 'BN'"),
        ("model = dict(backbone=dict(norm_cfg=dict(type='LN2d', eps=1e-5)))", "backbone.norm_cfg.eps"),
        ("model = dict(backbone=dict(layer_scale_init_value=0.0))", "layer_scale_init_value = 0.0"),
        ("model = dict(backbone=dict(drop_path_rate=1.5))", "drop_path_rate = 1.5"),
        ("optim_wrapper = dict(paramwise_cfg={'num_layers': 12})", "num_layers = 12"),
        ("optim_wrapper = dict(paramwise_cfg={'decay_type': 'stage_wise'})", "decay_type = 'stage_wise'"),
        ("optim_wrapper = dict(constructor='MyConstructor')", "optim_wrapper.constructor = 'MyConstructor'"),
        ("optim_wrapper = dict(dtype='float64')", "optim_wrapper.dtype = 'float64'"),
        ("_base_.train_pipeline[3].transforms = [[dict(type='Rotate')]]", "RandomChoice = [['Rotate']]"),
        ("_base_.train_pipeline[3].transforms = []", "RandomChoice.prob"),
        ("_base_.train_pipeline[3].prob = [0, 0]", "RandomChoice.prob = [0, 0]"),
        ("_base_.train_pipeline[3].prob = ['a', 'b']", "RandomChoice.prob"),
        ("_base_.train_pipeline[3].transforms[1][1].crop_type = 'relative'", "RandomCrop"),
        ("_base_.train_pipeline[3].transforms[1][0].scales = [(400, 4200)]", "the same longer side"),
        ("_base_.train_pipeline[3].transforms[0][0].scales = [(480, 1333)]", "resizes to different sizes"),
        ("_base_.train_pipeline[2] = dict(type='Albu')", "data.augment"),
        ("x = _base_.train_dataloader.dataset\ntrain_dataloader = dict(dataset=dict(_delete_=True, "
         "type='ConcatDataset', datasets=[x, dict(x, filter_cfg=None)]))", "data sets that differ"),
        ("x = _base_.train_dataloader.dataset\ntrain_dataloader = dict(dataset=dict(_delete_=True, "
         "type='MultiImageMixDataset', dataset=x))", "'MultiImageMixDataset'"),
    ],
)  # fmt: skip
def test_parts_without_counterpart_are_named(tmp_path: Path, text: str, said: str) -> None:
    text = text.replace("_base_.train_pipeline", "_base_.train_dataloader.dataset.pipeline")
    with pytest.raises(ConfigError) as caught:
        recipe_from_mmdetection(written(tmp_path, CONVNEXT + text))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("window_size=8", "window 8"),
        ("window_size=12", "window 12"),
        ("embed_dims=100", "width 100"),
        ("patch_norm=False", "backbone.patch_norm = False"),
        ("qk_scale=0.5", "backbone.qk_scale = 0.5"),
        ("use_abs_pos_embed=True", "use_abs_pos_embed = True"),
        ("drop_rate=0.1", "backbone.drop_rate = 0.1"),
        ("attn_drop_rate=0.1", "backbone.attn_drop_rate = 0.1"),
        ("norm_cfg=dict(type='BN')", "backbone.norm_cfg.type = 'BN'"),
    ],
)
def test_swins_that_are_not_timms_are_refused(tmp_path: Path, text: str, said: str) -> None:
    name = text.partition("=")[0]
    changed = SWIN + f"model['backbone']['{name}'] = dict(x={text.partition('=')[2]})['x']\n"
    with pytest.raises(ConfigError) as caught:
        recipe_from_mmdetection(written(tmp_path, changed))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("custom_imports = dict(imports=['mine.transforms'])", "custom_imports ['mine.transforms']"),
        ("_base_.train_pipeline[3].transforms[1][1].allow_negative_crop = False", "allow_negative_crop = False"),
        ("_base_.train_pipeline[3].transforms[1][1].recompute_bbox = True", "recompute_bbox = True"),
        ("model = dict(backbone=dict(init_cfg=None))", "layer_scale_init_value = 1.0"),
        ("model = dict(backbone=dict(init_cfg=None))", "--model.pretrained True"),
        ("optim_wrapper = dict(loss_scale=512.0)", "loss_scale = 512.0"),
        ("train_dataloader = dict(dataset=dict(type='LVISV1Dataset'))", "evaluated by COCO's rules"),
        ("train_dataloader = dict(dataset=dict(type='MyDataset'))", "'MyDataset'"),
        ("train_dataloader = dict(dataset=dict(filter_cfg=dict(bbox_min_size=32)))", "bbox_min_size = 32"),
        ("x = _base_.train_dataloader.dataset\ntrain_dataloader = dict(dataset=dict(_delete_=True, "
         "type='ClassBalancedDataset', oversample_thr=1e-3, dataset=x))", "rounded up there"),
        ("optim_wrapper = dict(constructor=None, paramwise_cfg=dict(_delete_=True, norm_decay_mult=0))",
         "biases are decayed there"),
        ("optim_wrapper = dict(constructor=None, paramwise_cfg=dict(_delete_=True, bias_decay_mult=0))",
         "norms are decayed there"),
    ],
)  # fmt: skip
def test_what_is_left_out_is_said(tmp_path: Path, text: str, said: str) -> None:
    text = text.replace("_base_.train_pipeline", "_base_.train_dataloader.dataset.pipeline")
    recipe = recipe_from_mmdetection(written(tmp_path, CONVNEXT + text))
    assert any(said in line for line in recipe.report()), recipe.report()


@pytest.mark.parametrize(
    ("backbone", "settings"),
    [
        ("type='mmpretrain.ConvNeXt', arch='tiny', drop_path_rate=0.4, frozen_stages=0, gap_before_final_norm=False, "
         "norm_cfg=dict(type='LN2d', eps=1e-6)", {"drop_path": 0.4, "frozen_stages": -1}),
        ("type='SwinTransformer', embed_dims=96, strides=(4, 2, 2, 2), norm_cfg=dict(type='LN', eps=1e-5), "
         "drop_path_rate=0.3, frozen_stages=2, qk_scale=None", {"drop_path": 0.3, "frozen_stages": 2}),
    ],
)  # fmt: skip
def test_a_checkpoints_config_text_says_the_same(backbone: str, settings: dict[str, object]) -> None:
    hints = read_config_text(f"model = dict(type='CascadeRCNN', backbone=dict({backbone}))")
    assert {name: hints.model[name] for name in settings} == settings
    assert hints.backbone_eps is None  # of batch norms, whose scales could make up for it
    assert not hints.impossible
    assert not hints.left_out
    refused = read_config_text(f"model = dict(type='CascadeRCNN', backbone=dict({backbone}, ape=True, use_grn=True))")
    assert len(refused.impossible) == 2


def test_names_that_only_other_values_use_are_known(tmp_path: Path) -> None:
    used = read_config_file(FIXTURES / "convnext.py")[2]
    assert {"max_epochs", "weights", "coder", "test_pipeline"} <= used
    assert not {"custom_imports", "optim_wrapper"} & used
    recipe = recipe_from_mmdetection(written(tmp_path, CONVNEXT + "unknown = 5"))
    assert [line for line in recipe.report() if "not known here" in line] == [
        "not taken over: names that are not known here: unknown"
    ]
