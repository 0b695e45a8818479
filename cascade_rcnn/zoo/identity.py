"""Whether converted weights are the network that their name promises: not every file has a digest."""

from __future__ import annotations

import re

from cascade_rcnn.config import ModelConfig
from cascade_rcnn.zoo.catalog import Published


def another_network(entry: Published, model: ModelConfig) -> str:
    """What ``model`` has and the name of ``entry`` says otherwise; empty where they agree."""
    name = entry.name.lower()
    stages = 3 if "cascade" in name else 1
    found = []
    if len(model.stage_ious) != stages:
        found.append(f"{len(model.stage_ious)} stages instead of {stages}")
    if (model.masks != "none") != ("mask" in name):
        found.append("no masks" if model.masks == "none" else "masks")
    wanted, here = _backbone(f"{entry.backbone} {name}"), _backbone(model.backbone)
    if wanted and here != wanted:
        found.append(f"the backbone {model.backbone.partition('.')[0]} instead of {wanted}")
    return ", ".join(found)


def _backbone(text: str) -> str:
    """``resnet50``, ``resnext101_32x4d``, ``convnext_t``, ``regnetx_032``: the same for all spellings of a network."""
    text = text.lower()
    if match := re.search(r"(convnext|swin)[-_](t|s|b|l|x)[a-z]*", text):
        return f"{match[1]}_{match[2]}"
    if match := re.search(r"(regnet[xy])[-_]([\d.]+)(mf|gf|)", text):
        flops = {"gf": 10, "mf": 0.01, "": 1}[match[3]] * float(match[2].strip("."))
        return f"{match[1]}_{round(flops):03d}"
    match = re.search(r"(resnext|resnet|r|x)[-_]?(18|34|50|101|152)[cd]?(?:[-_](\d+x\dd))?", text)
    if match is None:
        return ""
    return f"resne{'x' if match[1] in ('x', 'resnext') else ''}t{match[2]}{f'_{match[3]}' if match[3] else ''}"
