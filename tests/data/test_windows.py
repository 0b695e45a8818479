"""Files read by windows give the pixels that reading them whole gives, in every view; and where on Earth they lie."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from cascade_rcnn.data.images import read_upright, turn
from cascade_rcnn.data.windows import WindowRows, georeference, import_rasterio, is_too_large
from cascade_rcnn.errors import DataError, UserError
from turned_pictures import as_stored, save

rasterio = pytest.importorskip("rasterio")


def noise(height: int, width: int, bands: int = 3, dtype: str = "uint8", high: int = 256) -> NDArray[Any]:
    """Smooth enough for JPEG, different in every pixel."""
    values = np.random.default_rng(0).integers(0, high, (height, width, bands))
    return values.astype(dtype)


def write(path: Path, pixels: NDArray[Any], *, driver: str = "GTiff", tags: Any = None, **options: Any) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        shape = {"height": pixels.shape[0], "width": pixels.shape[1], "count": pixels.shape[2], "dtype": pixels.dtype}
        with rasterio.open(path, "w", driver=driver, **shape, **options) as file:
            file.write(pixels.transpose(2, 0, 1))
            if tags is not None:
                tags(file)
    return path


def by_windows(path: Path, **options: Any) -> NDArray[np.uint8]:
    rows = WindowRows(path, **options)
    return turn(np.concatenate(list(rows.chunks())), rows.tag)


TILED = {"tiled": True, "blockxsize": 64, "blockysize": 48, "compress": "deflate"}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("tiled.tif", TILED),
        ("strips.tif", {"compress": "lzw", "blockysize": 5}),
        ("one_strip.tif", {"compress": "deflate", "blockysize": 400}),
        ("planes.tif", TILED | {"interleave": "band"}),
        ("big.tif", {"BIGTIFF": "YES"}),
        (
            "lossless.jp2",
            {"driver": "JP2OpenJPEG", "REVERSIBLE": "YES", "QUALITY": "100", "BLOCKXSIZE": "128", "BLOCKYSIZE": "128"},
        ),
        ("plain.png", {"driver": "PNG"}),
    ],
)
def test_windows_give_the_pixels_of_the_whole_file(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    pixels = noise(200, 333)
    path = write(tmp_path / name, pixels, **options)
    assert np.array_equal(by_windows(path), pixels)
    if not name.endswith("jp2"):  # Pillow calls a file of noise broken
        assert np.array_equal(read_upright(path), pixels)
    assert WindowRows(path).size == (200, 333)


def test_chunks_are_whole_blocks_and_no_larger_than_memory_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "tiled.tif", noise(200, 333), **TILED)
    assert [len(chunk) for chunk in WindowRows(path).chunks()] == [96, 96, 8]
    monkeypatch.setattr("cascade_rcnn.data.windows._CHUNK", 333 * 3 * 10)
    assert [len(chunk) for chunk in WindowRows(path).chunks()] == [10] * 20
    assert np.array_equal(by_windows(path), noise(200, 333))


@pytest.mark.parametrize("suffix", [".tif", ".png"])
@pytest.mark.parametrize("tag", range(1, 9))
def test_windows_turn_a_picture_as_reading_it_whole_does(tmp_path: Path, tag: int, suffix: str) -> None:
    upright = noise(60, 80)
    path = tmp_path / f"turned{suffix}"
    save(path, upright, tag)
    assert np.array_equal(by_windows(path), upright)
    assert np.array_equal(by_windows(path, frame="stored"), as_stored(upright, tag))
    decided: list[Any] = []

    def decide(size: tuple[int, int], tag: int) -> Any:
        decided.append((size, tag))
        return "stored"

    assert np.array_equal(by_windows(path, frame=decide), as_stored(upright, tag))
    assert decided == [((80, 60) if tag >= 5 else (60, 80), tag)]


def test_jpeg_is_read_by_windows_too(tmp_path: Path) -> None:
    smooth = np.add.outer(np.arange(100), np.arange(150)).astype(np.uint8)[..., None].repeat(3, axis=2)
    Image.fromarray(smooth).save(tmp_path / "a.jpg", quality=95)
    difference = by_windows(tmp_path / "a.jpg").astype(int) - read_upright(tmp_path / "a.jpg")
    assert np.abs(difference).max() <= 2  # of two decoders


@pytest.mark.parametrize(
    "kind", ["grey", "grey and alpha", "palette", "alpha", "one bit", "white is zero", "inks", "many"]
)
def test_colours_are_those_of_reading_the_file_whole(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.tif"
    colours = noise(40, 50)
    expected: NDArray[np.uint8] | None = None
    if kind == "grey":
        Image.fromarray(colours[:, :, 0]).save(path)
    elif kind == "grey and alpha":
        Image.merge("LA", [Image.fromarray(colours[:, :, k]) for k in (0, 1)]).save(path)
    elif kind == "palette":
        Image.fromarray(colours).quantize(16).save(path)
    elif kind == "alpha":
        Image.merge("RGBA", [Image.fromarray(noise(40, 50, 4)[:, :, k]) for k in range(4)]).save(path)
    elif kind == "one bit":
        Image.fromarray(colours[:, :, 0] > 128).save(path)
    elif kind == "inks":
        Image.fromarray(colours).convert("CMYK").save(path)
    elif kind == "white is zero":
        write(path, colours[:, :, :1], photometric="MINISWHITE")
    else:
        write(path, noise(40, 50, 6), photometric="RGB")
        expected = noise(40, 50, 6)[:, :, :3]
        assert WindowRows(path).notes == ["bands 1, 2, 3 as red, green, blue; 3 more left out"]
    difference = by_windows(path).astype(int) - (read_upright(path) if expected is None else expected)
    assert np.abs(difference).max() <= (kind == "inks")  # rounded differently


def test_more_than_eight_bits_become_grey_by_the_same_rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    levels = noise(90, 70, 1, "uint16", 4096)
    path = write(tmp_path / "deep.tif", levels, **TILED)
    for rule in ("0 4095", "dtype"):
        assert np.array_equal(by_windows(path, range=rule), read_upright(path, range=rule))
    near = by_windows(path, range="percentile").astype(int) - read_upright(path, range="percentile")
    assert np.abs(near).max() <= 1
    with pytest.raises(
        DataError, match=r"deep\.tif: levels 0 to 4095 in use of 0 to 65535, which would be all but black"
    ):
        WindowRows(path)
    deep = noise(90, 70, 3, "uint16", 65536)
    whole = write(tmp_path / "all.tif", deep, photometric="RGB", **TILED)
    assert np.array_equal(by_windows(whole), (deep >> 8).astype(np.uint8))
    dark = noise(90, 70, 1, "uint16", 65536)
    dark[:48] %= 4  # dark chunks in a picture that is not dark
    path = write(tmp_path / "dark_above.tif", dark, **TILED)
    monkeypatch.setattr("cascade_rcnn.data.windows._CHUNK", 70 * 3 * 2 * 24)
    assert np.array_equal(by_windows(path), read_upright(path))


def test_a_damaged_file_is_one_line_with_its_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "cut.tif", noise(400, 333), **TILED)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=r"cut\.tif: cannot be read (at rows|as an image)"):
        by_windows(path)
    path = tmp_path / "cut.png"
    Image.fromarray(noise(400, 333)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=r"cut\.png: cannot be read at rows \d+ to \d+ \(.*\); replace it"):
        by_windows(path)
    smooth = np.add.outer(np.arange(400), np.arange(350)).astype(np.uint8)
    path = tmp_path / "cut.jpg"
    Image.fromarray(smooth).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=r"cut\.jpg: cannot be read"):
        by_windows(path)


def test_a_damaged_block_is_told_without_gdals_own_names(tmp_path: Path) -> None:
    path = write(tmp_path / "lzw.tif", noise(400, 333), **{**TILED, "compress": "lzw"})
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 200] = b"\xff" * 200
    path.write_bytes(content)
    with pytest.raises(DataError, match="cannot be read at rows") as told:
        by_windows(path)
    assert "/vsimem" not in str(told.value)


def test_what_is_no_picture_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(noise(20, 20)).save(tmp_path / "a.webp")
    with pytest.raises(
        DataError, match=r"a\.webp: is no TIFF, JPEG 2000, PNG, JPEG, BMP: .* convert it to a tiled TIFF"
    ):
        WindowRows(tmp_path / "a.webp")
    (tmp_path / "virtual.tif").write_text("<VRTDataset rasterXSize='1' rasterYSize='1'></VRTDataset>")
    with pytest.raises(DataError, match="is no TIFF"):
        WindowRows(tmp_path / "virtual.tif")
    coarse = write(tmp_path / "coarse.tif", noise(200, 200), **TILED)
    with monkeypatch.context() as patch:
        patch.setattr("cascade_rcnn.data.windows._BLOCK", 64 * 48 * 3 - 1)
        with pytest.raises(
            DataError, match=r"coarse\.tif: is stored in blocks of 64 x 48 pixels, .* rio convert IN OUT"
        ):
            WindowRows(coarse)
    write(tmp_path / "complex.tif", noise(20, 20, 1).astype("complex64"))
    with pytest.raises(DataError, match=r"complex\.tif: complex64 pixels are no picture"):
        WindowRows(tmp_path / "complex.tif")
    monkeypatch.setitem(sys.modules, "rasterio", None)
    with pytest.raises(UserError, match=r"a\.tif: reading .* needs rasterio: pip install 'cascade-rcnn\[huge\]'"):
        import_rasterio(Path("a.tif"), "reading a picture by windows")


def test_large_means_more_pixels_than_are_decoded(tmp_path: Path) -> None:
    Image.fromarray(noise(20, 20)).save(tmp_path / "a.png")
    assert is_too_large(tmp_path / "a.png", 399) and not is_too_large(tmp_path / "a.png", 400)
    assert not is_too_large(tmp_path / "none.png", 1)


def test_an_interlaced_png_is_refused_as_it_would_be_decoded_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(noise(20, 20)).save(path)
    content = bytearray(path.read_bytes())
    content[28] = 1  # interlace method of IHDR
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.png: is an interlaced PNG, .* raise --max-pixels"):
        WindowRows(path)


ORIGIN = (500_000.0, 5_500_000.0)  # UTM 33 N


def geotiff(path: Path, **changes: Any) -> Path:
    options = {"crs": "EPSG:32633", "transform": rasterio.Affine(0.5, 0, ORIGIN[0], 0, -0.25, ORIGIN[1])} | changes
    return write(path, noise(40, 60), **{name: value for name, value in options.items() if value is not None})


def test_pixels_of_a_geotiff_lie_where_it_says(tmp_path: Path) -> None:
    found, why_not = georeference(geotiff(tmp_path / "a.tif"))
    assert found is not None and why_not == ""
    corner, across, down = found.lonlat(np.array([(0.0, 0.0), (60.0, 0.0), (0.0, 40.0)])).tolist()
    # 500,000 metres east is the zone's middle meridian; a degree of latitude is about 111.2 km there
    assert corner == pytest.approx([15.0, 49.6529], abs=1e-3)
    assert across[0] - corner[0] == pytest.approx(30 / (111_320 * np.cos(np.radians(49.65))), rel=0.01)
    assert across[1] == pytest.approx(corner[1], abs=1e-6)
    assert corner[1] - down[1] == pytest.approx(10 / 111_200, rel=0.01)


def test_a_turned_geotiff_lies_where_its_stored_pixels_say(tmp_path: Path) -> None:
    from cascade_rcnn.data.windows import Georeference

    plain = Georeference((0.5, 0, *ORIGIN[:1], 0, -0.25, ORIGIN[1]), "EPSG:32633", (40, 60), 1)  # type: ignore[arg-type]
    turned = Georeference(plain.transform, plain.crs, plain.size, 6)  # upright 60 high, 40 wide
    stored = np.array([(10.0, 5.0)])
    assert np.allclose(turned.lonlat(np.array([(40.0 - 5, 10.0)])), plain.lonlat(stored))


def test_files_without_a_place_are_told_apart_from_plain_pictures(tmp_path: Path) -> None:
    from rasterio.control import GroundControlPoint

    assert georeference(write(tmp_path / "plain.tif", noise(9, 9))) == (None, "")
    (tmp_path / "a.webp").write_bytes(b"nothing")
    assert georeference(tmp_path / "a.webp") == (None, "")
    none, why = georeference(geotiff(tmp_path / "no_crs.tif", crs=None))
    assert none is None and "no_crs.tif: not in the GeoJSON: it has a transform but no CRS; say it with: rio" in why
    none, why = georeference(geotiff(tmp_path / "local.tif", crs='LOCAL_CS["hall",UNIT["metre",1]]'))
    assert none is None and "local.tif: not in the GeoJSON: its CRS cannot become WGS 84" in why
    points = [GroundControlPoint(row, column, column, row) for row, column in ((0, 0), (0, 9), (9, 0))]
    path = write(tmp_path / "points.tif", noise(9, 9), gcps=points, crs="EPSG:4326")
    none, why = georeference(path)
    assert none is None and "it has control points but no transform; warp it first (rio warp)" in why


def test_without_rasterio_only_georeferenced_files_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, plain = geotiff(tmp_path / "a.tif"), write(tmp_path / "plain.tif", noise(9, 9))
    monkeypatch.setitem(sys.modules, "rasterio", None)
    assert georeference(plain) == (None, "")
    none, why = georeference(path)
    assert none is None and "a.tif: GeoJSON needs rasterio: pip install 'cascade-rcnn[huge]'" in why
