"""Tiles: they cover a picture, show its pixels, and what is found in them is merged without doubles or halves."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage

from cascade_rcnn.config import Config, ModelConfig
from cascade_rcnn.data.images import turn
from cascade_rcnn.errors import DataError, UserError
from cascade_rcnn.inference.detections import Detections
from cascade_rcnn.inference.merge_tiles import Candidates, Merged, merge
from cascade_rcnn.inference.tiled import TiledDetections, predict_tiles
from cascade_rcnn.inference.tiles import ArrayRows, Pyramid, Tiling, View, starts

Box = tuple[float, float, float, float]


class Chunks:
    """Stored rows in chunks of a few."""

    def __init__(self, pixels: NDArray[np.uint8], tag: int = 1, rows: int = 7) -> None:
        self.size, self.tag, self._pixels, self._rows = pixels.shape[:2], tag, pixels, rows

    def chunks(self) -> Any:
        return (self._pixels[start : start + self._rows] for start in range(0, len(self._pixels), self._rows))


def noise(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@given(st.integers(1, 5000), st.integers(64, 1500), st.floats(0, 0.75))
def test_tiles_cover_an_axis_and_overlap_as_asked(length: int, tile: int, overlap: float) -> None:
    common = Tiling(tile, overlap).common
    begins = starts(length, tile, common)
    side = min(length, tile)
    assert begins[0] == 0 and begins[-1] + side == length
    assert all(0 < after - before <= side - common for before, after in itertools.pairwise(begins)) or len(begins) == 1
    # whatever is no longer than the overlap lies whole in a tile
    for start in range(0, length - common + 1, 37):
        assert any(begin <= start and start + common <= begin + side for begin in begins)


@settings(max_examples=30)
@given(
    st.integers(1, 260), st.integers(1, 260), st.sampled_from((64, 80, 100)), st.sampled_from((0.0, 0.2, 0.5)),
    st.integers(1, 8), st.integers(1, 90),
)  # fmt: skip
def test_each_tile_shows_its_part_of_the_upright_picture(
    height: int, width: int, tile: int, overlap: float, tag: int, rows: int
) -> None:
    stored = noise(height, width)
    upright = turn(stored, tag)
    pyramid = Pyramid(Chunks(stored, tag, rows), Tiling(tile, overlap))
    places = {view[2:6] for _, view in Pyramid(Chunks(upright), Tiling(tile, overlap)) if view.level == 0}
    seen, count = np.zeros(upright.shape[:2], int), 0
    for pixels, view in pyramid:
        count += 1
        if view.level == 0:
            assert np.array_equal(pixels, upright[view.y : view.bottom, view.x : view.right])
            seen[view.y : view.bottom, view.x : view.right] += 1
            places.remove(view[2:6])
        borders = (view.x, view.y, view.right - upright.shape[1], view.bottom - upright.shape[0])
        assert view.inner == tuple(bool(border) and not (border < 0 and at < 2) for at, border in enumerate(borders))
    assert seen.min() >= 1 and not places and count == pyramid.count and pyramid.size == upright.shape[:2]
    assert np.array_equal(pyramid.overview(), upright) and pyramid.overview_factor == 1


def test_coarser_levels_are_means_and_end_with_the_whole_picture() -> None:
    picture = noise(700, 530)
    pyramid = Pyramid(Chunks(picture), Tiling(100, 0.2))
    tiles = list(pyramid)
    assert pyramid.factors == [1, 4, 8]
    means = picture[:, :528].reshape(175, 4, 132, 4, 3).mean(axis=(1, 3))
    for pixels, view in (tile for tile in tiles if tile.view.level == 1):
        x, y = view.x // 4, view.y // 4
        part = means[y : y + 100, x : x + 100]
        assert np.abs(pixels[: part.shape[0], : part.shape[1]] - part).max() <= 0.5
    (last,) = [tile for tile in tiles if tile.view.level == 2]
    assert last.pixels.shape == (88, 67, 3)  # 700 and 530 over 8, rounded up
    assert last.view[2:] == (0, 0, 530, 700, (False,) * 4)
    assert [tile.view.level for tile in Pyramid(Chunks(picture), Tiling(100, whole=False))] == [0] * 9 * 7


def test_a_drawing_is_at_most_two_thousand_pixels_wide() -> None:
    picture = np.full((90, 4100, 3), 77, np.uint8)
    pyramid = Pyramid(Chunks(picture), Tiling(90, 0))
    list(pyramid)
    assert (
        pyramid.overview_factor == 3 and pyramid.overview().shape == (30, 1367, 3) and (pyramid.overview() == 77).all()
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tile": 12}, "tile 12: give a side of at least 64 pixels, e.g. 1024"),
        ({"tile": 12.5}, "tile 12.5: give a side"),
        ({"tile": True}, "tile True"),
        ({"tile": 512, "overlap": 1.2}, r"overlap 1.2: give the share .* from 0 to 0.75, e.g. 0.2"),
        ({"tile": 512, "overlap": -0.1}, "overlap -0.1"),
        ({"tile": 512, "overlap": float("nan")}, "overlap nan"),
        ({"tile": 512, "max_merged": 0}, "max_merged 0: give a whole number of at least 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Tiling(**settings)


def test_a_row_of_tiles_above_two_gigabytes_is_refused_before_reading() -> None:
    rows = Chunks(noise(1, 1))
    rows.size = (100_000, 1_000_000)
    with pytest.raises(DataError, match=r"tile 1024 on a picture 1,000,000 pixels wide: .* give a tile of at most 715"):
        Pyramid(rows, Tiling(1024))


# The merge rule, on boxes made by hand: two tiles of 100 pixels that share 20, and the picture at half its size


LEFT = View(0, 1, 0, 0, 100, 100, (False, False, True, False))
RIGHT = View(0, 1, 80, 0, 180, 100, (True, False, False, False))
COARSE = View(1, 2, 0, 0, 180, 100, (False,) * 4)


def merged(*found: tuple[int, Box, float, int], agnostic: bool = False) -> Merged:
    """Of (tile, box, score, label), sorted by tile."""
    tiles, boxes, scores, labels = zip(*found)
    candidates = Candidates(
        np.array(boxes, np.float64), np.array(scores), np.array(labels, np.int64), np.array(tiles, np.int64)
    )
    return merge(candidates, [LEFT, RIGHT, COARSE], common=20, nms_iou=0.5, agnostic=agnostic)


def test_of_two_whole_ones_the_better_stays() -> None:
    result = merged((0, (85, 10, 95, 30), 0.6, 0), (1, (85, 10, 96, 30), 0.9, 0))
    assert result.boxes.tolist() == [[85, 10, 96, 30]] and result.scores.tolist() == [0.9]
    assert [rows.tolist() for rows in result.members] == [[1]] and not result.partial.any()


def test_detections_of_one_tile_are_left_alone() -> None:
    result = merged((0, (10, 10, 50, 30), 0.6, 0), (0, (10, 10, 52, 30), 0.9, 0))  # soft NMS gives such pairs
    assert len(result.scores) == 2


def test_classes_are_kept_apart_unless_the_network_does_not() -> None:
    pair = ((0, (85, 10, 95, 30), 0.6, 0), (1, (85, 10, 96, 30), 0.9, 1))
    assert merged(*pair).labels.tolist() == [1, 0]
    assert merged(*pair, agnostic=True).labels.tolist() == [1]


@pytest.mark.parametrize("score", [0.1, 0.95])
def test_a_half_gives_way_to_the_whole_whatever_its_score(score: float) -> None:
    result = merged((0, (90, 10, 100, 30), score, 0), (1, (89, 10, 110, 30), 0.5, 0))
    assert result.boxes.tolist() == [[89, 10, 110, 30]] and result.scores.tolist() == [0.5]


def test_a_half_of_another_class_gives_way_to_one_that_is_half_as_sure() -> None:
    half = (0, (90.0, 10.0, 100.0, 30.0), 0.8, 1)
    assert merged(half, (1, (89, 10, 110, 30), 0.41, 0)).labels.tolist() == [0]
    assert merged(half, (1, (89, 10, 110, 30), 0.39, 0)).labels.tolist() == [1, 0]


def test_a_half_beside_something_large_stays() -> None:
    """A person in front of a bus, cut by the border: the bus, whole, covers the half, but is not it."""
    person, bus = (0, (90.0, 40.0, 100.0, 60.0), 0.8, 0), (2, (20.0, 5.0, 150.0, 95.0), 0.9, 0)
    assert merged(person, bus).boxes.tolist() == [[20, 5, 150, 95], [90, 40, 100, 60]]


def test_pieces_that_nobody_sees_whole_are_joined() -> None:
    result = merged((0, (30, 10, 100, 30), 0.6, 0), (1, (80, 11, 150, 30), 0.7, 0))
    assert result.boxes.tolist() == [[30, 10, 150, 30]] and result.scores.tolist() == [0.7]
    assert sorted(result.members[0].tolist()) == [0, 1] and result.partial.tolist() == [True]
    apart = merged((0, (30, 10, 100, 30), 0.6, 0), (1, (80, 60, 150, 80), 0.7, 0))
    assert len(apart.scores) == 2 and apart.partial.all()


def test_the_coarser_level_has_what_is_larger_than_the_overlap_and_nothing_else() -> None:
    pieces = ((0, (30.0, 10.0, 100.0, 30.0), 0.9, 0), (1, (80.0, 10.0, 150.0, 30.0), 0.9, 0))
    whole = merged(*pieces, (2, (30, 10, 150, 30), 0.3, 0))
    assert whole.boxes.tolist() == [[30, 10, 150, 30]] and whole.scores.tolist() == [0.3] and not whole.partial.any()
    assert merged((0, (10, 10, 29, 29), 0.3, 0), (2, (10, 10, 29, 29), 0.9, 0)).scores.tolist() == [0.3]
    assert merged((0, (10, 10, 31, 29), 0.3, 0), (2, (10, 10, 31, 29), 0.9, 0)).scores.tolist() == [0.9]


def test_a_piece_on_something_better_goes() -> None:
    result = merged((0, (10, 10, 98.5, 90), 0.5, 0), (2, (12, 12, 96, 92), 0.9, 0), (2, (150, 10, 175, 30), 0.2, 0))
    assert result.scores.tolist() == [0.9, 0.2]


def test_nothing_found_is_nothing() -> None:
    none = Candidates(np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.int64), np.zeros(0, np.int64))
    result = merge(none, [LEFT, RIGHT], common=20, nms_iou=0.5, agnostic=False)
    assert result.boxes.shape == (0, 4) and result.members == []


# From pixels to objects, with a network that finds bright parts and gives their exact masks


SIDE = 28


def find_bright(pictures: Sequence[NDArray[np.uint8]]) -> list[Detections]:
    """A detection for each connected bright part, its mask sampled from the pixels themselves."""
    found = []
    for pixels in pictures:
        parts, count = ndimage.label(pixels[:, :, 0] > 128)
        boxes, probs = np.zeros((count, 4), np.float32), np.zeros((count, SIDE, SIDE), np.float32)
        for row, (ys, xs) in enumerate(ndimage.find_objects(parts)):
            boxes[row] = xs.start, ys.start, xs.stop, ys.stop
            inside = parts[ys, xs] == row + 1
            lines, columns = ((np.arange(SIDE) * side // SIDE) for side in inside.shape)
            probs[row] = inside[lines][:, columns]
        scores = np.linspace(0.9, 0.8, count, dtype=np.float32)
        found.append(
            Detections(
                torch.from_numpy(boxes),
                torch.from_numpy(scores),
                torch.zeros(count, dtype=torch.int64),
                pixels.shape[:2],
                ("bright",),
                mask_probs=torch.from_numpy(probs),
            )
        )
    return found


def looked_at(picture: NDArray[np.uint8], tiling: Tiling, tag: int = 1, most: int = 100) -> TiledDetections:
    config = Config(model=ModelConfig(max_detections=most))
    return predict_tiles(find_bright, Pyramid(Chunks(picture, tag), tiling), config, batch_size=3)


def with_squares(size: tuple[int, int], *boxes: tuple[int, int, int, int]) -> NDArray[np.uint8]:
    picture = np.zeros((*size, 3), np.uint8)
    for x1, y1, x2, y2 in boxes:
        picture[y1:y2, x1:x2] = 255
    return picture


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 8))
def test_every_object_is_found_once_wherever_it_lies(seed: int, tag: int) -> None:
    rng = np.random.default_rng(seed)
    size = (int(rng.integers(100, 500)), int(rng.integers(100, 500)))
    taken, boxes = np.zeros(size, bool), []
    for _ in range(40):
        w, h = (int(v) for v in rng.integers(6, 26, 2))
        x, y = int(rng.integers(0, size[1] - w)), int(rng.integers(0, size[0] - h))
        if not taken[max(y - 4, 0) : y + h + 4, max(x - 4, 0) : x + w + 4].any():
            taken[y : y + h, x : x + w] = True
            boxes.append((x, y, x + w, y + h))
    upright = with_squares(size, *boxes)
    stored = turn(upright, {6: 8, 8: 6}.get(tag, tag))
    found = looked_at(stored, Tiling(80, 26 / 80, whole=False), tag)
    assert sorted(map(tuple, found[: len(found)].boxes.int().tolist())) == sorted(boxes)
    for crop, (x1, y1, x2, y2) in zip(found[: len(found)].mask_crops(), found[: len(found)].boxes.int().tolist()):
        assert crop.pixels.sum() == (x2 - x1) * (y2 - y1)
    again = looked_at(stored, Tiling(80, 26 / 80), tag)  # the coarser levels add nothing, to within their pixels
    assert len(again) == len(boxes)
    gaps = np.abs(again[: len(boxes)].boxes.numpy()[:, None] - np.array(boxes, np.float32).reshape(1, -1, 4)).max(
        axis=2
    )
    assert gaps.min(axis=1, initial=8).max(initial=0) <= 4


def test_large_objects_come_from_the_picture_as_a_whole() -> None:
    large = (40, 60, 360, 300)
    picture = with_squares((400, 400), large, (10, 10, 30, 30))
    found = looked_at(picture, Tiling(100))
    assert sorted(found[:9].boxes.round().int().tolist()) == [[10, 10, 30, 30], [*large]]
    assert found.told(0) == []
    mask = next(one.masks for one in found[:9] if one.boxes[0, 2] == 360)
    assert mask is not None and abs(int(mask.sum()) - 320 * 240) < 0.01 * 320 * 240


def test_without_the_whole_picture_pieces_are_joined_with_their_masks() -> None:
    bar = (30, 40, 370, 60)
    found = looked_at(with_squares((100, 400), bar), Tiling(100, 0.3, whole=False))
    assert found[:9].boxes.int().tolist() == [[*bar]]
    masks = found[:1].masks
    assert masks is not None
    assert masks[0, 40:60, 35:365].all() and int(masks[0].sum()) == pytest.approx(340 * 20, rel=0.06)
    assert found.told(0) == ["1 objects no tile shows whole: their boxes may end at a tile's border"]
    assert found.told(0.99) == []


def test_masks_across_a_border_are_those_of_the_tile_that_sees_the_object_whole() -> None:
    """A triangle over the border of two tiles: its mask is the one it has alone in the middle of a picture."""
    rows, columns = np.mgrid[:24, :24]
    triangle = np.where(rows >= columns, 255, 0).astype(np.uint8)[..., None].repeat(3, axis=2)
    picture = np.zeros((100, 180, 3), np.uint8)
    picture[30:54, 85:109] = triangle  # tiles of 100 end at 100 and begin at 76
    alone = np.zeros((100, 100, 3), np.uint8)
    alone[30:54, 40:64] = triangle
    found = looked_at(picture, Tiling(100, 0.24, whole=False))
    (crop,) = found[:9].mask_crops()
    (expected,) = find_bright([alone])[0].mask_crops()
    assert (crop.top, crop.left - 45) == (expected.top, expected.left)
    assert np.array_equal(crop.pixels, expected.pixels)


def test_the_limit_of_detections_is_one_per_tile_and_reaching_it_is_told() -> None:
    boxes = [(x, y, x + 6, y + 6) for x in range(5, 390, 20) for y in range(5, 390, 20)]
    picture = with_squares((400, 400), *boxes)
    found = looked_at(picture, Tiling(100), most=500)
    assert len(found) == len(boxes) == 400 and found.full_tiles == 0
    assert len(looked_at(picture, Tiling(100, max_merged=150), most=500)) == 150
    limited = predict_tiles(
        lambda pictures: [one[:10] for one in find_bright(pictures)],
        Pyramid(Chunks(picture), Tiling(100, whole=False)),
        Config(model=ModelConfig(max_detections=10)),
    )
    assert limited.full_tiles == 25
    assert "25 of 25 tiles hold as many objects as the network may give: raise --max-detections" in limited.told(2)[0]


def test_one_tile_gives_what_the_picture_gives() -> None:
    picture = with_squares((90, 80), (5, 5, 30, 60), (40, 7, 60, 60))
    (plain,) = find_bright([picture])
    found = looked_at(picture, Tiling(100))[:9]
    assert found.boxes.equal(plain.boxes) and found.scores.equal(plain.scores)
    assert found.mask_probs is not None and plain.mask_probs is not None and found.mask_probs.equal(plain.mask_probs)


def test_progress_counts_tiles_and_an_empty_picture_has_nothing() -> None:
    done: list[int] = []
    pyramid = Pyramid(ArrayRows(with_squares((300, 200))), Tiling(100))
    found = predict_tiles(find_bright, pyramid, Config(), batch_size=4, advance=done.append)
    assert sum(done) == pyramid.count and len(found) == 0 and len(found[:5]) == 0 and list(found.parts()) == []


def test_agnostic_suppression_is_the_networks_own_choice() -> None:
    config = replace(Config(), model=replace(Config().model, nms="agnostic"))
    twice = [
        Detections(torch.tensor([[85.0, 10, 95, 30]]), torch.tensor([s]), torch.tensor([k]), (100, 100), ("a", "b"))
        for s, k in ((0.6, 0), (0.9, 1))
    ]
    twice[1].boxes -= torch.tensor([80.0, 0, 80, 0])

    def look(pictures: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        return [twice.pop(0) for _ in pictures]

    pyramid = Pyramid(ArrayRows(noise(100, 180)), Tiling(100, whole=False))
    assert predict_tiles(look, pyramid, config)[:9].labels.tolist() == [1]
