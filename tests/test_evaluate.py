"""Evaluation from images to numbers, with a network that knows the answers, misses some, or sees nothing."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from cascade_rcnn import distributed
from cascade_rcnn.checkpoint import save_checkpoint
from cascade_rcnn.config import Config, DataConfig, ModelConfig
from cascade_rcnn.data.formats.open import open_split
from cascade_rcnn.data.records import DataSplit, ImageRecord
from cascade_rcnn.errors import ConfigError, DataError, UserError
from cascade_rcnn.evaluate import run_evaluate
from cascade_rcnn.evaluation.coco import curve
from cascade_rcnn.evaluation.evaluate_model import evaluate_model, match_classes
from cascade_rcnn.inference.run_model import Inference
from cascade_rcnn.models.build import build_model
from cascade_rcnn.structures import ImageBatch, RawDetections
from scenes import write_coco, write_text
from small_training import run_ranks, small_config, small_data

NAMES = ("box", "crate", "tin")


class Oracle(nn.Module):
    """Finds every annotated object exactly, in the network's own coordinates; ``miss`` leaves out every n-th image."""

    def __init__(self, split: DataSplit, *, masks: bool = False, miss: int = 0) -> None:
        super().__init__()
        self.records = {record.image_id: record for record in split.records}
        self.missed = {record.image_id for record in split.records[::miss]} if miss else set()
        self.masks = masks

    def detect(self, images: ImageBatch) -> RawDetections:
        rows = 12
        batch = len(images)
        raw = RawDetections(
            torch.zeros(batch, rows, 4),
            torch.zeros(batch, rows),
            torch.zeros(batch, rows, dtype=torch.int64),
            torch.zeros(batch, rows, dtype=torch.bool),
            torch.ones(batch, rows, 4, 4) if self.masks else None,
        )
        for b, image_id in enumerate(images.image_ids):
            record = self.records[image_id]
            kept = ~record.ignore
            n = 0 if image_id in self.missed else int(kept.sum())
            factor = (images.sizes[b] / images.original_sizes[b]).flip(0).repeat(2)
            raw.boxes[b, :n] = (torch.from_numpy(record.boxes[kept][:n]) * factor).float()
            raw.labels[b, :n] = torch.from_numpy(record.labels[kept][:n])
            raw.scores[b, :n] = 0.9 - 0.01 * torch.arange(n)
            raw.valid[b, :n] = True
        return raw


def make_split(root: Path, *, images: int = 7, masks: bool = False) -> DataSplit:
    """Images of many sizes with rectangles of whole pixels; one without objects, one with a crowd."""
    random = np.random.default_rng(0)
    records = []
    for index in range(images):
        height, width = int(random.integers(40, 90)), int(random.integers(40, 90))
        path = root / f"{index}.png"
        Image.fromarray(random.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(path)
        count = 0 if index == 2 else int(random.integers(1, 6))
        corner = np.stack([random.integers(0, width - 12, count), random.integers(0, height - 12, count)], axis=1)
        boxes = np.concatenate([corner, corner + random.integers(6, 12, (count, 2))], axis=1).astype(np.float64)
        polygons: Any = [[[x1, y1, x2, y1, x2, y2, x1, y2]] for x1, y1, x2, y2 in boxes.tolist()]
        ignore = np.zeros(count, dtype=np.bool_)
        if index == 3:
            ignore[0] = True
        areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        records.append(
            ImageRecord(
                path,
                path.name,
                f"image {index}",
                height,
                width,
                boxes,
                random.integers(0, 3, count),
                ignore,
                areas,
                polygons if masks else None,
            )
        )
    return DataSplit("coco", "val", root, records, NAMES, (11, 5, 8), has_masks=masks)


def make_config(*, masks: bool = False) -> Config:
    return Config(
        model=ModelConfig(masks="last" if masks else "none"),
        data=DataConfig(short_side=(70,), long_side=120, workers=0),
    )


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_an_oracle_reaches_ap_1(tmp_path: Path, masks: bool, batch_size: int) -> None:
    split = make_split(tmp_path, masks=masks)
    metrics = evaluate_model(Oracle(split, masks=masks), make_config(masks=masks), split, batch_size=batch_size)
    kinds = ("bbox", "segm") if masks else ("bbox",)
    for kind in kinds:
        assert metrics[f"{kind}/AP"] == pytest.approx(1.0)
        assert all(value == pytest.approx(1.0) for _, value in curve(metrics, kind))
        assert {key for key in metrics if key.startswith(f"{kind}/AP/")} == {f"{kind}/AP/{name}" for name in NAMES}
    assert any(key.startswith("segm/") for key in metrics) == masks


def test_missed_images_cost_recall(tmp_path: Path) -> None:
    split = make_split(tmp_path)
    metrics = evaluate_model(Oracle(split, miss=2), make_config(), split)
    assert metrics["bbox/AP"] is not None and 0.05 < metrics["bbox/AP"] < 0.95


def test_an_image_that_cannot_be_read_is_left_out_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    split = make_split(tmp_path)
    oracle = Oracle(split)
    (tmp_path / "4.png").write_bytes((tmp_path / "4.png").read_bytes()[:200])
    metrics = evaluate_model(oracle, make_config(), split, batch_size=3)
    assert metrics["bbox/AP"] == pytest.approx(1.0)
    err = capsys.readouterr().err
    assert "4.png" in err and "1 of 7 images of 'val' cannot be read" in err
    for record in split.records:
        record.path.write_bytes(b"nothing")
    with pytest.raises(DataError, match="all 7 images of 'val': nothing to evaluate on"):
        evaluate_model(oracle, make_config(), split)


def test_a_blind_network_reaches_0(tmp_path: Path) -> None:
    split = make_split(tmp_path)
    metrics = evaluate_model(Oracle(split, miss=1), make_config(), split)
    assert metrics["bbox/AP"] == 0.0


def test_the_network_is_left_in_its_own_mode(tmp_path: Path) -> None:
    split = make_split(tmp_path, images=2)
    model = Oracle(split)
    for mode in (True, False):
        evaluate_model(model.train(mode), make_config(), split)
        assert model.training is mode


def test_classes_are_matched_by_name(tmp_path: Path) -> None:
    split = make_split(tmp_path)
    known = ("tin", "sofa", "box", "crate")  # other order, one more
    class_map = match_classes(known, split, "x.safetensors")
    assert class_map == [2, -1, 0, 1]
    shuffled = [known.index(name) for name in NAMES]

    class Shuffled(Oracle):
        def detect(self, images: ImageBatch) -> RawDetections:
            raw = super().detect(images)
            raw.labels = torch.tensor(shuffled)[raw.labels]
            raw.labels[:, -1], raw.scores[:, -1], raw.valid[:, -1] = 1, 0.95, True  # a sofa in every image
            raw.boxes[:, -1] = torch.tensor([1.0, 1, 30, 30])
            return raw

    metrics = evaluate_model(Shuffled(split), make_config(), split, class_map=class_map)
    assert metrics["bbox/AP"] == pytest.approx(1.0)


def test_a_class_that_the_checkpoint_does_not_know_names_both_lists(tmp_path: Path) -> None:
    split = make_split(tmp_path, images=6)
    with pytest.raises(DataError) as caught:
        match_classes(("box", "cat"), split, "best.safetensors")
    message = str(caught.value)
    assert "\n" not in message
    for part in ("does not know crate, tin", "data: box, crate, tin", "checkpoint: box, cat", "train"):
        assert part in message


def _evaluate_in_ranks(folder: str) -> dict[str, float | None]:
    with distributed.start("cpu"):
        split = make_split(Path(folder) / str(distributed.rank()))
        return evaluate_model(Oracle(split, miss=3), make_config(), split)


def test_two_processes_get_the_same_metrics_as_one(tmp_path: Path) -> None:
    for name in ("0", "1", "alone"):
        (tmp_path / name).mkdir()
    split = make_split(tmp_path / "alone")
    alone = evaluate_model(Oracle(split, miss=3), make_config(), split)
    assert run_ranks(2, _evaluate_in_ranks, str(tmp_path)) == [alone, alone]


def save_untrained(path: Path, names: tuple[str, ...], *, root: Path | None = None, masks: str = "last") -> Path:
    """A checkpoint of a small network that has learnt nothing."""
    config = small_config(model={"masks": masks})
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, root=str(root or small_data())))
    model = build_model(config.model, len(names))
    save_checkpoint(path, model.state_dict(), config=config, class_names=names)
    return path


def test_the_command_writes_metrics_and_coco_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    split = open_split(small_data(), "val")
    checkpoint = save_untrained(tmp_path / "best.safetensors", split.class_names)
    metrics = run_evaluate(
        checkpoint,
        data=small_data(),
        out=tmp_path / "metrics.json",
        submission=tmp_path / "sub",
        device="cpu",
        inference=Inference(batch_size=2),
    )
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written == metrics and {"bbox/AP", "segm/AP", "bbox/AP@0.75", "bbox/AP/star"} <= set(written)
    results = json.loads((tmp_path / "sub" / "results.json").read_text())
    assert {"image_id", "category_id", "bbox", "score", "segmentation"} <= set(results[0])
    shown = capsys.readouterr().out
    assert "star" in shown and str(tmp_path / "metrics.json") in shown


def test_the_first_stages_alone_are_evaluated_on_request(tmp_path: Path) -> None:
    split = open_split(small_data(), "val")
    checkpoint = save_untrained(tmp_path / "best.safetensors", split.class_names, masks="none")
    every, first, last = (
        run_evaluate(
            checkpoint,
            data=small_data(),
            device="cpu",
            submission=tmp_path / str(stages),
            inference=Inference(stages=stages),
        )
        for stages in (None, 1, 3)
    )
    assert every == last
    written = [json.loads((tmp_path / str(stages) / "results.json").read_text()) for stages in (1, 3)]
    assert first.keys() == last.keys() and written[0] != written[1]
    with pytest.raises(ConfigError, match=r"model\.stop_after_stage 4: there are 3 stages"):
        run_evaluate(checkpoint, data=small_data(), device="cpu", inference=Inference(stages=4))


@pytest.mark.parametrize("device", ["abacus", "cpu:-3", "meta:x"])
def test_a_device_that_is_not_there_is_told_in_one_line(tmp_path: Path, device: str) -> None:
    with pytest.raises(UserError, match=f"device '{device}' cannot be used .*; use cpu, cuda or auto"):
        run_evaluate(tmp_path, data=small_data(), device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_a_gpu_that_is_not_there_is_told_in_one_line(tmp_path: Path, device: str) -> None:
    with pytest.raises(UserError, match=f"device '{device}' cannot be used"):
        run_evaluate(tmp_path, data=small_data(), device=device)


def write_voc(root: Path) -> Path:
    for name in ("1", "2"):
        (root / "JPEGImages").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 48), (90, 120, 60)).save(root / "JPEGImages" / f"{name}.jpg")
        box = f"<xmin>11</xmin><ymin>{name}</ymin><xmax>30</xmax><ymax>25</ymax>"
        write_text(
            root / "Annotations" / f"{name}.xml",
            f"<annotation><filename>{name}.jpg</filename><size><width>64</width><height>48</height></size>"
            f"<object><name>cat</name><difficult>0</difficult><bndbox>{box}</bndbox></object></annotation>",
        )
    write_text(root / "ImageSets" / "Main" / "val.txt", "1\n2\n")
    return root


def test_a_voc_data_set_is_scored_by_its_own_protocol_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_voc(tmp_path / "voc")
    split = open_split(root, "val")
    checkpoint = save_untrained(tmp_path / "cat.safetensors", split.class_names, masks="none")
    metrics = run_evaluate(checkpoint, data=root, split="val", device="cpu")
    assert {"voc/mAP", "voc/mAP07", "bbox/AP"} <= set(metrics)
    monkeypatch.setattr(
        "cascade_rcnn.evaluation.evaluate_model.detect", lambda _, images, *__: Oracle(split).detect(images)
    )
    metrics = run_evaluate(checkpoint, data=root, split="val", device="cpu")
    assert metrics["voc/mAP"] == pytest.approx(1.0) and metrics["voc/mAP07"] == pytest.approx(1.0)
    assert metrics["bbox/AP"] == pytest.approx(1.0)


def test_an_official_metric_does_not_count_unreadable_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_voc(tmp_path / "voc")
    checkpoint = save_untrained(tmp_path / "cat.safetensors", ("cat",), masks="none")
    (root / "JPEGImages" / "1.jpg").write_bytes(b"nothing")
    metrics = run_evaluate(checkpoint, data=root, split="val", device="cpu")
    assert "bbox/AP" in metrics and not any(key.startswith("voc/") for key in metrics)
    assert "the metric of voc is left out" in capsys.readouterr().out
    write_text(root / "Annotations" / "2.xml", "<annotation><filename>2.jpg</filename></annotation>")
    with pytest.raises(DataError, match="that can be read have no objects"):
        run_evaluate(checkpoint, data=root, split="val", device="cpu")


def test_a_split_without_annotations_gives_a_submission_only(tmp_path: Path) -> None:
    root = write_coco(
        tmp_path / "data",
        {
            "images": [{"id": 1, "file_name": "a.png", "height": 48, "width": 64}],
            "categories": [{"id": 3, "name": "Pedestrian"}],
            "annotations": [],
        },
        split="test",
    )
    checkpoint = save_untrained(tmp_path / "p.safetensors", ("Pedestrian",))
    metrics = run_evaluate(
        checkpoint, data=root, split="test", device="cpu", out=tmp_path / "m.json", submission=tmp_path / "sub"
    )
    assert metrics == {} and not (tmp_path / "m.json").exists()
    assert isinstance(json.loads((tmp_path / "sub" / "results.json").read_text()), list)


def test_a_split_without_objects_and_without_submission_is_refused_before_anything_runs(tmp_path: Path) -> None:
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": 48, "width": 64}],
        "categories": [{"id": 3, "name": "Pedestrian"}],
        "annotations": [],
    }
    root = write_coco(tmp_path / "data", content, split="test")
    checkpoint = save_untrained(tmp_path / "p.safetensors", ("Pedestrian",))
    with pytest.raises(DataError, match=r"'test' has no objects in its 1 images: nothing to measure.*--submission"):
        run_evaluate(checkpoint, data=root, split="test", device="cpu")


@pytest.mark.parametrize(("name", "official"), [("wing nut", True), ("bolt/screw", False)])
def test_class_names_that_no_submission_holds_do_not_stop_an_evaluation(
    name: str, official: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_voc(tmp_path / "data")
    for path in root.glob("Annotations/*.xml"):
        path.write_text(path.read_text().replace("cat", name))
    checkpoint = save_untrained(tmp_path / "p.safetensors", (name,), masks="none")
    split = open_split(root, "val")
    monkeypatch.setattr(
        "cascade_rcnn.evaluation.evaluate_model.detect", lambda _, images, *__: Oracle(split).detect(images)
    )
    metrics = run_evaluate(checkpoint, data=root, split="val", device="cpu")
    assert metrics["bbox/AP"] == pytest.approx(1.0)
    assert (metrics.get("voc/mAP") == pytest.approx(1.0)) == official
    assert ("the metric of voc is left out" in capsys.readouterr().out) != official
    if not official:
        with pytest.raises(DataError, match="cannot stand in a text submission"):
            run_evaluate(checkpoint, data=root, split="val", device="cpu", submission=tmp_path / "sub")
