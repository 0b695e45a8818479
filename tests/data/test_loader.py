"""Batches: packed annotations, padding, masks, bad images, workers that leave nothing behind."""

from __future__ import annotations

import dataclasses
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import locations
from cascade_rcnn.config import DataConfig
from cascade_rcnn.data.dataset import DetectionDataset, SampleKey
from cascade_rcnn.data.loader import Collate, Loader, Upload, eval_loader, measure_loading, train_loader
from cascade_rcnn.data.records import DataSplit, ImageRecord
from cascade_rcnn.errors import DataError
from cascade_rcnn.structures import ImageBatch, Targets

CONFIG = DataConfig(short_side=(64,), long_side=96, workers=0)


def _record(folder: Path, index: int, *, objects: int = 2, size: tuple[int, int] = (48, 64)) -> ImageRecord:
    """An image of noise with white blocks; each block's box and polygon."""
    rng = np.random.default_rng(index)
    pixels = rng.integers(0, 100, (*size, 3), dtype=np.uint8)
    boxes = np.zeros((objects, 4))
    for box in boxes:
        x, y = rng.integers(0, size[1] - 20), rng.integers(0, size[0] - 20)
        box[:] = x, y, x + rng.integers(8, 20), y + rng.integers(8, 20)
        x1, y1, x2, y2 = box.astype(int)
        pixels[y1:y2, x1:x2] = 255
    path = folder / f"{index:03d}.png"
    Image.fromarray(pixels).save(path)
    polygons = [[[x1, y1, x2, y1, x2, y2, x1, y2]] for x1, y1, x2, y2 in boxes.tolist()]
    return ImageRecord(
        path,
        path.name,
        index if index % 2 else f"name{index}",
        *size,
        boxes,
        np.arange(objects, dtype=np.int64) % 3,
        np.zeros(objects, dtype=bool),
        np.prod(boxes[:, 2:] - boxes[:, :2], axis=1),
        polygons,
    )  # type: ignore[arg-type]


def _split(folder: Path, records: list[ImageRecord]) -> DataSplit:
    return DataSplit("coco", "train", folder, records, ("a", "b", "c"), (1, 2, 3), has_masks=True)


@pytest.fixture
def split(tmp_path: Path) -> DataSplit:
    """Eight images, wide and tall, of 0 to 7 objects."""
    sizes = ((48, 64), (64, 48))
    return _split(tmp_path, [_record(tmp_path, index, objects=index, size=sizes[index % 2]) for index in range(8)])


def _equal(first: tuple[ImageBatch, Targets], second: tuple[ImageBatch, Targets]) -> bool:
    (a, s), (b, t) = first, second
    pairs = [(a.pixels, b.pixels), (a.sizes, b.sizes), (s.boxes, t.boxes), (s.labels, t.labels), (s.valid, t.valid)]
    if s.masks is not None and t.masks is not None:
        pairs += [(s.masks.pixels, t.masks.pixels), (s.masks.origins, t.masks.origins)]
    return a.image_ids == b.image_ids and all(torch.equal(x, y) for x, y in pairs)


def test_evaluation_gives_every_image_padded_with_its_objects(split: DataSplit) -> None:
    dataset = DetectionDataset(split, CONFIG, training=False)
    seen: dict[int | str, int] = {}
    for images, targets in eval_loader(dataset, batch_size=3):
        assert images.pixels.shape[2] % 32 == images.pixels.shape[3] % 32 == 0
        assert images.pixels.is_contiguous(memory_format=torch.channels_last) and targets.masks is None
        assert targets.boxes.shape[1] == 8
        for b, (image_id, path) in enumerate(zip(images.image_ids, images.paths)):
            height, width = images.sizes[b].tolist()
            assert images.pixels[b, :, height:].sum() == images.pixels[b, :, :, width:].sum() == 0
            assert (height, width) in ((64, 85), (85, 64))
            record = next(record for record in split.records if str(record.path) == path)
            assert record.image_id == image_id
            assert images.original_sizes[b].tolist() == [record.height, record.width]
            scale = np.array([width / record.width, height / record.height] * 2)
            np.testing.assert_allclose(targets.boxes[b][targets.valid[b]], record.boxes * scale, rtol=1e-5)
            assert targets.labels[b][targets.valid[b]].tolist() == record.labels.tolist()
            assert not targets.boxes[b][~targets.valid[b]].any() and not targets.ignore.any()
            seen[image_id] = int(targets.valid[b].sum())
    assert seen == {record.image_id: len(record.boxes) for record in split.records}


def test_masks_lie_where_the_objects_are(split: DataSplit) -> None:
    config = dataclasses.replace(CONFIG, short_side=(96,), flip=0.5, vertical_flip=0.5)
    dataset = DetectionDataset(split, config, training=True, masks=True)
    checked = 0
    for images, targets in train_loader(dataset, batch_size=2, seed=1):
        masks = targets.masks
        assert masks is not None and masks.pixels.max() == 1
        assert masks.max_size == tuple(masks.sizes.reshape(-1, 2).amax(0).tolist())
        for b, g in targets.valid.nonzero().tolist():
            (top, left), (height, width) = masks.origins[b, g].tolist(), masks.sizes[b, g].tolist()
            start = int(masks.offsets[b, g])
            crop = masks.pixels[start : start + height * width].reshape(height, width).bool()
            box = torch.tensor([left, top, left + width, top + height])
            assert (box - targets.boxes[b, g]).abs().max() <= 1.51  # a pixel of the original
            part = images.pixels[b, 0, top : top + height, left : left + width]
            assert crop.all() and (part[2:-2, 2:-2] > 200).all()  # the blocks are white
            checked += 1
    assert checked == 28


def test_what_does_not_depend_on_workers_resuming_or_ranks(split: DataSplit) -> None:
    config = dataclasses.replace(CONFIG, short_side=(64, 80), photometric=True)
    dataset = DetectionDataset(split, config, training=True, masks=True)
    alone = train_loader(dataset, batch_size=2, seed=3)
    alone.set_epoch(2)
    expected = list(alone)
    assert len(alone) == len(expected) == 4
    with_workers = train_loader(dataset, batch_size=2, seed=3, workers=2)
    for _ in range(2):  # the workers persist and keep up with the epoch
        with_workers.set_epoch(2)
        assert all(_equal(a, b) for a, b in zip(expected, with_workers, strict=True))
        with_workers.set_epoch(0)
        assert not _equal(next(iter(with_workers)), expected[0])
    with_workers.set_epoch(2, start_step=3)
    assert len(with_workers) == 1
    assert all(_equal(a, b) for a, b in zip(expected[3:], with_workers, strict=True))
    with_workers.close()
    shards = [train_loader(dataset, batch_size=1, rank=rank, world_size=2, seed=3) for rank in (0, 1)]
    for loader in shards:
        loader.set_epoch(2)
    for both, *single in zip(expected, *shards, strict=True):
        assert both[0].paths == tuple(images.paths[0] for images, _ in single)
        for b, (images, targets) in enumerate(single):
            height, width = images.sizes[0].tolist()
            assert torch.equal(images.pixels[0, :, :height, :width], both[0].pixels[b, :, :height, :width])
            assert torch.equal(targets.boxes[0], both[1].boxes[b])


def test_crowds_are_background_unless_kept(split: DataSplit) -> None:
    record = split.records[5]
    record.ignore[:] = [True, False, False, True, False]
    for keep, expected in ((False, (3, 0)), (True, (3, 2))):
        dataset = DetectionDataset(split, dataclasses.replace(CONFIG, ignore_regions=keep), training=False, masks=True)
        _, targets = Collate()([dataset[5]])  # type: ignore[misc]
        assert (int(targets.valid.sum()), int(targets.ignore.sum())) == expected
        assert not (targets.valid & targets.ignore).any()
        assert dataset.packed.ignored == (0 if keep else 2)


def test_degenerate_boxes_are_dropped_and_counted(split: DataSplit) -> None:
    split.records[4].boxes[:] = [[5, 5, 5, 9], [5, 5, 20, 20], [60, 70, 90, 90], [9, 9, 3, 3]]
    split.records[3].boxes[0] = np.nan
    dataset = DetectionDataset(split, CONFIG, training=True)
    assert dataset.degenerate == 4
    assert len(dataset[SampleKey(4, (0,))].boxes) == 1 and len(dataset[SampleKey(3, (0,))].boxes) == 2


def test_images_without_objects_stay_unless_unwanted(split: DataSplit) -> None:
    split.records[1].ignore[:] = True
    assert len(DetectionDataset(split, CONFIG, training=True)) == 8
    unwanted = dataclasses.replace(CONFIG, keep_empty=False)
    assert len(DetectionDataset(split, unwanted, training=True)) == 6
    assert len(DetectionDataset(split, unwanted, training=False)) == 8  # an evaluation leaves nothing out
    split.records[:] = split.records[:1]
    with pytest.raises(DataError, match="no images with objects"):
        DetectionDataset(split, unwanted, training=True)
    images, targets = next(iter(train_loader(DetectionDataset(split, CONFIG, training=True, masks=True), batch_size=1)))
    assert not targets.valid.any() and targets.masks is not None and targets.masks.pixels.numel() == 0
    assert targets.masks.max_size == (0, 0) and len(images) == 1


def test_jitter_pads_to_its_square(split: DataSplit) -> None:
    config = dataclasses.replace(CONFIG, long_side=64, large_scale_jitter=(0.2, 2.0))
    shapes = {
        tuple(images.pixels.shape)
        for images, _ in train_loader(DetectionDataset(split, config, training=True), batch_size=2)
    }
    assert shapes == {(2, 3, 64, 64)}


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_image_in_training_is_replaced_and_reported(split: DataSplit, workers: int) -> None:
    split.records[2].path.write_bytes(b"broken")
    split.records[6].path.unlink()
    loader = train_loader(DetectionDataset(split, CONFIG, training=True), batch_size=2, workers=workers)
    batches = [images for images, _ in loader]
    loader.close()
    assert all(len(images) == 2 for images in batches)
    reported = {path: reason for images in batches for path, reason in images.bad}
    assert set(reported) >= {str(split.records[2].path), str(split.records[6].path)}
    assert "cannot be read as an image" in reported[str(split.records[2].path)]
    assert "no such image file" in reported[str(split.records[6].path)]
    assert not set(reported) & {path for images in batches for path in images.paths}


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_image_in_evaluation_is_black_and_named(split: DataSplit, workers: int) -> None:
    split.records[2].path.write_bytes(b"broken")
    loader = eval_loader(DetectionDataset(split, CONFIG, training=False), batch_size=2, workers=workers)
    batches = [images for images, _ in loader]
    loader.close()
    ((path, reason),) = [entry for images in batches for entry in images.bad]
    assert path == str(split.records[2].path) and path in reason and "\n" not in reason
    assert sorted(one for images in batches for one in images.paths) == sorted(str(one.path) for one in split.records)


def test_when_no_image_can_be_read_training_stops(split: DataSplit) -> None:
    for record in split.records:
        record.path.unlink()
    with pytest.raises(DataError, match="20 images in a row"):
        next(iter(train_loader(DetectionDataset(split, CONFIG, training=True), batch_size=2)))


def test_image_of_another_size_than_annotated_is_unusable(split: DataSplit) -> None:
    split.records[2].height, split.records[2].width = 64, 48  # as if turned by its EXIF tag
    ((_, reason),) = DetectionDataset(split, CONFIG, training=False)[2].bad
    assert "002.png: is 64x48, the annotation says 48x64" in reason
    split.records[2].height = split.records[2].width = 0  # not said: taken from the image
    split.records[2].boxes[0] = [60, 40, 500, 500]
    item = DetectionDataset(split, CONFIG, training=False)[2]
    assert item.boxes[0, 2:].tolist() == [85, 64]


def test_mask_of_another_size_names_the_image(split: DataSplit) -> None:
    assert split.records[1].segmentations is not None
    split.records[1].segmentations[0] = {"size": [3, 3], "counts": [4, 5]}
    with pytest.raises(DataError, match=r"001\.png: an RLE mask of 3x3 on an image of 48x64"):
        DetectionDataset(split, CONFIG, training=False, masks=True)[1]


def test_annotations_cost_their_bytes_once(tmp_path: Path) -> None:
    """200,000 boxes: no Python object per image or box, and a worker's pickle of shared memory is a few handles."""
    rng = np.random.default_rng(0)
    low = rng.uniform(0, 300, (200, 2))
    boxes = np.concatenate([low, low + 50], axis=1)
    none = np.zeros(200)
    records = [
        ImageRecord(
            tmp_path / f"{i}.jpg",
            f"{i}.jpg",
            i,
            480,
            640,
            boxes,
            none.astype(np.int64),
            none.astype(bool),
            none,
            [[[1.0, 2, 30, 2, 30, 20]]] * 200,
        )
        for i in range(1000)
    ]
    dataset = DetectionDataset(_split(tmp_path, records), CONFIG, training=True, masks=True)
    assert len(dataset.packed.boxes) == 200_000
    size = len(pickle.dumps(dataset))
    assert size < 200_000 * (32 + 5 + 8 + 33 + 4)  # boxes, labels and flags, offsets, polygons; and a little
    held = [value for value in vars(dataset.packed).values() if not isinstance(value, (torch.Tensor, int))]
    assert held == [] and not any(value is records for value in vars(dataset).values())
    dataset.packed.share()
    from multiprocessing.reduction import ForkingPickler

    assert len(ForkingPickler.dumps(dataset)) < 20_000


def test_paths_and_ids_survive_packing(tmp_path: Path) -> None:
    odd = tmp_path / os.fsdecode(b"gr\xfc\xdfe \xe6.png")  # not UTF-8
    record = _record(tmp_path, 1)
    record.path.rename(odd)
    record.path = odd
    record.image_id = "17"
    item = DetectionDataset(_split(tmp_path, [record]), CONFIG, training=False)[0]
    assert item.path == str(odd) and item.image_id == "17"


def test_speed_is_measured(split: DataSplit) -> None:
    assert measure_loading(DetectionDataset(split, CONFIG, training=True), workers=0, seconds=0.2) > 1


# --- processes ----------------------------------------------------------------------------------------------------

PROGRAM = """
    import sys, time
    from pathlib import Path
    sys.path[:0] = {tests!r}
    from test_loader import CONFIG, _record, _split
    from cascade_rcnn.data.dataset import DetectionDataset
    from cascade_rcnn.data.loader import train_loader
    folder = Path({folder!r})
    split = _split(folder, [_record(folder, i) for i in range(16)])
    loader = train_loader(DetectionDataset(split, CONFIG, training=True), batch_size=2, workers=2)
    batches = iter(loader)
    next(batches)
    print(*[worker.pid for worker in loader.processes()], flush=True)
    {then}
"""


def _start(tmp_path: Path, then: str) -> tuple[subprocess.Popen[str], list[int]]:
    program = textwrap.dedent(PROGRAM).format(
        tests=[str(Path(__file__).parent), str(locations.TESTS / "support")], folder=str(tmp_path), then=then
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        text=True,
        cwd=locations.REPOSITORY,
        start_new_session=True,
    )
    assert process.stdout is not None
    pids = [int(word) for word in process.stdout.readline().split()]
    assert len(pids) == 2
    return process, pids


def _alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False


def _gone(pids: list[int], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while any(_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not any(_alive(pid) for pid in pids)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_outlive_signals_to_the_group_until_the_main_process_ends(tmp_path: Path) -> None:
    """The main process notices them, still takes every batch, and leaves no worker behind."""
    then = (
        "import signal; noted = []; [signal.signal(n, lambda n, _: noted.append(n)) for n in (2, 15)]; "
        "print('ready', flush=True); [None for _ in iter(lambda: time.sleep(0.05) or len(noted), 2)]; "
        "print(len(list(batches)), flush=True)"
    )
    process, pids = _start(tmp_path, then)
    with process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.2)
        os.killpg(process.pid, signal.SIGTERM)
        assert process.stdout.readline() == "7\n"
        assert process.wait(60) == 0
    assert _gone(pids, 20)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_die_with_a_killed_main_process(tmp_path: Path) -> None:
    process, pids = _start(tmp_path, "time.sleep(60)")
    with process:
        process.kill()
    assert _gone(pids, 60)  # torch's watchdog looks every five seconds, when the machine lets it


def test_closing_ends_the_workers(split: DataSplit) -> None:
    loader: Loader = train_loader(DetectionDataset(split, CONFIG, training=True), batch_size=2, workers=1)
    next(iter(loader))
    pids = [process.pid for process in loader.processes()]
    assert len(pids) == 1
    loader.close()
    assert _gone([pid for pid in pids if pid], 8)


def _batch() -> tuple[ImageBatch, Targets]:
    sizes = torch.tensor([[6, 8]])
    return ImageBatch(torch.arange(144, dtype=torch.uint8).view(1, 3, 6, 8), sizes, sizes), Targets.empty(1, rows=8)


def test_a_cpu_is_given_the_batch_itself() -> None:
    images, targets = _batch()
    moved, moved_targets = Upload(torch.device("cpu"))(images, targets)
    assert moved.pixels.data_ptr() == images.pixels.data_ptr()
    assert moved_targets.boxes.data_ptr() == targets.boxes.data_ptr()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_given_a_copy_without_waiting() -> None:
    upload = Upload(torch.device("cuda"))
    images, targets = (part.pin_memory() for part in _batch())
    torch.cuda.set_sync_debug_mode("error")
    try:
        moved, moved_targets = upload(images, targets)
        doubled = moved.pixels.int() * 2
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert moved.pixels.is_cuda and moved_targets.valid.is_cuda
    assert torch.equal(doubled.cpu(), images.pixels.int() * 2)
