"""``check DATA --model`` and ``--folds``: the tables, the sheet and the review files; the data set stays as it is."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import turned_pictures
from cascade_rcnn.checkpoint import save_checkpoint
from cascade_rcnn.cli import main
from cascade_rcnn.config import DataConfig
from cascade_rcnn.data.formats.open import open_split, recognise
from cascade_rcnn.data.images import read_header
from cascade_rcnn.data.records import DataSplit
from cascade_rcnn.errors import UserError
from cascade_rcnn.labels import command
from cascade_rcnn.labels.command import LabelCheck, run_label_check
from cascade_rcnn.labels.folds import deal, judge_by_folds, small_recipe, write_parts
from cascade_rcnn.labels.rank import Suspect
from cascade_rcnn.labels.review import write_review
from cascade_rcnn.labels.sheet import draw_sheet
from cascade_rcnn.models.build import build_model
from small_training import small_config, small_data


@pytest.fixture(scope="module")
def split() -> DataSplit:
    return open_split(small_data(), "train")


@pytest.fixture(scope="module")
def checkpoint(split: DataSplit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that has learnt nothing."""
    config = small_config(model={"norm": "batch"}, data={"root": "elsewhere"})
    path = tmp_path_factory.mktemp("model") / "fresh.safetensors"
    torch.manual_seed(0)
    weights = build_model(config.model, len(split.class_names)).state_dict()
    save_checkpoint(path, weights, config=config, class_names=split.class_names)
    return path


def _suspects(split: DataSplit) -> list[Suspect]:
    """One of each kind, in the first two images."""
    record = split.records[0]
    box, label = tuple(record.boxes[0].tolist()), int(record.labels[0])
    other = (label + 1) % len(split.class_names)
    second = tuple(split.records[1].boxes[0].tolist())
    return [
        Suspect("missed", 0.9, 1, -1, None, -1, (1.0, 2.0, 21.0, 22.0), other),
        Suspect("class", 0.8, 0, 0, box, label, box, other),
        Suspect("shifted", 0.7, 1, 0, second, int(split.records[1].labels[0]), (3.0, 4.0, 30.0, 34.0), 1),
        Suspect("nothing", 0.6, 2, 0, tuple(split.records[2].boxes[0].tolist()), 0, None, 0),
    ]


def _fingerprints(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def _all_are_suspects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cascade_rcnn.labels.rank.LISTED_FROM", 0.0)


@pytest.mark.usefixtures("_all_are_suspects")
def test_the_command_writes_everything_and_leaves_the_data_alone(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = _fingerprints(small_data())
    assert main(["check", str(small_data()), "--model", str(checkpoint), "--out", str(tmp_path / "out")]) == 0
    assert _fingerprints(small_data()) == before
    out = capsys.readouterr().out
    assert "suspects in" in out and "the annotations are as they were" in out
    rows = json.loads((tmp_path / "out" / "labels.json").read_text(encoding="utf-8"))
    assert rows and set(rows[0]) == {
        "kind", "score", "image", "image_id", "annotation", "label", "box", "proposed_label", "proposed_box", "source",
    }  # fmt: skip
    with (tmp_path / "out" / "labels.csv").open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert [(row["kind"], float(row["score"])) for row in table] == [(row["kind"], row["score"]) for row in rows]
    with Image.open(tmp_path / "out" / "suspects.png") as sheet:
        assert sheet.width > 200
    assert recognise(tmp_path / "out" / "review") == "cvat"


def test_without_suspects_only_the_tables_are_written(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_label_check(small_data(), LabelCheck(model=checkpoint, out=tmp_path / "out")) == []
    told = capsys.readouterr()
    assert "no annotation looks wrong" in told.out
    assert "% of the annotated boxes are found again" in told.out and "too little to trust" in told.err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["labels.csv", "labels.json"]


@pytest.mark.usefixtures("_all_are_suspects")
def test_a_second_check_replaces_the_first_and_leaves_other_folders_alone(checkpoint: Path, tmp_path: Path) -> None:
    settings = LabelCheck(model=checkpoint, out=tmp_path / "out")
    run_label_check(small_data(), settings)
    (tmp_path / "out" / "review" / "old.txt").touch()
    run_label_check(small_data(), settings)
    assert not (tmp_path / "out" / "review" / "old.txt").exists()
    (tmp_path / "out" / "mine.txt").touch()
    with pytest.raises(UserError, match="holds other things"):
        run_label_check(small_data(), settings)


def test_cvat_has_every_annotation_and_each_proposal_with_a_question_mark(split: DataSplit, tmp_path: Path) -> None:
    write_review(split, _suspects(split), tmp_path / "review", data=DataConfig())
    again = open_split(tmp_path / "review", "all")
    names = [*split.class_names, *(f"{name}?" for name in split.class_names), "remove?"]
    assert list(again.class_names) == names
    assert [record.file_name.split("_", 1)[0] for record in again.records] == ["000001", "000000", "000002"]
    second, first, third = again.records
    other = (int(split.records[0].labels[0]) + 1) % len(split.class_names)
    for record, number in ((first, 0), (second, 1), (third, 2)):
        given = split.records[number]
        np.testing.assert_allclose(record.boxes[: len(given.boxes)], given.boxes, atol=0.01)
        assert record.labels[: len(given.labels)].tolist() == given.labels.tolist()
        with Image.open(record.path) as picture:
            assert picture.size == (given.width, given.height)
    assert names[first.labels[-1]] == f"{split.class_names[other]}?"
    np.testing.assert_allclose(first.boxes[-1], split.records[0].boxes[0], atol=0.01)
    assert second.boxes[-2:].tolist() == [[1, 2, 21, 22], [3, 4, 30, 34]]
    assert names[third.labels[-1]] == "remove?"
    raw = json.loads((tmp_path / "review" / "cvat_labels.json").read_text(encoding="utf-8"))
    assert [label["name"] for label in raw] == names
    assert [[one["name"] for one in label["attributes"]] for label in raw][-1] == ["kind", "score"]


def test_label_studio_has_the_annotations_and_a_prediction_with_the_proposals(split: DataSplit, tmp_path: Path) -> None:
    write_review(split, _suspects(split), tmp_path / "review", data=DataConfig())
    second, first, third = json.loads((tmp_path / "review" / "tasks.json").read_text(encoding="utf-8"))
    for task, number in ((first, 0), (second, 1), (third, 2)):
        boxes = np.array([_pixels(region) for region in task["annotations"][0]["result"]])
        np.testing.assert_allclose(boxes, split.records[number].boxes, atol=1e-6)
        name = task["data"]["image"].removeprefix("/data/local-files/?d=")
        assert (tmp_path / "review" / name).is_file()
    proposed = first["predictions"][0]["result"][0]
    other = (int(split.records[0].labels[0]) + 1) % len(split.class_names)
    assert proposed["value"]["rectanglelabels"] == [split.class_names[other]] and proposed["score"] == 0.8
    assert "rather" in proposed["meta"]["text"][0]
    changed = second["predictions"][0]["result"]
    assert len(changed) == len(split.records[1].boxes) + 1
    assert _pixels(changed[0]) == pytest.approx((3, 4, 30, 34)) and _pixels(changed[-1]) == pytest.approx(
        (1, 2, 21, 22)
    )
    assert len(third["predictions"][0]["result"]) == len(split.records[2].boxes) - 1


def _pixels(region: dict[str, Any]) -> tuple[float, ...]:
    value, width, height = region["value"], region["original_width"], region["original_height"]
    x, y = value["x"] * width / 100, value["y"] * height / 100
    return x, y, x + value["width"] * width / 100, y + value["height"] * height / 100


@pytest.mark.parametrize("labelled", ["upright", "stored"])
def test_turned_pictures_are_reviewed_and_learnt_as_their_labels_count_them(labelled: str, tmp_path: Path) -> None:
    split = open_split(turned_pictures.write_coco(tmp_path / "data", 6, labelled=labelled), "train")
    boxes = [tuple(record.boxes[0].tolist()) for record in split.records]
    suspects = [Suspect("class", 0.9, image, 0, box, 0, box, 0) for image, box in enumerate(boxes)]
    write_review(split, suspects, tmp_path / "review", data=DataConfig())
    again = open_split(tmp_path / "review", "all")
    assert turned_pictures.on_their_objects(again)[0] == 8  # given and proposed
    assert {read_header(record.path).orientation for record in again.records} == {1}  # all tools see the same
    write_parts(split, deal(4, 2), tmp_path / "folds")
    parts = [open_split(tmp_path / "folds", f"fold{fold}") for fold in range(2)]
    assert [turned_pictures.on_their_objects(part)[0] for part in parts] == [2, 2]
    crops = draw_sheet(split, suspects, data=DataConfig(), cell=100).convert("L")
    assert np.mean(np.asarray(crops) > 200) > 0.3  # the bright objects are in the middle of their crops


def test_files_of_the_same_name_in_two_splits_stay_two_pictures(tmp_path: Path) -> None:
    """YOLO's folders may each hold a 001.jpg."""
    one = open_split(small_data(), "train").records[0]
    other = open_split(small_data(), "val").records[0]
    records = [dataclasses.replace(record, file_name="001.jpg") for record in (one, other)]
    split = dataclasses.replace(open_split(small_data(), "train"), records=records)
    write_parts(split, np.zeros(2, np.int64), tmp_path)
    assert len(_pictures(open_split(tmp_path, "fold0"))) == 2


def test_the_sheet_shows_each_kind(split: DataSplit) -> None:
    sheet = draw_sheet(split, _suspects(split), data=DataConfig(), cell=100)
    assert sheet.height > 4 * 100
    colors = {color for _, color in sheet.getcolors(1 << 24) or ()}
    assert (230, 159, 0) in colors and (86, 180, 233) in colors
    assert draw_sheet(split, [], data=DataConfig()).width > 0


def test_boxes_lie_in_their_crop_as_in_the_picture(tmp_path: Path) -> None:
    split = open_split(turned_pictures.write_coco(tmp_path, 1, size=(400, 400)), "train")
    suspect = Suspect("nothing", 0.9, 0, 0, (180.0, 200.0, 220.0, 240.0), 0, None, 0)
    alone = [dataclasses.replace(record, boxes=record.boxes * 0 + 5) for record in split.records]
    sheet = draw_sheet(dataclasses.replace(split, records=alone), [suspect], data=DataConfig(), cell=220)
    pixels = np.asarray(sheet)[-225:]  # the crop, below the key
    rows, columns = np.nonzero((pixels == (230, 159, 0)).all(axis=2))
    assert columns.max() - columns.min() == pytest.approx(100, abs=3) == rows.max() - rows.min()
    assert (columns.max() + columns.min()) / 2 == pytest.approx(5 + 110, abs=3)
    assert (rows.max() + rows.min()) / 2 == pytest.approx(110, abs=6)


def test_the_folds_share_the_images_evenly_and_each_image_once() -> None:
    fold_of = deal(20, 3)
    assert sorted(np.bincount(fold_of)) == [6, 7, 7]
    assert deal(20, 3).tolist() == fold_of.tolist() != deal(20, 3, seed=1).tolist()


def test_no_fold_judges_what_it_has_learnt(
    split: DataSplit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    judged: list[tuple[set[str], set[str]]] = []
    monkeypatch.setattr(
        "cascade_rcnn.labels.folds.judge_split",
        lambda detector, part: [judged.append((_learnt(detector), _pictures(part))), *part.records][1:],
    )
    recipe = small_config(model={"norm": "batch"}, max_steps=1)
    records = judge_by_folds(split, 2, recipe, tmp_path, device="cpu")
    assert records == split.records  # in their order
    assert len(judged) == 2
    for learnt, looked_at in judged:
        assert len(learnt) == len(looked_at) == 6 and not learnt & looked_at
    steps = capsys.readouterr().out.count("step 1/")
    judge_by_folds(split, 2, recipe, tmp_path, device="cpu")
    assert steps == 2 and "step 1/" not in capsys.readouterr().out  # not trained again
    labels = split.records[0].labels
    labels[0], before = (labels[0] + 1) % len(split.class_names), labels[0]
    judge_by_folds(split, 2, recipe, tmp_path, device="cpu")
    labels[0] = before
    assert capsys.readouterr().out.count("step 1/") == 2  # other labels are learnt anew


def _learnt(detector: Any) -> set[str]:
    data = detector.config.data
    return _pictures(open_split(data.root, data.train))


def _pictures(split: DataSplit) -> set[str]:
    return {hashlib.sha256(record.path.read_bytes()).hexdigest() for record in split.records}


def test_folds_alone_train_the_recipe_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = []

    def train_nothing(split: DataSplit, folds: int, recipe: Any, out: Path, *, device: str) -> list[Any]:
        trained.append((folds, recipe.model.backbone, recipe.train.epochs, out))
        return []

    monkeypatch.setattr(command, "judge_by_folds", train_nothing)
    run_label_check(small_data(), LabelCheck(folds=3, out=tmp_path / "a"))
    run_label_check(small_data(), LabelCheck(folds=2, recipe=small_config(), out=tmp_path / "b"))
    assert trained == [
        (3, "tf_efficientnet_lite0", 20, tmp_path / "a" / "folds"),
        (2, "test_resnet", 2, tmp_path / "b" / "folds"),
    ]


@pytest.mark.parametrize(("images", "epochs"), [(0, 20), (50, 20), (243, 6), (500, 3), (100_000, 2)])
def test_the_small_recipe_is_as_long_as_the_data_are_few(images: int, epochs: int) -> None:
    assert small_recipe(images).train.epochs == epochs


def test_a_checkpoint_of_these_very_data_is_told(
    split: DataSplit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_config(model={"norm": "batch"})
    weights = build_model(config.model, len(split.class_names)).state_dict()
    save_checkpoint(tmp_path / "m.safetensors", weights, config=config, class_names=split.class_names)
    run_label_check(small_data(), LabelCheck(model=tmp_path / "m.safetensors", out=tmp_path / "out"))
    assert "was trained on split 'train' of these data" in capsys.readouterr().err


def test_images_that_cannot_be_read_are_left_out_and_named(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(small_data(), tmp_path / "data")
    first, *others = sorted((tmp_path / "data").rglob("*.jpg"))
    first.write_bytes(b"")
    run_label_check(tmp_path / "data", LabelCheck(model=checkpoint, out=tmp_path / "out"))
    error = capsys.readouterr().err
    assert "1 of 16 images cannot be used and are left out" in error and first.name in error
    for path in others:
        path.unlink()
    with pytest.raises(UserError, match="none of the 16 images can be used"):
        run_label_check(tmp_path / "data", LabelCheck(model=checkpoint, out=tmp_path / "out"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--folds", "1"], "no image would be left to learn from"),
        (["--folds", "100"], "16 images for 100 folds"),
        (["--model", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--model", ".", "--fix", "copy"], "--fix belongs to the check without --model"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(small_data()), *words, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_folds_of_a_recipe_in_whole_pixels_are_refused_before_they_are_trained(tmp_path: Path) -> None:
    recipe = small_config(model={"semantics": "paper"})
    with pytest.raises(UserError, match="semantics paper"):
        run_label_check(small_data(), LabelCheck(folds=2, recipe=recipe, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_neither_model_nor_folds_is_refused() -> None:
    with pytest.raises(UserError, match="give --model CHECKPOINT or --folds 3"):
        run_label_check(small_data(), LabelCheck())
