"""Recipes by name and file, dictionaries, overrides: what loads, and the one line that says why not."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from cascade_rcnn import recipes
from cascade_rcnn.config import Config, DataConfig, ModelConfig, TrainConfig, finetune_schedule
from cascade_rcnn.errors import ConfigError
from cascade_rcnn.recipes import (
    apply_overrides,
    config_from_dict,
    config_names,
    config_to_python,
    load_config,
)

UNUSUAL = Config(
    model=ModelConfig(
        stage_ious=(0.5, 0.6),
        stage_loss_weights=(1.0, 0.5),
        masks="last",
        stage_stds=((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1)),
    ),
    data=DataConfig(short_side=(480, 800), short_side_mode="range", large_scale_jitter=(0.1, 2.0), antialias=True),
    train=TrainConfig(milestones=(), ema=0.999),
    published="somebody's table",
)


def _write(folder: Path, text: str, name: str = "mine.py") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def _message(call: object) -> str:
    with pytest.raises(ConfigError) as caught:
        call()  # type: ignore[operator]
    message = str(caught.value)
    assert "\n" not in message
    return message


# Names and files


@pytest.mark.parametrize("name", config_names())
def test_every_recipe_loads_by_its_name(name: str) -> None:
    assert isinstance(load_config(name), Config)


def test_there_are_recipes_and_their_names_are_unique() -> None:
    folder = next(iter(recipes._recipe_files().values())).parents[1]
    files = [path for path in folder.rglob("*.py") if not path.stem.startswith("_")]
    assert len(files) == len(config_names()) > 0


@pytest.mark.parametrize(
    "spelling", ["cascade_rcnn_r50_fpn_1x_coco", "cascade-rcnn_r50_fpn_1x_coco", "cascade_rcnn_r50_fpn_1x_coco.py"]
)
def test_bare_names_take_dashes_and_the_suffix(spelling: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = _write(tmp_path, config_to_python(UNUSUAL))
    monkeypatch.setattr(recipes, "_recipe_files", lambda: {"cascade_rcnn_r50_fpn_1x_coco": path})
    if spelling.endswith(".py"):
        assert "no such config file (did you mean cascade_rcnn_r50_fpn_1x_coco?)" in _message(
            lambda: load_config(spelling)
        )
    else:
        assert load_config(spelling) == UNUSUAL


def test_a_file_a_json_and_a_run_folder_load_alike(tmp_path: Path) -> None:
    _write(tmp_path, json.dumps(UNUSUAL.to_dict()), "config.json")
    recipe = _write(tmp_path, config_to_python(UNUSUAL))
    for source in (recipe, str(recipe), tmp_path / "config.json", tmp_path):
        assert load_config(source) == UNUSUAL


def test_unknown_names_are_answered_with_the_closest() -> None:
    name = config_names()[0]
    assert f"did you mean {name}" in _message(lambda: load_config(name + "x"))
    assert "no such config name" in _message(lambda: load_config("qqqqqq"))
    assert "no such config file" in _message(lambda: load_config("nowhere/qqqqqq.py"))


def test_a_folder_without_config_and_a_strange_file_are_refused(tmp_path: Path) -> None:
    assert "no config.json in this folder" in _message(lambda: load_config(tmp_path))
    path = _write(tmp_path, "model: x", "config.yaml")
    assert str(path) in _message(lambda: load_config(path))


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("config = Config(\n", 1, "never closed"),
        ("x = 1\nconfig = Confg()\n", 2, "NameError: name 'Confg'"),
        ("import nowhere_at_all\n", 1, "No module named 'nowhere_at_all'"),
        (
            "from cascade_rcnn.config import *\n\nconfig = Config(\n    train=TrainConfig(epochz=3))\n",
            4,
            "unknown setting epochz (did you mean epochs",
        ),
        (
            "from cascade_rcnn.config import *\nconfig = Config(dota=3)\n",
            2,
            "unknown setting dota (did you mean data?)",
        ),
        ("from cascade_rcnn.config import *\nconfig = Config(data=DataConfig(flip=3))\n", 2, "data.flip 3"),
        ("from cascade_rcnn.config import *\nconfig = Config(data=DataConfig(flip='x'))\n", 2, "TypeError"),
    ],
)
def test_errors_in_a_file_name_its_line(text: str, line: int, said: str, tmp_path: Path) -> None:
    path = _write(tmp_path, text)
    message = _message(lambda: load_config(path))
    assert f"{path}, line {line}: " in message and said in message


@pytest.mark.parametrize("text", ["", "config = {'model': 3}\n"])
def test_a_file_without_a_config_says_what_it_found(text: str, tmp_path: Path) -> None:
    path = _write(tmp_path, text)
    assert f"{path}: expected 'config = Config(...)', found " in _message(lambda: load_config(path))


def test_values_of_the_wrong_type_in_a_file_are_found(tmp_path: Path) -> None:
    path = _write(tmp_path, "from cascade_rcnn.config import *\nconfig = Config(train=TrainConfig(epochs='12'))\n")
    assert str(path) in _message(lambda: load_config(path))
    path = _write(tmp_path, "from cascade_rcnn.config import *\nconfig = Config(train=TrainConfig(schedule='cos'))\n")
    assert 'train.schedule is "cos", expected one of multistep, cosine' in _message(lambda: load_config(path))


def test_broken_json_names_its_line(tmp_path: Path) -> None:
    path = _write(tmp_path, '{\n"model": }', "config.json")
    assert f"{path}, line 2: not valid JSON" in _message(lambda: load_config(path))
    path.write_bytes(b"\xff\xfe\x00")
    assert f"{path} cannot be read" in _message(lambda: load_config(path))


# Dictionaries


@pytest.mark.parametrize("config", [Config(), UNUSUAL])
def test_a_config_survives_json_and_python(config: Config, tmp_path: Path) -> None:
    assert config_from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert load_config(_write(tmp_path, config_to_python(config))) == config


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"model": {"backbon": "x"}}, "unknown setting model.backbon (did you mean backbone"),
        ({"modell": {}}, "unknown setting modell (did you mean model?)"),
        ({"model": 3}, "model is 3, expected an object"),
        ([], "is [], expected an object"),
        ({"train": {"epochs": "3"}}, 'train.epochs is "3", expected a whole number'),
        ({"train": {"epochs": 3.5}}, "train.epochs is 3.5, expected a whole number"),
        ({"train": {"epochs": True}}, "train.epochs is true, expected a whole number"),
        ({"train": {"lr": True}}, "train.lr is true, expected a number"),
        ({"train": {"lr": float("nan")}}, "train.lr is NaN, expected a number"),
        ({"train": {"milestones": 8}}, "train.milestones is 8, expected numbers"),
        ({"train": {"deterministic": 1}}, "train.deterministic is 1, expected true or false"),
        ({"model": {"stage_ious": [0.5, "x"]}}, 'model.stage_ious is "x", expected a number'),
        ({"model": {"stage_stds": [[1, 2]]}}, "model.stage_stds is [1, 2], expected 4 numbers"),
        ({"data": {"root": None}}, "data.root is null, expected a text"),
        ({"data": {"flip": 7}}, "data.flip 7.0: a probability"),
    ],
)
def test_a_dictionary_that_does_not_fit_names_source_key_and_value(values: object, said: str) -> None:
    message = _message(lambda: config_from_dict(values, source="run/config.json"))  # type: ignore[arg-type]
    assert message.startswith("run/config.json") and said in message


def test_missing_keys_take_their_defaults() -> None:
    assert config_from_dict({"train": {"epochs": 3}}) == Config(train=TrainConfig(epochs=3))


def test_keys_of_older_versions_are_moved_or_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipes, "RENAMED_KEYS", {"train.epoch": "train.epochs", "flip": "data.flip", "model.x": None})
    values = {"train": {"epoch": 7}, "flip": 0.25, "model": {"x": 1}}
    config = config_from_dict(values)
    assert (config.train.epochs, config.data.flip) == (7, 0.25)
    assert values == {"train": {"epoch": 7}, "flip": 0.25, "model": {"x": 1}}  # the caller's own stays as it is


# Overrides


def test_overrides_take_dashes_underscores_equals_lists_and_switches() -> None:
    config = apply_overrides(
        Config(),
        [
            "--train.epochs",
            "3",
            "--model.stage-ious",
            "0.5",
            "0.6",
            "--data.flip=0",
            "--train.batch_size=4",
            "--train.deterministic",
            "--model.no-pretrained",
            "--train.ema",
            "1e-3",
            "--data.root",
            "a b",
            "--model.frozen-stages",
            "-1",
            "--data.antialias",
            "true",
            "--published",
            "mine",
        ],
    )
    assert (config.train.epochs, config.train.batch_size, config.train.ema) == (3, 4, 1e-3)
    assert config.model.stage_ious == (0.5, 0.6) and config.model.frozen_stages == -1
    assert config.data.flip == 0.0 and config.data.root == "a b" and config.data.antialias is True
    assert config.train.deterministic and not config.model.pretrained and config.published == "mine"


def test_overrides_of_rows_and_none() -> None:
    words = ["0.1,0.1,0.2,0.2", "(0.05,", "0.05,", "0.1,", "0.1)"]
    config = apply_overrides(Config(), ["--model.stage-stds", *words, "--model.stage-ious=0.5,0.6"])
    assert config.model.stage_stds == ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1))
    assert apply_overrides(config, ["--model.stage-stds", "none"]).model.stage_stds is None


def test_overrides_that_must_fit_each_other_are_made_together() -> None:
    words = ["--model.stage-ious", "0.5", "0.6", "--model.stage-loss-weights", "1", "0.5"]
    for order in (words, words[3:] + words[:3]):
        assert apply_overrides(Config(), order).model.stage_loss_weights == (1.0, 0.5)


def test_no_override_changes_nothing() -> None:
    assert apply_overrides(UNUSUAL, []) == UNUSUAL


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--train.epochz 3", "--train.epochz: no such setting (did you mean --train.epochs"),
        ("--epochs 3", "--epochs: no such setting (did you mean --train.epochs?)"),
        ("--batch-size 3", "did you mean --train.batch-size?"),
        ("--train.epochs x", '--train.epochs is "x", expected a whole number'),
        ("--train.epochs 2.5", '--train.epochs is "2.5", expected a whole number'),
        ("--train.epochs", "--train.epochs takes one value, a whole number, and got no value"),
        ("--train.epochs 1 2", "got several: 1 2"),
        ("--train.deterministic maybe", '--train.deterministic is "maybe", expected true or false'),
        ("--train.lr nan", "--train.lr is NaN, expected a number"),
        ("--train.schedule cos", '--train.schedule is "cos", expected one of multistep, cosine'),
        ("--model.stage-ious 1.5", "model.stage_ious (1.5,): each in (0, 1)"),
        ("--model.stage-ious 0.5 y", '--model.stage-ious is "y", expected a number'),
        ("--model.stage-ious", "--model.stage-ious got 0 values, expected numbers"),
        ("--model.stage-stds 1 2 3", "--model.stage-stds got 3 numbers, expected rows of 4 numbers"),
        ("--data.large-scale-jitter 1", "--data.large-scale-jitter got 1 values, expected 2 numbers"),
        ("x", "unexpected 'x'"),
        ("--data.root dir -train.init w", "-train.init: options begin with two dashes: --train.init"),
        ("-train.lr 1", "-train.lr: options begin with two dashes: --train.lr"),
        ("--train.lr -inf", "--train.lr is"),
    ],
)
def test_a_wrong_override_names_option_value_and_what_fits(words: str, said: str) -> None:
    assert said in _message(lambda: apply_overrides(Config(), words.split()))


# The schedule that follows from the number of images


@pytest.mark.parametrize(("images", "epochs"), [(1, 100), (100, 100), (200, 71), (1000, 32), (7000, 12), (10**6, 12)])
def test_few_images_get_more_epochs(images: int, epochs: int) -> None:
    config = finetune_schedule(Config(train=TrainConfig(epochs=0)), images)
    assert config.train.epochs == epochs
    first, second = config.train.milestones
    assert 0 < first < second < epochs


def test_the_warm_up_takes_at_most_a_tenth_of_a_short_training() -> None:
    short = finetune_schedule(Config(train=TrainConfig(epochs=0, batch_size=4)), 100)
    assert short.train.warmup_steps == 100 * 25 // 10
    filled = finetune_schedule(Config(train=TrainConfig(epochs=0, accumulate=0)), 100)
    assert filled.train.warmup_steps == 100 * 7 // 10
    long = finetune_schedule(Config(train=TrainConfig(epochs=0)), 100_000)
    assert long.train.warmup_steps == 500


def test_named_epochs_stay() -> None:
    config = Config(train=TrainConfig(epochs=5, milestones=(4,)))
    assert finetune_schedule(config, 100) is config
    assert dataclasses.replace(config).train.milestones == (4,)


def test_another_number_of_epochs_moves_the_milestones() -> None:
    recipe = load_config("cascade_rcnn_r50_fpn_1x_coco")
    assert apply_overrides(recipe, ["--train.epochs", "24"]).train.milestones == (16, 22)
    assert apply_overrides(recipe, ["--train.epochs", "1"]).train.milestones == ()
    assert apply_overrides(recipe, ["--train.epochs", "24", "--train.milestones", "9"]).train.milestones == (9,)
    assert apply_overrides(load_config("finetune"), ["--train.epochs", "40"]).train.milestones == (27, 37)
