"""What the commands share: the parser, options that several take, and the types of their values."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from cascade_rcnn.config import Config, pixel_range
from cascade_rcnn.errors import ConfigError, UserError

if TYPE_CHECKING:
    from cascade_rcnn.inference.run_model import Inference
    from cascade_rcnn.inference.tiles import Tiling


class UsageError(UserError):
    """Words on the command line that do not fit the command."""


class Parser(argparse.ArgumentParser):
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
        raise UsageError(f"{message} (see '{self.prog} --help')")

    def parse_all(self, words: Sequence[str]) -> argparse.Namespace:
        """Parse, and name the closest option, or checkpoint, where one is not known."""
        namespace, unknown = self.parse_known_args(words)
        if unknown:
            closest = self._closest(unknown[0])
            hint = f", did you mean {closest}?" if closest else ""
            self.error(f"unexpected argument {unknown[0]!r}{hint}")
        given = vars(namespace)
        if given.get("inputs") == []:
            return namespace  # the command says what is missing: the only word may be an image
        for word in (given.get("checkpoint"), given.get("model"), *given.get("checkpoints", ())):
            if word is not None:
                refuse_unknown_name(word)
        return namespace

    def parse_with_settings(self, words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """Parse, with the words left over, which may be settings of a recipe.

        An option that is misspelt is named here: its value would be taken for the recipe, which is then run.
        """
        namespace, unknown = self.parse_known_args(words)
        settings = {field.name for field in dataclasses.fields(Config)}
        for word in unknown:
            name = word.partition("=")[0]
            is_setting = not name.startswith("--") or name[2:] in settings
            closest = "" if is_setting else self._closest(name, alike=0.8)
            if closest:
                self.error(f"unexpected argument {word!r}, did you mean {closest}?")
        return namespace, unknown

    def _closest(self, word: str, *, alike: float = 0.6) -> str:
        """The option most like ``word``; empty where none is."""
        known = [option for action in self._actions for option in action.option_strings]
        return next(iter(difflib.get_close_matches(word.partition("=")[0], known, n=1, cutoff=alike)), "")


def add_checkpoint(parser: Parser) -> None:
    parser.add_argument(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help=".safetensors file, the folder of a run, or a name of 'cascade-rcnn models'",
    )


def refuse_unknown_name(word: str | Path) -> None:
    """What is no file and no name of the list is refused here, before torch is imported, which takes seconds."""
    from cascade_rcnn.zoo.catalog import find_loadable
    from cascade_rcnn.zoo.store import is_name

    if is_name(word):
        find_loadable(Path(word).as_posix())


def add_device(parser: Parser) -> None:
    parser.add_argument("--device", default="auto", metavar="D", help="cpu, cuda, cuda:1 (auto: a GPU if there is one)")
    parser.add_argument("--batch-size", type=whole_number, default=1, metavar="N", help="images at once (1)")
    parser.add_argument(
        "--precision",
        default="auto",
        choices=("auto", "fp32", "tf32", "bf16"),
        help="precision of convolutions and matmuls (auto: tf32 on NVIDIA GPUs that have it, else fp32; bf16 also pays "
        "on CPUs with AVX-512 BF16 or AMX)",
    )
    parser.add_argument(
        "--score-threshold",
        type=probability,
        metavar="S",
        help="minimum score (default: the checkpoint's, usually 0.05)",
    )
    parser.add_argument(
        "--max-detections",
        type=whole_number,
        metavar="N",
        help="at most N per image, or tile (default: the checkpoint's, usually 100)",
    )
    parser.add_argument(
        "--stages",
        type=_stages,
        metavar="N|auto",
        help="use the first N stages of the cascade only (all); auto: on a CPU, hopeless proposals leave after a stage",
    )
    parser.add_argument("--range", type=range_of_levels, metavar="LOW HIGH", help=RANGE_HELP + " (as saved)")
    parser.add_argument(
        "--max-pixels",
        type=whole_number,
        metavar="N",
        help="decode images of at most N pixels (default: the checkpoint's, usually 100000000)",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile: a minute for each of a few sizes, kept on disk; pays for many images",
    )


def add_tiles(parser: Parser) -> None:
    parser.add_argument(
        "--tile", type=whole_number, metavar="N", help="look at tiles of N pixels a side; for pictures of any size"
    )
    parser.add_argument(
        "--overlap", type=number, metavar="S", help="with --tile: of neighbours, as a share of their side (0.2)"
    )
    parser.add_argument(
        "--whole",
        action=argparse.BooleanOptionalAction,
        help="with --tile: look at the shrunk picture too, for objects larger than the overlap (yes)",
    )
    parser.add_argument(
        "--max-merged", type=whole_number, metavar="N", help="with --tile: at most N objects of a picture (all)"
    )


def _tiling(args: argparse.Namespace) -> Tiling | None:
    """What the words about tiles say; None where the command has none or nobody asks for tiles."""
    given = {name: getattr(args, name, None) for name in ("tile", "overlap", "whole", "max_merged")}
    said = {name: value for name, value in given.items() if value is not None}
    if said and "tile" not in said:
        name = next(iter(said))
        option = "--no-whole" if said[name] is False else f"--{name.replace('_', '-')}"
        raise UsageError(f"{option} is about tiles: add --tile 1024")
    if not said:
        return None
    from cascade_rcnn.inference.tiles import Tiling

    return Tiling(**said)


def inference_settings(args: argparse.Namespace) -> Inference:
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


RANGE_HELP = "levels of 16-bit and float pictures that become black and white, in quotes; or dtype, or percentile"


def range_of_levels(text: str) -> str:
    try:
        pixel_range(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def add_orientation(parser: Parser, *, default: str = "") -> None:
    parser.add_argument(
        "--orientation",
        choices=("auto", "stored", "upright"),
        help="what labels count of pictures with an orientation tag where their size does not say" + default,
    )


def whole_number(word: str) -> int:
    with contextlib.suppress(ValueError):
        if (value := int(word)) >= 1:
            return value
    raise argparse.ArgumentTypeError(f"{word!r} is not a whole number of at least 1")


def _stages(word: str) -> int | str:
    if word == "auto":
        return word
    with contextlib.suppress(ValueError):
        if (value := int(word)) >= 1:
            return value
    raise argparse.ArgumentTypeError(f"{word!r} is neither auto nor a whole number of at least 1")


def number(word: str) -> float:
    with contextlib.suppress(ValueError):
        return float(word)
    raise argparse.ArgumentTypeError(f"{word!r} is not a number")


def probability(word: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= (value := float(word)) <= 1:
            return value
    raise argparse.ArgumentTypeError(f"{word!r} is not a number between 0 and 1")


def split_settings(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Part ``--key.sub value ...`` from the command's own words; the values of a setting run to the next option."""
    settings: list[str] = []
    others: list[str] = []
    target = others
    for word in words:
        if word.startswith("--") or word == "-h":
            target = settings if "." in word.partition("=")[0] else others
        target.append(word)
    return settings, others


def load_recipe(name: str) -> Config:
    """``load_config``; published weights, of this name or one like it, get the way to start from them."""
    from cascade_rcnn.recipes import config_names, load_config

    try:
        return load_config(name)
    except ConfigError as error:
        from cascade_rcnn.zoo.catalog import cannot_load, find, nearest

        if Path(name).exists():
            raise
        entry = find(name)
        if entry is None:
            near = [other for other in nearest(name) if other not in config_names()] if Path(name).name == name else []
            if not near:
                raise
            hint = f"published weights are called {' or '.join(near)}; 'cascade-rcnn models' lists theirs"
            raise ConfigError(f"{error}; {hint}") from None
        if entry.missing:
            raise ConfigError(f"{name}: published weights, not a recipe, and {cannot_load(entry)}") from None
        raise ConfigError(f"{name}: published weights, not a recipe: {_way_to_train(name, entry.recipe)}") from None


def _way_to_train(name: str, recipe: str) -> str:
    if recipe:
        return (
            f"'cascade-rcnn train {recipe}' is the recipe of that training, with --train.init {name} it starts from "
            f"them; 'cascade-rcnn config {name}' prints it"
        )
    return (
        f"'cascade-rcnn config {name} > mine.py' writes the settings of their network, "
        f"'cascade-rcnn train mine.py --data DIR --train.init {name}' starts from them"
    )
