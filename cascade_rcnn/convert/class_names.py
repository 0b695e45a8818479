"""Names and ids of a converted checkpoint's classes: given, from its metadata, COCO's, or numbers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cascade_rcnn.errors import CheckpointError
from cascade_rcnn.messages import one_line, printable, shown

# Names of COCO's category ids 1..90; "-" where an id was never used.
_COCO_90_TEXT = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,-,stop sign,"
    "parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,-,backpack,umbrella,-,-,"
    "handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,"
    "surfboard,tennis racket,bottle,-,wine glass,cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,"
    "carrot,hot dog,pizza,donut,cake,chair,couch,potted plant,bed,-,dining table,-,-,toilet,-,tv,laptop,mouse,"
    "remote,keyboard,cell phone,microwave,oven,toaster,sink,refrigerator,-,book,clock,vase,scissors,teddy bear,"
    "hair drier,toothbrush"
)
_COCO_90 = tuple(_COCO_90_TEXT.split(","))
COCO_IDS = tuple(number for number, name in enumerate(_COCO_90, 1) if name != "-")
COCO_NAMES = tuple(name for name in _COCO_90 if name != "-")
_EXPORTED = (".onnx", ".xml", ".pt2")


@dataclass(frozen=True)
class Classes:
    """Names in the order of the outputs, and the category ids of results."""

    names: tuple[str, ...]
    ids: tuple[int, ...]


def read_classes(names: Sequence[str], file: Path | None) -> Classes | None:
    """Classes given by hand or in a file; None for neither.

    ``file``: names line by line (.txt, .names), COCO's json (its ids too) or a json list, data.yaml of YOLO, or a
    checkpoint of this program. Raises CheckpointError for both at once, no names, or a name twice.
    """
    if names and file is not None:
        raise CheckpointError("--classes and --classes-from both name the classes: give one of them")
    if file is not None:
        found = _read_file(file)
    elif names:
        found = _numbered(tuple(names))
    else:
        return None
    twice = [name for name in found.names if found.names.count(name) > 1]
    if twice or not all(name.strip() for name in found.names):
        reason = f"the class {shown(twice[0])} is there twice" if twice else "a class without a name"
        raise CheckpointError(f"{file or '--classes'}: {reason}: name each class once")
    return found


def _numbered(names: tuple[str, ...]) -> Classes:
    return Classes(names, COCO_IDS if names == COCO_NAMES else tuple(range(1, len(names) + 1)))


def _read_file(path: Path) -> Classes:
    if path.suffix == ".safetensors":
        from cascade_rcnn.checkpoint import load_checkpoint

        checkpoint = load_checkpoint(path)
        return Classes(tuple(checkpoint.class_names), tuple(checkpoint.category_ids))
    if path.suffix in _EXPORTED:
        raise CheckpointError(f"{printable(path)}: is an exported network; give the checkpoint that it was made from")
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":
            return _from_content(json.loads(text))
        if path.suffix in (".yaml", ".yml"):
            import yaml  # type: ignore[import-untyped]

            return _from_content(yaml.safe_load(text))
    except (OSError, ValueError, CheckpointError) as error:
        raise CheckpointError(f"{path}: no class names could be read ({one_line(error)[:100]})") from error
    except Exception as error:  # of PyYAML
        raise CheckpointError(f"{path}: no class names could be read ({one_line(error)[:100]})") from error
    lines = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not lines:
        raise CheckpointError(f"{path}: no class names in it: write one in each line")
    return _numbered(lines)


def _from_content(content: Any) -> Classes:
    """COCO's ``categories``, YOLO's ``names`` (a list, or by number), or a plain list."""
    found = content.get("categories", content.get("names")) if isinstance(content, dict) else content
    if isinstance(found, dict) and found:
        return _numbered(tuple(str(found[key]) for key in sorted(found, key=int)))
    if isinstance(found, list) and found and all(isinstance(item, str) for item in found):
        return _numbered(tuple(found))
    if (
        isinstance(found, list)
        and found
        and all(isinstance(item, dict) and {"id", "name"} <= set(item) for item in found)
    ):
        rows = sorted((int(item["id"]), str(item["name"])) for item in found)  # both libraries sort by id
        return Classes(tuple(name for _, name in rows), tuple(number for number, _ in rows))
    raise CheckpointError("neither COCO's categories, nor names, nor a list of names")


def choose_classes(given: Classes | None, in_file: tuple[str, ...], number: int, notes: list[str]) -> Classes:
    """The classes of ``number`` outputs: ``given`` ones, else those ``in_file``, else COCO's or numbers."""
    if given is not None:
        if len(given.names) != number:
            raise CheckpointError(
                f"{len(given.names)} classes were given and the network has {number} outputs beside background: give "
                f"{number} names, in the order in which it was trained"
            )
        notes.append(f"class names: {_few(given.names)} (as given)")
        return given
    if len(in_file) == number - 1 and number > 2:
        raise CheckpointError(
            f"it has {number + 1} class outputs for {len(in_file)} names ({_few(in_file)}): no counterpart here for "
            f"heads with one for objectness (seesaw loss); if it knows {number} classes, name them with --classes"
        )
    twice = [name for name in in_file if in_file.count(name) > 1]
    if twice and len(in_file) <= number:
        raise CheckpointError(
            f"its metadata names the class {shown(twice[0])} twice, and classes are told apart by name: give {number} "
            "names, in the order in which it was trained, with --classes"
        )
    if 0 < len(in_file) < number:
        spare = number - len(in_file)
        notes.append(f"class names: its metadata ({_few(in_file)}); {spare} further outputs are named unused")
        return _numbered((*in_file, *(f"unused {k}" for k in range(len(in_file) + 1, number + 1))))
    if len(in_file) == number:
        notes.append(f"class names: its metadata ({_few(in_file)})")
        return _numbered(in_file)
    unusable = f"its metadata has {len(in_file)} names for {number} classes; " if in_file else ""
    where = f"{unusable}none in the file; --classes or --classes-from names them"
    if number == len(COCO_NAMES):
        notes.append(f"class names: assumed to be COCO's ({where})")
        return _numbered(COCO_NAMES)
    if number == len(_COCO_90):
        notes.append(f"class names: assumed to be COCO's 90 ids, ten unused ({where})")
        return _numbered(tuple(f"unused {k}" if name == "-" else name for k, name in enumerate(_COCO_90, 1)))
    notes.append(f"class names: class 1 .. class {number} ({where})")
    return _numbered(tuple(f"class {k}" for k in range(1, number + 1)))


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
