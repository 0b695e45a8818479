"""Every published ConvNeXt and Swin detector becomes a network of ours, key by key; values are not needed for that.

So do their classifiers' backbones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import timm
import torch

from cascade_rcnn.config import ModelConfig
from cascade_rcnn.convert.checkpoint import run_convert
from cascade_rcnn.convert.infer_config import backbone_of, structure_of
from cascade_rcnn.convert.key_tables import recognise, rename
from cascade_rcnn.convert.values import adapt_values
from cascade_rcnn.models.build import build_model, load_backbone_weights
from cascade_rcnn.zoo.catalog import Published, published
from official_backbones import Shapes, convnext, detector, manifest, swin

NAMES = {
    ("convnext", "t"): "convnext_tiny.fb_in1k",
    ("convnext", "s"): "convnext_small.fb_in1k",
    ("convnext", "b"): "convnext_base.fb_in1k",
    ("convnext", "l"): "convnext_large.fb_in22k",
    ("convnext", "xl"): "convnext_xlarge.fb_in22k",
    ("swin", "t"): "swin_tiny_patch4_window7_224.ms_in1k",
    ("swin", "s"): "swin_small_patch4_window7_224.ms_in1k",
    ("swin", "b"): "swin_base_patch4_window7_224.ms_in1k",
}
# Family, stages, whether the names are mmdetection's own: each with its smallest network.
KINDS = [("convnext", 1, False), ("convnext", 1, True), ("convnext", 3, True), ("swin", 1, False), ("swin", 1, True)]
NETWORKS = [(*key, 3, False) for key in NAMES] + [(family, "t", stages, own) for family, stages, own in KINDS]


def listed() -> dict[Published, tuple[str, str, int, bool]]:
    """The entries of the list that have such a backbone and load: family, size, stages, mmdetection's own names."""
    found = {}
    for entry in published():
        match = re.match(r"(convnext|swin)-(xl|t|s|b|l)\b", entry.backbone)
        if match and not entry.missing:
            found[entry] = (match[1], match[2], 3 if "cascade" in entry.name else 1, entry.library == "mmdetection")
    return found


def test_all_that_are_listed_are_tested_below() -> None:
    entries = listed()
    assert len(entries) == 25
    for family, size, stages, own in entries.values():
        assert (family, size) in NAMES
        assert (family, "t", stages, own) in NETWORKS


@pytest.mark.parametrize(("family", "made"), [("convnext", convnext("t")), ("swin", swin("t"))])
def test_the_names_are_those_of_the_references(family: str, made: Shapes) -> None:
    whole = manifest(f"{family}_cascade_mask_rcnn_tiny")
    assert made == {key.removeprefix("backbone."): s for key, s in whole.items() if key.startswith("backbone.")}
    assert detector(family, "t") == whole


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: "-".join(map(str, network)))
def test_a_published_detector_becomes_a_network(network: tuple[str, str, int, bool]) -> None:
    family, size, stages, own_names = network
    with torch.device("meta"):
        theirs = {key: torch.empty(s) for key, s in detector(family, size, stages=stages, own_names=own_names).items()}
    kind = recognise(theirs)
    renamed, left_over = rename(theirs, kind)
    state = adapt_values(renamed, kind)
    seen = structure_of(state, kind)
    assert left_over == [] and seen.backbone == NAMES[family, size]
    assert (seen.model["output_norms"], seen.stages, seen.classes) == (True, stages, 80)
    assert seen.model["box_head"] == ("2fc" if stages == 1 else "4conv1fc_bn")
    with torch.device("meta"):
        ours = build_model(ModelConfig(**seen.model), seen.classes).state_dict()
    counted = {key: value.shape for key, value in ours.items() if not key.endswith("num_batches_tracked")}
    assert counted == {key: v.shape for key, v in state.items() if not key.endswith("num_batches_tracked")}


# Backbones alone, as their authors' and mmpretrain's classifiers have them
ALONE = [(family, own) for family in ("convnext", "swin") for own in (False, True)]


def classifier(family: str, own_names: bool) -> dict[str, torch.Tensor]:
    shapes = {key: s for key, s in detector(family, "t", own_names=own_names).items() if key.startswith("backbone.")}
    shapes = {key: s for key, s in shapes.items() if not re.match(r"backbone\.norm[0-2]\.", key)}
    shapes |= {"head.fc.weight": (1000, 768), "head.fc.bias": (1000,)}
    if not own_names:
        shapes |= {"backbone.layers.0.blocks.1.attn_mask": (64, 49, 49)} if family == "swin" else {}
        shapes = {re.sub(r"^norm3", "norm", key.removeprefix("backbone.")): s for key, s in shapes.items()}
    return {key: torch.empty(s, device="meta") for key, s in shapes.items()}


@pytest.mark.parametrize(("family", "own_names"), ALONE)
def test_a_classifiers_backbone_is_read(family: str, own_names: bool) -> None:
    theirs = classifier(family, own_names)
    kind = recognise(theirs)
    renamed, left_over = rename(theirs, kind)
    state = {key.removeprefix("backbone.body."): value for key, value in adapt_values(renamed, kind).items()}
    assert (kind, left_over) == ("backbone", [])
    name = backbone_of(state)[0]
    assert name == NAMES[family, "t"]
    with torch.device("meta"):
        wanted = timm.create_model(name, pretrained=False, features_only=True).state_dict()
    assert {key: value.shape for key, value in state.items()} == {key: value.shape for key, value in wanted.items()}


def test_a_convnext_alone_becomes_backbone_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = {key: torch.zeros(value.shape) for key, value in classifier("convnext", False).items()}
    state["stages.2.4.gamma"] += 3
    torch.save({"model": state}, tmp_path / "convnext_tiny_1k_224.pth")
    run_convert(tmp_path / "convnext_tiny_1k_224.pth", tmp_path / "tiny.safetensors")
    assert "--model.backbone convnext_tiny.fb_in1k" in (said := capsys.readouterr().out)
    assert "caffe" not in said
    with torch.device("cpu"):
        model = build_model(ModelConfig(backbone="convnext_tiny", output_norms=True, frozen_stages=-1), 2)
    load_backbone_weights(model.backbone, tmp_path / "tiny.safetensors")
    assert model.backbone.body.state_dict()["stages_2.blocks.4.gamma"].unique().tolist() == [3]
