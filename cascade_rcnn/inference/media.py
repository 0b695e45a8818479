"""What a person hands to ``predict``: pictures of many kinds, files, folders of folders, videos."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cascade_rcnn.data.files import DEFAULT_MAX_PIXELS, IMAGE_SUFFIXES, printable, read_image
from cascade_rcnn.errors import DataError, UserError

VIDEO_SUFFIXES = frozenset({".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".ts"})
_EXIF_ORIENTATION = 0x0112


def to_array(image: Any, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> NDArray[np.uint8]:
    """Pixels uint8 [H, W, 3] RGB of a file, a ``PIL.Image``, uint8 array [H, W, 3] or [H, W], uint8 tensor [3, H, W].

    A file is turned upright by its EXIF orientation, as every viewer shows it; a picture or array is taken as it is.

    Raises:
        UserError: another type, dtype or shape, or a file that is missing, damaged or above ``max_pixels``.
    """
    if isinstance(image, str | Path):
        return read_upright(Path(image), max_pixels=max_pixels)
    if isinstance(image, Image.Image):
        if image.mode[0] in "IF":
            raise UserError(f"picture of mode {image.mode}: its range is unknown; pass a uint8 array [H, W, 3]")
        return _not_empty(np.array(image.convert("RGB")))
    if isinstance(image, np.ndarray):
        return _from_array(image)
    if type(image).__module__.partition(".")[0] == "torch":
        return _from_tensor(image)
    raise UserError(f"cannot predict on {type(image).__name__}: give a path, a PIL image, a uint8 array [H, W, 3] "
                    "or a uint8 tensor [3, H, W]")


def _from_array(image: NDArray[Any]) -> NDArray[np.uint8]:
    shape = tuple(image.shape)
    if image.dtype != np.uint8:
        raise UserError(f"array of {image.dtype} {list(shape)}: need uint8 0..255; "
                        "for floats 0..1 use (x * 255).astype('uint8')")
    if image.ndim == 2:
        return _not_empty(np.repeat(image[:, :, None], 3, axis=2))
    if image.ndim == 3 and shape[2] in (1, 3):
        three = image if shape[2] == 3 else np.repeat(image, 3, axis=2)
        return _not_empty(np.require(three, requirements=["C", "W"]))  # writable: torch warns of views that are not
    hint = "; this looks like channels first: use .transpose(1, 2, 0)" if image.ndim == 3 and shape[0] in (1, 3) else ""
    raise UserError(f"array of shape {list(shape)}: need [H, W, 3] RGB or [H, W] grey{hint}")


def _from_tensor(image: Any) -> NDArray[np.uint8]:
    shape = list(image.shape)
    kind = str(image.dtype).removeprefix("torch.")
    if kind != "uint8":
        raise UserError(f"tensor of {kind} {shape}: need uint8 0..255; for floats 0..1 use (x * 255).to(torch.uint8)")
    if len(shape) == 3 and shape[0] in (1, 3):
        return _not_empty(np.ascontiguousarray(image.expand(3, -1, -1).permute(1, 2, 0).cpu().numpy()))
    hint = "; this looks like channels last: use .permute(2, 0, 1)" if len(shape) == 3 and shape[2] in (1, 3) else ""
    hint = "; give a batch as a list of images" if len(shape) == 4 else hint
    raise UserError(f"tensor of shape {shape}: need [3, H, W] RGB or [1, H, W] grey{hint}")


def _not_empty(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    if min(pixels.shape[:2]) == 0:
        raise UserError(f"image of {pixels.shape[1]}x{pixels.shape[0]} pixels: there is nothing to look at")
    return pixels


def read_upright(path: Path, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> NDArray[np.uint8]:
    """Decode a file to uint8 [H, W, 3] RGB, turned upright by its EXIF orientation."""
    if path.is_dir():
        raise DataError(f"{printable(path)}: is a folder; give its files, or use the predict command")
    if not path.exists():
        raise DataError(f"{printable(path)}: no such file; check the name")
    pixels: NDArray[np.uint8] = read_image(path, max_pixels=max_pixels).permute(1, 2, 0).numpy()
    turned = pixels.swapaxes(0, 1) if (orientation := _orientation(path)) in (5, 6, 7, 8) else pixels
    if orientation in (3, 4, 7, 8):
        turned = turned[::-1]
    if orientation in (2, 3, 6, 7):
        turned = turned[:, ::-1]
    return np.ascontiguousarray(turned)


def _orientation(path: Path) -> int:
    """EXIF orientation 1..8; 1, upright, where there is none or it cannot be read (the pixels could be)."""
    try:
        with Image.open(path) as picture:
            return int(picture.getexif().get(_EXIF_ORIENTATION, 1))
    except (OSError, ValueError, SyntaxError, TypeError, Image.DecompressionBombError):
        return 1


@dataclass(frozen=True)
class InputFile:
    """A file to look at, and the name, unique among all inputs, under which its results are written."""

    path: Path
    name: str  # with forward slashes, relative to what the user named

    @property
    def is_video(self) -> bool:
        return self.path.suffix.lower() in VIDEO_SUFFIXES

    @property
    def drawing(self) -> PurePosixPath:
        """Name of the drawing: pictures that are not JPEG or PNG become JPEG, videos MP4."""
        name = PurePosixPath(self.name)
        if self.is_video:
            return name if name.suffix.lower() == ".mp4" else name.with_name(name.name + ".mp4")
        return name if name.suffix.lower() in (".jpg", ".jpeg", ".png") else name.with_name(name.name + ".jpg")


def collect(inputs: Sequence[Path], *, leave_out: Path | None = None) -> Iterator[InputFile]:
    """Every image and video of the files and folders (with their subfolders), in a fixed order, each once.

    Names are relative to the folder named; several folders put their own name in front, made unique by a number.
    ``leave_out``: a folder not to enter, the one where results are written.

    Raises:
        DataError: an input does not exist, is of a kind that is no image, or nothing is found.
    """
    folders, files = _split_inputs(inputs)
    roots = [*folders, *dict.fromkeys(path.parent for path in files)]
    labels = _unique_labels(roots) if len(roots) > 1 else dict.fromkeys(roots, "")
    found = 0
    for folder in folders:
        for path in _walk(folder, leave_out):
            found += 1
            yield InputFile(path, labels[folder] + path.relative_to(folder).as_posix())
    for path in files:
        found += 1
        yield InputFile(path, labels[path.parent] + path.name)
    if not found:
        raise DataError(f"{', '.join(map(printable, inputs)) or 'no input'}: no image or video found; "
                        f"known suffixes are {' '.join(sorted(IMAGE_SUFFIXES | VIDEO_SUFFIXES))}")


def _split_inputs(inputs: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Folders and single files, without what lies in another named folder already."""
    seen: dict[Path, Path] = {}
    for path in inputs:
        if not path.exists():
            raise DataError(f"{printable(path)}: no such file or folder; check the name")
        if path.is_file() and path.suffix.lower() not in IMAGE_SUFFIXES | VIDEO_SUFFIXES:
            raise DataError(f"{printable(path)}: {path.suffix or 'a file without suffix'} is no known kind of image "
                            "or video")
        seen.setdefault(path.resolve(), path)
    folders = {real for real, path in seen.items() if path.is_dir()}
    apart = [path for real, path in seen.items() if not any(parent in folders for parent in real.parents)]
    return [path for path in apart if path.is_dir()], [path for path in apart if not path.is_dir()]


def _unique_labels(roots: Sequence[Path]) -> dict[Path, str]:
    labels: dict[Path, str] = {}
    taken: set[str] = set()
    for root in roots:
        base = root.resolve().name or "root"
        label = next(name for n in range(1, len(roots) + 2) if (name := base if n == 1 else f"{base}-{n}") not in taken)
        taken.add(label)
        labels[root] = label + "/"
    return labels


def _walk(folder: Path, leave_out: Path | None) -> Iterator[Path]:
    """Images and videos of a folder and its subfolders; hidden ones and links to folders are not entered."""
    avoid = leave_out.resolve() if leave_out is not None else None
    if folder.resolve() == avoid:
        return
    try:
        with os.scandir(folder) as listing:
            entries = sorted(listing, key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"{printable(folder)}: cannot be listed ({error.strerror})") from error
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(folder / entry.name, leave_out)
        elif Path(entry.name).suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES:
            yield folder / entry.name


class VideoReader:
    """Frames of a video as uint8 [H, W, 3], through PyAV; one frame at a time in memory."""

    def __init__(self, path: Path) -> None:
        self._av = _import_av(path)
        self.path = path
        try:
            self._container = self._av.open(str(path))
            self._stream = self._container.streams.video[0]
        except (self._av.error.FFmpegError, IndexError) as error:
            raise DataError(f"{printable(path)}: cannot be read as a video ({error}); replace it") from error
        self.rate = Fraction(self._stream.average_rate or 25)
        self.frames = int(self._stream.frames)  # 0 where the file does not say

    def __iter__(self) -> Iterator[NDArray[np.uint8]]:
        try:
            for frame in self._container.decode(self._stream):
                yield frame.to_ndarray(format="rgb24")
        except self._av.error.FFmpegError as error:
            raise DataError(f"{printable(self.path)}: the video is damaged ({error}); it is cut there") from error

    def close(self) -> None:
        self._container.close()


class VideoWriter:
    """Writes pictures as an H.264 video (MPEG-4 where the build has no H.264)."""

    def __init__(self, path: Path, rate: Fraction) -> None:
        self._av = _import_av(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._container = self._av.open(str(path), mode="w")
        self._rate = rate
        self._stream: Any = None

    def write(self, picture: Image.Image) -> None:
        """Add a frame; odd sides lose a pixel, as the codec wants even ones."""
        width, height = max(picture.width // 2 * 2, 2), max(picture.height // 2 * 2, 2)
        if self._stream is None:
            codec = "libx264" if "libx264" in self._av.codecs_available else "mpeg4"
            self._stream = self._container.add_stream(codec, rate=self._rate)
            self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"
        pixels = np.ascontiguousarray(np.asarray(picture)[:height, :width])
        frame = self._av.VideoFrame.from_ndarray(pixels, format="rgb24")
        self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        if self._stream is not None:
            self._container.mux(self._stream.encode())
        self._container.close()


def _import_av(path: Path) -> Any:
    try:
        import av
    except ImportError as error:
        raise UserError(f"{printable(path)}: videos need PyAV: pip install 'cascade-rcnn[video]'") from error
    return av
