"""Commands that use a trained detector: predict, serve, export."""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

from cascade_rcnn.cli.parser import (
    Parser,
    add_checkpoint,
    add_device,
    add_tiles,
    inference_settings,
    probability,
    split_settings,
    whole_number,
)
from cascade_rcnn.errors import UserError
from cascade_rcnn.score import FORMATS


def predict(parser: Parser, words: Sequence[str]) -> None:
    add_checkpoint(parser)
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
        type=probability,
        metavar="S",
        help="draw detections (and write them with --as) from this score on; predictions.json has all "
        "(0.3; a checkpoint with thresholds of its own: all)",
    )
    parser.add_argument("--no-draw", action="store_true", help="no drawings")
    _add_outputs(parser)
    add_tiles(parser)
    add_device(parser)
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
        inference=inference_settings(args),
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
    given["--submission"] = args.submission
    if args.compile:
        raise UserError("--compile: an exported network is not compiled by torch; drop --compile")
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


def _add_outputs(parser: Parser) -> None:
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


def serve(parser: Parser, words: Sequence[str]) -> None:
    from cascade_rcnn.serve.settings import API_KEY, ServeSettings

    usual = ServeSettings()
    add_checkpoint(parser)
    parser.add_argument("--host", default="127.0.0.1", metavar="H", help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=whole_number, default=8000, metavar="P", help="(%(default)s)")
    for option, type_, default, unit, meaning in (
        ("--max-batch", whole_number, usual.max_batch, "N", "images at once"),
        ("--max-delay", float, 1000 * usual.max_delay, "MS", "milliseconds to wait for a batch to fill"),
        ("--max-queue", whole_number, usual.max_queue, "N", "images that may wait; beyond it 429"),
        ("--max-mb", whole_number, usual.max_bytes // 1_000_000, "MB", "megabytes of a request"),
        ("--max-megapixels", whole_number, usual.max_pixels // 1_000_000, "MP", "megapixels of an image"),
        ("--timeout", float, usual.timeout, "S", "seconds until 504"),
    ):
        parser.add_argument(option, type=type_, default=default, metavar=unit, help=f"{meaning} (%(default)s)")
    parser.add_argument("--allow-urls", action="store_true", help="also fetch images from public addresses")
    parser.add_argument(
        "--label-studio", default="", metavar="URL", help="be a model of the Label Studio at this address"
    )
    add_device(parser)
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
        inference=inference_settings(args),
        settings=settings,
    )


def export(parser: Parser, words: Sequence[str]) -> None:
    settings, words = split_settings(words)
    add_checkpoint(parser)
    parser.add_argument("--to", required=True, choices=("onnx", "openvino", "torch"), help="format to write")
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--size", type=whole_number, nargs=2, metavar=("H", "W"), help="the only size of the network's input"
    )
    size.add_argument("--dynamic", action="store_true", help="images of any size (the default)")
    parser.add_argument("--batch", type=whole_number, metavar="N", help="the only number of images at once")
    parser.add_argument("--int8", type=Path, metavar="IMAGES", help="8-bit integers, calibrated on a folder of images")
    parser.add_argument(
        "--int8-images", type=whole_number, default=100, metavar="N", help="of that folder, at most (default: 100)"
    )
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="data set: compare on its images, and measure the AP of both"
    )
    parser.add_argument("--split", default="", metavar="NAME", help="of the data set; default: the one for validation")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to write; default: beside the checkpoint")
    args = parser.parse_all(words)

    from cascade_rcnn.export.command import Calibration, run_export

    run_export(
        args.checkpoint,
        to=args.to,
        out=args.out,
        size=None if args.size is None else (args.size[0], args.size[1]),
        batch=args.batch,
        int8=args.int8 and Calibration(args.int8, args.int8_images),
        data=args.data,
        split=args.split,
        settings=settings,
    )
