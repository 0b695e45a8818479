"""Commands that measure: evaluate, analyze, compare, score, benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cascade_rcnn.cli.parser import (
    Parser,
    add_checkpoint,
    add_device,
    add_orientation,
    add_tiles,
    inference_settings,
    load_recipe,
    probability,
    whole_number,
)
from cascade_rcnn.score import FORMATS


def evaluate(parser: Parser, words: Sequence[str]) -> None:
    add_checkpoint(parser)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="data set; its format is recognised")
    parser.add_argument("--split", default="", metavar="NAME", help="split (the one of the recipe, mostly val)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the metrics as JSON, values in 0..1")
    parser.add_argument("--submission", type=Path, metavar="DIR", help="also write the benchmark's own result files")
    add_orientation(parser, default=" (as saved)")
    add_tiles(parser)
    add_device(parser)
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
        inference=inference_settings(args),
    )


def analyze(parser: Parser, words: Sequence[str]) -> None:
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
        "--at-precision", type=probability, metavar="P", help="show thresholds for this precision (0.9)"
    )
    parser.add_argument("--at-recall", type=probability, metavar="R", help="show thresholds for this recall (0.9)")
    parser.add_argument(
        "--set-thresholds", nargs="?", const="", metavar="FILE",
        help="write the threshold of each class into the checkpoint, or into a copy FILE: of the best F1, or of "
        "--at-precision or --at-recall where given",
    )  # fmt: skip
    parser.add_argument("--resamples", type=whole_number, default=200, metavar="N", help="for intervals (200)")
    add_device(parser)
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
        inference=inference_settings(args),
        set_thresholds=args.set_thresholds,
    )


def compare(parser: Parser, words: Sequence[str]) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders, two or more")
    parser.add_argument(
        "--out", type=Path, default=Path("compare.html"), metavar="FILE", help="page with the curves (compare.html)"
    )
    args = parser.parse_all(words)
    if len(args.runs) < 2:
        parser.error(f"give two runs or more; {args.runs[0] / 'summary.html'} is about one")

    from cascade_rcnn.compare import run_compare

    run_compare(args.runs, out=args.out)


def score(parser: Parser, words: Sequence[str]) -> None:
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
    parser.add_argument("--iou", type=probability, default=0.5, help="voc: overlap that counts as found (0.5)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the metrics as JSON, values in 0..1")
    args = parser.parse_all(words)

    from cascade_rcnn.score import run_score

    run_score(format=args.format, truth=args.truth, results=args.results, split=args.split, iou=args.iou, out=args.out)


def benchmark(parser: Parser, words: Sequence[str]) -> None:
    parser.add_argument("--config", default="cascade_rcnn_r50_fpn_1x_coco", metavar="NAME", help="recipe to measure")
    parser.add_argument(
        "--size", type=whole_number, nargs=2, default=(800, 1088), metavar=("H", "W"), help="(800 1088)"
    )
    parser.add_argument("--batch", type=whole_number, default=1, metavar="N", help="images at once (1)")
    parser.add_argument("--device", default="auto", metavar="D", help="cpu, cuda, cuda:1 (auto)")
    parser.add_argument("--train", action="store_true", help="measure training steps instead of prediction")
    parser.add_argument("--compile", action="store_true", help="also measure with torch.compile")
    parser.add_argument(
        "--runtimes",
        action="store_true",
        help="also measure ONNX Runtime and OpenVINO, those installed, in float, bfloat16 and int8",
    )
    parser.add_argument("--rounds", type=whole_number, default=0, metavar="N", help="(5, on a GPU 20)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="also measure reading this data set")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table as JSON")
    args = parser.parse_all(words)
    load_recipe(args.config)

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
