"""Peak memory of fresh processes.

Nothing heavy is imported at the top: a process whose memory is measured has in it what it needs and no more.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cascade_rcnn.benchmark.peer import build_peer

if TYPE_CHECKING:
    from cascade_rcnn.benchmark.contenders import Setting


def measure_memory(setting: Setting, config: str, *, repeats: int) -> dict[str, dict[str, list[int]]]:
    """Bytes that fresh processes had resident, ours and the peer's in turn: lists ``peak`` and ``before`` the model.

    Predicting: a process imports, loads weights from a file and predicts the same images twice; its peak is that of its
    whole life. Training: models are made from the rule, two steps follow, the peak is that of the steps.
    Empty where the system does not tell (Linux does).
    """
    from cascade_rcnn.benchmark.contenders import peer_options

    if not Path("/proc/self/clear_refs").exists():
        return {}
    found: dict[str, dict[str, list[int]]] = {who: {"peak": [], "before": []} for who in ("ours", "peer")}
    with tempfile.TemporaryDirectory() as folder:
        _save_contenders(setting, Path(folder))
        call = {
            "folder": folder,
            "config": config,
            "size": setting.size,
            "batch": setting.batch,
            "train": setting.train,
            "masks": setting.masks,
            "options": peer_options(setting),
        }
        for _ in range(repeats):
            for who, numbers in found.items():
                for key, value in _in_own_process(who, call).items():
                    numbers[key].append(value)
    return found


def _save_contenders(setting: Setting, folder: Path) -> None:
    """Weights of both models and the images, for processes that only predict."""
    import torch

    from cascade_rcnn.benchmark import stopwatch
    from cascade_rcnn.benchmark.contenders import CLASSES, images_of, peer_options
    from cascade_rcnn.checkpoint import save_checkpoint
    from cascade_rcnn.models.build import build_model

    if setting.train:
        return
    model = build_model(setting.config.model, CLASSES)
    stopwatch.seed_weights(model)
    names = [str(number) for number in range(CLASSES)]
    save_checkpoint(folder / "ours.safetensors", model.state_dict(), config=setting.config, class_names=names)
    peer = build_peer(masks=setting.masks, options=peer_options(setting))
    stopwatch.seed_weights(peer)
    torch.save(peer.state_dict(), folder / "peer.pth")
    torch.save(images_of(setting).pixels, folder / "pixels.pth")


def _in_own_process(who: str, call: dict[str, Any]) -> dict[str, int]:
    code = "import sys; from cascade_rcnn.benchmark.memory import report_memory; report_memory(*sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, who, json.dumps(call)], capture_output=True, text=True, check=True
    )
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

    from cascade_rcnn.inference.detector import load
    from cascade_rcnn.inference.run_model import detect
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

    from cascade_rcnn.benchmark import stopwatch
    from cascade_rcnn.benchmark.contenders import Setting, contender
    from cascade_rcnn.recipes import load_config

    before = _resident("VmRSS")
    setting = Setting(
        load_config(wanted["config"]), tuple(wanted["size"]), wanted["batch"], torch.device("cpu"), train=True
    )
    run = contender(setting, who).run
    stopwatch.reset_peak_memory(setting.device)
    return run, before
