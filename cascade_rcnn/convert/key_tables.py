"""Which key of another library's checkpoint is which of ours: one table per format, and what the values need besides.

A table is a list of (pattern, our key). The first pattern that matches a whole key wins; an empty second column means
that the value is not needed. What no pattern matches is left over, and ``convert`` reports it as an error.

    backbone.body.<timm's keys>   fpn.lateral.{0..3}   fpn.output.{0..3}   rpn.conv   rpn.objectness   rpn.deltas
    cascade.box_heads.{k}.fc1 .fc2 .classifier (background last) .deltas
    cascade.mask_heads.{k}.convs .upsample .logits

A batch norm behind a convolution of FPN or heads, where our network has none, is mapped to ``<convolution>.bn`` and
folded into that convolution by :func:`adapt_values`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from cascade_rcnn.errors import CheckpointError

Format = Literal["mmdetection", "detectron2", "torchvision", "detectron", "backbone"]
Table = list[tuple[str, str]]

_BODY = r"backbone.body."
_BOX, _MASK = r"cascade.box_heads.", r"cascade.mask_heads."
_BN_EPS = 1e-5
_TORCHVISION_OUTPUTS = 91  # background, and COCO's ids 1 to 90

# mmdetection 2.x and 3.x. A head without a number is a one-stage detector's.
MMDETECTION: Table = [
    (r"data_preprocessor\..*|ema_.*", ""),  # mmcv's EMA hook: the plain keys already hold the averages
    (r"backbone\.(.*)\bgn(\d)\.(.*)", _BODY + r"\1bn\2.\3"),
    (r"backbone\.(.*)", _BODY + r"\1"),
    (r"neck\.lateral_convs\.(\d)\.conv\.(.*)", r"fpn.lateral.\1.\2"),
    (r"neck\.lateral_convs\.(\d)\.gn\.(.*)", r"fpn.lateral_norm.\1.\2"),
    (r"neck\.lateral_convs\.(\d)\.bn\.(.*)", r"fpn.lateral.\1.bn.\2"),
    (r"neck\.fpn_convs\.(\d)\.conv\.(.*)", r"fpn.output.\1.\2"),
    (r"neck\.fpn_convs\.(\d)\.gn\.(.*)", r"fpn.output_norm.\1.\2"),
    (r"neck\.fpn_convs\.(\d)\.bn\.(.*)", r"fpn.output.\1.bn.\2"),
    *[(rf"rpn_head\.rpn_conv\.{i}\.conv\.(.*)", rf"rpn.conv.{2 * i}.\1") for i in range(4)],
    (r"rpn_head\.rpn_conv\.(.*)", r"rpn.conv.\1"),
    (r"rpn_head\.rpn_cls\.(.*)", r"rpn.objectness.\1"),
    (r"rpn_head\.rpn_reg\.(.*)", r"rpn.deltas.\1"),
    *[
        row
        for name, k in ((r"roi_head\.bbox_head\.", "0"), (r"roi_head\.bbox_head\.(?P<k>\d)\.", r"\g<k>"))
        for row in (
            (name + r"shared_convs\.(?P<i>\d)\.conv\.(?P<p>.*)", rf"{_BOX}{k}.convs.\g<i>.0.\g<p>"),
            (name + r"shared_convs\.(?P<i>\d)\.gn\.(?P<p>.*)", rf"{_BOX}{k}.convs.\g<i>.1.\g<p>"),
            (name + r"shared_convs\.(?P<i>\d)\.bn\.(?P<p>.*)", rf"{_BOX}{k}.convs.\g<i>.0.bn.\g<p>"),
            (name + r"shared_fcs\.0\.(?P<p>.*)", rf"{_BOX}{k}.fc1.\g<p>"),
            (name + r"shared_fcs\.1\.(?P<p>.*)", rf"{_BOX}{k}.fc2.\g<p>"),
            (name + r"fc_cls\.(?P<p>.*)", rf"{_BOX}{k}.classifier.\g<p>"),
            (name + r"fc_reg\.(?P<p>.*)", rf"{_BOX}{k}.deltas.\g<p>"),
        )
    ],
    *[
        row
        for name, k in ((r"roi_head\.mask_head\.", "0"), (r"roi_head\.mask_head\.(?P<k>\d)\.", r"\g<k>"))
        for row in (
            (name + r"convs\.(?P<i>\d)\.conv\.(?P<p>.*)", rf"{_MASK}{k}.convs.\g<i>.\g<p>"),
            (name + r"convs\.(?P<i>\d)\.gn\.(?P<p>.*)", rf"{_MASK}{k}.norms.\g<i>.\g<p>"),
            (name + r"convs\.(?P<i>\d)\.bn\.(?P<p>.*)", rf"{_MASK}{k}.convs.\g<i>.bn.\g<p>"),
            (name + r"upsample\.(?P<p>.*)", rf"{_MASK}{k}.upsample.\g<p>"),
            (name + r"conv_logits\.(?P<p>.*)", rf"{_MASK}{k}.logits.\g<p>"),
        )
    ],
]

# detectron2's ResNet, within a detector (backbone.bottom_up.) or alone (R-50.pkl).
_D2 = r"(?:backbone\.)?(?:bottom_up\.)?"
DETECTRON2_BACKBONE: Table = [
    (_D2 + r"stem\.conv1\.norm\.(.*)", _BODY + r"bn1.\1"),
    (_D2 + r"stem\.conv1\.(.*)", _BODY + r"conv1.\1"),
    (r"(?:stem\.)?fc\.(?:.*)", ""),
    *[
        row
        for n in (2, 3, 4, 5)
        for row in (
            (_D2 + rf"res{n}\.(\d+)\.shortcut\.norm\.(.*)", rf"{_BODY}layer{n - 1}.\1.downsample.1.\2"),
            (_D2 + rf"res{n}\.(\d+)\.shortcut\.(.*)", rf"{_BODY}layer{n - 1}.\1.downsample.0.\2"),
            (_D2 + rf"res{n}\.(\d+)\.conv(\d)\.norm\.(.*)", rf"{_BODY}layer{n - 1}.\1.bn\2.\3"),
            (_D2 + rf"res{n}\.(\d+)\.conv(\d)\.(.*)", rf"{_BODY}layer{n - 1}.\1.conv\2.\3"),
        )
    ],
]
DETECTRON2: Table = [
    (r"pixel_mean|pixel_std|.*anchor_generator\..*", ""),
    *DETECTRON2_BACKBONE,
    *[
        row
        for n in (2, 3, 4, 5)
        for row in (
            (rf"backbone\.fpn_lateral{n}\.norm\.(.*)", rf"fpn.lateral_norm.{n - 2}.\1"),
            (rf"backbone\.fpn_lateral{n}\.(.*)", rf"fpn.lateral.{n - 2}.\1"),
            (rf"backbone\.fpn_output{n}\.norm\.(.*)", rf"fpn.output_norm.{n - 2}.\1"),
            (rf"backbone\.fpn_output{n}\.(.*)", rf"fpn.output.{n - 2}.\1"),
        )
    ],
    *[(rf"proposal_generator\.rpn_head\.conv\.conv{i}\.(.*)", rf"rpn.conv.{2 * i}.\1") for i in range(4)],
    (r"proposal_generator\.rpn_head\.conv\.(.*)", r"rpn.conv.\1"),
    (r"proposal_generator\.rpn_head\.objectness_logits\.(.*)", r"rpn.objectness.\1"),
    (r"proposal_generator\.rpn_head\.anchor_deltas\.(.*)", r"rpn.deltas.\1"),
    *[
        row
        for dot, k in ((r"\.", "0"), (r"\.(?P<k>\d)\.", r"\g<k>"))
        for row in (
            *[
                (rf"roi_heads\.box_head{dot}conv{i}\.{norm}(?P<p>.*)", rf"{_BOX}{k}.convs.{i - 1}.{part}.\g<p>")
                for i in range(1, 5)
                for norm, part in ((r"norm\.", 1), ("", 0))
            ],
            (rf"roi_heads\.box_head{dot}fc(?P<i>[12])\.(?P<p>.*)", rf"{_BOX}{k}.fc\g<i>.\g<p>"),
            (rf"roi_heads\.box_predictor{dot}cls_score\.(?P<p>.*)", rf"{_BOX}{k}.classifier.\g<p>"),
            (rf"roi_heads\.box_predictor{dot}bbox_pred\.(?P<p>.*)", rf"{_BOX}{k}.deltas.\g<p>"),
        )
    ],
    *[
        row
        for i in range(1, 5)
        for row in (
            (rf"roi_heads\.mask_head\.mask_fcn{i}\.norm\.(.*)", rf"{_MASK}0.norms.{i - 1}.\1"),
            (rf"roi_heads\.mask_head\.mask_fcn{i}\.(.*)", rf"{_MASK}0.convs.{i - 1}.\1"),
        )
    ],
    (r"roi_heads\.mask_head\.deconv\.(.*)", rf"{_MASK}0.upsample.\1"),
    (r"roi_heads\.mask_head\.predictor\.(.*)", rf"{_MASK}0.logits.\1"),
]

# torchvision, with the names of 0.13 and later (a ".0." more) and those before. Its v2 detectors have a batch norm
# (".1.") behind each convolution of FPN, box head and mask head, two convolutions in the RPN and four in the box head.
TORCHVISION: Table = [
    (r"backbone\.body\.(.*)", _BODY + r"\1"),
    (r"backbone\.fpn\.inner_blocks\.(\d)\.(?:0\.)?(weight|bias)", r"fpn.lateral.\1.\2"),
    (r"backbone\.fpn\.inner_blocks\.(\d)\.1\.(.*)", r"fpn.lateral.\1.bn.\2"),
    (r"backbone\.fpn\.layer_blocks\.(\d)\.(?:0\.)?(weight|bias)", r"fpn.output.\1.\2"),
    (r"backbone\.fpn\.layer_blocks\.(\d)\.1\.(.*)", r"fpn.output.\1.bn.\2"),
    (r"rpn\.head\.conv\.(weight|bias)", r"rpn.conv.\1"),
    *[(rf"rpn\.head\.conv\.{i}\.0\.(weight|bias)", rf"rpn.conv.{2 * i}.\1") for i in range(4)],
    (r"rpn\.head\.cls_logits\.(.*)", r"rpn.objectness.\1"),
    (r"rpn\.head\.bbox_pred\.(.*)", r"rpn.deltas.\1"),
    (r"roi_heads\.box_head\.fc6\.(.*)", rf"{_BOX}0.fc1.\1"),
    (r"roi_heads\.box_head\.fc7\.(.*)", rf"{_BOX}0.fc2.\1"),
    (r"roi_heads\.box_head\.([0-3])\.0\.(weight|bias)", rf"{_BOX}0.convs.\1.0.\2"),
    (r"roi_heads\.box_head\.([0-3])\.1\.(.*)", rf"{_BOX}0.convs.\1.0.bn.\2"),
    (r"roi_heads\.box_head\.5\.(.*)", rf"{_BOX}0.fc1.\1"),
    (r"roi_heads\.box_predictor\.cls_score\.(.*)", rf"{_BOX}0.classifier.\1"),
    (r"roi_heads\.box_predictor\.bbox_pred\.(.*)", rf"{_BOX}0.deltas.\1"),
    *[(rf"roi_heads\.mask_head\.(?:mask_fcn{i}|{i - 1}\.0)\.(.*)", rf"{_MASK}0.convs.{i - 1}.\1") for i in range(1, 5)],
    (r"roi_heads\.mask_head\.([0-3])\.1\.(.*)", rf"{_MASK}0.convs.\1.bn.\2"),
    (r"roi_heads\.mask_predictor\.conv5_mask\.(.*)", rf"{_MASK}0.upsample.\1"),
    (r"roi_heads\.mask_predictor\.mask_fcn_logits\.(.*)", rf"{_MASK}0.logits.\1"),
]

# Detectron's Caffe2 blobs, after _w, _b, _s became .weight, .bias, .weight. The cascade's stages 2 and 3 are fc6_2,
# fc6_3 in the authors' last release, fc6_2nd, fc6_3rd in earlier ones.
_STAGE = {"0": r"(?:_1st)?", "1": r"_2(?:nd)?", "2": r"_3(?:rd)?"}
DETECTRON_BACKBONE: Table = [
    (r"conv1\.(.*)", _BODY + r"conv1.\1"),
    (r"(?:res_conv1_bn|conv1_gn)\.(.*)", _BODY + r"bn1.\1"),
    (r"(?:fc1000|pred)\.(?:.*)", ""),
    *[
        row
        for n in (2, 3, 4, 5)
        for row in (
            (rf"res{n}_(\d+)_branch1\.(.*)", rf"{_BODY}layer{n - 1}.\1.downsample.0.\2"),
            (rf"res{n}_(\d+)_branch1_[bg]n\.(.*)", rf"{_BODY}layer{n - 1}.\1.downsample.1.\2"),
            *[
                (rf"res{n}_(\d+)_branch2{letter}\.(.*)", rf"{_BODY}layer{n - 1}.\1.conv{i}.\2")
                for i, letter in ((1, "a"), (2, "b"), (3, "c"))
            ],
            *[
                (rf"res{n}_(\d+)_branch2{letter}_[bg]n\.(.*)", rf"{_BODY}layer{n - 1}.\1.bn{i}.\2")
                for i, letter in ((1, "a"), (2, "b"), (3, "c"))
            ],
        )
    ],
]
DETECTRON: Table = [
    (r".*_momentum|lr|weight_order", ""),
    *DETECTRON_BACKBONE,
    *[
        row
        for n in (2, 3, 4, 5)
        for row in (
            (rf"fpn_inner_res{n}_\d+_sum(?:_lateral)?\.(.*)", rf"fpn.lateral.{n - 2}.\1"),
            (rf"fpn_inner_res{n}_\d+_sum(?:_lateral)?_gn\.(.*)", rf"fpn.lateral_norm.{n - 2}.\1"),
            (rf"fpn_res{n}_\d+_sum\.(.*)", rf"fpn.output.{n - 2}.\1"),
            (rf"fpn_res{n}_\d+_sum_gn\.(.*)", rf"fpn.output_norm.{n - 2}.\1"),
        )
    ],
    (r"conv_rpn_fpn2\.(.*)", r"rpn.conv.\1"),
    (r"rpn_cls_logits_fpn2\.(.*)", r"rpn.objectness.\1"),
    (r"rpn_bbox_pred_fpn2\.(.*)", r"rpn.deltas.\1"),
    *[
        row
        for k, stage in _STAGE.items()
        for row in (
            (rf"fc6{stage}\.(.*)", rf"{_BOX}{k}.fc1.\1"),
            (rf"fc7{stage}\.(.*)", rf"{_BOX}{k}.fc2.\1"),
            (rf"cls_score{stage}\.(.*)", rf"{_BOX}{k}.classifier.\1"),
            (rf"bbox_pred{stage}\.(.*)", rf"{_BOX}{k}.deltas.\1"),
            *[
                (rf"head_conv{i}{stage}{norm}\.(.*)", rf"{_BOX}{k}.convs.{i - 1}.{part}.\1")
                for i in range(1, 5)
                for norm, part in (("", 0), ("_gn", 1))
            ],
        )
    ],
    *[(rf"_\[mask\]_fcn{i}\.(.*)", rf"{_MASK}0.convs.{i - 1}.\1") for i in range(1, 5)],
    (r"conv5_mask\.(.*)", rf"{_MASK}0.upsample.\1"),
    (r"mask_fcn_logits\.(.*)", rf"{_MASK}0.logits.\1"),
]

# Backbones alone: timm's and torchvision's names are ours; mmcls and mmpretrain put "backbone." before them.
BACKBONE: Table = [
    (r"(?:fc|head|classifier|neck)\..*", ""),
    (r"(?:backbone\.)?((?:conv1|bn1|layer[1-4]|features)\..*)", _BODY + r"\1"),
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
_SIGNS: list[tuple[str, Format | str]] = [
    (r"roi_head\.bbox_head\..*", "mmdetection"),
    (
        r"bbox_head\.(?:\d\.)?fc_cls\.weight",
        "written by mmdetection 1.x, whose boxes and labels count differently: "
        "pass it through tools/model_converters/upgrade_model_version.py of mmdetection 2.x first",
    ),
    (r"rpn\.head\.cls_logits\.weight", "torchvision"),
    (r"proposal_generator\.rpn_head\.conv\.(?:conv0\.)?weight", "detectron2"),
    (r"conv_rpn_fpn2_w", "detectron"),
    (
        r"(?:backbone\.)?layer1\.0\.conv1\.weight|(?:backbone\.(?:bottom_up\.)?)?res2\.0\.conv1\.weight|res2_0_branch2a_w"
        r"|features\.0\.weight",
        "backbone",
    ),
]
_BACKGROUND_FIRST = ("torchvision", "detectron")


def recognise(keys: Iterable[str]) -> Format:
    """Whose checkpoint it is, by its keys. Raises CheckpointError (without the file's name) for none of those known."""
    names = list(keys)
    for pattern, answer in _SIGNS:
        if any(re.fullmatch(pattern, name) for name in names):
            if answer in TABLES:
                return answer
            raise CheckpointError(answer)
    raise CheckpointError(
        f"none of the formats known (its {len(names)} keys begin with "
        f"{', '.join(names[:3]) or 'nothing'}); "
        "Faster, Mask and Cascade R-CNN with an FPN and a ResNet or ResNeXt can be converted"
    )


def rename(state: Mapping[str, Tensor], source: Format) -> tuple[dict[str, Tensor], list[str]]:
    """Our keys and their values, as they are, and the keys that no row of the format's table knows."""
    rules = [(re.compile(pattern), ours) for pattern, ours in TABLES[source]]
    renamed: dict[str, Tensor] = {}
    left_over: list[str] = []
    for key, value in state.items():
        name = key
        if source in ("detectron", "backbone"):
            name = re.sub(r"_(w|b|s)$", lambda end: ".bias" if end[1] == "b" else ".weight", name)
        for pattern, ours in rules:
            match = pattern.fullmatch(name)
            if match is not None:
                if ours:
                    renamed[match.expand(ours)] = value
                break
        else:
            left_over.append(key)
    return renamed, left_over


def adapt_values(state: dict[str, Tensor], source: Format) -> dict[str, Tensor]:
    """Float32 values in our order: background last, no boxes and masks for it, statistics for every batch norm of the
    backbone, none elsewhere."""
    result: dict[str, Tensor] = {}
    for key, value in state.items():
        value = value.float() if value.is_floating_point() else value
        result[key] = _background_last(key, value, state) if source in _BACKGROUND_FIRST else value
    if "rpn.conv.2.weight" not in result:  # a single convolution stands in no sequence
        result = {re.sub(r"^rpn\.conv\.0\.", "rpn.conv.", key): value for key, value in result.items()}
    result = _fold_batch_norms(result)
    for key in list(result):
        # Caffe's models and early detectron2 merged the statistics into scale and bias.
        if re.fullmatch(r"backbone\.body\.(.*\.)?(bn\d|downsample\.1)\.weight", key) and not _group_norm(state):
            name = key.removesuffix("weight")
            result.setdefault(name + "running_mean", torch.zeros_like(result[key]))
            result.setdefault(name + "running_var", torch.full_like(result[key], 1 - _BN_EPS))
    return result


def _fold_batch_norms(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without ``<convolution>.bn``: y = (conv(x) - mean) / sqrt(var + eps) * scale + shift is itself a convolution."""
    result = {key: value for key, value in state.items() if ".bn." not in key}
    for conv in sorted({key.rpartition(".bn.")[0] for key in state if ".bn." in key}):
        names = [f"{conv}.{name}" for name in ("weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")]
        missing = [name for name in names if name not in state]
        if missing or len({state[name].shape[:1] for name in names}) > 1:
            raise CheckpointError(
                f"the batch norm behind {conv} is not whole ({', '.join(missing) or 'its sizes'} "
                f"{'missing' if missing else 'differ'}): fetch the file again"
            )
        weight, scale, shift, mean, variance = (state[name].double() for name in names)
        bias = state[f"{conv}.bias"].double() if f"{conv}.bias" in state else torch.zeros_like(mean)
        factor = scale / (variance + _BN_EPS).sqrt()  # [out channels]
        result[f"{conv}.weight"] = (weight * factor[:, None, None, None]).float()
        result[f"{conv}.bias"] = ((bias - mean) * factor + shift).float()
    return result


def remove_eps(state: dict[str, Tensor]) -> bool:
    """torchvision's COCO weights (v1) run with frozen batch norms of eps 0, ours have one: the scales make up for it.

    They show by 91 outputs and by norms without counters; whether others were trained with an eps cannot be seen.
    """
    if len(state["cascade.box_heads.0.classifier.bias"]) != _TORCHVISION_OUTPUTS:
        return False
    if any(key.endswith("num_batches_tracked") for key in state):
        return False
    for key, variance in state.items():
        if key.startswith(_BODY) and key.endswith(".running_var"):
            scale = key.removesuffix("running_var") + "weight"
            variance = variance.double()
            ratio = torch.where(variance > 0, (variance + _BN_EPS) / variance, 1.0)  # 0: a channel that is constant
            state[scale] = (state[scale].double() * ratio.sqrt()).float()
    return True


def _group_norm(state: Mapping[str, Tensor]) -> bool:
    return any(key.startswith("fpn.lateral_norm.") for key in state)


def _background_last(key: str, value: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    head, _, parameter = key.rpartition(".")
    if head.endswith(".classifier"):
        return torch.cat([value[1:], value[:1]])
    if head.endswith(".deltas") and head.startswith(_BOX):
        classes = len(state[f"{head.removesuffix('deltas')}classifier.{parameter}"])  # with background
        if len(value) == 8 or len(value) == 4 * classes:  # Detectron's class-agnostic boxes: background, object
            return value[4:].clone()
    if head.startswith(_MASK) and head.endswith(".logits") and len(value) > 1:
        return value[1:].clone()
    return value


def absorb_preprocessing(
    state: dict[str, Tensor],
    *,
    bgr: bool,
    mean: Sequence[float],
    std: Sequence[float],
    our_bgr: bool,
    our_mean: Sequence[float],
    our_std: Sequence[float],
) -> bool:
    """Move a difference in channel order, mean and std into the first convolution and its norm; tells if there was one.

    ``mean`` and ``std`` are in the order of the channels, as their owner lists them. With u our normalised input and
    x = u * our_std + our_mean the owner's input is u * our_std / std + (our_mean - mean) / std: the factor scales the
    weights, the constant shifts what the norm subtracts. Exact, but for the constant at the border of the image, where
    padding with zeros means another grey (half a grey level between the means in use).
    """
    weight = state[_BODY + "conv1.weight"].double()  # [64, 3, 7, 7]
    theirs = [torch.tensor(list(values), dtype=torch.float64) for values in (mean, std)]
    if bgr != our_bgr:
        weight = weight.flip(1)
        theirs = [values.flip(0) for values in theirs]
    factor = torch.tensor(list(our_std), dtype=torch.float64) / theirs[1]
    constant = (torch.tensor(list(our_mean), dtype=torch.float64) - theirs[0]) / theirs[1]
    shifted = bool(constant.abs().max() > 1e-5)  # more than float32's rounding of the owner's mean
    if bgr == our_bgr and not shifted and bool((factor - 1).abs().max() < 1e-6):
        return False
    shift = (weight * constant[:, None, None]).sum(dim=(1, 2, 3))
    state[_BODY + "conv1.weight"] = (weight * factor[:, None, None]).float()
    if shifted:
        mean_key = _BODY + "bn1.running_mean"
        if mean_key not in state:
            raise CheckpointError(
                f"its images are normalised with mean {tuple(mean)} before a stem without batch "
                "norm: such a difference cannot be converted exactly"
            )
        state[mean_key] = (state[mean_key].double() - shift).float()
    return True
