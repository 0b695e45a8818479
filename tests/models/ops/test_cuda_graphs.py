"""Predictions repeated from recordings: the same detections, whatever comes between."""

from __future__ import annotations

import copy

import pytest
import torch

from cascade_rcnn.benchmark.stopwatch import seed_weights, synthetic_image
from cascade_rcnn.config import ModelConfig
from cascade_rcnn.inference.run_model import Precision, detect
from cascade_rcnn.models.build import build_model
from cascade_rcnn.models.cascade_rcnn import CascadeRCNN
from cascade_rcnn.models.ops.cuda_graphs import RECORD_AT, Recorder
from cascade_rcnn.structures import ImageBatch, RawDetections

PRECISIONS: tuple[Precision, ...] = ("fp32", "tf32", "bf16")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def network(**changes: object) -> CascadeRCNN:
    torch.manual_seed(0)
    settings = {"backbone": "resnet10t", "pretrained": False, "fpn_channels": 32, "head_channels": 32,
                "test_proposals": 40, "max_detections": 20, "masks": "last", **changes}  # fmt: skip
    model = build_model(ModelConfig(**settings), 5).eval()  # type: ignore[arg-type]
    seed_weights(model)
    model.std.fill_(57.0)  # random weights on unscaled input would magnify rounding
    return model


def batch(*sizes: tuple[int, int], seed: int = 0) -> ImageBatch:
    pixels = torch.zeros(len(sizes), 3, 128, 160, dtype=torch.uint8)
    for number, (row, (height, width)) in enumerate(zip(pixels, sizes)):
        row[:, :height, :width] = synthetic_image((height, width), seed=seed + number)
    return ImageBatch(pixels, torch.tensor(sizes), torch.tensor(sizes) * 2)


def assert_equal(found: RawDetections, expected: RawDetections) -> None:
    assert expected.valid.any()
    for name in ("boxes", "scores", "labels", "valid", "masks"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


def pair(**changes: object) -> tuple[CascadeRCNN, CascadeRCNN]:
    """The same network with and without recordings."""
    model, plain = (network(**changes).cuda().optimize_for_inference() for _ in range(2))
    plain.recorder = None
    return model, plain


def recordings(model: CascadeRCNN) -> int:
    assert model.recorder is not None and all(model.recorder._recordings.values())
    return len(model.recorder._recordings)


def test_a_network_on_a_cpu_records_nothing_and_copies_of_a_recorder_are_empty() -> None:
    model = network(masks="none").optimize_for_inference()
    assert model.recorder is None
    recorder = Recorder()
    assert [recorder._is_due("one") for _ in range(RECORD_AT)] == [False] * (RECORD_AT - 1) + [True]
    other = copy.deepcopy(recorder)
    assert not other._calls and other._lock is not recorder._lock
    recorder.clear()
    assert not recorder._is_due("one")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("semantics", ["mmdetection", "detectron2", "paper", "torchvision"])
def test_recordings_of_two_sizes_give_the_very_numbers_of_plain_calls(semantics: str) -> None:
    model, plain = pair(semantics=semantics)
    on_cpu = network(semantics=semantics).optimize_for_inference()
    for seed in range(5):
        for sizes in ([(128, 160)], [(100, 120), (128, 90)]):
            images = batch(*sizes, seed=seed)
            found = detect(model, images, "fp32")
            assert_equal(found, detect(plain, images, "fp32"))
            near = (found.scores - detect(on_cpu, images, "fp32").scores).abs() < 1e-3
            assert near.float().mean() > 0.95
    assert recordings(model) == 2


@pytest.mark.gpu
@needs_gpu
def test_each_precision_has_its_recording() -> None:
    model, plain = pair()
    for seed in range(4):
        for precision in PRECISIONS:
            images = batch((128, 160), seed=seed)
            assert_equal(detect(model, images, precision), detect(plain, images, precision))
    assert recordings(model) == 3


@pytest.mark.gpu
@needs_gpu
def test_changed_settings_and_moved_weights_get_recordings_of_their_own() -> None:
    model, plain = pair()
    images = batch((128, 160))
    for stages in (3, 1):
        model.cascade.stages_at_test = plain.cascade.stages_at_test = stages
        for _ in range(4):
            assert_equal(detect(model, images, "fp32"), detect(plain, images, "fp32"))
    assert recordings(model) == 2
    model.cpu().cuda()
    assert recordings(model) == 0
    for _ in range(4):
        assert_equal(detect(model, images, "fp32"), detect(plain, images, "fp32"))
    assert recordings(model) == 1


@pytest.mark.gpu
@needs_gpu
def test_what_cannot_be_recorded_goes_on_without(capsys: pytest.CaptureFixture[str]) -> None:
    def waits(images: ImageBatch) -> RawDetections:
        count = int(images.pixels.float().sum() > 0)
        nothing = torch.zeros(1, count, device="cuda")
        return RawDetections(torch.zeros(1, count, 4, device="cuda"), nothing, nothing.long(), nothing.bool())

    recorder, images = Recorder(), batch((128, 160)).to("cuda")
    for _ in range(5):
        assert recorder(waits, images, None).boxes.shape == (1, 1, 4)
    assert capsys.readouterr().err.count("no CUDA graph of this prediction, it goes on without") == 1
    assert torch.rand(3, device="cuda").sum().item() > 0
