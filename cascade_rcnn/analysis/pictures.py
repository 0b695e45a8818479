"""Pictures of the report: the worst images, and examples of each kind of error, as small JPEGs in the page itself."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from cascade_rcnn.analysis.scenes import Bools, Floats, Found, Ints, Truth, corners
from cascade_rcnn.analysis.tide import CORRECT, KINDS, Tide

Read = Callable[[int], Image.Image | None]  # the picture of an image's row; None where it cannot be read
TRUTH, SAID = (0, 170, 90), (225, 60, 40)
_SIDE, _QUALITY = 300, 80


@dataclass(frozen=True)
class Example:
    """A picture and what is to be seen on it."""

    data: str  # data URI
    size: tuple[int, int]  # width, height
    text: str

    @property
    def figure(self) -> str:
        words = html.escape(self.text)
        size = 'width="{}" height="{}"'.format(*self.size)
        return f'<figure><img src="{self.data}" {size} alt="{words}"><figcaption>{words}</figcaption></figure>'


def error_examples(truth: Truth, found: Found, errors: Tide, read: Read, *, most: int = 8) -> dict[str, list[Example]]:
    """Of each of TIDE's kinds the errors of highest score (of the missed the largest objects), one an image at first.

    The left half of a picture is the truth, the right half what was said.
    """
    result: dict[str, list[Example]] = {}
    for kind, name in enumerate(KINDS):
        if name == "missed":
            rows = errors.missed[np.argsort(-truth.areas[errors.missed], kind="stable")]
            chosen = _spread(truth.image[rows], most)
            result[name] = [one for row in rows[chosen] if (one := _missed(truth, int(row), read))]
        else:
            rows = np.flatnonzero((errors.kinds == kind) & ~errors.ignored)
            rows = rows[np.argsort(-found.scores[rows], kind="stable")]
            chosen = _spread(found.image[rows], most)
            result[name] = [one for row in rows[chosen] if (one := _wrong(truth, found, errors, int(row), read))]
    return result


def worst_images(
    truth: Truth, found: Found, errors: Tide, limits: Floats, read: Read, *, most: int = 8
) -> list[Example]:
    """Images with the most errors at the thresholds ``limits`` [K]."""
    shown = found.scores >= limits[found.label]
    wrong = shown & (errors.kinds != CORRECT) & ~errors.ignored
    count = len(truth.image_ids)
    false = np.bincount(found.image[wrong], minlength=count)
    caught = np.zeros(len(truth.label), np.bool_)
    caught[errors.objects[shown & (errors.kinds == CORRECT) & (errors.objects >= 0)]] = True
    missed = np.bincount(truth.image[~caught & ~truth.crowd], minlength=count)
    examples = []
    for row in np.argsort(-(false + missed), kind="stable")[:most].tolist():
        picture = read(row) if false[row] + missed[row] else None
        if picture is None:
            continue
        window = (0.0, 0.0, float(picture.width), float(picture.height))
        said = found.boxes[shown & (found.image == row)]
        pair = _pair(picture, window, truth.boxes[truth.image == row], said)
        text = f"{truth.file_names[row]}: {false[row]} false, {missed[row]} missed of {int((truth.image == row).sum())}"
        examples.append(example(pair, text))
    return examples


def _spread(images: Ints, most: int) -> Ints:
    """The first rows of as many images as there are, then further ones; at most ``most``, in order."""
    _, first = np.unique(images, return_index=True)
    others = np.setdiff1d(np.arange(len(images)), first)
    return np.sort(np.r_[np.sort(first)[:most], others][:most]).astype(np.int64)


def _missed(truth: Truth, row: int, read: Read) -> Example | None:
    image = int(truth.image[row])
    picture = read(image)
    if picture is None:
        return None
    pair = _pair(picture, _window(truth.boxes[row : row + 1], picture), truth.boxes[row : row + 1], np.zeros((0, 4)))
    return example(pair, f"missed {truth.class_names[truth.label[row]]} in {truth.file_names[image]}")


def _wrong(truth: Truth, found: Found, errors: Tide, row: int, read: Read) -> Example | None:
    image, thing = int(found.image[row]), int(errors.objects[row])
    picture = read(image)
    if picture is None:
        return None
    said = found.boxes[row : row + 1]
    objects = truth.boxes[thing : thing + 1] if thing >= 0 else np.zeros((0, 4))
    window = _window(np.concatenate([said, objects]), picture)
    text = f"{truth.class_names[found.label[row]]} {found.scores[row]:.2f}"
    text += f", truth: {truth.class_names[truth.label[thing]]}" if thing >= 0 else ", truth: nothing"
    inside = truth.boxes[(truth.image == image) & _touches(truth.boxes, window)]
    return example(_pair(picture, window, inside, said), f"{text}; {truth.file_names[image]}")


def _touches(boxes: Floats, window: tuple[float, float, float, float]) -> Bools:
    x1, y1, x2, y2 = corners(boxes).T
    touching: Bools = (x1 < window[2]) & (x2 > window[0]) & (y1 < window[3]) & (y2 > window[1])
    return touching


def _window(boxes: Floats, picture: Image.Image) -> tuple[float, float, float, float]:
    """A square around the boxes with as much again beside them, at least 48 pixels, inside the picture."""
    edges = corners(boxes)
    low, high = edges[:, :2].min(axis=0), edges[:, 2:].max(axis=0)
    side = min(max(2.0 * float((high - low).max()), 48.0), float(max(picture.size)))
    middle = (low + high) / 2
    x = min(max(float(middle[0]) - side / 2, 0.0), max(picture.width - side, 0.0))
    y = min(max(float(middle[1]) - side / 2, 0.0), max(picture.height - side, 0.0))
    return x, y, min(x + side, picture.width), min(y + side, picture.height)


def _pair(picture: Image.Image, window: tuple[float, float, float, float], truth: Floats, said: Floats) -> Image.Image:
    """The window twice, with the objects on the left and the detections on the right."""
    scale = _SIDE / max(window[2] - window[0], window[3] - window[1])
    size = (max(1, round((window[2] - window[0]) * scale)), max(1, round((window[3] - window[1]) * scale)))
    crop = picture.convert("RGB").resize(size, Image.Resampling.BICUBIC, box=window)
    sheet = Image.new("RGB", (2 * size[0] + 4, size[1]), (128, 128, 128))
    for place, boxes, color in ((0, truth, TRUTH), (size[0] + 4, said, SAID)):
        half = crop.copy()
        pen = ImageDraw.Draw(half)
        for x1, y1, x2, y2 in (corners(boxes) - np.array([window[0], window[1]] * 2)) * scale:
            pen.rectangle((x1, y1, max(x2, x1), max(y2, y1)), outline=color, width=2)
        sheet.paste(half, (place, 0))
    return sheet


def example(picture: Image.Image, text: str) -> Example:
    """A picture as it goes into a page."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=_QUALITY)
    data = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
    return Example(data, picture.size, text)
