"""Ids of images by their names: from a list, whole names before last parts, never one for two."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from cascade_rcnn.data.image_ids import coco_id, match_names, read_image_ids
from cascade_rcnn.errors import DataError


def test_only_cocos_own_names_hold_an_id() -> None:
    assert coco_id("val/000000000139.jpg") == 139 and coco_id("COCO_train2014_000000000009.jpg") == 9
    for name in ("1.jpg", "cat_1.jpg", "0000000001390.jpg", "img_000000000139.jpg", "٠٠٠٠٠٠٠٠٠٠٠١.jpg"):
        assert coco_id(name) is None


def test_names_are_matched_by_as_many_parts_as_both_have() -> None:
    listed = ("1.jpg", "x/1.jpg", "y/z/2.jpg", "f\u00fcnf.jpg")
    found = match_names(
        ("x\\1.jpg", "./1.jpg", "z/2.jpg", unicodedata.normalize("NFD", "f\u00fcnf.jpg")), listed, where="t"
    )
    assert list(found.values()) == ["x/1.jpg", "1.jpg", "y/z/2.jpg", "f\u00fcnf.jpg"]
    assert match_names(("deep/x/1.jpg", "other/2.jpg", "3.jpg"), listed, where="t") == {
        "deep/x/1.jpg": "x/1.jpg",
        "other/2.jpg": "y/z/2.jpg",
    }


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([], "no list 'images'"),
        ({"images": [{"id": 1}]}, r"images\[0\] has no file_name"),
        ({"images": [{"file_name": "a"}]}, r"images\[0\]"),
        ({"images": [{"file_name": "a", "id": 1}, {"file_name": "a", "id": 2}]}, "lists 'a' twice, as 1 and 2"),
        ({"images": [{"file_name": "a", "id": 1}, {"file_name": "b", "id": 1}]}, "the same id"),
    ],
)
def test_a_list_that_gives_no_ids_is_refused(content: Any, words: str, tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=words):
        read_image_ids(tmp_path / "list.json")
    with pytest.raises(DataError, match="is a folder"):
        read_image_ids(tmp_path)


def test_lists_of_coco_and_of_citypersons(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"images": [{"file_name": "a.jpg", "id": 5}], "annotations": []}))
    (tmp_path / "b.json").write_text(json.dumps({"images": [{"im_name": "b.png", "id": 1, "height": 1024}]}))
    assert read_image_ids(tmp_path / "a.json") == {"a.jpg": 5} and read_image_ids(tmp_path / "b.json") == {"b.png": 1}
