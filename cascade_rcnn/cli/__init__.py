"""The command ``cascade-rcnn``: one function per command, each with its own arguments and help.

A mistake of the user ends with one line, ``error: what, which value, what to do``, and exit code 2, before anything is
written. Ctrl-C ends quietly with 130. Anything else is a fault of the program and shows its traceback.

Torch and timm are imported inside the commands: ``cascade-rcnn COMMAND --help`` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from cascade_rcnn import __version__
from cascade_rcnn.config import Config, pixel_range
from cascade_rcnn.errors import ConfigError, UserError
from cascade_rcnn.messages import one_line
from cascade_rcnn.recipes import apply_overrides, config_names, config_to_python, load_config, settings_help
from cascade_rcnn.score import FORMATS

if TYPE_CHECKING:
    from cascade_rcnn.inference.run_model import Inference
    from cascade_rcnn.inference.tiles import Tiling

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE: the reader of our output has left


class _UsageError(UserError):
    """Words on the command line that do not fit the command."""


class _Parser(argparse.ArgumentParser):
    """argparse, with mistakes as one line and options written out in full."""

    def __init__(self, prog: str, description: str, example: str) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=f"example:\n  {example}",
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        raise _UsageError(f"{message} (see '{self.prog} --help')")

    def parse_all(self, words: Sequence[str]) -> argparse.Namespace:
        """Parse, and name the closest option where one is not known."""
        namespace, unknown = self.parse_known_args(words)
        if unknown:
            known = [option for action in self._actions for option in action.option_strings]
            matches = difflib.get_close_matches(unknown[0].partition("=")[0], known, n=1)
            hint = f", did you mean {matches[0]}?" if matches else ""
            self.error(f"unexpected argument {unknown[0]!r}{hint}")
        return namespace


# Each command below takes the words after its name.


def _demo(words: Sequence[str]) -> None:
    parser = _parser("demo", "cascade-rcnn demo --out runs/demo")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="run folder (runs/demo)")
    parser.add_argument("--quick", action="store_true", help="about a minute: shows that it works, not how well")
    args = parser.parse_all(words)

    from cascade_rcnn.demo import run_demo

    run_demo(out=args.out, quick=args.quick)


def _train(words: Sequence[str]) -> None:
    settings, words = _split_settings(words)
    parser = _parser("train", "cascade-rcnn train finetune --data my_images --train.batch-size 4")
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
    args, unknown = parser.parse_known_args(words)
    settings += ["--data.root", str(args.data)] if args.data is not None else []
    settings += ["--train.deterministic"] if args.deterministic else []
    config = apply_overrides(load_config(args.config), settings + unknown)
    if not config.data.root:
        raise ConfigError(f"{args.config} names no data: add --data DIR")
    recipe = Path(args.config)
    out = args.out or (recipe if recipe.is_dir() else Path("runs") / recipe.stem.replace("-", "_"))

    from cascade_rcnn.train import run_train

    run_train(config, out=out, resume=args.resume, check=not args.no_check, only_explain=args.explain)


def _evaluate(words: Sequence[str]) -> None:
    parser = _parser("evaluate", "cascade-rcnn evaluate runs/demo --data runs/demo/data --out metrics.json")
    _add_checkpoint(parser)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="data set; its format is recognised")
    parser.add_argument("--split", default="", metavar="NAME", help="split (the one of the recipe, mostly val)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the metrics as JSON, values in 0..1")
    parser.add_argument("--submission", type=Path, metavar="DIR", help="also write the benchmark's own result files")
    _add_orientation(parser, default=" (as saved)")
    _add_tiles(parser)
    _add_device(parser)
    args = parser.parse_all(words)

    from cascade_rcnn.evaluate import run_evaluate

    run_evaluate(
        args.checkpoint,
        data=args.data,
        split=args.split,
        orientation=args.orientation,
        out=args.out,
        submission=args.submission,
        device=args.device,
        inference=_inference(args),
    )


def _analyze(words: Sequence[str]) -> None:
    parser = _parser("analyze", "cascade-rcnn analyze runs/demo --data runs/demo/data --out report")
    parser.add_argument(
        "checkpoints", nargs="*", type=Path, metavar="CHECKPOINT", help="one, or two to be compared; as for evaluate"
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="data set; its format is recognised")
    parser.add_argument("--split", default="", metavar="NAME", help="split (the one of the recipe, mostly val)")
    parser.add_argument("--results", type=Path, metavar="FILE", help="instead: COCO results of any detector")
    parser.add_argument("--truth", type=Path, metavar="FILE", help="and the COCO annotations they are held against")
    parser.add_argument("--images", type=Path, metavar="DIR", help="and the folder of the pictures, to show some")
    parser.add_argument("--out", type=Path, default=Path("report"), metavar="DIR", help="folder (report)")
    parser.add_argument(
        "--at-precision", type=_probability, metavar="P", help="show thresholds for this precision (0.9)"
    )
    parser.add_argument("--at-recall", type=_probability, metavar="R", help="show thresholds for this recall (0.9)")
    parser.add_argument(
        "--set-thresholds", nargs="?", const="", metavar="FILE",
        help="write the threshold of each class into the checkpoint, or into a copy FILE: of the best F1, or of "
        "--at-precision or --at-recall where given",
    )  # fmt: skip
    parser.add_argument("--resamples", type=_whole_number, default=200, metavar="N", help="for intervals (200)")
    _add_device(parser)
    args = parser.parse_all(words)
    by_model, by_file = bool(args.checkpoints or args.data), bool(args.results or args.truth)
    whole = args.checkpoints and args.data if by_model else args.results and args.truth
    if by_model == by_file or not whole or len(args.checkpoints) > 2:
        parser.error("give one or two CHECKPOINTs and --data DIR, or --results FILE and --truth FILE")
    if args.at_precision is not None and args.at_recall is not None and args.set_thresholds is not None:
        parser.error("--set-thresholds takes the threshold of --at-precision or of --at-recall: give one of them")
    if by_file and args.set_thresholds is not None:
        parser.error("--set-thresholds needs a CHECKPOINT to write into")

    from cascade_rcnn.analysis.measure import Wanted
    from cascade_rcnn.analyze import run_analyze, run_analyze_results

    by = "recall" if args.at_recall is not None else "f1" if args.at_precision is None else "precision"
    precision = 0.9 if args.at_precision is None else args.at_precision
    wanted = Wanted(precision, 0.9 if args.at_recall is None else args.at_recall, by, args.resamples)
    if by_file:
        run_analyze_results(args.results, args.truth, images=args.images, out=args.out, wanted=wanted)
        return
    run_analyze(
        args.checkpoints,
        data=args.data,
        split=args.split,
        out=args.out,
        wanted=wanted,
        device=args.device,
        inference=_inference(args),
        set_thresholds=args.set_thresholds,
    )


def _predict(words: Sequence[str]) -> None:
    parser = _parser("predict", "cascade-rcnn predict runs/demo street.jpg photos/ --out found --score 0.5")
    _add_checkpoint(parser)
    parser.add_argument("inputs", nargs="*", metavar="IMAGE|FOLDER|VIDEO", help="what to look at")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("predictions"),
        metavar="DIR",
        help="folder for the drawings and predictions.json (predictions)",
    )
    parser.add_argument(
        "--score",
        type=_probability,
        metavar="S",
        help="draw detections (and write them with --as) from this score on; predictions.json has all "
        "(0.3; a checkpoint with thresholds of its own: all)",
    )
    parser.add_argument("--no-draw", action="store_true", help="no drawings")
    _add_outputs(parser)
    _add_tiles(parser)
    _add_device(parser)
    args = parser.parse_all(words)
    if not args.inputs:
        parser.error(
            f"no images given: expected CHECKPOINT IMAGE..., got only {str(args.checkpoint)!r}: "
            "give a checkpoint or run folder first, then images"
        )

    if importlib.util.find_spec("torch") is None:
        _predict_without_torch(args)
        return
    from cascade_rcnn.predict import Outputs, run_predict

    run_predict(
        args.checkpoint,
        args.inputs,
        out=args.out,
        score=args.score,
        draw=not args.no_draw,
        device=args.device,
        inference=_inference(args),
        shard=args.shard,
        outputs=Outputs(
            polygons=args.polygons,
            as_dataset=args.as_dataset,
            copy_images=args.copy_images,
            images_from=args.images_from,
            submission=(args.format, args.submission) if args.submission else None,
        ),
    )


def _predict_without_torch(args: argparse.Namespace) -> None:
    """Exported networks need no torch for images; what does is refused before anything is read."""
    given = {"--as": args.as_dataset, "--images-from": args.images_from, "--shard": args.shard, "--tile": args.tile}
    given |= {"--submission": args.submission, "--compile": args.compile}
    if needing := [option for option, value in given.items() if value]:
        raise UserError(f"{needing[0]} needs PyTorch, which is not installed: pip install cascade-rcnn")
    from cascade_rcnn.predict_without_torch import run_predict_without_torch

    names = ("score_threshold", "max_detections", "max_pixels", "range", "device", "precision")
    run_predict_without_torch(
        args.checkpoint,
        args.inputs,
        out=args.out,
        score=args.score,
        draw=not args.no_draw,
        polygons=args.polygons,
        batch_size=args.batch_size,
        settings={name: getattr(args, name) for name in names} | {"stop_after_stage": args.stages},
    )


def _add_outputs(parser: _Parser) -> None:
    parser.add_argument("--polygons", action="store_true", help="masks in predictions.json as polygons, not RLE")
    parser.add_argument(
        "--as",
        dest="as_dataset",
        default="",
        choices=("coco", "yolo", "labelme", "label-studio"),
        help="also write what was found as a data set, to correct it or train on it",
    )
    parser.add_argument("--copy-images", action="store_true", help="copy the images into it, instead of linking them")
    parser.add_argument(
        "--images-from", type=Path, metavar="FILE", help="json that lists the images with their ids, for image_id"
    )
    parser.add_argument("--shard", default="", metavar="I/N", help="look at every N-th image only, from the I-th on")
    parser.add_argument("--submission", type=Path, metavar="DIR", help="also write a benchmark's own result files")
    parser.add_argument(
        "--format",
        default="coco",
        choices=FORMATS,
        help="format of --submission (coco)",
    )


def _score(words: Sequence[str]) -> None:
    parser = _parser("score", "cascade-rcnn score --format coco --truth instances_val2017.json --results mine.json")
    parser.add_argument(
        "--format",
        required=True,
        choices=FORMATS,
        help="whose protocol and whose files",
    )
    parser.add_argument(
        "--truth",
        type=Path,
        required=True,
        metavar="T",
        help="coco: instances json; voc: year folder; kitti: label_2; citypersons: val_gt.json or "
        "anno_val.mat; widerface: folder of the .mat files",
    )
    parser.add_argument(
        "--results", type=Path, required=True, metavar="R", help="results in the benchmark's own submission format"
    )
    parser.add_argument("--split", default="test", help="voc: the list in ImageSets/Main (test)")
    parser.add_argument("--iou", type=_probability, default=0.5, help="voc: overlap that counts as found (0.5)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the metrics as JSON, values in 0..1")
    args = parser.parse_all(words)

    from cascade_rcnn.score import run_score

    run_score(format=args.format, truth=args.truth, results=args.results, split=args.split, iou=args.iou, out=args.out)


def _check(words: Sequence[str]) -> int:
    parser = _parser("check", "cascade-rcnn check my_images --draw 16 --out report")
    parser.add_argument("data", type=Path, metavar="DATA", help="folder of the data set")
    parser.add_argument("--fix", type=Path, metavar="OUT", help="write a repaired copy of the annotations there")
    parser.add_argument("--draw", type=_whole_number, default=0, metavar="N", help="draw a sheet of N samples")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the sheet and the report as JSON")
    parser.add_argument(
        "--config",
        metavar="NAME",
        help="recipe whose input scale and anchors objects are measured against (the defaults), or that --folds train",
    )
    _add_orientation(parser)
    parser.add_argument("--range", type=_range, metavar="LOW HIGH", help=_RANGE_HELP)
    parser.add_argument("--model", type=Path, metavar="CHECKPOINT", help="rank the annotations that it takes for wrong")
    parser.add_argument(
        "--folds",
        type=_whole_number,
        default=0,
        metavar="N",
        help="the same by N small models, none of which has seen the images that it judges",
    )
    parser.add_argument("--device", default="auto", metavar="D", help="for --model and --folds: cpu, cuda (auto)")
    args = parser.parse_all(words)
    if args.model or args.folds:
        _check_labels(parser, args)
        return 0
    recipe = load_config(args.config) if args.config else Config()
    said = {"orientation": args.orientation, "range": args.range}
    data = dataclasses.replace(recipe.data, **{name: value for name, value in said.items() if value is not None})
    recipe = dataclasses.replace(recipe, data=data)

    from cascade_rcnn.check.dataset import run_check

    return run_check(args.data, fix=args.fix, draw=args.draw, out=args.out, recipe=recipe)


def _check_labels(parser: _Parser, args: argparse.Namespace) -> None:
    if args.fix or args.draw:
        parser.error(f"{'--fix' if args.fix else '--draw'} belongs to the check without --model and --folds")

    from cascade_rcnn.labels.command import LabelCheck, run_label_check

    settings = LabelCheck(
        model=args.model,
        folds=args.folds,
        recipe=load_config(args.config) if args.config else None,
        out=args.out or Path("label_errors"),
        orientation=args.orientation,
        range=args.range,
        device=args.device,
    )
    run_label_check(args.data, settings)


def _serve(words: Sequence[str]) -> None:
    from cascade_rcnn.serve.settings import API_KEY, ServeSettings

    usual = ServeSettings()
    parser = _parser("serve", "cascade-rcnn serve runs/demo --port 8000")
    _add_checkpoint(parser)
    parser.add_argument("--host", default="127.0.0.1", metavar="H", help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=_whole_number, default=8000, metavar="P", help="(%(default)s)")
    for option, type_, default, unit, meaning in (
        ("--max-batch", _whole_number, usual.max_batch, "N", "images at once"),
        ("--max-delay", float, 1000 * usual.max_delay, "MS", "milliseconds to wait for a batch to fill"),
        ("--max-queue", _whole_number, usual.max_queue, "N", "images that may wait; beyond it 429"),
        ("--max-mb", _whole_number, usual.max_bytes // 1_000_000, "MB", "megabytes of a request"),
        ("--max-megapixels", _whole_number, usual.max_pixels // 1_000_000, "MP", "megapixels of an image"),
        ("--timeout", float, usual.timeout, "S", "seconds until 504"),
    ):
        parser.add_argument(option, type=type_, default=default, metavar=unit, help=f"{meaning} (%(default)s)")
    parser.add_argument("--allow-urls", action="store_true", help="also fetch images from public addresses")
    parser.add_argument(
        "--label-studio", default="", metavar="URL", help="be a model of the Label Studio at this address"
    )
    _add_device(parser)
    args = parser.parse_all(words)

    from cascade_rcnn.serve.command import run_serve

    settings = ServeSettings(
        max_batch=args.max_batch,
        max_delay=args.max_delay / 1000,
        max_queue=args.max_queue,
        max_bytes=args.max_mb * 1_000_000,
        max_pixels=args.max_megapixels * 1_000_000,
        timeout=args.timeout,
        allow_urls=args.allow_urls,
        label_studio=args.label_studio,
        label_studio_key=os.environ.get("LABEL_STUDIO_API_KEY", ""),
        api_key=os.environ.get(API_KEY, ""),
    )
    run_serve(
        args.checkpoint,
        host=args.host,
        port=args.port,
        device=args.device,
        inference=_inference(args),
        settings=settings,
    )


def _models(words: Sequence[str]) -> None:
    parser = _parser("models", "cascade-rcnn models cascade r50")
    parser.add_argument("words", nargs="*", metavar="WORD", help="list only names with these words in them")
    parser.add_argument("--json", action="store_true", help="as JSON, with addresses, sources and what is missing")
    parser.add_argument(
        "--cache", nargs="?", const="show", choices=("show", "clear"), help="the weights on this machine"
    )
    args = parser.parse_all(words)

    from cascade_rcnn.zoo.command import run_models

    run_models(args.words, as_json=args.json, cache=args.cache or "")


def _convert(words: Sequence[str]) -> None:
    parser = _parser("convert", "cascade-rcnn convert cascade_rcnn_r50_fpn_1x.pth r50.safetensors")
    parser.add_argument("source", type=Path, metavar="SOURCE", help="mmdetection, detectron2, torchvision, Detectron")
    parser.add_argument("dest", type=Path, metavar="DEST.safetensors", help="checkpoint to write")
    parser.add_argument("--config", metavar="NAME", help="recipe, where the weights do not say enough")
    parser.add_argument(
        "--classes", nargs="+", default=(), metavar="C", help="class names, in the order of the outputs"
    )
    parser.add_argument(
        "--classes-from", type=Path, metavar="FILE", help="class names: .txt, COCO's json, data.yaml or a checkpoint"
    )
    parser.add_argument(
        "--weight-standardization", action="store_true", help="mmdetection's GN+WS, where the file does not say so"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace DEST where it holds something else")
    args = parser.parse_all(words)

    from cascade_rcnn.convert.checkpoint import run_convert

    run_convert(
        args.source,
        args.dest,
        config=args.config,
        classes=args.classes,
        classes_from=args.classes_from,
        weight_standardization=args.weight_standardization,
        overwrite=args.overwrite,
    )


def _convert_data(words: Sequence[str]) -> int:
    parser = _parser("convert-data", "cascade-rcnn convert-data VOCdevkit my_coco --to coco")
    parser.add_argument("source", type=Path, metavar="SRC", help="data set; its format is recognised")
    parser.add_argument("dest", type=Path, metavar="DST", help="folder to write")
    parser.add_argument("--to", required=True, choices=("coco", "voc", "yolo", "labelme"), help="format to write")
    _add_orientation(parser)
    args = parser.parse_all(words)

    from cascade_rcnn.check.dataset import refuse_misread
    from cascade_rcnn.data.formats.convert import run_convert_data

    orientation: Any = args.orientation or "auto"
    return run_convert_data(args.source, args.dest, to=args.to, orientation=orientation, refuse=refuse_misread)


def _export(words: Sequence[str]) -> None:
    settings, words = _split_settings(words)
    parser = _parser("export", "cascade-rcnn export runs/demo --to onnx --data runs/demo/data")
    _add_checkpoint(parser)
    parser.add_argument("--to", required=True, choices=("onnx", "openvino", "torch"), help="format to write")
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--size", type=_whole_number, nargs=2, metavar=("H", "W"), help="the only size of the network's input"
    )
    size.add_argument("--dynamic", action="store_true", help="images of any size (the default)")
    parser.add_argument("--batch", type=_whole_number, metavar="N", help="the only number of images at once")
    parser.add_argument("--int8", type=Path, metavar="IMAGES", help="8-bit integers, calibrated on a folder of images")
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="data set: compare on its images, and measure the AP of both"
    )
    parser.add_argument("--split", default="", metavar="NAME", help="of the data set; default: the one for validation")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to write; default: beside the checkpoint")
    args = parser.parse_all(words)

    from cascade_rcnn.export.command import run_export

    run_export(
        args.checkpoint,
        to=args.to,
        out=args.out,
        size=None if args.size is None else (args.size[0], args.size[1]),
        batch=args.batch,
        int8=args.int8,
        data=args.data,
        split=args.split,
        settings=settings,
    )


def _config(words: Sequence[str]) -> None:
    settings, words = _split_settings(words)
    parser = _parser("config", "cascade-rcnn config finetune --train.lr 0.01 > my_recipe.py")
    parser.add_argument(
        "name",
        nargs="?",
        metavar="NAME|FILE",
        help="recipe, run or checkpoint; without one, lists the names of the recipes",
    )
    parser.add_argument("--json", action="store_true", help="as JSON instead of a recipe file in Python")
    parser.add_argument(
        "--from-mmdet", metavar="FILE", help="a config of mmdetection (.py) as a recipe; nothing in it is run"
    )
    args, unknown = parser.parse_known_args(words)
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
    if Path(args.name).suffix == ".safetensors":
        from cascade_rcnn.checkpoint import load_checkpoint

        config = load_checkpoint(args.name).config
    else:
        config = load_config(args.name)
    config = apply_overrides(config, settings + unknown)
    print(_as_json(config) if args.json else config_to_python(config), end="")


def _config_from_mmdet(path: str, settings: Sequence[str], *, as_json: bool) -> None:
    from cascade_rcnn.convert.mmdet_config import recipe_from_mmdetection

    recipe = recipe_from_mmdetection(path)
    recipe.config = apply_overrides(recipe.config, settings)
    for line in recipe.report():
        print(line, file=sys.stderr)
    print(_as_json(recipe.config) if as_json else recipe.to_python(), end="")


def _benchmark(words: Sequence[str]) -> None:
    parser = _parser("benchmark", "cascade-rcnn benchmark --size 800 1088 --batch 1")
    parser.add_argument("--config", default="cascade_rcnn_r50_fpn_1x_coco", metavar="NAME", help="recipe to measure")
    parser.add_argument(
        "--size", type=_whole_number, nargs=2, default=(800, 1088), metavar=("H", "W"), help="(800 1088)"
    )
    parser.add_argument("--batch", type=_whole_number, default=1, metavar="N", help="images at once (1)")
    parser.add_argument("--device", default="auto", metavar="D", help="cpu, cuda, cuda:1 (auto)")
    parser.add_argument("--train", action="store_true", help="measure training steps instead of prediction")
    parser.add_argument("--compile", action="store_true", help="also measure with torch.compile")
    parser.add_argument(
        "--runtimes", action="store_true", help="also measure ONNX Runtime and OpenVINO, those that are installed"
    )
    parser.add_argument("--rounds", type=_whole_number, default=0, metavar="N", help="(5, on a GPU 20)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="also measure reading this data set")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table as JSON")
    args = parser.parse_all(words)

    from cascade_rcnn.benchmark.run import Also, run_benchmark

    also: set[Also] = set()
    if args.compile:
        also.add("compiled")
    if args.runtimes:
        also.add("runtimes")
    run_benchmark(
        config=args.config,
        size=tuple(args.size),
        batch=args.batch,
        device=args.device,
        train=args.train,
        also=also,
        rounds=args.rounds,
        data=args.data,
        out=args.out,
    )


class _Command(NamedTuple):
    run: Callable[[Sequence[str]], int | None]
    summary: str
    details: str = ""


COMMANDS: dict[str, _Command] = {
    "demo": _Command(_demo, "Makes a small data set, trains, evaluates, predicts and draws: minutes on a laptop."),
    "train": _Command(
        _train,
        "Trains a recipe on your data.",
        "The data are checked first. Everything goes to the run folder: best.safetensors,\n"
        "last.safetensors, log.jsonl, metrics.jsonl, config.json, and images/ with what the network\n"
        "sees and finds. --out RUN --resume continues a stopped run.\n"
        "On several GPUs: torchrun --nproc-per-node 8 -m cascade_rcnn train CONFIG ...",
    ),
    "evaluate": _Command(_evaluate, "Measures a checkpoint on a data set by the data set's own metrics."),
    "analyze": _Command(
        _analyze,
        "Shows where a detector fails and which threshold to take: report.html.",
        "With a checkpoint, stage by stage; or from any detector's COCO results.\n"
        "Needs pip install 'cascade-rcnn[plots]'.",
    ),
    "predict": _Command(_predict, "Finds objects in images, folders or videos: drawings and predictions.json."),
    "score": _Command(_score, "Scores a results file by a benchmark's official protocol; needs no model."),
    "check": _Command(
        _check,
        "Finds what would ruin a training on this data set, before it starts.",
        "Exit code 1 when errors were found; warnings and notes alone give 0.\n"
        "With --model or --folds instead: which labels are probably wrong, as tables, a sheet of pictures and files\n"
        "for CVAT and Label Studio in --out (label_errors). The data set is only read.",
    ),
    "serve": _Command(
        _serve,
        "Serves a checkpoint over HTTP, with a page to try it.",
        "POST /predict takes pictures, / is a page for the browser, /metrics is for Prometheus. Clients must send\n"
        "a key where CASCADE_RCNN_API_KEY is set. Needs pip install 'cascade-rcnn[serve]'.",
    ),
    "export": _Command(
        _export,
        "Writes a checkpoint's network for ONNX Runtime, OpenVINO or torch.export, compared with PyTorch.",
        "The folder (model.onnx, model.xml or model.pt2, and report.json) is taken wherever a checkpoint is.\n"
        "Test-time settings such as --model.max-detections 300 become the network's own.\n"
        "Needs pip install 'cascade-rcnn[onnx]' or 'cascade-rcnn[openvino]', --int8 needs 'cascade-rcnn[int8]'.",
    ),
    "models": _Command(
        _models,
        "Lists published weights by name; a name is taken wherever a checkpoint is.",
        "The first use of a name downloads and converts the weights. CASCADE_RCNN_CACHE names the folder\n"
        "that keeps them, CASCADE_RCNN_MIRROR another host or a folder to fetch them from.",
    ),
    "convert": _Command(
        _convert,
        "Converts a checkpoint of another library.",
        "What it is and how its network was built is read from the weights; no code in it is run.",
    ),
    "convert-data": _Command(_convert_data, "Converts a data set to COCO, VOC, YOLO or labelme."),
    "config": _Command(_config, "Prints a recipe with all its settings, or lists all recipes."),
    "benchmark": _Command(_benchmark, "Shows where the time goes, beside torchvision and the machine's own limit."),
}


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    words = sys.argv[1:] if words is None else words
    _let_waiting_threads_sleep()
    try:
        code = _dispatch(words)
        sys.stdout.flush()
    except UserError as error:
        _print_error(error)
        return EXIT_USER_ERROR
    except ImportError as error:
        if importlib.util.find_spec("torch") is not None:
            raise
        what = f"{words[0]!r} needs PyTorch and the packages beside it ({error.name} is missing)"
        _print_error(UserError(f"{what}: pip install cascade-rcnn; without it, 'predict' runs exported networks"))
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # What is still buffered goes nowhere, or Python would complain about the same pipe at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    return code


def _let_waiting_threads_sleep() -> None:
    """On a machine that others use, threads sleep while they wait: those that spin take the cores from each other.

    Why the load decides: beside another training, spinning is nine times slower; alone, sleeping costs a fifth
    (benchmarks/NOTES.md). Read by OpenMP when torch is imported; whoever sets one of the variables decides.
    """
    if (
        not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ)
        and hasattr(os, "getloadavg")
        and os.getloadavg()[0] > 0.5 * (os.cpu_count() or 1)
    ):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def _dispatch(words: Sequence[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if words[0] in ("-V", "--version"):
        print(f"cascade-rcnn {__version__}")
        return 0
    if words[0] not in COMMANDS:
        matches = difflib.get_close_matches(words[0], COMMANDS, n=1)
        hint = f", did you mean {matches[0]}?" if matches else f"; there are {', '.join(COMMANDS)}"
        raise _UsageError(f"no command {words[0]!r}{hint}")
    try:
        return COMMANDS[words[0]].run(words[1:]) or 0
    except SystemExit as stop:  # argparse ends --help this way; the engine a run that was stopped by a signal
        return stop.code if isinstance(stop.code, int) else 0


def _overview() -> str:
    lines = ["Cascade R-CNN for today's PyTorch.", "", "usage: cascade-rcnn COMMAND ...", ""]
    lines += [f"  {name:<13} {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join([*lines, "", "'cascade-rcnn COMMAND --help' tells more. Begin with: cascade-rcnn demo"])


def _print_error(error: UserError) -> None:
    """One line on stderr; of the processes of torchrun only the first one reports what all of them saw."""
    rank = int(os.environ.get("RANK", "0"))
    message = one_line(error)
    if rank == 0:
        print(f"error: {message}", file=sys.stderr)
    elif not isinstance(error, (ConfigError, _UsageError)):
        print(f"error (rank {rank}): {message}", file=sys.stderr)


def _parser(command: str, example: str) -> _Parser:
    entry = COMMANDS[command]
    description = f"{entry.summary}\n\n{entry.details}" if entry.details else entry.summary
    return _Parser(f"cascade-rcnn {command}", description, example)


def _add_checkpoint(parser: _Parser) -> None:
    parser.add_argument(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help=".safetensors file, the folder of a run, or a name of 'cascade-rcnn models'",
    )


def _add_device(parser: _Parser) -> None:
    parser.add_argument("--device", default="auto", metavar="D", help="cpu, cuda, cuda:1 (auto: a GPU if there is one)")
    parser.add_argument("--batch-size", type=_whole_number, default=1, metavar="N", help="images at once (1)")
    parser.add_argument(
        "--precision",
        default="auto",
        choices=("auto", "fp32", "tf32", "bf16"),
        help="precision of convolutions and matmuls (auto: tf32 on NVIDIA GPUs that have it, else fp32; bf16 also pays "
        "on CPUs with AVX-512 BF16 or AMX)",
    )
    parser.add_argument(
        "--score-threshold",
        type=_probability,
        metavar="S",
        help="minimum score (default: the checkpoint's, usually 0.05)",
    )
    parser.add_argument(
        "--max-detections",
        type=_whole_number,
        metavar="N",
        help="at most N per image, or tile (default: the checkpoint's, usually 100)",
    )
    parser.add_argument(
        "--stages", type=_whole_number, metavar="N", help="use the first N stages of the cascade only (all)"
    )
    parser.add_argument("--range", type=_range, metavar="LOW HIGH", help=_RANGE_HELP + " (as saved)")
    parser.add_argument(
        "--max-pixels",
        type=_whole_number,
        metavar="N",
        help="decode images of at most N pixels (default: the checkpoint's, usually 100000000)",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile: a minute for each of a few sizes, kept on disk; pays for many images",
    )


def _add_tiles(parser: _Parser) -> None:
    parser.add_argument(
        "--tile", type=_whole_number, metavar="N", help="look at tiles of N pixels a side; for pictures of any size"
    )
    parser.add_argument(
        "--overlap", type=_number, metavar="S", help="with --tile: of neighbours, as a share of their side (0.2)"
    )
    parser.add_argument(
        "--whole",
        action=argparse.BooleanOptionalAction,
        help="with --tile: look at the shrunk picture too, for objects larger than the overlap (yes)",
    )
    parser.add_argument(
        "--max-merged", type=_whole_number, metavar="N", help="with --tile: at most N objects of a picture (all)"
    )


def _tiling(args: argparse.Namespace) -> Tiling | None:
    """What the words about tiles say; None where the command has none or nobody asks for tiles."""
    given = {name: getattr(args, name, None) for name in ("tile", "overlap", "whole", "max_merged")}
    said = {name: value for name, value in given.items() if value is not None}
    if said and "tile" not in said:
        name = next(iter(said))
        option = "--no-whole" if said[name] is False else f"--{name.replace('_', '-')}"
        raise _UsageError(f"{option} is about tiles: add --tile 1024")
    if not said:
        return None
    from cascade_rcnn.inference.tiles import Tiling

    return Tiling(**said)


def _inference(args: argparse.Namespace) -> Inference:
    from cascade_rcnn.inference.run_model import Inference

    return Inference(
        batch_size=args.batch_size,
        precision=args.precision,
        compile=args.compile,
        stages=args.stages,
        score_threshold=args.score_threshold,
        max_detections=args.max_detections,
        max_pixels=args.max_pixels,
        range=args.range,
        tiling=_tiling(args),
    )


_RANGE_HELP = "levels of 16-bit and float pictures that become black and white, in quotes; or dtype, or percentile"


def _range(text: str) -> str:
    try:
        pixel_range(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _add_orientation(parser: _Parser, *, default: str = "") -> None:
    parser.add_argument(
        "--orientation",
        choices=("auto", "stored", "upright"),
        help="what labels count of pictures with an orientation tag where their size does not say" + default,
    )


def _whole_number(word: str) -> int:
    with contextlib.suppress(ValueError):
        if (value := int(word)) >= 1:
            return value
    raise argparse.ArgumentTypeError(f"{word!r} is not a whole number of at least 1")


def _number(word: str) -> float:
    with contextlib.suppress(ValueError):
        return float(word)
    raise argparse.ArgumentTypeError(f"{word!r} is not a number")


def _probability(word: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= (value := float(word)) <= 1:
            return value
    raise argparse.ArgumentTypeError(f"{word!r} is not a number between 0 and 1")


def _split_settings(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Part ``--key.sub value ...`` from the command's own words; the values of a setting run to the next option."""
    settings: list[str] = []
    others: list[str] = []
    target = others
    for word in words:
        if word.startswith("--") or word == "-h":
            target = settings if "." in word.partition("=")[0] else others
        target.append(word)
    return settings, others


def _as_json(config: Config) -> str:
    import json

    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"
