"""RoIAlign against torchvision's operator, which is applied here level by level."""

import pytest
import torch
from torch import Tensor
from torchvision.ops import roi_align as torchvision_roi_align

from cascade_rcnn.models.boxes import clip_boxes
from cascade_rcnn.models.ops import roi_align as module
from cascade_rcnn.models.ops.capabilities import has_triton, triton_problem
from cascade_rcnn.models.ops.roi_align import assign_levels, roi_align, roi_align_rows, rows_weight
from cascade_rcnn.models.ops.roi_sampling import Frame, Sampling

STRIDES = (4, 8, 16, 32)
SEVEN = Sampling(7, STRIDES)


def pyramid(
    *, batch: int = 2, channels: int = 5, height: int = 96, width: int = 160, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(batch, channels, height // s, width // s, generator=generator).to(dtype) for s in STRIDES]


def some_boxes(*, batch: int = 2, count: int = 60, height: int = 96, width: int = 160, seed: int = 0) -> Tensor:
    """Boxes of all sizes and shapes, a few far outside the image, a few empty, one on exact pixels."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.rand(batch, count, 2, generator=generator) * torch.tensor([width, height])
    size = torch.exp(torch.rand(batch, count, 2, generator=generator) * 5.5 - 0.5)
    boxes = torch.cat((centre - size / 2, centre + size / 2), dim=2)
    boxes[:, 1] = torch.tensor([0.0, 0, width, height])
    boxes[:, 2] = torch.tensor([-300.0, -200, -250, -100])
    boxes[:, 3] = torch.tensor([20.0, 20, 20, 20])
    boxes[:, 4] = torch.tensor([20.0, 10, 20, 40])
    boxes[:, 5] = torch.tensor([28.0, 28, 56, 84])
    boxes[:, 6] = torch.tensor([-900.0, 5, 900, 9])
    return boxes


def expected(features: list[Tensor], boxes: Tensor, sampling: Sampling = SEVEN, valid: Tensor | None = None) -> Tensor:
    levels = assign_levels(boxes, len(features))
    result = features[0].new_zeros(*boxes.shape[:2], features[0].shape[1], sampling.size, sampling.size)
    for image in range(boxes.shape[0]):
        for level, (feature, stride) in enumerate(zip(features, STRIDES)):
            chosen = levels[image] == level
            if valid is not None:
                chosen &= valid[image]
            pooled = torchvision_roi_align(
                feature[image : image + 1],
                [boxes[image][chosen].to(feature.dtype)],
                sampling.size,
                1 / stride,
                sampling.ratio,
                sampling.frame is Frame.ALIGNED,
            )
            result[image] = result[image].index_put((chosen.nonzero().squeeze(1),), pooled)
    return result


def test_levels_follow_the_box_size_and_are_clamped() -> None:
    sides = torch.tensor([0.0, 1, 55.9, 112, 224, 447, 448, 3000])
    boxes = torch.stack((sides * 0, sides * 0, sides, sides), dim=1)
    assert assign_levels(boxes, 4).tolist() == [0, 0, 0, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("size", [7, 14])
@pytest.mark.parametrize("ratio", [0, 1, 2, 5])
@pytest.mark.parametrize("frame", [Frame.ALIGNED, Frame.UNALIGNED])
def test_equals_torchvision(size: int, ratio: int, frame: Frame) -> None:
    features, boxes, sampling = pyramid(), some_boxes(), Sampling(size, STRIDES, ratio, frame)
    ours = roi_align(features, boxes, sampling)
    torch.testing.assert_close(ours, expected(features, boxes, sampling), rtol=1e-5, atol=1e-5)


def test_one_bin_is_the_mean_that_the_docstring_works_out() -> None:
    feature = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    first_bin = roi_align([feature], torch.tensor([[[10.0, 20, 66, 76]]]), Sampling(7, (4,)))[0, 0, :, 0, 0]
    rows, columns = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.25, 0.5, 0.25])
    torch.testing.assert_close(first_bin, torch.einsum("chw,h,w->c", feature[0, :, 5:8, 2:5], rows, columns))


def test_groups_keep_their_boxes_in_order() -> None:
    keys = torch.tensor([[1, 2, 3], [0, 9, 9], [1, 2, 3], [1, 1, 8], [0, 9, 9], [1, 2, 3]])
    order, groups = module._sorted_by_taps(keys)
    assert order.tolist() == [1, 4, 3, 0, 2, 5]
    assert groups == [[0, 9, 9, 2], [1, 1, 8, 1], [1, 2, 3, 3]]
    assert module._sorted_by_taps(keys[:0])[1] == []


def test_detectrons_boxes_choose_the_level_by_the_box_and_read_up_to_its_last_pixel() -> None:
    features, boxes = pyramid(), some_boxes()
    boxes[0, 0] = torch.tensor([3.0, 3, 115, 115])  # 112 pixels wide: the second level, although x2 - x1 is 111 there
    boxes[0, 1] = torch.tensor([3.0, 3, 114, 114])
    levels = assign_levels(boxes, len(features))
    assert levels[0, :2].tolist() == [1, 0]
    legacy = torch.cat((boxes[..., :2], boxes[..., 2:] - 1), dim=2)
    everything = torch.zeros(*boxes.shape[:2], 5, 7, 7)
    for b in range(2):
        for n, level in enumerate(levels[b].tolist()):
            everything[b, n] = torchvision_roi_align(
                features[level][b : b + 1], [legacy[b, n : n + 1]], 7, 1 / STRIDES[level], 2, False
            )[0]
    ours = roi_align(features, boxes, Sampling(7, STRIDES, 2, Frame.PLUS_ONE))
    torch.testing.assert_close(ours, everything, rtol=1e-5, atol=1e-5)


def test_channels_last_and_contiguous_features_give_the_same_bits() -> None:
    features, boxes = pyramid(), some_boxes()
    other = [feature.contiguous(memory_format=torch.channels_last) for feature in features]
    assert torch.equal(*(roi_align_rows(f, boxes, SEVEN) for f in (features, other)))


@pytest.mark.parametrize("ratio", [0, 2])
def test_gradient_equals_torchvision(ratio: int) -> None:
    boxes, sampling = some_boxes(), Sampling(7, STRIDES, ratio)
    valid = torch.arange(boxes.shape[1]).expand(boxes.shape[:2]) % 5 != 0
    found = []
    for function in (roi_align, expected):
        features = [feature.requires_grad_() for feature in pyramid()]
        pooled = function(features, boxes, sampling, valid)
        pooled.backward(torch.randn(pooled.shape, generator=torch.Generator().manual_seed(2)))
        found.append([feature.grad for feature in features])
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_gradient_is_the_derivative() -> None:
    features = [
        feature.requires_grad_() for feature in pyramid(batch=1, channels=1, height=32, width=64, dtype=torch.float64)
    ]
    boxes = some_boxes(batch=1, count=8, height=32, width=64)
    assert torch.autograd.gradcheck(lambda *f: roi_align_rows(f, boxes, Sampling(2, STRIDES)), features)


def test_boxes_that_are_not_valid_give_zeros_and_no_gradient() -> None:
    features, boxes = [feature.requires_grad_() for feature in pyramid()], some_boxes()
    valid = torch.zeros(boxes.shape[:2], dtype=torch.bool)
    pooled = roi_align_rows(features, boxes, SEVEN, valid)
    assert pooled.shape == (2, 60, 49, 5)
    assert not pooled.any()
    pooled.sum().backward()
    assert all(feature.grad is not None and not feature.grad.any() for feature in features)


def test_no_boxes_at_all() -> None:
    features = [feature.requires_grad_() for feature in pyramid()]
    pooled = roi_align(features, torch.zeros(2, 0, 4), SEVEN)
    assert pooled.shape == (2, 0, 5, 7, 7)
    pooled.sum().backward()


def test_boxes_that_are_not_finite_do_no_harm() -> None:
    boxes = torch.tensor([[[float("nan")] * 4, [0, 0, float("inf"), 9], [0, 0, 30, 30]]])
    features = pyramid(batch=1)
    pooled = roi_align(features, boxes, SEVEN)
    assert not pooled[:, :2].any()
    torch.testing.assert_close(pooled[:, 2:], expected(features, boxes[:, 2:]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_by_its_own_rounding(dtype: torch.dtype) -> None:
    """Sums are in float32; on CPUs bfloat16's weights are rounded too, by 2^-9 of themselves."""
    features, boxes = pyramid(dtype=dtype), some_boxes()
    exact = expected([feature.float() for feature in features], boxes)
    pooled = roi_align(features, boxes, SEVEN)
    assert pooled.dtype == dtype
    largest = max(float(feature.float().abs().max()) for feature in features)
    rounding = torch.finfo(dtype).eps
    atol = largest * rounding / 4 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(pooled.float(), exact, rtol=rounding, atol=atol)


def test_a_large_number_of_boxes_is_cut_into_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    features, boxes = pyramid(), some_boxes()
    whole = roi_align_rows(features, boxes, SEVEN)
    monkeypatch.setattr(module, "_CHUNK", 1)
    assert torch.equal(roi_align_rows(features, boxes, SEVEN), whole)


@pytest.mark.parametrize("frame", list(Frame))
def test_devices_without_either_kernel_use_torchvision_level_by_level(
    monkeypatch: pytest.MonkeyPatch, frame: Frame
) -> None:
    features, boxes, sampling = pyramid(), some_boxes(), Sampling(7, STRIDES, 0, frame)
    valid = torch.rand(boxes.shape[:2], generator=torch.Generator().manual_seed(3)) > 0.3
    wanted = roi_align(features, boxes, sampling, valid)
    monkeypatch.setattr(module, "_needs_portable", lambda feature: True)
    monkeypatch.setattr(module, "_rows", None)
    torch.testing.assert_close(roi_align(features, boxes, sampling, valid), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not hasattr(torch.compiler, "is_exporting"), reason="before torch 2.7 nothing says who traces")
@pytest.mark.parametrize("sampling", [SEVEN, Sampling(7, STRIDES, 2, Frame.UNALIGNED)], ids=["aligned", "unaligned"])
def test_export_uses_torchvision_with_the_same_numbers(sampling: Sampling) -> None:
    class Pool(torch.nn.Module):
        def forward(self, features: list[Tensor], boxes: Tensor, valid: Tensor) -> Tensor:
            return roi_align(features, boxes, sampling, valid)

    features, boxes = pyramid(), clip_boxes(some_boxes(), torch.tensor([[96, 160], [90, 151]]))  # as the network does
    boxes[:, 7] = float("nan")
    boxes[:, 8] = torch.tensor([62.0, 89.5, 70.0, 90.0])  # thinner than a pixel of its level, at the border
    boxes[:, 9] = torch.tensor([150.5, 20.0, 151.0, 30.0])
    boxes[0, 8, 1::2], boxes[0, 9, ::2] = torch.tensor([95.5, 96.0]), torch.tensor([159.5, 160.0])
    valid = torch.rand(boxes.shape[:2], generator=torch.Generator().manual_seed(3)) > 0.3
    valid[:, [1, 5, 7, 8, 9]] = torch.tensor([True, True, False, True, True])
    program = torch.export.export(Pool(), (features, boxes, valid))
    names = [str(node.target) for node in program.graph.nodes]
    calls = 1 if sampling.frame is Frame.ALIGNED else len(STRIDES)
    assert sum("torchvision.roi_align" in name for name in names) == calls
    assert not any("cascade_rcnn" in name for name in names)
    torch.testing.assert_close(
        program.module()(features, boxes, valid),
        expected(features, boxes, sampling, valid),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own
def test_operator_keeps_the_contract_of_torch_compile() -> None:
    features, boxes = [feature.requires_grad_() for feature in pyramid(channels=2)], some_boxes(count=10)
    valid = torch.ones(boxes.shape[:2], dtype=torch.bool)
    torch.library.opcheck(module._rows, (features, boxes, valid, 7, list(STRIDES), 0, True))


def test_compiles_into_one_graph_with_its_gradient() -> None:
    def pool(features: list[Tensor], boxes: Tensor) -> Tensor:
        return roi_align(features, boxes * 2, SEVEN).relu()

    boxes, found = some_boxes(), []
    for function in (pool, torch.compile(pool, fullgraph=True, backend="aot_eager")):
        features = [feature.requires_grad_() for feature in pyramid()]
        function(features, boxes).square().sum().backward()
        found.append([feature.grad for feature in features])
    for eager, compiled in zip(*found):  # equal bits with torch 2.14, equal to the last bit with 2.11
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)


def test_head_weights_reordered_for_rows_give_the_same_product() -> None:
    features, boxes = pyramid(), some_boxes()
    weight = torch.randn(11, 5 * 49, generator=torch.Generator().manual_seed(4))
    pooled = roi_align(features, boxes, SEVEN)
    rows = roi_align_rows(features, boxes, SEVEN)
    torch.testing.assert_close(
        rows.flatten(2) @ rows_weight(weight, 49).T, pooled.flatten(2) @ weight.T, rtol=1e-4, atol=1e-4
    )


def test_wrong_number_of_strides_is_refused() -> None:
    with pytest.raises(ValueError, match="4 feature maps for 3 strides"):
        roi_align(pyramid(), some_boxes(), Sampling(7, STRIDES[:3]))


def test_kernels_are_left_alone_where_triton_cannot_start_them(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.delenv("CC", raising=False)
    try:
        for found, problem in (("/usr/bin/gcc", ""), (None, "Triton finds no C compiler: install gcc")):
            triton_problem.cache_clear()
            monkeypatch.setattr("shutil.which", lambda name, found=found: found if name == "gcc" else None)
            assert triton_problem() == problem and has_triton() is (found is not None)
    finally:
        triton_problem.cache_clear()
