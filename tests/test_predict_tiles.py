"""``predict`` and ``evaluate`` by tiles: the commands on files of any size, GeoJSON, refusals, interruption."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from cascade_rcnn import load
from cascade_rcnn.checkpoint import save_checkpoint
from cascade_rcnn.cli import main
from cascade_rcnn.config import Config, DataConfig
from cascade_rcnn.data.formats.open import open_split
from cascade_rcnn.data.rle import MOST_RLE_PIXELS
from cascade_rcnn.errors import DataError, UserError
from cascade_rcnn.evaluation.evaluate_tiles import detect_in_tiles, merged_limits
from cascade_rcnn.inference.detections import Detections
from cascade_rcnn.inference.detector import Detector
from cascade_rcnn.inference.predictions_file import NAME
from cascade_rcnn.inference.run_model import Inference
from cascade_rcnn.inference.tiled import open_rows
from cascade_rcnn.inference.tiles import Tiling
from cascade_rcnn.models.build import build_model
from cascade_rcnn.predict import Outputs, run_predict
from cascade_rcnn.structures import ImageBatch, RawDetections
from small_training import small_config
from turned_pictures import save, scene, write_coco


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that has learnt nothing, with masks: it finds things in whatever it sees."""
    path = tmp_path_factory.mktemp("tiles") / "model.safetensors"
    config = small_config(model={"masks": "last", "score_threshold": 0.0, "max_detections": 500})
    torch.manual_seed(0)
    save_checkpoint(path, build_model(config.model, 3).state_dict(), config=config, class_names=["a", "b", "c"])
    return path


def picture(height: int = 152, width: int = 200) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def tiled(**options: Any) -> Inference:
    return Inference(tiling=Tiling(64, 0.25), batch_size=4, **options)


def test_one_tile_is_the_picture_itself(checkpoint: Path) -> None:
    detector = load(checkpoint, device="cpu")
    plain, one = detector.predict(picture(60, 64)), detector.predict(picture(60, 64), tile=64)
    assert len(plain) >= 10 and plain.boxes.equal(one.boxes) and plain.scores.equal(one.scores)
    assert plain.mask_probs is not None and one.mask_probs is not None and plain.mask_probs.equal(one.mask_probs)
    assert one.image is not None and plain.labels.equal(one.labels) and one.category_ids == plain.category_ids


def test_in_python_files_arrays_and_lists_are_cut_and_merged(checkpoint: Path, tmp_path: Path) -> None:
    detector = load(checkpoint, device="cpu")
    Image.fromarray(picture()).save(tmp_path / "a.png")
    file, array = detector.predict([tmp_path / "a.png", picture()], tile=64, overlap=0.25)
    best = detector.predict(picture(), tile=64, overlap=0.25, max_merged=15)
    assert file.boxes.equal(array.boxes) and len(file) > 20 and file.size == (152, 200)
    assert file.image == tmp_path / "a.png" and array.draw().size == (200, 152)
    assert best.scores.equal(file.scores[:15])
    threshold = float(file.scores[10])
    assert len(detector.predict(picture(), tile=64, overlap=0.25, score_threshold=threshold)) == 11


def test_a_full_tile_is_a_warning(checkpoint: Path) -> None:
    detector = load(checkpoint, device="cpu", max_detections=10)
    with pytest.warns(UserWarning, match="tiles hold as many objects as the network may give: raise --max-detections"):
        detector.predict(picture(), tile=64)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tile", "12"], "tile 12: give a side of at least 64 pixels, e.g. 1024"),
        (["--tile", "64", "--overlap", "1"], "overlap 1.0: give the share of a tile's side"),
        (["--tile", "64", "--overlap", "much"], "'much' is not a number"),
        (["--tile", "64", "--max-merged", "0"], "'0' is not a whole number of at least 1"),
        (["--tile", "0"], "'0' is not a whole number of at least 1"),
        (["--no-whole"], "--no-whole is about tiles: add --tile 1024"),
        (["--max-merged", "5"], "--max-merged is about tiles: add --tile 1024"),
        (["--overlap", "0.5"], "--overlap is about tiles: add --tile 1024"),
    ],
)
def test_what_makes_no_sense_is_one_line(
    words: list[str], message: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(picture()).save(tmp_path / "a.png")
    assert main(["predict", str(checkpoint), str(tmp_path / "a.png"), "--out", str(tmp_path / "out"), *words]) == 2
    told = capsys.readouterr().err.strip()
    assert message in told and "\n" not in told and not (tmp_path / "out").exists()


def test_the_command_writes_the_merged_objects_and_a_drawing(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(picture()).save(tmp_path / "a.png")
    out = tmp_path / "out"
    words = ["--tile", "64", "--overlap", "0.25", "--batch-size", "4", "--device", "cpu"]
    assert main(["predict", str(checkpoint), str(tmp_path / "a.png"), "--out", str(out), *words]) == 0
    told = capsys.readouterr()
    assert "a.png: 200 x 152 pixels, 13 tiles, the picture at 1/4 among them" in told.out
    assert "hold as many objects" not in told.err
    entries = json.loads((out / NAME).read_text())
    found = load(checkpoint, device="cpu").predict(picture(), tile=64, overlap=0.25, batch_size=4)
    assert [entry["score"] for entry in entries] == found.scores.tolist() and len(entries) > 10
    assert [entry["bbox"] for entry in entries] == [one["bbox"] for one in found.to_coco()]
    with Image.open(out / "drawings" / "a.png") as drawing:
        assert drawing.size == (200, 152)
    assert not (out / "predictions.geojson").exists()


def test_large_files_are_read_by_windows_with_the_same_results(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rasterio")
    for tag in (1, 6):
        save(tmp_path / f"{tag}.png", picture(), tag)
    options: dict[str, Any] = {"device": "cpu", "outputs": Outputs(as_dataset="coco"), "score": 0.2525}
    run_predict(checkpoint, [tmp_path / "1.png", tmp_path / "6.png"], out=tmp_path / "a", inference=tiled(), **options)
    windows = tiled(max_pixels=10_000)
    run_predict(checkpoint, [tmp_path / "1.png", tmp_path / "6.png"], out=tmp_path / "b", inference=windows, **options)
    whole, parts = (json.loads((tmp_path / out / NAME).read_text()) for out in "ab")
    found = [
        [one for one in half if one["file_name"] == name] for half in (whole, parts) for name in ("1.png", "6.png")
    ]
    assert found[0] == found[2] and len(found[0]) > 10
    for other in found[1:]:  # a turned picture's tiles come in another order
        assert [one["category"] for one in other] == [one["category"] for one in found[0]]
        boxes, expected = (np.array([one["bbox"] for one in each]) for each in (other, found[0]))
        assert np.abs(boxes - expected).max() < 0.01
    assert "large pictures with an orientation tag left out; store them upright: 1" in capsys.readouterr().out
    assert len(open_split(tmp_path / "a" / "coco", "train").records) == 2
    assert len(open_split(tmp_path / "b" / "coco", "train").records) == 1


def test_a_large_file_of_another_kind_or_without_the_extra_is_skipped_with_its_line(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.webp", "a.png", "small.png"):
        Image.fromarray(picture(*((152, 200) if name != "small.png" else (70, 70)))).save(tmp_path / name)
    monkeypatch.setitem(sys.modules, "rasterio", None)
    summary = run_predict(
        checkpoint, [tmp_path], out=tmp_path / "out", device="cpu", inference=tiled(max_pixels=10_000), draw=False
    )
    assert summary.images == 1 and len(summary.skipped) == 2
    told = capsys.readouterr().err
    assert "a.webp: more than max_pixels 10000, and .webp files are not read by windows" in told
    assert "a.png: reading a picture by windows needs rasterio: pip install 'cascade-rcnn[huge]'" in told
    with pytest.raises(UserError, match=r"a\.png: reading a picture by windows needs rasterio"):
        load(checkpoint, device="cpu").predict(tmp_path / "a.png", tile=64, max_pixels=10_000)
    with pytest.raises(UserError, match=r"a\.png: .*more than max_pixels 10000"):
        load(checkpoint, device="cpu").predict(tmp_path / "a.png", max_pixels=10_000)


def test_an_interrupted_picture_says_so(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.png", "b.png"):
        Image.fromarray(picture()).save(tmp_path / name)
    looks = Detector.look
    count = 0

    def stops(self: Detector, arrays: Any) -> list[Detections]:
        nonlocal count
        count += 1
        if count == 8:
            raise KeyboardInterrupt
        return looks(self, arrays)

    monkeypatch.setattr(Detector, "look", stops)
    with pytest.raises(KeyboardInterrupt):
        run_predict(checkpoint, [tmp_path], out=tmp_path / "out", device="cpu", inference=tiled(), draw=False)
    told = capsys.readouterr().err
    assert "interrupted after 12 of 13 tiles of b.png: nothing of this picture is written; " in told
    partial = json.loads((tmp_path / "out" / "predictions.partial.json").read_text())
    assert {entry["file_name"] for entry in partial} == {"a.png"} and not (tmp_path / "out" / NAME).exists()


def geotiff(path: Path, pixels: NDArray[Any], **changes: Any) -> Path:
    import rasterio

    options = {"crs": "EPSG:32633", "transform": rasterio.Affine(0.5, 0, 500_000, 0, -0.5, 5_500_000)} | changes
    shape = {"height": pixels.shape[0], "width": pixels.shape[1], "count": 3, "dtype": pixels.dtype}
    with rasterio.open(path, "w", driver="GTiff", **shape, **options) as file:
        file.write(pixels.transpose(2, 0, 1))
    return path


def test_of_a_file_that_only_windows_read_what_is_wrong_is_said_as_these_say_it(tmp_path: Path) -> None:
    """16 bits per colour: Pillow does not know such a TIFF, but rasterio knows why it cannot be shown."""
    pytest.importorskip("rasterio")
    path = geotiff(tmp_path / "dark.tif", picture().astype(np.uint16))
    with pytest.raises(DataError, match="--range"):
        open_rows(path, Config(), max_pixels=10**6)
    (tmp_path / "text.tif").write_text("no picture")
    with pytest.raises(DataError, match="cannot be read as an image"):
        open_rows(tmp_path / "text.tif", Config(), max_pixels=10**6)


def signed_area(ring: list[list[float]]) -> float:
    x, y = np.array(ring).T
    x, y = x - x[0], y - y[0]
    return float(np.dot(x[:-1], y[1:]) - np.dot(x[1:], y[:-1])) / 2


def test_georeferenced_pictures_give_geojson(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rasterio = pytest.importorskip("rasterio")
    out = tmp_path / "out"
    files = [geotiff(tmp_path / "field.tif", picture(70, 90)), tmp_path / "plain.png"]
    Image.fromarray(picture(70, 70)).save(files[1])
    run_predict(checkpoint, files, out=out, device="cpu", inference=tiled(), draw=False)
    assert "on the map: " in capsys.readouterr().out
    content = json.loads((out / "predictions.geojson").read_text())
    entries = [one for one in json.loads((out / NAME).read_text()) if one["file_name"] == "field.tif"]
    assert set(content) == {"type", "features"} and content["type"] == "FeatureCollection"
    assert len(content["features"]) == len(entries) > 10
    for feature, entry in zip(content["features"], entries):
        assert set(feature) == {"type", "geometry", "properties"} and feature["type"] == "Feature"
        properties = feature["properties"]
        assert properties["file_name"] == "field.tif" and properties["category"] == entry["category"]
        assert properties["score"] == entry["score"]
        geometry = feature["geometry"]
        polygons = geometry["coordinates"] if geometry["type"] == "MultiPolygon" else [geometry["coordinates"]]
        for outer, *holes in polygons:
            assert outer[0] == outer[-1] and len(outer) >= 4 and signed_area(outer) > 0
            assert all(hole[0] == hole[-1] and signed_area(hole) < 0 for hole in holes)
        corners = np.concatenate([np.array(polygon[0]) for polygon in polygons])
        easts, norths = rasterio.warp.transform("OGC:CRS84", "EPSG:32633", *corners.T)
        x, y = (np.array(easts) - 500_000) / 0.5, (5_500_000 - np.array(norths)) / 0.5
        left, top, width, height = entry["bbox"]
        assert left - 2 <= x.min() and x.max() <= left + width + 2
        assert top - 2 <= y.min() and y.max() <= top + height + 2
    run_predict(checkpoint, [files[1]], out=out, device="cpu", inference=tiled(), draw=False)
    assert not (out / "predictions.geojson").exists()  # not of this run


def test_without_masks_features_are_boxes_and_the_date_line_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rasterio = pytest.importorskip("rasterio")
    config = small_config(model={"masks": "none", "score_threshold": 0.0})
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, build_model(config.model, 3).state_dict(), config=config, class_names=["a", "b", "c"])
    transform = rasterio.Affine(0.001, 0, 179.95, 0, -0.001, 10)
    geotiff(tmp_path / "far.tif", picture(100, 100), crs="EPSG:4326", transform=transform)
    run_predict(path, [tmp_path / "far.tif"], out=tmp_path / "out", device="cpu", inference=tiled(), draw=False)
    features = json.loads((tmp_path / "out" / "predictions.geojson").read_text())["features"]
    boxes = [feature for feature in features if feature["geometry"] is not None]
    assert boxes and all(len(feature["geometry"]["coordinates"][0]) == 5 for feature in boxes)
    longitudes = np.concatenate([np.array(one["geometry"]["coordinates"][0])[:, 0] for one in boxes])
    assert longitudes.max() <= 180 and longitudes.min() >= -180 and longitudes.min() < 0 < longitudes.max()
    lost = len(features) - len(boxes)
    assert lost and f"{lost} without geometry, as they lie across the date line" in capsys.readouterr().out


def test_a_place_that_is_not_known_is_told(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rasterio")
    geotiff(tmp_path / "a.tif", picture(), crs=None)
    run_predict(checkpoint, [tmp_path / "a.tif"], out=tmp_path / "out", device="cpu", inference=tiled(), draw=False)
    assert "not in the GeoJSON: it has a transform but no CRS" in capsys.readouterr().err
    assert not (tmp_path / "out" / "predictions.geojson").exists()


@pytest.mark.filterwarnings("ignore")  # rasterio's own of such a transform
def test_a_transform_without_area_is_told(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Written out, all objects would lie in one point."""
    rasterio = pytest.importorskip("rasterio")
    geotiff(tmp_path / "a.tif", picture(), transform=rasterio.Affine(0, 0, 500_000, 0, 0, 5_500_000))
    run_predict(checkpoint, [tmp_path / "a.tif"], out=tmp_path / "out", device="cpu", inference=tiled(), draw=False)
    assert "not in the GeoJSON: its transform puts all pixels on one line or point" in capsys.readouterr().err
    assert not (tmp_path / "out" / "predictions.geojson").exists()


def test_masks_of_more_pixels_than_coco_counts_are_polygons() -> None:
    probs = torch.ones(1, 28, 28)
    box = torch.tensor([[70_000.0, 80_000, 70_010, 80_010]])
    found = Detections(
        box, torch.ones(1), torch.zeros(1, dtype=torch.int64), (90_000, 90_000), ("a",), mask_probs=probs
    )
    assert MOST_RLE_PIXELS < 90_000**2
    (result,) = found.to_coco()
    ring = np.array(result["segmentation"]).reshape(-1, 2)
    assert ring.min(axis=0) == pytest.approx([70_000, 80_000], abs=1)
    found.mask_probs = torch.zeros(1, 28, 28)
    assert found.to_coco()[0]["segmentation"] == {"size": [90_000, 90_000], "counts": [90_000**2]}


class FindsBright(nn.Module):
    """The one bright rectangle of each picture, if there is one, and of which class it is."""

    def detect(self, images: ImageBatch) -> RawDetections:
        batch = len(images)
        raw = RawDetections(
            torch.zeros(batch, 1, 4),
            torch.zeros(batch, 1),
            torch.zeros(batch, 1, dtype=torch.int64),
            torch.zeros(batch, 1, dtype=torch.bool),
        )
        for b in range(batch):
            ys, xs = (images.pixels[b].float().mean(dim=0) > 128).nonzero(as_tuple=True)
            if len(ys):
                raw.boxes[b, 0] = torch.tensor([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
                raw.scores[b], raw.valid[b] = 0.9, True
        return raw


@pytest.mark.parametrize("labelled", ["stored", "upright"])
@pytest.mark.parametrize("max_pixels", [100_000, 1_000])
def test_evaluation_by_tiles_sees_pictures_as_their_labels_count_them(
    labelled: str, max_pixels: int, tmp_path: Path
) -> None:
    if max_pixels < 10_000:
        pytest.importorskip("rasterio")
    split = open_split(write_coco(tmp_path, 6, size=(120, 90), labelled=labelled), "train")
    data = DataConfig(short_side=(64,), long_side=64, max_pixels=max_pixels)
    detector = Detector(FindsBright(), replace(Config(), data=data), split.class_names)  # type: ignore[arg-type]
    results, seen = detect_in_tiles(detector, split, Tiling(64, 0.5), progress=False)
    assert seen is split
    truth = {record.image_id: record.boxes[0] for record in split.records}
    assert len(results) == 4
    for result in results:
        x, y, width, height = result["bbox"]
        assert np.abs(np.array([x, y, x + width, y + height]) - truth[result["image_id"]]).max() <= 1
        assert result["category_id"] == 1


def test_the_command_evaluates_by_tiles(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = small_config(model={"score_threshold": 0.0})
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, build_model(config.model, 1).state_dict(), config=config, class_names=["thing"])
    write_coco(tmp_path / "data", 1, size=(120, 90))
    words = ["--data", str(tmp_path / "data"), "--split", "train", "--tile", "64", "--device", "cpu"]
    assert main(["evaluate", str(path), *words, "--out", str(tmp_path / "metrics.json")]) == 0
    assert "28 of 28 tiles hold as many objects as the network may give" in capsys.readouterr().err
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["bbox/AP"] is not None and any(
        name.startswith("bbox/AR") and name > "bbox/AR100" for name in metrics
    )


@pytest.mark.parametrize("max_pixels", [100_000, 1_000])
def test_evaluation_by_tiles_goes_on_without_what_cannot_be_read(
    max_pixels: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if max_pixels < 10_000:
        pytest.importorskip("rasterio")
    split = open_split(write_coco(tmp_path, 1, size=(120, 90)), "train")
    damaged = split.records[1].path
    damaged.write_bytes(damaged.read_bytes()[:200])
    data = DataConfig(short_side=(64,), long_side=64, max_pixels=max_pixels)
    detector = Detector(FindsBright(), replace(Config(), data=data), split.class_names)  # type: ignore[arg-type]
    results, seen = detect_in_tiles(detector, split, Tiling(64, 0.5), progress=False)
    said = capsys.readouterr().err
    assert damaged.name in said and "1 of 4 images of 'train' cannot be read" in said
    assert {one["image_id"] for one in results} == {record.image_id for record in seen.records}
    assert len(seen) == 3 and damaged not in [record.path for record in seen.records]
    for record in split.records:
        record.path.write_bytes(b"")
    with pytest.raises(DataError, match="so with all 4 images of 'train'"):
        detect_in_tiles(detector, split, Tiling(64, 0.5), progress=False)


def test_merged_results_are_measured_without_the_limit_of_a_hundred(tmp_path: Path) -> None:
    split = open_split(write_coco(tmp_path, 1, size=(120, 90)), "train")
    notes: list[str] = []
    config, same = merged_limits([{"image_id": 1}] * 250 + [{"image_id": 2}], Config(), split, notes)
    assert config.model.max_detections == 250 and same is split and notes == []
    split.records[0] = replace(split.records[0], height=70_000, width=70_000)
    _, boxes = merged_limits([], Config(), split, notes)
    assert not boxes.has_masks and "masks are left out: a picture of 4,900,000,000 pixels" in notes[0]


def test_a_scene_over_a_border_is_one_object(tmp_path: Path) -> None:
    pixels, box = scene(3, (120, 160))
    data = DataConfig(short_side=(64,), long_side=64)
    detector = Detector(FindsBright(), replace(Config(), data=data), ("thing",))  # type: ignore[arg-type]
    found = detector.predict(pixels, tile=64, overlap=0.5)
    assert len(found) == 1 and np.abs(found.boxes[0].numpy() - box).max() < 2  # of 1/2 or 1/4


def test_no_picture_that_can_be_read_is_an_error(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.tif").write_bytes(b"II*\0nothing")
    with pytest.raises(DataError, match="none of the 1 files could be read"):
        run_predict(checkpoint, [tmp_path / "broken.tif"], out=tmp_path / "out", device="cpu", inference=tiled())
