"""mmdetection's and mmpretrain's backbones as timm's networks, with the weights that they start from.

To read one more, add its line to ``BACKBONES`` and its type to ``config_rules.RULES``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from typing import Any

from cascade_rcnn.convert.config_values import as_dict, as_list, same, whole, word
from cascade_rcnn.convert.infer_config import TIMM, TIMM_DEEP_STEM
from cascade_rcnn.convert.mmdet_findings import Findings
from cascade_rcnn.messages import shown

_ANY = {"backbone": "resnet50.tv_in1k"}  # beside a refusal, so that the other parts can be looked at too
# Weights that are timm's of the same name (those of Caffe's style are not).
_SAME_WEIGHTS = (
    "torchvision://",
    "open-mmlab://res",
    "open-mmlab://regnetx",
    "open-mmlab://detectron2/resnext101_32x8d",
)
_NAMED_WEIGHTS = {"resnet50-11ad3fa6": "resnet50.tv2_in1k", "resnet50_8xb256-rsb-a1-600e": "resnet50.a1_in1k"}


def backbone_settings(backbone: dict[str, Any], model: Mapping[str, Any], found: Findings) -> dict[str, Any]:
    """Fields of ModelConfig; ``model`` may name the weights instead of ``backbone`` (2.x)."""
    kind = word(backbone.get("type"))
    frozen = found.whole(backbone.get("frozen_stages", -1), "backbone.frozen_stages", least=-1)
    settings = {"frozen_stages": frozen} | BACKBONES[kind](backbone, found)
    if as_dict(backbone.get("dcn")):
        if not kind.startswith("Res"):
            found.refuse("backbone.dcn", f"in a {kind}", "in ResNet and ResNeXt")
        with_dcn = backbone.get("stage_with_dcn", [False] * 4)
        if not isinstance(with_dcn, list) or len(with_dcn) != 4:
            found.refuse("backbone.stage_with_dcn", with_dcn, "True or False for each of four stages")
        has_dcn = [found.flag(has, "backbone.stage_with_dcn") for has in as_list(with_dcn)]
        settings["deformable_stages"] = tuple(k + 1 for k, has in enumerate(has_dcn) if has)
    norm = as_dict(backbone.get("norm_cfg"))
    if word(norm.get("type")).startswith("LN") and not settings.get("output_norms"):
        found.refuse("backbone.norm_cfg.type", norm["type"], "BN, SyncBN or GN")
    if norm.get("requires_grad") is False and backbone.get("norm_eval") is False:
        found.refused.append("backbone.norm_cfg.requires_grad = False with norm_eval = False")
    init = as_dict(backbone.get("init_cfg"))
    weights = init.get("checkpoint") or backbone.get("pretrained") or model.get("pretrained")
    if kind == "TIMMBackbone":
        return settings
    found.expect(backbone.get("out_indices", [0, 1, 2, 3]), "backbone.out_indices", [0, 1, 2, 3])
    if not settings.get("output_norms"):
        found.expect(norm.get("eps", 1e-5), "backbone.norm_cfg.eps", 1e-5)
    if not weights:
        _check_start(backbone, found)
        return settings | {"pretrained": False}
    if settings.get("output_norms"):
        return settings | _pyramid_weights(settings["backbone"], str(weights), found)
    if backbone.get("style", "pytorch") == "caffe":
        found.notes.append(
            f"the backbone starts from {shown(weights)}; timm has no Caffe-style weights: convert that file and give "
            "it with --model.backbone-weights (docs/migrate.md)"
        )
        return settings
    named = next((name for part, name in _NAMED_WEIGHTS.items() if part in str(weights)), None)
    if named is not None:
        settings["backbone"] = named
    elif not str(weights).startswith(_SAME_WEIGHTS):
        _other_weights(weights, settings["backbone"], "", found)
    return settings


def _other_weights(theirs: object, ours: str, why: str, found: Findings) -> None:
    if str(theirs).startswith("http"):
        theirs = PurePosixPath(str(theirs)).name
    found.left_out.append(
        f"the backbone's weights {shown(theirs)}: the start is timm's {ours}{why}; or convert theirs, "
        "and give --model.backbone-weights"
    )


# ResNets, RegNets, timm's


def _resnet(backbone: dict[str, Any], found: Findings) -> dict[str, Any]:
    kind = word(backbone.get("type"))
    theirs = [backbone.get("depth"), backbone.get("groups", 1), backbone.get("base_width", 4)]
    if None in map(whole, theirs):
        found.refuse("backbone.depth, groups, base_width", theirs, "whole numbers")
        return _ANY
    depth, groups, width = (int(number) for number in theirs)
    per_group = 64 if groups == 1 else width
    deep = found.flag(backbone.get("deep_stem", False), "backbone.deep_stem") or kind in ("ResNetV1c", "ResNetV1d")
    pooled = found.flag(backbone.get("avg_down", False), "backbone.avg_down") or kind == "ResNetV1d"
    found.expect(backbone.get("strides", [1, 2, 2, 2]), "backbone.strides", [1, 2, 2, 2])
    found.expect(backbone.get("base_channels", 64), "backbone.base_channels", 64)
    found.expect(backbone.get("stem_channels") or 64, "backbone.stem_channels", 64)
    found.expect(backbone.get("in_channels", 3), "backbone.in_channels", 3)
    name = TIMM_DEEP_STEM.get((depth, pooled)) if deep else None if pooled else TIMM.get((depth, groups, per_group))
    if name is None or (deep and groups != 1):
        found.refuse("backbone.depth", depth, f"a {kind} of this depth, {groups} groups and this stem is not in timm")
    return {"backbone": name} if name else _ANY


def _regnet(backbone: dict[str, Any], found: Findings) -> dict[str, Any]:
    arch = str(backbone.get("arch")).lower()  # regnetx_3.2gf
    size = arch.removeprefix("regnetx_").removesuffix("gf")
    sizes = ("400mf", "800mf", "1.6", "3.2", "4.0", "6.4", "8.0", "12")
    names = ("004", "008", "016", "032", "040", "064", "080", "120")
    if not arch.startswith("regnetx_") or size not in sizes:
        found.refuse("backbone.arch", arch, ", ".join(f"regnetx_{size}" for size in sizes))
        return _ANY
    return {"backbone": f"regnetx_{names[sizes.index(size)]}.pycls_in1k"}


def _timm(backbone: dict[str, Any], found: Findings) -> dict[str, Any]:
    """mmpretrain's TIMMBackbone, whose batch norms are trained: it has no norm_eval and no frozen_stages."""
    read = dict.fromkeys(("model_name", "pretrained", "checkpoint_path", "init_cfg", "drop_path_rate"), ())
    found.check(backbone, "backbone", read | {"features_only": (), "out_indices": (), "in_channels": (3,)})
    found.expect(backbone.get("features_only", False), "backbone.features_only", True)
    name, indices = str(backbone.get("model_name")), backbone.get("out_indices", [0, 1, 2, 3, 4])
    strides = _timms_strides(name)
    places = [k for k, stride in enumerate(strides) if stride in (4, 8, 16, 32)]
    if strides:
        found.expect(indices, "backbone.out_indices", places)
    theirs = backbone.get("checkpoint_path") or as_dict(backbone.get("init_cfg")).get("checkpoint")
    if theirs:
        _other_weights(theirs, name, "", found)
    starts = found.flag(backbone.get("pretrained", False), "backbone.pretrained")
    return {
        "backbone": name,
        "pretrained": starts or bool(theirs),
        "norm": "batch",
        "drop_path": _drop_path(backbone, 0.0, found),
    }


def _timms_strides(name: str) -> list[int]:
    """Of all maps of timm's network; [] for a name that ``check_backbone`` refuses."""
    import timm
    import torch

    try:
        with torch.device("meta"):
            network: Any = timm.create_model(name, pretrained=False, features_only=True)
    except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError):
        return []
    return [int(stride) for stride in network.feature_info.reduction()]


# ConvNeXt and Swin: norms behind each map, stochastic depth

_CONVNEXT = {  # depths and widths of the four stages; the official name of a size is mmpretrain's arch
    "tiny": ([3, 3, 9, 3], [96, 192, 384, 768]),
    "small": ([3, 3, 27, 3], [96, 192, 384, 768]),
    "base": ([3, 3, 27, 3], [128, 256, 512, 1024]),
    "large": ([3, 3, 27, 3], [192, 384, 768, 1536]),
    "xlarge": ([3, 3, 27, 3], [256, 512, 1024, 2048]),
}
_SWIN = {  # depths, width, heads
    "tiny": ([2, 2, 6, 2], 96, [3, 6, 12, 24]),
    "small": ([2, 2, 18, 2], 96, [3, 6, 12, 24]),
    "base": ([2, 2, 18, 2], 128, [4, 8, 16, 32]),
    "large": ([2, 2, 18, 2], 192, [6, 12, 24, 48]),
}


def _convnext(backbone: dict[str, Any], found: Findings) -> dict[str, Any]:
    """mmpretrain's (``arch``) or the official detectors' (``depths``, ``dims``)."""
    arch, official = backbone.get("arch", "tiny"), bool(backbone.keys() & {"dims", "depths", "in_chans"})
    if official or isinstance(arch, Mapping):
        source = backbone if official else as_dict(arch)
        theirs = source.get("depths", [3, 3, 9, 3]), source.get("dims", source.get("channels", [96, 192, 384, 768]))
        arch = next((name for name, (a, b) in _CONVNEXT.items() if same(theirs[0], a) and same(theirs[1], b)), theirs)
    if not isinstance(arch, str) or arch not in _CONVNEXT:
        found.refuse("backbone.arch", arch, ", ".join(_CONVNEXT))
        return _ANY
    usual = [0, 1, 2, 3] if official else -1
    found.expect(backbone.get("out_indices", usual), "backbone.out_indices", [0, 1, 2, 3])
    found.expect(backbone.get("gap_before_final_norm", not official), "backbone.gap_before_final_norm", False)
    _check_norm(backbone, found, 1e-6, "LN2d", "LN")
    scale = backbone.get("layer_scale_init_value", 1e-6)
    if not isinstance(scale, (int, float)) or scale <= 0:
        found.refuse("backbone.layer_scale_init_value", scale, "above 0: timm's ConvNeXt has layer scales")
    frozen = backbone.get("frozen_stages", 0)
    return {
        "backbone": f"convnext_{arch}.{_tags(f'convnext_{arch}')[0]}",
        "output_norms": True,
        "drop_path": _drop_path(backbone, 0.0, found),
        "frozen_stages": frozen or -1,  # 0 freezes nothing in mmpretrain
    }


def _swin(backbone: dict[str, Any], found: Findings) -> dict[str, Any]:
    """mmdetection's (``embed_dims``) or the official detectors' (``embed_dim``)."""
    depths, heads = backbone.get("depths", [2, 2, 6, 2]), backbone.get("num_heads", [3, 6, 12, 24])
    width = backbone.get("embed_dims", backbone.get("embed_dim", 96))
    size = next((n for n, (a, b, c) in _SWIN.items() if same(depths, a) and same(width, b) and same(heads, c)), None)
    window = backbone.get("window_size", 7)
    window = window[0] if isinstance(window, list) and len(window) == 2 and window[0] == window[1] else window
    if size is None or window not in (7, 12) or (window == 12 and size in ("tiny", "small")):
        said = f"depths {shown(depths)}, width {shown(width)}, heads {shown(heads)}, window {shown(window)}"
        found.refuse("backbone (SwinTransformer)", said, "tiny, small, base, large with window 7; base, large with 12")
        return _ANY
    for name, expected in (("patch_norm", True), ("qkv_bias", True), ("mlp_ratio", 4), ("patch_size", 4)):
        found.expect(backbone.get(name, expected), f"backbone.{name}", expected)
    _check_norm(backbone, found, 1e-5, "LN")
    official = bool(backbone.keys() & {"embed_dim", "ape", "use_checkpoint"})
    frozen = backbone.get("frozen_stages", -1)
    if isinstance(frozen, int) and frozen > 0:
        found.left_out.append(
            f"backbone.frozen_stages = {frozen}: the norms behind the frozen stages' maps are trained"
        )
    arch = f"swin_{size}_patch4_window{window}_{224 if window == 7 else 384}"
    return {
        "backbone": f"{arch}.{_tags(arch)[0]}",
        "output_norms": True,
        "drop_path": _drop_path(backbone, 0.2 if official else 0.1, found),
    }


def _check_norm(backbone: Mapping[str, Any], found: Findings, eps: float, *kinds: str) -> None:
    norm = as_dict(backbone.get("norm_cfg"))
    found.expect(word(norm.get("type", kinds[0])), "backbone.norm_cfg.type", *kinds)
    found.expect(norm.get("eps", eps), "backbone.norm_cfg.eps", eps)


def _drop_path(backbone: Mapping[str, Any], usual: float, found: Findings) -> float:
    rate = backbone.get("drop_path_rate", usual)
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate < 1:
        found.refuse("backbone.drop_path_rate", rate, "from 0 to below 1")
        return 0.0
    return float(rate)


def _tags(arch: str) -> list[str]:
    """timm's weights for a network, those of the authors' ImageNet-1k training first."""
    import timm

    tags = [name.partition(".")[2] for name in timm.list_pretrained(f"{arch}.*")]
    return sorted((tag for tag in tags if tag.startswith(("fb_", "ms_"))), key=lambda tag: (len(tag), tag))


def _pyramid_weights(name: str, theirs: str, found: Findings) -> dict[str, Any]:
    """timm's weights of the same training: the same file by its name, or by the words in it."""
    import timm

    arch = name.partition(".")[0]
    file = PurePosixPath(theirs.partition("?")[0]).name
    for tag in _tags(arch):
        known = timm.get_pretrained_cfg(f"{arch}.{tag}")
        if known is not None and PurePosixPath(str(known.url or "")).name == file:
            return {"backbone": f"{arch}.{tag}"}
    wanted = "in1k"
    if re.search(r"2[12]k", file):
        finetuned = re.search(r"2[12]k-pre|2[12]kto1k|2[12]k_1k", file)
        wanted = "in22k_ft_in1k" if finetuned else "in22k"
    same_training = [f"{arch}.{tag}" for tag in _tags(arch) if tag.partition("_")[2] == wanted]
    ours = [*same_training, name][0]
    # The ConvNeXt that detectors start from was not averaged; timm has the one that was.
    unaveraged = "noema" in file or file == f"{arch}_1k_224.pth"
    if unaveraged or not (same_training and "3rdparty" in file):  # the latter: mmpretrain's copies
        why = ", the averaged weights (EMA) of that training" if unaveraged and same_training else ""
        _other_weights(theirs, ours, why, found)
    return {"backbone": ours}


def _check_start(backbone: Mapping[str, Any], found: Findings) -> None:
    """What only a start without weights shows."""
    if word(backbone.get("type")) in ("ConvNeXt", "SwinTransformer"):
        found.notes.append(
            "the config names no weights for the backbone (their commands give model.pretrained): it starts from "
            "nothing; with --model.pretrained True from timm's"
        )
    scale = backbone.get("layer_scale_init_value", 1e-6)
    if not same(scale, 1e-6):
        found.left_out.append(f"backbone.layer_scale_init_value = {shown(scale)} (here 1e-06)")


BACKBONES: dict[str, Callable[[dict[str, Any], Findings], dict[str, Any]]] = {
    "ResNet": _resnet,
    "ResNetV1c": _resnet,
    "ResNetV1d": _resnet,
    "ResNeXt": _resnet,
    "RegNet": _regnet,
    "ConvNeXt": _convnext,
    "SwinTransformer": _swin,
    "TIMMBackbone": _timm,
}
