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

from cascade_rcnn.data.images import IMAGE_SUFFIXES
from cascade_rcnn.errors import DataError, UserError
from cascade_rcnn.messages import printable

VIDEO_SUFFIXES = frozenset({".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".ts"})


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
        raise DataError(
            f"{', '.join(map(printable, inputs)) or 'no input'}: no image or video found; "
            f"known suffixes are {' '.join(sorted(IMAGE_SUFFIXES | VIDEO_SUFFIXES))}"
        )


def _split_inputs(inputs: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Folders and single files, without what lies in another named folder already."""
    seen: dict[Path, Path] = {}
    for path in inputs:
        if not path.exists():
            raise DataError(f"{printable(path)}: no such file or folder; check the name")
        if path.is_file() and path.suffix.lower() not in IMAGE_SUFFIXES | VIDEO_SUFFIXES:
            raise DataError(
                f"{printable(path)}: {path.suffix or 'a file without suffix'} is no known kind of image or video"
            )
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
