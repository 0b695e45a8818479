"""What a person hands to ``predict``: pictures of many kinds, files, folders of folders, videos."""

from __future__ import annotations

import os
from collections import Counter
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


def collect(
    inputs: Sequence[Path], *, leave_out: Path | None = None, others: Counter[str] | None = None
) -> Iterator[InputFile]:
    """Every image and video of the files and folders (with their subfolders), in a fixed order, each once.

    Names are relative to the folder named; several folders put their own name in front, made unique by a number.
    ``leave_out``: a folder not to enter, the one where results are written. ``others`` counts, by ending, what else
    the folders hold.

    Raises:
        DataError: an input does not exist, is of a kind that is no image, or nothing is found.
    """
    others = Counter() if others is None else others
    folders, files = _split_inputs(inputs)
    roots = [*folders, *dict.fromkeys(path.parent for path in files)]
    labels = _unique_labels(roots) if len(roots) > 1 else dict.fromkeys(roots, "")
    found = 0
    for folder in folders:
        for path in _walk(folder, leave_out, others):
            found += 1
            yield InputFile(path, labels[folder] + path.relative_to(folder).as_posix())
    for path in files:
        found += 1
        yield InputFile(path, labels[path.parent] + path.name)
    if not found:
        besides = f", only {listed_endings(others)}" if others else ""
        raise DataError(
            f"{', '.join(map(printable, inputs)) or 'no input'}: no image or video found{besides}; "
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
                f"{printable(path)}: {path.suffix or 'a file without suffix'} is no known kind of image or video; "
                "save it as .jpg or .png"
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


def listed_endings(counts: Counter[str], most: int = 5) -> str:
    """``12 .heic, 3 .txt``: what was counted by ending, the most frequent first."""
    shown = [f"{count} {printable(ending)}" for ending, count in counts.most_common(most)]
    rest = sum(count for _, count in counts.most_common()[most:])
    return ", ".join(shown + ([f"{rest} of other endings"] if rest else []))


def _walk(folder: Path, leave_out: Path | None, others: Counter[str]) -> Iterator[Path]:
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
            yield from _walk(folder / entry.name, leave_out, others)
        elif entry.is_dir():
            others["links to folders"] += 1
        elif Path(entry.name).suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES:
            yield folder / entry.name
        else:
            others[Path(entry.name).suffix.lower() or "without an ending"] += 1


class VideoReader:
    """Frames of a video as uint8 [H, W, 3], through PyAV; one frame at a time in memory.

    Phones store their videos lying, with a display matrix that says how to turn them; frames come as players show them.
    """

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
                turned = _upright(frame.to_ndarray(format="rgb24"), self._display(frame))
                yield np.ascontiguousarray(turned)
        except self._av.error.FFmpegError as error:
            raise DataError(f"{printable(self.path)}: the video is damaged ({error}); it is cut there") from error

    def _display(self, frame: Any) -> tuple[int, int, int, int]:
        """How stored x and y become shown ones: (xx, xy, yx, yy), x' = xx x + yx y, y' = xy x + yy y, each -1, 0, 1."""
        for data in frame.side_data:
            if data.type.name == "DISPLAYMATRIX":
                matrix = np.frombuffer(bytes(data), dtype="=i4")
                return _nearest_turn(matrix[0], matrix[1], matrix[3], matrix[4])
        # older FFmpeg: degrees clockwise in the stream's own words
        word = self._stream.metadata.get("rotate", "0")
        degrees = int(word) % 360 if word.lstrip("+-").isdecimal() else 0
        return {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}.get(degrees, (1, 0, 0, 1))

    def close(self) -> None:
        self._container.close()


def _nearest_turn(xx: float, xy: float, yx: float, yy: float) -> tuple[int, int, int, int]:
    """A display matrix's four factors (16.16 fixed point) as a turn by quarters, perhaps mirrored."""
    if abs(int(xx)) + abs(int(yy)) >= abs(int(xy)) + abs(int(yx)):
        return (-1 if xx < 0 else 1), 0, 0, (-1 if yy < 0 else 1)
    return 0, (-1 if xy < 0 else 1), (-1 if yx < 0 else 1), 0


def _upright(pixels: NDArray[np.uint8], display: tuple[int, int, int, int]) -> NDArray[np.uint8]:
    """Pixels [H, W, 3] as they are to be shown (a view)."""
    xx, xy, yx, yy = display
    if xy:  # the shown row comes from the stored column
        pixels = pixels.swapaxes(0, 1)
    if xy + yy < 0:
        pixels = pixels[::-1]
    return pixels[:, ::-1] if xx + yx < 0 else pixels


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
