"""Commands for what comes from elsewhere: models, convert, convert-data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cascade_rcnn.cli.parser import Parser, add_orientation, refuse_unknown_name


def models(parser: Parser, words: Sequence[str]) -> None:
    parser.add_argument("words", nargs="*", metavar="WORD", help="list only names with these words in them")
    parser.add_argument("--json", action="store_true", help="as JSON, with addresses, sources and what is missing")
    parser.add_argument(
        "--cache",
        nargs="?",
        const="show",
        choices=("show", "clear"),
        help="the weights on this machine, of all names or of those with WORDs",
    )
    args = parser.parse_all(words)

    from cascade_rcnn.zoo.command import run_models

    run_models(args.words, as_json=args.json, cache=args.cache or "")


def convert(parser: Parser, words: Sequence[str]) -> None:
    parser.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="file of mmdetection, detectron2, torchvision or Detectron, or a name of 'cascade-rcnn models'",
    )
    parser.add_argument("dest", type=Path, metavar="DEST.safetensors", help="checkpoint to write")
    parser.add_argument("--config", metavar="NAME", help="recipe, where the weights do not say enough")
    parser.add_argument(
        "--classes", nargs="+", default=(), metavar="C", help="class names, in the order of the outputs"
    )
    parser.add_argument(
        "--classes-from",
        type=Path,
        metavar="FILE",
        help="class names: .txt, COCO's json, data.yaml or a checkpoint",
    )
    parser.add_argument(
        "--weight-standardization", action="store_true", help="mmdetection's GN+WS, where the file does not say so"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace DEST where it holds something else")
    args = parser.parse_all(words)
    refuse_unknown_name(args.source)

    from cascade_rcnn.convert.checkpoint import run_convert
    from cascade_rcnn.errors import CheckpointError
    from cascade_rcnn.runtime.network import exported_file
    from cascade_rcnn.zoo.store import fetched, resolve

    if exported_file(args.source) is not None:
        raise CheckpointError(f"{args.source}: is exported already; give the checkpoint that it was made from")
    with fetched(args.source) as source:
        run_convert(
            source,
            args.dest,
            config=args.config,
            classes=args.classes,
            classes_from=args.classes_from and resolve(args.classes_from),
            weight_standardization=args.weight_standardization,
            overwrite=args.overwrite,
        )


def convert_data(parser: Parser, words: Sequence[str]) -> int:
    parser.add_argument("source", type=Path, metavar="SRC", help="data set; its format is recognised")
    parser.add_argument("dest", type=Path, metavar="DST", help="folder to write")
    parser.add_argument("--to", required=True, choices=("coco", "voc", "yolo", "labelme"), help="format to write")
    add_orientation(parser)
    args = parser.parse_all(words)

    from cascade_rcnn.check.dataset import refuse_misread
    from cascade_rcnn.data.formats.convert import run_convert_data

    orientation: Any = args.orientation or "auto"
    return run_convert_data(args.source, args.dest, to=args.to, orientation=orientation, refuse=refuse_misread)
