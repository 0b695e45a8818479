"""What a recipe chooses from its data: input size, anchors, detections, flips; and that a given setting wins."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from cascade_rcnn.check.choices import Choice, choose, keep_choices
from cascade_rcnn.check.dataset import run_check
from cascade_rcnn.check.memory import Machine, step_memory
from cascade_rcnn.check.objects import anchor_sides, best_anchor_iou
from cascade_rcnn.config import Config, DataConfig, ModelConfig, TrainConfig
from cascade_rcnn.data.records import DataSplit, ImageRecord
from cascade_rcnn.data.synthetic_shapes import generate_shapes
from cascade_rcnn.errors import ConfigError
from cascade_rcnn.recipes import apply_overrides, config_from_dict, load_config

FINETUNE = load_config("finetune")


def split(
    *sides: tuple[float, float], per_image: int = 4, size: tuple[int, int] = (600, 800), names: tuple[str, ...] = ("a",)
) -> DataSplit:
    """Images of ``size`` (height, width) with ``per_image`` objects each, of the given (width, height) in turn."""
    records = []
    for number in range(12):
        wide_high = np.array([sides[k % len(sides)] for k in range(per_image)]).reshape(-1, 2)
        corner = np.stack([20.0 + 7 * np.arange(per_image) % 300, 20.0 + 3 * np.arange(per_image) % 200], axis=1)
        records.append(
            ImageRecord(
                Path(f"{number}.png"),
                f"{number}.png",
                number,
                *size,
                boxes=np.concatenate([corner, corner + wide_high], axis=1),
                labels=np.zeros(per_image, np.int64),
                ignore=np.zeros(per_image, np.bool_),
                areas=wide_high.prod(axis=1),
            )
        )
    return DataSplit("coco", "train", Path("data"), records, names, tuple(range(1, len(names) + 1)))


def chosen(data: DataSplit, *words: str, gpu: float | None = None) -> tuple[Config, dict[str, Choice]]:
    config, choices = choose(apply_overrides(FINETUNE, list(words)), data, machine=Machine(gpu_memory=gpu))
    assert config.automatic is None and all("\n" not in choice.line() for choice in choices)
    return config, {choice.setting: choice for choice in choices}


def test_usual_objects_leave_the_recipe_as_it_is() -> None:
    config, choices = chosen(split((60, 60), (120, 90), (40, 70)))
    assert (config.data, config.model) == (FINETUNE.data, FINETUNE.model)
    assert list(choices)[:4] == ["data.short_side", "data.long_side", "model.anchor_scales", "model.anchor_ratios"]


@pytest.mark.parametrize(
    ("side", "short", "median"),
    [
        (24, (960, 1216), 49),  # 32 pixels at 800: half as large again brings 48
        (6, (960, 1216), 12),  # never more than twice the pictures' own 600 pixels (rounded to 32)
        (150, (416, 512), 128),  # 200 pixels at 800: 128 are enough
        (500, (384, 480), 400),  # but never below 0.6 of the recipe's
    ],
)
def test_the_input_shows_the_median_object_large_enough(side: int, short: tuple[int, int], median: int) -> None:
    config, choices = chosen(split((side, side)))
    assert config.data.short_side == short
    assert f"side is {median} pixels there" in choices["data.short_side"].reason
    assert config.data.long_side == pytest.approx(max(short) * 1333 / 800, abs=32)


def with_labels(*labels: tuple[int, ...]) -> DataSplit:
    """Twelve images, the last ones with these labels, the others with class 0."""
    data = split((60, 60), per_image=2, names=("cell", "mitosis", "artefact"))
    for record, own in zip(data.records[-len(labels) :], labels, strict=True):
        record.labels[:] = own
    return data


def test_classes_that_differ_by_less_than_ten_times_are_not_balanced() -> None:
    config, choices = chosen(with_labels((0, 1), (0, 1)))
    assert config.data.repeat_threshold == 0
    assert (
        choices["data.repeat_threshold"].reason
        == "2 images show 'mitosis', 12 'cell', not ten times as many: no image is repeated"
    )
    assert "data.repeat_threshold" not in chosen(with_labels((0, 0)))[1]  # one class in the data


def test_classes_in_as_many_images_are_told_as_such() -> None:
    data = with_labels((0, 1))
    _, choices = chosen(dataclasses.replace(data, records=data.records[-1:]))
    assert choices["data.repeat_threshold"].reason == "as many images show each class (1)"


def test_a_rare_class_is_repeated_up_to_four_times() -> None:
    data = with_labels((0, 1))
    assert chosen(data)[0].data.repeat_threshold == 0.1  # 1 of 12 images: a tenth is common
    data = dataclasses.replace(data, records=[*data.records[:-1] * 45, data.records[-1]])  # 1 of 496
    config, choices = chosen(data)
    assert config.data.repeat_threshold == 0.032  # 16 times its share: its image comes four times
    said = "1 image shows 'mitosis', 496 'cell'; an image comes up to 4 times in an epoch"
    assert choices["data.repeat_threshold"].reason == said
    assert chosen(data, "--data.repeat-threshold", "0.3")[0].data.repeat_threshold == 0.3
    assert "data.repeat_threshold" not in chosen(data, "--data.repeat-threshold", "0")[1]


def test_the_input_fits_into_the_memory() -> None:
    small = split((24, 24))
    free = max(chosen(small, gpu=80.0)[0].data.short_side)
    config, choices = chosen(small, "--train.batch-size", "2", gpu=4.0)
    assert free == 1216 and 320 <= max(config.data.short_side) < 1216
    assert "more would not fit into the GPU's 4 GB with 2 images a pass" in choices["data.short_side"].reason
    four = chosen(small, "--train.batch-size", "4", gpu=4.0)[0]
    assert max(four.data.short_side) < max(config.data.short_side)


def test_fewer_images_a_pass_come_before_a_smaller_picture() -> None:
    config, choices = chosen(split((24, 24)), gpu=4.0)
    assert max(config.data.short_side) == 1216 and config.train.batch_size == 1
    assert choices["train.batch_size"].line() == (
        "train.batch_size 1: a pass takes about 3 of the GPU's 4 GB, with 2 images about 4; a step keeps its 16 images"
    )
    assert chosen(split((24, 24)), gpu=80.0)[0].train.batch_size == 2
    assert "train.batch_size" not in chosen(split((24, 24)))[1]  # nothing is known of this machine
    config, choices = chosen(split((24, 24)), gpu=2.0)  # both, and then it is said that it may not do
    assert max(config.data.short_side) < 1216 and config.train.batch_size == 1
    assert "with 1 image a pass" in choices["data.short_side"].reason


@pytest.mark.parametrize("setting", [["--train.accumulate", "1"], ["--model.norm", "batch"]])
def test_images_a_pass_stay_where_they_change_what_is_learnt(setting: list[str]) -> None:
    config, _ = chosen(split((24, 24)), *setting, gpu=4.0)
    assert config.train.batch_size == 2 and max(config.data.short_side) < 1216


SMALL = load_config("finetune_small")


def wide_and_high() -> DataSplit:
    wide, high = split((90, 90), size=(683, 1024)), split((90, 90), size=(1024, 683))
    return dataclasses.replace(wide, records=wide.records + high.records)


@pytest.mark.parametrize(
    ("images", "short", "long", "gigabytes"),
    [  # (width, height) as in the trainings of docs/trainings.md, whose peaks these were
        ([(640, 480)], 320, 544, 4.0),
        ([(256, 256), (1272, 603), (696, 520)], 320, 544, 4.6),
        ([(256, 256), (1272, 603), (696, 520)], 512, 896, 9.6),
        ([(1024, 499), (683, 1024), (577, 1024)], 320, 544, 6.4),
        ([(1024, 499), (683, 1024), (577, 1024)], 512, 928, 16.4),
    ],
)
def test_memory_without_a_gpu_is_counted_as_it_was_measured(
    images: list[tuple[int, int]], short: int, long: int, gigabytes: float
) -> None:
    sizes = np.array(images, dtype=np.float64)
    assert step_memory(SMALL, sizes, short, long, 8, Machine()) == pytest.approx(gigabytes, rel=0.05)


@pytest.mark.parametrize(("memory", "batch"), [(33.0, 8), (16.5, 4), (8.2, 2), (4.0, 1), (None, 8)])
def test_a_laptop_takes_its_small_objects_in_more_passes(memory: float | None, batch: int) -> None:
    data = wide_and_high()
    for record in data.records:
        record.boxes[:, 2:] = record.boxes[:, :2] + 40  # 20 pixels at 320
    config, choices = choose(SMALL, data, machine=Machine(memory=memory))
    assert config.train.batch_size == batch and config.train.accumulate == 0
    if memory is not None and memory > 5:
        assert max(config.data.short_side) == 512
    if batch == 4:
        (line,) = [choice.line() for choice in choices if choice.setting == "train.batch_size"]
        assert line.endswith("of this machine's 16 GB, with 8 images about 12; a step keeps its 16 images"), line


def test_a_machine_with_too_little_memory_is_told() -> None:
    config, choices = choose(SMALL, wide_and_high(), machine=Machine(memory=2.5))
    assert max(config.data.short_side) == 320 and config.train.batch_size == 1
    (line,) = [choice.line() for choice in choices if choice.setting == "train.batch_size"]
    assert line.endswith("more than the 1.5 that are planned with, and it may not fit")


def test_long_images_keep_their_length() -> None:
    config, _ = chosen(split((60, 60), size=(400, 1000)))
    assert config.data.long_side >= 2.5 * max(config.data.short_side) - 32
    fixed, choices = chosen(split((60, 60), size=(400, 1000)), "--data.long-side", "1000")
    assert fixed.data.long_side == 1000 and choices["data.long_side"].reason == "as given"


def test_images_longer_than_any_input_are_told() -> None:
    config, choices = chosen(split((5, 5), size=(10, 1000)))
    assert config.data.long_side == pytest.approx(3 * max(config.data.short_side), abs=32)
    assert choices["data.long_side"].reason.endswith(
        "no more, though one of ten images is over 100 times as long as wide"
    )


def test_a_side_that_is_left_to_the_data_follows_the_given_one() -> None:
    large = apply_overrides(FINETUNE, ["--data.short-side", "2000"]).data
    assert large.short_side == (2000,) and large.long_side == pytest.approx(2000 * 1333 / 800, abs=32)
    small = apply_overrides(FINETUNE, ["--data.long-side", "320"]).data
    assert small.long_side == 320 and small.short_side == (192,)
    with pytest.raises(ConfigError, match="long_side 1333 is below the shorter side 2000"):
        apply_overrides(dataclasses.replace(FINETUNE, automatic=None), ["--data.short-side", "2000"])


def test_numbers_are_written_as_they_are_given() -> None:
    assert Choice("data.flip", 0.0, "why").line() == "data.flip 0: why"
    assert Choice("model.anchor_scales", (8.0, 5.7), "why").line() == "model.anchor_scales 8 5.7: why"


def test_anchors_reach_the_objects() -> None:
    config, choices = chosen(split((12, 12)), "--data.short-side", "600", "--data.long-side", "1000")
    assert max(config.model.anchor_scales) <= 4 and config.model.anchor_ratios == (0.5, 1.0, 2.0)
    assert "100.0% of the objects" in choices["model.anchor_scales"].reason
    assert "with the recipe's 8" in choices["model.anchor_scales"].reason
    long, choices = chosen(split((300, 50)), "--data.short-side", "600", "--data.long-side", "1000")
    assert min(long.model.anchor_ratios) <= 0.33 < 0.5
    assert "anchor_scales 8: " in choices["model.anchor_scales"].line()


def test_anchors_for_small_objects_still_reach_the_largest() -> None:
    """Of 25 objects 24 are small and one needs the recipe's own anchors: both kinds must be met."""
    mixed = split(*[(12, 12)] * 24, (440, 440), per_image=25)
    config, choices = chosen(mixed, "--data.short-side", "600", "--data.long-side", "1000")
    largest = np.array([[20.0, 20.0, 460.0, 460.0]])
    assert best_anchor_iou(largest, sizes=anchor_sides(config.model), ratios=config.model.anchor_ratios)[0] >= 0.5
    assert min(config.model.anchor_scales) <= 4, "and the small ones"
    assert "anchors reach 100.0% of the objects" in choices["model.anchor_scales"].reason
    alone = chosen(split((12, 12)), "--data.short-side", "600", "--data.long-side", "1000")[0]
    assert best_anchor_iou(largest, sizes=anchor_sides(alone.model), ratios=alone.model.anchor_ratios)[0] < 0.5


def test_a_network_that_is_brought_keeps_its_anchors() -> None:
    config, choices = chosen(split((12, 12)), "--data.short-side", "600", "--train.init", "mine.safetensors")
    assert config.model.anchor_scales == (8.0,)
    assert (
        choices["model.anchor_scales"].reason == "the recipe's, since training goes on with the RPN of mine.safetensors"
    )


def test_twice_the_objects_of_the_fullest_image_are_kept() -> None:
    config, choices = chosen(split((30, 30), per_image=123))
    assert config.model.max_detections == 250
    assert choices["model.max_detections"].line() == "model.max_detections 250: twice the 123 objects of '0.png'"
    assert chosen(split((30, 30)))[0].model.max_detections == 100
    config, choices = chosen(split((30, 30), per_image=123), "--model.test-proposals", "200")
    assert config.model.max_detections == 200 and "all model.test_proposals" in choices["model.max_detections"].reason


@pytest.mark.parametrize(
    ("names", "flip"),
    [
        (("cat", "dog"), 0.5),
        (("turnLeft", "stop"), 0.0),
        (("right_hand", "face"), 0.0),
        (("copyright", "leftover"), 0.5),  # not the words
        (("text line", "figure"), 0.0),
        (tuple("0123456789"), 0.0),
        (tuple("abc"), 0.0),
        (("0", "1"), 0.5),  # numbers of classes without names
    ],
)
def test_flips_are_left_out_where_a_mirrored_image_is_another(names: tuple[str, ...], flip: float) -> None:
    config, _ = chosen(split((60, 60), names=names))
    assert config.data.flip == flip
    assert chosen(split((60, 60), names=names), "--data.flip", "0.25")[0].data.flip == 0.25


def test_bfloat16_where_the_processor_has_units_for_it() -> None:
    small = FINETUNE
    for machine, precision in (
        (Machine(bfloat16=True), "bf16"),
        (Machine(), "fp32"),
        (Machine(gpu_memory=8.0), "auto"),
    ):
        config, choices = choose(small, split((60, 60)), machine=machine)
        assert config.train.precision == precision
        assert choices[-1].setting == "train.precision"
    given = apply_overrides(small, ["--train.precision", "fp32"])
    assert choose(given, split((60, 60)), machine=Machine(bfloat16=True))[1][-1].reason == "as given"


def test_every_setting_given_wins_and_says_so() -> None:
    words = (
        "--data.short-side 333 --data.long-side 555 --data.flip 1 --train.precision fp16 "
        "--model.anchor-scales 5 --model.anchor-ratios 1 --model.max-detections 7"
    )
    config, choices = chosen(split((6, 6), per_image=90), *words.split())
    assert {choice.reason for choice in choices.values()} == {"as given"} and len(choices) == 7
    assert (config.data.short_side, config.data.long_side, config.data.flip) == ((333,), 555, 1.0)
    assert (config.model.anchor_scales, config.model.anchor_ratios) == ((5.0,), (1.0,))
    assert config.model.max_detections == 7
    sizes = chosen(split((6, 6)), "--model.anchor-sizes", "8", "16", "32", "64", "128")[0].model
    assert sizes.anchor_sizes == (8, 16, 32, 64, 128) and sizes.anchor_scales == (8.0,)


def test_nothing_to_measure_keeps_the_recipe() -> None:
    data = split((60, 60), per_image=0)
    config, choices = chosen(data)
    assert (config.data, config.model) == (FINETUNE.data, FINETUNE.model)
    assert "no object in an image of known size" in choices["data.short_side"].reason


def test_other_recipes_and_none_choose_nothing() -> None:
    plain = load_config("cascade_rcnn_r50_fpn_1x_coco")
    assert choose(plain, split((6, 6)), machine=Machine()) == (plain, [])
    fixed = apply_overrides(FINETUNE, ["--automatic", "none"])
    assert fixed.automatic is None and choose(fixed, split((6, 6)), machine=Machine())[0] is fixed


def test_a_resumed_run_keeps_what_it_chose() -> None:
    first, _ = chosen(split((12, 12)))
    resumed = keep_choices(FINETUNE, first)
    assert resumed == first
    given = apply_overrides(FINETUNE, ["--data.flip", "0.1"])
    assert keep_choices(given, first).data.flip == 0.1


def test_check_measures_against_what_the_recipe_would_choose(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generate_shapes(tmp_path / "data", train_images=4, val_images=2, size=96, objects=(3, 3))
    for word, missed in (("cascade_rcnn_r50_fpn_1x_coco", True), ("finetune", False)):
        recipe = apply_overrides(load_config(word), ["--data.short-side", "96", "--data.long-side", "96"])
        run_check(tmp_path / "data", recipe=recipe)
        assert ("meet no anchor" in capsys.readouterr().out) == missed, word


def test_unknown_names_are_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"automatic data\.flipp: can be chosen are data\.short_side, "):
        config_from_dict({"automatic": ["data.flipp"]})
    assert Config(model=ModelConfig(), data=DataConfig(), train=TrainConfig()).automatic is None
    assert dataclasses.replace(FINETUNE, automatic=()).automatic == ()
