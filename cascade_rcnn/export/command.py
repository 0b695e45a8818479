"""``cascade-rcnn export CHECKPOINT --to onnx|openvino|torch``: the network for other runtimes, beside PyTorch."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cascade_rcnn.atomic_files import write_json
from cascade_rcnn.checkpoint import Checkpoint, find_checkpoint, load_checkpoint
from cascade_rcnn.config import Config, DataConfig
from cascade_rcnn.data.images import to_array
from cascade_rcnn.errors import ConfigError, DataError, UserError
from cascade_rcnn.export import network, report
from cascade_rcnn.export.quantise import CALIBRATION_IMAGES, Feed, quantise
from cascade_rcnn.inference.detector import Detector, checked_thresholds, load
from cascade_rcnn.inference.media import collect
from cascade_rcnn.messages import one_line, printable
from cascade_rcnn.recipes import apply_overrides
from cascade_rcnn.rounding import round_up
from cascade_rcnn.runtime.network import NAMES, ExportInfo, exported_file
from cascade_rcnn.zoo.store import resolve


@dataclass(frozen=True)
class Calibration:
    """Images that show what ranges of numbers a network sees."""

    folder: Path
    most: int = CALIBRATION_IMAGES  # of its images [1..]


def run_export(
    checkpoint: str | Path,
    *,
    to: str,
    out: Path | None = None,
    size: tuple[int, int] | None = None,
    batch: int | None = None,
    int8: Calibration | None = None,
    data: Path | None = None,
    split: str = "",
    settings: Sequence[str] = (),
) -> Path:
    """Write a folder with the network (``model.onnx``, ``model.xml`` or ``model.pt2``) and ``report.json``.

    Args:
        size: the only input size (height, width), rounded up to multiples of 32; None: any size.
        batch: the only number of images at once; None: any, or 1 with a fixed size.
        int8: 8-bit integers, and the images to calibrate them with.
        data: data set for the comparison on real pictures, and for the AP of both.
        settings: changes such as ``--model.max-detections 300``, which the network then holds.

    Raises:
        UserError: what cannot be exported, a runtime that is not installed, a folder that holds something else.
    """
    if exported_file(checkpoint) is not None:
        raise UserError(f"{printable(checkpoint)}: is exported already; give the checkpoint that it was made from")
    if int8 is not None and to == "torch":
        raise UserError("--int8 goes with --to openvino or --to onnx")
    if split and data is None:
        raise UserError(f"--split {split}: names a part of a data set; give that with --data DIR")
    _check_packages(to, int8=int8 is not None)
    path = find_checkpoint(resolve(checkpoint))
    saved = load_checkpoint(path)
    config = _changed_settings(saved.config, settings)
    info = _info(path, saved, config, size, batch, int8=int8 is not None)
    here = None if Path(checkpoint).exists() else Path()  # published weights lie in a cache
    folder = out or _default_folder(path, to, here, int8=int8 is not None)
    model = network.network_of(path, info.config, to=to)
    feeds = None if int8 is None else calibration_inputs(path, int8, info)
    split = split or info.config.data.val
    if data is not None:
        report.split_to_measure(path, info.config, info.class_names, data, split)  # refused now, not after minutes
    compared = report.pictures(data, split, folder=None if int8 is None else int8.folder, levels=info.config.data.range)
    target = folder / NAMES[to]
    with _made_folder(folder):
        if info.size is not None and info.config.model.norm == "group":
            print(
                "group norm sees the padding of a fixed size: detections differ from the checkpoint's; --dynamic keeps "
                "them"
            )
        print(f"tracing the network ({'any size' if info.size is None else f'{info.size[0]} x {info.size[1]}'}) ...")
        program = network.trace(model, size=info.size, batch=info.batch)
        kept = _write(program, target, info, feeds)
    del program, model
    _report(path, target, info, compared=compared, data=data, split=split, kept=kept)
    return folder


def _check_packages(to: str, *, int8: bool) -> None:
    """Tracing takes minutes: what is missing is said before."""
    needed = {
        "torch": [],
        "onnx": ["onnx", "onnxscript", "onnxruntime"],
        "openvino": ["onnx", "onnxscript", "openvino"],
    }[to]
    needed += ["nncf"] if int8 and to == "openvino" else []
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        extra = "int8" if int8 and to == "openvino" else to
        raise UserError(f"--to {to}: the package {missing[0]} is missing: pip install 'cascade-rcnn[{extra}]'")


_EQUAL = 0.95  # share of the detections below which a float export is called different
_CHANGEABLE = ("score_threshold", "max_detections", "nms", "nms_iou", "stop_after_stage")


def _changed_settings(config: Config, words: Sequence[str]) -> Config:
    """The configuration with settings of the test time changed. Raises ConfigError for those of the network itself."""
    changed = apply_overrides(config, list(words))
    kept = {name: getattr(changed.model, name) for name in _CHANGEABLE}
    same = replace(config, model=replace(config.model, **kept), data=changed.data, automatic=changed.automatic)
    if same != changed:
        names = ", ".join(f"--model.{name.replace('_', '-')}" for name in _CHANGEABLE)
        raise ConfigError(
            f"{' '.join(words)}: the trained network is exported as it is; only {names} and --data.* change"
        )
    return changed


def _without_places(config: Config) -> Config:
    """An export is given away: it does not tell where files of the training lay."""
    return replace(
        config,
        model=replace(config.model, backbone_weights=""),
        data=replace(config.data, root="", augment=""),
        train=replace(config.train, init=""),
    )


def _info(
    path: Path, saved: Checkpoint, config: Config, size: tuple[int, int] | None, batch: int | None, *, int8: bool
) -> ExportInfo:
    if batch is not None and batch < 1:
        raise ConfigError(f"--batch {batch}: at least 1")
    if size is not None:
        if min(size) < 1:
            raise ConfigError(f"--size {size[0]} {size[1]}: height and width in pixels")
        given, size = size, (round_up(size[0], network.MULTIPLE), round_up(size[1], network.MULTIPLE))
        if size != given:
            print(f"--size {given[0]} {given[1]}: rounded up to {size[0]} x {size[1]}, multiples of {network.MULTIPLE}")
        if math.prod(size) > config.data.max_pixels:
            raise ConfigError(f"--size {size[0]} {size[1]}: more than data.max_pixels {config.data.max_pixels}")
    return ExportInfo(
        config=_without_places(replace(config, data=_limits(config.data, size))),
        class_names=saved.class_names,
        category_ids=saved.category_ids,
        thresholds=checked_thresholds(saved.metadata.get("thresholds", {}), path),
        size=size,
        batch=batch if size is None else batch or 1,
        int8=int8,
    )


def _limits(data: DataConfig, size: tuple[int, int] | None) -> DataConfig:
    """Pictures fit into a fixed ``size``, and are padded to sides that the network takes, to no others."""
    multiple = math.lcm(data.pad_multiple, network.MULTIPLE)
    if size is None:
        return replace(data, pad_multiple=multiple, pad_buckets=False)
    short = min(data.test_short_side or max(data.short_side), min(size))
    return replace(
        data,
        short_side=tuple(min(side, short) for side in data.short_side),
        test_short_side=short,
        long_side=min(data.long_side, max(size)),
        pad_multiple=network.MULTIPLE,
        pad_buckets=False,
    )


def _default_folder(path: Path, to: str, place: Path | None, *, int8: bool) -> Path:
    run = path.stem in ("best", "last")
    name = f"{to}_int8" if int8 else to
    return (place or path.parent) / (name if run else f"{path.stem}_{name}")


_WRITTEN = (*NAMES.values(), "model.bin", "report.json")
_WORK = ".unfinished"  # folder within the one that is written


def _make_folder(folder: Path) -> None:
    """Raises UserError where it is a file, holds something else, or cannot be written."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{printable(folder)}: is a file; give a folder as --out")
    ours = {*_WRITTEN, _WORK}
    try:
        others = [child.name for child in folder.iterdir() if child.name not in ours] if folder.exists() else []
        if others:
            raise UserError(f"{printable(folder)}: holds {printable(others[0])}; give an empty or new folder as --out")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{printable(folder)}: cannot be written ({reason}); give another folder as --out") from error


@contextlib.contextmanager
def _made_folder(folder: Path) -> Iterator[None]:
    """The folder, to write into; one that is new and stays empty is taken away again, after a SIGTERM too."""
    new = not folder.exists()
    _make_folder(folder)
    try:
        with _sigterm_unwinds():
            yield
    finally:
        if new:
            with contextlib.suppress(OSError):  # holds an export
                folder.rmdir()


@contextlib.contextmanager
def _sigterm_unwinds() -> Iterator[None]:
    """Within, SIGTERM leaves by way of the ``finally`` clauses, with its usual exit code."""

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # where no handler can be set
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _write(program: Any, target: Path, info: ExportInfo, feeds: list[Feed] | None) -> list[str]:
    """Write the network's file; the groups of layers that stay in float, where integers were asked for.

    It is written beside its place: an export that is interrupted leaves the one before, or none.

    Raises:
        UserError: the disk is full, say, or a converter refuses the network.
    """
    work = target.with_name(_WORK)
    try:
        shutil.rmtree(work, ignore_errors=True)  # of an export that was interrupted
        work.mkdir()
        kept = _write_whole(program, work / target.name, info, feeds)
        for old in _WRITTEN:
            target.with_name(old).unlink(missing_ok=True)
        for file in (target.with_suffix(".bin"), target):  # without the second one it is no export yet
            if (work / file.name).exists():
                (work / file.name).replace(file)
    except OSError as error:
        raise UserError(
            f"{printable(target)}: cannot be written ({one_line(error)[:200]}); free some space, or give another "
            "folder as --out"
        ) from error
    except UserError:
        raise
    except Exception as error:  # OpenVINO, NNCF and the quantiser of ONNX Runtime raise kinds of their own
        way_out = "export without --int8, or" if feeds else "update the packages, or"
        raise UserError(
            f"{printable(target)}: this network cannot be written ({type(error).__name__}: {one_line(error)[:200]}); "
            f"{way_out} choose another format with --to"
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return kept


def _write_whole(program: Any, target: Path, info: ExportInfo, feeds: list[Feed] | None) -> list[str]:
    if target.suffix == ".pt2":
        network.write_torch(program, target, info)
        return []
    plain = target.with_name("plain.onnx")
    print("writing it as ONNX ...")
    network.write_onnx(program, plain if feeds or target.suffix == ".xml" else target, info)
    if feeds:
        print("finding the layers that bear 8-bit integers ...")
        done = quantise(plain, target, feeds, to="openvino" if target.suffix == ".xml" else "onnx")
        (network.mark_openvino if target.suffix == ".xml" else network.mark_onnx)(target, info)
        return done.kept
    if target.suffix == ".xml":
        network.write_openvino(plain, target, info)
    return []


_FEW_IMAGES = 20


def calibration_inputs(path: Path, calibration: Calibration, info: ExportInfo) -> list[Feed]:
    """Network inputs of images that are spread evenly over the folder.

    Raises:
        UserError: a file, no image there, or none that can be read.
    """
    images = calibration.folder
    if images.is_file():
        raise UserError(f"{printable(images)}: is a file; give a folder of about 100 images as --int8")
    detector = load(path, device="cpu")
    detector.config, detector.canvas = info.config, info.size
    files = [file.path for file in collect([images]) if not file.is_video]
    count = min(len(files), calibration.most)
    feeds: list[Feed] = []
    for file in (files[number * len(files) // count] for number in range(count)):
        try:
            batch = detector.prepare([to_array(file, range=info.config.data.range)])
        except DataError as error:
            print(f"left out of the calibration: {str(error).partition(';')[0]}")
            continue
        rows = info.batch or 1
        feeds.append(
            {"pixels": batch.pixels.expand(rows, -1, -1, -1).numpy(), "sizes": batch.sizes.expand(rows, -1).numpy()}
        )
    if not feeds:
        raise UserError(f"{printable(images)}: no images to calibrate with; give a folder of about 100")
    if len(feeds) < _FEW_IMAGES:
        print(
            f"int8: calibrating on {len(feeds)} image{'s' * (len(feeds) != 1)}; about {CALIBRATION_IMAGES} are better"
        )
    return feeds


def _report(
    path: Path,
    target: Path,
    info: ExportInfo,
    *,
    compared: tuple[list[report.Pixels], str],
    data: Path | None,
    split: str,
    kept: list[str],
) -> None:
    images, what = compared
    print(f"comparing with PyTorch on {what} ...")
    exported = load(target.parent)
    reference = load(path, device="cpu")
    reference.config, reference.canvas = info.config, info.size
    _take_settings(reference, info.config)
    content: dict[str, Any] = {
        "network": target.name,
        "runtime": exported.model.runtime,  # type: ignore[union-attr]
        "checkpoint": path.name,
        "size": info.size or "any",
        "batch": info.batch or "any",
        "megabytes": sum(file.stat().st_size for file in target.parent.glob("model.*")) / 1e6,
        "compared_on": what,
        "equality": report.compare(reference, exported, images),
        "time": report.time_both(reference, exported, images),
    }
    if target.suffix == ".onnx":
        content["opset"] = network.OPSET
    if info.int8:
        content["groups_in_float"] = kept
    if data is not None:
        print(f"measuring the AP of both on {split} ...")
        content["metrics"] = report.average_precision(path, target, data, split)
        for key in content["metrics"]["pytorch"]:
            both = (100 * content["metrics"][name][key] for name in ("pytorch", "exported"))
            print("{}: {:.2f} with PyTorch, {:.2f} exported".format(key, *both))
    write_json(target.with_name("report.json"), content)
    equality, seconds = content["equality"], content["time"]
    filled = f" (one picture, filled up to {info.batch})" if (info.batch or 1) > 1 else ""
    print(
        f"{printable(target)}: {content['megabytes']:.1f} MB; {equality['matched']} of {equality['detections']} "
        f"detections as PyTorch's on {what}; {seconds['exported_ms']:.0f} ms{filled}, "
        f"PyTorch {seconds['pytorch_ms']:.0f} ms"
    )
    if not equality["detections"]:
        print("nothing was found on these pictures, which therefore show nothing: give --data DIR")
    elif not info.int8 and equality["matched"] < _EQUAL * equality["detections"]:
        share = 100 * equality["matched"] / equality["detections"]
        print(f"only {share:.0f} % are the same: measure the AP of both with --data DIR before you use it")
    elif equality.get("mask_iou_mean", 1.0) < report.MASK_IOU:
        alike = equality["mask_iou_mean"]
        print(f"masks have an IoU of {alike:.3f} on average: measure the AP of both with --data DIR before you use it")
    print(f"use it as a checkpoint: cascade-rcnn predict {printable(target.parent)} photos")


def _take_settings(detector: Detector, config: Config) -> None:
    """Settings of the test time that the exported network holds, in the network of the checkpoint."""
    model, cascade = config.model, detector.model.cascade
    cascade.details = replace(
        cascade.details,
        score_threshold=model.score_threshold,
        max_detections=model.max_detections,
        nms=model.nms,
        nms_iou=model.nms_iou,
    )
    if model.stop_after_stage:
        cascade.stages_at_test = model.stop_after_stage
