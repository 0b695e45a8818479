"""Detections: masks pasted as the published libraries paste them, COCO results, indexing, drawing to a file."""

from __future__ import annotations

import builtins
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faster_coco_eval.core import mask as coco_mask
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cascade_rcnn.data.rle import MaskCrop, encode_crop
from cascade_rcnn.errors import UserError
from cascade_rcnn.inference.detections import Detections
from cascade_rcnn.runtime.paste_masks import paste_mask


def make_detections(count: int = 3, size: tuple[int, int] = (60, 80), masks: bool = True, **more: Any) -> Detections:
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(count, 2, generator=generator) * torch.tensor([size[1] / 2, size[0] / 2])
    extent = 5 + torch.rand(count, 2, generator=generator) * torch.tensor([size[1] / 2 - 5, size[0] / 2 - 5])
    scores = torch.sort(torch.rand(count, generator=generator), descending=True).values
    labels = torch.arange(count) % 2
    probs = torch.rand(count, 28, 28, generator=generator) if masks else None
    return Detections(
        torch.cat([corner, corner + extent], 1), scores, labels, size, ("cat", "dog"), mask_probs=probs, **more
    )


def paste_with_grid_sample(probs: torch.Tensor, box: torch.Tensor, size: tuple[int, int]) -> np.ndarray[Any, Any]:
    """The whole-image form of the published libraries, in double precision."""
    x1, y1, x2, y2 = box.double().tolist()
    ys = (torch.arange(size[0], dtype=torch.float64) + 0.5 - y1) / (y2 - y1) * 2 - 1
    xs = (torch.arange(size[1], dtype=torch.float64) + 0.5 - x1) / (x2 - x1) * 2 - 1
    grid = torch.stack([xs[None].expand(size), ys[:, None].expand(size)], dim=-1)
    values = torch.nn.functional.grid_sample(probs.double()[None, None], grid[None], align_corners=False)[0, 0]
    return (values >= 0.5).numpy()


@settings(max_examples=60, deadline=None)
@given(st.floats(-20, 70), st.floats(-20, 50), st.floats(0.3, 120), st.floats(0.3, 90), st.integers(0, 1000))
def test_pasting_equals_grid_sample(x: float, y: float, width: float, height: float, seed: int) -> None:
    probs = torch.rand(28, 28, generator=torch.Generator().manual_seed(seed))
    box = torch.tensor([x, y, x + width, y + height], dtype=torch.float64)
    crop = paste_mask(probs.numpy(), box.numpy(), (60, 80))
    whole = np.zeros((60, 80), dtype=bool)
    whole[crop.top : crop.top + crop.pixels.shape[0], crop.left : crop.left + crop.pixels.shape[1]] = crop.pixels
    expected = paste_with_grid_sample(probs, box, (60, 80))
    assert (whole != expected).mean() <= 1e-3  # only values at the threshold itself may round either way


def test_a_box_without_area_or_outside_the_image_has_an_empty_mask() -> None:
    probs = np.ones((28, 28), dtype=np.float32)
    for box in ([5, 5, 5, 9], [200, 5, 220, 9], [-30, 5, -20, 9]):
        crop = paste_mask(probs, np.array(box, dtype=np.float64), (60, 80))
        assert not crop.pixels.any()
        assert coco_mask.area(encode_crop(crop, (60, 80))) == 0


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**31), st.sampled_from([0.0, 0.2, 0.7, 1.0]))
def test_encoding_a_crop_equals_encoding_the_whole_bitmap(height: int, width: int, seed: int, density: float) -> None:
    random = np.random.default_rng(seed)
    top, left = int(random.integers(0, height)), int(random.integers(0, width))
    rows, columns = int(random.integers(1, height - top + 1)), int(random.integers(1, width - left + 1))
    crop = MaskCrop(top, left, random.random((rows, columns)) < density)
    whole = np.zeros((height, width), dtype=np.uint8)
    whole[top : top + rows, left : left + columns] = crop.pixels
    expected = coco_mask.encode(np.asfortranarray(whole))["counts"]
    expected = expected.decode() if isinstance(expected, bytes) else expected
    assert encode_crop(crop, (height, width)) == {"size": [height, width], "counts": expected}


def test_masks_and_coco_segmentations_are_the_same_pixels() -> None:
    detections = make_detections()
    masks = detections.masks
    assert masks is not None and masks.shape == (3, 60, 80) and masks.dtype == torch.bool
    for mask, result in zip(masks.numpy(), detections.to_coco()):
        assert np.array_equal(coco_mask.decode(result["segmentation"]).astype(bool), mask)


def test_coco_results_keep_full_precision_and_the_data_sets_ids() -> None:
    detections = make_detections(masks=False, image_id=42, category_ids=(17, 18))
    results = detections.to_coco()
    assert [r["category_id"] for r in results] == [17, 18, 17]
    for result, box, score in zip(results, detections.boxes.double().numpy(), detections.scores.tolist()):
        x, y, width, height = result["bbox"]
        assert [x, y, x + width, y + height] == pytest.approx(box, rel=1e-15)
        assert result["score"] == score and result["image_id"] == 42 and "segmentation" not in result
    assert "image_id" not in make_detections().to_coco()[0]
    assert make_detections().to_coco()[0]["category_id"] == 1  # without ids of the data set: 1..K


def test_300_masks_of_a_12_megapixel_image_need_little_memory() -> None:
    detections = make_detections(300, size=(3000, 4000))
    detections.mask_probs = torch.ones(300, 28, 28)
    detections.boxes[:, 2:] = detections.boxes[:, :2] + 300
    tracemalloc.start()
    results = detections.to_coco()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(results) == 300
    assert peak < 200e6  # 300 bitmaps would be 3.6 GB


def test_indexing_keeps_rows_together() -> None:
    detections = make_detections(5)
    first = detections[0]
    assert len(first) == 1 and torch.equal(first.boxes[0], detections.boxes[0])
    assert torch.equal(detections[-1].scores, detections.scores[-1:])
    dogs = detections[detections.labels == 1]
    assert dogs.names == ["dog", "dog"] and dogs.mask_probs is not None and len(dogs.mask_probs) == 2
    assert len(detections[1:3]) == 2 and len(detections[[]]) == 0
    assert len(detections[detections.scores > 2].to_coco()) == 0
    assert len(list(detections)) == 5
    with pytest.raises(IndexError, match="there are 5"):
        detections[5]


@pytest.mark.parametrize(
    "make", [int, np.int64, np.uint8, np.array, torch.tensor, lambda row: torch.tensor(row).byte()]
)
def test_any_whole_number_chooses_one_detection(make: Callable[[int], Any]) -> None:
    detections = make_detections(4)
    for row in range(4):
        one = detections[make(row)]
        assert len(one) == 1 and one.boxes.tolist() == [detections.boxes[row].tolist()]
        assert one.names == [detections.names[row]] and len(one.to_coco()) == 1
        masks = one.masks
        assert masks is not None and masks.shape == (1, 60, 80)
    best = detections[detections.scores.argmax()]
    assert float(best.scores[0]) == float(detections.scores.max())
    assert [len(detections[row]) for row in np.argsort(-detections.scores.numpy())] == [1] * 4
    with pytest.raises(IndexError, match="detection 4: there are 4"):
        detections[make(4)]


def test_slices_and_lists_of_positions() -> None:
    detections = make_detections(5)
    assert detections[::-1].scores.tolist() == detections.scores.tolist()[::-1]
    assert detections[np.array([3, -1])].scores.tolist() == detections.scores[[3, 4]].tolist()
    assert [len(one) for one in detections] == [1] * 5
    assert len(detections[[True, False, False, False, True]]) == 2


@pytest.mark.parametrize(
    "index",
    [0.5, True, torch.tensor(True), "a", None, [0.5], [7], [True], torch.ones(5).byte(), torch.ones(1, 2).long()],
)
def test_an_index_that_chooses_nothing_is_an_index_error(index: Any) -> None:
    with pytest.raises(IndexError):
        make_detections(5)[index]


def test_polygons_are_the_masks_pixels() -> None:
    detections = make_detections(6, size=(90, 120))
    probs = torch.zeros(6, 28, 28)
    probs[0, 2:26, 2:26] = 1
    probs[0, 10:18, 9:15] = 0  # a hole
    probs[1, :8] = probs[1, 20:] = 1  # two parts
    probs[2:5] = torch.rand(3, 1, 7, 7, generator=torch.Generator().manual_seed(3)).repeat(1, 1, 4, 4)[:, 0]
    detections.mask_probs = probs  # the last one is empty
    polygons = detections.polygons()
    masks = detections.masks
    assert masks is not None and [len(parts) for parts in polygons][:2] == [1, 2] and polygons[5] == []
    for mask, parts, result in zip(masks.numpy(), polygons, detections.to_coco(polygons=True)):
        segmentation = result["segmentation"]
        if parts:
            assert segmentation == [ring.reshape(-1).tolist() for ring in parts]
            segmentation = coco_mask.merge(coco_mask.frPyObjects(segmentation, 90, 120))
        assert np.array_equal(coco_mask.decode(segmentation).astype(bool), mask)
    (outline,) = detections.outlines()[0]
    assert len(outline.holes) == 1
    json.dumps(detections.to_coco(polygons=True))


def test_polygons_need_masks() -> None:
    with pytest.raises(UserError, match="use a model with masks"):
        make_detections(masks=False).polygons()
    assert make_detections(0, masks=False).polygons() == []
    assert "segmentation" not in make_detections(masks=False).to_coco(polygons=True)[0]


def test_repr_says_what_was_found() -> None:
    assert repr(make_detections()).startswith("Detections(3 in 80x60 pixels (2 cat, 1 dog), best score 0.")
    assert repr(make_detections(0, masks=False)) == "Detections(0 in 80x60 pixels)"


def test_no_detections_is_normal() -> None:
    empty = make_detections(0)
    assert empty.to_coco() == [] and empty.names == []
    masks = empty.masks
    assert masks is not None and masks.shape == (0, 60, 80)


def test_to_supervision() -> None:
    pytest.importorskip("supervision")
    detections = make_detections()
    theirs = detections.to_supervision()
    assert len(theirs) == 3 and theirs.mask.shape == (3, 60, 80)
    assert list(theirs.data["class_name"]) == detections.names
    assert len(make_detections(0, masks=False).to_supervision()) == 0


def test_to_supervision_says_how_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def refuse(name: str, *rest: Any, **more: Any) -> Any:
        if name == "supervision":
            raise ImportError(name)
        return original(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UserError, match=r"pip install 'cascade-rcnn\[supervision\]'"):
        make_detections().to_supervision()


def test_save_draws_and_never_overwrites_the_image(tmp_path: Path) -> None:
    source = tmp_path / "in.png"
    Image.new("RGB", (80, 60), (90, 90, 90)).save(source)
    before = source.read_bytes()
    detections = make_detections(image=source)
    written = detections.save(tmp_path / "deeper" / "out.jpg")
    with Image.open(written) as picture:
        assert picture.size == (80, 60)
        assert np.asarray(picture).std() > 1  # something was drawn on the plain grey
    with pytest.raises(UserError, match="the image itself"):
        detections.save(source)
    with pytest.raises(UserError, match="unknown picture format"):
        detections.save(tmp_path / "out.nothing")
    assert source.read_bytes() == before
    with pytest.raises(UserError, match="no image to draw on"):
        make_detections().save(tmp_path / "out.jpg")
