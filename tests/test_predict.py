"""Prediction: every kind of input, boxes in original pixels, the command on files, folders, videos and shards."""

from __future__ import annotations

import io
import json
import shutil
import struct
import sys
import threading
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faster_coco_eval.core import mask as coco_mask
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from cascade_rcnn import load
from cascade_rcnn.checkpoint import save_checkpoint
from cascade_rcnn.cli import main
from cascade_rcnn.config import Config, DataConfig, ModelConfig
from cascade_rcnn.distributed import choose_device
from cascade_rcnn.errors import CheckpointError, ConfigError, DataError, UserError
from cascade_rcnn.inference import detector as detector_module
from cascade_rcnn.inference.detections import Detections
from cascade_rcnn.inference.detector import Detector
from cascade_rcnn.inference.media import VideoReader, VideoWriter, collect
from cascade_rcnn.inference.predictions_file import NAME, ResultsFile, join_shards, parse_shard
from cascade_rcnn.inference.run_model import Inference, Precision
from cascade_rcnn.models.build import build_model
from cascade_rcnn.predict import Outputs, run_predict
from cascade_rcnn.structures import ImageBatch, RawDetections
from small_training import small_config, small_data


class FindsBright(nn.Module):
    """Finds the one bright rectangle of each image, and a false object of low score."""

    def detect(self, images: ImageBatch) -> RawDetections:
        batch = len(images)
        raw = RawDetections(
            torch.zeros(batch, 3, 4),
            torch.zeros(batch, 3),
            torch.zeros(batch, 3, dtype=torch.int64),
            torch.zeros(batch, 3, dtype=torch.bool),
        )
        for b in range(batch):
            bright = images.pixels[b].float().mean(dim=0) > 128
            ys, xs = bright.nonzero(as_tuple=True)
            raw.boxes[b, 0] = torch.tensor([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
            raw.boxes[b, 1] = torch.tensor([0.0, 0, 8, 8])
            raw.scores[b] = torch.tensor([0.9, 0.2, 0])
            raw.labels[b, 1] = 1
            raw.valid[b, :2] = True
        return raw


def make_detector() -> Detector:
    config = Config(model=ModelConfig(), data=DataConfig(short_side=(64,), long_side=160))
    return Detector(FindsBright(), config, ("lamp", "ghost"), (7, 9))  # type: ignore[arg-type]


def picture(height: int = 48, width: int = 100) -> NDArray[np.uint8]:
    pixels = np.full((height, width, 3), 20, dtype=np.uint8)
    pixels[10:30, 20:60] = (250, 240, 230)
    return pixels


BOX = [20.0, 10.0, 60.0, 30.0]


def save_network(path: Path, **model: Any) -> Path:
    config = small_config(model={"score_threshold": 0.0, **model})
    torch.manual_seed(1)
    network = build_model(config.model, 5)
    save_checkpoint(path, network.state_dict(), config=config, class_names=tuple("abcde"), category_ids=(3, 4, 5, 6, 7))
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_network(tmp_path_factory.mktemp("model") / "best.safetensors", masks="last")


# What may be handed in


def test_every_kind_of_input_gives_the_same_boxes(tmp_path: Path) -> None:
    pixels = picture()
    path = tmp_path / "lamp.png"
    Image.fromarray(pixels).save(path)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    frozen = np.asarray(Image.fromarray(pixels))  # read-only, as Pillow gives it
    for image in (path, str(path), Image.fromarray(pixels), pixels, frozen, pixels[:, :, ::-1], tensor):
        found = make_detector().predict(image)
        assert isinstance(found, Detections)
        assert found.size == (48, 100) and found.names == ["lamp", "ghost"]
        assert found.boxes[0].tolist() == pytest.approx(BOX, abs=1.0)


def test_bytes_and_open_files_are_files(tmp_path: Path) -> None:
    """Turned upright too, as the file itself is; an array has no orientation."""
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "lamp.jpg"
    Image.fromarray(picture()).rotate(90, expand=True).save(path, exif=exif, quality=95)
    content = path.read_bytes()
    with path.open("rb") as stream:
        images: list[Any] = [path, content, bytearray(content), memoryview(content), io.BytesIO(content), stream]
        for found in make_detector().predict(images, batch_size=2):
            assert found.size == (48, 100) and found.draw().size == (100, 48)
            assert found.boxes[0].tolist() == pytest.approx(BOX, abs=1.0)
        with pytest.raises(UserError, match=r"lamp\.jpg: holds no bytes.*seek\(0\)"):
            make_detector().predict(stream)
    with path.open("r") as text, pytest.raises(UserError, match="mode 'rb'"):
        make_detector().predict(text)  # type: ignore[arg-type]


def test_grey_pictures_are_taken(tmp_path: Path) -> None:
    grey = picture()[:, :, 0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    for image in (grey, grey[:, :, None], torch.from_numpy(grey)[None], Image.fromarray(grey), tmp_path / "grey.png"):
        assert make_detector().predict(image).boxes[0].tolist() == pytest.approx(BOX, abs=1.0)


def test_boxes_come_back_by_each_sides_own_factor() -> None:
    """A size whose two factors differ by rounding: 37 x 301 becomes 20 x 160."""
    pixels = np.full((37, 301, 3), 10, dtype=np.uint8)
    pixels[:, 200:] = 255
    box = make_detector().predict(pixels).boxes[0].tolist()
    assert box == pytest.approx([200, 0, 301, 37], abs=1.9)
    assert box[3] == 37.0 and box[2] == 301.0


def test_a_file_is_turned_upright_by_its_exif_orientation(tmp_path: Path) -> None:
    upright = Image.fromarray(picture())
    for orientation, stored in (
        (1, upright),
        (6, upright.rotate(90, expand=True)),
        (3, upright.rotate(180)),
        (8, upright.rotate(-90, expand=True)),
        (2, upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
        (4, upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM)),
        (5, upright.transpose(Image.Transpose.TRANSPOSE)),
        (7, upright.transpose(Image.Transpose.TRANSVERSE)),
    ):
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / f"{orientation}.png"
        stored.save(path, exif=exif)
        found = make_detector().predict(path)
        assert found.size == (48, 100)
        assert found.boxes[0].tolist() == pytest.approx(BOX, abs=1.0)
        assert found.draw().size == (100, 48)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((8, 8, 3), np.float32), "uint8"),
        (np.zeros((3, 8, 9), np.uint8), "channels first"),
        (np.zeros((8, 8, 4), np.uint8), r"\[8, 8, 4\]"),
        (np.zeros((0, 8, 3), np.uint8), "8x0"),
        (torch.zeros(3, 8, 8), "uint8"),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), "channels last"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "list of images"),
        (Image.new("F", (8, 8)), "mode F"),
        (17, "cannot predict on int"),
        (None, "cannot predict on NoneType.*cv2.imread"),
        (b"", "bytes of an image: holds no bytes"),
        (b"no picture", "bytes of an image: cannot be read as an image"),
        (io.BytesIO(), "BytesIO of an image: holds no bytes"),
        (io.StringIO("text"), "StringIO of an image: gives text"),
        ("nowhere.jpg", "no such file"),
    ],
)
def test_what_cannot_be_used_is_told_in_one_line(image: Any, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        make_detector().predict(image)
    assert "\n" not in str(caught.value)


def test_damaged_and_huge_files_are_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no picture")
    with pytest.raises(DataError, match=r"broken\.jpg"):
        make_detector().predict(tmp_path / "broken.jpg")
    Image.new("1", (300, 200)).save(tmp_path / "huge.png")
    small = Config(data=DataConfig(max_pixels=59_999))
    detector = Detector(FindsBright(), small, ("lamp", "ghost"))  # type: ignore[arg-type]
    for image in (tmp_path / "huge.png", (tmp_path / "huge.png").read_bytes()):
        with pytest.raises(DataError, match=r"300x200 is more than max_pixels 59999; raise it .*load\(max_pixels=N\)"):
            detector.predict(image)
    Image.fromarray(picture(200, 300)).save(tmp_path / "huge.png")
    assert len(detector.predict(tmp_path / "huge.png", max_pixels=60_000)) == 2  # the advice works
    with pytest.raises(DataError, match="folder"):
        make_detector().predict(tmp_path)


def test_a_list_gives_a_list_and_batches_change_nothing() -> None:
    images = [picture(48, 100), picture(90, 70), picture(60, 60), picture(48, 100)]
    alone = [make_detector().predict(image) for image in images]
    for size in (1, 3, 10):
        together = make_detector().predict(images, batch_size=size)
        assert [found.size for found in together] == [(48, 100), (90, 70), (60, 60), (48, 100)]
        for one, other in zip(alone, together):
            assert torch.equal(one.boxes, other.boxes)
    assert make_detector().predict([]) == []
    with pytest.raises(UserError, match="batch_size 0"):
        make_detector().predict(images, batch_size=0)


def test_score_threshold_leaves_out_weak_detections() -> None:
    assert make_detector().predict(picture(), score_threshold=0.5).names == ["lamp"]


# Checkpoints


def test_a_checkpoint_is_all_that_is_needed(checkpoint: Path) -> None:
    for path in (checkpoint, str(checkpoint), checkpoint.parent):
        detector = load(path, device="cpu")
        found = detector.predict(picture())
        assert len(found) == 10 and found.category_ids == (3, 4, 5, 6, 7)
        masks = found.masks
        assert masks is not None and masks.shape == (10, 48, 100)
        assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)
    assert "5 classes" in repr(detector)


def test_a_real_network_gives_the_same_alone_and_in_a_batch(checkpoint: Path) -> None:
    detector = load(checkpoint, device="cpu")
    images = [picture(), picture()[:, ::-1].copy()]  # of one size: padding is seen by a network, a little
    for one, image in zip(detector.predict(images, batch_size=2), images):
        alone = detector.predict(image)
        assert torch.allclose(one.scores, alone.scores, atol=1e-4)
        assert torch.allclose(one.boxes, alone.boxes, atol=1e-2)


def test_settings_of_test_time_can_be_changed_when_loading(checkpoint: Path) -> None:
    assert len(load(checkpoint, device="cpu", max_detections=3).predict(picture())) == 3
    assert len(load(checkpoint, device="cpu", score_threshold=0.99).predict(picture())) == 0
    first = load(checkpoint, device="cpu", stop_after_stage=1).predict(picture())
    assert not torch.equal(first.boxes, load(checkpoint, device="cpu").predict(picture()).boxes)
    with pytest.raises(ConfigError, match="stop_after_stage 9"):
        load(checkpoint, device="cpu", stop_after_stage=9)
    Image.fromarray(picture()).save(checkpoint.parent / "one.png")
    with pytest.raises(DataError, match="100x48 is more than max_pixels 4799"):
        load(checkpoint, device="cpu", max_pixels=4799).predict(checkpoint.parent / "one.png")


def test_stages_auto_is_chosen_when_loading_and_refused_where_it_cannot_be(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    detector = load(checkpoint, device="cpu", stop_after_stage="auto")
    assert detector.model.cascade.drops_hopeless and "stages auto" in detector.choices()
    assert detector.config == load(checkpoint, device="cpu").config
    assert not load(checkpoint, device="cpu").model.cascade.drops_hopeless
    with pytest.raises(UserError, match="--stages auto: compiled heads"):
        load(checkpoint, device="cpu", stop_after_stage="auto", compile=True)
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(UserError, match="drop --stages auto"):
        load(tmp_path / "model.onnx", stop_after_stage="auto")
    Image.fromarray(picture()).save(tmp_path / "one.png")
    words = ["predict", str(checkpoint), str(tmp_path / "one.png"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main([*words, "--stages", "auto"]) == 0 and "stages auto" in capsys.readouterr().out
    assert main([*words, "--stages", "some"]) == 2
    assert "'some' is neither auto nor a whole number of at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"precision": "banana"}, "precision 'banana': choose one of auto, fp32, tf32, bf16"),
        ({"precision": "fp16"}, "precision 'fp16'"),
        ({"precision": None}, "precision None"),
        ({"score_threshold": 50}, "score_threshold 50: give a number from 0 to 1; for 50 per cent write 0.5"),
        ({"score_threshold": -0.1}, "score_threshold -0.1"),
        ({"score_threshold": float("nan")}, "score_threshold nan"),
        ({"score_threshold": "0.5"}, "score_threshold '0.5': give a number"),
        ({"score_threshold": True}, "score_threshold True"),
        ({"score_threshold": 1.0}, "from 0 to below 1"),
        ({"max_detections": 0}, "max_detections 0: give a whole number of at least 1"),
        ({"max_detections": 2.5}, "max_detections 2.5: give a whole number"),
        ({"max_detections": "many"}, "max_detections 'many'"),
        ({"stop_after_stage": -1}, "stop_after_stage -1"),
        ({"max_pixels": 0}, "max_pixels 0: give a whole number of at least 1"),
        ({"device": "abacus"}, "device 'abacus' cannot be used"),
        ({"device": 0}, "device 0: give a name"),
        ({"compile": "yes"}, "compile 'yes': give True or False"),
    ],
)
def test_wrong_words_of_load_are_told_in_one_line(checkpoint: Path, words: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        load(checkpoint, **({"device": "cpu"} | words))
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"score_threshold": 50}, "for 50 per cent write 0.5"),
        ({"score_threshold": float("nan")}, "score_threshold nan"),
        ({"batch_size": 1.5}, "batch_size 1.5: give a whole number"),
        ({"max_pixels": -1}, "max_pixels -1"),
    ],
)
def test_wrong_words_of_predict_are_told_in_one_line(words: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        make_detector().predict(picture(), **words)
    assert message in str(caught.value)


def test_wrong_words_of_the_command_are_told_before_anything_is_written(tmp_path: Path, checkpoint: Path) -> None:
    Image.fromarray(picture()).save(tmp_path / "one.png")
    for words, message in (
        ({"score": 50}, "score 50"),
        ({"inference": Inference(batch_size=0)}, "batch_size 0"),
        ({"inference": Inference(precision="banana")}, "precision 'banana'"),  # type: ignore[arg-type]
        ({"inference": Inference(max_detections=0)}, "max_detections 0"),
        ({"outputs": Outputs(as_dataset="pascal")}, "data set format 'pascal': choose one of coco, yolo"),
        ({"outputs": Outputs(copy_images=True)}, "add --as coco"),
    ):
        with pytest.raises(UserError, match=message):
            run_predict(checkpoint, [tmp_path / "one.png"], out=tmp_path / "out", device="cpu", **words)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--precision banana", "'banana'"),
        ("--score-threshold 50", "'50' is not a number between 0 and 1"),
        ("--score-threshold 1", "model.score_threshold 1.0: from 0 to below 1"),
        ("--max-detections 0", "'0' is not a whole number"),
        ("--max-pixels 1e6", "'1e6' is not a whole number"),
        ("--stages 9", "there are 3 stages"),
        ("--device abacus", "device 'abacus'"),
        ("--as voc", "'voc'"),
        ("--as coco --shard 1/2", "drop --shard (or torchrun)"),
        ("--images-from one.png", "one.png: the text is not UTF-8"),
        ("--submission sent", "add --images-from FILE"),
        ("--max-pixels 4799", "100x48 is more than max_pixels 4799"),
    ],
)
def test_wrong_words_of_the_command_line(
    words: str,
    message: str,
    tmp_path: Path,
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(picture()).save("one.png")
    assert main(["predict", str(checkpoint), "one.png", "--out", "out", "--device", "cpu", *words.split()]) == 2
    told = capsys.readouterr().err.splitlines()
    assert told[-1].startswith("error: ") and message in told[-1]
    assert not Path("out/predictions.json").exists() and not Path("sent").exists()


def test_a_detector_moves_to_another_device(checkpoint: Path) -> None:
    detector = load(checkpoint, device="cpu")
    before = detector.predict(picture())
    assert detector.to("cpu") is detector and detector.to(torch.device("cpu")).to("auto") is detector
    detector.to("cpu")
    assert torch.equal(detector.predict(picture()).boxes, before.boxes)
    for device in ("abacus", "meta", 0, "cuda:99"):
        with pytest.raises(UserError, match="device"):
            detector.to(device)  # type: ignore[arg-type]
    assert str(detector.model.mean.device) == "cpu"


def test_threads_share_a_network_in_training_mode() -> None:
    """Whoever is done first must not put it back while others still predict."""

    class Watches(FindsBright):
        def __init__(self) -> None:
            super().__init__()
            self.modes: list[bool] = []
            self.first, self.second = threading.Event(), threading.Event()

        def detect(self, images: ImageBatch) -> RawDetections:
            late = not self.first.is_set()
            self.first.set()
            if late:  # the first waits until the second is done
                assert self.second.wait(10)
            self.modes.append(self.training)
            return super().detect(images)

    network = Watches()
    detector = Detector.from_model(network, make_detector().config, ("lamp", "ghost"))  # type: ignore[arg-type]
    assert network.training
    thread = threading.Thread(target=detector.predict, args=(picture(),))
    thread.start()
    assert network.first.wait(10)
    detector.predict(picture())
    network.second.set()
    thread.join()
    assert network.modes == [False, False] and network.training
    detector.predict(picture())
    assert network.training and not network.eval().training
    detector.predict(picture())
    assert not network.training


def test_bad_checkpoints_and_devices_are_told_in_one_line(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        load(tmp_path / "nothing.safetensors")
    with pytest.raises(UserError, match="device 'abacus'"):
        choose_device("abacus")
    state = {"backbone.body.conv1.weight": torch.zeros(3)}
    save_checkpoint(tmp_path / "odd.safetensors", state, config=small_config(), class_names=("a",))
    with pytest.raises(CheckpointError, match="do not fit"):
        load(tmp_path / "odd.safetensors", device="cpu")


# The command


def write_inputs(root: Path) -> Path:
    for name in ("a/one.png", "b/one.png", "b/deep/two.jpg", "000000000042.jpg", "three.bmp"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture()).save(path)
    (root / "b" / "broken.jpg").write_bytes(b"no picture")
    (root / "notes.txt").write_text("not an image")
    (root / ".hidden.png").write_bytes(b"hidden")
    return root


def test_the_command_walks_folders_and_keeps_names_apart(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = write_inputs(tmp_path / "photos"), tmp_path / "out"
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    summary = run_predict(checkpoint, [root], out=out, device="cpu", inference=Inference(batch_size=2), score=0.0)
    assert summary.images == 5 and len(summary.skipped) == 1 and "broken.jpg" in summary.skipped[0]
    assert "skipped" in capsys.readouterr().err
    entries = json.loads((out / NAME).read_text())
    names = {"000000000042.jpg", "a/one.png", "b/deep/two.jpg", "b/one.png", "three.bmp"}
    assert {entry["file_name"] for entry in entries} == names
    assert len(entries) == summary.objects == 50
    drawings = {path.relative_to(out / "drawings").as_posix() for path in (out / "drawings").rglob("*.*")}
    assert drawings == {"000000000042.jpg", "a/one.png", "b/deep/two.jpg", "b/one.png", "three.bmp.jpg"}
    for entry in entries:
        keys = {"file_name", "label", "category", "category_id", "bbox", "score", "segmentation"}
        assert set(entry) == keys | ({"image_id"} if entry["file_name"].startswith("0000") else set())
        assert entry["category"] == "abcde"[entry["label"]] and entry["category_id"] == entry["label"] + 3
        assert entry["segmentation"]["size"] == [48, 100]
    assert {path: path.read_bytes() for path in before} == before


def test_what_a_folder_holds_besides_is_told(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "photos"
    root.mkdir()
    for name in ("a.jfif", "b.jpe", "c.avif", "d.tga"):
        try:
            Image.fromarray(picture()).save(root / name)
        except (KeyError, OSError):  # a Pillow without that codec
            (root / name).unlink(missing_ok=True)
            Image.fromarray(picture()).save(root / "other.jpg")
    for name in ("x.heic", "y.HEIC", "notes.txt", "README"):
        (root / name).write_text("-")
    (root / "elsewhere").symlink_to(tmp_path)
    assert run_predict(checkpoint, [root], out=tmp_path / "out", device="cpu", draw=False).images == 4
    told = capsys.readouterr().err
    line = "left out, being no images or videos: 2 .heic, 1 .txt, 1 without an ending, 1 links to folders"
    assert sorted(line.split(": ")[1].split(", ")) == sorted(told.splitlines()[0].split(": ")[1].split(", "))
    (tmp_path / "phone").mkdir()
    (tmp_path / "phone" / "x.heic").write_text("-")
    with pytest.raises(DataError, match=r"no image or video found, only 1 \.heic; known suffixes"):
        run_predict(checkpoint, [tmp_path / "phone"], out=tmp_path / "out", device="cpu")


def test_ids_come_from_a_list_or_from_cocos_names_and_no_other(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "photos"
    for name in ("a/cat_1.png", "a/dog_1.png", "b/000000000005.png", "c/000000000005.png", "000000000006.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture()).save(root / name)

    def ids(**outputs: Any) -> dict[str, int]:
        run_predict(checkpoint, [root], out=tmp_path / "out", device="cpu", draw=False, outputs=Outputs(**outputs))
        entries = json.loads((tmp_path / "out" / NAME).read_text())
        return {entry["file_name"]: entry["image_id"] for entry in entries if "image_id" in entry}

    assert ids() == {"000000000006.png": 6}  # two others would share an id
    with pytest.raises(DataError, match=r"'a/cat_1.png' .* add --images-from FILE"):
        ids(submission=("coco", tmp_path / "sent"))
    images = [
        {"id": 20, "file_name": "cat_1.png"},
        {"id": 10, "file_name": "dog_1.png"},
        {"id": 3, "file_name": "x.png"},
    ]
    (tmp_path / "list.json").write_text(json.dumps({"images": images}))
    assert ids(images_from=tmp_path / "list.json") == {"a/cat_1.png": 20, "a/dog_1.png": 10}
    assert "2 of 5 images have an id there; 1 of its 3 images are not looked at" in capsys.readouterr().out
    for name in ("b", "c", "000000000006.png"):
        shutil.rmtree(root / name) if (root / name).is_dir() else (root / name).unlink()
    ids(images_from=tmp_path / "list.json", submission=("coco", tmp_path / "sent"))
    sent = json.loads((tmp_path / "sent" / "results.json").read_text())
    assert {one["image_id"] for one in sent} == {10, 20} and len(sent) == 20


def test_masks_may_be_polygons(tmp_path: Path, checkpoint: Path) -> None:
    Image.fromarray(picture()).save(tmp_path / "one.png")
    masks = []
    for polygons in (False, True):
        outputs = Outputs(polygons=polygons)
        run_predict(checkpoint, [tmp_path / "one.png"], out=tmp_path / "out", device="cpu", draw=False, outputs=outputs)
        entries = json.loads((tmp_path / "out" / NAME).read_text())
        parts = [one["segmentation"] for one in entries]
        assert any(isinstance(one, list) for one in parts) is polygons
        rles = [coco_mask.merge(coco_mask.frPyObjects(one, 48, 100)) if isinstance(one, list) else one for one in parts]
        masks.append(np.stack([coco_mask.decode(rle) for rle in rles]))
    assert np.array_equal(*masks) and masks[0].any()


def test_predictions_equal_those_of_python(tmp_path: Path, checkpoint: Path) -> None:
    Image.fromarray(picture()).save(tmp_path / "000000000007.png")
    run_predict(checkpoint, [tmp_path / "000000000007.png"], out=tmp_path / "out", device="cpu", draw=False)
    entries = json.loads((tmp_path / "out" / NAME).read_text())
    found = load(checkpoint, device="cpu").predict(tmp_path / "000000000007.png")
    found.image_id = 7
    keys = ("image_id", "category_id", "bbox", "score", "segmentation")
    assert [{key: entry[key] for key in keys} for entry in entries] == found.to_coco()
    assert not (tmp_path / "out" / "drawings").exists()


def test_looking_again_into_the_folder_above_leaves_the_drawings_out(tmp_path: Path, checkpoint: Path) -> None:
    Image.fromarray(picture()).save(tmp_path / "one.png")
    for _ in range(2):
        assert run_predict(checkpoint, [tmp_path], out=tmp_path / "out", device="cpu").images == 1


def test_shards_join_to_the_whole(tmp_path: Path, checkpoint: Path) -> None:
    root = write_inputs(tmp_path / "photos")
    whole = run_predict(checkpoint, [root], out=tmp_path / "whole", device="cpu", draw=False)
    parts = tmp_path / "parts"
    counts = []
    for shard in ("2/3", "3/3", "1/3"):
        assert not (parts / NAME).exists()
        counts.append(run_predict(checkpoint, [root], out=parts, device="cpu", draw=False, shard=shard).images)
    assert sum(counts) == whole.images and max(counts) == 2

    def content(path: Path) -> list[str]:
        return sorted(json.dumps(entry, sort_keys=True) for entry in json.loads(path.read_text()))

    assert content(parts / NAME) == content(tmp_path / "whole" / NAME)
    assert [path.name for path in parts.iterdir()] == [NAME]


def test_shards_are_named_or_come_from_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_shard("") == (1, 1) and parse_shard("2/8") == (2, 8)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert parse_shard("") == (4, 4)
    for word in ("0/3", "4/3", "x", "1", "1/0"):
        with pytest.raises(ConfigError, match="i/n"):
            parse_shard(word)


def test_results_appear_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / NAME
    path.write_text("[1]")
    with pytest.raises(RuntimeError), ResultsFile(path) as results:
        results.add([{"a": 1}, {"a": 2}])
        raise RuntimeError
    assert json.loads(path.read_text()) == [1]
    assert json.loads(results.partial.read_text()) == [{"a": 1}, {"a": 2}]
    with ResultsFile(path) as results:
        results.add([])
    assert json.loads(path.read_text()) == [] and not results.partial.exists()
    assert join_shards(tmp_path, 2) is None


def test_inputs_that_cannot_be_used(tmp_path: Path, checkpoint: Path) -> None:
    root = write_inputs(tmp_path / "photos")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    out = tmp_path / "out"
    for name, words in (
        ("none", "no such file or folder"),
        ("empty", "no image or video"),
        ("photos/notes.txt", "no known kind"),
        ("photos/b/broken.jpg", "none of the 1 files"),
    ):
        with pytest.raises(DataError, match=words):
            run_predict(checkpoint, [tmp_path / name], out=out, device="cpu")
    with pytest.raises(UserError, match="is a file"):
        run_predict(checkpoint, [root], out=tmp_path / "file", device="cpu")
    with pytest.raises(UserError, match="also the folder to look at"):
        run_predict(checkpoint, [root], out=root, device="cpu")


def test_a_drawing_never_replaces_its_image(tmp_path: Path, checkpoint: Path) -> None:
    path = tmp_path / "out" / "drawings" / "one.png"
    path.parent.mkdir(parents=True)
    Image.fromarray(picture()).save(path)
    before = path.read_bytes()
    with pytest.raises(UserError, match="overwrite the image itself"):
        run_predict(checkpoint, [path], out=tmp_path / "out", device="cpu")
    assert path.read_bytes() == before


def test_inputs_are_named_once_each(tmp_path: Path) -> None:
    root = write_inputs(tmp_path / "photos")
    twice = [file.name for file in collect([root, root / "b", root / "a" / "one.png"])]
    assert len(twice) == len(set(twice)) == 6
    (tmp_path / "other" / "a").mkdir(parents=True)
    Image.fromarray(picture()).save(tmp_path / "other" / "a" / "one.png")
    files = list(collect([root / "a", tmp_path / "other" / "a", root / "b" / "one.png"]))
    assert [file.name for file in files] == ["a/one.png", "a-2/one.png", "b/one.png"]


def test_a_video_is_drawn_and_counted_by_frames(tmp_path: Path, checkpoint: Path) -> None:
    pytest.importorskip("av")
    writer = VideoWriter(tmp_path / "clip.mp4", Fraction(10))
    for _ in range(5):
        writer.write(Image.fromarray(picture()))
    writer.close()
    out = tmp_path / "out"
    summary = run_predict(checkpoint, [tmp_path / "clip.mp4"], out=out, device="cpu", inference=Inference(batch_size=2))
    assert summary.images == 5
    entries = json.loads((out / NAME).read_text())
    assert {entry["frame"] for entry in entries} == set(range(5))
    reader = VideoReader(out / "drawings" / "clip.mp4")
    frames = list(reader)
    reader.close()
    assert len(frames) == 5 and frames[0].shape == (48, 100, 3)
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    with pytest.raises(DataError, match=r"broken\.mp4: cannot be read as a video"):
        run_predict(checkpoint, [tmp_path / "broken.mp4"], out=out, device="cpu")


CORNERS = {
    (1, 0, 0, 1): "RGB.",  # the colours of upper left, upper right, lower left, lower right as shown
    (0, 1, -1, 0): "BR.G",  # a quarter clockwise, as a phone held upright
    (-1, 0, 0, -1): ".BGR",
    (0, -1, 1, 0): "G.RB",
    (-1, 0, 0, 1): "GR.B",  # mirrored, as some front cameras
    (1, 0, 0, -1): "B.RG",
    (0, 1, 1, 0): "RBG.",
    (0, -1, -1, 0): ".GBR",
}


def turned_video(path: Path, matrix: tuple[int, int, int, int], pixels: NDArray[np.uint8]) -> Path:
    """A clip with that display matrix, which is written into its track header (ISO 14496-12)."""
    writer = VideoWriter(path, Fraction(10))
    for _ in range(2):
        writer.write(Image.fromarray(pixels))
    writer.close()
    content = bytearray(path.read_bytes())
    start = content.find(b"tkhd") + 4 + 40
    a, b, c, d = (factor << 16 for factor in matrix)
    content[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    return path


def corners(pixels: NDArray[np.uint8]) -> str:
    height, width = pixels.shape[:2]
    spots = [pixels[y, x] for y in (height // 4, 3 * height // 4) for x in (width // 4, 3 * width // 4)]
    return "".join("RGB"[int(np.argmax(spot))] if spot.max() > 100 else "." for spot in spots)


@pytest.mark.parametrize("matrix", list(CORNERS))
def test_turned_videos_are_read_upright(matrix: tuple[int, int, int, int], tmp_path: Path) -> None:
    pytest.importorskip("av")
    pixels = np.full((48, 128, 3), 20, dtype=np.uint8)
    pixels[:24, :64], pixels[:24, 64:], pixels[24:, :64] = (220, 30, 30), (30, 220, 30), (30, 30, 220)
    reader = VideoReader(turned_video(tmp_path / "clip.mp4", matrix, pixels))
    frames = list(reader)
    reader.close()
    assert [corners(frame) for frame in frames] == [CORNERS[matrix]] * 2
    assert frames[0].shape == ((48, 128, 3) if matrix[0] else (128, 48, 3))


def test_a_turned_video_is_detected_and_drawn_upright(tmp_path: Path, checkpoint: Path) -> None:
    pytest.importorskip("av")
    clip = turned_video(tmp_path / "clip.mp4", (0, 1, -1, 0), picture(64, 100))
    run_predict(checkpoint, [clip], out=tmp_path / "out", device="cpu")
    reader = VideoReader(tmp_path / "out" / "drawings" / "clip.mp4")
    frames = list(reader)
    reader.close()
    assert [frame.shape for frame in frames] == [(100, 64, 3)] * 2
    sizes = {tuple(entry["segmentation"]["size"]) for entry in json.loads((tmp_path / "out" / NAME).read_text())}
    assert sizes == {(100, 64)}


def test_videos_without_pyav_say_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"pip install 'cascade-rcnn\[video\]'"):
        VideoReader(tmp_path / "clip.mp4")


def test_the_generated_shapes_can_be_predicted(tmp_path: Path, checkpoint: Path) -> None:
    assert run_predict(checkpoint, [small_data() / "val"], out=tmp_path / "out", device="cpu", draw=False).images == 4


@pytest.mark.parametrize(
    ("units", "precision", "words"),
    [
        (
            True,
            "auto",
            "float32, channels-last, batch norm folded, the processor's bfloat16 units unused (--precision",
        ),
        (False, "auto", "float32, channels-last, batch norm folded;"),
        (True, "bf16", "bfloat16, channels-last, batch norm folded;"),
        (False, "bf16", "bfloat16, channels-last, batch norm folded, slower than float32 on this processor"),
    ],
)
def test_bfloat16_is_offered_where_it_pays(
    units: bool, precision: Precision, words: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(detector_module, "has_bfloat16_units", lambda: units)
    assert load(checkpoint, device="cpu", precision=precision).choices().startswith(f"cpu: {words}")


def test_what_was_chosen_for_the_device_is_told(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert load(checkpoint, device="cpu").choices().startswith("cpu: float32, channels-last")
    Image.fromarray(picture()).save(tmp_path / "one.png")
    inference = Inference(precision="bf16")
    run_predict(checkpoint, [tmp_path / "one.png"], out=tmp_path / "out", device="cpu", draw=False, inference=inference)
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("cpu: bfloat16, channels-last") and first.endswith("; not compiled (--compile)")
    with pytest.raises(UserError, match="precision tf32: cpu has no such units; use auto, fp32 or bf16"):
        load(checkpoint, device="cpu", precision="tf32")


def test_half_precision_moves_scores_a_little(checkpoint: Path) -> None:
    plain, half = (load(checkpoint, device="cpu", precision=name).predict(picture()) for name in ("fp32", "bf16"))
    assert not torch.equal(plain.scores, half.scores)
    assert torch.allclose(plain.scores, half.scores, atol=0.02)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tf32_is_on_inside_a_prediction_only() -> None:
    from cascade_rcnn.inference.run_model import _arithmetic

    matmul, before = torch.backends.cuda.matmul, torch.backends.cuda.matmul.allow_tf32
    for name, expected in (("fp32", False), ("tf32", True)):
        with _arithmetic(torch.device("cuda"), name):
            assert matmul.allow_tf32 is expected and torch.backends.cudnn.allow_tf32 is expected
        assert matmul.allow_tf32 is before
