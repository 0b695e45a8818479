"""The command line: help, wiring of each command to its function, exit codes, pipes."""

from __future__ import annotations

import contextlib
import errno
import importlib
import inspect
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import locations
from cascade_rcnn import cli, errors
from cascade_rcnn.checkpoint import save_checkpoint
from cascade_rcnn.cli import COMMANDS, main
from cascade_rcnn.config import Config
from cascade_rcnn.recipes import config_names, load_config

REPOSITORY = locations.REPOSITORY
FUNCTION_OF = {
    "demo": "demo.run_demo",
    "train": "train.run_train",
    "analyze": "analyze.run_analyze",
    "compare": "compare.run_compare",
    "evaluate": "evaluate.run_evaluate",
    "predict": "predict.run_predict",
    "score": "score.run_score",
    "check": "check.dataset.run_check",
    "convert": "convert.checkpoint.run_convert",
    "convert-data": "data.formats.convert.run_convert_data",
    "benchmark": "benchmark.run.run_benchmark",
    "serve": "serve.command.run_serve",
    "export": "export.command.run_export",
}
Call = tuple[str, dict[str, Any]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """Replace what the commands run; each call must fit the real function's signature and is written down."""
    made: list[Call] = []

    def recorder(command: str, real: Callable[..., Any]) -> Callable[..., int]:
        signature = inspect.signature(real)

        def record(*args: Any, **kwargs: Any) -> int:
            made.append((command, signature.bind(*args, **kwargs).arguments))
            return 0

        return record

    for command, path in (*FUNCTION_OF.items(), ("check", "labels.command.run_label_check")):
        module, _, function = f"cascade_rcnn.{path}".rpartition(".")
        holder = importlib.import_module(module)
        monkeypatch.setattr(holder, function, recorder(command, getattr(holder, function)))
    monkeypatch.setattr("cascade_rcnn.zoo.store.fetched", contextlib.nullcontext)  # what convert is given by name
    return made


def _examples() -> Iterator[str]:
    """The example of every command's help, and every whole cascade-rcnn line of README and docs."""
    for name in COMMANDS:
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown):
            main([name, "--help"])
        yield shown.getvalue().rpartition("example:\n  ")[2].splitlines()[0]
    for page in [REPOSITORY / "README.md", *sorted(REPOSITORY.glob("docs/**/*.md"))]:
        for line in page.read_text(encoding="utf-8").replace("\\\n", " ").splitlines():
            for part in line.strip().removeprefix("$ ").split(" && "):
                words = part.partition("  #")[0].strip()
                # not those that stand for others: CONFIG, coco|voc, [--out FILE], ...
                if words.startswith("cascade-rcnn ") and not re.search(r"\b[A-Z]{1,}\b|\||\.\.\.|[`*\[<]", words):
                    yield words


EXAMPLES = sorted(set(_examples()))


def test_the_overview_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in COMMANDS)


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("cascade-rcnn 0.")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: cascade-rcnn {command}") and f"example:\n  cascade-rcnn {command}" in text


def test_help_of_train_lists_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    main(["train", "--help"])
    text = capsys.readouterr().out
    for section, values in Config().to_dict().items():
        names = [f"{section}.{name}" for name in values] if isinstance(values, dict) else []
        assert [name for name in names if f"--{name.replace('_', '-')}" not in text] == []


def test_help_of_train_says_how_settings_are_written(capsys: pytest.CaptureFixture[str]) -> None:
    main(["train", "--help"])
    text = capsys.readouterr().out
    for line in (
        "--train.deterministic, --train.no-deterministic",
        "--train.lr NUMBER",
        "--train.epochs INTEGER",
        "--data.root TEXT",
        "--train.schedule {multistep,cosine}",
        "--model.stage-ious NUMBER ...",
        "--model.stage-stds NUMBER NUMBER NUMBER NUMBER ... | none",
        "Images per process and pass. (default: 2)",  # the docstring below the field
    ):
        assert f"  {line}\n" in text, line


def test_train_help_shows_the_values_of_the_recipe_that_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    main(["train", "--help"])
    plain = capsys.readouterr().out
    main(["train", "finetune", "--help"])
    named = capsys.readouterr().out
    assert "(default: 640 800)" in named and "(default: 640 800)" not in plain
    assert main(["train", "--data", "finetune", "--help"]) == 0  # the value of an option is no recipe
    assert "(default: 640 800)" not in capsys.readouterr().out


def test_help_needs_no_heavy_import() -> None:
    """What makes a help slow; the time itself depends on the machine."""
    heavy = ("torch", "timm", "torchvision", "scipy", "faster_coco_eval", "fastapi", "tensorboard")
    code = (
        "import sys; from cascade_rcnn.cli import COMMANDS, main\n"
        "for name in COMMANDS: main([name, '--help'])\n"
        f"sys.exit(str([name for name in {heavy!r} if name in sys.modules]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        text=True,
        capture_output=True,
        timeout=60,
        cwd=Path(cli.__file__).resolve().parents[2],
    )
    assert done.stderr.strip() == "[]"


@pytest.mark.parametrize("example", EXAMPLES)
def test_every_documented_command_is_accepted(
    example: str, calls: list[Call], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = shlex.split(example.partition(" > ")[0])[1:]
    for own_recipe in ("my_recipe.py", "mine.py"):
        text = "from cascade_rcnn.config import Config\nconfig = Config()\n"
        (tmp_path / own_recipe).write_text(text, encoding="utf-8")
    if "--from-mmdet" in words:
        theirs = Path(__file__).parent / "fixtures" / "mmdet_config"
        (tmp_path / "theirs.py").write_text(
            f"_base_ = ['{theirs}/model.py', '{theirs}/training.py']\n", encoding="utf-8"
        )
    if "cascade.safetensors" in words:
        save_checkpoint(tmp_path / "cascade.safetensors", {}, config=Config(), class_names=("a",))
    for word in words:  # recipes that a page addresses by their place in a checkout
        if word.startswith("configs/") and (REPOSITORY / word).is_file():
            words[words.index(word)] = str(REPOSITORY / word)
    code = main(words)
    said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("not taken over: ")]
    assert (code, said) == (0, [])
    runs = words[0] in FUNCTION_OF and "--help" not in words
    assert [command for command, _ in calls] == ([words[0]] if runs else [])


def test_train_hands_on_the_recipe_with_all_changes(calls: list[Call]) -> None:
    assert (
        main(
            [
                "train",
                "finetune",
                "--data",
                "mine",
                "--train.epochs",
                "3",
                "--resume",
                "--deterministic",
                "--model.stage-ious",
                "0.5",
                "0.6",
                "--out",
                "here",
                "--data.flip=0",
                "--no-check",
            ]
        )
        == 0
    )
    ((_, arguments),) = calls
    config: Config = arguments["config"]
    assert config.data.root == "mine" and config.data.flip == 0 and config.train.epochs == 3
    assert config.train.deterministic and config.model.stage_ious == (0.5, 0.6)
    assert arguments["out"] == Path("here") and arguments["resume"] and not arguments["check"]


def test_train_names_the_run_after_the_recipe_and_goes_on_in_a_run_folder(calls: list[Call], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(Config().to_dict()), encoding="utf-8")
    assert main(["train", "finetune", "--data", "mine"]) == 0
    assert main(["train", str(tmp_path), "--data", "mine", "--resume"]) == 0
    assert [arguments["out"] for _, arguments in calls] == [Path("runs/finetune"), tmp_path]


def test_config_prints_a_recipe_or_json_that_loads_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = load_config("finetune").to_dict() | {"published": "me"}
    for flags, name in ((["--json"], "mine.json"), ([], "mine.py")):
        assert main(["config", "finetune", "--published", "me", *flags]) == 0
        (tmp_path / name).write_text(capsys.readouterr().out, encoding="utf-8")
        assert load_config(tmp_path / name).to_dict() == expected


def test_config_alone_lists_the_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config"]) == 0
    assert capsys.readouterr().out.split() == config_names()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("trian x", "no command 'trian', did you mean train?"),
        ("qqq", "no command 'qqq'; there are demo, train"),
        ("train", "required: CONFIG"),
        ("train finetune", "finetune names no data: add --data DIR"),
        ("train finetun --data x", "finetun: no such config name (did you mean finetune"),
        ("train finetune --data x --train.epochz 3", "did you mean --train.epochs"),
        ("train finetune --data x --epochs 3", "did you mean --train.epochs?"),
        ("train finetune --data x --train.epochs many", '--train.epochs is "many", expected a whole number'),
        ("train finetune --data", "--data: expected one argument"),
        ("predict run photo.jpg --scor 1", "unexpected argument '--scor', did you mean --score?"),
        ("predict run photo.jpg --score 1.5", "'1.5' is not a number between 0 and 1"),
        ("predict run photo.jpg --batch-size 0", "'0' is not a whole number of at least 1"),
        ("predict photo.jpg", "no images given: expected CHECKPOINT IMAGE..., got only 'photo.jpg'"),
        ("train finetune --data x --train.learning-rate 0.1", "did you mean --train.lr?"),
        ("train finetune --data x --data.num-workers 4", "did you mean --data.workers?"),
        ("train finetune --data x --work-dir here", "--work-dir: not known here; the run's folder is --out RUN"),
        ("config --from_mmdet their_config.py", "unexpected argument '--from_mmdet', did you mean --from-mmdet?"),
        ("train their_config.py --dta x", "unexpected argument '--dta', did you mean --data?"),
        ("check x --config finetun", "finetun: no such config name (did you mean finetune"),
        ("score --format coc --truth t --results r", "invalid choice: 'coc'"),
        ("config --train.epochs 3", "--train.epochs without a recipe to change"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words.split()) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and said in err and err.count("\n") == 1 and out == ""


@pytest.mark.parametrize(
    ("rank", "error", "printed"),
    [
        ("0", errors.ConfigError("no"), "error: no\n"),
        ("0", errors.DataError("no"), "error: no\n"),
        ("3", errors.ConfigError("no"), ""),
        ("3", errors.DataError("no"), "error (rank 3): no\n"),
    ],
)
def test_of_several_processes_the_first_reports_what_all_have_seen(
    rank: str,
    error: errors.UserError,
    printed: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(parser: object, words: object) -> int:
        raise error

    monkeypatch.setenv("RANK", rank)
    monkeypatch.setitem(COMMANDS, "demo", COMMANDS["demo"]._replace(run=fail))
    assert main(["demo"]) == 2
    assert capsys.readouterr().err == printed


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(parser: object, words: object) -> int:
        raise ZeroDivisionError

    monkeypatch.setitem(COMMANDS, "demo", COMMANDS["demo"]._replace(run=fail))
    with pytest.raises(ZeroDivisionError):
        main(["demo"])


def test_ctrl_c_is_quiet_and_ends_with_130(tmp_path: Path) -> None:
    code = (
        "import sys, time; from cascade_rcnn import cli\n"
        "def wait(parser, words): print('ready', flush=True); time.sleep(60)\n"
        "cli.COMMANDS['demo'] = cli.COMMANDS['demo']._replace(run=wait)\n"
        "sys.exit(cli.main(['demo']))"
    )
    package = Path(cli.__file__).resolve().parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=package
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "")


def test_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "cascade_rcnn", "train", "--help"],
        stdout=writer,
        text=True,
        stderr=subprocess.PIPE,
        timeout=60,
        cwd=Path(cli.__file__).resolve().parents[2],
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(
    ("load", "given", "expected"),
    [
        (0.0, {}, None),
        (1e6, {}, "PASSIVE"),
        (1e6, {"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE"),
        (1e6, {"GOMP_SPINCOUNT": "9"}, None),
    ],
)
def test_threads_sleep_while_they_wait_on_a_busy_machine(
    load: float, given: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = dict(given)
    monkeypatch.setattr(cli.os, "environ", environment)
    monkeypatch.setattr(cli.os, "getloadavg", lambda: (load, load, load), raising=False)
    cli._let_waiting_threads_sleep()
    assert environment.get("OMP_WAIT_POLICY") == expected


def test_a_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setitem(cli.COMMANDS, "demo", cli.COMMANDS["demo"]._replace(run=full))
    assert cli.main(["demo"]) == 2
    assert capsys.readouterr().err == (
        "error: the disk that this is written to is full; free some of it, or choose another\n"
    )
