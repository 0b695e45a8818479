"""Where a detector fails, which threshold to take, whether its scores can be believed: ``report.html``.

cascade-rcnn analyze runs/demo --data runs/demo/data --out report
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from cascade_rcnn.analysis.figures import require_matplotlib
from cascade_rcnn.analysis.measure import Report, Wanted, compare, measure, thresholds
from cascade_rcnn.analysis.pictures import Read, error_examples, worst_images
from cascade_rcnn.analysis.report import render
from cascade_rcnn.analysis.scenes import Found, Truth, read_found, read_truth
from cascade_rcnn.analysis.tide import tide
from cascade_rcnn.atomic_files import clear_failure, replace_file, write_json
from cascade_rcnn.data.records import DataSplit, ImageRecord
from cascade_rcnn.errors import DataError, UserError
from cascade_rcnn.messages import few_names, printable
from cascade_rcnn.runtime.network import exported_file

if TYPE_CHECKING:
    from cascade_rcnn.inference.run_model import Inference


def run_analyze(
    checkpoints: Sequence[str | Path],
    *,
    data: Path,
    inference: Inference,
    split: str = "",
    out: Path = Path("report"),
    wanted: Wanted = Wanted(),  # noqa: B008 (frozen)
    device: str = "auto",
    set_thresholds: str | None = None,
) -> Report:
    """The command ``analyze``: ``report.html`` and ``report.json`` on a checkpoint, compared with a second.

    Args:
        checkpoints: one or two.
        data: folder of the data set; its format is recognised.
        out: folder for the report.
        set_thresholds: also write each class's threshold into a copy of that name; empty: into the checkpoint itself.

    Raises:
        UserError: what cannot be read or written, or has nothing to analyse; matplotlib is missing.
    """
    from cascade_rcnn.analysis.stages import run_stages
    from cascade_rcnn.checkpoint import find_checkpoint
    from cascade_rcnn.zoo.store import resolve

    require_matplotlib()
    _check_folder(out)
    target = _threshold_target(checkpoints[0], set_thresholds)
    for checkpoint in checkpoints:  # the second is looked for before the first takes its time
        if exported_file(checkpoint) is None:
            find_checkpoint(resolve(checkpoint))
    ran = [run_stages(one, data, split=split, device=device, inference=inference) for one in checkpoints]
    truth = read_truth(ran[0].truth, where=printable(data))
    found = [
        {name: read_found(results, truth, where=f"{name} of {printable(checkpoint)}", limit=one.limit,
                          may_be_empty=name != list(one.results)[-1])
         for name, results in one.results.items()}
        for checkpoint, one in zip(checkpoints, ran)
    ]  # fmt: skip
    wanted = replace(wanted, limit=ran[0].limit)
    report = measure(truth, found[0], wanted)
    opened = ran[0].split
    report["source"] = {
        "checkpoint": printable(checkpoints[0]),
        "data": f"{opened.name} of {printable(opened.root)}",
        "detections": f"score above {ran[0].config.model.score_threshold:g}, {ran[0].limit} per image and class",
    }
    if len(found) == 2:
        last = [list(one.values())[-1] for one in found]
        names = {"first": printable(checkpoints[0]), "second": printable(checkpoints[1])}
        report["compare"] = names | compare(truth, *last, resamples=wanted.resamples)
    read = _split_reader(opened, truth, ran[0].config.data)
    _write(report, truth, list(found[0].values())[-1], read, out, wanted)
    if target is not None:
        _set_thresholds(checkpoints[0], target, report, truth, wanted)
    return report


def run_analyze_results(
    results: Path, truth_file: Path, *, images: Path | None = None, out: Path = Path("report"),
    wanted: Wanted = Wanted(),  # noqa: B008 (frozen)
) -> Report:  # fmt: skip
    """The command ``analyze --results``: the report on any detector's results in COCO's layout.

    ``images`` is the folder of the pictures; without it the report has none.
    """
    from cascade_rcnn.evaluation.match_results import match_results
    from cascade_rcnn.evaluation.read_results import folder, read_json

    require_matplotlib()
    _check_folder(out)
    notes: list[str] = []
    content = read_json(truth_file)
    given = match_results(read_json(results), content, printable(results), printable(truth_file), notes)
    truth = read_truth(content, where=printable(truth_file))
    found = read_found(given, truth, where=printable(results))
    read = None if images is None else _folder_reader(folder(images, "the folder of the pictures"), truth)
    if read is None:
        notes.append("no pictures: name their folder with --images")
    report = measure(truth, {"results": found}, wanted)
    report["source"] = {"results": printable(results), "truth": printable(truth_file)}
    report["notes"] = notes
    _write(report, truth, found, read, out, wanted)
    return report


def _write(report: Report, truth: Truth, found: Found, read: Read | None, out: Path, wanted: Wanted) -> None:
    """Pictures, and both files."""
    report["wanted"] = {"precision": wanted.precision, "recall": wanted.recall, "resamples": wanted.resamples}
    report["notes"] = [
        *report.get("notes", []),
        f"intervals: 95 %, {wanted.resamples} drawings of the images with replacement",
    ]
    absent = [name for name, one in report["classes"].items() if not one["objects"]]
    if absent:
        report["notes"].append(f"classes without objects, left out of means: {few_names(absent)}")
    galleries = {}
    if read is not None:
        errors, limits = tide(truth, found, limit=wanted.limit), thresholds(report, truth, "f1")
        galleries = {"images with the most errors": worst_images(truth, found, errors, limits, read)}
        galleries |= error_examples(truth, found, errors, read)
    title = f"Analysis of {next(iter(report['source'].values()))}"
    text = render(report, galleries, title=title)
    write_json(out / "report.json", report)
    target = out / "report.html"
    with clear_failure(target):
        replace_file(target, lambda temporary: _write_text(temporary, text))
    final = report["outputs"][report["final"]]
    around = report["interval"]
    limits_text = f" (95 % interval {100 * around[0]:.1f} to {100 * around[1]:.1f})" if around else ""
    print(f"box AP {100 * final['AP']:.1f}{limits_text} on {report['images']:,} images")
    print(f"report: {printable(target)}")


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _check_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"{printable(out)}: is a file; give a folder as --out")


def _split_reader(split: DataSplit, truth: Truth, settings: Any) -> Read:
    """Pictures of a split as the network sees them before they are resized."""
    from cascade_rcnn.data.dataset import read_record

    records: dict[Hashable, ImageRecord] = {record.image_id: record for record in split.records}

    def read(row: int) -> Image.Image | None:
        try:
            pixels = read_record(records[truth.image_ids[row]], split.format, settings)
        except DataError:
            return None
        return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())

    return read


def _folder_reader(folder: Path, truth: Truth) -> Read:
    """Pictures by the file names of the truth."""
    from cascade_rcnn.data.images import to_array

    def read(row: int) -> Image.Image | None:
        path = folder / truth.file_names[row]
        if not path.is_file() or not path.resolve().is_relative_to(folder.resolve()):
            return None
        try:
            return Image.fromarray(to_array(path))
        except DataError:
            return None

    if all(not (folder / name).is_file() for name in truth.file_names):
        raise DataError(
            f"{printable(folder)}: has none of the pictures of the truth (first: {printable(truth.file_names[0])}): "
            "give the folder that these names start from"
        )
    return read


def _threshold_target(checkpoint: str | Path, wanted: str | None) -> Path | None:
    """The file that thresholds go to; known before the work begins."""
    from cascade_rcnn.checkpoint import find_checkpoint

    if wanted is None:
        return None
    if exported_file(checkpoint) is not None:
        raise UserError(
            f"--set-thresholds: {printable(checkpoint)} is an exported network; give the checkpoint that it was made "
            "from, and export the new one"
        )
    if wanted:
        target = Path(wanted)
        if target.suffix != ".safetensors":
            raise UserError(f"--set-thresholds {printable(wanted)}: name a .safetensors file")
        return target
    if not Path(checkpoint).exists():
        raise UserError(
            f"--set-thresholds: {printable(checkpoint)} is no file of yours; name a new one: "
            "--set-thresholds mine.safetensors"
        )
    return find_checkpoint(Path(checkpoint))


def _set_thresholds(checkpoint: str | Path, target: Path, report: Report, truth: Truth, wanted: Wanted) -> None:
    """Write the checkpoint with a threshold for each of its classes; whole or not at all."""
    from cascade_rcnn.checkpoint import load_checkpoint, save_checkpoint
    from cascade_rcnn.zoo.store import resolve

    saved = load_checkpoint(resolve(checkpoint))
    values = dict(zip(truth.class_names, thresholds(report, truth, wanted.thresholds_by).tolist()))
    key = {"f1": "best_f1", "precision": "at_precision", "recall": "at_recall"}[wanted.thresholds_by]
    fallen = [name for name in values if report["classes"][name]["objects"] and not report["classes"][name][key]]
    known = {name: values[name] for name in saved.class_names if name in values and report["classes"][name]["objects"]}
    save_checkpoint(
        target,
        saved.state,
        config=saved.config,
        class_names=saved.class_names,
        category_ids=saved.category_ids,
        extra=saved.metadata | {"thresholds": known},
    )
    words = ", ".join(f"{printable(name)} {value:.3f}" for name, value in list(known.items())[:8])
    print(f"thresholds written into {printable(target)}: {words}{', ...' if len(known) > 8 else ''}")
    if fallen:
        print(f"never reached by {few_names(fallen)}: there the threshold of the best F1 was taken")
    if len(known) < len(saved.class_names):
        left = [name for name in saved.class_names if name not in known]
        print(f"without objects here, and so without a threshold: {few_names(left)}")
