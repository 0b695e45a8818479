"""torch.compile: the same detections and losses as without, for images padded to a few sizes."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

import cascade_rcnn
from cascade_rcnn.benchmark.stopwatch import seed_weights, synthetic_image
from cascade_rcnn.checkpoint import save_checkpoint
from cascade_rcnn.config import Config, DataConfig, ModelConfig
from cascade_rcnn.data.loader import bucket_sizes
from cascade_rcnn.errors import UserError
from cascade_rcnn.inference import compiled
from cascade_rcnn.inference.compiled import cache_folder, check_compiler, compile_for_inference
from cascade_rcnn.inference.run_model import detect
from cascade_rcnn.models.build import build_model
from cascade_rcnn.models.cascade_rcnn import CascadeRCNN
from cascade_rcnn.recipes import config_to_python
from cascade_rcnn.rounding import round_up
from cascade_rcnn.structures import ImageBatch, RawDetections
from small_training import free_port, small_config

NETWORK = ModelConfig(
    backbone="resnet10t", pretrained=False, fpn_channels=32, head_channels=32, test_proposals=40, max_detections=20
)


def network(*, device: str = "cpu", **changes: Any) -> CascadeRCNN:
    torch.manual_seed(0)
    model = build_model(dataclasses.replace(NETWORK, **changes), 5).eval()
    seed_weights(model)
    model.std.fill_(57.0)  # random weights on Caffe's unscaled input would magnify rounding
    return model.to(device).optimize_for_inference()


def batch(size: tuple[int, int], padded: tuple[int, int], *, seeds: tuple[int, ...] = (0,)) -> ImageBatch:
    pixels = torch.zeros(len(seeds), 3, *padded, dtype=torch.uint8)
    for row, seed in zip(pixels, seeds):
        row[:, : size[0], : size[1]] = synthetic_image(size, seed=seed)
    sizes = torch.tensor([size] * len(seeds))
    return ImageBatch(pixels, sizes, sizes.clone())


def assert_same(found: RawDetections, expected: RawDetections) -> None:
    assert expected.valid.any()
    assert torch.equal(found.valid, expected.valid)
    assert torch.equal(found.labels, expected.labels)
    torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.boxes, expected.boxes, rtol=0, atol=1e-2)
    if expected.masks is not None:
        assert found.masks is not None
        torch.testing.assert_close(found.masks, expected.masks, rtol=0, atol=1e-3)


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """``torch.compile`` that leaves everything as it is: what remains are sizes, padding and batches."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("torch.compile", lambda function, **_: function)
    monkeypatch.setattr("torch.nn.Module.compile", lambda self, **_: None)


@pytest.mark.parametrize("semantics", ["mmdetection", "detectron2", "torchvision"])
@pytest.mark.parametrize("size", [(90, 128), (96, 100), (64, 64)])
def test_more_padding_changes_nothing(uncompiled: None, semantics: str, size: tuple[int, int]) -> None:
    own = tuple(round_up(side, 32) for side in size)
    alone = network(semantics=semantics, masks="last").detect(batch(size, (own[0], own[1])))
    model = compile_for_inference(network(semantics=semantics, masks="last"))
    for padded in (own, (own[0] + 32, own[1]), (own[0] + 64, own[1] + 96)):
        assert_same(model.detect(batch(size, (padded[0], padded[1]))), alone)


@pytest.mark.parametrize("padded", [(160, 128), (96, 224), (224, 160)])
def test_more_padding_changes_no_level_of_the_rpn(uncompiled: None, padded: tuple[int, int]) -> None:
    """The last level has half of an odd number of rows: 160 pixels are five of stride 32 and three of stride 64."""
    alone, model = network(), compile_for_inference(network())
    with torch.no_grad():
        pyramid = alone.pyramid(batch((90, 100), (96, 128)))
        shapes = [feature.shape[2:] for feature in pyramid]
        expected = alone.rpn(pyramid)
        features, found = model._pyramid_and_rpn(batch((90, 100), padded))
        wider = [feature.shape[2:] for feature in features]
    for kind in (0, 1):  # logits, deltas
        for (height, width), (rows, columns), own, all_ in zip(shapes, wider, expected[kind], found[kind]):
            part = all_.view(rows, columns, -1)[:height, :width]
            torch.testing.assert_close(part, own.view(height, width, -1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["recompile_limit", "cache_size_limit"])
def test_many_sizes_are_allowed_whatever_torch_calls_it(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """torch 2.6 refuses a name that it does not know."""
    monkeypatch.setattr("torch._dynamo.config", types.SimpleNamespace(**{name: 8}))
    assert compiled._dynamo_limit() == {name: 64}


def test_settings_of_torch_hold_during_a_call_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch._dynamo
    import torch._inductor.config as inductor

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (limit,) = compiled._dynamo_limit()
    for before in (None, str(Path(tempfile.gettempdir()) / "torchinductor_me")):
        if before is None:
            monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
        else:
            monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", before)
        settings = getattr(torch._dynamo.config, limit), inductor.freezing
        with compiled._compiler_settings(freezing=True):
            assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "cascade-rcnn" / "compiled")
            assert (getattr(torch._dynamo.config, limit), inductor.freezing) == (64, True)
        assert os.environ.get("TORCHINDUCTOR_CACHE_DIR") == before
        assert (getattr(torch._dynamo.config, limit), inductor.freezing) == settings


def test_a_map_that_is_no_stride_of_the_canvas_is_an_error() -> None:
    part = compiled._UnpaddedPart()
    part.sizes, part.canvas = torch.tensor([[90, 100]]), (160, 128)
    assert [part._stride(torch.zeros(1, 1, 160 // s, 128 // s)) for s in (1, 2, 4, 8, 16, 32)] == [1, 2, 4, 8, 16, 32]
    assert part._stride(torch.zeros(1, 1, 3, 2)) == 64, "160 rows are two and a half"
    assert [int(side) for side in part._extent(torch.zeros(1, 1, 3, 2))] == [2, 2]
    with pytest.raises(ValueError, match=r"a map of \(5, 5\) is no stride"):
        part._stride(torch.zeros(1, 1, 5, 5))


def test_a_failing_compiler_ends_its_line_before_the_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from torch._dynamo.exc import TorchDynamoException

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    (tmp_path / "ab").mkdir()
    (tmp_path / "ab" / "kernel.so").touch()
    (tmp_path / "ab" / "kernel.cpp").touch()
    assert compiled._files() == 1
    with pytest.raises(UserError, match=r"torch\.compile failed"), compiled._announced("1 x 64 x 64"):
        raise TorchDynamoException("broken\nmore")
    assert capsys.readouterr().err == "compiling for 1 x 64 x 64 ... failed\n"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "compiled for 4 sizes at most"),
        ({"norm": "group"}, "compiled for each size"),
        ({"semantics": "paper"}, "compiled for each size"),
    ],
)
def test_networks_that_would_see_more_padding_get_none(
    uncompiled: None, tmp_path: Path, changes: dict[str, str], words: str
) -> None:
    """Detectron clips no boxes between its stages; RoIAlign finds nothing beyond the map of an image alone."""
    config = small_config(model={"backbone": "resnet10t", **changes}, data={"short_side": (64,), "long_side": 96})
    model = build_model(config.model, 2)
    seed_weights(model)
    model.std.fill_(57.0)
    path = tmp_path / "network.safetensors"
    save_checkpoint(path, model.state_dict(), config=config, class_names=("a", "b"))
    plain, fast = (cascade_rcnn.load(path, device="cpu", compile=it) for it in (False, True))
    assert fast.choices().endswith(words)
    image = synthetic_image((64, 70), seed=0).permute(1, 2, 0).numpy()
    found, expected = fast.predict(image), plain.predict(image)
    assert len(found) == len(expected) > 0
    torch.testing.assert_close(found.boxes, expected.boxes, rtol=0, atol=1e-2)


def test_padding_changes_what_the_plain_network_finds() -> None:
    """Why the fast one keeps its padding at zero; it is also why a batch differs from its images alone."""
    model = network()
    alone, padded = (model.detect(batch((90, 100), side)) for side in ((96, 128), (160, 224)))
    assert not torch.allclose(alone.scores, padded.scores, atol=1e-4)


def test_batches_are_filled_up_to_the_largest_met(
    uncompiled: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = compile_for_inference(network())
    seen: list[int] = []
    trunk = model._trunk
    monkeypatch.setattr(model, "_trunk", lambda pixels, *rest: seen.append(len(pixels)) or trunk(pixels, *rest))
    three = model.detect(batch((60, 90), (64, 96), seeds=(0, 1, 2)))
    one = model.detect(batch((60, 90), (64, 96), seeds=(1,)))
    model.detect(batch((60, 90), (96, 96), seeds=(0,)))
    assert seen == [3, 3, 1]
    assert len(one.boxes) == 1
    assert_same(one, three._map(lambda tensor: tensor[1:2]))
    told = capsys.readouterr().err.splitlines()
    assert [line.split(" ... ")[0] for line in told] == ["compiling for 3 x 64 x 96", "compiling for 1 x 96 x 96"]


def test_sizes_to_pad_to() -> None:
    assert bucket_sizes(DataConfig()) == ()
    sizes = bucket_sizes(DataConfig(pad_buckets=True))
    assert sizes == ((800, 800), (800, 1088), (1088, 800), (800, 1344), (1344, 800), (1344, 1344))
    jittered = bucket_sizes(DataConfig(short_side=(640, 800), test_short_side=600, long_side=1000, pad_buckets=True))
    assert jittered[0] == (800, 800) and jittered[-1] == (1024, 1024)
    assert len(bucket_sizes(DataConfig(short_side=(64,), long_side=64, pad_buckets=True))) == 1


def test_batches_are_padded_to_the_smallest_size_that_holds_them() -> None:
    from cascade_rcnn.data.dataset import Item
    from cascade_rcnn.data.loader import Collate

    def padded(*sizes: tuple[int, int]) -> tuple[int, int]:
        nothing: NDArray[np.int64] = np.zeros(0, np.int64)
        items = [
            Item(
                torch.full((3, *size), 7, dtype=torch.uint8),
                size,
                0,
                "",
                np.zeros((0, 4), np.float32),
                nothing,
                nothing.astype(np.bool_),
                None,
            )
            for size in sizes
        ]
        made = Collate(32, buckets=((96, 96), (96, 160), (160, 96), (160, 160)))(items)
        assert isinstance(made, tuple)
        pixels = made[0].pixels
        for image, size in zip(pixels, sizes):
            assert int(image.sum()) == 7 * 3 * size[0] * size[1]
        return int(pixels.shape[2]), int(pixels.shape[3])

    assert padded((90, 96)) == (96, 96)
    assert padded((90, 97)) == (96, 160)
    assert padded((97, 60)) == (160, 96)
    assert padded((90, 120), (120, 90)) == (160, 160)
    assert padded((170, 40)) == (192, 64), "larger than all: its own multiple of 32"


def test_without_a_compiler_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"needs a C\+\+ compiler, and 'no-such-compiler' is not there: install one"):
        check_compiler(torch.device("cpu"))


def test_the_cache_lies_in_the_users_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "cascade-rcnn" / "compiled"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / "torchinductor_me"))
    assert cache_folder() == tmp_path / "cascade-rcnn" / "compiled", "that is torch's own choice"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"


_PREDICT = """
import json, sys, time
import numpy, torch
import cascade_rcnn
torch.set_num_threads(1)
images = [numpy.load(path) for path in sys.argv[2:]]
plain = cascade_rcnn.load(sys.argv[1], device="cpu")
detector = cascade_rcnn.load(sys.argv[1], device="cpu", compile=True)
start = time.perf_counter()
answer = {"first": 0.0, "choices": detector.choices(), "differences": []}
for image in images:
    found, expected = detector.predict(image), plain.predict(image)
    assert len(found) == len(expected) > 0 and torch.equal(found.labels, expected.labels)
    answer["differences"].append(max(float((found.boxes - expected.boxes).abs().max()),
                                     float((found.mask_probs - expected.mask_probs).abs().max()),
                                     float((found.scores - expected.scores).abs().max())))
answer["seconds"] = time.perf_counter() - start
print(json.dumps(answer))
"""


def _in_a_process(words: list[str], cache: Path) -> tuple[dict[str, Any], str]:
    package = str(Path(cascade_rcnn.__file__).resolve().parents[1])
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "PYTHONPATH": package}
    done = subprocess.run(
        [sys.executable, "-c", _PREDICT, *words], capture_output=True, text=True, timeout=500, env=environment
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer, done.stderr


@pytest.mark.slow
def test_compiled_detections_are_the_same_and_code_is_kept_for_the_next_process(tmp_path: Path) -> None:
    """A minute or two: C++ for each of the network's kernels."""
    config = small_config(
        model={"backbone": "resnet10t", "norm": "frozen_statistics", "masks": "last"},
        data={"short_side": (64,), "long_side": 96},
    )
    model = build_model(config.model, 5)
    seed_weights(model)
    save_checkpoint(tmp_path / "network.safetensors", model.state_dict(), config=config, class_names=tuple("abcde"))
    words = [str(tmp_path / "network.safetensors")]
    for seed, size in enumerate(((64, 80), (60, 96))):
        np.save(tmp_path / f"{seed}.npy", synthetic_image(size, seed=seed).permute(1, 2, 0).numpy())
        words.append(str(tmp_path / f"{seed}.npy"))
    first, said = _in_a_process(words, tmp_path / "cache")
    again, said_again = _in_a_process(words, tmp_path / "cache")
    assert max(first["differences"]) < 1e-2 and max(again["differences"]) < 1e-2
    assert "compiled for 4 sizes at most" in first["choices"]
    assert said.count("compiling for") == 1 and "kept in" in said
    assert said_again.count("with code found in") == 1 and "kept in" not in said_again
    assert again["seconds"] < first["seconds"]


def _losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


def _train(config: Config, out: Path, resume: bool = False) -> str:
    from cascade_rcnn.train import train

    return str(train(config, out=out, resume=resume, device="cpu"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo looks at it
def test_compiled_training_has_the_losses_of_eager_training_evaluates_and_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three minutes: forward and backward of the network in C++."""
    whole = small_config(
        model={"backbone": "resnet10t", "masks": "last"},
        log_every=1,
        epochs=1,
        milestones=(),
        max_steps=4,
        evaluate_every=1,
        save_every=2,
        deterministic=False,
    )
    compiled = dataclasses.replace(whole, train=dataclasses.replace(whole.train, compile=True))
    half = dataclasses.replace(compiled, train=dataclasses.replace(compiled.train, max_steps=2))
    _train(whole, tmp_path / "eager")
    assert "not compiled (--train.compile)" in capsys.readouterr().out
    _train(half, tmp_path / "compiled")
    _train(compiled, tmp_path / "compiled", resume=True)
    assert "; not compiled" not in capsys.readouterr().out
    assert _losses(tmp_path / "compiled") == pytest.approx(_losses(tmp_path / "eager"), rel=2e-3)
    names = [set(load_file(tmp_path / run / "last.safetensors")) for run in ("eager", "compiled")]
    assert names[0] == names[1]
    assert len((tmp_path / "compiled" / "metrics.jsonl").read_text().splitlines()) == 2


_RANK = """
import sys
from pathlib import Path
import torch
from cascade_rcnn.recipes import load_config
from cascade_rcnn.train import train
torch.set_num_threads(1)
train(load_config(sys.argv[1]), out=Path(sys.argv[2]), device="cpu")
"""


@pytest.mark.slow
def test_two_processes_train_compiled(tmp_path: Path) -> None:
    """Processes of their own, not forks: the compiler starts helpers. A minute."""
    config = small_config(
        model={"backbone": "resnet10t"},
        log_every=1,
        epochs=1,
        milestones=(),
        max_steps=3,
        batch_size=1,
        deterministic=False,
    )
    (tmp_path / "rank.py").write_text(_RANK)
    package = str(Path(cascade_rcnn.__file__).resolve().parents[1])
    for name, with_compiler in (("eager", False), ("compiled", True)):
        changed = dataclasses.replace(config, train=dataclasses.replace(config.train, compile=with_compiler))
        (tmp_path / f"{name}.py").write_text(config_to_python(changed))
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--nproc-per-node",
                "2",
                "--master-port",
                str(free_port()),
                "rank.py",
                f"{name}.py",
                name,
            ],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=500,
            env={**os.environ, "PYTHONPATH": package},
        )
        assert done.returncode == 0, done.stderr
    assert _losses(tmp_path / "compiled") == pytest.approx(_losses(tmp_path / "eager"), rel=2e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_compiled_code_in_cuda_graphs_gives_the_same_again_and_again() -> None:
    eager = network(device="cuda", masks="last")
    model = compile_for_inference(network(device="cuda", masks="last"))
    for seed in (0, 1, 0, 2, 3, 1):
        images = batch((90, 100), (128, 160), seeds=(seed,))
        alone = batch((90, 100), (96, 128), seeds=(seed,))
        assert_same(detect(model, images, "fp32"), detect(eager, alone, "fp32"))
    assert model.recorder is not None and all(model.recorder._recordings.values())
