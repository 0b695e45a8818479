"""Mutation check: do the fast unit tests notice small faults in the models, the evaluation and the data?

    python3 benchmarks/mutants.py                 # all; some minutes
    python3 benchmarks/mutants.py --only rpn      # those whose file or description holds the word
    python3 benchmarks/mutants.py --list

Each fault replaces one text of one file in a temporary copy of the package (never in the checkout) and runs the unit
tests that should notice it. A fault is killed when one of them fails. A fault whose old text does not occur exactly
once is an error, so that the list follows the code. Parity and paper tests are left out: they take minutes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 120  # seconds for the tests of one fault


@dataclass(frozen=True)
class Fault:
    """One wrong edit and the tests that should fail with it."""

    file: str  # in cascade_rcnn/
    tests: tuple[str, ...]  # in tests/, files or single tests
    what: str
    old: str
    new: str


def faults(file: str, tests: str, *edits: tuple[str, str, str]) -> list[Fault]:
    """Faults of one file, each (what, old text, new text); ``tests`` are separated by spaces."""
    return [Fault(file, tuple(tests.split()), *edit) for edit in edits]


FAULTS = [
    *faults(
        "models/boxes.py",
        "models/test_boxes.py",
        ("negative sides of an intersection kept", ".sub_(start).clamp_(min=0)", ".sub_(start)"),
        ("intersection of the x axis alone", "for low in (0, 1):", "for low in (0, 0):"),
        ("union counts the intersection twice", ".sub_(intersection).clamp_(min=1e-6)", ".clamp_(min=1e-6)"),
        (
            "share inside a region is of the region's area",
            "box_area(a)[..., :, None].clamp",
            "box_area(b)[..., None, :].clamp",
        ),
        ("clipping swaps height and width", "sizes.flip(-1).to(boxes.dtype)", "sizes.to(boxes.dtype)"),
        ("no clipping at zero", "torch.minimum(boxes.clamp(min=0),", "torch.minimum(boxes,"),
        ("shift not halved when encoding", "* 0.5 / size", "/ size"),
        ("deltas multiplied by their stds", "dim=-1) / stds", "dim=-1) * stds"),
        ("limit_shrinking ignored, always on", "-MAX_LOG_RATIO if limit_shrinking else None", "-MAX_LOG_RATIO"),
        ("growth not limited", ", max=MAX_LOG_RATIO)", ", max=20.0)"),
    ),
    *faults(
        "models/boxes.py",
        "models/test_cascade.py",
        ("absolute box loss squared", "(prediction - target).abs()", "(prediction - target).square()"),
    ),
    *faults(
        "models/matching.py",
        "models/test_matching.py",
        ("IGNORED_SHARE 0.5 -> 0.1", "IGNORED_SHARE = 0.5", "IGNORED_SHARE = 0.1"),
        ("best anchors rematched the wrong way", "if rematch_best:", "if not rematch_best:"),
        ("positive above instead of from its threshold", "iou >= positive_iou", "iou > positive_iou"),
        ("negative up to instead of below its threshold", "iou < negative_iou", "iou <= negative_iou"),
        ("objects that no box touches have best boxes", "(best >= min_iou) & (best > 0)", "(best >= min_iou)"),
        (
            "boxes that are not valid can be the best",
            "table.masked_fill_(~part_valid[..., None], -1.0).amax",
            "table.amax",
        ),
        ("padding rows are objects", ".masked_fill_(~object_valid[:, None], -1.0)", ""),
        ("ignored regions are negatives", " & ~ignored_by_regions(some, objects, targets.ignore[images])", ""),
        ("no negatives in place of missing positives", "count - taken.sum(dim=1, keepdim=True)", "count - positives"),
        ("positives do not lie in front", "key * 0.5  #", "key * 3.0  #"),
        ("a sum without samples is divided by zero", "    return count.clamp(min=1.0)\n", "    return count\n"),
    ),
    *faults(
        "models/anchors.py",
        "models/test_rpn.py",
        (
            "anchors lie down instead of standing",
            "height, width = scale * stride *",
            "width, height = scale * stride *",
        ),
        ("anchors column by column", 'indexing="xy"', 'indexing="ij"'),
        ("padding begins one cell late", "y[None, :, None] < limits", "y[None, :, None] <= limits"),
        ("whole-pixel anchors rounded down", "table.round() if rounded", "table.floor() if rounded"),
    ),
    *faults(
        "models/rpn.py",
        "models/test_rpn.py",
        ("anchors in a batch's padding take part", "if not self._leaves_padding_out(training):", "if True:"),
        ("anchors across the border take part", "valid = valid & self._inside_image(anchors, sizes)", "pass"),
        ("limit_shrinking ignored", "limit_shrinking=details.limit_shrinking", "limit_shrinking=True"),
        ("empty boxes kept", " & self._has_extent(boxes)", ""),
        ("proposals not clipped", "boxes = self._clip(boxes, sizes, training=training)", "boxes = boxes + 0"),
        ("levels not offset", "offset_groups=details.offset_levels", "offset_groups=False"),
        ("levels suppress each other", "torch.full_like(rows, level)", "torch.full_like(rows, 0)"),
        ("masked_fill(~valid) left out", "logits.masked_fill(~valid, -torch.inf).topk", "logits.topk"),
        ("fixed normaliser without the batch", "float(details.samples * batch)", "float(details.samples)"),
        ("NMS has no effect", "score = score.masked_fill(~keep, -torch.inf)", "pass"),
        ("positive anchors from IoU 0.5", "positive_iou=0.7", "positive_iou=0.5"),
        ("negative anchors below IoU 0.5", "negative_iou=0.3", "negative_iou=0.5"),
        ("beta ignored", "wanted, details.box_beta)", "wanted, 1.0)"),
        (
            "logits column by column",
            "self.objectness(x).permute(0, 2, 3, 1)",
            "self.objectness(x).permute(0, 3, 2, 1)",
        ),
        ("number of test proposals in training", "pair[0 if training else 1]", "pair[1]"),
    ),
    *faults(
        "models/cascade.py",
        "models/test_cascade.py",
        ("class loss weight ignored", "cls, 0.0).sum() / total * self.details.loss_weight", "cls, 0.0).sum() / total"),
        ("box loss weight ignored", "box, 0.0).sum() / total * self.details.loss_weight", "box, 0.0).sum() / total"),
        ("mask loss weight ignored", " * stage.details.mask_weight", ""),
        ("gradient into features not scaled", "x = scale_gradient(x, self.stages[k].details.feature_gradient)", "pass"),
        ("truth rows handed on", "samples.valid & ~samples.is_truth", "samples.valid"),
        ("empty boxes handed on", "valid = valid & ((boxes[..., 2:] - boxes[..., :2]).amin(dim=-1) > 0)", "pass"),
        (
            "moved boxes not clipped",
            "clip_boxes(self.decode(deltas_of_labels(deltas, labels), boxes), sizes)",
            "self.decode(deltas_of_labels(deltas, labels), boxes)",
        ),
        ("gradient flows through boxes", "@torch.no_grad()\n    def refine", "def refine"),
        ("background can be the class that moves", "logits[..., :-1].argmax", "logits.argmax"),
        (
            "positives moved by the guessed class",
            "labels = torch.where(samples.positive, samples.matched_labels, most_likely(logits))",
            "labels = most_likely(logits)",
        ),
        ("background is class 0", "background = logits.shape[-1] - 1", "background = 0"),
        ("mean of the wrong kind", "if self.details.mean_of_logits:", "if not self.details.mean_of_logits:"),
        ("limit_shrinking ignored", "limit_shrinking=self.details.limit_shrinking", "limit_shrinking=True"),
        ("half of the samples positive", "positive_share=0.25", "positive_share=0.5"),
        ("equal objects share one truth row", "if self.details.add_truth:  # each", "if False:  # each"),
        ("sum of the stages instead of their mean", "return total / len(values)", "return total"),
        (
            "background detected, class 0 not",
            "probabilities[..., :-1],  # without",
            "probabilities[..., 1:],  # without",
        ),
        (
            "every stage looks at the proposals",
            "boxes = stage.move(deltas, boxes, most_likely(logits), images.sizes)",
            "stage.move(deltas, boxes, most_likely(logits), images.sizes)",
        ),
        ("every stage trains on the proposals", "proposals = stage.refine(", "stage.refine("),
    ),
    *faults(
        "models/postprocess.py",
        "models/test_postprocess.py",
        ("NMS groups not spread", "boxes = boxes + (groups *", "boxes = boxes + 0 * (groups *"),
        ("images suppress each other", "groups = groups * len(boxes) + batch", "groups = groups * len(boxes)"),
        (
            "empty boxes kept",
            "candidate = (scores > score_threshold) & ((candidates[..., 2:] - candidates[..., :2]).amin(dim=-1) > 0)",
            "candidate = scores > score_threshold",
        ),
        ("masked_fill(~valid) left out", "probabilities.masked_fill(~valid[..., None], 0.0)", "probabilities"),
        ("label is the row", "labels = rows % classes", "labels = rows // classes"),
        ("soft-NMS without the square", "-(overlap**2) / sigma", "-overlap / sigma"),
        ("soft-NMS across classes", " * (groups == groups[best])", ""),
        ("agnostic NMS within classes", 'torch.zeros_like(labels) if nms == "agnostic" else labels', "labels"),
    ),
    *faults(
        "models/mask_head.py",
        "models/test_mask_head.py",
        ("half a pixel off", "rois.flatten(0, 1) - 0.5", "rois.flatten(0, 1)"),
        ("masks cut at a quarter", "weights_x.transpose(1, 2) >= 0.5", "weights_x.transpose(1, 2) >= 0.25"),
        ("samples at the start of their cell", "(sample + 0.5) * (step", "sample * (step"),
        ("masks of negatives in the loss", "torch.where(positive, loss, 0.0).sum()", "loss.sum()"),
        ("origin's axes swapped", "origin=o[:, 1]", "origin=o[:, 0]"),
    ),
    *faults(
        "models/cascade_rcnn.py",
        "models/test_cascade_rcnn.py::test_padding_is_zero_after_normalisation_and_colours_are_in_order",
        ("padding not zero", "/ self.std * inside[:, None]", "/ self.std"),
        ("colours never turned", "images.pixels.flip(1) if self.bgr else images.pixels", "images.pixels"),
    ),
    *faults(
        "evaluation/pairwise.py",
        "evaluation/test_pairwise.py evaluation/test_evaluation_voc.py",
        ("union counts the intersection twice", "areas(b, plus=plus) - both", "areas(b, plus=plus)"),
        ("last column left out", "np.maximum(a[:, 0], b[:, 0]) + plus", "np.maximum(a[:, 0], b[:, 0])"),
    ),
    *faults(
        "evaluation/voc.py",
        "evaluation/test_evaluation_voc.py",
        ("overlap equal to the threshold counts", "reached = overlap > iou", "reached = overlap >= iou"),
        ("difficult objects are false positives", "return first, ~first & ~difficult", "return first, ~first"),
        ("precision without its envelope", "np.maximum.accumulate(precision[::-1])[::-1], 0.0]", "precision, 0.0]"),
        ("lowest score first", "np.argsort(-detections.scores", "np.argsort(detections.scores"),
        ("ten points", "/ 11.0", "/ 10.0"),
    ),
    *faults(
        "evaluation/kitti.py",
        "evaluation/test_evaluation_kitti.py",
        ("R40 with the point at recall 0", "curve[1:].mean()", "curve.mean()"),
        (
            "an object as high as the limit counts",
            "(height > _MIN_HEIGHT[difficulty])",
            "(height >= _MIN_HEIGHT[difficulty])",
        ),
        ("DontCare regions cost", "free[regular & ~covered]", "free[regular]"),
        ("cars from overlap 0.5", '"car": 0.7', '"car": 0.5'),
    ),
    *faults(
        "evaluation/citypersons.py",
        "evaluation/test_evaluation_citypersons.py",
        ("no margin around the heights", "_MARGIN = 1.25", "_MARGIN = 1.0"),
        ("a rate equal to a point is beyond it", '_POINTS, side="right")', '_POINTS, side="left")'),
        ("the earlier of equal people", "if iou >= best and", "if iou > best and"),
        ("a region needs an IoU", "np.maximum(iou, share) >= _IOU", "iou >= _IOU"),
    ),
    *faults(
        "evaluation/widerface.py",
        "evaluation/test_evaluation_widerface.py",
        ("faces of other settings cost", "left_out = matched & ~evaluated[best]", "left_out = matched & ~matched"),
        ("scores stretched to their own range", "min(1.0, float(scores.min()))", "float(scores.min() + 0.1)"),
    ),
    *faults(
        "evaluation/coco.py",
        "evaluation/test_evaluation_coco.py",
        ("classes at 0 left out of the mean", "values[values > -1]", "values[values > 0]"),
        ("annotations numbered from 0", '"id": index + 1,', '"id": index,'),
        ("area always the box's", 'one["area"] if "area" in one else box[2] * box[3]', "box[2] * box[3]"),
    ),
    *faults(
        "data/transforms.py",
        "data/test_transforms.py",
        ("mirrored boxes a pixel off", "width - sample.boxes[:, 2], width", "width - 1 - sample.boxes[:, 2], width"),
        ("long side not limited", "min(long_side / max(size),", "max(long_side / max(size),"),
        ("sides cut instead of rounded", "int(height * scale + 0.5)", "int(height * scale)"),
        ("cropped boxes not clipped", "np.clip(sample.boxes - origin, 0, limit)", "sample.boxes - origin"),
        ("masks not mirrored", "cols=sample.cols[::-1])", "cols=sample.cols)"),
        ("factors swapped", "[size[1] / width, size[0] / height] * 2", "[size[0] / height, size[1] / width] * 2"),
    ),
    *faults(
        "data/masks.py",
        "data/test_masks.py data/test_segmentations.py",
        ("nearest pixel rounded", "np.floor(np.arange(new) * step)", "np.round(np.arange(new) * step)"),
        (
            "window's place swapped",
            "int(inside_rows[0]), int(inside_cols[0])",
            "int(inside_cols[0]), int(inside_rows[0])",
        ),
        ("area of polygons doubled", "0.5 * abs(float(np.dot", "abs(float(np.dot"),
    ),
    *faults(
        "data/loader.py",
        "data/test_samplers.py",
        ("ranks leave images out", "order[rank::world_size]", "order[rank :: world_size + 1]"),
        ("every epoch shuffled alike", "default_rng((self.seed, self.epoch))", "default_rng((self.seed, 0))"),
        ("a resumed epoch begins anew", "range(self.start_step, len(chunks))", "range(len(chunks))"),
    ),
    *faults(
        "data/loader.py",
        "data/test_loader.py",
        ("ignored regions are objects", "torch.from_numpy(~item.ignore)", "True"),
    ),
    *faults(
        "data/formats/voc.py",
        "data/formats/test_data_formats.py",
        ("pixels counted from 1", "return left - 1, top - 1, right, bottom", "return left, top, right, bottom"),
    ),
    *faults(
        "data/formats/yolo.py",
        "data/formats/test_data_formats.py",
        ("centre taken for the corner", "return ((x - w / 2) * width,", "return (x * width,"),
    ),
    *faults(
        "data/formats/kitti.py",
        "data/formats/test_data_formats.py",
        ("DontCare regions are objects", "ignore = facts[:, 2] > 0", "ignore = facts[:, 2] < 0"),
    ),
]

# Faults that no fast test is asked to notice, by description, and why; they count as survivors.
ARGUED: dict[str, str] = {}


def main(words: list[str] | None = None) -> int:
    """Run the check; 0 if nothing but argued faults survives."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="WORD", help="faults whose file or description holds WORD")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="faults tried at once (default: 1)")
    parser.add_argument("--list", action="store_true", help="check that each old text occurs once, and stop")
    options = parser.parse_args(words)
    chosen = [one for one in FAULTS if options.only.lower() in f"{one.file} {one.what}".lower()]
    stale = list(unusable(chosen))
    if stale or not chosen:
        print("\n".join(stale) or f"no fault holds {options.only!r}", file=sys.stderr)
        return 2
    if options.list:
        print("\n".join(f"{one.file:30} {one.what}" for one in chosen))
        return 0
    start = time.monotonic()
    with Copies(options.jobs) as copies, ThreadPoolExecutor(options.jobs) as pool:
        failing = check_without_faults(copies, chosen)
        if failing:
            print(failing, file=sys.stderr)
            return 2
        outcomes = []
        for fault, outcome in zip(chosen, pool.map(copies.outcome, chosen)):
            print(f"{outcome:9} {fault.file:28} {fault.what}", flush=True)
            outcomes.append(outcome)
    survivors = [fault for fault, outcome in zip(chosen, outcomes) if outcome != "killed"]
    print(f"\nkilled {len(chosen) - len(survivors)} of {len(chosen)} in {time.monotonic() - start:.0f} s")
    for fault in survivors:
        print(f"  not killed: {fault.file}: {fault.what}: {ARGUED.get(fault.what, 'add a test')}")
    return int(any(fault.what not in ARGUED for fault in survivors))


def unusable(chosen: Iterable[Fault]) -> Iterator[str]:
    """A line for every fault that cannot be put in as it is written."""
    for fault in chosen:
        count = (ROOT / "cascade_rcnn" / fault.file).read_text(encoding="utf-8").count(fault.old)
        if count != 1:
            yield f"{fault.file}: {fault.what}: its old text occurs {count} times, not once: {fault.old!r}"
        for test in fault.tests:
            if not (ROOT / "tests" / test.partition("::")[0]).is_file():
                yield f"{fault.file}: {fault.what}: there is no tests/{test}"


def check_without_faults(copies: Copies, chosen: list[Fault]) -> str:
    """Why the check would mean nothing: tests that fail, or take too long, without any fault. Empty if none do."""
    tests = sorted({test for fault in chosen for test in fault.tests})
    folder = copies.free.get()
    code = run_tests(folder, tuple(tests), timeout=10 * TIMEOUT)
    copies.free.put(folder)
    return "" if code == 0 else f"tests fail without a fault (pytest says {code}): {' '.join(tests)}"


class Copies:
    """Temporary copies of the package, one for each job."""

    def __init__(self, count: int) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="mutants-")
        self.free: SimpleQueue[Path] = SimpleQueue()
        for number in range(count):
            folder = Path(self._temporary.name, str(number))
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / "cascade_rcnn", folder / "cascade_rcnn", ignore=ignored)
            self.free.put(folder)

    def __enter__(self) -> Copies:
        return self

    def __exit__(self, *_: object) -> None:
        self._temporary.cleanup()

    def outcome(self, fault: Fault) -> str:
        """ "killed", "survived", "timeout" or "broken" (the tests could not even begin)."""
        folder = self.free.get()
        path = folder / "cascade_rcnn" / fault.file
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace(fault.old, fault.new), encoding="utf-8")
        try:
            code = run_tests(folder, fault.tests, timeout=TIMEOUT)
        finally:
            path.write_text(text, encoding="utf-8")
            self.free.put(folder)
        return {0: "survived", 1: "killed", None: "timeout"}.get(code, "broken")


def run_tests(folder: Path, tests: tuple[str, ...], *, timeout: float) -> int | None:
    """pytest's exit code with the package in ``folder`` (1: a test failed); None after ``timeout`` seconds."""
    # python -m puts the current folder first: the copy, not the checkout. No bytecode: two faults within a second
    # that leave the size as it was would share it.
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    plugin = "import cascade_rcnn, pathlib\n\ndef pytest_configure(config):\n"
    plugin += f"    assert pathlib.Path(cascade_rcnn.__file__).is_relative_to({str(folder)!r}), cascade_rcnn.__file__\n"
    (folder / "the_copy_is_tested.py").write_text(plugin, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "the_copy_is_tested"]
    command += [
        "-c",
        str(ROOT / "pyproject.toml"),
        "--rootdir",
        str(ROOT),
        *(str(ROOT / "tests" / one) for one in tests),
    ]
    try:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return None
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
