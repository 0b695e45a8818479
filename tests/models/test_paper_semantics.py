"""``semantics="paper"`` against Detectron's rules as ``detectron_rules.py`` spells them, end to end on a small network.

The feature maps, the RPN's and the heads' outputs come from the network; everything between them is computed twice.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import detectron_rules as rules
from cascade_rcnn.config import Config, DataConfig
from cascade_rcnn.data.dataset import DetectionDataset
from cascade_rcnn.data.exact_resize import resize_to_float
from cascade_rcnn.data.loader import Collate
from cascade_rcnn.data.records import DataSplit, ImageRecord
from cascade_rcnn.data.transforms import detectron_scale, detectron_size
from cascade_rcnn.inference.detector import Detector
from cascade_rcnn.models.cascade import Cascade, Stage
from cascade_rcnn.models.cascade_rcnn import CascadeRCNN
from cascade_rcnn.models.detectron_rules import DetectronAnchorGenerator, DetectronStage, OriginalFrame
from cascade_rcnn.rounding import round_up
from cascade_rcnn.runtime.paste_masks import paste_in_whole_pixels
from cascade_rcnn.structures import ImageBatch, Proposals
from detectron_rules import Array, Objects
from tiny import TINY, tiny_model

DATA = DataConfig(short_side=(120,), long_side=160, workers=0)
SIZES = ((75, 94), (55, 100))  # become 120 x 150 (150.4 rounded) and, limited by the longer side, 88 x 160
OBJECTS = (  # boxes as annotations have them: x2 - x1 is the width
    Objects(
        np.array([[10, 12, 48.5, 50], [50, 30, 92, 70.3], [2, 3, 14, 9], [12, 14, 45, 46]], dtype=np.float64),
        np.array([0, 2, 1, 1]),
        [
            [10, 12, 48.5, 20, 40, 50, 15, 44],
            [50, 30, 92, 35, 90, 70.3, 60, 66],
            [2, 3, 14, 3, 14, 9, 2, 9],
            [12, 14, 45, 14, 40, 46, 12, 40],
        ],
    ),
    Objects(np.array([[20, 8, 70, 46]], dtype=np.float64), np.array([1]), [[20, 30, 45, 8, 70, 40, 50, 46]]),
)


def lively_model(*, rpn: float = 15, box: float = 200, **changes: Any) -> CascadeRCNN:
    """A network whose random heads tell boxes apart and move them, the further the larger ``rpn`` and ``box``."""
    model = tiny_model(semantics="paper", anchor_scales=(8.0,), **changes)
    with torch.no_grad():
        model.rpn.objectness.weight.mul_(30)
        model.rpn.deltas.weight.mul_(rpn)
        for head in model.cascade.box_heads:
            head.classifier.weight.mul_(40)
            head.deltas.weight.mul_(box)
        for mask_head in model.cascade.mask_heads:
            mask_head.logits.weight.mul_(300)
    return model


def picture(b: int) -> Array:
    generator = np.random.default_rng(b)
    smooth = generator.integers(0, 256, (*(side // 8 + 2 for side in SIZES[b]), 3), dtype=np.uint8)
    image = Image.fromarray(smooth).resize(SIZES[b][::-1], Image.Resampling.BILINEAR)
    return np.asarray(image)


def per_level(outputs: list[torch.Tensor], b: int) -> list[Array]:
    return [level[b].detach().numpy() for level in outputs]


def shapes_of(pyramid: list[torch.Tensor]) -> list[tuple[int, int]]:
    return [(level.shape[2], level.shape[3]) for level in pyramid]


def last_pixels(boxes: torch.Tensor) -> Array:
    """Our boxes in Detectron's coordinates."""
    return boxes.detach().numpy() - np.array([0, 0, 1, 1])


def assert_same_boxes(ours: Array, expected: Array, tolerance: float = 1e-4) -> None:
    """Row by row, whatever the order of the rows."""
    assert ours.shape == expected.shape
    distance = np.abs(ours[:, None].astype(np.float64) - expected[None]).max(-1)
    assert distance.min(axis=1).max() < tolerance and distance.min(axis=0).max() < tolerance


def test_anchors_are_the_published_ones() -> None:
    """The nine of Faster R-CNN's first release, stride 16, which counted pixels from 1."""
    published = np.array(
        [
            [-83, -39, 100, 56],
            [-175, -87, 192, 104],
            [-359, -183, 376, 200],
            [-55, -55, 72, 72],
            [-119, -119, 136, 136],
            [-247, -247, 264, 264],
            [-35, -79, 52, 96],
            [-79, -167, 96, 184],
            [-167, -343, 184, 360],
        ]
    )
    scales, ratios = (8.0, 16.0, 32.0), (0.5, 1.0, 2.0)
    assert (rules.cell_anchors(16, scales, ratios) + 1 == published).all()
    ours = DetectronAnchorGenerator((16,), scales=scales, ratios=ratios)
    assert (last_pixels(ours([(1, 1)])[0]) + 1 == published).all()
    levels = DetectronAnchorGenerator(rules.STRIDES, scales=(8.0,), ratios=ratios)
    shapes = [(7, 5)] * 5
    for stride, made in zip(rules.STRIDES, levels(shapes)):
        assert (last_pixels(made) == rules.anchors(stride, 8.0, (7, 5))).all()


@pytest.mark.parametrize(
    "size, scale, expected",
    [
        ((75, 94), 1.6, (120, 150)),
        ((70, 100), 1.6, (112, 160)),
        ((120, 160), 1.0, (120, 160)),
        ((480, 640), 0.25, (120, 160)),
        ((481, 641), 120 / 481, (120, 160)),
        ((90, 120.375), 4 / 3, (120, 160)),
    ],
)
def test_one_factor_scales_both_sides(size: tuple[int, int], scale: float, expected: tuple[int, int]) -> None:
    """The longer side may exceed its limit by less than half a pixel (the last case); sizes round half to even."""
    assert detectron_scale(size, 120, 160) == pytest.approx(scale, abs=1e-12)
    assert detectron_size(size, detectron_scale(size, 120, 160)) == expected
    assert detectron_size((5, 7), 0.5) == (2, 4)


@pytest.mark.parametrize("scale", [1.6, 0.37])
def test_pixels_are_resized_in_float_by_the_factor(scale: float) -> None:
    image = picture(0)[:30, :41]
    expected = rules.resize(image, scale).transpose(2, 0, 1)
    ours = resize_to_float(torch.from_numpy(image.copy()).permute(2, 0, 1), expected.shape[1:], scale)
    assert ours.dtype == torch.float32
    np.testing.assert_allclose(ours.numpy(), expected, atol=1e-3)


def watch_rois(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The boxes that each pooling reads, in the order of the poolings."""
    seen: list[torch.Tensor] = []
    inner = Cascade._pool

    def pool(self: Cascade, pyramid: Any, boxes: torch.Tensor, valid: torch.Tensor, **options: Any) -> torch.Tensor:
        seen.append(boxes[valid].clone())
        return inner(self, pyramid, boxes, valid, **options)

    monkeypatch.setattr(Cascade, "_pool", pool)
    return seen


@pytest.mark.parametrize("b", [0, 1])
def test_detection_follows_detectron(b: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lively_model().eval()
    detector = Detector.from_model(model, Config(model=dataclasses.replace(TINY, semantics="paper"), data=DATA), "abc")
    scale = detectron_scale(SIZES[b], 120, 160)
    resized = rules.resize(picture(b), scale)
    h, w = resized.shape[:2]
    frame = (round_up(h, 32), round_up(w, 32))  # at test time proposals reach into the padding
    pixels = torch.zeros(1, 3, *frame)
    pixels[0, :, :h, :w] = torch.from_numpy(resized).permute(2, 0, 1)
    with torch.no_grad():
        pyramid = model.pyramid(ImageBatch(pixels, torch.tensor([[h, w]]), torch.tensor([SIZES[b]])))
        logits, deltas = model.rpn(pyramid)
    rois, scores = rules.propose(
        per_level(logits, 0), per_level(deltas, 0), shapes_of(pyramid), frame, scale=8.0, keep=1000
    )
    rois = rois[np.argsort(-scores, kind="stable")[:1000]]
    assert rois[:, 3].max() > h - 1
    maps = [level[0] for level in pyramid]
    expected = rules.detect(model.cascade.box_heads, maps, rois, scale=scale, size=SIZES[b], threshold=0.05, most=100)
    seen = watch_rois(monkeypatch)
    found = detector.predict(picture(b).copy())

    assert len(seen) == 4  # three stages and the masks
    for ours, theirs in zip(seen, expected.rois):
        assert_same_boxes(last_pixels(ours), theirs, 3e-4)  # before clipping: up to hundreds of pixels outside
    assert len(found) == len(expected.scores) == 100
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)
    assert (found.labels.numpy() == expected.labels).mean() >= 0.98  # equal scores may change places
    assert_same_boxes(last_pixels(found.boxes), expected.boxes)
    x = rules.pool(maps, (expected.boxes * scale).astype(np.float32), 14)
    with torch.no_grad():
        probs = model.cascade.mask_heads[0](x).sigmoid().numpy()[np.arange(100), expected.labels]
    assert found.masks is not None and ((probs > 0.5).any((1, 2)) & (probs < 0.5).any((1, 2))).mean() > 0.5
    for row in np.flatnonzero(found.labels.numpy() == expected.labels)[:25]:
        mask = rules.paste(probs[row], expected.boxes[row], SIZES[b])
        assert (found.masks[row].numpy() != mask).sum() <= 2  # at the threshold itself


def training_batch(tmp_path: Path, flip: float) -> tuple[ImageBatch, Any]:
    """Both images with their objects, through data set and loader."""
    records = []
    for b, objects in enumerate(OBJECTS):
        path = tmp_path / f"{b}.png"
        Image.fromarray(picture(b)).save(path)
        records.append(
            ImageRecord(
                path,
                path.name,
                b,
                *SIZES[b],
                objects.boxes,
                objects.labels,
                np.zeros(len(objects.labels), bool),
                np.full(len(objects.labels), 100.0),
                [[polygon] for polygon in objects.polygons],
            )
        )
    split = DataSplit("coco", "train", tmp_path, records, ("a", "b", "c"), (1, 2, 3), has_masks=True)
    config = dataclasses.replace(DATA, flip=flip)
    dataset = DetectionDataset(split, config, training=True, masks=True, semantics="paper")
    made = Collate()([dataset[b] for b in range(2)])
    assert isinstance(made, tuple)
    return made


def as_detectron(b: int, *, flipped: bool) -> Objects:
    """The objects as Detectron reads them: x2 is the last pixel; flipped within the original's pixels."""
    boxes, polygons = OBJECTS[b].boxes - np.array([0, 0, 1, 1]), [list(p) for p in OBJECTS[b].polygons]
    if flipped:
        last = SIZES[b][1] - 1
        boxes = np.stack([last - boxes[:, 2], boxes[:, 1], last - boxes[:, 0], boxes[:, 3]], axis=1)
        polygons = [[last - v if i % 2 == 0 else v for i, v in enumerate(p)] for p in polygons]
    return Objects(boxes, OBJECTS[b].labels, polygons)


def expected_losses(model: CascadeRCNN, images: ImageBatch, objects: list[Objects], *, keep: int) -> dict[str, float]:
    with torch.no_grad():
        pyramid = model.pyramid(images)
        logits, deltas = model.rpn(pyramid)
    shapes, frames = shapes_of(pyramid), [(h, w) for h, w in images.sizes.tolist()]
    scales = [detectron_scale(size, 120, 160) for size in SIZES]
    flat = [[np.concatenate(per_level(part, b)) for b in range(2)] for part in (logits, deltas)]
    places = np.concatenate([rules.anchors(s, 8.0, shape) for s, shape in zip(rules.STRIDES, shapes)])
    truth = [one.boxes * scale for one, scale in zip(objects, scales)]
    losses: dict[str, float] = {}
    losses["rpn_cls"], losses["rpn_box"] = rules.rpn_losses(*flat, places, frames, truth, samples=10**6)

    proposed = [
        rules.propose(per_level(logits, b), per_level(deltas, b), shapes, frames[b], scale=8.0, keep=keep)
        for b in range(2)
    ]
    limit = np.sort(np.concatenate([scores for _, scores in proposed]))[-keep]  # of both images together
    rois = [boxes[scores >= limit] for boxes, scores in proposed]
    assert sum(map(len, rois)) == keep and min(map(len, rois)) > 0
    maps = [[level[b] for level in pyramid] for b in range(2)]
    for k, weight in enumerate((1, 0.5, 0.25)):
        cls = box = mask = 0.0
        count = positives = 0
        for b, (one, scale) in enumerate(zip(objects, scales)):
            role = rules.roles(rois[b] / scale, one, rules.IOUS[k])
            n = role.positives
            assert n > len(one.boxes)  # more than the ground truth itself
            network = (role.rois * scale).astype(np.float32)
            head_logits, moves = rules.stage(model.cascade.box_heads[k], rules.pool(maps[b], network, 7))
            labels = np.full(len(network), 3)
            labels[:n] = one.labels[role.own[:n]]
            cls -= np.log(rules.probabilities(head_logits)[np.arange(len(labels)), labels]).sum()
            wanted = rules.deltas_to(role.rois[:n], one.boxes[role.own[:n]], rules.WEIGHTS[k])
            box += rules.huber(moves[:n] - wanted, 1.0).sum()
            count, positives = count + len(labels), positives + n
            rois[b] = rules.survivors(role, rules.apply_deltas(network, moves, rules.WEIGHTS[k]))
            if k == 2:
                mask += mask_loss(model, maps[b], role, network, one)
        losses[f"s{k}.cls"], losses[f"s{k}.box"] = cls / count * weight, box / count * weight
    losses["s2.mask"] = mask / positives  # the stage's weight is not its own
    return losses


def mask_loss(model: CascadeRCNN, maps: list[torch.Tensor], role: rules.Roles, network: Array, one: Objects) -> float:
    n, own = role.positives, role.own[: role.positives]
    with torch.no_grad():
        logits = model.cascade.mask_heads[0](rules.pool(maps, network[:n], 14)).double().numpy()
    logits = logits[np.arange(n), one.labels[own]]
    wanted = np.stack([rules.mask_target(one.polygons[o], roi) for o, roi in zip(own, role.rois[:n])])
    return float((np.logaddexp(0, logits) - logits * wanted).mean(axis=(1, 2)).sum())


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_training_follows_detectron(tmp_path: Path, flip: float) -> None:
    """Every anchor and RoI takes part, so that nothing is random."""
    model = lively_model(rpn=3, box=30, rpn_samples=10**6, roi_samples=10**6, train_proposals=1000)
    images, targets = training_batch(tmp_path, flip)
    assert images.scales is not None and images.scales.tolist() == pytest.approx([1.6, 1.6])
    objects = [as_detectron(b, flipped=flip > 0) for b in range(2)]
    for b in range(2):
        np.testing.assert_allclose(last_pixels(targets.boxes[b, targets.valid[b]]), objects[b].boxes * 1.6, atol=1e-4)
    losses = {name: value.item() for name, value in model.loss(images, targets).items()}
    expected = expected_losses(model, images, objects, keep=1000)
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        # Masks are drawn at the network's size, not in each RoI's own frame: their borders differ.
        assert losses[name] == pytest.approx(value, rel=0.02 if name.endswith("mask") else 1e-5), name


def test_later_stages_take_the_ground_truth_and_all_that_is_left(tmp_path: Path) -> None:
    """No second sampling: with 8 RoIs a first stage keeps two positives, a later one all it gets; copies of objects go
    as ground truth does.
    """
    images, targets = training_batch(tmp_path, 0.0)
    model = lively_model(rpn=3, box=30, roi_samples=8, masks="none")
    frame = OriginalFrame.of(images)
    truth = dataclasses.replace(targets, boxes=frame.from_network(targets.boxes))
    boxes = targets.boxes[:, :1] + torch.linspace(0, 2, 30)[:, None]  # [2, 30, 4], the first a copy of an object
    proposals = Proposals(boxes, torch.ones(2, 30, dtype=torch.bool))
    first, later = model.cascade.stages[0], model.cascade.stages[1]
    assert isinstance(first, DetectronStage) and isinstance(later, DetectronStage)
    assert first.sample_in_original(proposals, truth, frame).valid.sum(dim=1).tolist() == [2, 2]
    samples = later.sample_in_original(proposals, truth, frame)
    assert samples.valid.sum(dim=1).tolist() == [34, 31] and samples.positive.sum(dim=1).tolist() == [34, 31]
    still = torch.zeros(*samples.valid.shape, 4)
    kept = later.refine(torch.zeros(*samples.valid.shape, 4), still, samples, images.sizes).valid
    assert not kept[:, : truth.valid.shape[1] + 1].any() and kept[:, truth.valid.shape[1] + 1 :].all()


def test_stage_weights_do_not_lessen_the_gradients_of_the_heads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The authors divide the gradients of a stage's head by its weight: it weakens what reaches the features only."""
    images, targets = training_batch(tmp_path, 0.0)
    gradients = []
    for plain_losses in (True, False):
        model = lively_model(rpn_samples=10**6, roi_samples=10**6, masks="none")
        with monkeypatch.context() as patch:
            if plain_losses:
                patch.setattr(DetectronStage, "loss", Stage.loss)
                for stage in model.cascade.stages:
                    stage.details = dataclasses.replace(stage.details, feature_gradient=1.0)
            losses = model.loss(images, targets)
        torch.stack(list(losses.values())).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, plain in gradients[0].items():
        weight = {"1": 0.5, "2": 0.25}.get(name.split(".")[2], 1.0) if name.startswith("cascade.box_heads") else 1.0
        torch.testing.assert_close(gradients[1][name], plain / weight, rtol=1e-3, atol=1e-5, msg=name)


def test_masks_are_pasted_as_detectron_does() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        probs = generator.random((28, 28)).astype(np.float32)
        corner = generator.uniform(-20, 60, 2)
        box = np.concatenate([corner, corner + generator.uniform(0.2, 60, 2)])
        crop = paste_in_whole_pixels(probs, box + np.array([0, 0, 1, 1]), (50, 70))
        whole = np.zeros((50, 70), dtype=bool)
        whole[crop.top : crop.top + crop.pixels.shape[0], crop.left : crop.left + crop.pixels.shape[1]] = crop.pixels
        assert (whole != rules.paste(probs, box, (50, 70))).sum() <= 2


def test_objects_of_one_pixel_are_left_out(tmp_path: Path) -> None:
    Image.fromarray(picture(0)).save(tmp_path / "0.png")
    boxes = np.array([[5, 5, 6, 30], [5, 5, 6.5, 30], [93.5, 5, 94, 30]])
    record = ImageRecord(
        tmp_path / "0.png", "0.png", 0, *SIZES[0], boxes, np.zeros(3, np.int64), np.zeros(3, bool), np.ones(3)
    )
    split = DataSplit("coco", "train", tmp_path, [record], ("a",), (1,))
    item = DetectionDataset(split, dataclasses.replace(DATA, flip=0.0), training=True, semantics="paper")[0]
    np.testing.assert_allclose(item.boxes, [[8, 8, 1 + 5.5 * 1.6, 1 + 29 * 1.6]], atol=1e-4)
