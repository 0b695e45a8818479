"""Scoring submission files of every format: table, metrics.json, bad input; and submissions written and read back."""

from __future__ import annotations

import json
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import locations
from cascade_rcnn.data.records import DataSplit, ImageRecord
from cascade_rcnn.errors import DataError
from cascade_rcnn.evaluation.submission import voc_list_name, write_submission
from cascade_rcnn.score import FORMATS, run_score, score

CASES = locations.FIXTURES / "metrics"
# format -> case, truth and results below the unpacked case
PLACES = {
    "coco": ("edge_class_absent", "gt.json", "bbox_results.json"),
    "voc": ("edge_class_absent", ".", "results"),
    "kitti": ("edge_class_never_detected", "label_2", "results/data"),
    "citypersons": ("edge_no_heavy", "gt.json", "val_dt.json"),
    "widerface": ("edge_scores_not_in_01", "ground_truth", "pred"),
}


def _prepare(name: str, folder: Path) -> tuple[Path, Path]:
    case, truth, results = PLACES[name]
    source = CASES / name / case
    if (source / "data.tar.gz").is_file():
        with tarfile.open(source / "data.tar.gz") as archive:
            archive.extractall(folder, filter="data")
    else:
        for path in (truth, results):
            (folder / path).write_bytes((source / path).read_bytes())
    return folder / truth, folder / results


@pytest.mark.parametrize("name", FORMATS)
def test_prints_a_table_and_writes_strict_json(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth, results = _prepare(name, tmp_path)
    out = tmp_path / "new" / "metrics.json"
    metrics = run_score(format=name, truth=truth, results=results, out=out)

    def refuse(word: str) -> float:
        raise AssertionError(word)

    assert json.loads(out.read_text(), parse_constant=refuse) == metrics
    assert [path.name for path in out.parent.iterdir()] == ["metrics.json"]  # nothing half-written stays
    assert all(value is None or 0 <= value <= 1 + 1e-12 for value in metrics.values())
    printed = capsys.readouterr().out
    wanted = {
        "coco": ("AP75", "0.95", "chair", "undefined"),
        "voc": ("11-point", "sofa", "n/a", "cow, person"),
        "kitti": ("moderate", "Car R40", "n/a", "no detection of this class"),
        "citypersons": ("Reasonable", "lower is better", "n/a", "nobody"),
        "widerface": ("easy", "hard"),
    }[name]
    for word in wanted:
        assert word in printed, word
    first = next(value for value in metrics.values() if value is not None)
    assert f"{100 * first:.2f}" in printed


def test_masks_are_scored_where_results_have_them(tmp_path: Path) -> None:
    folder = CASES / "coco" / "edge_class_absent"
    metrics = run_score(format="coco", truth=folder / "gt.json", results=folder / "segm_results.json", out=tmp_path)
    expected = json.loads((folder / "expected.json").read_text())["segm"]["stats"]
    assert metrics["segm/AP"] == pytest.approx(expected["AP"], abs=1e-9) and "bbox/AP" not in metrics
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    nothing = CASES / "coco" / "edge_no_detections"
    empty = run_score(format="coco", truth=nothing / "gt.json", results=nothing / "bbox_results.json")
    assert empty["bbox/AP"] == empty["segm/AP"] == 0.0


@pytest.mark.parametrize("name", FORMATS)
def test_missing_paths_say_what_is_wanted(name: str, tmp_path: Path) -> None:
    truth, results = _prepare(name, tmp_path)
    for wrong in ({"truth": tmp_path / "absent"}, {"results": tmp_path / "absent"}):
        with pytest.raises(DataError, match="absent") as caught:
            run_score(**{"format": name, "truth": truth, "results": results, **wrong})  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)


def test_unknown_formats_and_overlaps_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="choose one of coco, voc"):
        run_score(format="lvis", truth=tmp_path, results=tmp_path)
    with pytest.raises(DataError, match="iou"):
        run_score(format="voc", truth=tmp_path, results=tmp_path, iou=float("nan"))


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file())


@pytest.mark.parametrize("side", ["truth", "results"])
@pytest.mark.parametrize("name", FORMATS)
def test_damaged_files_raise_nothing_but_data_errors(name: str, side: str, tmp_path: Path) -> None:
    truth, results = _prepare(name, tmp_path)
    if name == "voc":
        truth_files = _files(truth / "Annotations") + _files(truth / "ImageSets")
    else:
        truth_files = _files(truth)
    chosen = truth_files if side == "truth" else _files(results)
    rng = random.Random(5)
    refused = 0
    words = (b"NaN", b"-1", b"1e999", b"null", b"{}", b"[]", b"\x00", b"\xff", b"\n", b" ", b"<", b'"', b"9" * 40)
    for _ in range(25):
        path = rng.choice(chosen)
        whole = path.read_bytes()
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(damaged) + 1)
            cut = len(damaged) if path.suffix == ".mat" else rng.choice((0, 1, 5, 1000))
            damaged[at : at + cut] = (
                b"" if path.suffix == ".mat" else rng.choice(words)
            )  # scipy crashes on changed bytes
        path.write_bytes(damaged)
        try:
            score(format=name, truth=truth, results=results, notes=[])
        except DataError as error:
            assert "\n" not in str(error)
            refused += 1
        path.write_bytes(whole)
    assert refused > 3
    score(format=name, truth=truth, results=results, notes=[])


def _split(name: str, records: list[tuple[str | int, str]], classes: tuple[str, ...], truth: Path) -> DataSplit:
    none = np.zeros(0)
    made = [
        ImageRecord(
            Path(file), file, key, 500, 500, np.zeros((0, 4)), none.astype(np.int64), none.astype(np.bool_), none
        )
        for key, file in records
    ]
    return DataSplit(name, "test", truth, made, classes, tuple(range(1, len(classes) + 1)), truth=truth)


def _from_coco(truth: Path, results: Path) -> tuple[DataSplit, list[dict[str, Any]]]:
    content = json.loads(truth.read_text())
    images = [(image["id"], image.get("im_name", image.get("file_name", ""))) for image in content["images"]]
    split = _split("coco", images, (), truth)
    split.category_ids = tuple(one["id"] for one in content["categories"])
    split.class_names = tuple(one["name"] for one in content["categories"])
    return split, json.loads(results.read_text())


def _from_voc(truth: Path, results: Path) -> tuple[DataSplit, list[dict[str, Any]]]:
    names = (truth / "ImageSets" / "Main" / "test.txt").read_text().split()
    paths = sorted(results.glob("*.txt"))
    split = _split("voc", [(name, f"{name}.jpg") for name in names], tuple(path.stem[15:] for path in paths), truth)
    found = []
    for category, path in enumerate(paths, start=1):
        for line in path.read_text().splitlines():
            name, value, *sides = line.split()
            x1, y1, x2, y2 = map(float, sides)
            found.append(
                {
                    "image_id": name,
                    "category_id": category,
                    "score": float(value),
                    "bbox": [x1 - 1, y1 - 1, x2 - (x1 - 1), y2 - (y1 - 1)],
                }
            )
    return split, found


def _from_kitti(truth: Path, results: Path) -> tuple[DataSplit, list[dict[str, Any]]]:
    paths = sorted(results.glob("*.txt"))
    classes = tuple(sorted({line.split()[0] for path in paths for line in path.read_text().splitlines()}))
    split = _split("kitti", [(path.stem, f"{path.stem}.png") for path in paths], classes, truth)
    found = []
    for path in paths:
        for row in map(str.split, path.read_text().splitlines()):
            x1, y1, x2, y2 = map(float, row[4:8])
            found.append(
                {
                    "image_id": path.stem,
                    "category_id": classes.index(row[0]) + 1,
                    "score": float(row[15]),
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                }
            )
    return split, found


def _from_widerface(truth: Path, results: Path) -> tuple[DataSplit, list[dict[str, Any]]]:
    keys = [f"{path.parent.name}/{path.stem}" for path in sorted(results.glob("*/*.txt"))]
    split = _split("widerface", [(key, f"{key}.jpg") for key in keys], ("face",), truth)
    found = []
    for key in keys:
        for line in (results / f"{key}.txt").read_text().splitlines()[2:]:
            *box, value = map(float, line.split())
            found.append({"image_id": key, "category_id": 1, "bbox": box, "score": value})
    return split, found


_READ: dict[str, Callable[[Path, Path], tuple[DataSplit, list[dict[str, Any]]]]] = {
    "coco": _from_coco,
    "citypersons": _from_coco,
    "voc": _from_voc,
    "kitti": _from_kitti,
    "widerface": _from_widerface,
}


@pytest.mark.parametrize("name", FORMATS)
def test_written_submissions_score_like_the_detections_they_hold(name: str, tmp_path: Path) -> None:
    truth, results = _prepare(name, tmp_path)
    split, detections = _READ[name](truth, results)
    written = write_submission(name, split, detections, tmp_path / "out")
    again = write_submission(name, split, detections, tmp_path / "out")  # over itself is fine
    assert written == again
    before, after = score(format=name, truth=truth, results=results), score(format=name, truth=truth, results=written)
    assert after.keys() == before.keys()
    for key, value in before.items():
        assert after[key] == (None if value is None else pytest.approx(value, abs=1e-9)), key
    if name in ("coco", "kitti", "citypersons"):  # the folder given to write_submission works too
        assert score(format=name, truth=truth, results=tmp_path / "out") == after


@pytest.mark.parametrize("name", FORMATS)
def test_a_submission_without_detections_is_complete(name: str, tmp_path: Path) -> None:
    truth, results = _prepare(name, tmp_path)
    split, _ = _READ[name](truth, results)
    written = write_submission(name, split, [], tmp_path / "out")
    notes: list[str] = []
    metrics = score(format=name, truth=truth, results=written, notes=notes)
    assert not any("no file" in note or "left out" in note for note in notes)
    best = {"citypersons": 1.0, "kitti": None}.get(name, 0.0)
    assert {value for value in metrics.values() if value is not None} == (set() if best is None else {best})
    if name == "kitti":
        assert sorted(path.name for path in written.iterdir()) == sorted(path.name for path in results.iterdir())


def test_masks_survive_in_a_coco_submission(tmp_path: Path) -> None:
    truth = CASES / "coco" / "edge_perfect" / "gt.json"
    split, masks = _from_coco(truth, truth.parent / "segm_results.json")
    boxes = json.loads((truth.parent / "bbox_results.json").read_text())
    both = [box | {"segmentation": mask["segmentation"]} for box, mask in zip(boxes, masks, strict=True)]
    metrics = score(format="coco", truth=truth, results=write_submission("coco", split, both, tmp_path))
    assert metrics["bbox/AP"] == metrics["segm/AP"] == pytest.approx(1)


def test_submissions_refuse_what_their_format_cannot_hold(tmp_path: Path) -> None:
    split = _split("coco", [(1, "a/x.jpg"), (2, "b/x.jpg")], ("traffic light",), tmp_path)
    one = [{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}]
    with pytest.raises(DataError, match="two images are called 'x'"):
        write_submission("kitti", split, one, tmp_path / "a")
    with pytest.raises(DataError, match="choose one of"):
        write_submission("yolo", split, one, tmp_path / "b")
    with pytest.raises(DataError, match="not EVENT/IMAGE"):
        write_submission("widerface", _split("coco", [(1, "../../x.jpg")], ("face",), tmp_path), one, tmp_path / "c")
    with pytest.raises(DataError, match="image_id 9"):
        write_submission("coco", split, [one[0] | {"image_id": 9}], tmp_path / "d")
    with pytest.raises(DataError, match="'traffic/light' cannot stand"):
        write_submission("voc", _split("coco", [(1, "x.jpg")], ("traffic/light",), tmp_path), one, tmp_path / "e")
    (tmp_path / "f" / "data").mkdir(parents=True)
    (tmp_path / "f" / "data" / "000001.txt").write_text("")
    with pytest.raises(DataError, match="belongs to other results"):
        write_submission("kitti", _split("kitti", [("000002", "000002.png")], ("Car",), tmp_path), [], tmp_path / "f")
    assert not (tmp_path / "f" / "data" / "000002.txt").exists()


def test_a_voc_split_among_several_years_is_written_under_its_lists_name(tmp_path: Path) -> None:
    (tmp_path / "ImageSets" / "Main").mkdir(parents=True)
    (tmp_path / "ImageSets" / "Main" / "test.txt").write_text("x\n")
    split = _split("voc", [("x", "x.jpg")], ("cat",), tmp_path)
    assert voc_list_name(split) == "test"
    split.name = "2007_test"
    assert voc_list_name(split) == "test"
    written = write_submission("voc", split, [], tmp_path / "out")
    assert [path.name for path in written.iterdir()] == ["comp4_det_test_cat.txt"]
