"""mmdetection's configs: a setting that decides numbers is read, listed or refused, never dropped for a value of ours.

Each case is laid over a config that becomes a recipe, and changes one thing.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from cascade_rcnn.convert.config_text import read_config_text
from cascade_rcnn.convert.mmdet_config import recipe_from_mmdetection
from cascade_rcnn.errors import ConfigError

FIXTURES = Path(__file__).parent.parent / "fixtures" / "mmdet_config"
NEW = f"_base_ = ['{FIXTURES}/model.py', '{FIXTURES}/training.py']\n"
OLD = f"_base_ = '{FIXTURES}/old.py'\n"
STEPS = "_base_.train_dataloader.dataset.dataset.pipeline"
TESTS = "_base_.test_dataloader.dataset.pipeline"
GENERATOR = "model = dict(rpn_head=dict(anchor_generator=dict({})))"
NMS = "model = dict(test_cfg=dict(rcnn=dict(nms=dict({}))))"
SCHEDULE = "param_scheduler = [{}]"
STEP_LR = "dict(type='MultiStepLR', by_epoch=True, begin=0, end=12, milestones=[8, 11], gamma=0.1)"
WARM = "dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=500)"
TIMM = "model = dict(backbone=dict(_delete_=True, type='TIMMBackbone', model_name='resnet50', features_only=True, {}))"
HEADS = "model = dict(roi_head=dict(bbox_head=[{0}, {0}]))"


def written(folder: Path, text: str) -> Path:
    path = folder / "mine.py"
    path.write_text(text, encoding="utf-8")
    return path


REFUSED = [
    # Values of a kind that is not understood
    (NEW, GENERATOR.format("strides=[(4, 8), (8, 16), (16, 32), (32, 64), (64, 128)]"),
     "rpn_head.anchor_generator.strides = [[4, 8], [8, 16], [16, 32], [32, 64], [64, 128]]: a list of numbers above 0"),
    (NEW, GENERATOR.format("scales=4"), "rpn_head.anchor_generator.scales = 4: a list of numbers above 0"),
    (NEW, GENERATOR.format("scales=['4']"), "rpn_head.anchor_generator.scales = ['4']: a list of numbers above 0"),
    (NEW, GENERATOR.format("ratios=[0.5, True]"), "anchor_generator.ratios = [0.5, True]: a list of numbers above 0"),
    (NEW, GENERATOR.format("ratios=[-1, 0]"), "anchor_generator.ratios = [-1, 0]: a list of numbers above 0"),
    (NEW, "model = dict(test_cfg=dict(rcnn=dict(max_per_img=-1)))",
     "test_cfg.rcnn.max_per_img = -1 (here a whole number of at least 1)"),
    (NEW, "model = dict(test_cfg=dict(rpn=dict(max_per_img=-1)))",
     "test_cfg.rpn.max_per_img = -1 (here a whole number of at least 1)"),
    (NEW, "model = dict(test_cfg=dict(rcnn=dict(score_thr=None)))",
     "test_cfg.rcnn.score_thr = None (here a number from 0 to 1)"),
    (NEW, "model = dict(test_cfg=dict(rcnn=dict(score_thr=-0.1)))",
     "test_cfg.rcnn.score_thr = -0.1 (here a number from 0 to 1)"),
    (NEW, NMS.format("iou_threshold='0.3'"), "test_cfg.rcnn.nms.iou_threshold = '0.3' (here a number from 0 to 1)"),
    (NEW, NMS.format("max_num=5"), "test_cfg.rcnn.nms.max_num = 5 (here -1)"),
    (NEW, NMS.format("score_threshold=0.9"), "test_cfg.rcnn.nms.score_threshold = 0.9 (here 0)"),
    (NEW, NMS.format("invented=1"), "test_cfg.rcnn.nms.invented = 1 (not known here)"),
    (NEW, NMS.format("type='soft_nms', class_agnostic=True"),
     "test_cfg.rcnn.nms.class_agnostic = True (here False in soft NMS)"),
    (NEW, "model = dict(train_cfg=dict(rpn=dict(sampler=dict(num=-1))))",
     "train_cfg.rpn.sampler.num = -1 (here a whole number of at least 1)"),
    (NEW, "model = dict(roi_head=dict(stage_loss_weights=2.0))",
     "roi_head.stage_loss_weights = 2.0 (here a list of numbers, one for each stage)"),
    (NEW, "model = dict(backbone=dict(with_cp='True'))", "backbone.with_cp = 'True' (here True or False)"),
    (NEW, "model = dict(backbone=dict(norm_eval='no'))", "backbone.norm_eval = 'no' (here True or False)"),
    (NEW, "train_cfg = dict(val_interval='2')", "val_interval = '2' (here a whole number of at least 1)"),
    (NEW, "optim_wrapper = dict(clip_grad=dict(max_norm='35'))", "optim_wrapper.clip_grad.max_norm = '35'"),
    # Absent: mmdetection's value
    (NEW, "model = dict(rpn_head=dict(loss_cls=dict(_delete_=True, type='CrossEntropyLoss', loss_weight=1.0)))",
     "rpn_head.loss_cls.use_sigmoid = False (here True), which is mmdetection's value where the config has none"),
    (NEW, "model = dict(roi_head=dict(mask_head=dict(loss_mask=dict(_delete_=True, type='CrossEntropyLoss'))))",
     "roi_head.mask_head.loss_mask.use_mask = False (here True), which is mmdetection's value"),
    (NEW, "model = dict(train_cfg=dict(rpn_proposal=dict(_delete_=True)))",
     "train_cfg.rpn_proposal.nms_pre = 1000 (here 2000), which is mmdetection's value"),
    (NEW, "model = dict(train_cfg=dict(rpn_proposal=dict(_delete_=True, max_per_img=2000, min_bbox_size=0, "
     "nms=dict(type='nms', iou_threshold=0.7))))", "train_cfg.rpn_proposal.nms_pre = -1 (here 2000), which is mmdet"),
    (NEW, "model = dict(test_cfg=dict(rpn=dict(_delete_=True, max_per_img=1000, min_bbox_size=0, nms=dict(type='nms', "
     "iou_threshold=0.7))))", "test_cfg.rpn.nms_pre = -1 (here 1000), which is mmdet"),
    (NEW, "model = dict(rpn_head=dict(anchor_generator=dict(_delete_=True, type='AnchorGenerator', strides=[4, 8, 16, "
     "32, 64])))", "rpn_head.anchor_generator without scales, rpn_head.anchor_generator without ratios"),
    (NEW, "model = dict(train_cfg=dict(rpn=dict(sampler=dict(_delete_=True, type='RandomSampler', num=256, "
     "pos_fraction=0.5, neg_pos_ub=-1))))", "train_cfg.rpn.sampler.add_gt_as_proposals = True"),
    (NEW, "model = dict(train_cfg=dict(rpn=dict(assigner=dict(_delete_=True, type='MaxIoUAssigner', pos_iou_thr=0.7, "
     "neg_iou_thr=0.3))))", "train_cfg.rpn.assigner.min_pos_iou = 0.0 (here 0.3), which is mmdetection's value"),
    (OLD, "model = dict(train_cfg=dict(rcnn=dict(assigner=dict(_delete_=True, type='MaxIoUAssigner', pos_iou_thr=0.5, "
     "neg_iou_thr=0.5))))", "train_cfg.rcnn.assigner.min_pos_iou = 0.0 (here 0.5), which is mmdetection's value"),
    (NEW, "model = dict(train_cfg=dict(rpn=dict(sampler=dict(_delete_=True, type='RandomSampler', num=256, "
     "pos_fraction=0.5))))", "train_cfg.rpn.sampler.add_gt_as_proposals = True (here False), which is mmdetection's"),
    (NEW, "model = dict(test_cfg=dict(rcnn=dict(_delete_=True, score_thr=0.05, max_per_img=100)))",
     "test_cfg.rcnn without nms"),
    # Norms and backbones
    (NEW, "model = dict(backbone=dict(norm_cfg=dict(eps=1e-3)))", "backbone.norm_cfg.eps = 0.001 (here 1e-05)"),
    (NEW, "model = dict(backbone=dict(norm_eval=False, norm_cfg=dict(momentum=0.5)))",
     "backbone.norm_cfg.momentum = 0.5 (here 0.1)"),
    (NEW, "model = dict(backbone=dict(out_indices=(1, 2, 3, 4)))", "backbone.out_indices = [1, 2, 3, 4]"),
    (NEW, TIMM.format("pretrained=True, out_indices=(1, 2, 3, 4), in_channels=1"), "backbone.in_channels = 1 (here 3)"),
    (NEW, TIMM.format("pretrained=True, out_indices=(0, 1, 2, 3)"),
     "backbone.out_indices = [0, 1, 2, 3] (here [1, 2, 3, 4])"),
    (NEW, "model = dict(backbone=dict(dcn=dict(type='DCN', deform_groups=1), stage_with_dcn=(True, True)))",
     "backbone.stage_with_dcn = [True, True] (here True or False for each of four stages)"),
    # Parts of a wrong kind
    (NEW, "model = dict(neck=None)", "neck = None (here one dictionary)"),
    (NEW, "model = dict(rpn_head=None)", "rpn_head = None (here one dictionary)"),
    (NEW, "model = dict(neck=[dict(type='FPN', out_channels=128, num_outs=5)])", "neck = [{"),
    (NEW, "model = dict(roi_head=dict(mask_head=[None, dict(type='FCNMaskHead')]))",
     "roi_head.mask_head = [False, True] (here a head at every stage or none)"),
    # Schedules, hooks, loops
    (NEW, SCHEDULE.format(f"{WARM}, {STEP_LR.replace('[8, 11]', '[4]')}, {STEP_LR}"),
     "param_scheduler = ['LinearLR', 'MultiStepLR', 'MultiStepLR'] (here one LinearLR as warm-up, and one MultiStepLR"),
    (NEW, SCHEDULE.format(f"{WARM}, {WARM}, {STEP_LR}"), "param_scheduler = ['LinearLR', 'LinearLR', 'MultiStepLR']"),
    (NEW, SCHEDULE.format(f"{STEP_LR}, dict(type='CosineAnnealingLR', T_max=12)"), "param_scheduler = ['MultiStepLR'"),
    (NEW, SCHEDULE.format("dict(type='CosineAnnealingLR', end=6, T_max=12)"),
     "param_scheduler.CosineAnnealingLR.end = 6 (here 12, the number of epochs)"),
    (NEW, SCHEDULE.format(STEP_LR.replace("8,", "'8',")), "param_scheduler.MultiStepLR.milestones = '8'"),
    (NEW, "default_hooks = dict(other=dict(type='PipelineSwitchHook'))",
     "default_hooks.type = 'PipelineSwitchHook' (here EMAHook, EarlyStoppingHook)"),
    (NEW, "default_hooks = dict(param_scheduler=None)", "default_hooks.param_scheduler = None (here mmdetection's)"),
    (NEW, "custom_hooks = [dict(type='EMAHook'), dict(type='EMAHook')]", "custom_hooks.type = 'EMAHook' (here once)"),
    (NEW, "train_cfg = dict(type='IterBasedTrainLoop')", "train_cfg.type = 'IterBasedTrainLoop'"),
    # Data
    (NEW, "train_dataloader = dict(sampler=dict(shuffle=False))", "dataloader.sampler.shuffle = False (here True)"),
    (NEW, "train_dataloader = dict(drop_last=True)", "train_dataloader.drop_last = True (here False)"),
    (NEW, "train_dataloader = dict(collate_fn=dict(type='mine'))", "train_dataloader.collate_fn = {'type': 'mine'}"),
    (OLD, "data = dict(train_dataloader=dict(shuffle=False))", "data.train_dataloader.shuffle = False (here True)"),
    (OLD, "data = dict(train_dataloader=dict(class_aware_sampler=dict(num_sample_class=1)))",
     "data.train_dataloader.class_aware_sampler = {'num_sample_class': 1}"),
    (OLD, "data = dict(foo=3)", "data.foo = 3"),
    (OLD, "_base_.data.train.pipeline[4] = dict(type='Normalize', mean=[0, 0, 0], std=[1, 1, 1], to_rgb=False)",
     "Normalize of training and test = [[[0, 0, 0], [1, 1, 1], False]"),
    (NEW, f"{STEPS}[3] = dict(type='Normalize', mean=[0, 0, 0], std=[1, 1, 1])", "a step Normalize = [[0, 0, 0], ["),
    (NEW, f"{STEPS}[0] = dict(type='RandomFlip', prob=0.1)", "train_pipeline: 2 steps RandomFlip (here one)"),
    (NEW, f"{STEPS}[1].box_type = 'qbox'", "train_pipeline.LoadAnnotations.box_type = 'qbox' (here 'hbox')"),
    (NEW, f"{STEPS}[1].with_bbox = False", "train_pipeline.LoadAnnotations.with_bbox = False (here True)"),
    (NEW, f"{STEPS}[0] = dict(type='FilterAnnotations', keep_empty=False)", "FilterAnnotations.keep_empty = False"),
    (NEW, f"{TESTS}[1] = dict(type='FixScaleResize', scale=(1333, 800), keep_ratio=False)",
     "test_pipeline: FixScaleResize with keep_ratio = False (here True)"),
    (NEW, f"{TESTS}[0] = dict(type='Pad', size=(1344, 1344), pad_val=114)",
     "test_pipeline: Pad with {'size': [1344, 1344], 'pad_val': 114} (here by 0"),
    # The language
    (NEW, "x = dict(a=1, a=2)", "line 2: dict() with a twice, which Python refuses too"),
    ("", "model = '\0'", "mine.py: not valid Python"),
    ("", "tta_model = [i for i in (1,)]\nmodel = dict(type='RetinaNet')",
     "mine.py: no counterpart here for model.type = 'RetinaNet': FasterRCNN, MaskRCNN, CascadeRCNN are read"),
    ("", "tta_model = [i for i in (1,)]\nmodel = tta_model", "line 2: the value of a name that was not read"),
]  # fmt: skip


@pytest.mark.parametrize(("base", "text", "said"), REFUSED, ids=range(len(REFUSED)))
def test_what_cannot_be_taken_over_is_refused(tmp_path: Path, base: str, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        recipe_from_mmdetection(written(tmp_path, base + text))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "mine.py" in str(caught.value)


LISTED = [
    (NEW, "model = dict(init_cfg=dict(type='Pretrained', checkpoint='coco.pth'))",
     "init_cfg.checkpoint = 'coco.pth': the weights of this part or of the whole detector"),
    (NEW, "model = dict(roi_head=dict(init_cfg=dict(type='Pretrained', checkpoint='coco.pth')))",
     "roi_head.init_cfg.checkpoint = 'coco.pth'"),
    (OLD, "model = dict(rpn_head=dict(init_cfg=dict(type='Normal', std=0.1)))", "rpn_head.init_cfg.type = 'Normal'"),
    (NEW, NMS.format("type='soft_nms', method='gaussian', sigma=0.5, min_score=0.2"),
     "test_cfg.rcnn.nms.min_score = 0.2: here detections above score_thr are kept"),
    (OLD, "model = dict(train_cfg=dict(rcnn=dict(assigner=dict(_delete_=True, type='MaxIoUAssigner', pos_iou_thr=0.5, "
     "neg_iou_thr=0.5, min_pos_iou=0.5))))",
     "train_cfg.rcnn.assigner.match_low_quality = True: a box that covers two objects well enough learns the one whose "
     "best box it is there, here the one that it covers better, which is mmdetection's value"),
    (NEW, "model = dict(data_preprocessor=dict(pad_value=114))", "pad_value = 114: the padding is 0 here"),
    (NEW, TIMM.format("out_indices=(1, 2, 3, 4), init_cfg=dict(type='Pretrained', checkpoint='my.pth')"),
     "the backbone's weights 'my.pth': the start is timm's resnet50"),
    (NEW, SCHEDULE.format(STEP_LR.replace("end=12", "end=9")),
     "param_scheduler.MultiStepLR.end = 9: mmdetection's rate does not fall at 11, here it does"),
    (NEW, "custom_hooks = [dict(type='EarlyStoppingHook', monitor='coco/bbox_mAP', patience=3)]",
     "custom_hooks.EarlyStoppingHook.min_delta = 0.1: any better result counts here"),
    (NEW, "val_evaluator = dict(metric=['proposal'])", "val_evaluator.metric = ['proposal']: evaluated by COCO's AP"),
    (OLD, "evaluation = dict(metric='mAP', iou_thr=0.3)", "evaluation.iou_thr = 0.3: evaluated at COCO's IoUs"),
    (OLD, "workflow = [('train', 1), ('val', 1)]", "workflow = [['train', 1], ['val', 1]]: training alone"),
    (OLD, "runner = dict(type='EpochBasedRunnerAmp')", "runner.type = 'EpochBasedRunnerAmp'"),
    (NEW, "custom_imports = dict(imports=['mmdet.my_patch'])", "custom_imports ['mmdet.my_patch']: not imported"),
    (NEW, "custom_imports = ['mmdet.my_patch']", "custom_imports ['mmdet.my_patch']: not imported"),
    (NEW, f"{STEPS}[0].imdecode_backend = 'pillow'", "LoadImageFromFile.imdecode_backend = 'pillow'"),
    (NEW, "tta_model = [i for i in (1, 2)]", "names that are not known here: tta_model"),
]  # fmt: skip


@pytest.mark.parametrize(("base", "text", "said"), LISTED, ids=range(len(LISTED)))
def test_what_is_not_taken_over_is_listed(tmp_path: Path, base: str, text: str, said: str) -> None:
    report = recipe_from_mmdetection(written(tmp_path, base + text)).report()
    assert any(said in line for line in report), report


TAKEN = [
    (NEW, HEADS.format("dict(_base_.head, bbox_coder=dict(type='DeltaXYWHBBoxCoder'))"), "model.stage_stds",
     ((1.0, 1.0, 1.0, 1.0),) * 2),
    (NEW, HEADS.format("dict(_base_.head, bbox_coder=None)"), "model.stage_stds", ((0.1, 0.1, 0.2, 0.2),) * 2),
    (NEW, "model = dict(backbone=dict(norm_eval=0, norm_cfg=dict(type='MMSyncBN')))", "model.norm", "sync"),
    (NEW, "model = dict(backbone=dict(norm_eval=False, norm_cfg=dict(type='x.NaiveSyncBN')))", "model.norm", "sync"),
    (NEW, "model = dict(backbone=dict(_delete_=True, type='ResNet', depth=50, norm_eval=0))", "model.norm", "batch"),
    (NEW, "model = dict(backbone=dict(dcn=dict(type='mmdet.DCNv2'), stage_with_dcn=(0, 1, 1, 1)))",
     "model.deformable", "modulated"),
    (NEW, "model = dict(backbone=dict(dcn=dict(type='mmdet.DCNv2'), stage_with_dcn=(0, 1, 1, 1)))",
     "model.deformable_stages", (2, 3, 4)),
    (NEW, "loss = dict(reg_decoded_bbox=1, loss_bbox=dict(type='mmdet.GIoULoss', loss_weight=10))\n"
     "model = dict(roi_head=dict(bbox_head=[dict(_base_.head, **loss), dict(_base_.head, **loss)]))",
     "model.box_loss", "giou"),
    (NEW, "model = dict(train_cfg=dict(rpn=dict(sampler=dict(num=128.0))))", "model.rpn_samples", 128),
    (NEW, "train_dataloader = dict(dataset=dict(times=4.0))", "data.repeat", 4),
    (NEW, SCHEDULE.format(STEP_LR.replace("[8, 11]", "[8.0, 11]")), "train.milestones", (8, 11)),
    (NEW, "default_hooks = dict(ema=dict(type='EMAHook', momentum=0.01))", "train.ema", 0.99),
    (NEW, "default_hooks = dict(early=dict(type='EarlyStoppingHook', monitor='coco/bbox_mAP', patience=3))",
     "train.patience", 3),
    (OLD, "data = dict(train_dataloader=dict(samples_per_gpu=8))", "train.batch_size", 8),
    (NEW, TIMM.format("pretrained=True, out_indices=(1, 2, 3, 4), drop_path_rate=0.4"), "model.drop_path", 0.4),
    (NEW, TIMM.format("pretrained=True, out_indices=(1, 2, 3, 4)"), "model.norm", "batch"),
    (NEW, "model = dict(rpn_head=dict(_delete_=True, type='RPNHead', in_channels=256, feat_channels=256, "
     "loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=True, loss_weight=1.0), "
     "loss_bbox=dict(type='SmoothL1Loss', beta=1 / 9, loss_weight=1.0)))", "model.anchor_scales", (8.0, 16.0, 32.0)),
]  # fmt: skip


@pytest.mark.parametrize(("base", "text", "setting", "value"), TAKEN, ids=range(len(TAKEN)))
def test_what_is_taken_over(tmp_path: Path, base: str, text: str, setting: str, value: object) -> None:
    config = recipe_from_mmdetection(written(tmp_path, base + text)).config
    section, _, name = setting.partition(".")
    assert getattr(getattr(config, section), name) == value


def test_a_checkpoints_text_loses_nothing_either() -> None:
    hints = read_config_text(
        "model = dict(backbone=dict(type='mmdet.ResNet', dcn=dict(type='mmdet.DCNv2'), norm_eval=False, "
        "norm_cfg=dict(type='NaiveSyncBN')), test_cfg=dict(rcnn=dict(max_per_img=-1)))"
    )
    assert (hints.model["deformable"], hints.model["norm"]) == ("modulated", "sync")
    assert hints.unlike == ["test_cfg.rcnn.max_per_img = -1 (here a whole number of at least 1)"]
