"""Which key of another library's checkpoint is which of ours: one table per format.

A row is (their key, our key), both written as they look. The first row that fits a whole key wins; an empty second
column means that the value is not needed. What no row fits is left over, and ``convert`` reports it as an error.

    {k} {i} {n} {b}   a number, the same one on both sides; {n-2}, {i*2}: computed from it
    {p}               the rest of the key
    <...>             may be missing; a number in it then counts as 0
    *                 anything

Ours: ``backbone.body.`` and timm's keys; ``fpn.lateral``, ``fpn.output``; ``rpn.conv``, ``rpn.objectness``,
``rpn.deltas``; ``cascade.box_heads.{k}`` with ``fc1``, ``fc2``, ``classifier`` (background last), ``deltas``;
``cascade.mask_heads.{k}`` with ``convs``, ``upsample``, ``logits``. A batch norm where our network has none
is mapped to ``<convolution>.bn``, and ``values.adapt_values`` folds it into that convolution.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Literal

from torch import Tensor

from cascade_rcnn.errors import CheckpointError

Format = Literal["mmdetection", "detectron2", "torchvision", "detectron", "backbone"]
Table = list[tuple[str, str]]

BODY = "backbone.body."
BOX, MASK = "cascade.box_heads.", "cascade.mask_heads."

# ConvNeXt and Swin in mmdetection: the names of the official detectors, and mmdetection's and mmpretrain's own.
CONVNEXT: Table = [
    ("backbone.downsample_layers.0.{i}.{p}", BODY + "stem_{i}.{p}"),
    ("backbone.downsample_layers.{n}.{i}.{p}", BODY + "stages_{n}.downsample.{i}.{p}"),
    ("backbone.stages.{n}.{b}.gamma", BODY + "stages_{n}.blocks.{b}.gamma"),
    ("backbone.stages.{n}.{b}.norm.{p}", BODY + "stages_{n}.blocks.{b}.norm.{p}"),
    ("backbone.stages.{n}.{b}.dwconv.{p}", BODY + "stages_{n}.blocks.{b}.conv_dw.{p}"),
    ("backbone.stages.{n}.{b}.depthwise_conv.{p}", BODY + "stages_{n}.blocks.{b}.conv_dw.{p}"),
    ("backbone.stages.{n}.{b}.pwconv{i}.{p}", BODY + "stages_{n}.blocks.{b}.mlp.fc{i}.{p}"),
    ("backbone.stages.{n}.{b}.pointwise_conv{i}.{p}", BODY + "stages_{n}.blocks.{b}.mlp.fc{i}.{p}"),
]
SWIN: Table = [
    ("backbone.patch_embed.projection.{p}", BODY + "patch_embed.proj.{p}"),
    ("backbone.layers.*relative_position_index", ""),  # computed
    ("backbone.layers.{n}.downsample.{p}", BODY + "layers_{n+1}.downsample.{p}"),
    ("backbone.layers.{n}.{p}", BODY + "layers_{n}.{p}"),
    ("backbone.stages.*relative_position_index", ""),
    # mmdetection's own: it merges patches in the order of nn.Unfold (see values.adapt_values)
    ("backbone.stages.{n}.downsample.{p}", BODY + "layers_{n+1}.downsample.unfolded.{p}"),
    ("backbone.stages.{n}.blocks.{b}.attn.w_msa.{p}", BODY + "layers_{n}.blocks.{b}.attn.{p}"),
    ("backbone.stages.{n}.blocks.{b}.ffn.layers.0.0.{p}", BODY + "layers_{n}.blocks.{b}.mlp.fc1.{p}"),
    ("backbone.stages.{n}.blocks.{b}.ffn.layers.1.{p}", BODY + "layers_{n}.blocks.{b}.mlp.fc2.{p}"),
    ("backbone.stages.{n}.blocks.{b}.{p}", BODY + "layers_{n}.blocks.{b}.{p}"),
]
# mmdetection 2.x and 3.x. A head without a number is a one-stage detector's.
MMDETECTION: Table = [
    ("data_preprocessor.*", ""),
    ("ema_*", ""),  # mmcv's EMA hook: the plain keys already hold the averages
    ("backbone.stem.7.{p}", BODY + "bn1.{p}"),  # ResNetV1c and V1d: three convolutions
    ("backbone.stem.{i}.{p}", BODY + "conv1.{i}.{p}"),
    ("backbone.gn{i}.{p}", BODY + "bn{i}.{p}"),
    ("backbone.layer{n}.{b}.gn{i}.{p}", BODY + "layer{n}.{b}.bn{i}.{p}"),
    ("backbone.layer{n}.{b}.conv2.conv_offset.{p}", BODY + "layer{n}.{b}.conv2.offset.{p}"),
    ("backbone.layer{n}.{b}.conv2_offset.{p}", BODY + "layer{n}.{b}.conv2.offset.{p}"),  # mmcv before 1.0
    *CONVNEXT,
    *SWIN,
    ("backbone.norm{i}.{p}", "backbone.output_norms.{i}.{p}"),
    ("backbone.timm_model.{p}", BODY + "{p}"),
    ("backbone.{p}", BODY + "{p}"),
    ("neck.lateral_convs.{i}.conv.{p}", "fpn.lateral.{i}.{p}"),
    ("neck.lateral_convs.{i}.gn.{p}", "fpn.lateral_norm.{i}.{p}"),
    ("neck.lateral_convs.{i}.bn.{p}", "fpn.lateral.{i}.bn.{p}"),
    ("neck.fpn_convs.{i}.conv.{p}", "fpn.output.{i}.{p}"),
    ("neck.fpn_convs.{i}.gn.{p}", "fpn.output_norm.{i}.{p}"),
    ("neck.fpn_convs.{i}.bn.{p}", "fpn.output.{i}.bn.{p}"),
    ("rpn_head.rpn_conv.{i}.conv.{p}", "rpn.conv.{i*2}.{p}"),
    ("rpn_head.rpn_conv.{p}", "rpn.conv.{p}"),
    ("rpn_head.rpn_cls.{p}", "rpn.objectness.{p}"),
    ("rpn_head.rpn_reg.{p}", "rpn.deltas.{p}"),
    ("roi_head.bbox_head.<{k}.>shared_convs.{i}.conv.{p}", BOX + "{k}.convs.{i}.0.{p}"),
    ("roi_head.bbox_head.<{k}.>shared_convs.{i}.gn.{p}", BOX + "{k}.convs.{i}.1.{p}"),
    ("roi_head.bbox_head.<{k}.>shared_convs.{i}.bn.{p}", BOX + "{k}.convs.{i}.1.{p}"),
    ("roi_head.bbox_head.<{k}.>shared_fcs.{i}.{p}", BOX + "{k}.fc{i+1}.{p}"),
    ("roi_head.bbox_head.<{k}.>fc_cls.{p}", BOX + "{k}.classifier.{p}"),
    ("roi_head.bbox_head.<{k}.>fc_reg.{p}", BOX + "{k}.deltas.{p}"),
    ("roi_head.mask_head.<{k}.>convs.{i}.conv.{p}", MASK + "{k}.convs.{i}.{p}"),
    ("roi_head.mask_head.<{k}.>convs.{i}.gn.{p}", MASK + "{k}.norms.{i}.{p}"),
    ("roi_head.mask_head.<{k}.>convs.{i}.bn.{p}", MASK + "{k}.convs.{i}.bn.{p}"),
    ("roi_head.mask_head.<{k}.>upsample.{p}", MASK + "{k}.upsample.{p}"),
    ("roi_head.mask_head.<{k}.>conv_logits.{p}", MASK + "{k}.logits.{p}"),
]

# detectron2's ResNet, within a detector (backbone.bottom_up.) or alone (R-50.pkl).
DETECTRON2_BACKBONE: Table = [
    ("<stem.>fc.{p}", ""),
    ("<backbone.><bottom_up.>stem.conv1.norm.{p}", BODY + "bn1.{p}"),
    ("<backbone.><bottom_up.>stem.conv1.{p}", BODY + "conv1.{p}"),
    ("<backbone.><bottom_up.>res{n}.{b}.shortcut.norm.{p}", BODY + "layer{n-1}.{b}.downsample.1.{p}"),
    ("<backbone.><bottom_up.>res{n}.{b}.shortcut.{p}", BODY + "layer{n-1}.{b}.downsample.0.{p}"),
    ("<backbone.><bottom_up.>res{n}.{b}.conv2_offset.{p}", BODY + "layer{n-1}.{b}.conv2.offset.{p}"),
    ("<backbone.><bottom_up.>res{n}.{b}.conv{i}.norm.{p}", BODY + "layer{n-1}.{b}.bn{i}.{p}"),
    ("<backbone.><bottom_up.>res{n}.{b}.conv{i}.{p}", BODY + "layer{n-1}.{b}.conv{i}.{p}"),
]
# detectron2's RegNet: proj and bn on the shortcut; f.a, f.b, f.c and their norms the three convolutions, f.se between.
DETECTRON2_REGNET: Table = [
    ("backbone.bottom_up.stem.bn.{p}", BODY + "stem.bn.{p}"),
    ("backbone.bottom_up.stem.conv.{p}", BODY + "stem.conv.{p}"),
    ("backbone.bottom_up.s{n}.b{b}.proj.{p}", BODY + "s{n}.b{b}.downsample.conv.{p}"),
    ("backbone.bottom_up.s{n}.b{b}.bn.{p}", BODY + "s{n}.b{b}.downsample.bn.{p}"),
    *[
        (f"backbone.bottom_up.s{{n}}.b{{b}}.f.{theirs}.{{p}}", f"{BODY}s{{n}}.b{{b}}.{ours}.{{p}}")
        for k, letter in enumerate("abc", start=1)
        for theirs, ours in ((letter, f"conv{k}.conv"), (f"{letter}_bn", f"conv{k}.bn"))
    ],
    ("backbone.bottom_up.s{n}.b{b}.f.se.f_ex.0.{p}", BODY + "s{n}.b{b}.se.fc1.{p}"),
    ("backbone.bottom_up.s{n}.b{b}.f.se.f_ex.2.{p}", BODY + "s{n}.b{b}.se.fc2.{p}"),
]
# A norm with statistics, outside the backbone, is called ".bn." here (see rename): one without is a group norm.
DETECTRON2: Table = [
    ("pixel_mean", ""),
    ("pixel_std", ""),
    ("*anchor_generator.*", ""),
    *DETECTRON2_BACKBONE,
    *DETECTRON2_REGNET,
    ("backbone.fpn_lateral{n}.norm.{p}", "fpn.lateral_norm.{n-2}.{p}"),
    ("backbone.fpn_lateral{n}.{p}", "fpn.lateral.{n-2}.{p}"),  # weight, bias, bn.weight, ...
    ("backbone.fpn_output{n}.norm.{p}", "fpn.output_norm.{n-2}.{p}"),
    ("backbone.fpn_output{n}.{p}", "fpn.output.{n-2}.{p}"),
    ("proposal_generator.rpn_head.conv.conv{i}.{p}", "rpn.conv.{i*2}.{p}"),
    ("proposal_generator.rpn_head.conv.{p}", "rpn.conv.{p}"),
    ("proposal_generator.rpn_head.objectness_logits.{p}", "rpn.objectness.{p}"),
    ("proposal_generator.rpn_head.anchor_deltas.{p}", "rpn.deltas.{p}"),
    ("roi_heads.box_head.<{k}.>conv{i}.norm.{p}", BOX + "{k}.convs.{i-1}.1.{p}"),
    ("roi_heads.box_head.<{k}.>conv{i}.{p}", BOX + "{k}.convs.{i-1}.0.{p}"),
    ("roi_heads.box_head.<{k}.>fc{i}.{p}", BOX + "{k}.fc{i}.{p}"),
    ("roi_heads.box_predictor.<{k}.>cls_score.{p}", BOX + "{k}.classifier.{p}"),
    ("roi_heads.box_predictor.<{k}.>bbox_pred.{p}", BOX + "{k}.deltas.{p}"),
    ("roi_heads.mask_head.mask_fcn{i}.norm.{p}", MASK + "0.norms.{i-1}.{p}"),
    ("roi_heads.mask_head.mask_fcn{i}.{p}", MASK + "0.convs.{i-1}.{p}"),
    ("roi_heads.mask_head.deconv.{p}", MASK + "0.upsample.{p}"),
    ("roi_heads.mask_head.predictor.{p}", MASK + "0.logits.{p}"),
]

# torchvision, with the names of 0.13 and later (a ".0." more) and those before. Its v2 detectors have a batch norm
# (".1.") behind each convolution of FPN, box head and mask head, two convolutions in the RPN and four in the box head.
TORCHVISION: Table = [
    ("backbone.body.{p}", BODY + "{p}"),
    ("backbone.fpn.inner_blocks.{i}.1.{p}", "fpn.lateral.{i}.bn.{p}"),
    ("backbone.fpn.inner_blocks.{i}.<0.>{p}", "fpn.lateral.{i}.{p}"),
    ("backbone.fpn.layer_blocks.{i}.1.{p}", "fpn.output.{i}.bn.{p}"),
    ("backbone.fpn.layer_blocks.{i}.<0.>{p}", "fpn.output.{i}.{p}"),
    ("rpn.head.conv.{i}.0.{p}", "rpn.conv.{i*2}.{p}"),
    ("rpn.head.conv.{p}", "rpn.conv.{p}"),
    ("rpn.head.cls_logits.{p}", "rpn.objectness.{p}"),
    ("rpn.head.bbox_pred.{p}", "rpn.deltas.{p}"),
    ("roi_heads.box_head.fc6.{p}", BOX + "0.fc1.{p}"),
    ("roi_heads.box_head.fc7.{p}", BOX + "0.fc2.{p}"),
    ("roi_heads.box_head.5.{p}", BOX + "0.fc1.{p}"),
    ("roi_heads.box_head.{i}.0.{p}", BOX + "0.convs.{i}.0.{p}"),
    ("roi_heads.box_head.{i}.1.{p}", BOX + "0.convs.{i}.0.bn.{p}"),
    ("roi_heads.box_predictor.cls_score.{p}", BOX + "0.classifier.{p}"),
    ("roi_heads.box_predictor.bbox_pred.{p}", BOX + "0.deltas.{p}"),
    ("roi_heads.mask_head.mask_fcn{i}.{p}", MASK + "0.convs.{i-1}.{p}"),
    ("roi_heads.mask_head.{i}.0.{p}", MASK + "0.convs.{i}.{p}"),
    ("roi_heads.mask_head.{i}.1.{p}", MASK + "0.convs.{i}.bn.{p}"),
    ("roi_heads.mask_predictor.conv5_mask.{p}", MASK + "0.upsample.{p}"),
    ("roi_heads.mask_predictor.mask_fcn_logits.{p}", MASK + "0.logits.{p}"),
]

# Detectron's Caffe2 blobs, after _w, _b, _s became .weight, .bias, .weight (see rename). A block's three convolutions
# are branch2a, b, c. A cascade's stages 2 and 3 are fc6_2, fc6_3 in the authors' last release, fc6_2nd, fc6_3rd before.
_BRANCHES = ((1, "2a"), (2, "2b"), (3, "2c"))
DETECTRON_BACKBONE: Table = [
    ("fc1000.{p}", ""),
    ("pred.{p}", ""),
    ("conv1.{p}", BODY + "conv1.{p}"),
    ("res_conv1_bn.{p}", BODY + "bn1.{p}"),
    ("conv1_gn.{p}", BODY + "bn1.{p}"),
    ("res{n}_{b}_branch1.{p}", BODY + "layer{n-1}.{b}.downsample.0.{p}"),
    ("res{n}_{b}_branch1_bn.{p}", BODY + "layer{n-1}.{b}.downsample.1.{p}"),
    ("res{n}_{b}_branch1_gn.{p}", BODY + "layer{n-1}.{b}.downsample.1.{p}"),
    *[("res{n}_{b}_branch" + branch + ".{p}", BODY + f"layer{{n-1}}.{{b}}.conv{i}.{{p}}") for i, branch in _BRANCHES],
    *[("res{n}_{b}_branch" + branch + "_bn.{p}", BODY + f"layer{{n-1}}.{{b}}.bn{i}.{{p}}") for i, branch in _BRANCHES],
    *[("res{n}_{b}_branch" + branch + "_gn.{p}", BODY + f"layer{{n-1}}.{{b}}.bn{i}.{{p}}") for i, branch in _BRANCHES],
]
DETECTRON: Table = [
    ("*_momentum", ""),
    ("lr", ""),
    ("weight_order", ""),
    *DETECTRON_BACKBONE,
    ("fpn_inner_res{n}_{b}_sum<_lateral>.{p}", "fpn.lateral.{n-2}.{p}"),
    ("fpn_inner_res{n}_{b}_sum<_lateral>_gn.{p}", "fpn.lateral_norm.{n-2}.{p}"),
    ("fpn_res{n}_{b}_sum.{p}", "fpn.output.{n-2}.{p}"),
    ("fpn_res{n}_{b}_sum_gn.{p}", "fpn.output_norm.{n-2}.{p}"),
    ("conv_rpn_fpn2.{p}", "rpn.conv.{p}"),
    ("rpn_cls_logits_fpn2.{p}", "rpn.objectness.{p}"),
    ("rpn_bbox_pred_fpn2.{p}", "rpn.deltas.{p}"),
    *[
        (theirs.replace("STAGE", stage), f"{BOX}{k}.{ours}")
        for k, stage in enumerate(("<_1st>", "_2<nd>", "_3<rd>"))
        for theirs, ours in (
            ("fc6STAGE.{p}", "fc1.{p}"),
            ("fc7STAGE.{p}", "fc2.{p}"),
            ("cls_scoreSTAGE.{p}", "classifier.{p}"),
            ("bbox_predSTAGE.{p}", "deltas.{p}"),
            ("head_conv{i}STAGE.{p}", "convs.{i-1}.0.{p}"),
            ("head_conv{i}STAGE_gn.{p}", "convs.{i-1}.1.{p}"),
        )
    ],
    ("_[mask]_fcn{i}.{p}", MASK + "0.convs.{i-1}.{p}"),
    ("conv5_mask.{p}", MASK + "0.upsample.{p}"),
    ("mask_fcn_logits.{p}", MASK + "0.logits.{p}"),
]

# Backbones alone: timm's and torchvision's names are ours, mmcls and mmpretrain put "backbone." before them. ConvNeXt
# and Swin come with the official names or mmpretrain's; the norm behind their last map is the classifier's.
BACKBONE: Table = [
    ("<backbone.>norm<{i}>.{p}", ""),
    ("<backbone.>layers.*attn_mask", ""),  # computed
    *[(f"<backbone.>{theirs.removeprefix('backbone.')}", ours) for theirs, ours in (*CONVNEXT, *SWIN)],
    ("<backbone.>patch_embed.{p}", BODY + "patch_embed.{p}"),
    ("fc.*", ""),
    ("head.*", ""),
    ("classifier.*", ""),
    ("neck.*", ""),
    ("<backbone.>conv1.{p}", BODY + "conv1.{p}"),
    ("<backbone.>bn1.{p}", BODY + "bn1.{p}"),
    ("<backbone.>layer{n}.{p}", BODY + "layer{n}.{p}"),
    ("<backbone.>features.{p}", BODY + "features.{p}"),
    *DETECTRON2_BACKBONE,
    *DETECTRON_BACKBONE,
]
TABLES: dict[Format, Table] = {
    "mmdetection": MMDETECTION,
    "detectron2": DETECTRON2,
    "torchvision": TORCHVISION,
    "detectron": DETECTRON,
    "backbone": BACKBONE,
}

# The first key that is found names the format; the second column is the format, or why it cannot be read.
SIGNS: list[tuple[str, Format | str]] = [
    ("roi_head.bbox_head.{p}", "mmdetection"),
    (
        "bbox_head.<{k}.>fc_cls.weight",
        "written by mmdetection 1.x, whose boxes and labels count differently: "
        "pass it through tools/model_converters/upgrade_model_version.py of mmdetection 2.x first",
    ),
    ("rpn.head.cls_logits.weight", "torchvision"),
    ("proposal_generator.rpn_head.conv.<conv0.>weight", "detectron2"),
    ("conv_rpn_fpn2_w", "detectron"),
    ("<backbone.>layer1.0.conv1.weight", "backbone"),
    ("<backbone.>downsample_layers.0.0.weight", "backbone"),
    ("<backbone.>layers.0.blocks.0.attn.relative_position_bias_table", "backbone"),
    ("<backbone.>stages.0.blocks.0.attn.w_msa.relative_position_bias_table", "backbone"),
    ("<backbone.><bottom_up.>res2.0.conv1.weight", "backbone"),
    ("res2_0_branch2a_w", "backbone"),
    ("features.0.weight", "backbone"),
]


@cache
def pattern(theirs: str) -> re.Pattern[str]:
    """The regular expression of a table's left column."""
    words = {"{p}": r"(?P<p>.+)", "<": "(?:", ">": ")?", "*": ".*"}
    parts = re.split(r"(\{\w\}|[<>*])", theirs)
    return re.compile(
        "".join(words.get(part) or re.sub(r"^\\\{(\w)\\\}$", r"(?P<\1>\\d+)", re.escape(part)) for part in parts)
    )


def _our_key(ours: str, match: re.Match[str]) -> str:
    def fill(field: re.Match[str]) -> str:
        name, operation, operand = field.groups()
        value = match[name] or "0"
        if operation is None:
            return value
        return str({"+": int.__add__, "-": int.__sub__, "*": int.__mul__}[operation](int(value), int(operand)))

    return re.sub(r"\{(\w)(?:([-+*])(\d))?\}", fill, ours)


def recognise(keys: Iterable[str]) -> Format:
    """Whose checkpoint it is, by its keys. Raises CheckpointError (without the file's name) for none of those known."""
    names = list(keys)
    for sign, answer in SIGNS:
        if any(pattern(sign).fullmatch(name) for name in names):
            if answer in TABLES:
                return answer
            raise CheckpointError(answer)
    raise CheckpointError(
        f"none of the formats known (its {len(names)} keys begin with "
        f"{', '.join(names[:3]) or 'nothing'}); "
        "Faster, Mask and Cascade R-CNN with an FPN and a ResNet, ResNeXt, RegNet, ConvNeXt or Swin can be converted"
    )


def rename(state: Mapping[str, Tensor], source: Format) -> tuple[dict[str, Tensor], list[str]]:
    """Our keys and their values, as they are, and the keys that no row of the format's table knows."""
    rows = [(pattern(theirs), ours) for theirs, ours in TABLES[source]]
    is_regnet = any(key.endswith("backbone.conv1.weight") and value.shape[-1:] == (3,) for key, value in state.items())
    renamed: dict[str, Tensor] = {}
    left_over: list[str] = []
    for key, value in state.items():
        name = key
        if source in ("detectron", "backbone"):
            name = re.sub(r"_(w|b|s)$", lambda end: ".bias" if end[1] == "b" else ".weight", name)
        if source == "detectron2" and _has_statistics(key, state) and "bottom_up" not in key:
            name = name.replace(".norm.", ".bn.")
        for theirs, ours in rows:
            match = theirs.fullmatch(name)
            if match is not None:
                if ours:
                    found = _our_key(ours, match)
                    renamed[_regnet_key(found) if is_regnet else found] = value
                break
        else:
            left_over.append(key)
    return renamed, left_over


def _regnet_key(key: str) -> str:
    """timm's name of a RegNet's weight, whose layers mmdetection calls as a ResNet's. Its stem is 3x3, not 7x7."""
    key = re.sub(
        r"^backbone\.body\.(conv1|bn1)\.", lambda m: BODY + {"conv1": "stem.conv.", "bn1": "stem.bn."}[m[1]], key
    )
    found = re.fullmatch(r"backbone\.body\.layer(\d)\.(\d+)\.(conv|bn|downsample\.)(\d)\.(.+)", key)
    if found is None:
        return key
    stage, block, kind, number, rest = found.groups()
    inner = {"conv": f"conv{number}.conv", "bn": f"conv{number}.bn"}.get(kind)
    inner = inner or ("downsample.conv" if number == "0" else "downsample.bn")
    return f"{BODY}s{stage}.b{int(block) + 1}.{inner}.{rest}"


def _has_statistics(key: str, state: Mapping[str, Tensor]) -> bool:
    """Whether ``key`` belongs to a batch norm: it has running statistics, a group norm has none."""
    return f"{key.rpartition('.')[0]}.running_var" in state
