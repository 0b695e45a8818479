"""Parts of other libraries' networks that have no counterpart here, by the keys that give them away."""

from __future__ import annotations

import re
from collections.abc import Iterable

# (regular expression, searched for in a key; what it is). The first row that fits names the reason.
_PARTS: list[tuple[str, str]] = [
    (r"^neck\.rfp_|\.rfp_conv\.", "a recursive FPN (DetectoRS)"),
    (r"\.switch\.|\.weight_diff$|\.weight_gamma$|\.pre_context\.", "switchable atrous convolutions (DetectoRS)"),
    (r"conv[13](\.conv)?_offset|^(?!backbone).*conv_offset", "deformable convolutions outside a ResNet's 3x3"),
    (r"\.context_block\.|\.conv_mask\.|channel_add_conv", "global context blocks (GCNet)"),
    (r"gen_attention_block|\.non_?local", "attention blocks between convolutions"),
    (r"^roi_head\.mask_head\.(\d\.)?conv_res\.", "interleaved masks (HTC)"),
    (r"^roi_head\.semantic_(head|roi)|^roi_head\.(glbctx|feat_relay)_head", "a semantic branch (HTC, SCNet)"),
    (r"^rpn_head\.stages\.", "a Cascade RPN"),
    (r"^rpn_head\.(conv_loc|conv_shape|feature_adaption)", "guided anchoring"),
    (r"^neck\.(downsample_convs|pafpn_convs)\.", "another neck than an FPN (PAFPN)"),
    (r"^neck\.upsample_modules\.", "another neck than an FPN (CARAFE)"),
    (r"^neck\.reduction_conv\.", "another neck than an FPN (HRFPN)"),
    (r"^neck\.\d+\.", "another neck than an FPN (a chain, such as the balanced pyramid of Libra R-CNN)"),
    (r"^neck\.(?!lateral_convs|fpn_convs)|^backbone\.(bifpn|repeated_bifpn|stack_)", "another neck than an FPN"),
    (r"^roi_head\.bbox_head\.(\d\.)?(conv_branch|fc_branch)\.", "a double head"),
    (
        r"^roi_head\.bbox_head\.(\d\.)?(reg_(cls|offset)_fcs|fc_reg_(cls|offset)|reg_pre)",
        "side-aware boundaries (SABL)",
    ),
    (r"^roi_head\.bbox_head\.(\d\.)?(cls|reg)_(convs|fcs)\.", "separate layers for class and box in the box head"),
    (
        r"^roi_head\.bbox_head\.(\d\.)?loss_cls\.cum_samples",
        "the seesaw loss (outputs for objectness beside the classes)",
    ),
    (r"^(roi_head\.|roi_heads\.)(mask_)?point_head|\.(point|coarse)_head\.", "point-wise masks (PointRend)"),
    (r"^sem_seg_head\.|^semantic_head\.|^panoptic_", "a semantic branch (Panoptic FPN)"),
    (r"^head\.(cls|bbox)_|^bbox_head\.((cls|reg)_convs|retina_|fcos_|atss_|conv_cls)", "a one-stage detector"),
    (r"^proposal_generator\.(fcos|centernet)", "another proposal network than an RPN"),
    (r"\.freq_weight$|\.zs_weight$", "classifiers with sigmoids (federated loss, open vocabulary)"),
    (r"^backbone\.bottom_up\.stem\.conv1_\d", "a stem of three convolutions (detectron2's DeepLab ResNet)"),
    (r"^roi_head\.grid_head\.", "a grid head (Grid R-CNN)"),
    (r"mask_?iou_head", "scored masks (Mask Scoring R-CNN)"),
    (r"keypoint", "keypoints"),
    (r"^roi_head\.shared_head\.|^roi_heads\.res5\.", "a C4 head without FPN"),
    (
        r"bottom_up\.(net\.)?(patch_embed|layers|blocks)\.|^backbone\.(pos_embed|blocks\.|absolute_pos_embed)",
        "a transformer other than Swin as backbone",
    ),
    (r"^backbone\.stages\.\d\.\d+\.grn\.", "a ConvNeXt V2 as backbone"),
    (r"^backbone\.(stage\d|transition\d)\.", "an HRNet as backbone"),
    (r"layer\d\.\d+\.convs\.\d", "a Res2Net as backbone"),
    (r"layer\d\.\d+\.(conv2\.(fc\d|bn\d|conv)|se)\b", "split attention or squeeze and excitation (ResNeSt, SENet)"),
    (r"^backbone\.(cspdark|dark|stage\d|conv_res_block)", "a Darknet as backbone"),
]


def missing_counterpart(keys: Iterable[str]) -> str:
    """What in these keys cannot be converted whatever the settings, as ``what (a key of it)``; "" if nothing."""
    names = [key for key in keys if not key.startswith("ema_")]
    for expression, what in _PARTS:
        search = re.compile(expression).search
        found = next((name for name in names if search(name)), None)
        if found is not None:
            return f"{what} ({found[:80]})"
    return ""
