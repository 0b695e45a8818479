"""``cascade-rcnn check DATA``: finds what would ruin a training, in seconds, before it starts.

Annotations are read without refusing anything, images are looked at by header and end. The check before a training is
kept in the user's cache until a file of the data set or the configuration changes.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from cascade_rcnn.cache import cache_folder
from cascade_rcnn.check.choices import choose
from cascade_rcnn.check.images import check_images, check_same_images
from cascade_rcnn.check.memory import Machine
from cascade_rcnn.check.objects import check_classes, check_objects
from cascade_rcnn.check.report import Report, new_report
from cascade_rcnn.config import Config, DataConfig, ModelConfig, Orientation
from cascade_rcnn.data.formats.open import describe_split, disjoint_splits, open_split, recognise
from cascade_rcnn.data.formats.unlisted import report_unlisted
from cascade_rcnn.data.images import IMAGE_SUFFIXES
from cascade_rcnn.data.problems import KINDS, Problems, advice
from cascade_rcnn.data.records import DataSplit
from cascade_rcnn.data.split_levels import with_range
from cascade_rcnn.errors import DataError
from cascade_rcnn.messages import printable

_VERSION = 2  # of the cache; raise it when a check changes
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
    opened: list[DataSplit] = []
    for name in names:
        try:
            part = open_split(root, name, strict=False, orientation=data.orientation)
        except DataError as error:
            problems.add("unreadable-split", f"{printable(root)} {name}", str(error))
            continue
        if not opened:
            data, _ = with_range(data, part)  # the first split is the one that training takes it from
        opened.append(part)
        report.splits.append(describe_split(part))
        problems.items.extend(part.problems)
        check_objects(part, problems, data=data, model=model)
        check_images(part, problems, data=data)
    if opened:
        check_classes(opened, problems)
        check_same_images(opened, problems)
        report_unlisted(root, opened, problems)
    report.problems = problems.items
    return report, opened


def refuse_misread(root: Path | str, orientation: Orientation = "auto") -> None:
    """Raises ``DataError`` where boxes or masks are written in another coding than their format's (corners, fractions).

    Another format would not show it any more.
    """
    for name in disjoint_splits(Path(root)):
        problems = Problems(strict=False)
        part = open_split(root, name, strict=False, orientation=orientation)
        check_objects(part, problems, data=DataConfig(), model=ModelConfig())
        for problem in problems.items:
            if KINDS[problem.kind].refuses:
                raise DataError(f"{problem.where}: {problem.message}; {advice(problem.kind)}")


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
            # the reader's own refusals first: they name file and value
            open_split(root, name, orientation=config.data.orientation)
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
    return cache_folder("checks") / f"{digest.hexdigest()[:32]}.json"


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
    Returns 1 where errors were found, or are left in the copy that ``fix`` wrote, else 0.
    """
    recipe = _as_trained(recipe or Config(), data)
    report, splits = _check(data, None, recipe.data, recipe.model)
    report.show()
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "report.json").write_text(json.dumps(report.to_dict(), indent=1) + "\n", encoding="utf-8")
    if draw:
        from cascade_rcnn.drawing.sample_sheet import draw_samples

        sheet = (out or Path()) / "samples.png"
        marked = {problem.where for problem in report.problems}
        draw_samples(splits, draw, marked=marked, data=_drawn_as(recipe.data, splits)).save(sheet)
        print(f"{draw} samples drawn to {printable(sheet)}")
    if fix is not None:
        return _fix(splits, fix, recipe)
    return int(report.has("error"))


def _as_trained(recipe: Config, root: Path) -> Config:
    """A recipe that chooses settings from its data, with those it would choose: objects are measured against them."""
    if recipe.automatic is None:
        return recipe
    try:
        split = open_split(
            root, _training_first(disjoint_splits(root))[0], strict=False, orientation=recipe.data.orientation
        )
    except (DataError, IndexError):
        return recipe  # the check itself says what is wrong
    return choose(recipe, split, machine=Machine())[0]


def _drawn_as(data: DataConfig, splits: list[DataSplit]) -> DataConfig:
    return with_range(data, splits[0])[0] if splits else data


def _fix(splits: list[DataSplit], out: Path, recipe: Config) -> int:
    """Writes the repaired copy, checks it like any data set, and says what is left."""
    from cascade_rcnn.check.fix import fix_dataset

    changes = fix_dataset(splits, out, orientation=recipe.data.orientation)
    for change in changes[:20]:
        print(f"changed: {printable(change)}")
    if len(changes) > 20:
        print(f"and {len(changes) - 20:,} more")
    print(f"{len(changes):,} changes, all listed in {printable(out / 'changes.txt')}")
    left, _ = _check(out, None, recipe.data, recipe.model)
    for kind, number in left.counts.items():
        if KINDS[kind].severity != "note":
            first = left.of(kind)[0]
            print(f"left: {KINDS[kind].severity} {number:,} x {kind}, e.g. {first.where}: {first.message}")
    if left.has("error"):
        print(f"the copy still has errors; what to do stands in: cascade-rcnn check {printable(out)}")
    else:
        print(f"the copy was checked: no errors; train with --data {printable(out)}")
    return int(left.has("error"))
