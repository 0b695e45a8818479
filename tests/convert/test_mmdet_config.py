"""mmdetection's config files: what becomes a recipe, what is listed, what is refused, and that nothing is run."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path

import pytest

from cascade_rcnn import cli
from cascade_rcnn.config import Config, DataConfig, ModelConfig, TrainConfig
from cascade_rcnn.convert.config_files import read_config_file
from cascade_rcnn.convert.config_text import read_config_text
from cascade_rcnn.convert.mmdet_config import recipe_from_mmdetection
from cascade_rcnn.errors import ConfigError
from cascade_rcnn.recipes import config_names, load_config

FIXTURES = Path(__file__).parent.parent / "fixtures" / "mmdet_config"
BASE = f"_base_ = ['{FIXTURES}/model.py', '{FIXTURES}/training.py']\n"
WHEEL = os.environ.get("CASCADE_RCNN_MMDET_CONFIGS", "")


def written(folder: Path, text: str, name: str = "mine.py") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def values(folder: Path, text: str) -> dict[str, object]:
    return read_config_file(written(folder, text))[0]


OTHER_NAMES = {
    "cascade_rcnn_r50_dconv_c3_c5_fpn_1x_coco": "cascade_rcnn_r50_fpn_dconv_c3_c5_1x_coco",
    "cascade_mask_rcnn_r50_dconv_c3_c5_fpn_1x_coco": "cascade_mask_rcnn_r50_fpn_dconv_c3_c5_1x_coco",
    **{
        f"cascade_mask_rcnn_convnext_{size}_p4_w7_fpn_4conv1fc_giou_amp_ms_crop_3x_coco": (
            f"cascade_mask_rcnn_convnext_{size}_fpn_3x_coco"
        )
        for size in "ts"
    },
}


# The language


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("x = -1.5", -1.5),
        ("x = 0.02 * 4", 0.08),
        ("x = 1.0 / 9.0 - 2 // 1", 1 / 9 - 2),
        ("x = 2**10", 1024),
        ("x = 'a/' + 'b'", "a/b"),
        ("y = 'a'\nx = f'{y}/b'", "a/b"),
        ("y = [1]\nx = y + [2, (3, 4)]", [1, 2, [3, 4]]),
        ("y = [1]\nx = [*y, 2, *(3, 4)]", [1, 2, 3, 4]),
        ("y = dict(a=1)\nx = dict(y, b={'c': None})", {"a": 1, "b": {"c": None}}),
        ("y = dict(a=1)\nx = dict(**y, b=True)", {"a": 1, "b": True}),
        ("y = dict(a=[5, 6])\nx = y['a'][-1]", 6),
        ("y = dict(a=[5, 6])\nx = y.a", [5, 6]),
        ("'''words'''\nx = y = 3", 3),
        ("x = dict(a=[dict(b=1)])\nx['a'][0]['b'] = 2", {"a": [{"b": 2}]}),
    ],
)
def test_plain_values_are_read(tmp_path: Path, text: str, value: object) -> None:
    assert values(tmp_path, text)["x"] == value


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("import os", 1, "an import"),
        ("x = 1\nfrom os import path", 2, "an import"),
        ("x = __import__('os').system('touch run')", 1, "a call"),
        ("x = open('run', 'w')", 1, "a call (open)"),
        ("x = dict(a=1)\nx.update(b=2)", 2, "a call (x.update)"),
        ("x = ().__class__", 1, "no setting of a dictionary"),
        ("x = dict(a=1)\ny = x.__class__", 2, "x.__class__"),
        ("x = 'a'.format", 1, "no setting"),
        ("x = [i for i in (1, 2)]", 1, "a comprehension"),
        ("x = {i: 1 for i in (1, 2)}", 1, "a comprehension"),
        ("x = lambda: 1", 1, "a lambda"),
        ("x = 1 if True else 2", 1, "a condition"),
        ("if True:\n    x = 1", 1, "a condition"),
        ("for x in (1, 2): pass", 1, "a loop"),
        ("def f(): pass", 1, "a function"),
        ("with read_base():\n    from a import *", 1, "a config of the new style"),
        ("y = 1\nx = f'{y + 1}'", 2, "an f-string"),
        ("y = 1\nx = f'{y:>1000000000}'", 2, "an f-string"),
        ("y = 1\nx = f'{y!r}'", 2, "an f-string"),
        ("x = y", 1, "y is not assigned above"),
        ("x = _base_.y", 1, "_base_.y: not in its base files"),
        ("x = '{{ fileDirname }}/a'", 1, "only mmdetection puts in"),
        ("x = {1, 2}", 1, "a set"),
        ("x = [1, 2, 3][:2]", 1, "a slice"),
        ("x = [1] * 1000000000", 1, "an operator"),
        ("x = 'a' * 1000000000", 1, "an operator"),
        ("x = 9**9**9", 1, "too large"),
        ("x = 1e999", 1, "too large"),
        ("x = 1 / 0", 1, "arithmetic"),
        ("x = [*'ab']", 1, "no list"),
        ("x = 1\nx += 1", 2, "an assignment with an operator"),
        ("x = 1\ndel x", 2, "'del'"),
        ("x, y = 1, 2", 1, "only a name"),
        ("x = 1\nx.y = 2", 2, "no place"),
        ("x = b'a'", 1, "no number and no text"),
        ("_base_ = f'{__file__}'", 1, "_base_ must be"),
        ("x = (", 1, "not valid Python"),
    ],
)
def test_what_would_have_to_run_is_refused_with_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, line: int, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        values(tmp_path, text)
    message = str(caught.value)
    assert "mine.py" in message
    assert f"line {line}:" in message
    assert said in message
    assert "\n" not in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "text",
    [
        "x = " + "[" * 5000 + "]" * 5000,
        "x = " + "-" * 20_000 + "1",
        "x = " + "+".join(["1"] * 20_000),
        "x = " + "dict(a=" * 150 + "1" + ")" * 150,
        "x0 = 'ab'\n" + "\n".join(f"x{i + 1} = x{i} + x{i}" for i in range(60)),
        "x0 = [1, 2]\n" + "\n".join(f"x{i + 1} = [x{i}, x{i}, x{i}]" for i in range(40)),
        "x = [1]\n" + "x = [*x, *x]\n" * 60,
        "x = 10\n" + "x = x * x\n" * 60,
        "x = dict(a=1)\nx['a'] = x",
        "#" * 3_000_000,
        "x = '\0'",
    ],
    ids=["brackets", "signs", "sums", "calls", "texts", "billions", "stars", "numbers", "itself", "large", "zero"],
)
def test_hostile_files_end_in_one_line_quickly(tmp_path: Path, text: str) -> None:
    start = time.perf_counter()
    with pytest.raises(ConfigError) as caught:
        values(tmp_path, text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500 + len(str(tmp_path))
    assert time.perf_counter() - start < 10


def test_billions_of_values_in_a_checkpoints_text_are_not_read() -> None:
    lines = ["x0 = dict(a=1)", *(f"x{i + 1} = dict(a=x{i}, b=x{i})" for i in range(40)), "model = x40"]
    assert not read_config_text("\n".join(lines)).found


# Base files


def test_base_files_are_merged_as_mmengine_merges(tmp_path: Path) -> None:
    written(tmp_path, "a = dict(b=dict(c=1, d=2), e=[1])\nf = dict(g=1)\nh = 'x'\nk = [dict(m=1)]", "one.py")
    (tmp_path / "deep").mkdir()
    written(tmp_path / "deep", "_base_ = '../two.py'\nn = dict(o=dict(p=1))", "three.py")
    written(tmp_path, "q = (1, 2)", "two.py")
    found = values(
        tmp_path,
        "_base_ = ['one.py', './deep/three.py']\n"
        "a = dict(b=dict(c=3))\nf = dict(_delete_=True, new=1)\nn = dict(o=dict(_delete_=True, r={{_base_.q}}))\n"
        "h = {{_base_.h}} + '{{_base_.h}}' + _base_.h\n_base_.k[0].m = 5\n",
    )
    assert found == {
        "a": {"b": {"c": 3, "d": 2}, "e": [1]},
        "f": {"new": 1},
        "h": "xxx",
        "k": [{"m": 5}],
        "n": {"o": {"r": [1, 2]}},
        "q": [1, 2],
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("_base_ = 'mine.py'", "lead back to itself"),
        ("_base_ = 'other.py'", "lead back to itself"),
        ("_base_ = 'missing.py'", "missing.py: no such file, which _base_ of .*mine.py names"),
        ("_base_ = '/dev/zero'", "no such file"),
        ("_base_ = 'mmdet::a.py'", "an installed package"),
        ("_base_ = ['twice.py', 'again.py']", "two of its base files set a"),
        ("_base_ = 'twice.py'\na = dict(b=1)", "add _delete_=True"),
        ("_base_ = 5", "_base_ must be a path"),
    ],
)
def test_base_files_that_cannot_be_followed(tmp_path: Path, text: str, said: str) -> None:
    written(tmp_path, "_base_ = ['mine.py']", "other.py")
    written(tmp_path, "a = [1]", "twice.py")
    written(tmp_path, "a = [1]", "again.py")
    with pytest.raises(ConfigError, match=said.replace("(", r"\(")):
        values(tmp_path, text)


# Recipes


def test_a_config_of_3x_becomes_a_recipe(tmp_path: Path) -> None:
    recipe = recipe_from_mmdetection(written(tmp_path, BASE))
    assert recipe.config == Config(
        model=ModelConfig(stage_ious=(0.5, 0.6), masks="every"),
        data=DataConfig(
            root="data/nuts",
            val="test",
            short_side=(640, 800),
            short_side_mode="range",
            keep_empty=False,
            repeat=3,
            workers=3,
        ),
        train=TrainConfig(),
    )
    assert [line for line in recipe.report() if "min_size" not in line and "of its own" not in line] == []


def test_a_config_of_2x_becomes_a_recipe() -> None:
    recipe = recipe_from_mmdetection(FIXTURES / "old.py")
    assert recipe.config == Config(
        model=ModelConfig(
            style="caffe",
            norm="frozen",
            anchor_scales=(4.0, 8.0),
            anchor_ratios=(1.0,),
            stage_ious=(0.5,),
            class_agnostic_boxes=False,
            max_detections=300,
        ),
        data=DataConfig(root="data/nuts", short_side=(640, 672, 800), flip=0.25, keep_empty=False, workers=1),
        train=TrainConfig(
            epochs=24,
            milestones=(16, 22),
            lr=0.04,
            images_per_step=32,
            batch_size=4,
            warmup_steps=300,
            warmup_factor=0.01,
            clip_grad_norm=35.0,
            evaluate_every=2,
        ),
    )
    report = "\n".join(recipe.report())
    assert "--model.backbone-weights" in report
    assert "8 GPUs with 4 images" in report


LSJ = """
side = (512, 512)
train_pipeline = [
    dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='RandomResize', scale=side, ratio_range=(0.1, 2.0), keep_ratio=True),
    dict(type='RandomCrop', crop_type='absolute_range', crop_size=side, recompute_bbox=True, allow_negative_crop=True),
    dict(type='PhotoMetricDistortion'), dict(type='PackDetInputs')]
model = dict(data_preprocessor=dict(batch_augments=[dict(type='BatchFixedSizePad', size=side)]))
train_dataloader = dict(dataset=dict(dataset=dict(pipeline=train_pipeline)))
"""


@pytest.mark.parametrize(
    ("text", "setting", "value"),
    [
        ("model = dict(backbone=dict(depth=101))", "model.backbone", "resnet101.tv_in1k"),
        ("model = dict(backbone=dict(type='mmdet.ResNetV1d'))", "model.backbone", "resnet50d.ra2_in1k"),
        ("model = dict(backbone=dict(norm_eval=False))", "model.norm", "batch"),
        ("model = dict(backbone=dict(init_cfg=None))", "model.pretrained", False),
        ("model = dict(neck=dict(out_channels=128), rpn_head=dict(in_channels=128, feat_channels=128), "
         "roi_head=dict(bbox_head=[dict(_base_.head, in_channels=128), dict(_base_.head, in_channels=128)], "
         "mask_head=dict(in_channels=128)))", "model.fpn_channels", 128),
        ("model = dict(rpn_head=dict(num_convs=2))", "model.rpn_convs", 2),
        ("model = dict(roi_head=dict(stage_loss_weights=[1, 1]))", "model.stage_loss_weights", (1.0, 1.0)),
        ("model = dict(roi_head=dict(bbox_head=[_base_.head, _base_.head]))", "model.stage_stds",
         ((0.1, 0.1, 0.2, 0.2),) * 2),
        ("model = dict(test_cfg=dict(rcnn=dict(nms=dict(class_agnostic=True))))", "model.nms", "agnostic"),
        ("model = dict(train_cfg=dict(rpn_proposal=dict(max_per_img=500)))", "model.train_proposals", 500),
        ("optim_wrapper = dict(clip_grad=dict(max_norm=1))", "train.clip_grad_norm", 1.0),
        ("optim_wrapper = dict(optimizer=dict(_delete_=True, type='AdamW', lr=1e-4, weight_decay=0.05))",
         "train.optimizer", "adamw"),
        ("optim_wrapper = dict(paramwise_cfg=dict(norm_decay_mult=0, bias_decay_mult=0))",
         "train.norm_weight_decay", False),
        ("param_scheduler = [dict(type='CosineAnnealingLR', T_max=12, by_epoch=True, eta_min=0)]",
         "train.schedule", "cosine"),
        ("model = dict(backbone=dict(dcn=dict(type='DCNv2', deform_groups=2, fallback_on_stride=False), "
         "stage_with_dcn=(False, False, True, True)))", "model.deformable_stages", (3, 4)),
        ("model = dict(backbone=dict(_delete_=True, type='RegNet', arch='regnetx_3.2gf', norm_eval=True))",
         "model.backbone", "regnetx_032.pycls_in1k"),
        ("loss = dict(reg_decoded_bbox=True, loss_bbox=dict(type='GIoULoss', loss_weight=10.0))\n"
         "model = dict(roi_head=dict(bbox_head=[dict(_base_.head, **loss), dict(_base_.head, **loss)]))",
         "model.box_loss_weight", 10.0),
        ("custom_hooks = [dict(type='EMAHook', momentum=0.0002)]", "train.ema", 0.9998),
        ("train_cfg = dict(val_interval=4)", "train.evaluate_every", 4),
        ("randomness = dict(seed=7)", "train.seed", 7),
        (LSJ, "data.large_scale_jitter", (0.1, 2.0)),
        (LSJ, "data.long_side", 512),
        (LSJ, "data.flip", 0.0),
        (LSJ, "data.photometric", True),
    ],
)  # fmt: skip
def test_settings_that_are_taken_over(tmp_path: Path, text: str, setting: str, value: object) -> None:
    config = recipe_from_mmdetection(written(tmp_path, BASE + text)).config
    section, _, name = setting.partition(".")
    assert getattr(getattr(config, section), name) == value


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model = dict(type='HybridTaskCascade')", "model.type = 'HybridTaskCascade'"),
        ("model = dict(backbone=dict(type='HRNet'))", "backbone.type = 'HRNet'"),
        ("model = dict(backbone=dict(_delete_=True, type='TIMMBackbone', features_only=True, model_name='net99'))",
         "mine.py: model.backbone 'net99'"),
        ("model = dict(backbone=dict(depth=77))", "backbone.depth = 77"),
        ("model = dict(backbone=dict(depth='fifty'))", "whole numbers"),
        ("model = dict(backbone=dict(dcn=dict(type='DCNv3')))", "backbone.dcn.type = 'DCNv3'"),
        ("model = dict(backbone=dict(conv_cfg=dict(type='ConvAWS')))", "conv_cfg.type"),
        ("model = dict(backbone=dict(_delete_=True, type='RegNet', arch='regnetx_3.2gf', dcn=dict(type='DCNv2')))",
         "backbone.dcn = 'in a RegNet'"),
        ("model = dict(neck=dict(type='PAFPN'))", "neck.type = 'PAFPN'"),
        ("model = dict(neck=dict(norm_cfg=dict(type='BN')))", "neck.norm_cfg.type = 'BN'"),
        ("model = dict(neck=dict(out_channels='many'))", "expected 'many'|fpn_channels|in_channels"),
        ("model = dict(invented=1)", "invented = 1"),
        ("model = dict(rpn_head=dict(loss_bbox=dict(beta=1.0)))", "rpn_head.loss_bbox"),
        ("model = dict(rpn_head=dict(reg_decoded_bbox=True))", "reg_decoded_bbox"),
        ("loss = dict(reg_decoded_bbox=True, loss_bbox=dict(type='IoULoss', loss_weight=10.0))\n"
         "model = dict(roi_head=dict(bbox_head=[dict(_base_.head, **loss), dict(_base_.head, **loss)]))",
         r"here for roi_head.bbox_head.loss_bbox.type = 'IoULoss' \(here 'SmoothL1Loss', .*'CIoULoss'\)$"),
        ("model = dict(train_cfg=dict(rpn=dict(sampler=dict(pos_fraction=0.4))))", "pos_fraction = 0.4"),
        ("model = dict(test_cfg=dict(rpn=dict(nms=dict(iou_threshold=0.6))))", "iou_threshold = 0.6"),
        ("model = dict(roi_head=dict(mask_head=dict(num_convs=8)))", "mask_head.num_convs = 8"),
        ("model = dict(roi_head=dict(num_stages=3))", "2 box heads and 2 IoUs for 3 stages"),
        ("model = dict(data_preprocessor=dict(mean=[1, 2, 3]))", "mean"),
        ("_base_.train_pipeline[2]['type'] = 'Mosaic'\n"
         "train_dataloader = dict(dataset=dict(dataset=dict(pipeline=_base_.train_pipeline)))",
         "a step 'Mosaic'"),
        ("_base_.train_dataloader.dataset.dataset.pipeline[2].keep_ratio = False", "keep_ratio = False"),
        ("_base_.train_dataloader.dataset.dataset.pipeline[2].scale = [(1333, 640), (2000, 800)]", "one longer side"),
        ("train_dataloader = dict(dataset=dict(type='ClassBalancedDataset'))", "ClassBalancedDataset"),
        ("train_dataloader = dict(sampler=dict(type='MySampler'))", "MySampler"),
        ("optim_wrapper = dict(optimizer=dict(type='Lion'))", "'Lion'"),
        ("optim_wrapper = dict(optimizer=dict(nesterov=True))", "nesterov = True"),
        ("optim_wrapper = dict(optimizer=dict(lr='much'))", "train.lr"),
        ("optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=0.1))))", "custom_keys"),
        ("train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=90000)", "max_iters = 90000"),
        ("param_scheduler = [dict(type='PolyLR')]", "PolyLR"),
        ("_base_.param_scheduler[1].gamma = 0.5", "gamma = 0.5"),
        ("custom_hooks = [dict(type='PipelineSwitchHook')]", "PipelineSwitchHook"),
    ],
)  # fmt: skip
def test_parts_without_counterpart_are_named(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        recipe_from_mmdetection(written(tmp_path, BASE + text))
    assert "\n" not in str(caught.value)
    assert "mine.py" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("load_from = 'https://example.org/a.pth'", "load_from"),
        ("optim_wrapper = dict(type='AmpOptimWrapper')", "AmpOptimWrapper"),
        ("optim_wrapper = dict(optimizer=dict(lr=0.0025))", "train.lr 0.0025"),
        ("invented = 5", "invented"),
        ("model = dict(train_cfg=dict(rpn=dict(allowed_border=-1)))", "allowed_border = -1"),
        ("model = dict(backbone=dict(init_cfg=dict(checkpoint='./moco.pth')))", "moco.pth"),
        ("train_dataloader = dict(dataset=dict(dataset=dict(metainfo=dict(classes=('nut',)))))", "classes"),
    ],
)
def test_what_is_left_out_is_said(tmp_path: Path, text: str, said: str) -> None:
    recipe = recipe_from_mmdetection(written(tmp_path, BASE + text))
    assert any(said in line for line in recipe.report())
    assert said in recipe.to_python()


def test_the_command_prints_a_recipe_that_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = written(tmp_path, BASE + "load_from = 'a\\nimport os'\n")
    cli.main(["config", "--from-mmdet", str(mine), "--train.epochs", "24"])
    out, err = capsys.readouterr()
    recipe = load_config(written(tmp_path, out, "recipe.py"))
    assert recipe.train.milestones == (16, 22)
    assert dataclasses.replace(recipe, train=TrainConfig()) == recipe_from_mmdetection(mine).config
    assert str(FIXTURES / "model.py") in out
    assert "load_from" in err
    assert "\nimport os" not in out


@pytest.mark.slow
@pytest.mark.skipif(not WHEEL, reason="CASCADE_RCNN_MMDET_CONFIGS: the folder mmdet/.mim/configs of its wheel")
def test_every_two_stage_config_of_the_wheel_becomes_a_recipe_or_is_refused() -> None:
    """Those with a recipe of ours equal it, but for the longer warm-up of ConvNeXt's in mmdetection 3."""
    ours, equal, refused, made = config_names(), [], 0, 0
    for path in sorted(Path(WHEEL).rglob("*.py")):
        name = path.stem.replace("-", "_").lower()
        if "_base_" in path.parts or not any(word in name for word in ("cascade", "faster", "mask_rcnn")):
            continue
        try:
            config = recipe_from_mmdetection(path).config
        except ConfigError as error:
            assert name not in ours, error
            assert "\n" not in str(error)
            refused += 1
            continue
        made += 1
        name = OTHER_NAMES.get(name, name)
        if name in ours:
            recipe = dataclasses.replace(load_config(name), published="")
            if "convnext" in name:
                recipe = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, warmup_steps=1000))
            assert recipe == config, name
            equal.append(name)
    print(f"{made} recipes, {len(equal)} of them equal to ours, {refused} refused")
    assert (made, len(equal), refused) == (167, 38, 174), "docs/migrate.md tells these numbers"
