"""What the benchmark measures apart from the models' time: memory of whole processes, RoIAlign, reading of images.

Nothing heavy is imported at the top: a process whose memory is measured has in it what it needs and no more.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from cascade_rcnn.benchmark.run import Setting

ROIS = 1000


# Memory


def measure_memory(setting: Setting, config: str, *, repeats: int) -> dict[str, dict[str, list[int]]]:
    """Bytes that fresh processes had resident, ours and the peer's in turn: lists ``peak`` and ``before`` the model.

    Predicting: a process imports, loads weights from a file and predicts the same images twice; its peak is that of its
    whole life. Training: models are made from the rule, two steps follow, the peak is that of the steps.
    Empty where the system does not tell (Linux does).
    """
    from cascade_rcnn.benchmark import run

    if not Path("/proc/self/clear_refs").exists():
        return {}
    found: dict[str, dict[str, list[int]]] = {who: {"peak": [], "before": []} for who in ("ours", "peer")}
    with tempfile.TemporaryDirectory() as folder:
        _save_contenders(setting, Path(folder))
        call = {"folder": folder, "config": config, "size": setting.size, "batch": setting.batch,
                "train": setting.train, "masks": setting.masks,
                "options": run.peer_options(setting)}  # fmt: skip
        for _ in range(repeats):
            for who, numbers in found.items():
                for key, value in _in_own_process(who, call).items():
                    numbers[key].append(value)
    return found


def _save_contenders(setting: Setting, folder: Path) -> None:
    """Weights of both models and the images, for processes that only predict."""
    import torch

    from cascade_rcnn.benchmark import run, stopwatch
    from cascade_rcnn.checkpoint import save_checkpoint
    from cascade_rcnn.models.build import build_model

    if setting.train:
        return
    model = build_model(setting.config.model, run.CLASSES)
    stopwatch.seed_weights(model)
    names = [str(number) for number in range(run.CLASSES)]
    save_checkpoint(folder / "ours.safetensors", model.state_dict(), config=setting.config, class_names=names)
    peer = build_peer(masks=setting.masks, options=run.peer_options(setting))
    stopwatch.seed_weights(peer)
    torch.save(peer.state_dict(), folder / "peer.pth")
    torch.save(run.images_of(setting).pixels, folder / "pixels.pth")


def _in_own_process(who: str, call: dict[str, Any]) -> dict[str, int]:
    code = "import sys; from cascade_rcnn.benchmark.parts import report_memory; report_memory(*sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", code, who, json.dumps(call)], capture_output=True, text=True,
                          check=True)  # fmt: skip
    return json.loads(done.stdout.strip().splitlines()[-1])  # type: ignore[no-any-return]


def report_memory(who: str, call: str) -> None:
    """Runs in the process that is measured: prints what it had at most, and before it made the model."""
    wanted = json.loads(call)
    if wanted["train"]:
        run, before = _prepare_training(who, wanted)
    else:
        run, before = (_prepare_ours if who == "ours" else _prepare_peer)(Path(wanted["folder"]), wanted)
    run()
    run()
    print(json.dumps({"peak": _resident("VmHWM"), "before": before}))


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def _prepare_ours(folder: Path, _: dict[str, Any]) -> tuple[Callable[[], Any], int]:
    import torch

    from cascade_rcnn.inference.detections import detect
    from cascade_rcnn.predict import load
    from cascade_rcnn.structures import ImageBatch

    before = _resident("VmRSS")
    model = load(folder / "ours.safetensors", device="cpu").model
    pixels = torch.load(folder / "pixels.pth", weights_only=True)
    sizes = torch.tensor([pixels.shape[2:]] * len(pixels))
    return lambda: detect(model, ImageBatch(pixels, sizes, sizes)), before


def _prepare_peer(folder: Path, wanted: dict[str, Any]) -> tuple[Callable[[], Any], int]:
    import torch
    from torchvision.models import detection  # noqa: F401 (what it takes in memory belongs to the time before)

    before = _resident("VmRSS")
    model = build_peer(masks=wanted["masks"], options=wanted["options"]).eval()
    model.load_state_dict(torch.load(folder / "peer.pth", weights_only=True))
    pixels = torch.load(folder / "pixels.pth", weights_only=True)

    def run() -> Any:
        with torch.inference_mode():
            return model([image.float() / 255 for image in pixels])

    return run, before


def _prepare_training(who: str, wanted: dict[str, Any]) -> tuple[Callable[[], Any], int]:
    import torch

    from cascade_rcnn.benchmark import run, stopwatch
    from cascade_rcnn.recipes import load_config

    before = _resident("VmRSS")
    setting = run.Setting(load_config(wanted["config"]), tuple(wanted["size"]), wanted["batch"],
                                torch.device("cpu"), train=True)  # fmt: skip
    run = run.contender(setting, who).run
    stopwatch.reset_peak_memory(setting.device)
    return run, before


def build_peer(*, masks: bool, options: dict[str, Any]) -> nn.Module:
    """torchvision's Faster or Mask R-CNN of ResNet-50 without weights, for images that keep their size."""
    from torchvision.models import detection

    make = detection.maskrcnn_resnet50_fpn if masks else detection.fasterrcnn_resnet50_fpn
    return make(weights=None, weights_backbone=None, _skip_resize=True, **options)  # type: ignore[no-any-return]


# RoIAlign


def measure_roi_align(setting: Setting, *, rounds: int, compiled: bool) -> dict[str, float]:
    """Seconds to read ``ROIS`` boxes of all sizes from four levels of 256 channels, 7 x 7 bins, adaptive samples.

    ``torchvision``: its operator on each level's boxes, maps as convolutions of its models leave them. ``ours``: all
    levels in one call, on our channels-last maps; ``compiled``: the same within ``torch.compile``. In turn, medians.
    """
    import torch
    from torchvision.ops import roi_align as peer

    from cascade_rcnn.benchmark import stopwatch
    from cascade_rcnn.models.ops.roi_align import assign_levels, roi_align_rows

    strides, device = (4, 8, 16, 32), setting.device
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(1, 256, *(side // stride for side in setting.size), generator=generator).to(device)
            for stride in strides]  # fmt: skip
    ours = [x.contiguous(memory_format=torch.channels_last) for x in maps]
    # As proposals are: areas of 16^2 pixels to the image's, evenly in the logarithm, and ratios of 1/2 to 2.
    frame = torch.tensor([setting.size[1], setting.size[0]], dtype=torch.float32)
    area = 16 * (min(setting.size) / 16) ** torch.rand(ROIS, 1, generator=generator)
    turned = 2 ** (torch.rand(ROIS, 1, generator=generator) - 0.5)
    sides = torch.cat((area * turned, area / turned), dim=1).minimum(frame)
    corners = torch.rand(ROIS, 2, generator=generator) * (frame - sides)
    boxes = torch.cat((corners, corners + sides), dim=1).to(device)
    levels = assign_levels(boxes, len(strides))

    def theirs() -> None:
        result = torch.empty(ROIS, 256, 7, 7, device=device)
        for level, (x, stride) in enumerate(zip(maps, strides)):
            rows = (levels == level).nonzero().squeeze(1)
            result[rows] = peer(x, [boxes[rows]], 7, 1 / stride, 0, True)

    def rows_of_all(features: list[torch.Tensor], boxes: torch.Tensor) -> torch.Tensor:
        return roi_align_rows(features, boxes[None], output_size=7, strides=strides)

    calls: dict[str, Callable[[], Any]] = {"torchvision": theirs, "ours": lambda: rows_of_all(ours, boxes)}
    if compiled:
        whole = torch.compile(rows_of_all)
        calls["compiled"] = lambda: whole(ours, boxes)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    with torch.inference_mode():
        for round_ in range(rounds + 1):  # the first warms up
            for name, call in calls.items():
                stopwatch.synchronize(device)
                start = time.perf_counter()
                call()
                stopwatch.synchronize(device)
                if round_:
                    seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


# Reading images


def measure_file(setting: Setting, *, rounds: int = 5) -> dict[str, float]:
    """Seconds to decode a JPEG file of 0.6 of the network's size (as COCO's are), and to resize it."""
    import torch
    from PIL import Image

    from cascade_rcnn.benchmark import stopwatch
    from cascade_rcnn.data.transforms import resize_for_test
    from cascade_rcnn.inference.media import to_array

    height, width = (round(side * 0.6) for side in setting.size)
    data = replace(setting.config.data, test_short_side=min(setting.size), long_side=max(setting.size),
                   short_side=(min(setting.size),), short_side_mode="choice")  # fmt: skip
    decode, resize = [], []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image.jpg"
        Image.fromarray(stopwatch.synthetic_image((height, width)).permute(1, 2, 0).numpy()).save(path, quality=90)
        for _ in range(rounds):
            start = time.perf_counter()
            pixels = torch.from_numpy(to_array(path)).permute(2, 0, 1)
            middle = time.perf_counter()
            resize_for_test(pixels, data, semantics=setting.config.model.semantics)
            decode.append(middle - start)
            resize.append(time.perf_counter() - middle)
    return {"decode_seconds": statistics.median(decode), "resize_seconds": statistics.median(resize)}


def measure_reading(setting: Setting, root: Path) -> dict[str, float]:
    """Images per second of the training loader: in one process, and with the recipe's workers.

    ``decode_seconds`` is what the image decoder alone needs for one of the data set's images.
    """
    from cascade_rcnn.data.dataset import DetectionDataset
    from cascade_rcnn.data.files import read_image
    from cascade_rcnn.data.formats.open import open_split
    from cascade_rcnn.data.loader import measure_loading

    config = replace(setting.config.data, root=str(root))
    dataset = DetectionDataset(open_split(root, config.train), config, training=True, masks=setting.masks,
                               semantics=setting.config.model.semantics)  # fmt: skip
    paths = [dataset.packed.path(index) for index in range(min(len(dataset), 100))]
    start = time.perf_counter()
    for path in paths:
        read_image(path, max_pixels=config.max_pixels)
    numbers = {"decode_seconds": (time.perf_counter() - start) / len(paths),
               "images_per_second": measure_loading(dataset, workers=0)}  # fmt: skip
    if config.workers:
        numbers |= {"workers": config.workers, "with_workers": measure_loading(dataset, workers=config.workers)}
    return numbers
