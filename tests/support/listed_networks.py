"""The network that a listed name promises, worked out from the name alone: what a converter must find in its file."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from cascade_rcnn.config import ModelConfig
from cascade_rcnn.convert.infer_config import TIMM
from cascade_rcnn.zoo.catalog import Published

_CLASSES = {
    "COCO": 80,
    "COCO (2014 minival)": 80,
    "LVIS v0.5": 1230,
    "LVIS v1": 1203,
    "Objects365 v1": 365,
    "Objects365 v2": 365,
    "Open Images v6": 601,
    "Open Images Challenge 2019": 500,
    "Cityscapes": 8,
}
_NAMED = {
    "convnext": {"t": "convnext_tiny", "s": "convnext_small", "b": "convnext_base"}
    | {"l": "convnext_large", "x": "convnext_xlarge"},
    "swin": {
        "t": "swin_tiny_patch4_window7_224",
        "s": "swin_small_patch4_window7_224",
        "b": "swin_base_patch4_window7_224",
    },
}


@dataclass(frozen=True)
class Listed:
    """A network and how many classes it knows."""

    model: ModelConfig
    classes: int


def listed_network(entry: Published) -> Listed:
    """What ``entry`` must be once it is converted: batch norms of FPN and heads are folded into their convolutions."""
    name = entry.name.lower()
    cascade, masks = "cascade" in name, "mask" in name
    settings: dict[str, Any] = {"backbone": _backbone(entry), "pretrained": False, "class_agnostic_boxes": cascade}
    if not cascade:
        settings["stage_ious"] = (0.5,)
    if masks:
        settings["masks"] = "last" if "authors" in name else "one" if cascade and "detectron2" in name else "every"
    if re.search(r"_gn(_|$)", name):
        settings |= {"norm": "group", "box_head": "4conv1fc_gn"}
    if "syncbn_all" in name or re.search("lsj|3x_syncbn|9x_syncbn|torchvision.*v2", name):
        settings["box_head"] = "4conv1fc"
    if re.search("rpn_2conv|lsj|torchvision.*v2", name):
        settings["rpn_convs"] = 2
    if re.search("convnext|swin", name):
        settings |= {"output_norms": True, "frozen_stages": -1}
        if cascade:
            settings |= {"box_head": "4conv1fc_bn", "class_agnostic_boxes": False, "norm": "sync"}
    if "dconv" in name:
        settings["deformable"] = "modulated" if "mdconv" in name else "plain"
        settings["deformable_groups"] = 4 if "group4" in name else 1
    classes = 90 if entry.library == "torchvision" else _CLASSES[entry.dataset]  # with COCO's numbers that nobody uses
    return Listed(ModelConfig(**settings), classes)


def _backbone(entry: Published) -> str:
    """timm's name."""
    text = re.sub(r"[-_]", "", f"{entry.backbone} {entry.name}".lower())
    if match := re.search(r"(convnext|swin)(tiny|small|base|large|xlarge|t|s|b|l|xl)", text):
        return _NAMED[match[1]][match[2][0]]
    if match := re.search(r"(regnet[xy])([\d.]+)(mf|gf)", text):
        size = round(float(match[2]) * (10 if match[3] == "gf" else 0.01))
        return f"{match[1]}_{size:03d}"
    match = re.search(r"(resnet|r|x)(18|34|50|101|152)(?:(\d+)x(\d)d)?", text)
    assert match is not None, entry.name
    groups, width = (int(match[3]), int(match[4])) if match[3] else (1, 64)
    return TIMM[int(match[2]), groups, width]
