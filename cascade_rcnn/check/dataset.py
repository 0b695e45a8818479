"""``cascade-rcnn check DATA``: finds what would ruin a training, in seconds, before it starts.

Annotations are read without refusing anything, images are looked at by header and end. The check before a training is
kept in the user's cache until a file of the data set or the configuration changes.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from cascade_rcnn.check.images import check_images, check_same_images
from cascade_rcnn.check.objects import check_classes, check_objects
from cascade_rcnn.check.report import Report, new_report
from cascade_rcnn.config import Config, DataConfig, ModelConfig
from cascade_rcnn.data.formats.open import describe_split, disjoint_splits, open_split, recognise
from cascade_rcnn.data.formats.unlisted import report_unlisted
from cascade_rcnn.data.images import IMAGE_SUFFIXES
from cascade_rcnn.data.problems import Problems, advice
from cascade_rcnn.data.records import DataSplit
from cascade_rcnn.errors import DataError
from cascade_rcnn.messages import printable

_VERSION = 1  # of the cache; raise it when a check changes
_WATCHED = IMAGE_SUFFIXES | {".json", ".xml", ".txt", ".mat", ".yaml", ".yml", ".names"}


def check_dataset(
    root: Path | str, *, split: str | None = None, data: DataConfig | None = None, model: ModelConfig | None = None
) -> Report:
    """Checks all splits of a data set, or one (or several, with commas between them, the training split first).

    ``data`` and ``model`` give the input scale, the pixel limit and the anchors that objects are measured against.
    Raises ``DataError`` only where there is no data set.
    """
    root = Path(root)
    report, _ = _check(root, split, data or DataConfig(), model or ModelConfig())
    return report


def _check(root: Path, split: str | None, data: DataConfig, model: ModelConfig) -> tuple[Report, list[DataSplit]]:
    report = new_report(root, recognise(root))
    problems = Problems(strict=False)
    names = [word for word in split.split(",") if word] if split else _training_first(disjoint_splits(root))
    opened = []
    for name in names:
        try:
            part = open_split(root, name, strict=False)
        except DataError as error:
            problems.add("unreadable-split", f"{printable(root)} {name}", str(error))
            continue
        opened.append(part)
        report.splits.append(describe_split(part))
        problems.items.extend(part.problems)
        check_objects(part, problems, data=data, model=model)
        check_images(part, problems, max_pixels=data.max_pixels)
    if opened:
        check_classes(opened, problems)
        check_same_images(opened, problems)
        report_unlisted(root, opened, problems)
    report.problems = problems.items
    return report, opened


def _training_first(names: list[str]) -> list[str]:
    return sorted(names, key=lambda name: "train" not in name.lower())


def check_before_training(config: Config) -> Report:
    """Checks the training and validation splits, or takes the cached result, and prints errors and warnings.

    Raises ``DataError`` where a problem would ruin the training.
    """
    root = Path(config.data.root)
    names = list(
        dict.fromkeys([config.data.train, config.data.val] if config.train.evaluate_every else [config.data.train])
    )
    if not root.exists():
        open_split(root, names[0])  # says so; looking for changes would walk through whatever folder is above
    cache = _cache_file(root, repr((_VERSION, config.data, config.model)))
    report = _load(cache)
    if report is None:
        for name in names:
            open_split(root, name)  # the reader's own refusals first: they name file and value
        report = check_dataset(root, split=",".join(names), data=config.data, model=config.model)
        _save(cache, report)
    if report.has("error") or report.has("warning"):
        report.show(least="warning")
    if report.refusals:
        first = report.refusals[0]
        raise DataError(f"{first.where}: {first.message}; {advice(first.kind)}")
    return report


def _cache_file(root: Path, settings: str) -> Path:
    """Named by every watched file's name, size and time, so that any change makes a new check."""
    digest = hashlib.sha256(f"{root.resolve()}\n{settings}\n".encode("utf-8", "surrogateescape"))
    base = root if root.is_dir() else root.parent
    for folder, folders, names in os.walk(base, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if Path(name).suffix.lower() in _WATCHED:
                try:
                    stat = (Path(folder) / name).stat()
                except OSError:
                    continue  # a dangling link
                digest.update(f"{folder}/{name} {stat.st_size} {stat.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(home) / "cascade-rcnn" / "checks" / f"{digest.hexdigest()[:32]}.json"


def _load(path: Path) -> Report | None:
    try:
        return Report.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _save(path: Path, report: Report) -> None:
    """A cache that cannot be written costs the next start some seconds, nothing more."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(report.to_dict()), encoding="utf-8")
        temporary.replace(path)
    except OSError:
        pass


def run_check(
    data: Path, *, fix: Path | None = None, draw: int = 0, out: Path | None = None, recipe: Config | None = None
) -> int:
    """The command. Prints the report; ``fix`` writes a repaired copy, ``draw`` a sheet of samples.

    ``out`` is the folder for ``report.json`` and ``samples.png`` (the current one where only ``draw`` is given);
    ``recipe`` gives the input scale and the anchors that objects are measured against (else the defaults).
    Returns 1 where errors were found and nothing was repaired, else 0.
    """
    recipe = recipe or Config()
    report, splits = _check(data, None, recipe.data, recipe.model)
    report.show()
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "report.json").write_text(json.dumps(report.to_dict(), indent=1) + "\n", encoding="utf-8")
    if draw:
        from cascade_rcnn.drawing.sample_sheet import draw_samples

        sheet = (out or Path()) / "samples.png"
        draw_samples(splits, draw, marked={problem.where for problem in report.problems}).save(sheet)
        print(f"{draw} samples drawn to {printable(sheet)}")
    if fix is not None:
        from cascade_rcnn.check.fix import fix_dataset

        changes = fix_dataset(splits, fix)
        for change in changes[:20]:
            print(f"changed: {printable(change)}")
        if len(changes) > 20:
            print(f"and {len(changes) - 20:,} more")
        print(
            f"{len(changes):,} changes, all listed in {printable(fix / 'changes.txt')}; "
            f"train with --data {printable(fix)}"
        )
        return 0
    return int(report.has("error"))
