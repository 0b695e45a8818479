"""Every entry of the list that loads is a network that builds, of the size that ``models`` tells."""

from __future__ import annotations

import re

import pytest
import torch

from cascade_rcnn.convert.infer_config import structure_of
from cascade_rcnn.convert.key_tables import recognise, rename
from cascade_rcnn.convert.values import adapt_values
from cascade_rcnn.models.build import build_model
from cascade_rcnn.models.cascade_rcnn import NoInitialValues
from cascade_rcnn.zoo.catalog import published
from foreign_checkpoints import mmdetection_name, one_stage
from listed_networks import Listed, listed_network

_LOADABLE = [entry for entry in published() if not entry.missing]
_ENTRIES = {
    network: [one for one in _LOADABLE if listed_network(one) == network] for network in map(listed_network, _LOADABLE)
}
_SHOWN = ("fpn_channels", "head_channels", "class_agnostic_boxes", "rpn_convs", "box_head", "stage_ious", "masks")
_SHOWN_TOO = ("deformable", "deformable_stages", "deformable_groups", "norm", "mask_channels")


def _each_network() -> list[object]:
    """One of each backbone and kind of head by default: a network takes half a second."""
    seen: set[tuple[str, str]] = set()
    cases = []
    for network, entries in _ENTRIES.items():
        kind = (network.model.backbone, network.model.box_head)
        cases.append(pytest.param(network, marks=pytest.mark.slow if kind in seen else (), id=entries[0].name))
        seen.add(kind)
    return cases


@pytest.mark.parametrize("network", _each_network())
def test_it_builds_and_has_the_listed_size(network: Listed) -> None:
    with torch.device("meta"), NoInitialValues():
        built = build_model(network.model, network.classes)
    size = sum(weight.numel() for weight in built.parameters())
    assert {entry.name: entry.parameters for entry in _ENTRIES[network]} == {
        one.name: size for one in _ENTRIES[network]
    }

    plain = network.model.backbone.startswith("resne") and network.model.box_head in ("2fc", "4conv1fc_gn")
    if not (plain and any(entry.library == "mmdetection" for entry in _ENTRIES[network])):
        return  # other layouts: tests/zoo/test_families.py has one of each
    norm = "gn" if network.model.norm == "group" else "bn"
    file = {mmdetection_name(key, norm): value for key, value in built.state_dict().items()}
    file = file if len(network.model.stage_ious) > 1 else one_stage(file)
    renamed, left_over = rename(file, recognise(file))
    seen = structure_of(adapt_values(renamed, "mmdetection"), "mmdetection")
    assert not left_over and (seen.backbone, seen.classes) == (network.model.backbone, network.classes)
    wanted = {name: getattr(network.model, name) for name in (*_SHOWN, *_SHOWN_TOO) if name in seen.model}
    assert {name: seen.model[name] for name in wanted} == wanted
    assert set(_SHOWN) <= set(wanted) and (network.model.deformable == "none" or "deformable" in wanted)


def test_all_of_the_list_are_among_them() -> None:
    assert len(_LOADABLE) == sum(map(len, _ENTRIES.values())) == 226 and len(_ENTRIES) == 94
    assert not [entry.name for entry in published() if bool(entry.parameters) == bool(entry.missing)]
    sizes = {re.sub(r"_fpn.*", "", entry.name): entry.parameters for entry in _LOADABLE}
    assert sizes["mask_rcnn_r50"] < sizes["mask_rcnn_r101"] < sizes["cascade_mask_rcnn_r101"]
