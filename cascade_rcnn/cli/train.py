"""Commands that train, and what comes before: demo, check, train, config."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from cascade_rcnn.cli.parser import (
    RANGE_HELP,
    Parser,
    add_orientation,
    load_recipe,
    range_of_levels,
    refuse_unknown_name,
    split_settings,
    whole_number,
)
from cascade_rcnn.config import Config
from cascade_rcnn.errors import ConfigError
from cascade_rcnn.recipes import apply_overrides, config_names, config_to_python, load_config, settings_help


def demo(parser: Parser, words: Sequence[str]) -> None:
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="run folder (runs/demo)")
    parser.add_argument("--quick", action="store_true", help="about a minute: shows that it works, not how well")
    args = parser.parse_all(words)

    from cascade_rcnn.demo import run_demo

    run_demo(out=args.out, quick=args.quick)


def check(parser: Parser, words: Sequence[str]) -> int:
    parser.add_argument("data", type=Path, metavar="DATA", help="folder of the data set")
    parser.add_argument("--fix", type=Path, metavar="OUT", help="write a repaired copy of the annotations there")
    parser.add_argument("--draw", type=whole_number, default=0, metavar="N", help="draw a sheet of N samples")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the sheet and the report as JSON")
    parser.add_argument(
        "--config",
        metavar="NAME",
        help="recipe whose input scale and anchors objects are measured against (the defaults), or that --folds train",
    )
    add_orientation(parser)
    parser.add_argument("--range", type=range_of_levels, metavar="LOW HIGH", help=RANGE_HELP)
    parser.add_argument("--model", type=Path, metavar="CHECKPOINT", help="rank the annotations that it takes for wrong")
    parser.add_argument(
        "--folds",
        type=whole_number,
        default=0,
        metavar="N",
        help="the same by N small models, none of which has seen the images that it judges",
    )
    parser.add_argument("--device", default="auto", metavar="D", help="for --model and --folds: cpu, cuda (auto)")
    args = parser.parse_all(words)
    if args.model or args.folds:
        _check_labels(parser, args)
        return 0
    recipe = load_recipe(args.config) if args.config else Config()
    said = {"orientation": args.orientation, "range": args.range}
    data = dataclasses.replace(recipe.data, **{name: value for name, value in said.items() if value is not None})
    recipe = dataclasses.replace(recipe, data=data)

    from cascade_rcnn.check.dataset import run_check

    return run_check(args.data, fix=args.fix, draw=args.draw, out=args.out, recipe=recipe)


def _check_labels(parser: Parser, args: argparse.Namespace) -> None:
    if args.fix or args.draw:
        parser.error(f"{'--fix' if args.fix else '--draw'} belongs to the check without --model and --folds")

    from cascade_rcnn.labels.command import LabelCheck, run_label_check

    settings = LabelCheck(
        model=args.model,
        folds=args.folds,
        recipe=load_recipe(args.config) if args.config else None,
        out=args.out or Path("label_errors"),
        orientation=args.orientation,
        range=args.range,
        device=args.device,
    )
    run_label_check(args.data, settings)


def train(parser: Parser, words: Sequence[str]) -> None:
    settings, words = split_settings(words)
    parser.usage = "cascade-rcnn train CONFIG [--data DIR] [--out RUN] [--resume] [--key.sub value ...]"
    parser.add_argument(
        "config", metavar="CONFIG", help="recipe: a name ('cascade-rcnn config' lists them), a file, or a run's folder"
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="data set; its format is recognised (data.root)")
    parser.add_argument("--out", type=Path, metavar="RUN", help="run folder (runs/NAME OF THE RECIPE)")
    parser.add_argument("--resume", action="store_true", help="resume from the last save in the run folder")
    parser.add_argument("--deterministic", action="store_true", help="bit-equal runs, slower (train.deterministic)")
    parser.add_argument("--no-check", action="store_true", help="skip the check of the data before training")
    parser.add_argument(
        "--explain", action="store_true", help="print what the recipe chooses from the data and why, without training"
    )
    if "-h" in words or "--help" in words:
        print(parser.format_help())
        print(settings_help([word for word in words[:1] if not word.startswith("-")]))
        return
    args, unknown = parser.parse_with_settings(words)
    settings += ["--data.root", str(args.data)] if args.data is not None else []
    settings += ["--train.deterministic"] if args.deterministic else []
    config = apply_overrides(load_recipe(args.config), settings + unknown)
    if not config.data.root:
        raise ConfigError(f"{args.config} names no data: add --data DIR")
    if config.train.init and not args.resume:
        refuse_unknown_name(config.train.init)
    recipe = Path(args.config)
    out = args.out or (recipe if recipe.is_dir() else Path("runs") / recipe.stem.replace("-", "_"))

    from cascade_rcnn.train import run_train

    run_train(config, out=out, resume=args.resume, check=not args.no_check, only_explain=args.explain)


def config(parser: Parser, words: Sequence[str]) -> None:
    settings, words = split_settings(words)
    parser.add_argument(
        "name",
        nargs="?",
        metavar="NAME|FILE",
        help="recipe, run, checkpoint or name of 'cascade-rcnn models'; without one, lists the names of the recipes",
    )
    parser.add_argument("--json", action="store_true", help="as JSON instead of a recipe file in Python")
    parser.add_argument(
        "--from-mmdet", metavar="FILE", help="a config of mmdetection (.py) as a recipe; nothing in it is run"
    )
    args, unknown = parser.parse_with_settings(words)
    if args.from_mmdet is not None:
        if args.name is not None:
            parser.error("--from-mmdet FILE stands for the recipe: give no other")
        _config_from_mmdet(args.from_mmdet, settings + unknown, as_json=args.json)
        return
    if args.name is None:
        if settings + unknown:
            parser.error(f"{(settings + unknown)[0]} without a recipe to change")
        print("\n".join(config_names()))
        return
    from cascade_rcnn.runtime.network import exported_file

    if exported_file(args.name) is not None:
        from cascade_rcnn.inference.detector import load

        config = load(args.name).config
    elif Path(args.name).suffix == ".safetensors":
        from cascade_rcnn.checkpoint import load_checkpoint

        config = load_checkpoint(args.name).config
    else:
        config = _recipe_or_published(args.name)
    config = apply_overrides(config, settings + unknown)
    print(_as_json(config) if args.json else config_to_python(config), end="")


def _recipe_or_published(name: str) -> Config:
    """Of a recipe, else the settings of published weights: those of our recipe of the same training, or their own."""
    from cascade_rcnn.zoo.catalog import find

    entry = find(name)
    if entry is None or name in config_names() or Path(name).exists():
        return load_recipe(name)
    if entry.recipe:
        return load_config(entry.recipe)

    from cascade_rcnn.checkpoint import load_checkpoint
    from cascade_rcnn.zoo.store import resolve

    return load_checkpoint(resolve(name)).config


def _config_from_mmdet(path: str, settings: Sequence[str], *, as_json: bool) -> None:
    from cascade_rcnn.convert.mmdet_config import recipe_from_mmdetection

    recipe = recipe_from_mmdetection(path)
    recipe.config = apply_overrides(recipe.config, settings)
    for line in recipe.report():
        print(line, file=sys.stderr)
    print(_as_json(recipe.config) if as_json else recipe.to_python(), end="")


def _as_json(config: Config) -> str:
    import json

    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"
