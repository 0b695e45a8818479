"""Batch norm with statistics that stay: torch's own numbers, in the memory layout of the input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cascade_rcnn.models.ops.frozen_norm import FrozenStatisticsNorm, _FrozenNorm, freeze_statistics


def norm_of(channels: int = 5) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels).eval()
    for tensor, low in ((norm.weight, -1.0), (norm.bias, -1.0), (norm.running_mean, -1.0), (norm.running_var, 0.1)):
        assert tensor is not None
        tensor.data.uniform_(low, 2.0)
    return norm


def by_hand(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    found: Tensor = _FrozenNorm.apply(x, norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps)
    return found


@pytest.mark.parametrize("learns", [True, False])
def test_values_and_gradients_are_those_of_torch(learns: bool) -> None:
    norm = norm_of().requires_grad_(learns)
    x = torch.randn(2, 5, 6, 7).contiguous(memory_format=torch.channels_last)
    upstream = torch.randn(2, 5, 6, 7)
    found = []
    for function in (norm, lambda x: by_hand(norm, x)):
        leaf = x.detach().requires_grad_()
        y = function(leaf)
        (y.relu_() * upstream).sum().backward()
        found.append([y.detach(), leaf.grad, norm.weight.grad, norm.bias.grad])
        norm.zero_grad()
    for theirs, ours in zip(*found):
        assert (theirs is None) == (ours is None)
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_network_keeps_its_parameters_and_their_names() -> None:
    network = nn.Sequential(nn.Conv2d(3, 5, 1), norm_of(), nn.BatchNorm2d(5, affine=False))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    freeze_statistics(network)
    assert [type(part) for part in network] == [nn.Conv2d, FrozenStatisticsNorm, nn.BatchNorm2d]
    after = network.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_the_device_in_channels_last(dtype: torch.dtype) -> None:
    norm = norm_of(64)
    x = torch.randn(4, 64, 50, 68).to(dtype).contiguous(memory_format=torch.channels_last)
    upstream = torch.randn(4, 64, 50, 68).to(dtype).contiguous(memory_format=torch.channels_last)
    expected_leaf = x.clone().float().requires_grad_()
    expected = norm(expected_leaf)
    expected.backward(upstream.float())
    wanted = [expected.detach(), expected_leaf.grad, norm.weight.grad, norm.bias.grad]
    norm.zero_grad()
    freeze_statistics(norm)
    norm.cuda()
    leaf, upstream = x.cuda().requires_grad_(), upstream.cuda()
    norm(leaf).backward(upstream)  # handles are made
    leaf.grad = None
    norm.zero_grad()
    torch.cuda.set_sync_debug_mode("error")
    try:
        y = norm(leaf)
        y.backward(upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert leaf.grad is not None
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert leaf.grad.is_contiguous(memory_format=torch.channels_last)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for ours, theirs in zip((y.detach(), leaf.grad, norm.weight.grad, norm.bias.grad), wanted):
        assert ours is not None and theirs is not None
        assert (ours.float().cpu() - theirs).norm() < tolerance * theirs.norm()
