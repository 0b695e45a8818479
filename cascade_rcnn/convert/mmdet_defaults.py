"""mmdetection's own values of settings that a config leaves out, where they are not ours.

A value of 3.3's code, which is 2.x's too. It is filled in where the part that it belongs to is written, and then judged
by the same rules as if it stood there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cascade_rcnn.convert.config_values import as_dict, flag, word

# Path of the part, the setting, its value.
_DEFAULTS: list[tuple[str, str, Any]] = [
    ("rpn_head", "anchor_generator", {"scales": [8, 16, 32], "ratios": [0.5, 1.0, 2.0], "strides": [4, 8, 16, 32, 64]}),
    ("rpn_head.loss_cls", "use_sigmoid", False),
    ("roi_head.mask_head.loss_mask", "use_mask", False),
    ("train_cfg.rpn.assigner", "min_pos_iou", 0.0),
    ("train_cfg.rpn.sampler", "add_gt_as_proposals", True),
    ("train_cfg.rcnn.assigner", "match_low_quality", True),
    ("train_cfg.rcnn.assigner", "min_pos_iou", 0.0),
    ("train_cfg.rpn_proposal", "nms_pre", -1),
    ("test_cfg.rpn", "nms_pre", -1),
    ("test_cfg.rcnn.nms", "iou_threshold", 0.3),  # of soft NMS; plain NMS has to have one
]
# Settings without which mmdetection does not run either: a value of ours would be a guess.
_NEEDED: list[tuple[str, tuple[str, ...]]] = [
    ("rpn_head.anchor_generator", ("scales", "octave_base_scale")),
    ("rpn_head.anchor_generator", ("ratios",)),
    ("rpn_head.anchor_generator", ("strides",)),
    ("test_cfg.rpn", ("max_per_img", "max_num")),
    ("test_cfg.rcnn", ("score_thr",)),
    ("test_cfg.rcnn", ("max_per_img",)),
    ("test_cfg.rcnn", ("nms",)),
    ("test_cfg.rcnn.nms", ("iou_threshold", "iou_thr")),
    ("train_cfg.rpn_proposal", ("max_per_img", "max_num")),
    ("train_cfg.rpn.assigner", ("pos_iou_thr",)),
    ("train_cfg.rpn.assigner", ("neg_iou_thr",)),
    ("train_cfg.rpn.sampler", ("num",)),
    ("train_cfg.rpn.sampler", ("pos_fraction",)),
    ("train_cfg.rcnn.assigner", ("neg_iou_thr",)),
    ("train_cfg.rcnn.sampler", ("num",)),
    ("train_cfg.rcnn.sampler", ("pos_fraction",)),
]


def fill_defaults(model: dict[str, Any]) -> list[str]:
    """Put mmdetection's values into ``model``, in place; the paths of those that were absent."""
    filled: list[str] = []
    train, test = as_dict(model.get("train_cfg")), as_dict(model.get("test_cfg"))
    if train and not as_dict(train.get("rpn_proposal")):
        train["rpn_proposal"] = dict(as_dict(test.get("rpn")))  # as mmdetection does without it
        model["train_cfg"] = train
        filled.append("train_cfg.rpn_proposal")
    for path, key, value in _DEFAULTS:
        for part in _parts(model, path):
            if key not in part and _applies(path, key, part):
                part[key] = value
                filled.append(f"{path}.{key}")
    return filled


def _applies(path: str, key: str, part: dict[str, Any]) -> bool:
    if key == "min_pos_iou":
        return flag(part.get("match_low_quality", True)) is not False  # without it, nothing reads min_pos_iou
    if path == "test_cfg.rcnn.nms":
        return word(part.get("type")) == "soft_nms" and "iou_thr" not in part
    return not (key == "anchor_generator" and any(name.startswith("anchor_") for name in part))  # early 2.x


def missing(model: dict[str, Any]) -> list[str]:
    """Settings that are absent and have no default."""
    found = []
    for path, keys in _NEEDED:
        if any(not any(key in part for key in keys) for part in _parts(model, path)):
            found.append(f"{path} without {keys[0]}")
    for path, key in (("train_cfg.rpn", "sampler"), ("train_cfg.rcnn", "sampler"), ("train_cfg.rpn", "assigner")):
        if any(not as_dict(part.get(key)) for part in _parts(model, path)):
            found.append(f"{path} without {key}")
    return found


def _parts(value: Any, path: str) -> Iterator[dict[str, Any]]:
    """The dictionaries at ``path`` that are not empty; those of all stages of a list."""
    if isinstance(value, list):
        for item in value:
            yield from _parts(item, path)
    elif isinstance(value, dict) and path:
        name, _, inner = path.partition(".")
        yield from _parts(value.get(name), inner)
    elif isinstance(value, dict) and value:
        yield value


def marked(said: str, filled: list[str]) -> str:
    """``said``, with a word on where its value came from if the config does not have it."""
    path = said.partition(" = ")[0]
    absent = any(path == name or path.startswith(f"{name}.") for name in filled)
    return f"{said}, which is mmdetection's value where the config has none" if absent else said
