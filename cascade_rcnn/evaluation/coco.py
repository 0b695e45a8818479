"""COCO AP and AR for boxes and masks, computed by faster-coco-eval (equal to pycocotools).

On top of it: AP at each single IoU threshold, as in the paper; an empty list of results (all
0, where pycocotools stops); image ids of any kind; ground truth made from any reader's records.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cascade_rcnn.data.formats.write import coco_dict
from cascade_rcnn.data.masks import polygon_points
from cascade_rcnn.data.records import DataSplit
from cascade_rcnn.data.rle import rle_counts
from cascade_rcnn.errors import DataError
from cascade_rcnn.evaluation import read_results
from cascade_rcnn.evaluation.match_results import match_results
from cascade_rcnn.evaluation.metrics import Metrics
from cascade_rcnn.messages import few_names

IouType = Literal["bbox", "segm"]
IOUS = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))
_AREAS = ("all", "small", "medium", "large")


@dataclass
class CocoTable:
    """What the COCO evaluation gives before it is averaged; -1 where there is no ground truth.

    T IoU thresholds (``IOUS``), R 101 recall points, K classes, A areas (all, small, medium, large), M limits on the
    number of detections.
    """

    precision: NDArray[np.float64]  # [T, R, K, A, M]
    recall: NDArray[np.float64]  # [T, K, A, M]
    class_names: tuple[str, ...]
    limits: tuple[int, ...]  # [M], rising
    limit: int  # the one that AP uses

    def average_precision(
        self, *, iou: float | None = None, area: str = "all", name: str | None = None
    ) -> float | None:
        """Mean over IoU thresholds (or one), classes (or one); None without ground truth."""
        values = self.precision[:, :, :, _AREAS.index(area), self.limits.index(self.limit)]
        return _mean(values[self._at(iou)][:, :, self._of(name)])

    def average_recall(
        self, *, limit: int | None = None, iou: float | None = None, area: str = "all", name: str | None = None
    ) -> float | None:
        """Mean over IoU thresholds (or one), classes (or one), at most ``limit`` detections per image and class."""
        values = self.recall[:, :, _AREAS.index(area), self.limits.index(limit or self.limit)]
        return _mean(values[self._at(iou)][:, self._of(name)])

    def _at(self, iou: float | None) -> slice | list[int]:
        return slice(None) if iou is None else [IOUS.index(iou)]

    def _of(self, name: str | None) -> slice | list[int]:
        return slice(None) if name is None else [self.class_names.index(name)]


def evaluate_coco(
    truth: Path | dict[str, Any],
    results: Path | list[dict[str, Any]],
    *,
    iou_type: IouType,
    class_names: Sequence[str] | None = None,
    max_detections: int = 100,
    notes: list[str] | None = None,
) -> dict[str, float | None]:
    """COCO metrics of a results list against ``instances.json``, both from files or from memory (left unchanged).

    Returns, with ``bbox`` or ``segm`` in front: ``/AP /AP50 /AP75 /APs /APm /APl /AR1 /AR10 /AR100 /ARs /ARm /ARl``,
    ``/AP@0.50`` to ``/AP@0.95`` and ``/AP/CLASS``, in 0..1; None where there is no ground truth, with the reason
    appended to ``notes``. ``max_detections`` is the limit per image and class for AP and ARs/m/l (raise it for dense
    scenes; AR at it is added as ``/ARn``). ``class_names`` names the categories in the order of rising id, instead of
    the truth's own names. Raises ``DataError``.
    """
    table = coco_table(truth, results, iou_type=iou_type, class_names=class_names, max_detections=max_detections)
    return _metrics(table, iou_type, notes)


def evaluate_coco_files(truth: Path, results: Path, *, notes: list[str] | None = None) -> dict[str, float | None]:
    """``evaluate_coco`` for boxes and, where the results have masks, for masks, reading each file once."""
    notes = [] if notes is None else notes
    dataset, found = read_results.read_json(truth), read_results.read_json(results)
    found = match_results(found, dataset, str(results), str(truth), notes)
    annotations = dataset.get("annotations") if isinstance(dataset, dict) else None
    masked_truth = isinstance(annotations, list) and any(
        isinstance(one, dict) and one.get("segmentation") for one in annotations
    )
    entries = [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []
    masks = not entries or any("segmentation" in one for one in entries)
    boxes = not entries or not masks or any("bbox" in one for one in entries)  # neither: the box reader names the error
    if masks and not masked_truth:
        if entries:
            notes.append(f"{truth} has no masks: boxes only")
        boxes, masks = True, False
    metrics: dict[str, float | None] = {}
    for iou_type, wanted in (("bbox", boxes), ("segm", masks)):
        if wanted:
            table = _table((dataset, str(truth)), (found, str(results)), iou_type, None, 100)  # type: ignore[arg-type]
            metrics |= _metrics(table, iou_type, notes)
    return metrics


def _metrics(table: CocoTable, iou_type: str, notes: list[str] | None) -> dict[str, float | None]:
    metrics = {
        "AP": table.average_precision(),
        "AP50": table.average_precision(iou=0.5),
        "AP75": table.average_precision(iou=0.75),
    }
    metrics |= {f"AP{area[0]}": table.average_precision(area=area) for area in _AREAS[1:]}
    metrics |= {f"AR{limit}": table.average_recall(limit=limit) for limit in table.limits}
    metrics |= {f"AR{area[0]}": table.average_recall(area=area) for area in _AREAS[1:]}
    metrics |= {f"AP@{iou:.2f}": table.average_precision(iou=iou) for iou in IOUS}
    metrics |= {f"AP/{name}": table.average_precision(name=name) for name in table.class_names}
    if notes is not None:
        absent = [name for name in table.class_names if metrics[f"AP/{name}"] is None]
        if absent:
            notes.append(
                f"{iou_type}/AP/CLASS is undefined for classes without objects (other than crowds): "
                f"{few_names(sorted(absent))}; means leave them out"
            )
        bare = [key for key, value in metrics.items() if value is None and "/" not in key]
        if metrics["AP"] is None:
            notes.append(f"{iou_type}/*: the ground truth has no object that counts (none at all, or only crowds)")
        elif bare:
            notes.append(f"{iou_type}: no object of this size in the ground truth: {few_names(sorted(bare))} undefined")
    return {f"{iou_type}/{key}": value for key, value in metrics.items()}


def coco_table(
    truth: Path | dict[str, Any],
    results: Path | list[dict[str, Any]],
    *,
    iou_type: IouType,
    class_names: Sequence[str] | None = None,
    max_detections: int = 100,
) -> CocoTable:
    """The arrays behind ``evaluate_coco``; same arguments, same errors."""
    if max_detections < 1:
        raise DataError(f"max_detections {max_detections}: at least 1")
    named_truth = (read_results.read_json(truth), str(truth)) if isinstance(truth, Path) else (truth, "ground truth")
    named_results = (
        (read_results.read_json(results), str(results)) if isinstance(results, Path) else (results, "results")
    )
    return _table(named_truth, named_results, iou_type, class_names, max_detections)


def _table(
    truth: tuple[Any, str],
    results: tuple[Any, str],
    iou_type: IouType,
    class_names: Sequence[str] | None,
    max_detections: int,
) -> CocoTable:
    from faster_coco_eval import COCO, COCOeval_faster  # slow to import

    dataset, rows = own_truth(*truth, iou_type)
    names = _class_names(dataset["categories"], class_names)
    detections = _own_results(*results, rows, dataset, iou_type)
    coco = COCO(dataset)
    found = coco.loadRes(detections) if detections else COCO({**dataset, "annotations": []})
    evaluation = COCOeval_faster(coco, found, iouType=iou_type, print_function=_silent)
    limits = tuple(sorted({1, 10, 100, max_detections}))
    evaluation.params.maxDets = list(limits)
    evaluation.evaluate()
    evaluation.accumulate()
    shape = (len(IOUS), 101, len(names), len(_AREAS), len(limits))
    precision = np.asarray(evaluation.eval["precision"], np.float64).reshape(shape)
    recall = np.asarray(evaluation.eval["recall"], np.float64).reshape(shape[:1] + shape[2:])
    return CocoTable(precision, recall, names, limits, max_detections)


def _silent(*_: object) -> None:
    """The library's messages add nothing to the tables."""


def _mean(values: NDArray[np.float64]) -> float | None:
    known = values[values > -1]
    return float(np.mean(known)) if known.size else None


def own_truth(truth: Any, where: str, iou_type: IouType) -> tuple[dict[str, Any], dict[Hashable, int]]:
    """A checked copy with images numbered 1.. in the order of their ids and annotations numbered from 1 (the official
    matching takes an annotation id 0 for "not matched"), and the new number of each image id."""
    if not isinstance(truth, dict) or not all(isinstance(truth.get(key), list) for key in ("images", "categories")):
        raise DataError(f"{where}: not a COCO ground truth: it needs lists images, annotations and categories")
    if not isinstance(truth.get("annotations"), list):
        raise DataError(f"{where}: has no list of annotations: a test set without labels cannot be scored")
    try:
        images = {image["id"]: image for image in truth["images"]}
        if len(images) != len(truth["images"]):
            raise DataError(f"{where}: image ids are not unique: run `cascade-rcnn check`")
        rows: dict[Hashable, int] = {key: row for row, key in enumerate(_sorted(images), start=1)}
        known: dict[int, str] = {int(one["id"]): str(one.get("name", one["id"])) for one in truth["categories"]}
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{where}: an image or category without a proper id ({error}): add it") from error
    categories = [{"id": key, "name": known[key]} for key in sorted(known)]
    annotations = []
    for index, one in enumerate(truth["annotations"]):
        problem = _annotation_problem(one, rows, known, iou_type)
        if problem:
            raise DataError(f"{where}: annotation {index}: {problem}")
        box = [float(side) for side in one["bbox"]] if "bbox" in one else [0.0, 0.0, 0.0, 0.0]
        copy = {
            "id": index + 1,
            "image_id": rows[one["image_id"]],
            "category_id": one["category_id"],
            "bbox": box,
            "area": float(one["area"] if "area" in one else box[2] * box[3]),
            "iscrowd": int(one.get("iscrowd", 0)),
        }
        annotations.append(copy)
    try:
        sizes = [
            {"id": row, "height": int(images[key].get("height", 0)), "width": int(images[key].get("width", 0))}
            for key, row in rows.items()
        ]
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: an image whose height or width is not a number ({error}): correct it") from error
    if iou_type == "segm":
        _add_masks(annotations, truth["annotations"], sizes, where)
    return {"images": sizes, "annotations": annotations, "categories": categories}, rows


def _add_masks(own: list[dict[str, Any]], given: list[dict[str, Any]], sizes: list[dict[str, Any]], where: str) -> None:
    by_row = {image["id"]: (image["height"], image["width"]) for image in sizes}
    for index, (one, annotation) in enumerate(zip(own, given)):
        mask = annotation.get("segmentation")
        try:
            if isinstance(mask, list) and mask:
                if any(polygon_points(polygon) < 3 for polygon in mask):
                    raise ValueError("polygon of fewer than three points")
                one["segmentation"] = mask
            else:
                one["segmentation"] = _compressed(mask, *by_row[one["image_id"]])
        except (TypeError, ValueError) as error:
            raise DataError(f"{where}: annotation {index}: {error}: fix it or score boxes only") from error


def _sorted(ids: Mapping[Any, Any]) -> list[Any]:
    try:
        return sorted(ids)
    except TypeError:  # numbers and words in one file
        return sorted(ids, key=lambda one: (isinstance(one, str), str(one)))


def _annotation_problem(
    one: Any, rows: Mapping[Hashable, int], categories: Mapping[int, str], iou_type: IouType
) -> str | None:
    if not isinstance(one, dict) or "image_id" not in one or "category_id" not in one:
        return "has no image_id or no category_id"
    if one["image_id"] not in rows:
        return f"image_id {one['image_id']!r} is not among the images"
    if one["category_id"] not in categories:
        return f"category_id {one['category_id']!r} is not among the categories"
    try:
        values = [float(side) for side in one["bbox"]] if "bbox" in one or iou_type == "bbox" else [0.0] * 4
        values.append(float(one.get("area", 0)))
    except (KeyError, TypeError, ValueError):
        return "has no readable bbox [x, y, width, height] or area"
    return None if len(values) == 5 and all(map(math.isfinite, values)) else f"bbox {one.get('bbox')!r} is not finite"


def _class_names(categories: list[dict[str, Any]], class_names: Sequence[str] | None) -> tuple[str, ...]:
    if class_names is not None and len(class_names) != len(categories):
        raise DataError(
            f"{len(class_names)} class names for {len(categories)} categories of the ground truth: "
            "give one for each, in the order of their ids"
        )
    names = [one["name"] for one in categories] if class_names is None else list(class_names)
    return tuple(name if names.count(name) == 1 else f"{name} ({one['id']})" for name, one in zip(names, categories))


def _own_results(
    found: Any, where: str, rows: Mapping[Hashable, int], dataset: dict[str, Any], iou_type: IouType
) -> list[dict[str, Any]]:
    """Checked copies with only what ``iou_type`` needs: with a box in it, a mask's area would be taken from the box."""
    known = {one["id"] for one in dataset["categories"]}
    need_box = iou_type == "bbox"
    table = results_table(found, where, rows, known, need_box=need_box)
    own: list[dict[str, Any]] = [
        {"image_id": int(image), "category_id": int(category), "score": float(score)}
        for image, category, score in zip(table.images, table.categories, table.scores)
    ]
    if iou_type == "bbox":
        return [one | {"bbox": box} for one, box in zip(own, table.boxes.tolist())]
    sizes = {image["id"]: (image["height"], image["width"]) for image in dataset["images"]}
    for index, (one, given) in enumerate(zip(own, found)):
        try:
            one["segmentation"] = _compressed(given.get("segmentation"), *sizes[one["image_id"]])
        except (TypeError, ValueError) as error:
            raise DataError(f"{where}: detection {index}: {error}: encode the mask at the image's own size") from error
    return own


def results_table(
    found: Any, where: str, rows: Mapping[Hashable, int], categories: set[int], *, need_box: bool = True
) -> read_results.ResultTable:
    """A results list as arrays, with the row of each image; ``where`` is its file. Raises ``DataError``."""
    table = _faultless(found, rows, categories, need_box)
    if table is None:
        table = read_results.parse_results(found, name=where, images=rows, categories=categories, need_box=need_box)
    return table


def _faultless(
    found: Any, rows: Mapping[Hashable, int], known: set[int], need_box: bool
) -> read_results.ResultTable | None:
    """The table of a valid list, checked as arrays; None where ``parse_results`` must check entry by entry."""
    if not isinstance(found, list):
        return None
    try:
        images = np.array([rows[one["image_id"]] for one in found], np.int64)
        categories, scores = [one["category_id"] for one in found], [one["score"] for one in found]
        corners = list(chain.from_iterable(one["bbox"] for one in found)) if need_box else [0.0] * (4 * len(found))
        if {type(value) for value in chain(categories, scores, corners)} - {int, float}:
            return None
        boxes, values = np.array(corners, np.float64).reshape(len(found), 4), np.array(scores, np.float64)
        if not (known.issuperset(categories) and np.isfinite(boxes).all() and np.isfinite(values).all()):
            return None
        one_by_one = need_box and ((boxes[:, 2:] < 0).any() or any(len(one["bbox"]) != 4 for one in found))
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    return None if one_by_one else read_results.ResultTable(images, np.array(categories, np.int64), boxes, values)


def _compressed(mask: Any, height: int, width: int) -> dict[str, Any]:
    """An RLE for the library, which does not check it (runs beyond the image would be read past their end)."""
    if isinstance(mask, list) and mask:
        if any(polygon_points(polygon) < 3 for polygon in mask):
            raise ValueError("polygon of fewer than three points")
        from faster_coco_eval.core import mask as drawn

        outline: dict[str, Any] = drawn.merge(drawn.frPyObjects(mask, height, width))
        return outline
    if not isinstance(mask, dict):
        raise ValueError("segmentation is neither polygons nor an RLE {'size', 'counts'}")
    size = [int(side) for side in mask.get("size") or ()]
    runs = rle_counts({"size": size, "counts": mask.get("counts")}, height=height, width=width)
    if not isinstance(mask["counts"], list):
        return {"size": size, "counts": mask["counts"]}
    from faster_coco_eval.core import mask as rle  # slow to import

    packed: dict[str, Any] = rle.frPyObjects({"size": size, "counts": list(runs)}, height, width)
    return packed


def coco_truth(split: DataSplit) -> dict[str, Any]:
    """A COCO ground truth of a split's records, as ``evaluate_coco`` takes it.

    Image ids are the records' own, category ids the split's. ``iscrowd`` comes from the attribute of that name, else
    the records' ``ignore`` flags stand for it: such objects are ignored. Segmentations where present.
    """
    content = coco_dict(split, image_ids=[record.image_id for record in split.records])
    for number, one in enumerate(content["annotations"], start=1):
        one["id"] = number  # COCO's evaluation treats an object with the id 0 as none
        one.pop("ignore", None)
    return {key: content[key] for key in ("images", "annotations", "categories")}


def curve(metrics: Metrics, kind: str = "bbox") -> list[tuple[float, float | None]]:
    """(IoU threshold, AP) pairs for ``visualize.ap_by_iou_chart``."""
    return [(iou, metrics.get(f"{kind}/AP@{iou:.2f}")) for iou in IOUS]
