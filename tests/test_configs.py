"""Every recipe loads, says what was published, builds, and has as many parameters as its model."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import locations
from cascade_rcnn.config import _BOUNDS, Config, DataConfig, ModelConfig, TrainConfig, within_bounds
from cascade_rcnn.errors import ConfigError
from cascade_rcnn.models.build import build_model
from cascade_rcnn.recipes import config_names, load_config

ROOT = locations.REPOSITORY
FILES = sorted((ROOT / "configs").rglob("*.py"))
ZOO: dict[str, dict[str, Any]] = {
    entry["config"].removesuffix(".py").replace("-", "_"): entry
    for entry in json.loads((ROOT / "tests/fixtures/parity/mmdet_zoo.json").read_text(encoding="utf-8"))
}


def docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


def test_every_recipe_has_a_name_of_its_own() -> None:
    names = [path.stem for path in FILES]
    assert len(names) == len(set(names)) and set(config_names()) == set(names)


def test_all_thirty_cascade_recipes_are_there() -> None:
    assert len(ZOO) == 30
    assert set(ZOO) <= {path.stem for path in FILES if path.parent.name == "cascade_rcnn"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_recipe_is_short_and_says_what_to_expect(path: Path) -> None:
    config = load_config(path)
    text = path.read_text(encoding="utf-8")
    code = text[text.index('"""\n\n') :]
    about = docstring(path)
    assert len(code.splitlines()) <= 36, "a recipe is read at a glance"
    assert f"python3 tools/train.py configs/{path.parent.name}/{path.name}" in about
    assert "Published for this" in about
    assert config.published, "the published result, or none"
    if config.published.startswith("none"):
        assert "none" in about
    else:
        assert config.published.split(" box AP")[0] in about
    assert load_config(path.stem) == config


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_recipe_builds(path: Path) -> None:
    config = load_config(path)
    with torch.device("meta"):
        model = build_model(config.model, 80)
    trainable = sum(parameter.requires_grad for parameter in model.parameters())
    assert trainable > 0
    if path.stem in ZOO:
        assert sum(parameter.numel() for parameter in model.parameters()) == ZOO[path.stem]["parameters"]


@pytest.mark.parametrize("name", ZOO)
def test_a_recipe_has_the_published_settings(name: str) -> None:
    entry, config = ZOO[name], load_config(name)
    train, data, model = config.train, config.data, config.model
    assert (train.epochs, [list(train.milestones)]) == (entry["epochs"], entry["milestones"])
    assert (train.lr, train.weight_decay, train.batch_size) == (
        entry["lr"],
        entry["weight_decay"],
        entry["batch_per_gpu"],
    )
    assert train.images_per_step == 8 * entry["batch_per_gpu"]
    assert data.repeat == (entry["repeat"] or 1)
    assert model.style == entry["backbone"]["style"]
    assert model.frozen_stages == entry["backbone"]["frozen_stages"]
    assert (model.norm == "frozen_statistics") == entry["backbone"]["norm_requires_grad"]
    assert model.masks == ("every" if entry["masks"] else "none")
    if entry["published"]:
        assert f"{entry['published']['results']['box AP']} box AP" in config.published
    steps = {step["type"]: step for step in entry["pipeline"]}
    if "Resize" in steps:
        assert [data.long_side, *data.short_side] == steps["Resize"]["scale"]
    elif "RandomCrop" in steps:
        assert [data.long_side, data.long_side] == steps["RandomCrop"]["crop_size"]
        assert list(data.large_scale_jitter or ()) == steps["RandomResize"]["ratio_range"]
    else:
        assert data.short_side_mode == "range"
        assert [[data.long_side, short] for short in data.short_side] == steps["RandomResize"]["scale"]


def test_large_scale_jitter_from_nothing_has_the_settings_of_detectron2s_new_baselines() -> None:
    config = load_config("cascade_mask_rcnn_r50_fpn_lsj_100e_coco")
    model, data, train = config.model, config.data, config.train
    assert (model.norm, model.fpn_and_mask_norms, model.pretrained, model.frozen_stages) == ("sync", True, False, -1)
    assert (model.rpn_convs, model.box_head, model.class_agnostic_boxes) == (2, "4conv1fc_bn", False)
    assert (train.lr, train.weight_decay, train.images_per_step) == (0.1, 4e-5, 64)
    assert (train.warmup_steps, train.warmup_factor, train.epochs) == (500, 0.067, 100)
    assert (data.large_scale_jitter, data.short_side, data.long_side) == ((0.1, 2.0), (1024,), 1024)


# What the authors of ConvNeXt and Swin say of each size: weights, drop path, rate, its decay, box and mask AP.
FAMILIES = {
    "convnext_t": ("convnext_tiny.fb_in1k", 0.4, 2e-4, 0.7, 50.4, 43.7),
    "convnext_s": ("convnext_small.fb_in1k", 0.6, 2e-4, 0.7, 51.9, 45.0),
    "convnext_b": ("convnext_base.fb_in1k", 0.7, 2e-4, 0.8, 52.7, 45.6),
    "convnext_b_in22k": ("convnext_base.fb_in22k", 0.6, 1e-4, 0.8, 54.0, 46.9),
    "convnext_l_in22k": ("convnext_large.fb_in22k", 0.7, 1e-4, 0.7, 54.8, 47.6),
    "convnext_xl_in22k": ("convnext_xlarge.fb_in22k", 0.8, 1e-4, 0.7, 55.2, 47.7),
    "swin_t": ("swin_tiny_patch4_window7_224.ms_in1k", 0.2, 1e-4, 1.0, 50.4, 43.7),
    "swin_s": ("swin_small_patch4_window7_224.ms_in1k", 0.2, 1e-4, 1.0, 51.9, 45.0),
    "swin_b": ("swin_base_patch4_window7_224.ms_in1k", 0.3, 1e-4, 1.0, 51.9, 45.0),
}


@pytest.mark.parametrize("size", FAMILIES)
def test_convnexts_and_swins_have_their_authors_settings(size: str) -> None:
    config = load_config(f"cascade_mask_rcnn_{size}_fpn_3x_coco")
    weights, drop_path, rate, decay, box, mask = FAMILIES[size]
    assert config.model == ModelConfig(
        backbone=weights,
        norm="sync",
        output_norms=True,
        drop_path=drop_path,
        frozen_stages=-1,
        class_agnostic_boxes=False,
        box_head="4conv1fc_bn",
        box_loss="giou",
        box_loss_weight=10.0,
        masks="every",
    )
    assert config.data == DataConfig(
        root="data/coco",
        short_side=(480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800),
        crop=0.5,
        crop_short_side=(400, 500, 600),
        crop_range=(384, 600),
        keep_empty=False,
    )
    assert config.train == TrainConfig(
        epochs=36,
        milestones=(27, 33),
        optimizer="adamw",
        lr=rate,
        images_per_step=16,
        weight_decay=0.05,
        norm_weight_decay=False,
        layer_decay=decay,
        warmup_steps=500,
        warmup_factor=0.001,
    )
    assert config.published.startswith(f"{box} box AP, {mask} mask AP")


@pytest.mark.parametrize("masks", [False, True])
def test_deformable_recipes_are_the_plain_ones_with_dcn_in_stages_3_to_5(masks: bool) -> None:
    name = "cascade_mask_rcnn" if masks else "cascade_rcnn"
    config, plain = load_config(f"{name}_r50_fpn_dconv_c3_c5_1x_coco"), load_config(f"{name}_r50_fpn_1x_coco")
    deformable = dataclasses.replace(plain.model, deformable="plain", deformable_stages=(2, 3, 4), deformable_groups=1)
    assert config.model == deformable
    assert (config.data, config.train) == (plain.data, plain.train)


def test_benchmarks_with_ignore_regions_keep_them_out_of_the_negatives() -> None:
    for path in FILES:
        expected = path.parent.name in ("kitti", "citypersons", "widerface")
        assert load_config(path).data.ignore_regions == expected, path.stem


def test_the_migration_page_names_settings_and_recipes_that_exist() -> None:
    text = (ROOT / "docs/migrate.md").read_text(encoding="utf-8")
    sections = {"model": ModelConfig, "data": DataConfig, "train": TrainConfig}
    named = re.findall(r"(?<![\w./])(?:--)?(model|data|train)\.(?!md\b|yaml\b)([a-z][a-z_-]*)", text)
    known = {section: {field.name for field in dataclasses.fields(kind)} for section, kind in sections.items()}
    unknown = [f"{section}.{name}" for section, name in named if name.replace("-", "_") not in known[section]]
    assert len(named) > 60 and not unknown
    recipes = set(re.findall(r"\b(?:detectron2_)?cascade_(?:mask_)?rcnn_\w+", text))
    assert recipes and recipes <= set(config_names()) | {"cascade_mask_rcnn_r50_fpn_1x_coco_20200203"}
    for link in re.findall(r"\]\((\w+\.md)\)", text):
        assert link in ("data.md", "parity.md")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"norm": "group", "masks": "every", "mask_channels": 16}, "model.mask_channels 16: group norm has 32 groups"),
        ({"norm": "group", "fpn_channels": 48}, "model.fpn_channels 48: group norm has 32 groups"),
        ({"box_head": "4conv1fc_gn", "fpn_channels": 100}, "model.fpn_channels 100"),
        ({"masks": "every", "mask_channels": 0}, "model.mask_channels 0: at least 1"),
    ],
)
def test_channels_that_group_norm_cannot_divide_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ModelConfig(**settings)
    ModelConfig(**(settings | {"mask_channels": 64, "fpn_channels": 64}))
    ModelConfig(mask_channels=16, masks="every")  # without group norm any number will do


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"crop": 1.5}, "data.crop 1.5: a probability"),
        ({"copy_paste": -0.1}, "data.copy_paste -0.1: a probability"),
        ({"crop": 0.5, "large_scale_jitter": (0.1, 2.0)}, "use one of them"),
        ({"crop_range": (600, 384)}, "the smaller first"),
        ({"crop_short_side": ()}, "data.crop_short_side"),
        ({"repeat_threshold": 1.0}, "data.repeat_threshold 1.0: a share of the images"),
    ],
)
def test_nonsense_about_what_is_shown_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        DataConfig(**settings)


def test_the_papers_semantics_have_no_crop_before_the_resize() -> None:
    with pytest.raises(ConfigError, match="paper resizes once only"):
        Config(model=ModelConfig(semantics="paper"), data=DataConfig(crop=0.5))


def test_every_number_of_a_config_has_bounds() -> None:
    for section, settings in vars(Config()).items():
        for field in dataclasses.fields(settings) if dataclasses.is_dataclass(settings) else ():
            if re.search(r"\b(int|float)\b", str(field.type)):
                assert f"{section}.{field.name}" in _BOUNDS


NONSENSE = [
    (ModelConfig, {"anchor_ratios": (-1.0,)}, "model.anchor_ratios (-1.0,): numbers above 0, at least one"),
    (ModelConfig, {"anchor_ratios": ()}, "model.anchor_ratios (): numbers above 0, at least one"),
    (ModelConfig, {"anchor_scales": (0.0,)}, "model.anchor_scales (0.0,): numbers above 0, at least one"),
    (ModelConfig, {"rpn_convs": -1}, "model.rpn_convs -1: at least 1"),
    (ModelConfig, {"head_channels": 0}, "model.head_channels 0: at least 1"),
    (ModelConfig, {"head_channels": 10**400}, "model.head_channels 1"),
    (ModelConfig, {"stage_stds": ((0.0,) * 4,) * 3}, "model.stage_stds ((0.0, 0.0, 0.0, 0.0),"),
    (
        ModelConfig,
        {"stage_loss_weights": (-1.0, 0.0, 0.0)},
        "model.stage_loss_weights (-1.0, 0.0, 0.0): each 0 or more",
    ),
    (ModelConfig, {"box_loss_weight": float("inf")}, "model.box_loss_weight inf: above 0"),
    (ModelConfig, {"nms_iou": float("nan")}, "model.nms_iou nan: above 0, at most 1"),
    (DataConfig, {"pad_multiple": 0}, "data.pad_multiple 0: at least 1"),
    (
        DataConfig,
        {"large_scale_jitter": (-2.0, -1.0)},
        "data.large_scale_jitter (-2.0, -1.0): two factors, the smaller",
    ),
    (DataConfig, {"large_scale_jitter": (2.0, 1.0)}, "data.large_scale_jitter (2.0, 1.0): two factors, the smaller"),
    (DataConfig, {"vertical_flip": 7.0}, "data.vertical_flip 7.0: a probability, from 0 to 1"),
    (TrainConfig, {"momentum": 7.0}, "train.momentum 7.0: 0 (none) or more, below 1"),
    (TrainConfig, {"weight_decay": -1.0}, "train.weight_decay -1.0: 0 (none) or more"),
    (TrainConfig, {"warmup_steps": -5}, "train.warmup_steps -5: 0 (none) or more"),
    (TrainConfig, {"warmup_factor": -3.0}, "train.warmup_factor -3.0: from 0 to 1"),
    (TrainConfig, {"clip_grad_norm": -1.0}, "train.clip_grad_norm -1.0: 0 (none) or more"),
    (TrainConfig, {"log_every": 0}, "train.log_every 0: at least 1"),
    (TrainConfig, {"max_steps": -1}, "train.max_steps -1: 0 (the whole schedule) or more"),
    (TrainConfig, {"batch_size": 2**31}, "train.batch_size 2147483648: at most 2147483647"),
]


@pytest.mark.parametrize(("section", "settings", "said"), NONSENSE, ids=lambda value: str(value)[:40])
def test_numbers_out_of_their_bounds_are_refused(section: Any, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        section(**settings)


def test_a_checkpoint_trained_with_numbers_of_no_use_still_loads() -> None:
    moved, said = within_bounds(
        {"patience": -1, "clip_grad_norm": -1.0, "log_every": 0, "epochs": 3, "ema": 2.0, "init": ""}
    )
    assert TrainConfig(**moved).patience == 0 and (moved["clip_grad_norm"], moved["log_every"]) == (0.0, 1)
    assert moved["epochs"] == 3 and 0.99 < moved["ema"] < 1
    assert said[2] == "train.log_every 0 is read as 1 (at least 1)" and len(said) == 4
