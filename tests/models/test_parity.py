"""Same weights, same numbers as mmdetection and detectron2, forward and backward (tests/fixtures/parity).

Every test goes the way a user's checkpoint goes: a file in the other library's format, ``run_convert``, ``load``,
``predict``; and for training a COCO-format file through our reader, transforms and loader.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import box_iou

import locations
from cascade_rcnn.checkpoint import load_checkpoint
from cascade_rcnn.convert.checkpoint import run_convert
from cascade_rcnn.convert.key_tables import Format, rename
from cascade_rcnn.convert.values import adapt_values, standardize_weights
from cascade_rcnn.data.dataset import DetectionDataset
from cascade_rcnn.data.formats.open import open_split
from cascade_rcnn.data.loader import train_loader
from cascade_rcnn.data.transforms import Interpolation, resize_for_test, resize_pixels
from cascade_rcnn.inference.detector import load
from cascade_rcnn.models.build import build_model
from cascade_rcnn.models.cascade_rcnn import CascadeRCNN
from cascade_rcnn.rounding import round_up
from cascade_rcnn.structures import ImageBatch

DATA = locations.FIXTURES / "parity"
sys.path.insert(0, str(DATA))
from seeded_weights import seeded_state_dict  # noqa: E402

NAMES = ("mmdet_cascade_rcnn_r50_fpn", "mmdet_cascade_mask_rcnn_r50_fpn", "detectron2_cascade_mask_rcnn_R_50_FPN")


# Backbones and heads of other kinds: features, stages and detections by default, the training step with -m slow.
FAMILIES = (
    "mmdet_cascade_rcnn_r50_fpn_dconv_c3_c5",
    "mmdet_cascade_mask_rcnn_regnetx_3.2GF_fpn",
    "convnext_cascade_mask_rcnn_tiny",
    "swin_cascade_mask_rcnn_tiny",
)
# One stage, with norms that conversion puts into the weights (tests/convert/test_parity_of_norms.py).
FOLDED = {
    "mmdet_faster_rcnn_r50_fpn_gn_ws_all": "faster_rcnn_r50_fpn_gn_ws-all_1x_coco.pth",
    "detectron2_new_baselines_mask_rcnn_R_50_FPN_LSJ": "model_final_bb69de.pkl.pth",
}


@dataclasses.dataclass
class Case:
    """One library's model: its converted checkpoint and its reference numbers."""

    name: str
    checkpoint: Path
    reference: Any
    train: dict[str, Any]
    foreign_key: dict[str, str]  # our parameter's name -> the library's


def prepare(name: str, folder: Path) -> Case:
    """Write the library's checkpoint, convert it, and read the reference."""
    manifest = json.loads((DATA / f"{name}.manifest.json").read_text())
    state = {key: torch.from_numpy(value) for key, value in seeded_state_dict(manifest).items()}
    file = folder / FOLDED.get(name, "seeded.pth")
    torch.save({**manifest.get("wrapper", {}), manifest["state_key"]: state}, file)
    run_convert(file, folder / "converted.safetensors")
    file.unlink()
    source = "detectron2" if name.startswith("detectron2") else "mmdetection"
    ours = {id(value): name for name, value in rename(state, source)[0].items()}
    foreign = {ours[id(value)]: key for key, value in state.items() if id(value) in ours}
    train = json.loads((DATA / f"{name}.train.json").read_text())
    return Case(name, folder / "converted.safetensors", np.load(DATA / f"{name}.npz"), train, foreign)


@pytest.fixture(scope="module", params=[*NAMES, *FAMILIES])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    prepared = prepare(request.param, tmp_path_factory.mktemp("parity"))
    yield prepared
    prepared.checkpoint.unlink()


def relative(ours: torch.Tensor, reference: np.ndarray) -> float:
    """Largest difference in units of the reference's largest value."""
    wanted = torch.from_numpy(reference)
    return float((ours - wanted).abs().max() / wanted.abs().max())


def loaded_model(case: Case, **changes: Any) -> CascadeRCNN:
    checkpoint = load_checkpoint(case.checkpoint)
    config = dataclasses.replace(checkpoint.config.model, **changes)
    model = build_model(config, len(checkpoint.class_names))
    model.load_state_dict(checkpoint.state)
    return model


def network_input(case: Case) -> ImageBatch:
    config = load_checkpoint(case.checkpoint).config
    pixels = torch.from_numpy(np.array(Image.open(DATA / "synthetic.png").convert("RGB"))).permute(2, 0, 1)
    image, _ = resize_for_test(pixels, config.data, semantics=config.model.semantics)
    height, width = image.shape[-2:]
    assert [height, width] == case.reference["resized_shape"].tolist()
    padded = torch.zeros(1, 3, round_up(height, 32), round_up(width, 32), dtype=torch.uint8)
    padded[0, :, :height, :width] = image
    return ImageBatch(padded, torch.tensor([[height, width]]), torch.tensor([pixels.shape[-2:]]))


@torch.no_grad()
def test_features_and_stage_outputs_equal_the_reference(case: Case) -> None:
    model = loaded_model(case).eval()
    images = network_input(case)
    if "input_sample" in case.reference and "regnetx" not in case.name:  # whose BGR is in our first convolution
        assert relative(model.normalize(images)[0, :, ::97, ::89], case.reference["input_sample"]) < 1e-6
    pyramid = model.pyramid(images)
    for level, feature in enumerate(pyramid, start=2):
        assert relative(feature[0, ::16, ::7, ::7], case.reference[f"p{level}_sample"]) < 1e-4, f"p{level}"
    proposals = model.rpn.propose(pyramid, images.sizes)
    overlap = box_iou(torch.from_numpy(case.reference["proposals"]), proposals.boxes[0])
    assert (overlap.amax(dim=1) > 0.99).sum() >= 990
    if "stage0_rois" not in case.reference:
        return
    for k in range(3):
        rois = torch.from_numpy(case.reference[f"stage{k}_rois"])[None]
        logits, deltas = model.cascade._run_stage(k, pyramid, rois, torch.ones(1, rois.shape[1], dtype=torch.bool))
        assert relative(logits[0], case.reference[f"stage{k}_cls"]) < 1e-4, f"stage {k}"
        assert relative(deltas[0], case.reference[f"stage{k}_reg"]) < 1e-4, f"stage {k}"


def test_detections_and_masks_equal_the_reference(case: Case) -> None:
    found = load(case.checkpoint, device="cpu").predict(DATA / "synthetic.png")
    boxes, scores, labels = (torch.from_numpy(case.reference[key]) for key in ("boxes", "scores", "labels"))
    same = labels[:, None] == found.labels
    iou, index = (box_iou(boxes, found.boxes) * same).max(dim=1)
    matched = (iou > 0.99) & ((scores - found.scores[index]).abs() < 1e-3)
    assert matched.sum() >= 99
    if "masks_packed" not in case.reference:
        assert found.masks is None
        return
    count, height, width = case.reference["mask_shape"].tolist()
    wanted = np.unpackbits(case.reference["masks_packed"], axis=1)[:, : height * width].reshape(count, height, width)
    assert found.masks is not None
    ours = found.masks[index].numpy()
    for i in matched.nonzero().flatten().tolist():
        x1, y1, x2, y2 = boxes[i].tolist()  # within the box: over the whole image any mask would agree
        window = np.s_[int(y1) : int(np.ceil(y2)), int(x1) : int(np.ceil(x2))]
        equal = (ours[i][window] == wanted[i][window].astype(bool)).mean()
        assert equal >= 0.99, f"detection {i}"
    pixels = sum(int((ours[i] | wanted[i].astype(bool)).sum()) for i in matched.nonzero().flatten().tolist())
    differ = sum(int((ours[i] != wanted[i].astype(bool)).sum()) for i in matched.nonzero().flatten().tolist())
    assert differ / pixels < 0.005


def write_coco(folder: Path) -> Path:
    """The reference's image and objects as a COCO data set."""
    truth = json.loads((DATA / "synthetic.gt.json").read_text())
    (folder / "annotations").mkdir(parents=True)
    (folder / "train").mkdir()
    (folder / "train" / "synthetic.png").write_bytes((DATA / "synthetic.png").read_bytes())
    annotations = [
        {
            "id": i + 1,
            "image_id": 1,
            "category_id": label + 1,
            "bbox": box,
            "area": box[2] * box[3],
            "iscrowd": 0,
            "segmentation": mask,
        }
        for i, (box, label, mask) in enumerate(zip(truth["bbox"], truth["label"], truth["masks"]))
    ]
    content = {
        "images": [{"id": 1, "file_name": "synthetic.png", "width": truth["width"], "height": truth["height"]}],
        "categories": [{"id": i + 1, "name": f"class {i}"} for i in range(80)],
        "annotations": annotations,
    }
    (folder / "annotations" / "instances_train.json").write_text(json.dumps(content))
    return folder


def reference_losses(case: Case) -> dict[str, float]:
    given = case.train["losses"]
    if not case.name.startswith("detectron2"):
        names = {"rpn_cls": "loss_rpn_cls", "rpn_box": "loss_rpn_bbox"}
        for k in range(3):
            names |= {f"s{k}.cls": f"s{k}.loss_cls", f"s{k}.box": f"s{k}.loss_bbox", f"s{k}.mask": f"s{k}.loss_mask"}
        names |= {"s0.cls": "loss_cls", "s0.box": "loss_bbox"} if "loss_cls" in given else {}  # one stage
        return {ours: given[theirs] for ours, theirs in names.items() if theirs in given}
    # The RPN's losses are given as sums over all anchors; training divides them by 256 per image.
    losses = {"rpn_cls": given["loss_rpn_cls"] / 256, "rpn_box": given["loss_rpn_loc"] / 256}
    if "loss_cls" in given:
        return losses | {"s0.cls": given["loss_cls"], "s0.box": given["loss_box_reg"], "s0.mask": given["loss_mask"]}
    for k in range(3):
        losses |= {f"s{k}.cls": given[f"loss_cls_stage{k}"], f"s{k}.box": given[f"loss_box_reg_stage{k}"]}
    return losses | {"s0.mask": given["loss_mask"]}


def training_step(case: Case, folder: Path) -> tuple[dict[str, torch.Tensor], CascadeRCNN]:
    """The losses of one step, and the model with its gradients."""
    everything = 10**6  # the reference samples every anchor and every RoI, so that nothing is random
    thawed: dict[str, Any] = {"frozen_stages": -1} if case.train.get("no_grad") == [] else {}
    if case.name.startswith("detectron2_new_baselines"):
        thawed["norm"] = "frozen_statistics"  # its batch norms learn scale and shift
    model = loaded_model(case, rpn_samples=everything, roi_samples=everything, **thawed).train()
    if not case.train.get("running_mean_norm"):
        for head in model.cascade.box_heads:
            head.eval()  # the reference's batch norms are
    config = load_checkpoint(case.checkpoint).config
    data = dataclasses.replace(config.data, short_side=(case.train["short_side"],), flip=0.0, workers=0)
    dataset = DetectionDataset(
        open_split(write_coco(folder / "coco"), "train"),
        data,
        training=True,
        masks="mask" in case.name,
        semantics=config.model.semantics,
    )
    images, targets = next(iter(train_loader(dataset, batch_size=1, seed=0, workers=0)))
    exact = ImageBatch(network_pixels(case, images), images.sizes, images.original_sizes)
    losses = model.loss(exact, targets)
    if case.name.startswith("detectron2"):  # its normaliser is the number asked for, 256 in the reference
        losses = {key: value * (everything / 256) if key.startswith("rpn") else value for key, value in losses.items()}
    torch.stack(list(losses.values())).sum().backward()
    return losses, model


@pytest.mark.parametrize("case", NAMES, indirect=True)
def test_losses_and_gradients_equal_the_reference(case: Case, tmp_path: Path) -> None:
    check_training_step(case, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", FAMILIES, indirect=True)
def test_losses_and_gradients_of_other_families_equal_the_reference(case: Case, tmp_path: Path) -> None:
    check_training_step(case, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["convnext_cascade_mask_rcnn_tiny"], indirect=True)
def test_batch_norm_of_the_box_heads_trains_as_in_the_reference(case: Case, tmp_path: Path) -> None:
    train = json.loads((DATA / f"{case.name}.train_bn.json").read_text())
    trained = dataclasses.replace(case, train=train)
    model = check_training_step(trained, tmp_path)
    for ours, value in model.named_buffers():
        if ours in case.foreign_key and case.foreign_key[ours] in train["running_mean_norm"]:
            mean, norm = train["running_mean_norm"][case.foreign_key[ours]]
            assert value.mean().item() == pytest.approx(mean, rel=1e-3, abs=1e-5), ours
            assert value.norm().item() == pytest.approx(norm, rel=1e-3), ours


@pytest.mark.slow
@pytest.mark.parametrize("case", FOLDED, indirect=True)
def test_losses_and_gradients_of_folded_weights_equal_the_reference(case: Case, tmp_path: Path) -> None:
    losses, model = training_step(case, tmp_path)
    wanted = reference_losses(case)
    tied = {key: value / 256 for key, value in case.train.get("losses_with_tied_anchors", {}).items()}
    upper = wanted | ({"rpn_cls": tied["loss_rpn_cls"], "rpn_box": tied["loss_rpn_loc"]} if tied else {})
    assert losses.keys() == wanted.keys()
    for key, value in losses.items():
        assert 0.999 * wanted[key] <= value.item() <= 1.001 * upper[key], key
    found, norms = gradients_of_the_original(case, model), case.train["grad_norms"]
    assert found.keys() == norms.keys()
    for key, gradient in found.items():
        assert gradient.norm().item() == pytest.approx(norms[key], rel=0.02 if tied else 0.01), key


def gradients_of_the_original(case: Case, model: CascadeRCNN) -> dict[str, torch.Tensor]:
    """Those of the library's own weights: the conversion is a function of them, so the chain rule gives them."""
    manifest = json.loads((DATA / f"{case.name}.manifest.json").read_text())
    given = {key: torch.from_numpy(value) for key, value in seeded_state_dict(manifest).items()}
    theirs = {key: value.requires_grad_() for key, value in given.items() if value.is_floating_point()}
    source: Format = "detectron2" if case.name.startswith("detectron2") else "mmdetection"
    state = adapt_values(rename(given, source)[0], source)
    if "gn_ws" in case.name:
        standardize_weights(state, [""])
    learnt = {key: value for key, value in model.named_parameters() if value.grad is not None}
    for key, value in learnt.items():
        assert torch.equal(state[key], value), f"{key}: not what the conversion has made of it"
    torch.autograd.backward([state[key] for key in learnt], [value.grad for value in learnt.values()])
    return {key: value.grad for key, value in theirs.items() if value.grad is not None and "running" not in key}


def check_training_step(case: Case, folder: Path) -> CascadeRCNN:
    losses, model = training_step(case, folder)
    wanted = reference_losses(case)
    assert losses.keys() == wanted.keys()
    for key, value in wanted.items():
        assert losses[key].item() == pytest.approx(value, rel=1e-3), key
    norms = case.train["grad_norms"]
    compared = 0
    for ours, parameter in model.named_parameters():
        theirs = case.foreign_key[ours]
        if theirs in norms:
            assert parameter.grad is not None, f"{ours} has no gradient"
            assert parameter.grad.norm().item() == pytest.approx(norms[theirs], rel=0.01), ours
            compared += 1
        else:
            assert parameter.grad is None, f"{ours} has a gradient, {theirs} has none"
    assert compared == len(norms)
    return model


def network_pixels(case: Case, images: ImageBatch) -> torch.Tensor:
    """The training image resized as at test time: in training, speed matters more than one grey level."""
    pixels = torch.from_numpy(np.array(Image.open(DATA / "synthetic.png").convert("RGB"))).permute(2, 0, 1)
    height, width = case.train["resized"]
    assert images.sizes[0].tolist() == [height, width]
    padded = torch.zeros_like(images.pixels)
    how: Interpolation = "pillow" if case.name.startswith("detectron2") else "opencv"
    padded[0, :, :height, :width] = resize_pixels(pixels, (height, width), how)
    return padded
