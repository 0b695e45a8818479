"""Drawings: what is marked where, at any size, and never outside the picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from cascade_rcnn.data.records import ImageRecord
from cascade_rcnn.drawing.annotations import (
    Style,
    _place,
    class_color,
    draw_batch,
    draw_detections,
    draw_record,
    side_by_side,
    text_color,
)
from cascade_rcnn.drawing.charts import ap_by_iou_chart, contact_sheet
from cascade_rcnn.inference.detections import Detections
from cascade_rcnn.structures import ImageBatch, MaskCrops, Targets

NAMES = ("cat", "dog")
GREY = 100


def plain(height: int, width: int) -> NDArray[np.uint8]:
    return np.full((height, width, 3), GREY, dtype=np.uint8)


def detections(boxes: list[list[float]], size: tuple[int, int], *, masks: bool = False) -> Detections:
    count = len(boxes)
    return Detections(
        torch.tensor(boxes).reshape(-1, 4),
        torch.linspace(0.9, 0.5, count),
        torch.arange(count) % 2,
        size,
        NAMES,
        mask_probs=torch.ones(count, 28, 28) if masks else None,
    )


def changed(picture: Image.Image) -> NDArray[np.bool_]:
    return (np.asarray(picture) != GREY).any(axis=2)


@pytest.mark.parametrize("size", [(20, 30), (240, 320), (1080, 1920), (2160, 3840)])
def test_boxes_are_drawn_on_their_own_border(size: tuple[int, int]) -> None:
    height, width = size
    box = [width * 0.25, height * 0.25, width * 0.75, height * 0.75]
    drawn = draw_detections(plain(*size), detections([box], size), labels=False)
    marks = changed(drawn)
    assert drawn.size == (width, height)
    assert marks[height // 2, round(box[0])] and marks[round(box[3]) - 1, width // 2]
    line = 2 * Style.of(size).line
    inner = marks[round(box[1]) + line : round(box[3]) - line, round(box[0]) + line : round(box[2]) - line]
    outer = np.ones_like(marks)
    outer[max(round(box[1]) - line, 0) : round(box[3]) + line, max(round(box[0]) - line, 0) : round(box[2]) + line] = 0
    assert not inner.any() and not marks[outer.astype(bool)].any()


def test_lines_and_letters_grow_with_the_picture() -> None:
    small, large = Style.of((240, 320)), Style.of((2160, 3840))
    assert small.line == 1 and small.font >= 10
    assert large.line > 4 * small.line and 3 * small.font < large.font < 6 * small.font


def test_masks_are_translucent_inside_with_a_stronger_outline() -> None:
    found = detections([[100, 50, 200, 150]], (200, 300), masks=True)
    pixels = np.asarray(draw_detections(plain(200, 300), found, labels=False)).astype(float)
    color = np.array(class_color(0), dtype=float)

    def share(row: int, column: int) -> float:
        return float(np.abs(pixels[row, column] - GREY).sum() / np.abs(color - GREY).sum())

    assert share(100, 150) == pytest.approx(0.4, abs=0.03)
    assert share(100, 102) > 0.4 and share(20, 20) == 0


@pytest.mark.parametrize("masks", [False, True])
def test_objects_at_and_beyond_the_edges_are_drawn(masks: bool) -> None:
    boxes = [[-20.0, -30, 40, 20], [280, 180, 400, 300], [0, 0, 300, 200], [299.6, 199.6, 300, 200], [50, 50, 50, 50]]
    drawn = draw_detections(plain(200, 300), detections(boxes, (200, 300), masks=masks))
    assert drawn.size == (300, 200) and changed(drawn).any()


def test_a_tiny_picture_and_no_detections_are_normal() -> None:
    assert draw_detections(plain(1, 1), detections([[0, 0, 1, 1]], (1, 1), masks=True)).size == (1, 1)
    assert not changed(draw_detections(plain(40, 50), detections([], (40, 50)))).any()


def test_the_picture_handed_in_is_not_touched() -> None:
    pixels = plain(40, 50)
    draw_detections(pixels, detections([[5, 5, 30, 30]], (40, 50), masks=True))
    assert (pixels == GREY).all()
    with pytest.raises(ValueError, match="give the same image"):
        draw_detections(pixels, detections([], (41, 50)))


def test_labels_stay_inside_and_avoid_each_other() -> None:
    placed = np.zeros((0, 4))
    for box in ([0, 0, 60, 30], [250, 0, 300, 40], [250, 180, 300, 200], [2, 2, 62, 32], [120, 90, 180, 130]):
        spot = _place(box, 70, 14, (300, 200), placed, 2)
        assert spot is not None
        left, top = spot
        assert left >= 0 and top >= 0 and left + 70 <= 300 and top + 14 <= 200
        for x1, y1, x2, y2 in placed:
            overlap = max(min(x2, left + 70) - max(x1, left), 0) * max(min(y2, top + 14) - max(y1, top), 0)
            assert overlap <= 0.3 * 70 * 14
        placed = np.concatenate([placed, [[left, top, left + 70, top + 14]]])


def test_a_dense_scene_gets_a_legend_instead_of_labels() -> None:
    random = torch.Generator().manual_seed(0)
    corner = torch.rand(300, 2, generator=random) * torch.tensor([560.0, 340]) + torch.tensor([60.0, 120])
    found = detections(torch.cat([corner, corner + 8], dim=1).tolist(), (480, 640))
    with_labels = changed(draw_detections(plain(480, 640), found))
    without = changed(draw_detections(plain(480, 640), found, labels=False))
    difference = with_labels & ~without
    assert difference[:80, :120].mean() > 0.5  # the legend
    assert not difference[120:, 160:].any()  # no label anywhere else


def test_colours_are_stable_and_apart() -> None:
    colors = [class_color(label) for label in range(80)]
    assert len(set(colors)) == 80 and colors == [class_color(label) for label in range(80)]
    assert all(0 <= channel <= 255 for color in colors for channel in color)
    first = np.array(colors[:8], dtype=float)
    apart = np.abs(first[:, None] - first[None]).sum(axis=2) + 1000 * np.eye(8)
    assert apart.min() > 75
    assert text_color((255, 255, 255)) == (0, 0, 0) and text_color((0, 0, 90)) == (255, 255, 255)


def record(tmp_path: Path) -> ImageRecord:
    path = tmp_path / "image.png"
    Image.fromarray(plain(60, 80)).save(path)
    boxes = np.array([[10, 10, 30, 40], [50, 20, 70, 50]], dtype=np.float64)
    square = [[10.0, 10, 30, 10, 30, 40, 10, 40]]
    return ImageRecord(
        path,
        path.name,
        1,
        60,
        80,
        boxes,
        np.array([1, 0]),
        np.array([False, True]),
        np.array([600.0, 600]),
        [square, None],
    )


def test_annotations_show_masks_and_hatch_ignored_regions(tmp_path: Path) -> None:
    pixels = np.asarray(draw_record(record(tmp_path), NAMES)).astype(float)
    inside = pixels[25, 20]
    expected = GREY + 0.4 * (np.array(class_color(1)) - GREY)
    assert inside == pytest.approx(expected, abs=8)
    hatched = pixels[35:46, 54:66]
    assert np.ptp(hatched.mean(axis=2)) > 10  # stripes
    assert np.ptp(hatched, axis=2).max() == 0  # and grey


def test_a_drawing_can_be_enlarged(tmp_path: Path) -> None:
    large = draw_record(record(tmp_path), NAMES, scale=3)
    assert large.size == (240, 180)
    assert np.asarray(large)[75, 60] == pytest.approx(GREY + 0.4 * (np.array(class_color(1)) - GREY), abs=8)
    found = detections([[10, 10, 30, 40]], (60, 80), masks=True)
    drawn = draw_detections(plain(60, 80), found, scale=3, labels=False)
    assert drawn.size == (240, 180) and changed(drawn)[75, 60] and not changed(drawn)[10, 10]


def test_a_batch_shows_objects_ignored_regions_and_padding() -> None:
    pixels = torch.full((2, 3, 64, 96), GREY, dtype=torch.uint8)
    images = ImageBatch(pixels, torch.tensor([[64, 96], [40, 60]]), torch.tensor([[64, 96], [40, 60]]))
    targets = Targets.empty(2, rows=2)
    targets.boxes[0, 0] = torch.tensor([10.0, 20, 40, 50])
    targets.boxes[0, 1] = torch.tensor([60.0, 20, 90, 50])
    targets.valid[0, 0] = targets.ignore[0, 1] = True
    crop = torch.zeros(20, 30, dtype=torch.uint8)
    crop[5:15, 5:25] = 1
    targets.masks = MaskCrops(
        crop.flatten(),
        torch.zeros(2, 2, dtype=torch.int64),
        torch.tensor([[[25, 10], [0, 0]], [[0, 0], [0, 0]]]),
        torch.tensor([[[20, 30], [0, 0]], [[0, 0], [0, 0]]]),
        max_size=(20, 30),
    )
    first, second = (changed(picture) for picture in draw_batch(images, targets, NAMES))
    assert first[35, 25] and not first[27, 12] and not first[60, 5]  # the mask, not its crop, and nothing else
    assert first[35, 60:90].any()
    assert not second[:40, :60].any() and second[41:].all() and second[:, 61:].all()


def test_pictures_are_put_together() -> None:
    wide, tall = Image.new("RGB", (120, 60)), Image.new("RGB", (50, 100))
    pair = side_by_side(wide, tall)
    assert pair.width > 120 + 30 and pair.height > 60
    sheet = contact_sheet([wide, tall, wide], columns=2, cell=100, titles=("a", "b", "c"))
    assert 200 < sheet.width < 230 and 150 < sheet.height < 230
    assert contact_sheet([], cell=50).size == (50, 50)


def test_the_chart_shows_each_curve_where_it_belongs() -> None:
    low = [(0.5, 0.2), (0.7, 0.2), (0.9, 0.2)]
    high = [(0.5, 1.0), (0.7, None), (0.9, 1.0)]
    chart = np.asarray(ap_by_iou_chart({"low": low, "high": high}, size=(480, 300))).astype(int)

    def rows_of(label: int) -> NDArray[np.int64]:
        return np.nonzero((np.abs(chart[:, :300] - class_color(label)).sum(axis=2) < 20).any(axis=1))[0]

    assert rows_of(0).mean() > rows_of(1).mean() + 100  # 0.2 lies far below 1.0
    assert not (np.abs(chart[:, 200:240] - class_color(1)).sum(axis=2) < 20).any()  # a gap where it is not known
    assert ap_by_iou_chart({}).size == (960, 600)
    assert ap_by_iou_chart({"nothing": [(0.5, None)]}).size == (960, 600)
