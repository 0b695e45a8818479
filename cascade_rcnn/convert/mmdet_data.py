"""mmdetection's data sets and pipelines, 2.x and 3.x, as fields of ``DataConfig``."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from cascade_rcnn.convert.config_text import test_steps
from cascade_rcnn.convert.config_values import as_dict, as_list, flag, numbers, same, word
from cascade_rcnn.convert.mmdet_findings import Findings, same_settings
from cascade_rcnn.messages import shown

# Steps of a training pipeline and their settings: values that mean what is done here, () for any value.
_ANY: tuple[Any, ...] = ()
_FILES = {"backend_args": _ANY, "file_client_args": _ANY, "imdecode_backend": _ANY}  # the last: _say_library
_STEPS: dict[str, dict[str, tuple[Any, ...]]] = {
    "LoadImageFromFile": {"to_float32": _ANY, "color_type": ("color",), **_FILES},
    "LoadAnnotations": {
        "with_bbox": (True,),
        "with_label": (True,),
        "with_mask": (True, False),
        "poly2mask": _ANY,
        "box_type": ("hbox",),
        "with_seg": (False,),
        **_FILES,
    },
    "Resize": {
        **dict.fromkeys(("scale", "img_scale", "ratio_range", "keep_ratio", "backend"), _ANY),
        "multiscale_mode": ("range", "value"),
        "override": (False, True),  # of a second one, behind a crop
    },
    "RandomResize": {"scale": _ANY, "ratio_range": _ANY, "keep_ratio": _ANY, "resize_type": ("Resize",)},
    "RandomChoiceResize": {"scales": _ANY, "keep_ratio": _ANY, "resize_type": ("Resize",)},
    "RandomChoice": {"transforms": _ANY, "prob": _ANY},
    "AutoAugment": {"policies": _ANY},
    "RandomCrop": {
        "crop_size": _ANY,
        "crop_type": ("absolute", "absolute_range"),
        "recompute_bbox": (True, False),
        "allow_negative_crop": (True, False),
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
        "keep_empty": (True,),  # which leaves out images without objects
        "by_box": (True,),
        "by_mask": (False,),
    },
    "Normalize": dict.fromkeys(("mean", "std", "to_rgb"), _ANY),
    "Pad": {"size_divisor": (32, 1), "size": _ANY, "pad_val": _ANY},
    "DefaultFormatBundle": {"img_to_float": _ANY, "pad_val": _ANY},
    "Collect": {"keys": _ANY, "meta_keys": _ANY},
    "PackDetInputs": {"meta_keys": _ANY},
}
# Steps that have a counterpart which a config cannot give: what to do instead.
_INSTEAD = {
    "Albu": "take the step out and give data.augment, a file with one Albumentations transform",
    "Albumentation": "take the step out and give data.augment, a file with one Albumentations transform",
    "CopyPaste": "take the step out and give data.copy_paste",
    "Mosaic": "take the step out and give data.mosaic",
}
_RESIZES = ("Resize", "RandomResize", "RandomChoiceResize")
# Data sets whose files are known here by what they are; of others nothing is known.
_DATASETS = (
    *("CocoDataset", "VOCDataset", "XMLDataset", "CityscapesDataset", "DeepFashionDataset", "Objects365V1Dataset"),
    *("Objects365V2Dataset", "WIDERFaceDataset", "CustomDataset", "BaseDetDataset"),
)
_PLACES = ("ann_file", "data_prefix", "img_prefix")  # in which joined data sets may differ
_DATASET = {
    **dict.fromkeys(("ann_file", "img_prefix", "data_root", "data_prefix", "pipeline", "filter_cfg", "metainfo"), _ANY),
    **dict.fromkeys(("classes", "filter_empty_gt", "backend_args", "file_client_args", "seg_prefix"), _ANY),
    **dict.fromkeys(("return_classes", "lazy_init", "serialize_data", "max_refetch", "img_subdir", "ann_subdir"), _ANY),
    **dict.fromkeys(("test_mode", "proposal_file"), (False, None)),
    "indices": (None,),
}
_OLD_LOADER = {  # of 2.x, since 2.20; class-aware sampling and the like are refused
    **dict.fromkeys(("samples_per_gpu", "workers_per_gpu", "persistent_workers", "pin_memory"), _ANY),
    "shuffle": (True,),
}
# Steps of a training pipeline of which a second one would do something else: refused.
_ONCE = ("LoadAnnotations", "RandomFlip", "PhotoMetricDistortion", "Normalize", "FilterAnnotations")


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
    if has_masks and flag(loads.get("with_mask")) is not True:
        found.refused.append("a mask head without masks (LoadAnnotations with_mask)")
    settings |= _pipeline(steps, found, old=old)
    _check_normalize(names, steps, found, old=old)
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
    dataset: Any = old.get("train") if old else loader.get("dataset")
    settings: dict[str, Any] = {}
    _check_loader(loader, found)
    _check_old_loader(old, found)
    parts, settings = _unwrapped(dataset, path, found)
    dataset = parts[0] if parts else {}
    for part in parts:
        found.check(part, path, _DATASET)
    kind = word(dataset.get("type"))
    if kind and kind not in _DATASETS:
        said = "as COCO's json, with a file_name for each image (LVIS 1 has coco_url), and evaluated by COCO's rules"
        said = said if kind.startswith("LVIS") else "by what the files are, not by this class (docs/data.md)"
        found.left_out.append(f"{path}.type = {shown(kind)}: read {said}")
    workers = loader.get("num_workers", old.get("workers_per_gpu"))
    workers = as_dict(old.get("train_dataloader")).get("workers_per_gpu", workers)
    if workers is not None:
        settings["workers"] = found.whole(workers, "num_workers", least=0)
    settings["keep_empty"] = not _drops_empty(dataset, bool(old), found)
    settings |= _places(names, parts, old, found)
    classes = as_dict(dataset.get("metainfo")).get("classes", dataset.get("classes"))
    if classes is not None:
        found.left_out.append(f"classes {shown(classes)}: the classes are those of the data's own files, all of them")
    return settings, dataset


def _unwrapped(dataset: Any, path: str, found: Findings) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The data sets inside RepeatDataset, ClassBalancedDataset and ConcatDataset, and what these set."""
    settings: dict[str, Any] = {}
    parts = [as_dict(part) for part in as_list(dataset)]  # a list: ConcatDataset of 2.x
    while len(parts) == 1 and ("dataset" in parts[0] or "datasets" in parts[0]):
        (wrapper,) = parts
        kind = word(wrapper.get("type"))
        if kind == "RepeatDataset":
            found.check(wrapper, f"{path}.{kind}", {"times": _ANY, "dataset": _ANY, "lazy_init": _ANY})
            times = found.whole(wrapper.get("times"), f"{path}.{kind}.times", least=1)
            settings["repeat"] = settings.get("repeat", 1) * times
        elif kind == "ClassBalancedDataset":
            known = {"oversample_thr": _ANY, "filter_empty_gt": (True,), "dataset": _ANY}
            found.check(wrapper, f"{path}.{kind}", known)
            settings["repeat_threshold"] = wrapper.get("oversample_thr")
            found.left_out.append(
                f"{path}.{kind}: how often an image comes is rounded up there, here at random, right on average"
            )
        elif kind == "ConcatDataset":
            known = {"datasets": _ANY, "ignore_keys": _ANY, "separate_eval": _ANY, "lazy_init": _ANY}
            found.check(wrapper, f"{path}.{kind}", known)
        else:
            found.refuse(f"{path}.type", kind, "one data set, RepeatDataset, ClassBalancedDataset, ConcatDataset")
        parts = [as_dict(part) for part in as_list(wrapper.get("datasets", wrapper.get("dataset")))]
    plain = [{key: value for key, value in part.items() if key not in _PLACES} for part in parts]
    if any(not same_settings(part, plain[0]) for part in plain):
        found.refused.append(f"{path}: data sets that differ in more than {', '.join(_PLACES)}")
    return parts, settings


def _check_loader(loader: Mapping[str, Any], found: Findings) -> None:
    known = dict.fromkeys(("batch_size", "num_workers", "persistent_workers", "dataset", "pin_memory"), _ANY)
    known |= dict.fromkeys(("sampler", "batch_sampler", "prefetch_factor", "timeout"), _ANY)
    known |= {"drop_last": (False,), "collate_fn": ({"type": "pseudo_collate"},)}
    found.check(loader, "train_dataloader", known)
    sampler, batches = as_dict(loader.get("sampler")), as_dict(loader.get("batch_sampler"))
    found.check(sampler, "train_dataloader.sampler", {"shuffle": (True,), "seed": _ANY, "round_up": (True,)})
    found.check(batches, "train_dataloader.batch_sampler", {"drop_last": (False,)})
    found.expect(word(as_dict(loader.get("sampler")).get("type")), "train_dataloader.sampler.type",
                 "DefaultSampler", "InfiniteSampler", "")  # fmt: skip
    found.expect(word(as_dict(loader.get("batch_sampler")).get("type")), "train_dataloader.batch_sampler.type",
                 "AspectRatioBatchSampler", "")  # fmt: skip


def _check_old_loader(data: Mapping[str, Any], found: Findings) -> None:
    known = dict.fromkeys(("samples_per_gpu", "imgs_per_gpu", "workers_per_gpu", "train", "val", "test"), _ANY)
    known |= dict.fromkeys(("train_dataloader", "val_dataloader", "test_dataloader", "persistent_workers"), _ANY)
    found.check(data, "data", known)
    found.check(as_dict(data.get("train_dataloader")), "data.train_dataloader", _OLD_LOADER)


def _drops_empty(dataset: Mapping[str, Any], old: bool, found: Findings) -> bool:
    rules = as_dict(dataset.get("filter_cfg"))
    found.check(rules, "filter_cfg", {"filter_empty_gt": (True, False), "min_size": _ANY, "bbox_min_size": _ANY})
    smallest = rules.get("min_size", 32 if old else 0)
    if smallest:
        found.left_out.append(f"filter_cfg.min_size = {shown(smallest)}: smaller images are used too")
    if rules.get("bbox_min_size"):
        found.left_out.append(
            f"filter_cfg.bbox_min_size = {shown(rules['bbox_min_size'])}: smaller objects are learnt too"
        )
    return bool(rules.get("filter_empty_gt", dataset.get("filter_empty_gt", old)))


def _places(
    names: Mapping[str, Any], parts: list[dict[str, Any]], old: Mapping[str, Any], found: Findings
) -> dict[str, Any]:
    """data.root, and the splits by the words in the names of their files."""
    settings: dict[str, Any] = {}
    dataset = parts[0] if parts else {}
    root = dataset.get("data_root") or names.get("data_root")
    if isinstance(root, str) and "://" not in root:
        settings["root"] = root.rstrip("/") or root
    else:
        found.left_out.append("the place of the data: give --data DIR")
    val = as_dict(old.get("val")) or as_dict(as_dict(names.get("val_dataloader")).get("dataset"))
    for split, sets in (("train", parts), ("val", [val])):
        files = [file for part in sets for file in map(str, as_list(part.get("ann_file", [])))]
        files = [file.removeprefix(str(root or "")) for file in files]
        words = [_split_of(file) for file in files]
        if words and all(words):
            settings[split] = "+".join(words)
        elif any(file and not word for file, word in zip(files, words)):
            found.left_out.append(f"{split} from {shown(' + '.join(files))}: name the split with --data.{split}")
    return settings


def _split_of(file: str) -> str:
    """The split's name here: VOC's lists by year, others by the last word that is one; "" where none is."""
    listed = re.search(r"(?:VOC(\d{4})/)?ImageSets/Main/(\w+)\.txt$", file)
    if listed:
        return f"{listed[1]}_{listed[2]}" if listed[1] else listed[2]
    words = re.findall(r"(?<![a-z])(train|valid|val|test|minival)(?![a-z])", file.lower())
    return words[-1] if words and words[-1] != "valid" else ""


# Pipelines


def _pipeline(steps: list[dict[str, Any]], found: Findings, *, old: bool) -> dict[str, Any]:
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


def _check_normalize(names: Mapping[str, Any], steps: list[dict[str, Any]], found: Findings, *, old: bool) -> None:
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
