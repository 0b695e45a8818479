"""Image files larger than memory, read from top to bottom by windows; and where on the Earth their pixels lie.

rasterio (GDAL) reads them: TIFF, JPEG 2000, PNG, JPEG and BMP through one library, which also knows the coordinates of
a GeoTIFF. Every block of a file is decoded once, in the file's own order. Its views, ``upright`` and ``stored``, and
the rules for more than 8 bits are those of ``images.py``; what these ask of a whole picture is asked of a sample.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import TiffImagePlugin

from cascade_rcnn.config import pixel_range
from cascade_rcnn.data.images import Frame, Size, quiet_pillow, read_header
from cascade_rcnn.data.levels import to_bytes, written
from cascade_rcnn.data.orientation import turn_points
from cascade_rcnn.errors import DataError, UserError
from cascade_rcnn.messages import one_line, printable

KINDS = ("TIFF", "JPEG 2000", "PNG", "JPEG", "BMP")
_DRIVERS = {  # of GDAL, by a file's first bytes: no other of its many readers is let near a stranger's file
    b"II*\0": "GTiff",
    b"MM\0*": "GTiff",
    b"II+\0": "GTiff",
    b"MM\0+": "GTiff",
    b"\0\0\0\x0cjP  ": "JP2OpenJPEG",
    b"\xffO\xffQ": "JP2OpenJPEG",
    b"\x89PNG": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"BM": "BMP",
}
SUFFIXES = frozenset(
    {".tif", ".tiff", ".jp2", ".j2k", ".jpx", ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".dib"}
)
_MISSING = "pip install 'cascade-rcnn[huge]'"
_CHUNK = 256 << 20  # bytes of rows that are read at a time
_ROWS = 64  # at least so many
_COLUMNS = 4096  # of a tiled file at a time
_SAMPLES = 16  # windows from which the levels of a picture of more than 8 bits are judged
_GEO_TAGS = (33550, 34264, 34735)  # GeoTIFF: scale, matrix, keys
_BLOCK = 512 << 20  # bytes of a file's own blocks, which are decoded at once
_VIRTUAL = re.compile(r"/vsimem/\S+?:\s*")  # GDAL's name for a block that it is decoding
_OPTIONS = {
    "GDAL_CACHEMAX": 64,  # megabytes: every block is read once
    "GDAL_NUM_THREADS": "ALL_CPUS",
    "GDAL_ERROR_ON_LIBJPEG_WARNING": "TRUE",  # a file that breaks off is an error, not a grey half
    "GDAL_PNG_WHOLE_IMAGE_OPTIM": "NO",  # it would take the picture's memory, and not see that a file breaks off
}


def import_rasterio(path: Path, why: str) -> Any:
    """The library, or one line that names the extra."""
    try:
        import rasterio
    except ImportError as error:
        raise UserError(f"{printable(path)}: {why} needs rasterio: {_MISSING}") from error
    return rasterio


@dataclass(frozen=True)
class Georeference:
    """Where the pixels of an upright picture lie."""

    transform: tuple[float, float, float, float, float, float]  # of stored pixels: X = a x + b y + c, Y = d x + e y + f
    crs: str  # as WKT
    size: Size  # as stored
    tag: int

    def lonlat(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """Longitude and latitude (WGS 84) of points [N, 2] x, y."""
        from rasterio.warp import transform

        upright = self.size[::-1] if self.tag >= 5 else self.size
        x, y = turn_points(points, upright, {6: 8, 8: 6}.get(self.tag, self.tag)).T
        a, b, c, d, e, f = self.transform
        lonlat = np.stack(transform(self.crs, "OGC:CRS84", a * x + b * y + c, d * x + e * y + f), axis=1)
        lonlat[:, 0] -= 360 * np.sign(lonlat[:, 0]) * (np.abs(lonlat[:, 0]) > 180)  # files may count on beyond it
        return lonlat


class WindowRows:
    """The rows of a file, uint8 [h, W, 3], one chunk after the other."""

    def __init__(
        self, path: Path, *, frame: Frame | Callable[[Size, int], Frame] = "upright", range: str = "auto"
    ) -> None:
        """Reads the header.

        Raises:
            UserError: rasterio is missing.
            DataError: no file that it reads by windows, or pixels that are no picture.
        """
        self.path = path
        self._rasterio = import_rasterio(path, "reading a picture by windows")
        with _opened(self._rasterio, path) as file:
            self.size: Size = (file.height, file.width)
            self._bands = _colour_bands(file, path)
            self._dtype = np.dtype(file.dtypes[self._bands[0] - 1])
            self._palette = _palette(file, self._bands)
            image = file.tags(self._bands[0], ns="IMAGE_STRUCTURE") | file.tags(ns="IMAGE_STRUCTURE")
            self._bits = int(image.get("NBITS", 8 * self._dtype.itemsize))
            self._inverted = image.get("MINISWHITE") == "YES"
            self._block: Size = file.block_shapes[0]
            self.notes = _notes(file, self._bands)
        if self._block[0] * self._block[1] * len(self._bands) * self._dtype.itemsize > _BLOCK:
            raise DataError(
                f"{printable(path)}: is stored in blocks of {self._block[1]} x {self._block[0]} pixels, each to be "
                f"decoded at once; write it anew with tiles: rio convert IN OUT.tif --co TILED=YES"
            )
        if self._dtype.kind not in "iuf":
            raise DataError(f"{printable(path)}: {self._dtype} pixels are no picture")
        tag = orientation(path)
        wanted = frame if isinstance(frame, str) else frame(self.size, tag)
        self.tag = tag if wanted == "upright" else 1
        self._range = self._settled_range(range)

    def chunks(self) -> Iterator[NDArray[np.uint8]]:
        """All rows as stored, from top to bottom.

        Raises:
            DataError: the file is damaged; names the rows.
        """
        with _opened(self._rasterio, self.path) as file:
            for top in np.arange(0, self.size[0], self._chunk_rows).tolist():
                yield self._picture(self._read(file, top, min(self._chunk_rows, self.size[0] - top)))

    @property
    def _is_tiled(self) -> bool:
        return self._block[1] < self.size[1]

    @property
    def _chunk_rows(self) -> int:
        """Whole blocks, where these are not too much."""
        block = self._block[0]
        rows = block * -(-_ROWS // block)
        fits = int(_CHUNK // (self.size[1] * max(len(self._bands), 3) * self._dtype.itemsize))
        return max(min(rows, fits), 1)

    def _read(self, file: Any, top: int, rows: int, left: int = 0, columns: int = 0) -> NDArray[Any]:
        """Levels [rows, columns, C] as the file has them."""
        width = columns or self.size[1]
        levels = np.empty((rows, width, len(self._bands)), self._dtype)
        step = max(_COLUMNS // self._block[1], 1) * self._block[1] if self._is_tiled else width
        for start in np.arange(0, width, step).tolist():
            window = self._rasterio.windows.Window(left + start, top, min(step, width - start), rows)
            try:
                levels[:, start : start + step] = file.read(self._bands, window=window).transpose(1, 2, 0)
            except (self._rasterio.errors.RasterioError, self._rasterio.errors.RasterioIOError) as error:
                reason = _VIRTUAL.sub("", one_line(error.__cause__ or error))
                raise DataError(
                    f"{printable(self.path)}: cannot be read at rows {top:,} to {top + rows:,} ({reason}); replace it"
                ) from error
        return levels

    def _picture(self, levels: NDArray[Any]) -> NDArray[np.uint8]:
        """Grey or colour as [h, w, 3]."""
        if self._palette is not None:
            return np.asarray(self._palette[levels[:, :, 0]])
        if self._inverted:
            levels = (2**self._bits - 1) - levels
        if self._dtype == np.uint8:
            grey = (
                levels if self._bits >= 8 else (levels.astype(np.uint16) * 255 // (2**self._bits - 1)).astype(np.uint8)
            )
        else:
            grey = to_bytes(levels, self._range, where=printable(self.path))
        return np.repeat(grey, 3, axis=2) if grey.shape[2] == 1 else grey

    def _settled_range(self, rule: str) -> str:
        """One rule for all windows: what is asked of a whole picture is asked of a sample."""
        if self._dtype == np.uint8 or self._palette is not None or pixel_range(rule) not in ("auto", "percentile"):
            return rule
        sample = self._sample()
        if rule == "auto":
            to_bytes(sample, rule, where=printable(self.path))  # refuses what would be all but black
            return "dtype"
        finite = sample[np.isfinite(sample)]
        low, high = np.percentile(finite, (0.1, 99.9)).tolist() if finite.size else (0.0, 1.0)
        return written(low, high if high > low else low + 1)

    def _sample(self) -> NDArray[Any]:
        """Some windows, from top to bottom, so that a file of lines is read once."""
        chunks = -(-self.size[0] // self._chunk_rows)
        parts = []
        with _opened(self._rasterio, self.path) as file:
            for number, chunk in enumerate(sorted(set(np.linspace(0, chunks - 1, _SAMPLES).astype(int).tolist()))):
                top = chunk * self._chunk_rows
                rows, left, columns = min(self._chunk_rows, self.size[0] - top), 0, 0
                if self._is_tiled:
                    across = -(-self.size[1] // self._block[1])
                    left = number * 7 % across * self._block[1]
                    columns = min(self._block[1], self.size[1] - left)
                levels = self._read(file, top, rows, left, columns).reshape(-1, len(self._bands))
                parts.append(levels[:: max(1, len(levels) // 65536)])
        return np.concatenate(parts)


def georeference(path: Path) -> tuple[Georeference | None, str]:
    """Where the pixels of a file lie, or why that is not known: one line, empty for a picture without coordinates."""
    try:
        rasterio = import_rasterio(path, "GeoJSON")
    except UserError as error:
        return None, str(error) if any(tag in _tiff_tags(path) for tag in _GEO_TAGS) else ""
    try:
        with _opened(rasterio, path) as file:
            transform, crs, size = tuple(file.transform)[:6], file.crs, (file.height, file.width)
            points, _ = file.gcps
            other = "control points" if points else "RPCs" if file.rpcs else ""
    except DataError:
        return None, ""
    where = f"{printable(path)}: not in the GeoJSON:"
    if transform == (1.0, 0.0, 0.0, 0.0, 1.0, 0.0):
        return None, f"{where} it has {other} but no transform; warp it first (rio warp)" if other else ""
    a, b, _, d, e, _ = transform
    if a * e == b * d:
        return (
            None,
            f"{where} its transform puts all pixels on one line or point; mend it with: rio edit-info --transform",
        )
    if not crs:
        return None, f"{where} it has a transform but no CRS; say it with: rio edit-info --crs EPSG:CODE FILE"
    found = Georeference(transform, crs.to_wkt(), size, orientation(path))
    try:
        known = np.isfinite(found.lonlat(np.array([(0.0, 0.0), (size[1], size[0])]))).all()
    except Exception as error:  # PROJ and GDAL have errors of many kinds
        return None, f"{where} its CRS cannot become WGS 84 ({one_line(error)})"
    return (found, "") if known else (None, f"{where} its corners have no place in WGS 84")


def orientation(path: Path) -> int:
    """The orientation tag; also of TIFF files that Pillow does not read."""
    header = read_header(path)
    if not header.error:
        return header.orientation
    tag = _tiff_tags(path).get(274, 1)
    return tag if isinstance(tag, int) and 1 <= tag <= 8 else 1


def _tiff_tags(path: Path) -> dict[int, Any]:
    """Tags of a TIFF file's first picture; empty for other files."""
    try:
        with path.open("rb") as stream, quiet_pillow():
            head = stream.read(16)
            head = head if 43 in head[2:4] else head[:8]  # BigTIFF, or TIFF
            directory = TiffImagePlugin.ImageFileDirectory_v2(head)  # type: ignore[no-untyped-call]
            stream.seek(directory.next)
            directory.load(stream)  # type: ignore[no-untyped-call]
            return dict(directory)
    except Exception:  # another kind of file, or a damaged one
        return {}


@contextmanager
def _opened(rasterio: Any, path: Path) -> Iterator[Any]:
    """The file as a dataset of rasterio; one that it does not read is one line."""
    with path.open("rb") as stream:
        head = stream.read(29)
    if head.startswith(b"\x89PNG") and head[28:] == b"\1":
        raise DataError(
            f"{printable(path)}: is an interlaced PNG, to be decoded at once; save it without interlacing, or raise "
            "--max-pixels"
        )
    driver = next((name for magic, name in _DRIVERS.items() if head.startswith(magic)), None)
    if driver is None:
        raise DataError(f"{printable(path)}: is no {', '.join(KINDS)}: not read by windows; convert it to a tiled TIFF")
    with rasterio.Env(**_OPTIONS):
        try:
            with quiet_pillow():  # warnings of files without coordinates
                file = rasterio.open(path.resolve(), driver=driver)
        except rasterio.errors.RasterioIOError as error:
            raise DataError(f"{printable(path)}: cannot be read as an image ({one_line(error)}); replace it") from error
        with file:
            yield file


def _colour_bands(file: Any, path: Path) -> list[int]:
    """Numbers of the bands that are grey, a palette's, or red, green and blue.

    Raises:
        DataError: inks, or a mixture of types.
    """
    kinds = [kind.name for kind in file.colorinterp]
    if {"cyan", "magenta", "yellow"} <= set(kinds):
        raise DataError(f"{printable(path)}: is printed in inks (CMYK); convert it to RGB")
    if {"red", "green", "blue"} <= set(kinds):
        bands = [kinds.index(name) + 1 for name in ("red", "green", "blue")]
    else:
        bands = [1, 2, 3] if file.count >= 3 else [1]
    if len({file.dtypes[band - 1] for band in bands}) > 1:
        raise DataError(f"{printable(path)}: its bands are of different types: {', '.join(file.dtypes)}")
    return bands


def _notes(file: Any, bands: list[int]) -> list[str]:
    """What the user should know of the choice of bands."""
    kinds = [kind.name for kind in file.colorinterp]
    others = [name for number, name in enumerate(kinds, start=1) if number not in bands and name != "alpha"]
    if not others:
        return []
    taken = "band 1 as grey" if len(bands) == 1 else f"bands {', '.join(map(str, bands))} as red, green, blue"
    return [f"{taken}; {len(others)} more left out"]


def _palette(file: Any, bands: list[int]) -> NDArray[np.uint8] | None:
    """Colours [256, 3] of a picture with a palette."""
    if len(bands) > 1 or file.colorinterp[bands[0] - 1].name != "palette":
        return None
    table = np.zeros((256, 3), np.uint8)
    for level, colour in file.colormap(bands[0]).items():
        if level < 256:
            table[level] = colour[:3]
    return table


def can_open(path: Path) -> bool:
    """Whether rasterio is there and opens the file."""
    try:
        with _opened(import_rasterio(path, "reading"), path):
            return True
    except UserError:
        return False


def is_too_large(path: Path, max_pixels: int) -> bool:
    """Whether a file has more pixels than are decoded at once; False where its header cannot be read."""
    header = read_header(path)
    return not header.error and header.height * header.width > max_pixels
