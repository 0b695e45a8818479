"""Which id a data set gives an image of this name: read from its list of images, never made up.

Names are compared whole, then by their last parts (``val/a/1.jpg`` is ``a/1.jpg``), then by the file's name alone where
no other image has it. Two images never get one id.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from cascade_rcnn.data import files
from cascade_rcnn.errors import DataError
from cascade_rcnn.messages import printable, shown

ImageId = int | str


def coco_id(name: str) -> int | None:
    """The id that COCO itself writes into its files' names: 000000397133.jpg, COCO_val2014_000000397133.jpg."""
    match = re.fullmatch(r"(?:COCO_[a-z]+\d{4}_)?(\d{12})", PurePosixPath(name).stem, flags=re.ASCII)
    return int(match[1]) if match else None


def ids_by_name(names: Sequence[str]) -> dict[str, ImageId]:
    """The ids in COCO's own file names; none for names of other kinds, or an id that two names have."""
    ids = {name: number for name in names if (number := coco_id(name)) is not None}
    counts = Counter(ids.values())
    return {name: number for name, number in ids.items() if counts[number] == 1}


def read_image_ids(path: Path) -> dict[str, ImageId]:
    """Ids by file name from the ``images`` of a COCO json (instances or image_info) or of CityPersons' val_gt.json.

    Raises:
        DataError: another file, an image without name or id, a name or id that stands there twice.
    """
    if files.is_dir(path):
        raise DataError(f"{printable(path)}: is a folder; give the json file in it that lists the images")
    content = files.read_json(path)
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, list):
        raise DataError(f"{printable(path)}: has no list 'images'; give a COCO json such as image_info_test2017.json")
    found: dict[str, ImageId] = {}
    for place, image in enumerate(images):
        name, number = _name_and_id(image)
        if not isinstance(name, str) or type(number) not in (int, str):
            raise DataError(f"{printable(path)}: images[{place}] has no file_name or no id; complete it")
        if name in found:
            raise DataError(f"{printable(path)}: lists {shown(name)} twice, as {found[name]} and {number}; correct it")
        found[name] = number
    if len(set(found.values())) < len(found):
        raise DataError(f"{printable(path)}: two of its images have the same id; correct it")
    return found


def _name_and_id(image: Any) -> tuple[Any, Any]:
    if not isinstance(image, dict):
        return None, None
    return image.get("file_name", image.get("im_name")), image.get("id")


def match_names(names: Iterable[str], listed: Iterable[str], *, where: str) -> dict[str, str]:
    """The listed name that each of ``names`` means; those that mean none are left out.

    Raises:
        DataError: a name that fits several listed ones, or two names that fit the same; ``where`` is the list's file.
    """
    parts = {name: _parts(name) for name in listed}
    by_last: dict[str, list[str]] = defaultdict(list)
    for name, path in parts.items():
        by_last[path[-1]].append(name)
    found: dict[str, str] = {}
    taken: dict[str, str] = {}
    for name in dict.fromkeys(names):
        path = _parts(name)
        candidates = _closest(path, {one: parts[one] for one in by_last.get(path[-1], ())})
        if len(candidates) > 1:
            raise DataError(
                f"{where}: {shown(name)} fits {shown(candidates[0])} and {shown(candidates[1])}; "
                "name the images with their folders, as the list does"
            )
        for one in candidates:
            if one in taken:
                raise DataError(
                    f"{where}: {shown(taken[one])} and {shown(name)} both fit its image {shown(one)}; "
                    "leave out the one that is not meant"
                )
            found[name], taken[one] = one, name
    return found


def _parts(name: str) -> tuple[str, ...]:
    """Folders and file of a name, whatever system wrote it."""
    plain = unicodedata.normalize("NFC", name.replace("\\", "/"))
    return tuple(part for part in plain.split("/") if part not in ("", ".")) or ("",)


def _closest(path: tuple[str, ...], listed: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Of names with the same last part the longest that agrees to the end of the shorter one; where none does, all."""
    agreeing = {
        name: min(len(path), len(other))
        for name, other in listed.items()
        if path[-min(len(path), len(other)) :] == other[-min(len(path), len(other)) :]
    }
    exact = [name for name in agreeing if listed[name] == path]
    if exact or not agreeing:
        return exact or list(listed)
    return [name for name, length in agreeing.items() if length == max(agreeing.values())]
