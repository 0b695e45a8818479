"""Which of mmdetection's settings are taken over, listed, or refused, and the values that mean what is done here.

A row is (path, verdict, values). The first row whose path fits decides (``*``: anything); the stages of a list share
their path. With a value of the row's the setting is what is done here. With another it is, by verdict:

    TAKEN        read by ``config_text``, or seen in the weights, or without effect: any value will do
    TRAINING     listed as not taken over: the network computes the same without it
    UNLIKE       refused, unless a recipe is preferred to the text
    IMPOSSIBLE   refused: the network here would compute another function
"""

from __future__ import annotations

from typing import Any

_ZEROS, _ONES = [0, 0, 0, 0], [1, 1, 1, 1]
DETECTORS = ("FasterRCNN", "MaskRCNN", "CascadeRCNN")
TAKEN, IMPOSSIBLE, UNLIKE, TRAINING = "taken", "impossible", "unlike", "training"
_Rule = tuple[str, str, tuple[Any, ...]]


def _coder(path: str, stds: str, *expected_stds: Any) -> list[_Rule]:
    return [
        (f"{path}.bbox_coder.type", IMPOSSIBLE, ("DeltaXYWHBBoxCoder",)),
        (f"{path}.bbox_coder.target_means", IMPOSSIBLE, (_ZEROS,)),
        (f"{path}.bbox_coder.target_stds", stds, expected_stds),
        (f"{path}.bbox_coder.clip_border", IMPOSSIBLE, (True,)),
        (f"{path}.bbox_coder.add_ctr_clamp", IMPOSSIBLE, (False,)),
        (f"{path}.bbox_coder.ctr_clamp", TAKEN, ()),
        (f"{path}.bbox_coder.use_box_type", TAKEN, ()),
    ]


def _norm_rules(path: str) -> list[_Rule]:
    return [
        (f"{path}.norm_cfg.type", IMPOSSIBLE, ("BN", "BN2d", "SyncBN", "MMSyncBN", "NaiveSyncBN", "GN")),
        (f"{path}.norm_cfg.num_groups", IMPOSSIBLE, (32,)),
        (f"{path}.norm_cfg.eps", IMPOSSIBLE, (1e-5,)),
        (f"{path}.norm_cfg.requires_grad", TAKEN, ()),
        (f"{path}.norm_cfg.momentum", TAKEN, ()),
        (f"{path}.conv_cfg.type", IMPOSSIBLE, ("Conv", "Conv2d", "ConvWS", "ConvWS2d")),
    ]


_BACKBONES = ("ResNet", "ResNeXt", "ResNetV1c", "ResNetV1d", "TIMMBackbone", "RegNet", "ConvNeXt", "SwinTransformer")
RULES: list[_Rule] = [
    ("*.init_cfg.*", TAKEN, ()),
    ("*.init_cfg", TAKEN, ()),
    ("pretrained", TAKEN, ()),
    ("backbone.pretrained", TAKEN, ()),
    ("init_cfg*", TAKEN, ()),
    ("type", IMPOSSIBLE, (*DETECTORS, "TwoStageDetector")),
    ("data_preprocessor.pad_size_divisor", TRAINING, (32, 1)),
    ("data_preprocessor.pad_value", TRAINING, (0,)),
    ("data_preprocessor.batch_augments*", TRAINING, (None,)),
    *[
        (f"data_preprocessor.{name}", TAKEN, ())
        for name in (
            *("type", "mean", "std", "bgr_to_rgb", "rgb_to_bgr", "pad_mask", "mask_pad_value", "pad_seg"),
            *("seg_pad_value", "boxtype2tensor", "non_blocking"),
        )
    ],
    # Backbone
    ("backbone.type", IMPOSSIBLE, _BACKBONES),
    ("backbone.norm_cfg.eps", TAKEN, ()),
    (
        "backbone.norm_cfg.type",
        IMPOSSIBLE,
        ("BN", "BN2d", "SyncBN", "MMSyncBN", "NaiveSyncBN", "GN", "LN", "LN2d"),
    ),
    *_norm_rules("backbone"),
    ("backbone.strides", IMPOSSIBLE, ([1, 2, 2, 2], [4, 2, 2, 2])),  # the second: Swin's
    ("backbone.dilations", IMPOSSIBLE, ([1, 1, 1, 1],)),
    ("backbone.out_indices", IMPOSSIBLE, ([0, 1, 2, 3], [1, 2, 3, 4])),  # the second: timm's, from stride 2 on
    ("backbone.num_stages", IMPOSSIBLE, (4,)),
    ("backbone.dcn.type", IMPOSSIBLE, ("DCN", "DCNv2")),
    ("backbone.dcn.fallback_on_stride", IMPOSSIBLE, (False,)),
    ("backbone.dcn.deform*_groups", TAKEN, ()),
    ("backbone.dcn.modulated", TAKEN, ()),
    ("backbone.dcn*", IMPOSSIBLE, (None, False)),
    ("backbone.plugins*", IMPOSSIBLE, (None,)),
    # ConvNeXt and Swin
    ("backbone.gap_before_final_norm", IMPOSSIBLE, (False,)),
    ("backbone.use_grn", IMPOSSIBLE, (False,)),
    ("backbone.act_cfg.type", IMPOSSIBLE, ("GELU",)),
    ("backbone.qk_scale", IMPOSSIBLE, (None,)),
    ("backbone.use_abs_pos_embed", IMPOSSIBLE, (False,)),
    ("backbone.ape", IMPOSSIBLE, (False,)),
    ("backbone.drop_rate", TRAINING, (0,)),
    ("backbone.attn_drop_rate", TRAINING, (0,)),
    *[(f"backbone.{name}*", IMPOSSIBLE, (None, False)) for name in ("gcb", "gen_attention", "sac", "rfp_inplanes")],
    *[
        (f"backbone.{name}", TAKEN, ())
        for name in (
            "arch*",  # of RegNet and ConvNeXt
            *(
                "depth",
                "groups",
                "base_width",
                "base_channels",
                "stem_channels",
                "in_channels",
                "deep_stem",
                "avg_down",
            ),
            *("style", "frozen_stages", "norm_eval", "with_cp", "zero_init_residual", "stage_with_dcn"),
            *("model_name", "features_only", "checkpoint_path"),
            # of ConvNeXt and Swin, in mmdetection and mmpretrain and by their authors
            *("depths", "dims", "channels", "in_chans", "stem_patch_size", "layer_scale_init_value", "linear_pw_conv"),
            *("embed_dims", "embed_dim", "num_heads", "window_size", "patch_size", "patch_norm", "mlp_ratio"),
            *("qkv_bias", "pretrain_img_size", "convert_weights", "drop_path_rate", "use_checkpoint"),
        )
    ],
    # Neck
    ("neck.type", IMPOSSIBLE, ("FPN",)),
    ("neck.num_outs", IMPOSSIBLE, (5,)),
    ("neck.start_level", IMPOSSIBLE, (0,)),
    ("neck.end_level", IMPOSSIBLE, (-1, 3)),
    ("neck.add_extra_convs", IMPOSSIBLE, (False,)),
    ("neck.act_cfg*", IMPOSSIBLE, (None,)),
    ("neck.upsample_cfg.mode", IMPOSSIBLE, ("nearest",)),
    ("neck.upsample_cfg.scale_factor", IMPOSSIBLE, (2,)),
    *_norm_rules("neck"),
    *[
        (f"neck.{name}", TAKEN, ())
        for name in (
            *("in_channels", "out_channels", "relu_before_extra_convs", "no_norm_on_lateral"),
            "extra_convs_on_inputs",
        )
    ],
    # RPN
    ("rpn_head.type", IMPOSSIBLE, ("RPNHead",)),
    ("rpn_head.anchor_generator.type", IMPOSSIBLE, ("AnchorGenerator",)),
    ("rpn_head.anchor_generator.center_offset", IMPOSSIBLE, (0,)),
    ("rpn_head.anchor_generator.centers", IMPOSSIBLE, (None,)),
    *[
        (f"rpn_head.anchor_generator.{name}", TAKEN, ())
        for name in (
            *("scales", "ratios", "strides", "base_sizes", "octave_base_scale", "scales_per_octave", "scale_major"),
            "use_box_type",
        )
    ],
    *[(f"rpn_head.anchor_{name}", TAKEN, ()) for name in ("scales", "ratios", "strides", "base_sizes")],  # early 2.x
    ("rpn_head.target_means", IMPOSSIBLE, (_ZEROS,)),
    ("rpn_head.target_stds", IMPOSSIBLE, (_ONES,)),
    *_coder("rpn_head", IMPOSSIBLE, _ONES),
    ("rpn_head.loss_cls.use_sigmoid", IMPOSSIBLE, (True,)),
    ("rpn_head.loss_cls.type", TRAINING, ("CrossEntropyLoss",)),
    ("rpn_head.loss_bbox.type", TRAINING, ("SmoothL1Loss", "L1Loss")),
    ("rpn_head.loss_*.loss_weight", TRAINING, (1,)),
    ("rpn_head.loss_bbox.beta", TRAINING, (0.1111111111111111, 0.1111111, 0.111)),
    ("rpn_head.loss_*", TRAINING, ()),
    ("rpn_head.reg_decoded_bbox", TRAINING, (False,)),
    *[(f"rpn_head.{name}", TAKEN, ()) for name in ("in_channels", "feat_channels", "num_convs", "num_classes")],
    # RoI heads
    ("roi_head.type", IMPOSSIBLE, ("StandardRoIHead", "CascadeRoIHead", "PISARoIHead", "DynamicRoIHead")),
    ("roi_head.num_stages", TAKEN, ()),
    ("roi_head.stage_loss_weights", TAKEN, ()),
    ("roi_head.*_roi_extractor.type", IMPOSSIBLE, ("SingleRoIExtractor",)),
    ("roi_head.*_roi_extractor.roi_layer.type", IMPOSSIBLE, ("RoIAlign",)),
    ("roi_head.*_roi_extractor.roi_layer.sampling_ratio", IMPOSSIBLE, (0, -1)),
    ("roi_head.*_roi_extractor.roi_layer.aligned", IMPOSSIBLE, (True,)),
    ("roi_head.*_roi_extractor.roi_layer.pool_mode", IMPOSSIBLE, ("avg",)),
    ("roi_head.bbox_roi_extractor.roi_layer.output_size", IMPOSSIBLE, (7, [7, 7])),
    ("roi_head.mask_roi_extractor.roi_layer.output_size", IMPOSSIBLE, (14, [14, 14])),
    ("roi_head.*_roi_extractor.roi_layer.sample_num", IMPOSSIBLE, (0, -1)),  # early 2.x
    ("roi_head.bbox_roi_extractor.roi_layer.out_size", IMPOSSIBLE, (7, [7, 7])),
    ("roi_head.mask_roi_extractor.roi_layer.out_size", IMPOSSIBLE, (14, [14, 14])),
    ("roi_head.*_roi_extractor.roi_layer.use_torchvision", TAKEN, ()),
    ("roi_head.*_roi_extractor.featmap_strides", IMPOSSIBLE, ([4, 8, 16, 32],)),
    ("roi_head.*_roi_extractor.finest_scale", IMPOSSIBLE, (56,)),
    ("roi_head.*_roi_extractor.out_channels", TAKEN, ()),
    ("roi_head.mask_roi_extractor", TAKEN, ()),
    *_coder("roi_head.bbox_head", TAKEN),
    ("roi_head.bbox_head.target_means", IMPOSSIBLE, (_ZEROS,)),
    ("roi_head.bbox_head.target_stds", TAKEN, ()),
    (
        "roi_head.bbox_head.type",
        IMPOSSIBLE,
        ("Shared2FCBBoxHead", "Shared4Conv1FCBBoxHead", "ConvFCBBoxHead", "BBoxHead"),
    ),
    ("roi_head.bbox_head.loss_cls.use_sigmoid", IMPOSSIBLE, (False,)),
    ("roi_head.bbox_head.loss_cls.type", TRAINING, ("CrossEntropyLoss",)),
    ("roi_head.bbox_head.loss_bbox.type", TRAINING, ("SmoothL1Loss", "L1Loss", "GIoULoss", "DIoULoss", "CIoULoss")),
    ("roi_head.bbox_head.loss_bbox.loss_weight", TAKEN, ()),
    ("roi_head.bbox_head.loss_bbox.beta", TRAINING, (1,)),
    ("roi_head.*.loss_*.loss_weight", TRAINING, (1,)),
    ("roi_head.bbox_head.loss_*", TRAINING, ()),
    ("roi_head.bbox_head.reg_decoded_bbox", TRAINING, (False,)),
    ("roi_head.bbox_head.*_predictor_cfg.type", IMPOSSIBLE, ("Linear",)),
    ("roi_head.bbox_head.*_predictor_cfg.*", TAKEN, ()),
    ("roi_head.bbox_head.with_avg_pool", IMPOSSIBLE, (False,)),
    ("roi_head.bbox_head.roi_feat_size", IMPOSSIBLE, (7, [7, 7])),
    ("roi_head.bbox_head.with_cls", IMPOSSIBLE, (True,)),
    ("roi_head.bbox_head.with_reg", IMPOSSIBLE, (True,)),
    *_norm_rules("roi_head.bbox_head"),
    *[
        (f"roi_head.bbox_head.{name}", TAKEN, ())
        for name in (
            *("in_channels", "fc_out_channels", "conv_out_channels", "num_classes", "reg_class_agnostic"),
            *("num_shared_convs", "num_shared_fcs", "num_cls_convs", "num_cls_fcs", "num_reg_convs", "num_reg_fcs"),
        )
    ],
    ("roi_head.mask_head.type", IMPOSSIBLE, ("FCNMaskHead",)),
    ("roi_head.mask_head.predictor_cfg.type", IMPOSSIBLE, ("Conv", "Conv2d")),
    ("roi_head.mask_head.predictor_cfg.*", TAKEN, ()),
    ("roi_head.mask_head.upsample_cfg.type", IMPOSSIBLE, ("deconv",)),
    ("roi_head.mask_head.upsample_cfg.scale_factor", IMPOSSIBLE, (2,)),
    ("roi_head.mask_head.conv_kernel_size", IMPOSSIBLE, (3,)),
    ("roi_head.mask_head.class_agnostic", IMPOSSIBLE, (False,)),
    ("roi_head.mask_head.roi_feat_size", IMPOSSIBLE, (14, [14, 14])),
    ("roi_head.mask_head.loss_mask.type", TRAINING, ("CrossEntropyLoss",)),
    ("roi_head.mask_head.loss_mask.use_mask", IMPOSSIBLE, (True,)),
    ("roi_head.mask_head.loss_mask.*", TRAINING, ()),
    *_norm_rules("roi_head.mask_head"),
    *[
        (f"roi_head.mask_head.{name}", TAKEN, ())
        for name in ("in_channels", "conv_out_channels", "num_convs", "num_classes")
    ],
    ("roi_head.mask_head", TAKEN, ()),
    ("roi_head.bbox_head", TAKEN, ()),
    *[
        (f"roi_head.{name}", IMPOSSIBLE, (None, False))
        for name in (
            *("shared_head*", "semantic_*", "mask_iou_head*", "point_head*", "grid_*", "glbctx_head*", "interleaved"),
            *("feat_relay_head*", "mask_info_flow", "reg_roi_*", "bbox_head.*_last_dim"),
        )
    ],
    # Tests
    ("test_cfg.rpn.nms_pre", TAKEN, ()),  # see _test_settings
    ("test_cfg.rpn.max_per_img", TAKEN, ()),
    ("test_cfg.rpn.max_num", TAKEN, ()),
    ("test_cfg.rpn.nms_post", TAKEN, ()),
    ("test_cfg.rpn.nms_across_levels", UNLIKE, (False,)),
    ("test_cfg.rpn.nms.type", UNLIKE, ("nms",)),
    ("test_cfg.rpn.nms.iou_thr*", UNLIKE, (0.7,)),
    ("test_cfg.rpn.nms_thr", UNLIKE, (0.7,)),
    ("test_cfg.rpn.min_bbox_size", UNLIKE, (0,)),
    ("test_cfg.rcnn.score_thr", TAKEN, ()),
    ("test_cfg.rcnn.max_per_img", TAKEN, ()),
    ("test_cfg.rcnn.nms.type", UNLIKE, ("nms", "soft_nms")),
    *[
        (f"test_cfg.rcnn.nms.{name}", TAKEN, ())  # see _test_settings
        for name in ("iou_thr", "iou_threshold", "class_agnostic", "split_thr", "method", "sigma", "min_score")
    ],
    ("test_cfg.rcnn.nms.max_num", UNLIKE, (-1,)),
    ("test_cfg.rcnn.nms.score_threshold", UNLIKE, (0,)),
    ("test_cfg.rcnn.nms.offset", UNLIKE, (0,)),
    ("test_cfg.rcnn.mask_thr_binary", UNLIKE, (0.5,)),
    # Training
    ("train_cfg.rcnn.assigner.pos_iou_thr", TAKEN, ()),
    ("train_cfg.*.sampler.num", TAKEN, ()),
    ("train_cfg.rpn_proposal.max_per_img", TAKEN, ()),
    ("train_cfg.rpn_proposal.max_num", TAKEN, ()),
    ("train_cfg.rpn_proposal.nms_post", TAKEN, ()),
    ("train_cfg.rpn_proposal.nms_thr", TRAINING, (0.7,)),
    ("train_cfg.*.assigner.type", TRAINING, ("MaxIoUAssigner",)),
    ("train_cfg.rpn.assigner.pos_iou_thr", TRAINING, (0.7,)),
    ("train_cfg.rpn.assigner.neg_iou_thr", TRAINING, (0.3,)),
    ("train_cfg.rpn.assigner.min_pos_iou", TRAINING, (0.3,)),
    ("train_cfg.rpn.assigner.match_low_quality", TRAINING, (True,)),
    ("train_cfg.rcnn.assigner.neg_iou_thr", TRAINING, (0.5, 0.6, 0.7)),
    ("train_cfg.rcnn.assigner.min_pos_iou", TRAINING, (0.5, 0.6, 0.7)),
    ("train_cfg.rcnn.assigner.match_low_quality", TRAINING, (False,)),
    ("train_cfg.*.assigner.ignore_iof_thr", TRAINING, (-1,)),
    ("train_cfg.*.sampler.type", TRAINING, ("RandomSampler",)),
    ("train_cfg.rpn.sampler.pos_fraction", TRAINING, (0.5,)),
    ("train_cfg.rcnn.sampler.pos_fraction", TRAINING, (0.25,)),
    ("train_cfg.*.sampler.neg_pos_ub", TRAINING, (-1,)),
    ("train_cfg.rpn.sampler.add_gt_as_proposals", TRAINING, (False,)),
    ("train_cfg.rcnn.sampler.add_gt_as_proposals", TRAINING, (True,)),
    ("train_cfg.rpn.allowed_border", TRAINING, (0, -1)),
    ("train_cfg.*.pos_weight", TRAINING, (-1,)),
    ("train_cfg.*.debug", TAKEN, ()),
    ("train_cfg.rcnn.mask_size", TRAINING, (28,)),
    ("train_cfg.rpn_proposal.nms_pre", TRAINING, (2000,)),
    ("train_cfg.rpn_proposal.nms.type", TRAINING, ("nms",)),
    ("train_cfg.rpn_proposal.nms.iou_thr*", TRAINING, (0.7,)),
    ("train_cfg.rpn_proposal.min_bbox_size", TRAINING, (0,)),
    ("train_cfg.rpn_proposal.nms_across_levels", TRAINING, (False,)),
]
TEST_STEPS = {
    *("LoadImageFromFile", "LoadImageFromWebcam", "LoadAnnotations", "Resize", "FixScaleResize", "RandomFlip"),
    *("Normalize", "Pad", "ImageToTensor", "DefaultFormatBundle", "Collect", "PackDetInputs", "ToTensor"),
    "MultiScaleFlipAug",
}
