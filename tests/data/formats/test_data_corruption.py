"""Whatever stands in an annotation file, readers give sound records or a ``DataError`` of one line, nothing else."""

from __future__ import annotations

import json
import ntpath
import os
import shutil
import tempfile
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import scenes
from cascade_rcnn.check.dataset import check_dataset
from cascade_rcnn.data import files
from cascade_rcnn.data.formats.open import open_split, recognise
from cascade_rcnn.data.records import DataSplit
from cascade_rcnn.errors import DataError

_ANNOTATION = {
    "coco": "annotations/instances_train.json",
    "voc": "Annotations/a.xml",
    "kitti": "training/label_2/a.txt",
    "citypersons": "annotations/anno_train.mat",
    "widerface": "wider_face_split/wider_face_train_bbx_gt.txt",
    "yolo": "labels/train/a.txt",
}
_LIST = {"voc": "ImageSets/Main/train.txt", "kitti": "ImageSets/train.txt", "yolo": "data.yaml"}
_HOSTILE = [
    b"NaN",
    b"nan",
    b"Infinity",
    b"-1",
    b"1e400",
    b"9" * 5000,
    b"../../../etc/passwd",
    b"\x00",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\r\n",
    b"\r",
    b"[" * 3000,
    b"<!DOCTYPE a [<!ENTITY b 'c'>]>",
    b"&b;",
    b"\xe9",
    b'"',
    b"{",
    b"null",
    b"{}",
    b"[]",
    b"\\ud800",
    b"0 0 0 0 0",
    b"&a *a",
    b"!!python/object:os.system",
    b" ",
    b"\n\n",
]
_FEW = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def _is_sound(split: DataSplit, root: Path) -> None:
    for record in split.records:
        count = len(record.boxes)
        assert record.boxes.shape == (count, 4) and record.boxes.dtype == np.float64
        assert np.isfinite(record.boxes).all() and (record.boxes[:, 2:] > record.boxes[:, :2]).all()
        assert record.labels.shape == record.ignore.shape == record.areas.shape == (count,)
        assert ((record.labels >= 0) & (record.labels < max(1, len(split.class_names)))).all()
        assert np.isfinite(record.areas).all() and record.height >= 0 and record.width >= 0
        assert record.segmentations is None or len(record.segmentations) == count
        assert all(len(values) == count for values in record.attributes.values())
        assert str(record.path).startswith(f"{root}{os.sep}") and ".." not in record.path.parts


def _read_all_ways(root: Path) -> None:
    for strict in (True, False):
        try:
            _is_sound(open_split(root, "train", strict=strict), root)
        except DataError as error:
            assert str(error) and "\n" not in str(error) and str(root) in str(error), str(error)
    try:
        check_dataset(root)
    except DataError as error:
        assert "\n" not in str(error)


_TEMPLATES = Path(tempfile.mkdtemp(prefix="corruption_"))


@pytest.fixture(scope="module", autouse=True)
def _templates() -> Any:
    for name, write in scenes.WRITERS.items():
        write(_TEMPLATES / name)
    yield
    shutil.rmtree(_TEMPLATES)


def _try_bytes(name: str, file: str, content: bytes) -> None:
    path = _TEMPLATES / name / file
    whole = path.read_bytes()
    try:
        path.write_bytes(content)
        _read_all_ways(_TEMPLATES / name)
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize(("name", "file"), [*_ANNOTATION.items(), *_LIST.items()])
@_FEW
@given(data=st.data())
def test_random_damage_to_a_file_is_met_with_records_or_a_data_error(name: str, file: str, data: st.DataObject) -> None:
    whole = (_TEMPLATES / name / file).read_bytes()
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(whole)))
        end = min(len(whole), start + data.draw(st.sampled_from([0, 0, 1, 3, 20, 10**6])))
        whole = whole[:start] + data.draw(st.sampled_from(_HOSTILE) | st.binary(max_size=4)) + whole[end:]
    _try_bytes(name, file, whole)


_VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    1.5,
    float("nan"),
    float("inf"),
    -float("inf"),
    10**400,
    2**63,
    "",
    "x",
    "../x.png",
    "/etc/passwd",
    "a\0b",
    "\ud800",
    "é.png",
    "x" * 5000,
    [],
    {},
    [None],
    [[]],
    [[1, 2]],
    [[1, 2, 3]],
    [[float("nan")] * 8],
    {"size": [48, 64], "counts": [5]},
    {"size": [1, 1], "counts": [1]},
    {"size": [48, 64], "counts": "zz"},
    {"size": "no", "counts": "0"},
    {"counts": []},
    {"size": [10**9, 10**9], "counts": []},
    [0, 0, 0, 0],
    [1, 2, -3, 4],
    [1, 2, 3],
    ["1", "2", "3", "4"],
]


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, inner in items for place in _places(inner, (*path, key)))]


@_FEW
@given(data=st.data())
def test_any_value_of_a_coco_file_may_be_hostile(data: st.DataObject) -> None:
    content: Any = scenes.coco_content()
    for _ in range(data.draw(st.integers(1, 2))):
        place = data.draw(st.sampled_from(_places(content)[1:]))
        inner = content
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = data.draw(st.sampled_from(_VALUES))
        if not isinstance(content, dict):
            break
    _try_bytes("coco", _ANNOTATION["coco"], json.dumps(content).encode())


@pytest.mark.parametrize("name", scenes.WRITERS)
@pytest.mark.parametrize("content", [b"", b" \n", b"\xef\xbb\xbf", b"\xff\xfe\x00", b"\x00" * 200])
def test_empty_and_meaningless_files(name: str, content: bytes) -> None:
    for file in filter(None, (_ANNOTATION[name], _LIST.get(name))):
        _try_bytes(name, file, content)


@pytest.mark.parametrize("name", ["coco", "voc", "kitti", "widerface", "yolo"])
def test_byte_order_marks_and_windows_line_ends_change_nothing(name: str, tmp_path: Path) -> None:
    root = scenes.WRITERS[name](tmp_path)
    plain = open_split(root, "train")
    for file in filter(None, (_ANNOTATION[name], _LIST.get(name))):
        content = (root / file).read_bytes()
        (root / file).write_bytes(b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n"))
    again = open_split(root, "train")
    assert [record.path for record in again.records] == [record.path for record in plain.records]
    for before, after in zip(plain.records, again.records):
        np.testing.assert_array_equal(before.boxes, after.boxes)
    assert again.class_names == plain.class_names


def test_names_that_are_not_utf8_are_found_on_the_disk(tmp_path: Path) -> None:
    root = scenes.write_voc(tmp_path)
    name = os.fsdecode(b"caf\xe9")
    try:
        (root / "Annotations" / "a.xml").rename(root / "Annotations" / f"{name}.xml")
        (root / "JPEGImages" / "a.png").rename(root / "JPEGImages" / f"{name}.png")
    except OSError:
        pytest.skip("this file system holds UTF-8 names only")
    (root / "ImageSets" / "Main" / "train.txt").write_bytes(b"caf\xe9\nb\n")
    record = open_split(root, "train").records[0]
    assert record.path.is_file() and len(record.boxes) == 2
    record.path.unlink()
    report = check_dataset(root)
    assert report.of("missing-image")[0].message.encode("utf-8")  # the report can be printed
    report.show()


def test_names_never_lead_out_of_the_data_set(tmp_path: Path) -> None:
    secret = scenes.write_image(tmp_path / "secret.png", "a")
    content = scenes.coco_content()
    for name in ("../../secret.png", str(secret), "..\\..\\secret.png", "x/../../../secret.png"):
        content["images"][0]["file_name"] = name
        root = scenes.write_coco(tmp_path / "data", content)
        with pytest.raises(DataError, match=r"images\[0\].*leads out of"):
            open_split(root, "train")
        assert check_dataset(root).counts["unsafe-path"] == 1
    content["images"][0]["file_name"] = "../train/a.png"  # within the data set's folder: harmless
    assert open_split(scenes.write_coco(tmp_path / "data", content), "train").records[0].path.is_file()


def test_names_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """By Windows' own rules for paths, which Python has everywhere."""
    system = types.SimpleNamespace(path=ntpath, sep="\\", pardir="..", fsencode=os.fsencode)
    monkeypatch.setattr(files, "os", system)
    for root, wanted in (("C:\\data", "C:\\data\\train\\x\\a.png"), (".", "train\\x\\a.png")):
        folder = ntpath.join(root, "train")
        assert str(files.safe_path(root, folder, "x/a.png")) == wanted  # type: ignore[arg-type]
        for name in ("../../a.png", "..\\..\\a.png", "D:\\a.png", "/a.png"):
            with pytest.raises(ValueError, match="leads out of"):
                files.safe_path(root, folder, name)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["voc", "kitti", "yolo"])
def test_lists_never_lead_out_of_the_data_set(name: str, tmp_path: Path) -> None:
    root = scenes.WRITERS[name](tmp_path / "data")
    path = root / _LIST[name]
    path.write_text(path.read_text().replace("a\nb", "../../../secret\nb").replace("images/train", "../../elsewhere"))
    with pytest.raises(DataError, match="leads out of"):
        open_split(root, "train")


def test_xml_with_a_document_type_is_refused_before_it_expands(tmp_path: Path) -> None:
    root = scenes.write_voc(tmp_path)
    bomb = (
        "<!DOCTYPE lol [<!ENTITY a0 'ha'>"
        + "".join(f"<!ENTITY a{n} '{f'&a{n - 1};' * 10}'>" for n in range(1, 10))
        + "]><annotation>&a9;</annotation>"
    )
    for encoding in ("utf-8", "utf-16"):
        (root / "Annotations" / "a.xml").write_bytes(bomb.encode(encoding))
        with pytest.raises(DataError, match=r"a\.xml.*document type declaration.*refused"):
            open_split(root, "train")


def test_yaml_aliases_and_tags_are_refused_or_harmless(tmp_path: Path) -> None:
    root = scenes.write_yolo(tmp_path)
    (root / "data.yaml").write_text("a: &a [1, 1]\nb: [*a, *a]\ntrain: images/train\nnames: [x]\n")
    with pytest.raises(DataError, match=r"data\.yaml.*aliases"):
        open_split(root, "train")
    (root / "data.yaml").write_text(
        "train: images/train\nnames: [no, 2, 'x']\nevil: !!python/object/apply:os.getcwd []\n"
    )
    assert open_split(root, "train").class_names == ("no", "2", "x")


def test_unreadable_root_is_a_data_error(tmp_path: Path) -> None:
    for root in (tmp_path / ("x" * 300), tmp_path / "a\0b"):
        with pytest.raises(DataError):
            recognise(root)
