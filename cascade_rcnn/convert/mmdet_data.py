"""mmdetection's data sets, 2.x and 3.x, as fields of ``DataConfig``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from cascade_rcnn.convert.config_values import as_dict, as_list, flag, same, word
from cascade_rcnn.convert.mmdet_findings import ANY, Findings, same_settings
from cascade_rcnn.convert.mmdet_pipeline import check_normalize, pipeline_settings
from cascade_rcnn.messages import shown

# Data sets whose files are known here by what they are; of others nothing is known.
_DATASETS = (
    *("CocoDataset", "VOCDataset", "XMLDataset", "CityscapesDataset", "DeepFashionDataset", "Objects365V1Dataset"),
    *("Objects365V2Dataset", "WIDERFaceDataset", "CustomDataset", "BaseDetDataset"),
)
_PLACES = ("ann_file", "data_prefix", "img_prefix")  # in which joined data sets may differ
_DATASET = {
    **dict.fromkeys(("ann_file", "img_prefix", "data_root", "data_prefix", "pipeline", "filter_cfg", "metainfo"), ANY),
    **dict.fromkeys(("classes", "filter_empty_gt", "backend_args", "file_client_args", "seg_prefix"), ANY),
    **dict.fromkeys(("return_classes", "lazy_init", "serialize_data", "max_refetch", "img_subdir", "ann_subdir"), ANY),
    **dict.fromkeys(("test_mode", "proposal_file"), (False, None)),
    "indices": (None,),
}
_OLD_LOADER = {  # of 2.x, since 2.20; class-aware sampling and the like are refused
    **dict.fromkeys(("samples_per_gpu", "workers_per_gpu", "persistent_workers", "pin_memory"), ANY),
    "shuffle": (True,),
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
    if has_masks and flag(loads.get("with_mask")) is not True:
        found.refused.append("a mask head without masks (LoadAnnotations with_mask)")
    settings |= pipeline_settings(steps, found, old=old)
    check_normalize(names, steps, found, old=old)
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
            found.check(wrapper, f"{path}.{kind}", {"times": ANY, "dataset": ANY, "lazy_init": ANY})
            times = found.whole(wrapper.get("times"), f"{path}.{kind}.times", least=1)
            settings["repeat"] = settings.get("repeat", 1) * times
        elif kind == "ClassBalancedDataset":
            known = {"oversample_thr": ANY, "filter_empty_gt": (True,), "dataset": ANY}
            found.check(wrapper, f"{path}.{kind}", known)
            settings["repeat_threshold"] = wrapper.get("oversample_thr")
            found.left_out.append(
                f"{path}.{kind}: how often an image comes is rounded up there, here at random, right on average"
            )
        elif kind == "ConcatDataset":
            known = {"datasets": ANY, "ignore_keys": ANY, "separate_eval": ANY, "lazy_init": ANY}
            found.check(wrapper, f"{path}.{kind}", known)
        else:
            found.refuse(f"{path}.type", kind, "one data set, RepeatDataset, ClassBalancedDataset, ConcatDataset")
        parts = [as_dict(part) for part in as_list(wrapper.get("datasets", wrapper.get("dataset")))]
    plain = [{key: value for key, value in part.items() if key not in _PLACES} for part in parts]
    if any(not same_settings(part, plain[0]) for part in plain):
        found.refused.append(f"{path}: data sets that differ in more than {', '.join(_PLACES)}")
    return parts, settings


def _check_loader(loader: Mapping[str, Any], found: Findings) -> None:
    known = dict.fromkeys(("batch_size", "num_workers", "persistent_workers", "dataset", "pin_memory"), ANY)
    known |= dict.fromkeys(("sampler", "batch_sampler", "prefetch_factor", "timeout"), ANY)
    known |= {"drop_last": (False,), "collate_fn": ({"type": "pseudo_collate"},)}
    found.check(loader, "train_dataloader", known)
    sampler, batches = as_dict(loader.get("sampler")), as_dict(loader.get("batch_sampler"))
    found.check(sampler, "train_dataloader.sampler", {"shuffle": (True,), "seed": ANY, "round_up": (True,)})
    found.check(batches, "train_dataloader.batch_sampler", {"drop_last": (False,)})
    found.expect(word(as_dict(loader.get("sampler")).get("type")), "train_dataloader.sampler.type",
                 "DefaultSampler", "InfiniteSampler", "")  # fmt: skip
    found.expect(word(as_dict(loader.get("batch_sampler")).get("type")), "train_dataloader.batch_sampler.type",
                 "AspectRatioBatchSampler", "")  # fmt: skip


def _check_old_loader(data: Mapping[str, Any], found: Findings) -> None:
    known = dict.fromkeys(("samples_per_gpu", "imgs_per_gpu", "workers_per_gpu", "train", "val", "test"), ANY)
    known |= dict.fromkeys(("train_dataloader", "val_dataloader", "test_dataloader", "persistent_workers"), ANY)
    found.check(data, "data", known)
    found.check(as_dict(data.get("train_dataloader")), "data.train_dataloader", _OLD_LOADER)


def _drops_empty(dataset: Mapping[str, Any], old: bool, found: Findings) -> bool:
    rules = as_dict(dataset.get("filter_cfg"))
    found.check(rules, "filter_cfg", {"filter_empty_gt": (True, False), "min_size": ANY, "bbox_min_size": ANY})
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
