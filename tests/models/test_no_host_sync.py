"""No step of training and no prediction makes the host wait for a GPU before its end.

Without a GPU: the real code runs on tensors that have a shape and the device "cuda" but no numbers
(``FakeTensorMode``). Whatever needs a number on the host (``item``, ``nonzero``, boolean indexing) cannot be answered
there and raises, and copies between the devices are refused by ``NoWait``. The kernels themselves do not run: their
operators answer with a shape. With a GPU (marked ``gpu``) torch itself watches the same steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cascade_rcnn.config import TrainConfig
from cascade_rcnn.inference.run_model import detect
from cascade_rcnn.models.cascade_rcnn import CascadeRCNN
from cascade_rcnn.structures import ImageBatch, Targets
from cascade_rcnn.training.losses import LossWindow
from cascade_rcnn.training.optim import MovingAverage, Updater
from tiny import squares, tiny_model

pytest.importorskip("triton")  # without it a GPU runs torchvision's NMS, which waits

SEMANTICS = ("mmdetection", "detectron2", "paper", "torchvision")


class HostWaitsError(AssertionError):
    """An operation that makes the host wait for the device."""


class NoWait(TorchDispatchMode):
    """Refuses numbers asked from the device and copies between host and device that the host waits for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # The fused step of SGD changes tensors in place: torch has no pretended version of it, and needs none.
        result = func(*args, **(kwargs or {})) if func is not torch.ops.aten._fused_sgd_.default else None
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        on_host = {tensor.device.type == "cpu" for tensor in read + made}
        upload = read and read[-1].device.type == "cpu" and (kwargs or {}).get("non_blocking", False)
        if (len(on_host) == 2 and not upload) or func is torch.ops.aten._local_scalar_dense.default:
            raise HostWaitsError(f"{func} from {[str(t.device) for t in read]} to {[str(t.device) for t in made]}")
        return result


def backward_without_streams(loss: Tensor) -> None:
    """What ``loss.backward()`` does, node by node: torch's own engine asks for CUDA's streams, which need a device."""
    uses: dict[Any, int] = {}
    found, stack = {loss.grad_fn}, [loss.grad_fn]
    while stack:
        for node, _ in stack.pop().next_functions:  # type: ignore[union-attr]
            uses[node] = uses.get(node, 0) + 1
            if node is not None and node not in found:
                found.add(node)
                stack.append(node)
    arrived: dict[Any, dict[int, Tensor]] = {loss.grad_fn: {0: torch.ones_like(loss)}}
    ready: list[Any] = [loss.grad_fn]
    with torch.no_grad():
        while ready:
            node = ready.pop()
            given = arrived.pop(node, {})
            call = node.apply if isinstance(node, torch.autograd.function.BackwardCFunction) else node
            gradients = call(*[given.get(i) for i in range(len(node._input_metadata))]) if given else ()
            gradients = gradients if isinstance(gradients, tuple) else (gradients,)
            for number, (follower, slot) in enumerate(node.next_functions):
                gradient = gradients[number] if number < len(gradients) else None
                if gradient is not None and follower is not None:
                    wanted = follower._input_metadata[slot]
                    gradient = gradient if gradient.shape == wanted.shape else gradient.sum_to_size(wanted.shape)
                    slots = arrived.setdefault(follower, {})
                    slots[slot] = slots[slot] + gradient if slot in slots else gradient.to(wanted.dtype)
                uses[follower] -= 1
                if follower is not None and uses[follower] == 0:
                    ready.append(follower)


def _torch_pretends() -> bool:
    """Whether tensors without values can be on a GPU that is not there: torch 2.6 asks the driver even for them."""
    try:
        with FakeTensorMode():
            torch.empty(1).to("cuda", non_blocking=True)
    except RuntimeError:
        return False
    return True


pytestmark = pytest.mark.skipif(not _torch_pretends(), reason="this version of torch needs a GPU even to pretend")


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mixed precision and loss scaling as on a GPU, without asking for one."""
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr(
        "cascade_rcnn.models.ops.capabilities.triton_problem", lambda: ""
    )  # no C compiler is needed here
    monkeypatch.setattr(Tensor, "backward", backward_without_streams)


def _without_numbers(tensor: Tensor, device: str = "cuda") -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)


def moved(model: CascadeRCNN) -> CascadeRCNN:
    """The model with parameters and buffers that pretend to be on a GPU."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = nn.Parameter(_without_numbers(parameter), requires_grad=parameter.requires_grad)
                module._parameters[name] = fake
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = _without_numbers(buffer)
    return model


def in_host_memory(*batches: Any) -> Any:
    return [batch._map(lambda tensor: _without_numbers(tensor, "cpu")) for batch in batches]


@contextmanager
def fake_gpu(model: CascadeRCNN, images: ImageBatch, targets: Targets) -> Iterator[tuple[CascadeRCNN, Any, Any]]:
    with FakeTensorMode():
        model, (images, targets) = moved(model), in_host_memory(images, targets)
        with NoWait():
            yield model, images, targets


# One step of training, as in train.py


class Step:
    """Everything of a step between the batch and the numbers that are logged."""

    def __init__(self, model: CascadeRCNN, settings: TrainConfig) -> None:
        self.model = model.train()
        self.updater = Updater(model, settings, lr=settings.lr, device=torch.device("cuda"))
        self.average = MovingAverage(model, 0.999)
        self.window = LossWindow(max_bad=10, scaled=self.updater.scales_loss)

    def run(self, images: ImageBatch, targets: Targets, *, passes: int = 2) -> Tensor:
        for _ in range(passes):
            with self.updater.forward():
                losses = self.model(images.to("cuda", non_blocking=True), targets.to("cuda", non_blocking=True))
            self.updater.backward(torch.stack(list(losses.values())).sum() / passes)
            self.window.add_pass(losses, ())
        norm = self.updater.step(0.5)
        self.average.update()
        assert self.window.end_step(1, norm) == []
        return norm


CASES = [
    ("mmdetection", {"masks": "every"}, {"precision": "bf16", "clip_grad_norm": 10.0}),
    ("detectron2", {"masks": "every"}, {"precision": "fp32"}),
    ("paper", {"masks": "one"}, {"precision": "bf16"}),
    ("paper", {"masks": "none", "norm": "frozen_statistics"}, {"precision": "fp32"}),
    ("torchvision", {"masks": "one"}, {"precision": "fp16", "optimizer": "adamw", "lr": 1e-4, "clip_grad_norm": 1.0}),
    ("mmdetection", {"masks": "none", "norm": "batch", "class_agnostic_boxes": False, "stage_ious": (0.5,)}, {}),
]


@pytest.mark.parametrize(("semantics", "model", "settings"), CASES, ids=[f"{s}-{m['masks']}" for s, m, _ in CASES])
def test_a_training_step_never_waits(pretend: None, semantics: str, model: Any, settings: Any) -> None:
    with fake_gpu(tiny_model(semantics=semantics, **model), *squares()) as (network, images, targets):
        step = Step(network, TrainConfig(**settings))
        norm = step.run(images, targets)
        assert norm.device.type == "cuda" and norm.shape == ()
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        assert all(parameter in step.updater.optimizer.state for parameter in trained)


class Note(TorchDispatchMode):
    """Writes down every operation and the shapes of its results."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, list[torch.Size]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.seen.append((str(func), [leaf.shape for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]))
        return result


def test_a_step_with_and_without_objects_is_the_same_sequence_of_operations(pretend: None) -> None:
    """What shapes there are is known without the numbers, so a step can be captured."""
    seen = []
    for empty in (False, True):
        with fake_gpu(tiny_model(masks="none"), *squares(empty=empty)) as (network, images, targets), Note() as note:
            network.loss(images.to("cuda", non_blocking=True), targets.to("cuda", non_blocking=True))
        seen.append(note.seen)
    uploads = [index for index, (name, _) in enumerate(seen[0]) if name == "aten._to_copy.default"][:12]
    assert len(seen[0]) == len(seen[1]) > 500
    different = [index for index, pair in enumerate(zip(*seen)) if pair[0] != pair[1]]
    assert len(different) == 1 and different[0] in uploads  # the pixels of the objects' masks, which nobody reads


@pytest.mark.parametrize("masks", ["none", "every", "one"])
@pytest.mark.parametrize("semantics", SEMANTICS)
def test_detecting_never_waits(pretend: None, semantics: str, masks: str) -> None:
    model = tiny_model(semantics=semantics, masks=masks).eval()
    with fake_gpu(model, *squares()) as (network, images, _), torch.autocast("cuda", torch.bfloat16):
        found = network.detect(images.to("cuda", non_blocking=True))
        assert found.boxes.device.type == "cuda" and found.boxes.dtype == found.scores.dtype == torch.float32
        assert (found.masks is None) == (masks == "none")


@pytest.mark.parametrize(
    "changes",
    [
        {"nms": "soft"},
        {"nms": "agnostic"},
        {"class_agnostic_boxes": False},
        {"max_detections": 1000},
        {"box_head": "4conv1fc_gn"},
        {"stop_after_stage": 2, "masks": "every"},
    ],
    ids=lambda changes: "-".join(map(str, changes)),
)
def test_detecting_never_waits_with_other_settings(pretend: None, changes: dict[str, Any]) -> None:
    with fake_gpu(tiny_model(**changes).optimize_for_inference(), *squares()) as (network, images, _):
        network.detect(images.to("cuda", non_blocking=True))


class _Kernel:
    """Stands in for a kernel: notes that it was launched with tensors of the device and with numbers of the host."""

    def __init__(self) -> None:
        self.launched = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            assert all(isinstance(size, int) and size > 0 for size in grid)
            tensors = [value for value in arguments if isinstance(value, Tensor)]
            assert tensors and {value.device.type for value in tensors} == {"cuda"}
            assert all(isinstance(value, int | float) for value in arguments if not isinstance(value, Tensor))
            self.launched += 1

        return launch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_launching_the_kernels_never_waits(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """The host's side of the operators that the tests above answer with a shape only."""
    from cascade_rcnn.models.ops import mask_targets_triton, nms_triton, roi_align_triton
    from cascade_rcnn.models.ops.roi_sampling import Sampling

    sampling = Sampling(7, (4, 8, 16, 32))
    kernels = {
        "_roi_align": roi_align_triton,
        "_compare": nms_triton,
        "_walk": nms_triton,
        "_mask_targets": mask_targets_triton,
    }
    for name, module in kernels.items():
        monkeypatch.setattr(module, name, _Kernel())
    monkeypatch.setattr(torch.cuda, "device_of", lambda _: nullcontext())
    with FakeTensorMode(), NoWait():
        maps = [torch.empty(2, 32, 64 // s, 96 // s, device="cuda", dtype=dtype) for s in (4, 8, 16, 32)]
        boxes, valid = torch.empty(2, 9, 4, device="cuda"), torch.empty(2, 9, dtype=torch.bool, device="cuda")
        rows = roi_align_triton.fused_forward(maps, boxes, valid, sampling)
        shapes = [one.shape for one in maps]
        gradients = roi_align_triton.fused_backward(rows, boxes, valid, shapes, sampling)
        kept = nms_triton._launch(boxes, valid.long(), valid, [4, 5], 0.5, 9)
        objects = torch.empty(2, 3, 2, dtype=torch.int64, device="cuda")
        targets = mask_targets_triton._launch(
            valid.byte(), objects[..., 0], objects, objects, boxes, valid.long(), objects[:, 0], 28
        )
        assert targets.shape == (2, 9, 28, 28)
        assert rows.shape == (2, 9, 49, 32) and [one.shape for one in gradients] == shapes
        assert kept.shape == (2, 9) and kept.dtype == torch.bool
    assert [getattr(module, name).launched for name, module in kernels.items()] == [2, 1, 1, 1]


# The watcher itself


def _torchvision_nms(x: Tensor) -> object:
    import torchvision

    return torchvision.ops.nms(x[:, None].expand(-1, 4), x, 0.5)


@pytest.mark.filterwarnings("ignore:.*create_unbacked_symint:FutureWarning")  # torchvision's own
@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.sum().item(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.cpu(),
        lambda x: bool(x.any()),
        lambda x: x[x.argmax()],
        lambda x: x.to("cpu", non_blocking=True),
        lambda x: x.unique(),
        lambda x: x + torch.ones(3).to("cuda"),
        lambda x: x.copy_(torch.ones(3)),
        _torchvision_nms,
        lambda x: torch.ones(3).copy_(x),
        lambda x: x.tolist(),
        lambda x: torch.repeat_interleave(x, x.long()),
    ],
)
def test_what_waits_is_noticed(waits: Callable[[Tensor], object]) -> None:
    from torch._subclasses.fake_tensor import DataDependentOutputException

    with FakeTensorMode(), NoWait():
        x = torch.empty(3, device="cuda")
        with pytest.raises((HostWaitsError, DynamicOutputShapeException, DataDependentOutputException)):
            waits(x)


def test_the_backward_by_hand_gives_the_gradients_of_torchs_engine() -> None:
    model = tiny_model(masks="every")
    images, targets = squares()
    loss = torch.stack(list(model.loss(images, targets).values())).sum()
    loss.backward(retain_graph=True)
    by_engine = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    backward_without_streams(loss)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, by_engine[name], rtol=1e-4, atol=1e-6)


# On a real device


@contextmanager
def watched_by_torch() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("semantics", "model", "settings"), CASES, ids=[f"{s}-{m['masks']}" for s, m, _ in CASES])
def test_a_training_step_never_waits_on_the_device(semantics: str, model: Any, settings: Any) -> None:
    images, targets = (batch.pin_memory() for batch in squares())
    step = Step(tiny_model(semantics=semantics, **model).cuda(), TrainConfig(**settings))
    before = step.run(images, targets)  # kernels are compiled, memory is reserved
    with watched_by_torch():
        norm = step.run(images, targets)
    assert torch.isfinite(before) and torch.isfinite(norm)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("masks", ["none", "every", "one"])
@pytest.mark.parametrize("semantics", SEMANTICS)
def test_detecting_waits_once_on_the_device_and_finds_what_a_cpu_finds(semantics: str, masks: str) -> None:
    model = tiny_model(semantics=semantics, masks=masks).eval()
    images, _ = squares()
    expected = detect(model, images, "fp32")
    model, images = model.cuda(), images.pin_memory()
    found = detect(model, images, "fp32")
    with watched_by_torch(), torch.inference_mode():
        model.detect(images.to("cuda", non_blocking=True))
    same = (found.scores - expected.scores).abs() < 1e-3
    assert same.float().mean() > 0.95
    assert (found.boxes - expected.boxes).abs()[same].median() < 0.1
