"""The benchmark on a small network: what it reports, not how fast this machine is."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cascade_rcnn.benchmark import contenders as contenders_module
from cascade_rcnn.benchmark import run as run_module
from cascade_rcnn.benchmark import stopwatch
from cascade_rcnn.benchmark.contenders import Setting
from cascade_rcnn.benchmark.memory import measure_memory
from cascade_rcnn.benchmark.parts import measure_roi_align
from cascade_rcnn.benchmark.run import run_benchmark
from cascade_rcnn.config import ModelConfig
from cascade_rcnn.data.synthetic_shapes import generate_shapes
from cascade_rcnn.errors import UserError
from cascade_rcnn.models.build import build_model
from cascade_rcnn.recipes import load_config
from cascade_rcnn.runtime.network import ExportInfo
from cascade_rcnn.structures import ImageBatch
from handmade_network import handmade_network
from small_recipe import RECIPE

SIZE = (64, 96)


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "small.py"
    path.write_text(RECIPE.format(masks="none"))
    return str(path)


@pytest.fixture(autouse=True)
def no_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever processor the tests run on."""
    monkeypatch.setattr(contenders_module, "has_bfloat16_units", lambda: False)
    monkeypatch.setattr(run_module, "has_bfloat16_units", lambda: False)
    monkeypatch.setattr(run_module, "has_int8_units", lambda: False)


def test_bfloat16_is_measured_against_its_own_limit_where_there_are_units(
    recipe: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contenders_module, "has_bfloat16_units", lambda: True)
    monkeypatch.setattr(run_module, "has_bfloat16_units", lambda: True)
    monkeypatch.setattr(run_module, "measure_memory", lambda *_, **__: {})
    report = run_benchmark(config=recipe, size=SIZE, device="cpu", rounds=1)
    names = [model["name"] for model in report["models"]]
    assert len(names) == 3 and names[1] == f"{names[0]}, bfloat16"
    half = report["models"][1]
    assert half["limit"] == report["limits"]["bfloat16_macs_per_second"]
    assert half["share_of_limit"] == pytest.approx(half["macs"] / half["limit"] / half["seconds"])
    told = " ".join(capsys.readouterr().out.split())
    assert "other products of this processor: bfloat16" in told and "no int8 units" in told


def test_runtimes_are_measured_in_the_same_rounds(
    recipe: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")

    def write(_: Any, path: Path, info: ExportInfo) -> None:
        handmade_network(path, size=info.size, batch=info.batch)

    def quantise(network: Path, out: Path, feeds: Any, *, to: str, **_: Any) -> None:
        shutil.copy(network, out)
        assert to == "onnx" and feeds[0]["pixels"].shape == (1, 3, *SIZE)

    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "onnxruntime" or None)
    monkeypatch.setattr(contenders_module, "quantise", quantise)
    monkeypatch.setattr(contenders_module.network, "mark_onnx", lambda *_: None)
    monkeypatch.setattr(contenders_module.network, "trace", lambda *_, **__: None)
    monkeypatch.setattr(contenders_module.network, "write_onnx", write)  # another network: the real one takes a minute
    monkeypatch.setattr(run_module, "measure_memory", lambda *_, **__: {})
    report = run_benchmark(config=recipe, size=SIZE, device="cpu", rounds=2, also=["runtimes"])
    names = [model["name"] for model in report["models"]]
    assert names[1].startswith("the same in ONNX Runtime") and names[-1].startswith("torchvision")
    assert names[2] == f"{names[1]}, int8" and len(names) == 4
    assert "share_of_limit" in report["models"][1] and "share_of_limit" not in report["models"][2], "no int8 units"
    assert report["models"][1]["macs"] == report["models"][0]["macs"] and names[1] in capsys.readouterr().out
    with pytest.raises(UserError, match="in predicting, on a CPU"):
        run_benchmark(config=recipe, size=SIZE, device="cpu", train=True, also=["runtimes"])


def test_integers_and_bfloat16_go_together_where_a_processor_has_both(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []

    class Opened:
        runtime = "OpenVINO"

        def __init__(self, path: Path, *, threads: int, bfloat16: bool) -> None:
            opened.append((path.name, bfloat16))

    monkeypatch.setattr("importlib.util.find_spec", lambda name: name in ("openvino", "nncf") or None)
    for module, names in (
        (contenders_module, ("quantise",)),
        (contenders_module.network, ("trace", "write_onnx", "write_openvino", "mark_openvino")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, lambda *_, **__: None)
    monkeypatch.setattr(contenders_module, "RuntimeNetwork", Opened)
    setting = contenders_module.Setting(load_config(recipe), SIZE, 1, torch.device("cpu"), False)
    for units, expected in ((False, [False, False]), (True, [False, True, False, True])):
        monkeypatch.setattr(contenders_module, "has_bfloat16_units", lambda found=units: found)
        opened.clear()
        found = contenders_module.runtime_contenders(setting, tmp_path)
        assert [half for _, half in opened] == expected and len({name for name, _ in opened}) == 2
        named = [(one.name.removeprefix("the same in OpenVINO"), one.dtype) for one in found]
        plain: list[tuple[str, torch.dtype | None]] = [("", None), (", int8", torch.int8)]
        halves = [(", bfloat16", torch.bfloat16), (", int8 and bfloat16", torch.int8)]
        assert named == ([plain[0], halves[0], plain[1], halves[1]] if units else plain)


def test_products_are_measured_in_each_round(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "has_bfloat16_units", lambda: True)
    measured = []
    monkeypatch.setattr(
        run_module.stopwatch,
        "matmul_rate",
        lambda device, dtype, **_: (measured.append(dtype), float(len(measured)))[1],
    )
    contender = contenders_module.Contender("a", lambda: None, 1)
    setting = contenders_module.Setting(load_config(recipe), SIZE, 1, torch.device("cpu"), False)
    found = run_module._measure(setting, [contender], 3)
    assert measured == [torch.float32, torch.bfloat16] * 3
    assert (found["macs_per_second"], found["bfloat16_macs_per_second"]) == (3, 4)


def parts_of(model: dict[str, Any]) -> dict[str, float]:
    return {part["name"]: part["seconds"] for part in model["parts"]}


def test_prediction_is_measured_part_by_part_beside_the_peer(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cascade_rcnn.benchmark.memory._save_contenders", lambda *_: None)
    monkeypatch.setattr(
        "cascade_rcnn.benchmark.memory._in_own_process",
        lambda who, _: {"peak": {"ours": 10**9, "peer": 2 * 10**9}[who], "before": 5 * 10**8},
    )
    monkeypatch.setattr("cascade_rcnn.data.loader.measure_loading", lambda dataset, workers: float(len(dataset)))
    data = generate_shapes(tmp_path / "data", train_images=4, val_images=1, size=64)
    report = run_benchmark(
        config=recipe, size=SIZE, device="cpu", rounds=2, data=data, out=tmp_path / "deep" / "report.json"
    )
    assert json.loads((tmp_path / "deep" / "report.json").read_text()) == report
    ours, peer = report["models"]
    parts = parts_of(ours)
    assert {
        "backbone",
        "FPN",
        "RPN convolutions",
        "RPN NMS",
        "stage 1: RoIAlign",
        "stage 1: head",
        "stage 3: RoIAlign",
        "stage 3: head",
        "postprocess",
        "the rest",
    } <= set(parts)
    assert sum(parts.values()) == pytest.approx(ours["seconds"])
    assert all(seconds > 0 for name, seconds in parts.items() if name != "the rest")
    assert ours["macs"] == sum(part["macs"] for part in ours["parts"])
    assert ours["images_per_second"] == pytest.approx(1 / ours["seconds"])
    assert peer["ratio_to_peer"] == peer["core_ratio_to_peer"] == 1.0
    assert ours["core_seconds"] > 0
    assert report["file"]["decode_seconds"] > 0
    assert report["loading"]["images_per_second"] == 4.0 and report["loading"]["decode_seconds"] > 0
    assert ours["peak_memory_bytes"] == 1e9 and report["memory"]["peer"]["before"] == [5 * 10**8] * 2
    assert report["roi_align"]["ours"] > 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "Faster R-CNN" in printed and "stage 2: head" in printed and "2000" in printed and "is the limit" in printed


def test_training_step_is_measured_with_masks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cascade_rcnn.benchmark.memory._save_contenders", lambda *_: None)
    monkeypatch.setattr(
        "cascade_rcnn.benchmark.memory._in_own_process", lambda *_: {"peak": 3 * 10**9, "before": 10**9}
    )
    path = tmp_path / "masks.py"
    path.write_text(RECIPE.format(masks="every"))
    report = run_benchmark(config=str(path), size=SIZE, device="cpu", train=True, rounds=1)
    ours, peer = report["models"]
    assert {"backward and optimizer", "stage 3: head", "masks: RoIAlign", "masks: head"} <= set(parts_of(ours))
    assert "Mask R-CNN" in peer["name"]
    printed = capsys.readouterr().out
    assert "a training step" in printed and "3000" in printed and "masks: " in printed


def test_peak_memory_is_that_of_fresh_processes(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopwatch, "seed_weights", lambda _: None)  # initial weights do for that, and take less time
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak is read from Linux's /proc")
    setting = Setting(load_config(recipe), SIZE, 1, torch.device("cpu"), False)
    found = measure_memory(setting, recipe, repeats=1)
    for numbers in found.values():
        assert 50e6 < numbers["before"][0] < numbers["peak"][0] < 8e9
    assert found["ours"]["peak"] != found["peer"]["peak"]


def test_roi_align_is_timed_beside_torchvisions(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cascade_rcnn.benchmark.parts.ROIS", 20)
    setting = Setting(load_config(recipe), SIZE, 1, torch.device("cpu"), False)
    found = measure_roi_align(setting, rounds=1, compiled=False)
    assert set(found) == {"torchvision", "ours"} and min(found.values()) > 0


def test_image_too_small_is_refused(recipe: str) -> None:
    with pytest.raises(UserError, match="--size 32 96: at least 64"):
        run_benchmark(config=recipe, size=(32, 96))


def test_stopwatch_gives_each_call_its_own_time_and_leaves_no_trace() -> None:
    class Outer:
        def work(self) -> int:
            time.sleep(0.02)
            return self.inner()

        def inner(self) -> int:
            time.sleep(0.05)
            return 3

    outer, watch = Outer(), stopwatch.Stopwatch(torch.device("cpu"))
    undo = [watch.watch(outer, "work", "outer"), watch.watch(outer, "inner", lambda: "inner")]
    assert outer.work() == 3
    for function in undo:
        function()
    parts = watch.parts()
    assert list(parts) == ["outer", "inner"]
    assert 0.02 <= parts["outer"] < parts["inner"] + 0.02 and parts["inner"] >= 0.05
    assert vars(outer) == {}
    assert outer.work() == 3 and watch.parts() == {}


def test_multiply_adds_are_counted_from_the_run(recipe: str) -> None:
    from cascade_rcnn.benchmark.contenders import count_multiply_adds, images_of

    setting = Setting(load_config(recipe), SIZE, 1, torch.device("cpu"), False)
    model = build_model(setting.config.model, 80).eval()
    stopwatch.seed_weights(model)
    macs = count_multiply_adds(model, setting, images_of(setting), stopwatch.Stopwatch(torch.device("cpu")))
    cells = sum((64 // s) * (96 // s) for s in (4, 8, 16, 32)) + 1 * 2  # p2..p6
    assert macs["RPN convolutions"] == cells * 32 * (32 * 9 + 3 + 12)
    per_box = 32 * 49 * 64 + 64 * 64 + 64 * (81 + 4)
    assert macs["stage 2: head"] % per_box == 0 and macs["stage 2: head"] > 0
    assert macs["stage 2: RoIAlign"] == 0


def test_seeded_weights_are_the_same_everywhere_and_give_confident_detections() -> None:
    config = ModelConfig(backbone="resnet18.tv_in1k", test_proposals=100)
    models = [build_model(config, 80).eval() for _ in range(2)]
    for model in models:
        stopwatch.seed_weights(model)
    assert all(torch.equal(a, b) for a, b in zip(models[0].state_dict().values(), models[1].state_dict().values()))
    pixels = stopwatch.synthetic_image((128, 160))[None]
    sizes = torch.tensor([[128, 160]])
    found = models[0].detect(ImageBatch(pixels, sizes, sizes))
    assert found.valid.sum() >= 20
    assert found.scores.max() > 0.3


def test_seeded_norms_keep_positive_variances() -> None:
    norm = nn.BatchNorm2d(64)
    stopwatch.seed_weights(norm)
    assert norm.running_var is not None and norm.running_var.min() >= 0.5


def test_limits_of_this_machine_are_positive() -> None:
    cpu = torch.device("cpu")
    assert stopwatch.matmul_rate(cpu, torch.float32, small=True) > 1e6
    assert stopwatch.copy_rate(cpu, megabytes=1) > 1e6
    assert stopwatch.describe_machine(cpu)["name"]
