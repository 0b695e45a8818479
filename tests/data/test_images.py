"""Image files become RGB bytes whatever they hold; what cannot is one line that names the file."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cascade_rcnn.data.images import image_size, quiet_pillow, read_image
from cascade_rcnn.errors import DataError

RAMP = np.arange(6 * 5 * 3, dtype=np.uint8).reshape(6, 5, 3) * 2


def _save(path: Path, picture: Image.Image, **options: object) -> Path:
    picture.save(path, **options)
    return path


def test_png_comes_back_exactly_in_channels_last_memory(tmp_path: Path) -> None:
    image = read_image(_save(tmp_path / "a.png", Image.fromarray(RAMP)))
    assert image.shape == (3, 6, 5)
    np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), RAMP)
    assert image[None].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    picture = Image.fromarray(RAMP).convert(mode)
    path = _save(tmp_path / ("a.tif" if mode == "CMYK" else "a.png"), picture)
    expected = np.asarray(picture.convert("RGBA").convert("RGB") if mode == "P" else picture.convert("RGB"))
    np.testing.assert_array_equal(read_image(path).permute(1, 2, 0).numpy(), expected)


def test_palette_with_transparency_reads_without_a_warning(tmp_path: Path) -> None:
    path = _save(tmp_path / "a.png", Image.fromarray(RAMP).convert("P"), transparency=bytes(range(90)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(path).shape == (3, 6, 5)


def test_sixteen_bits_keep_their_high_byte(tmp_path: Path) -> None:
    deep = (np.arange(30, dtype=np.uint16) * 2000).reshape(6, 5)
    image = read_image(_save(tmp_path / "a.png", Image.fromarray(deep)))
    np.testing.assert_array_equal(image.numpy(), np.stack([deep >> 8] * 3))


def test_floating_point_pixels_of_no_known_range_are_refused(tmp_path: Path) -> None:
    path = _save(tmp_path / "a.tif", Image.fromarray(np.full((4, 4), -2.5, dtype=np.float32)))
    with pytest.raises(DataError, match=r"a\.tif: float32 pixels, levels -2\.5 to -2\.5 in use.*--range"):
        read_image(path)
    assert read_image(path, range="-5 0").unique().tolist() == [128]


def test_size_is_checked_before_decoding(tmp_path: Path) -> None:
    path = _save(tmp_path / "big.png", Image.new("1", (20_000, 15_000)))
    assert path.stat().st_size < 100_000
    with pytest.raises(DataError, match=r"big\.png: 20000x15000 is more than max_pixels 100000000"):
        read_image(path)
    assert image_size(path) == (15_000, 20_000)  # beyond Pillow's own limit too


def test_readers_in_threads_leave_the_programs_warnings_and_pillows_guard_alone() -> None:
    filters, guard = list(warnings.filters), Image.MAX_IMAGE_PIXELS
    first, second = quiet_pillow(), quiet_pillow()
    with first:
        second.__enter__()  # another thread begins before the first is through
    assert Image.MAX_IMAGE_PIXELS is None
    second.__exit__(None, None, None)
    assert guard is not None and guard == Image.MAX_IMAGE_PIXELS
    assert list(warnings.filters) == filters


def _truncated_jpeg(path: Path) -> None:
    Image.effect_noise((64, 64), 50).save(path, format="jpeg")
    path.write_bytes(path.read_bytes()[:-400])


def _broken_png(path: Path) -> None:
    Image.fromarray(RAMP).save(path, format="png")
    data = bytearray(path.read_bytes())
    data[45:60] = b"\0" * 15
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    "spoil",
    [
        _truncated_jpeg,
        _broken_png,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"not a picture"),
        lambda path: path.mkdir(),
    ],
)
def test_damaged_file_is_one_line_with_its_name(tmp_path: Path, spoil) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "damaged.img"
    spoil(path)
    with pytest.raises(DataError) as caught:
        read_image(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.jpg: no such image file"):
        read_image(tmp_path / "nowhere.jpg")
    assert Image.MAX_IMAGE_PIXELS is not None  # Pillow's own guard is back in place
