"""mmdetection's data sets and pipelines, 2.x and 3.x, as fields of ``DataConfig``."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from cascade_rcnn.convert.config_text import as_dict, as_list, numbers, same
from cascade_rcnn.convert.mmdet_findings import Findings, word
from cascade_rcnn.messages import shown

# Steps of a training pipeline and their settings: values that mean what is done here, () for any value.
_ANY: tuple[Any, ...] = ()
_FILES = {"backend_args": _ANY, "file_client_args": _ANY, "imdecode_backend": _ANY}
_STEPS: dict[str, dict[str, tuple[Any, ...]]] = {
    "LoadImageFromFile": {"to_float32": _ANY, "color_type": ("color",), **_FILES},
    "LoadAnnotations": {
        **dict.fromkeys(("with_bbox", "with_label", "with_mask", "poly2mask", "box_type"), _ANY),
        "with_seg": (False,),
        **_FILES,
    },
    "Resize": {
        **dict.fromkeys(("scale", "img_scale", "ratio_range", "keep_ratio", "backend"), _ANY),
        "multiscale_mode": ("range", "value"),
        "override": (False,),
    },
    "RandomResize": {"scale": _ANY, "ratio_range": _ANY, "keep_ratio": _ANY, "resize_type": ("Resize",)},
    "RandomChoiceResize": {"scales": _ANY, "keep_ratio": _ANY, "resize_type": ("Resize",)},
    "RandomCrop": {
        "crop_size": _ANY,
        "crop_type": ("absolute", "absolute_range"),
        "recompute_bbox": (True,),
        "allow_negative_crop": (True,),
        "bbox_clip_border": (True,),
    },
    "RandomFlip": {"prob": _ANY, "flip_ratio": _ANY, "direction": ("horizontal", ["horizontal"])},
    "PhotoMetricDistortion": {
        "brightness_delta": (32,),
        "contrast_range": ([0.5, 1.5],),
        "saturation_range": ([0.5, 1.5],),
        "hue_delta": (18,),
    },
    "FilterAnnotations": {
        "min_gt_bbox_wh": ([0.01, 0.01], [1, 1]),
        "keep_empty": _ANY,
        "by_box": (True,),
        "by_mask": (False,),
    },
    "Normalize": dict.fromkeys(("mean", "std", "to_rgb"), _ANY),
    "Pad": {"size_divisor": (32, 1), "size": _ANY, "pad_val": _ANY},
    "DefaultFormatBundle": {"img_to_float": _ANY, "pad_val": _ANY},
    "Collect": {"keys": _ANY, "meta_keys": _ANY},
    "PackDetInputs": {"meta_keys": _ANY},
}
_DATASET = {
    **dict.fromkeys(("ann_file", "img_prefix", "data_root", "data_prefix", "pipeline", "filter_cfg", "metainfo"), _ANY),
    **dict.fromkeys(("classes", "filter_empty_gt", "backend_args", "file_client_args", "seg_prefix"), _ANY),
    **dict.fromkeys(("return_classes", "lazy_init", "serialize_data", "max_refetch", "img_subdir", "ann_subdir"), _ANY),
    **dict.fromkeys(("test_mode", "proposal_file"), (False, None)),
    "indices": (None,),
}


def data_settings(
    names: Mapping[str, Any], test: Mapping[str, Any], has_masks: bool, found: Findings
) -> dict[str, Any]:
    """Fields of DataConfig; ``test`` are the short_side and long_side of the test pipeline."""
    settings, dataset = _train_set(names, found)
    old = "data" in names
    steps = [as_dict(step) for step in as_list(dataset.get("pipeline") or names.get("train_pipeline"))]
    if not steps:
        found.refused.append("a training without train_dataloader.dataset.pipeline (2.x: data.train.pipeline)")
    loads = next((step for step in steps if word(step.get("type")) == "LoadAnnotations"), {})
    if has_masks and loads.get("with_mask") is not True:
        found.refused.append("a mask head without masks (LoadAnnotations with_mask)")
    settings |= _pipeline(steps, found, old=old)
    _check_augments(as_dict(as_dict(names.get("model")).get("data_preprocessor")), settings, found)
    return settings | _test_size(settings, test, found)


def _check_augments(preprocessor: Mapping[str, Any], settings: Mapping[str, Any], found: Findings) -> None:
    """batch_augments: padding to the square of large-scale jitter is done here; nothing else is."""
    side = settings.get("long_side") if settings.get("large_scale_jitter") else None
    for part in map(as_dict, as_list(preprocessor.get("batch_augments"))):
        kind, path = word(part.get("type")), "data_preprocessor.batch_augments"
        if kind != "BatchFixedSizePad":
            found.refuse(f"{path}.type", kind)
        elif not same(part.get("size"), [side, side]):
            found.left_out.append(f"{path}: padding to {shown(part.get('size'))}")


def _test_size(settings: Mapping[str, Any], test: Mapping[str, Any], found: Findings) -> dict[str, Any]:
    if not test or "short_side" not in settings:
        return {}
    (short,), long = test["short_side"], test["long_side"]
    if settings.get("large_scale_jitter"):
        if (short, long) != (settings["long_side"],) * 2:
            side = settings["long_side"]
            found.left_out.append(f"test_pipeline: images of {short} x {long} (here {side} x {side}, as in training)")
        return {}
    if long != settings["long_side"]:
        found.refuse("test_pipeline: a longer side", long, "data.long_side is one for training and test")
    return {} if short == max(settings["short_side"]) else {"test_short_side": short}


# Data sets


def _train_set(names: Mapping[str, Any], found: Findings) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings of where the data is, and the innermost training set."""
    loader, old = as_dict(names.get("train_dataloader")), as_dict(names.get("data"))
    path = "data.train" if old else "train_dataloader.dataset"
    dataset = as_dict(old.get("train") if old else loader.get("dataset"))
    settings: dict[str, Any] = {}
    if old and isinstance(old.get("train"), list):
        found.refused.append("data.train of several data sets")
    while word(dataset.get("type")) == "RepeatDataset":
        times = dataset.get("times", 1)
        settings["repeat"] = settings.get("repeat", 1) * (times if isinstance(times, int) else 1)
        dataset = as_dict(dataset.get("dataset"))
    if "dataset" in dataset or "datasets" in dataset:
        found.refuse(f"{path}.type", word(dataset.get("type")), "one data set, or RepeatDataset")
        return settings, as_dict(dataset.get("dataset"))
    found.check(dataset, path, _DATASET)
    _check_loader(loader, found)
    workers = loader.get("num_workers", old.get("workers_per_gpu"))
    if isinstance(workers, int):
        settings["workers"] = workers
    settings["keep_empty"] = not _drops_empty(dataset, bool(old), found)
    settings |= _places(names, dataset, old, found)
    classes = as_dict(dataset.get("metainfo")).get("classes", dataset.get("classes"))
    if classes is not None:
        found.left_out.append(f"classes {shown(classes)}: the classes are those of the data's own files, all of them")
    return settings, dataset


def _check_loader(loader: Mapping[str, Any], found: Findings) -> None:
    known = dict.fromkeys(("batch_size", "num_workers", "persistent_workers", "dataset", "pin_memory"), _ANY)
    known |= dict.fromkeys(("sampler", "batch_sampler", "drop_last", "collate_fn", "prefetch_factor", "timeout"), _ANY)
    found.check(loader, "train_dataloader", known)
    found.expect(word(as_dict(loader.get("sampler")).get("type")), "train_dataloader.sampler.type",
                 "DefaultSampler", "InfiniteSampler", "")  # fmt: skip
    found.expect(word(as_dict(loader.get("batch_sampler")).get("type")), "train_dataloader.batch_sampler.type",
                 "AspectRatioBatchSampler", "")  # fmt: skip


def _drops_empty(dataset: Mapping[str, Any], old: bool, found: Findings) -> bool:
    rules = as_dict(dataset.get("filter_cfg"))
    found.check(rules, "filter_cfg", {"filter_empty_gt": (True, False), "min_size": _ANY, "bbox_min_size": (None,)})
    smallest = rules.get("min_size", 32 if old else 0)
    if smallest:
        found.left_out.append(f"filter_cfg.min_size = {shown(smallest)}: smaller images are used too")
    return bool(rules.get("filter_empty_gt", dataset.get("filter_empty_gt", old)))


def _places(
    names: Mapping[str, Any], dataset: Mapping[str, Any], old: Mapping[str, Any], found: Findings
) -> dict[str, Any]:
    """data.root, and the splits by the words in the names of their files."""
    settings: dict[str, Any] = {}
    root = dataset.get("data_root") or names.get("data_root")
    if isinstance(root, str) and "://" not in root:
        settings["root"] = root.rstrip("/") or root
    else:
        found.left_out.append("the place of the data: give --data DIR")
    val = as_dict(old.get("val")) or as_dict(as_dict(names.get("val_dataloader")).get("dataset"))
    for split, part in (("train", dataset), ("val", val)):
        file = str(part.get("ann_file", "")).removeprefix(str(root or ""))
        words = re.findall(r"(?<![a-z])(train|valid|val|test|minival)(?![a-z])", file.lower())
        if words and words[-1] != "valid":
            settings[split] = words[-1]
        elif file and not words:
            found.left_out.append(f"{split} from {shown(file)}: name the split with --data.{split}")
    return settings


# Pipelines


def _pipeline(steps: list[dict[str, Any]], found: Findings, *, old: bool) -> dict[str, Any]:
    settings: dict[str, Any] = {"flip": 0.0}
    for step in steps:
        kind = word(step.get("type"))
        if kind not in _STEPS:
            found.refused.append(f"train_pipeline: a step {shown(kind)}")
            continue
        found.check(step, f"train_pipeline.{kind}", _STEPS[kind])
        if kind in _MAKERS:
            settings |= _MAKERS[kind](step, settings, found, old)
    if settings.pop("uncropped", False):
        found.refused.append("train_pipeline: ratio_range without a RandomCrop of the same size behind it")
    if "short_side" not in settings and not any("step" in said for said in found.refused):
        found.refused.append("train_pipeline: no step that resizes to a (longer, shorter) scale")
    return settings


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
    side = settings.get("long_side")
    if not settings.get("uncropped") or not same(step.get("crop_size"), [side, side]):
        found.refuse("train_pipeline.RandomCrop", step.get("crop_size"), "only behind ratio_range, of the same square")
    return {"uncropped": False}


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
    "RandomFlip": _flip,
    "Pad": _pad,
    "PhotoMetricDistortion": _photometric,
}
