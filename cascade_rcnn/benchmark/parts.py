"""What the benchmark measures apart from the models' time: RoIAlign and the reading of images."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cascade_rcnn.benchmark.contenders import Setting

ROIS = 1000


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
    from cascade_rcnn.models.ops.roi_sampling import Sampling

    strides, device = (4, 8, 16, 32), setting.device
    generator = torch.Generator().manual_seed(0)
    maps = [
        torch.randn(1, 256, *(side // stride for side in setting.size), generator=generator).to(device)
        for stride in strides
    ]
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
        return roi_align_rows(features, boxes[None], Sampling(7, strides))

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
    from cascade_rcnn.data.images import to_array
    from cascade_rcnn.data.transforms import resize_for_test

    height, width = (round(side * 0.6) for side in setting.size)
    data = replace(
        setting.config.data,
        test_short_side=min(setting.size),
        long_side=max(setting.size),
        short_side=(min(setting.size),),
        short_side_mode="choice",
    )
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
    from cascade_rcnn.data.formats.open import open_split
    from cascade_rcnn.data.images import read_image
    from cascade_rcnn.data.loader import measure_loading

    config = replace(setting.config.data, root=str(root))
    dataset = DetectionDataset(
        open_split(root, config.train),
        config,
        training=True,
        masks=setting.masks,
        semantics=setting.config.model.semantics,
    )
    paths = [dataset.packed.path(index) for index in range(min(len(dataset), 100))]
    start = time.perf_counter()
    for path in paths:
        read_image(path, max_pixels=config.max_pixels)
    numbers = {
        "decode_seconds": (time.perf_counter() - start) / len(paths),
        "images_per_second": measure_loading(dataset, workers=0),
    }
    if config.workers:
        numbers |= {"workers": config.workers, "with_workers": measure_loading(dataset, workers=config.workers)}
    return numbers
