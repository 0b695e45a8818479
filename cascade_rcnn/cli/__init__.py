"""The command ``cascade-rcnn``: one function per command, in the files beside this one, each with its own arguments.

A mistake of the user ends with one line, ``error: what, which value, what to do``, and exit code 2, before anything is
written; a full disk and a name that is too long end so too. Ctrl-C ends quietly with 130. Anything else is a fault of
the program and shows its traceback.

Torch and timm are imported inside the commands: ``cascade-rcnn COMMAND --help`` answers at once.
"""

from __future__ import annotations

import difflib
import errno
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from cascade_rcnn import __version__
from cascade_rcnn.cli import convert, measure, predict, train
from cascade_rcnn.cli.parser import Parser, UsageError
from cascade_rcnn.errors import ConfigError, UserError
from cascade_rcnn.messages import one_line, printable

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE: the reader of our output has left


class Command(NamedTuple):
    """What a command runs with its parser and the words after its name, and what ``--help`` tells."""

    run: Callable[[Parser, Sequence[str]], int | None]
    example: str
    summary: str
    details: str = ""

    def parser(self, name: str) -> Parser:
        description = f"{self.summary}\n\n{self.details}" if self.details else self.summary
        return Parser(f"cascade-rcnn {name}", description, self.example)


COMMANDS: dict[str, Command] = {
    "demo": Command(
        train.demo,
        "cascade-rcnn demo --out runs/demo",
        "Makes a small data set, trains, evaluates, predicts and draws: minutes on a laptop.",
    ),
    "train": Command(
        train.train,
        "cascade-rcnn train finetune --data my_images --train.batch-size 4",
        "Trains a recipe on your data.",
        "The data are checked first. Everything goes to the run folder: best.safetensors,\n"
        "last.safetensors, log.jsonl, metrics.jsonl, config.json, and images/ with what the network\n"
        "sees and finds. --out RUN --resume continues a stopped run.\n"
        "On several GPUs: torchrun --nproc-per-node 8 -m cascade_rcnn train CONFIG ...",
    ),
    "evaluate": Command(
        measure.evaluate,
        "cascade-rcnn evaluate runs/demo --data runs/demo/data --out metrics.json",
        "Measures a checkpoint on a data set by the data set's own metrics.",
    ),
    "analyze": Command(
        measure.analyze,
        "cascade-rcnn analyze runs/demo --data runs/demo/data --out report",
        "Shows where a detector fails and which threshold to take: report.html.",
        "With a checkpoint, stage by stage; or from any detector's COCO results.\n"
        "Needs pip install 'cascade-rcnn[plots]'.",
    ),
    "compare": Command(
        measure.compare,
        "cascade-rcnn compare runs/a runs/b --out compare.html",
        "Shows runs beside each other: settings that differ, results, curves.",
        "Runs that were evaluated on different images are compared too, with a warning. The curves need\n"
        "pip install 'cascade-rcnn[plots]'.",
    ),
    "predict": Command(
        predict.predict,
        "cascade-rcnn predict runs/demo street.jpg photos/ --out found --score 0.5",
        "Finds objects in images, folders or videos: drawings and predictions.json.",
    ),
    "score": Command(
        measure.score,
        "cascade-rcnn score --format coco --truth instances_val2017.json --results mine.json",
        "Scores a results file by a benchmark's official protocol; needs no model.",
    ),
    "check": Command(
        train.check,
        "cascade-rcnn check my_images --draw 16 --out report",
        "Finds what would ruin a training on this data set, before it starts.",
        "Exit code 1 when errors were found; warnings and notes alone give 0.\n"
        "With --model or --folds instead: which labels are probably wrong, as tables, a sheet of pictures and files\n"
        "for CVAT and Label Studio in --out (label_errors). The data set is only read.",
    ),
    "serve": Command(
        predict.serve,
        "cascade-rcnn serve runs/demo --port 8000",
        "Serves a checkpoint over HTTP, with a page to try it.",
        "POST /predict takes pictures, / is a page for the browser, /metrics is for Prometheus. Clients must send\n"
        "a key where CASCADE_RCNN_API_KEY is set. Needs pip install 'cascade-rcnn[serve]'.",
    ),
    "export": Command(
        predict.export,
        "cascade-rcnn export runs/demo --to onnx --data runs/demo/data",
        "Writes a checkpoint's network for ONNX Runtime, OpenVINO or torch.export, compared with PyTorch.",
        "The folder (model.onnx, model.xml or model.pt2, and report.json) is taken wherever a checkpoint is.\n"
        "Test-time settings such as --model.max-detections 300 become the network's own.\n"
        "Needs pip install 'cascade-rcnn[onnx]' or 'cascade-rcnn[openvino]', --int8 needs 'cascade-rcnn[int8]'.",
    ),
    "models": Command(
        convert.models,
        "cascade-rcnn models cascade r50",
        "Lists published weights by name; a name is taken wherever a checkpoint is.",
        "The first use of a name downloads and converts the weights. CASCADE_RCNN_CACHE names the folder\n"
        "that keeps them, CASCADE_RCNN_MIRROR another host or a folder to fetch them from.",
    ),
    "convert": Command(
        convert.convert,
        "cascade-rcnn convert cascade_rcnn_r50_fpn_1x.pth r50.safetensors",
        "Converts a checkpoint of another library.",
        "What it is and how its network was built is read from the weights; no code in it is run.",
    ),
    "convert-data": Command(
        convert.convert_data,
        "cascade-rcnn convert-data VOCdevkit my_coco --to coco",
        "Converts a data set to COCO, VOC, YOLO or labelme.",
    ),
    "config": Command(
        train.config,
        "cascade-rcnn config finetune --train.lr 0.01 > my_recipe.py",
        "Prints a recipe with all its settings, or lists all recipes.",
    ),
    "benchmark": Command(
        measure.benchmark,
        "cascade-rcnn benchmark --size 800 1088 --batch 1",
        "Shows where the time goes, beside torchvision and the machine's own limit.",
    ),
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
        _print_error(_missing_package(words[0], str(error.name)))
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # What is still buffered goes nowhere, or Python would complain about the same pipe at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            _print_error(UserError(f"{printable(error.filename)[:80]}...: {one_line(error)}; give a shorter one"))
            return EXIT_USER_ERROR
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f"{printable(error.filename)}: " if error.filename else ""
        _print_error(UserError(f"{where}the disk that this is written to is full; free some of it, or choose another"))
        return EXIT_USER_ERROR
    return code


def _missing_package(command: str, module: str) -> UserError:
    """What to install where PyTorch is not: all that predicting from an exported network needs, or PyTorch too."""
    module = module.partition(".")[0]
    if package := {"PIL": "pillow", "numpy": "numpy"}.get(module):
        return UserError(f"the package {package} is missing: pip install {package}")
    what = f"{command!r} needs PyTorch and the packages beside it ({module} is missing)"
    return UserError(f"{what}: pip install cascade-rcnn; without it, 'predict' runs exported networks")


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
        raise UsageError(f"no command {words[0]!r}{hint}")
    _refuse_long_dashes(words)
    command = COMMANDS[words[0]]
    try:
        return command.run(command.parser(words[0]), words[1:]) or 0
    except SystemExit as stop:  # argparse ends --help this way; the engine a run that was stopped by a signal
        return stop.code if isinstance(stop.code, int) else 0


def _refuse_long_dashes(words: Sequence[str]) -> None:
    """Text programs and web pages turn two hyphens into one long dash, and copies of it are no options."""
    for word in words:
        if re.match(r"[\u2010-\u2015\u2212]+\w", word) and not os.path.lexists(word):
            option = "--" + word.lstrip("-\u2010\u2011\u2012\u2013\u2014\u2015\u2212")
            raise UsageError(f"{printable(word)} begins with a long dash instead of two hyphens: write {option}")


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
    elif not isinstance(error, (ConfigError, UsageError)):
        print(f"error (rank {rank}): {message}", file=sys.stderr)
