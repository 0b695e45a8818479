"""What another library's values need besides new names: order of classes, folded norms, preprocessing, row orders.

All functions work on states under our keys, batch norms of FPN and heads still as ``<convolution>.bn``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cascade_rcnn.convert.key_tables import BODY, BOX, MASK, Format
from cascade_rcnn.errors import CheckpointError

BN_EPS = 1e-5
_WS_EPS = 1e-5  # mmdetection's ConvWS adds it to the standard deviation
_TORCHVISION_OUTPUTS = 91  # background, and COCO's ids 1 to 90
_BACKGROUND_FIRST = ("torchvision", "detectron")
_WITH_STATISTICS = ("mmdetection", "torchvision")  # whose files always have those of their batch norms


def adapt_values(state: dict[str, Tensor], source: Format) -> dict[str, Tensor]:
    """Float32 values in our order: background last, no boxes and masks for it, statistics for every batch norm of the
    backbone, none elsewhere."""
    result: dict[str, Tensor] = {}
    for key, value in state.items():
        value = value.float() if value.is_floating_point() else value
        result[key] = _background_last(key, value, state) if source in _BACKGROUND_FIRST else value
    if "rpn.conv.2.weight" not in result:  # a single convolution stands in no sequence
        result = {re.sub(r"^rpn\.conv\.0\.", "rpn.conv.", key): value for key, value in result.items()}
    result = _fold_batch_norms(_merging_in_swins_order(result))
    if source not in _WITH_STATISTICS and lacks_statistics(state):
        _add_statistics(result)
    return result


def refuse_impossible(state: Mapping[str, Tensor]) -> None:
    """CheckpointError for what no network holds: single numbers, empty tensors, negative variances."""
    values = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    empty = [f"{key} {tuple(value.shape)}" for key, value in values.items() if value.dim() == 0 or not value.numel()]
    if empty:
        raise CheckpointError(
            f"{len(empty)} of its weights are empty or a single number ({', '.join(empty[:3])}): fetch the file again"
        )
    negative = [key for key, value in values.items() if key.endswith("running_var") and bool((value < 0).any())]
    if negative:
        raise CheckpointError(
            f"{len(negative)} of its norms have a negative variance ({', '.join(negative[:3])}), of which no root can "
            "be taken: take an earlier checkpoint"
        )


def _merging_in_swins_order(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Swin's patch merging: mmdetection lists the four patches' values channel by channel, row by row; Swin patch by
    patch, column by column."""
    result = {}
    for key, value in state.items():
        if ".unfolded." in key and value.shape[-1] % 4 == 0:  # else its shape will not fit, which is told later
            by_patch = value.unflatten(-1, (-1, 4)).transpose(-1, -2)  # [..., 4, C]
            value = by_patch[..., [0, 2, 1, 3], :].flatten(-2).contiguous()
        result[key.replace(".unfolded.", ".")] = value
    return result


def has_group_norm(state: Mapping[str, Tensor]) -> bool:
    """Whether the norms of the FPN, and so of the backbone, are group norms."""
    return any(key.startswith("fpn.lateral_norm.") for key in state)


def lacks_statistics(state: Mapping[str, Tensor]) -> bool:
    """Whether no norm of the backbone has statistics and they are batch norms (a group norm has none either).

    A file with statistics for some norms has lost the others: they are missing.
    """
    statistics = (key.startswith(BODY) and key.endswith(("running_mean", "running_var")) for key in state)
    return not has_group_norm(state) and not any(statistics)


def _add_statistics(state: dict[str, Tensor]) -> None:
    """Caffe's models and early detectron2 merged the statistics into scale and bias."""
    for key in list(state):
        if re.fullmatch(r"backbone\.body\.(.*\.)?(bn\d|downsample\.1)\.weight", key) and state[key].dim() == 1:
            name = key.removesuffix("weight")
            state.setdefault(name + "running_mean", torch.zeros_like(state[key]))
            state.setdefault(name + "running_var", torch.full_like(state[key], 1 - BN_EPS))


def _fold_batch_norms(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without ``<convolution>.bn``: y = (conv(x) - mean) / sqrt(var + eps) * scale + shift is itself a convolution."""
    folded = {key for key in state if ".bn." in key and not key.startswith(BODY)}
    result = {key: value for key, value in state.items() if key not in folded}
    for conv in sorted({key.rpartition(".bn.")[0] for key in folded}):
        names = [f"{conv}.{name}" for name in ("weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")]
        missing = [name for name in names if name not in state]
        if missing or {state[name].shape for name in names[1:]} != {state[names[0]].shape[:1]}:
            raise CheckpointError(
                f"the batch norm behind {conv} is not whole ({', '.join(missing) or 'its sizes'} "
                f"{'missing' if missing else 'differ'}): fetch the file again"
            )
        weight, scale, shift, mean, variance = (state[name].double() for name in names)
        bias = state[f"{conv}.bias"].double() if f"{conv}.bias" in state else torch.zeros_like(mean)
        factor = scale / (variance + BN_EPS).sqrt()  # [out channels]
        result[f"{conv}.weight"] = (weight * factor.view(-1, *[1] * (weight.dim() - 1))).float()
        result[f"{conv}.bias"] = ((bias - mean) * factor + shift).float()
    return result


def has_torchvisions_eps(state: Mapping[str, Tensor]) -> bool:
    """Whether these are torchvision's COCO weights (v1), which run with frozen batch norms of eps 0.

    They show by 91 outputs and by norms without counters; whether others were trained with an eps cannot be seen.
    """
    if len(state[f"{BOX}0.classifier.bias"]) != _TORCHVISION_OUTPUTS:
        return False
    return not any(key.endswith("num_batches_tracked") for key in state)


def change_eps(state: dict[str, Tensor], theirs: float) -> None:
    """Batch norms of the backbone that run with another eps than ours: their scales make up for it, exactly."""
    for key, variance in state.items():
        if key.startswith(BODY) and key.endswith(".running_var"):
            scale = key.removesuffix("running_var") + "weight"
            variance = variance.double()
            divisor = variance + theirs
            ratio = torch.where(divisor > 0, (variance + BN_EPS) / divisor, 1.0)  # 0: a channel that is constant
            state[scale] = (state[scale].double() * ratio.sqrt()).float()


def standardize_weights(state: dict[str, Tensor], parts: Sequence[str]) -> int:
    """Weight standardisation (arXiv 1903.10520) done once and for all; returns the number of convolutions.

    ``parts``: prefixes of our keys. In each, the convolutions of the backbone, and elsewhere those with a group norm
    behind them, become (w - mean) / (std + 1e-5) per filter with the unbiased std, as mmdetection's ConvWS computes
    them in every step.
    """
    count = 0
    for key, weight in state.items():
        if not key.startswith(tuple(parts)) or not key.endswith(".weight") or weight.dim() != 4:
            continue
        if not key.startswith(BODY) and not _norm_behind(key, state):
            continue
        filters = weight.double().flatten(1)  # [out, in * h * w]
        std, mean = torch.std_mean(filters, dim=1, keepdim=True)
        state[key] = ((filters - mean) / (std + _WS_EPS)).float().view_as(weight)
        count += 1
    return count


def _norm_behind(key: str, state: Mapping[str, Tensor]) -> bool:
    """Whether a group norm follows the convolution of FPN or head ``key``."""
    conv = key.removesuffix(".weight")
    norm = re.sub(r"^fpn\.(lateral|output)\.", r"fpn.\1_norm.", conv)
    if conv.startswith(BOX):
        norm = re.sub(r"\.0$", ".1", conv)
    elif conv.startswith(MASK):
        norm = conv.replace(".convs.", ".norms.")
    return norm != conv and f"{norm}.weight" in state


def _background_last(key: str, value: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    head, _, parameter = key.rpartition(".")
    if head.endswith(".classifier"):
        return torch.cat([value[1:], value[:1]])
    if head.endswith(".deltas") and head.startswith(BOX):
        scores = state.get(f"{head.removesuffix('deltas')}classifier.{parameter}", value)
        classes = len(scores)  # with background
        if len(value) == 8 or len(value) == 4 * classes:  # Detectron's class-agnostic boxes: background, object
            return value[4:].clone()
    if head.startswith(MASK) and head.endswith(".logits") and len(value) > 1:
        return value[1:].clone()
    return value


def reorder_anchors(state: dict[str, Tensor], order: Sequence[int]) -> None:
    """Rows of the RPN's outputs from another order of anchors to ours: ``order`` lists theirs in our order."""
    rows = torch.tensor(list(order))
    for part in ("weight", "bias"):
        state[f"rpn.objectness.{part}"] = state[f"rpn.objectness.{part}"][rows]
        deltas = state[f"rpn.deltas.{part}"]
        state[f"rpn.deltas.{part}"] = deltas.unflatten(0, (len(rows), 4))[rows].flatten(0, 1)


# The first convolution of a network, and the mean of the batch norm behind it, if it has one.
_STEMS = (
    (BODY + "conv1.0.weight", BODY + "conv1.1.running_mean"),
    (BODY + "conv1.weight", BODY + "bn1.running_mean"),
    (BODY + "stem.conv.weight", BODY + "stem.bn.running_mean"),
    (BODY + "stem_0.weight", ""),
    (BODY + "patch_embed.proj.weight", ""),
)


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
    weight_key, mean_key = next((first, norm) for first, norm in _STEMS if first in state)
    weight = state[weight_key].double()  # [64, 3, 7, 7]
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
    state[weight_key] = (weight * factor[:, None, None]).float()
    if shifted:
        if mean_key not in state:
            raise CheckpointError(
                f"its images are normalised with mean {tuple(mean)} before a stem without batch "
                "norm: such a difference cannot be converted exactly"
            )
        state[mean_key] = (state[mean_key].double() - shift).float()
    return True
