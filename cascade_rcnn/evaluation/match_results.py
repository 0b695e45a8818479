"""Results that name their file and class (``predictions.json``): names are used instead of ids.

``image_id`` and ``category_id`` of such results are those of another data set, or none at all; where they happen to
exist in the truth too, scoring by them would compare one image with another.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cascade_rcnn.data.image_ids import match_names
from cascade_rcnn.errors import DataError
from cascade_rcnn.messages import few_names, shown

_ENOUGH = 20  # boxes that a coding is judged by


def match_results(found: Any, dataset: Any, where: str, truth: str, notes: list[str]) -> Any:
    """A results list with the truth's own ``image_id`` and ``category_id`` by ``file_name`` and ``category``.

    Lists without names, and anything that is no results list, are returned unchanged: the checks of ids report
    what is wrong. ``notes`` gets a line on what was matched.

    Raises:
        DataError: a name that is not in the truth, or that fits several images.
    """
    if not isinstance(found, list) or not found or not all(isinstance(one, dict) for one in found):
        return found
    if not isinstance(dataset, dict):
        return found
    found = _with_image_ids(found, dataset, where, truth, notes)
    _refuse_corners(found, dataset, where)
    return _with_category_ids(found, dataset, where, truth, notes)


def _refuse_corners(found: list[dict[str, Any]], dataset: dict[str, Any], where: str) -> None:
    """Boxes written as corners would score next to nothing without a word."""
    images = dataset.get("images")
    entries = [one for one in images if isinstance(one, dict)] if isinstance(images, list) else []
    sizes = {
        str(one.get("id")): (one["width"], one["height"])
        for one in entries
        if all(type(one.get(side)) in (int, float) for side in ("width", "height"))
    }
    rows = [
        (*one["bbox"], *sizes[str(one["image_id"])])
        for one in found
        if str(one.get("image_id")) in sizes and _is_box(one.get("bbox"))
    ]
    if len(rows) < _ENOUGH:
        return
    table = np.array(rows, dtype=np.float64)
    low, high, size = table[:, :2], table[:, 2:4], table[:, 4:]
    beyond = (low + high > size + 1).any(axis=1)
    fits = (high > low).all(axis=1) & (high <= size + 1).all(axis=1)
    if beyond.mean() >= 0.25 and fits.mean() >= 0.95:
        raise DataError(
            f"{where}: {int(beyond.sum())} of {len(rows)} boxes leave their image as x, y, width, height, and nearly "
            f"all fit as corners, e.g. {shown(found[0].get('bbox'))}: write x, y, width, height"
        )


def _is_box(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(type(number) in (int, float) for number in value)


def _with_image_ids(
    found: list[dict[str, Any]], dataset: dict[str, Any], where: str, truth: str, notes: list[str]
) -> list[dict[str, Any]]:
    images = dataset.get("images")
    entries = [one for one in images if isinstance(one, dict)] if isinstance(images, list) else []
    pairs = [(one.get("file_name", one.get("im_name")), one.get("id")) for one in entries]
    listed = {name: number for name, number in pairs if isinstance(name, str)}
    named = [one for one in found if isinstance(one.get("file_name"), str)]
    if not named or not listed:  # without names on either side, ids must do
        return found
    if len(listed) < len(pairs):
        notes.append(f"{truth}: not every image has a file_name of its own, so image_id was used, not file_name")
        return found
    if len(named) < len(found):
        raise DataError(f"{where}: {len(found) - len(named)} of {len(found)} results have no 'file_name': add it")
    matched = match_names((one["file_name"] for one in named), listed, where=truth)
    strange = next((one["file_name"] for one in named if one["file_name"] not in matched), None)
    if strange is not None:
        raise DataError(
            f"{where}: image {shown(strange)} is not in {truth}, whose first image is {shown(next(iter(listed)))}: "
            "give the truth of the images that were predicted, or predict on the images of this truth"
        )
    ids = {name: listed[one] for name, one in matched.items()}
    other = sum(one.get("image_id", ids[one["file_name"]]) != ids[one["file_name"]] for one in named)
    notes.append(
        f"results matched by file_name: {len(matched)} of the {len(listed)} images of the truth have some"
        + (f"; {other} of {len(named)} results had another image_id, which was not used" if other else "")
    )
    return [one | {"image_id": ids[one["file_name"]]} for one in named]


def _with_category_ids(
    found: list[dict[str, Any]], dataset: dict[str, Any], where: str, truth: str, notes: list[str]
) -> list[dict[str, Any]]:
    categories = dataset.get("categories")
    entries = [one for one in categories if isinstance(one, dict)] if isinstance(categories, list) else []
    ids = {one["name"]: one["id"] for one in entries if isinstance(one.get("name"), str) and "id" in one}
    words = [one.get("category") for one in found]
    if not all(isinstance(word, str) for word in words) or len(ids) < len(entries) or not ids:
        return found
    names = set(map(str, words))
    strange = sorted(name for name in names if name not in ids)
    if not strange:
        other = sum(one.get("category_id") != ids[one["category"]] for one in found)
        if other:
            notes.append(f"classes matched by name; {other} of {len(found)} results had another category_id")
        return [one | {"category_id": ids[one["category"]]} for one in found]
    if len(strange) < len(names):
        raise DataError(
            f"{where}: class {shown(strange[0])} is not in {truth}, which has {few_names(ids)}: "
            "rename it there, or take these results out"
        )
    notes.append(f"no class of the results is in the truth by name ({shown(strange[0])}, ...): category_id was used")
    return found
