"""The steps of mmdetection's training pipelines, 2.x and 3.x, as fields of ``DataConfig``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from cascade_rcnn.convert.config_text import test_steps
from cascade_rcnn.convert.config_values import as_dict, as_list, flag, numbers, same, word
from cascade_rcnn.convert.mmdet_findings import ANY, Findings
from cascade_rcnn.messages import shown

# Steps of a training pipeline and their settings: values that mean what is done here, () for any value.
_FILES = {"backend_args": ANY, "file_client_args": ANY, "imdecode_backend": ANY}  # the last: _say_library
_STEPS: dict[str, dict[str, tuple[Any, ...]]] = {
    "LoadImageFromFile": {"to_float32": ANY, "color_type": ("color",), **_FILES},
    "LoadAnnotations": {
        "with_bbox": (True,),
        "with_label": (True,),
        "with_mask": (True, False),
        "poly2mask": ANY,
        "box_type": ("hbox",),
        "with_seg": (False,),
        **_FILES,
    },
    "Resize": {
        **dict.fromkeys(("scale", "img_scale", "ratio_range", "keep_ratio", "backend"), ANY),
        "multiscale_mode": ("range", "value"),
        "override": (False, True),  # of a second one, behind a crop
    },
    "RandomResize": {"scale": ANY, "ratio_range": ANY, "keep_ratio": ANY, "resize_type": ("Resize",)},
    "RandomChoiceResize": {"scales": ANY, "keep_ratio": ANY, "resize_type": ("Resize",)},
    "RandomChoice": {"transforms": ANY, "prob": ANY},
    "AutoAugment": {"policies": ANY},
    "RandomCrop": {
        "crop_size": ANY,
        "crop_type": ("absolute", "absolute_range"),
        "recompute_bbox": (True, False),
        "allow_negative_crop": (True, False),
        "bbox_clip_border": (True,),
    },
    "RandomFlip": {"prob": ANY, "flip_ratio": ANY, "direction": ("horizontal", ["horizontal"])},
    "PhotoMetricDistortion": {
        "brightness_delta": (32,),
        "contrast_range": ([0.5, 1.5],),
        "saturation_range": ([0.5, 1.5],),
        "hue_delta": (18,),
    },
    "FilterAnnotations": {
        "min_gt_bbox_wh": ([0.01, 0.01], [1, 1]),
        "keep_empty": (True,),  # which leaves out images without objects
        "by_box": (True,),
        "by_mask": (False,),
    },
    "Normalize": dict.fromkeys(("mean", "std", "to_rgb"), ANY),
    "Pad": {"size_divisor": (32, 1), "size": ANY, "pad_val": ANY},
    "DefaultFormatBundle": {"img_to_float": ANY, "pad_val": ANY},
    "Collect": {"keys": ANY, "meta_keys": ANY},
    "PackDetInputs": {"meta_keys": ANY},
}
# Steps that have a counterpart which a config cannot give: what to do instead.
_INSTEAD = {
    "Albu": "take the step out and give data.augment, a file with one Albumentations transform",
    "Albumentation": "take the step out and give data.augment, a file with one Albumentations transform",
    "CopyPaste": "take the step out and give data.copy_paste",
    "Mosaic": "take the step out and give data.mosaic",
}
_RESIZES = ("Resize", "RandomResize", "RandomChoiceResize")
# Steps of a training pipeline of which a second one would do something else: refused.
_ONCE = ("LoadAnnotations", "RandomFlip", "PhotoMetricDistortion", "Normalize", "FilterAnnotations")


def pipeline_settings(steps: list[dict[str, Any]], found: Findings, *, old: bool) -> dict[str, Any]:
    settings: dict[str, Any] = {"flip": 0.0}
    kinds = [word(step.get("type")) for step in steps]
    found.refused += [
        f"train_pipeline: {kinds.count(kind)} steps {kind} (here one)" for kind in _ONCE if kinds.count(kind) > 1
    ]
    for step in steps:
        kind = word(step.get("type"))
        if kind not in _STEPS:
            instead = f" ({_INSTEAD[kind]})" if kind in _INSTEAD else ""
            found.refused.append(f"train_pipeline: a step {shown(kind)}{instead}")
            continue
        found.check(step, f"train_pipeline.{kind}", _STEPS[kind])
        _say_library(step, f"train_pipeline.{kind}", found)
        if kind in _MAKERS:
            settings |= _MAKERS[kind](step, settings, found, old)
    settings.pop("with_mask", None)
    if settings.pop("uncropped", False):
        found.refused.append("train_pipeline: ratio_range without a RandomCrop of the same size behind it")
    if "short_side" not in settings and not any("step" in said for said in found.refused):
        found.refused.append("train_pipeline: no step that resizes to a (longer, shorter) scale")
    return settings


def _say_library(step: Mapping[str, Any], path: str, found: Findings) -> None:
    """Another library than cv2 for files or for resizing."""
    if step.get("imdecode_backend", "cv2") != "cv2":
        said = shown(step["imdecode_backend"])
        found.left_out.append(f"{path}.imdecode_backend = {said}: pictures are decoded by one library here")
    if step.get("backend", "cv2") != "cv2":
        said = shown(step["backend"])
        found.left_out.append(f"{path}.backend = {said}: resized as cv2 does; data.antialias True is as Pillow does")


def check_normalize(names: Mapping[str, Any], steps: list[dict[str, Any]], found: Findings, *, old: bool) -> None:
    """Training and test normalise alike: in the data_preprocessor, or (2.x) in both pipelines."""
    theirs = [step for step in steps if word(step.get("type")) == "Normalize"]
    tests = [step for step in test_steps(names) if step["type"] == "Normalize"]
    new = as_dict(as_dict(as_dict(names.get("model")).get("data_preprocessor"))).get("mean") is not None
    values = [[step.get("mean"), step.get("std"), flag(step.get("to_rgb", True))] for step in (*theirs, *tests)]
    if new and values:
        found.refuse("a step Normalize", values[0], "in data_preprocessor alone")
    elif old and (len(values) != 2 or not same(values[0], values[1])):
        found.refuse("Normalize of training and test", values, "one each, the same")


def _annotations(step: Mapping[str, Any], settings: Mapping[str, Any], found: Findings, old: bool) -> dict[str, Any]:
    return {"with_mask": found.flag(step.get("with_mask", False), "train_pipeline.LoadAnnotations.with_mask")}


def _flip(step: Mapping[str, Any], settings: Mapping[str, Any], found: Findings, old: bool) -> dict[str, Any]:
    share = step.get("prob", step.get("flip_ratio", 0.0))
    if isinstance(share, bool) or not isinstance(share, (int, float)):
        found.refuse("train_pipeline.RandomFlip.prob", share, "one probability")
        return {}
    return {"flip": float(share)}


def _photometric(step: Mapping[str, Any], settings: Mapping[str, Any], found: Findings, old: bool) -> dict[str, Any]:
    return {"photometric": True}


def _pad(step: Mapping[str, Any], settings: Mapping[str, Any], found: Findings, old: bool) -> dict[str, Any]:
    size, side = step.get("size"), settings.get("long_side")
    if size is not None and not (settings.get("large_scale_jitter") and same(size, [side, side])):
        found.refuse("train_pipeline.Pad.size", size, "the largest image of the batch")
    return {}


def _crop(step: Mapping[str, Any], settings: Mapping[str, Any], found: Findings, old: bool) -> dict[str, Any]:
    side, kind = settings.get("long_side"), step.get("crop_type", "absolute")  # absolute_range: from side to side
    if not (settings.get("uncropped") and str(kind).startswith("absolute") and same(step.get("crop_size"), [side] * 2)):
        _refuse_crop(step, found, "behind ratio_range, of the same square, or in a RandomChoice")
    _say_crop(step, settings, found)
    return {"uncropped": False}


def _refuse_crop(step: Mapping[str, Any], found: Findings, here: str) -> None:
    kind, size = step.get("crop_type", "absolute"), step.get("crop_size")
    found.refused.append(f"train_pipeline.RandomCrop of {shown(kind)} {shown(size)} (here {here})")


def _say_crop(step: Mapping[str, Any], settings: Mapping[str, Any], found: Findings) -> None:
    path = "train_pipeline.RandomCrop"
    if step.get("allow_negative_crop", False) is not True:
        found.left_out.append(f"{path}.allow_negative_crop = False: parts without objects are trained on too")
    if settings.get("with_mask") and step.get("recompute_bbox") is True:
        found.left_out.append(f"{path}.recompute_bbox = True: a cut box is not drawn around what is left of its mask")


def _choice(step: Mapping[str, Any], settings: Mapping[str, Any], found: Findings, old: bool) -> dict[str, Any]:
    """RandomChoice (2.x: AutoAugment) of a resize, and of a resize, a crop and a resize: data.crop."""
    kind = word(step.get("type"))
    path = f"train_pipeline.{kind}"
    branches = [
        [as_dict(part) for part in as_list(branch)] for branch in as_list(step.get("transforms", step.get("policies")))
    ]
    shares = numbers(step["prob"]) if step.get("prob") is not None else (1.0,) * len(branches)
    if len(shares) != len(branches) or not branches or min(shares) < 0 or not sum(shares):
        found.refuse(f"{path}.prob", step.get("prob"), "a probability for each of its branches, at least one")
        return {}
    kinds = [[word(part.get("type")) for part in branch] for branch in branches]
    plain = [len(names) == 1 and names[0] in _RESIZES for names in kinds]
    cropped = [len(names) == 3 and {names[0], names[2]} <= {*_RESIZES} and names[1] == "RandomCrop" for names in kinds]
    if not all(a or b for a, b in zip(plain, cropped)):
        found.refuse(path, kinds, "resizes, and resize, RandomCrop and resize")
        return {}
    for part in (part for branch in branches for part in branch):
        found.check(part, f"train_pipeline.{word(part.get('type'))}", _STEPS[word(part.get("type"))])
    ends = [_resize(branch[-1], settings, found, old) for branch in branches]
    crops = [_before(branch, end, settings, found, old) for branch, end in zip(branches, ends) if len(branch) > 1]
    if any(end != ends[0] for end in ends) or any(crop != crops[0] for crop in crops):
        found.refused.append(f"{path} of resizes to different sizes")
    if ends[0].get("uncropped"):
        found.refused.append(f"{path} of ratio_range")
    share = sum(share for share, is_cropped in zip(shares, cropped) if is_cropped) / sum(shares)
    return ends[0] | (crops[0] | {"crop": share} if crops else {})


def _before(
    branch: list[dict[str, Any]], end: Mapping[str, Any], settings: Mapping[str, Any], found: Findings, old: bool
) -> dict[str, Any]:
    """The resize and the crop before the last resize, which gives ``end``."""
    first, crop, _ = branch
    before = _resize(first, {}, found, old)
    if before.get("short_side_mode", "choice") != "choice" or before.get("long_side") != end.get("long_side"):
        found.refuse(
            f"train_pipeline.{word(first.get('type'))} before RandomCrop",
            first.get("scales", first.get("scale", first.get("img_scale"))),
            "a choice of shorter sides, with the same longer side as behind it",
        )
    size = numbers(crop.get("crop_size"))
    if crop.get("crop_type", "absolute") != "absolute_range" or len(size) != 2:
        _refuse_crop(crop, found, "absolute_range, with smallest and largest side")
        return {}
    _say_crop(crop, settings, found)
    return {"crop_short_side": before.get("short_side", ()), "crop_range": (int(size[0]), int(size[1]))}


def _resize(step: Mapping[str, Any], settings: Mapping[str, Any], found: Findings, old: bool) -> dict[str, Any]:
    """Resize, RandomResize and RandomChoiceResize."""
    kind = word(step.get("type"))
    path = f"train_pipeline.{kind}"
    found.expect(step.get("keep_ratio", old), f"{path}.keep_ratio", True)
    given = next((step[key] for key in ("scale", "img_scale", "scales") if key in step), None)
    nested = isinstance(given, list) and any(isinstance(item, list) for item in given)
    pairs = [numbers(pair) for pair in (as_list(given) if nested else [given])]
    if not pairs or any(len(pair) != 2 for pair in pairs) or "short_side" in settings:
        found.refuse(path, given, "one step with (longer, shorter) scales")
        return {}
    ratios = numbers(step.get("ratio_range"))
    if ratios:
        side = int(pairs[0][0])
        if len(pairs) > 1 or len(set(pairs[0])) > 1 or len(ratios) != 2:
            found.refuse(f"{path}.ratio_range", step["ratio_range"], "of one square scale")
        return {"large_scale_jitter": ratios, "long_side": side, "short_side": (side,), "uncropped": True}
    longer, shorter = {int(max(pair)) for pair in pairs}, [int(min(pair)) for pair in pairs]
    if len(longer) > 1:
        found.refuse(path, given, "one longer side for all")
    result: dict[str, Any] = {"long_side": max(longer), "short_side": tuple(shorter)}
    chooses = kind == "RandomChoiceResize" or step.get("multiscale_mode") == "value"
    if len(set(shorter)) == 1:
        return result | {"short_side": (shorter[0],)}
    if not chooses:
        if len(shorter) > 2:
            found.refuse(path, given, "two ends of a range")
        return result | {"short_side": (min(shorter), max(shorter)), "short_side_mode": "range"}
    return result


_MAKERS: dict[str, Callable[[Mapping[str, Any], Mapping[str, Any], Findings, bool], dict[str, Any]]] = {
    "Resize": _resize,
    "RandomResize": _resize,
    "RandomChoiceResize": _resize,
    "RandomCrop": _crop,
    "RandomChoice": _choice,
    "AutoAugment": _choice,
    "LoadAnnotations": _annotations,
    "RandomFlip": _flip,
    "Pad": _pad,
    "PhotoMetricDistortion": _photometric,
}
