"""Pictures of more than 8 bits: one range for a data set, the same grey everywhere, nothing read as black unsaid."""

from __future__ import annotations

import io
import json
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cascade_rcnn.config import DataConfig
from cascade_rcnn.data.dataset import DetectionDataset, read_record
from cascade_rcnn.data.formats.open import open_split
from cascade_rcnn.data.images import read_header, read_image, read_levels, to_array
from cascade_rcnn.data.levels import levels_of
from cascade_rcnn.data.split_levels import with_range
from cascade_rcnn.errors import ConfigError, DataError, UserError

GREY = np.random.default_rng(0).integers(0, 256, (24, 32)).astype(np.uint8)
GREY[0, :2] = 0, 255


def _set(root: Path, levels: np.ndarray, suffix: str, *, count: int = 3) -> Path:
    """A COCO data set of equal pictures."""
    (root / "train").mkdir(parents=True)
    images, rows = [], []
    for number in range(count):
        Image.fromarray(levels).save(root / "train" / f"{number}{suffix}")
        images.append({"id": number, "file_name": f"{number}{suffix}", "height": 24, "width": 32})
        rows.append({"id": number + 1, "image_id": number, "category_id": 1, "bbox": [2, 2, 9, 9], "iscrowd": 0})
    content = {"images": images, "annotations": rows, "categories": [{"id": 1, "name": "cell"}]}
    (root / "annotations").mkdir()
    (root / "annotations" / "instances_train.json").write_text(json.dumps(content))
    return root


@pytest.mark.parametrize(
    ("levels", "suffix", "range"),
    [
        (GREY.astype(np.uint16), ".png", "0 255"),
        (GREY.astype(np.uint16) * 4 + 3, ".tif", "0 1023"),
        (GREY.astype(np.uint16) * 16 + 5, ".png", "0 4095"),
        (GREY.astype(np.uint16) * 64 + 9, ".tif", "0 16383"),
        (GREY.astype(np.uint16) * 256 + 77, ".png", "0 65535"),
        (GREY.astype(np.int32) * 16 + 5, ".tif", "0 4095"),
        (GREY.astype(np.float32) / 255, ".tif", "0 1"),
        (GREY.astype(np.float32), ".tif", "0 255"),
        (GREY.astype(np.float32) * 16, ".tif", "0 4095"),
        (7000 + GREY.astype(np.uint16) * 4, ".tif", "7000 8020"),  # a radiometric camera
    ],
)
def test_the_range_of_a_data_set_makes_the_8_bit_picture_of_it(
    tmp_path: Path, levels: np.ndarray, suffix: str, range: str
) -> None:
    split = open_split(_set(tmp_path, levels, suffix), "train")
    data, line = with_range(DataConfig(), split)
    assert data.range == range and range in line and "levels" in line
    pixels = read_record(split.records[0], "coco", data).numpy()
    assert (pixels == pixels[0]).all() and np.abs(pixels[0].astype(int) - GREY).max() <= 1
    item = DetectionDataset(split, replace(data, short_side=(32,)), training=False)[0]
    assert item.image.max() > 240  # what evaluation sees
    predicted = to_array(split.records[0].path, range=data.range)  # and prediction
    np.testing.assert_array_equal(predicted, pixels.transpose(1, 2, 0))


def test_levels_that_no_type_holds_take_those_of_nearly_all_pixels(tmp_path: Path) -> None:
    scan = GREY.astype(np.int32) * 12 - 1000  # Hounsfield units
    scan[5, 5] = 900_000  # a glint
    split = open_split(_set(tmp_path, scan, ".tif"), "train")
    data, _ = with_range(DataConfig(), split)
    low, high = map(float, data.range.split())
    assert -1001 <= low < -950 and 2000 < high < 900_000
    with pytest.raises(DataError, match=r"0\.tif: int32 pixels, levels -1000 to 900000 in use.*--range"):
        read_image(split.records[0].path)
    assert read_image(split.records[0].path, range="-1000 2060")[0, 0, :2].tolist() == [0, 255]


def test_a_set_of_8_bit_pictures_keeps_auto_and_says_nothing(tmp_path: Path) -> None:
    split = open_split(_set(tmp_path, GREY, ".png"), "train")
    assert with_range(DataConfig(), split) == (DataConfig(), "")
    assert (read_image(split.records[0].path, range="0 4095").numpy()[0] == GREY).all()  # a range is for deep ones


def test_a_single_dark_picture_is_refused_and_the_way_out_works(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(GREY.astype(np.uint16) * 16).save(path)
    with pytest.raises(DataError, match=r"a\.png: levels 0 to 4080 in use of 0 to 65535.*--range"):
        to_array(path)
    assert to_array(path, range="0 4095").max() == 255
    assert to_array(path, range="dtype").max() == 4080 >> 8
    assert to_array(path, range="percentile").max() == 255
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(path)
    assert to_array(path).max() == 0  # a black frame is black


def test_arrays_and_pictures_of_16_bits_are_read_by_a_range_that_is_known() -> None:
    deep = GREY.astype(np.uint16) * 16
    for image in (deep, Image.fromarray(deep)):
        assert (to_array(image, range="0 4095")[..., 0] == GREY).all()
        with pytest.raises(UserError):
            to_array(image)
    with pytest.raises(UserError, match="array of float32"):
        to_array(GREY.astype(np.float32) / 255, range="0 4095")  # it would be black


def _write_rgb16(path: Path, levels: np.ndarray) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = levels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    head = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )


def test_colour_of_16_bits_keeps_its_low_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    colour = np.stack([GREY, GREY[::-1], GREY[:, ::-1]], axis=2)
    levels = colour.astype(np.uint16) * 16 + 7
    _write_rgb16(path, levels)
    assert read_header(path).deep
    np.testing.assert_array_equal(read_levels(path), levels)
    np.testing.assert_array_equal(read_image(path, range="0 4095").permute(1, 2, 0).numpy(), colour)
    with pytest.raises(DataError, match=r"levels 7 to 4087 in use"):
        read_image(path)
    _write_rgb16(path, levels * 16)
    np.testing.assert_array_equal(read_image(path).permute(1, 2, 0).numpy(), (levels * 16) >> 8)


def test_not_a_number_is_black(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    levels = np.full((4, 4), 0.5, np.float32)
    levels[0, 0], levels[0, 1] = np.nan, np.inf
    Image.fromarray(levels).save(path)
    assert read_image(path, range="0 1")[0, 0, :3].tolist() == [0, 255, 128]
    known: Any = levels_of([levels])
    assert (known.low, known.high) == (0.5, 0.5)
    assert levels_of([np.full((2, 2), np.nan, np.float32)]) is None


@pytest.mark.parametrize("text", ["", "wide", "0", "1 0", "0 nan", "1 2 3"])
def test_a_range_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.range"):
        DataConfig(range=text)


def test_bytes_and_open_files_of_16_bits_are_read_by_a_range_that_is_known() -> None:
    stream = io.BytesIO()
    Image.fromarray(GREY.astype(np.uint16) * 16).save(stream, "PNG")
    assert (to_array(stream.getvalue(), range="0 4095")[..., 0] == GREY).all()
    stream.seek(0)
    assert (to_array(stream, range="0 4095")[..., 0] == GREY).all()
    with pytest.raises(DataError, match=r"bytes of an image: levels 0 to 4080 .*--range"):
        to_array(stream.getvalue())
