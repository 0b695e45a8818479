"""One entry of each family that loads: NAME, download, conversion, network; the same as ``convert`` and ``load``."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch

import cascade_rcnn
from cascade_rcnn.checkpoint import load_checkpoint
from cascade_rcnn.convert.checkpoint import run_convert
from cascade_rcnn.convert.infer_config import TIMM
from cascade_rcnn.zoo import catalog, store
from loopback import Server, use_list
from published_files import FAMILIES, Family, file_of

_ENTRIES = {entry["name"]: entry for entry in json.loads(catalog._LIST.read_text(encoding="utf-8"))}


_SLOW = {  # large, or another layout of a family that the default run has
    "cascade_rcnn_x101_32x4d_fpn_1x_coco",
    "faster_rcnn_r50_fpn_gn_ws_all_1x_coco",
    "mask_rcnn_convnext_t_p4_w7_fpn_amp_ms_crop_3x_coco",
    "mask_rcnn_swin_t_p4_w7_fpn_1x_coco",
    "detectron2_mask_rcnn_regnetx_4gf_dds_fpn_100ep_lsj",
    "detectron2_mask_rcnn_r_50_fpn_1x_dconv_c3-c5",
}
_ALL = [pytest.param(one, marks=pytest.mark.slow if one.name in _SLOW else [], id=one.name) for one in FAMILIES]


@pytest.mark.parametrize("family", _ALL)
def test_a_name_gives_what_convert_and_load_give(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = dict(_ENTRIES[family.name])
    assert not entry.get("missing")
    path, _, file = entry["url"].rpartition("/")
    server = Server(content := file_of(family, Path(file).suffix))
    if entry.get("hash"):
        wanted = hashlib.new(entry["hash_of"], content).hexdigest()[: len(entry["hash"])]
        file, entry["hash"] = file.replace(entry["hash"], wanted), wanted
    entry["url"] = f"{server.address}/{path.split('://')[1]}/{file}"
    monkeypatch.setenv("CASCADE_RCNN_CACHE", str(tmp_path / "cache"))
    try:
        with use_list(tmp_path / "list.json", entry):
            by_name = cascade_rcnn.load(family.name, device="cpu")
            kept = store.resolve(family.name)
    finally:
        server.close()
    (tmp_path / file).write_bytes(content)
    run_convert(tmp_path / file, tmp_path / "by_hand.safetensors")

    ours, hand = load_checkpoint(kept), load_checkpoint(tmp_path / "by_hand.safetensors")
    assert ours.config == hand.config == by_name.config
    assert ours.class_names == hand.class_names == by_name.class_names and len(ours.class_names) == 3
    assert list(ours.state) == list(hand.state)
    assert all(torch.equal(ours.state[key], value) for key, value in hand.state.items())

    model = ours.config.model
    found = (model.backbone, model.style, model.norm, len(model.stage_ious), model.masks)
    assert found == (family.backbone, family.style, family.norm, family.stages, family.masks)
    assert family.said in kept.with_suffix(".txt").read_text(encoding="utf-8")


def test_every_entry_that_loads_has_a_backbone_that_is_known() -> None:
    groups = {"32x4d": (32, 4), "32x8d": (32, 8), "64x4d": (64, 4)}
    for entry in catalog.published():
        if entry.missing:
            continue
        text = re.sub(r"[-_]", "", f"{entry.backbone} {entry.name}".lower())
        if re.search("regnet|convnext|swin", text):  # told by their shapes: tests/convert
            continue
        match = re.search(r"(resnet|r|x)(18|34|50|101|152)(\d+x\dd)?", text)
        assert match is not None, entry.name
        width = (1, 64) if match[1] != "x" else groups[match[3]]
        assert (int(match[2]), *width) in TIMM, entry.name
