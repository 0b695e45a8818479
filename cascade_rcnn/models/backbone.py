"""Backbones: any timm network that gives features of strides 4, 8, 16 and 32."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, DropPath  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cascade_rcnn.errors import CheckpointError, ConfigError
from cascade_rcnn.models.ops.deformable import DeformableConv2d
from cascade_rcnn.models.ops.frozen_norm import FrozenStatisticsNorm, fold_batch_norm, freeze_statistics

STRIDES = (4, 8, 16, 32)
PADDED = 32  # images are padded to multiples of this
_BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, BatchNormAct2d)


def _create(name: str, *, pretrained: bool, **options: Any) -> nn.Module:
    try:
        return timm.create_model(  # type: ignore[no-any-return]
            name, pretrained=pretrained, features_only=True, **options
        )
    except (RuntimeError, AttributeError, AssertionError) as error:
        if "nknown model" in str(error) or not timm.is_model(name.split(".")[0]):
            near = timm.list_models(f"*{name.split('.')[0][:8]}*")[:5]
            hint = f"; near it: {', '.join(near)}" if near else ""
            raise ConfigError(f"model.backbone {name!r} is not a network of timm{hint}") from error
        if "nvalid pretrained" in str(error):
            tags = timm.list_pretrained(name.split(".")[0] + ".*")
            known = ", ".join(tags) or "none"
            raise ConfigError(f"model.backbone {name!r}: no such weights; timm has {known}") from error
        if "features_only" in str(error):
            raise ConfigError(f"model.backbone {name!r} gives no feature pyramid: choose another network") from error
        raise
    except Exception as error:  # timm and its hub client raise many kinds of network errors; the way out is the same
        if not pretrained or isinstance(error, TypeError):  # TypeError: an option that the network does not know
            raise
        raise CheckpointError(
            f"ImageNet weights of {name!r} are not in the cache and could not be downloaded ({type(error).__name__}): "
            "connect once, or give a file with --model.backbone-weights FILE (the network's state_dict as .pth or "
            ".safetensors), or train from scratch with --model.pretrained False"
        ) from error


def about_weights(name: str) -> str:
    """A line on timm's weights ``name`` and their licence, as timm states it."""
    known = timm.get_pretrained_cfg(name)
    license = str(known.license or "") if known is not None else ""
    limit = "; not for commercial use" if "-nc" in license else ""
    return f"backbone: weights {name} through timm; their licence: {license or 'not stated there'}{limit}"


@dataclass(frozen=True)
class _Usage:
    """How a timm network takes images of any size."""

    options: dict[str, Any] = field(default_factory=dict)  # of timm.create_model
    multiple: int = 1  # of its input's sides


@cache
def _usage(name: str) -> _Usage:
    """Found by running the network without values, once for each name.

    Most networks take any size. Swin's take it when told not to insist on theirs; those with a fixed window (MaxViT)
    want multiples of the size they were made for. Raises ConfigError for all others, before any data is read.
    """
    with torch.device("meta"):
        network: Any = _create(name, pretrained=False)
    reductions = network.feature_info.reduction()
    if any(stride not in reductions for stride in STRIDES):
        raise ConfigError(f"model.backbone {name!r} gives strides {reductions}, not {STRIDES}: choose another network")
    own = max(network.pretrained_cfg.get("input_size", (3, PADDED, PADDED))[1:]) if _has_config(network) else PADDED
    reason = ""
    for options in ({}, {"strict_img_size": False, "always_partition": True}, {"strict_img_size": False}):
        for multiple in dict.fromkeys((PADDED, own)):
            if own % PADDED and multiple == own:
                continue
            try:
                with torch.device("meta"):
                    network = _create(name, pretrained=False, **options)
                misfit = _misfit(network, 3 * multiple, 2 * multiple)
                if not misfit:
                    return _Usage(options, multiple if _misfit(network, 72, 88, exactly=False) else 1)
                reason = reason or misfit
            except TypeError:  # it knows no such option
                break
    raise ConfigError(
        f"model.backbone {name!r} does not take images of any size ({reason}): choose another network, such as "
        "resnet50, convnext_tiny, swin_tiny_patch4_window7_224, regnetx_032"
    )


def _has_config(network: nn.Module) -> bool:
    return isinstance(getattr(network, "pretrained_cfg", None), dict)


@torch.no_grad()
def _misfit(network: Any, height: int, width: int, *, exactly: bool = True) -> str:
    """What keeps the network from features of an image of this size; "" if nothing does."""
    images = torch.zeros(1, 3, height, width, device="meta")
    try:
        features = network.eval()(images)
    except (AssertionError, RuntimeError, ValueError) as error:
        return " ".join(str(error).split())[:100] or "it stops with an assertion of its own"
    rows_first = 1 if is_channels_last(network) else 2
    for stride, feature in zip(network.feature_info.reduction(), features):
        found = tuple(feature.shape[rows_first : rows_first + 2])
        if exactly and stride in STRIDES and found != (height // stride, width // stride):
            return f"its features of stride {stride} are {found} for images of {(height, width)}"
    return ""


def is_channels_last(network: nn.Module) -> bool:
    """Whether a timm network's features are [B, H, W, C]."""
    return str(getattr(network, "output_fmt", "")).rpartition(".")[2] == "NHWC"


@dataclass(frozen=True)
class Deformable:
    """Which 3x3 convolutions of a ResNet are deformable, and how (models/ops/deformable.py)."""

    stages: tuple[int, ...] = (2, 3, 4)
    modulated: bool = False
    groups: int = 1


class Backbone(nn.Module):
    """A timm network cut to its features of strides 4..32.

    ``style`` "caffe" puts a bottleneck's stride into its 1x1 convolution. ``output_norms``: a layer norm
    for each map. ``norm``, ``frozen_stages`` and ``drop_path`` as in
    :class:`cascade_rcnn.config.ModelConfig`.
    """

    def __init__(
        self,
        name: str,
        *,
        pretrained: bool = False,
        style: str = "pytorch",
        norm: str = "frozen_statistics",
        frozen_stages: int = 1,
        deformable: Deformable | None = None,
        output_norms: bool = False,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        usage = _usage(name.split(".")[0])  # whatever the weights' tag
        body: Any = _with_drop_path(name, drop_path, pretrained=pretrained, **usage.options)
        is_swin = name.startswith("swin_")
        if is_swin:
            from cascade_rcnn.models.swin import pad_before_shifting

            pad_before_shifting(body)
        reductions = body.feature_info.reduction()
        self.multiple = usage.multiple
        self.channels_last = is_channels_last(body)
        self.selected = [len(reductions) - 1 - reductions[::-1].index(stride) for stride in STRIDES]
        self.channels = [body.feature_info.channels()[i] for i in self.selected]
        self.body = body
        eps = 1e-5 if is_swin else 1e-6
        self.output_norms = nn.ModuleList(nn.LayerNorm(c, eps) for c in self.channels) if output_norms else None
        self.norm = norm
        self.recompute = False
        if style == "caffe":
            _move_stride_to_first_convolution(body, name)
        if deformable is not None:
            _make_deformable(body, name, deformable)
        if norm == "group":
            _replace_batch_norm(body)
        if norm in ("frozen_statistics", "frozen"):
            freeze_statistics(body)
        self._frozen = self._modules_to_freeze(frozen_stages, name)
        self._return_selected_only()
        for module in self._frozen:
            module.requires_grad_(False)
        if norm == "frozen":
            for module in body.modules():
                if isinstance(module, _BATCH_NORMS):
                    module.requires_grad_(False)

    def _modules_to_freeze(self, frozen_stages: int, name: str) -> list[nn.Module]:
        """The children up to the stem (0) or the n-th of the four stages."""
        if frozen_stages < 0:
            return []
        if frozen_stages == 4:
            return list(self.body.children())
        positions: dict[str, int] | None = getattr(self.body, "return_layers", None)
        if positions is None:
            raise ConfigError(
                f"model.backbone {name!r} can only be trained whole (--model.frozen-stages -1) or not at all (4)"
            )
        order = {child: i for i, child in enumerate(positions)}
        first = self.selected[0]
        # The stem ends with the feature before stride 4, or, without one, has everything before the first stage.
        limit = self.selected[frozen_stages - 1] if frozen_stages else first - 1
        frozen, seen = [], -1
        for child, module in self.body.named_children():
            if seen >= limit and frozen_stages:
                break
            if not frozen_stages and order.get(child, -1) >= first:
                break
            frozen.append(module)
            seen = max(seen, order.get(child, -1))
        return frozen

    def _return_selected_only(self) -> None:
        """Do not keep the features that nobody asks for: the stem's are as large as those of stride 4."""
        returned: dict[str, str] | None = getattr(self.body, "return_layers", None)
        if returned is None or len(returned) != len(self.body.feature_info.reduction()):
            return
        unused = [child for i, child in enumerate(returned) if i not in self.selected]
        for child in unused:
            del returned[child]
        self.selected = list(range(len(STRIDES)))

    def train(self, mode: bool = True) -> Backbone:
        super().train(mode)
        if self.norm in ("frozen_statistics", "frozen"):
            for module in self.body.modules():
                if isinstance(module, _BATCH_NORMS):
                    module.eval()
        for module in self._frozen:
            module.eval()
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        """Normalised images [B, 3, H, W] to features [B, C_l, H/s, W/s] of strides 4, 8, 16, 32."""
        height, width = images.shape[-2:]
        if self.multiple > 1:
            images = F.pad(images, (0, -width % self.multiple, 0, -height % self.multiple))
        if self.recompute and self.training and torch.is_grad_enabled():
            features = checkpoint(self.body, images.requires_grad_(), use_reentrant=False)
        else:
            features = self.body(images)
        chosen = [features[i] for i in self.selected]
        if self.output_norms is not None:
            if not self.channels_last:
                chosen = [feature.permute(0, 2, 3, 1) for feature in chosen]
            chosen = [norm(feature) for norm, feature in zip(self.output_norms, chosen)]
        if self.channels_last or self.output_norms is not None:
            chosen = [feature.permute(0, 3, 1, 2) for feature in chosen]
        if self.multiple > 1:
            chosen = [f[..., : -(-height // s), : -(-width // s)] for f, s in zip(chosen, STRIDES)]
        return chosen

    @torch.no_grad()
    def fold_batch_norm(self) -> None:
        """Fold each batch norm into the convolution before it: the same function at test time, with less work.

        Only pairs that are certain by name are folded: ``conv1``/``bn1`` in a block, and (conv, norm) in a sequence.
        """
        for module in list(self.body.modules()):
            children = dict(module.named_children())
            names = list(children)
            for before, after in itertools.pairwise(names):
                conv, norm = children[before], children[after]
                paired = after == before.replace("conv", "bn") or isinstance(module, nn.Sequential)
                foldable = isinstance(conv, nn.Conv2d) and type(norm) in (nn.BatchNorm2d, FrozenStatisticsNorm)
                if paired and foldable and before != after:
                    fold_batch_norm(conv, norm)
                    setattr(module, after, nn.Identity())


def _with_drop_path(name: str, rate: float, *, pretrained: bool, **options: Any) -> nn.Module:
    """The network with stochastic depth of ``rate`` and no other: some of timm's have one of their own by default."""
    if not rate:
        body = _create(name, pretrained=pretrained, **options)
        for module in body.modules():
            if isinstance(module, DropPath):
                module.drop_prob = 0.0
        return body
    try:
        return _create(name, pretrained=pretrained, drop_path_rate=rate, **options)
    except TypeError as error:
        raise ConfigError(f"model.drop_path {rate}: {name!r} has no stochastic depth; set it to 0") from error


def _move_stride_to_first_convolution(body: nn.Module, name: str) -> None:
    blocks = [m for m in body.modules() if hasattr(m, "conv3") and getattr(m.conv2, "stride", 1) == (2, 2)]
    if not blocks:
        raise ConfigError(f"model.style caffe is for ResNets with bottleneck blocks, not for {name!r}: use pytorch")
    for block in blocks:
        block.conv1.stride, block.conv2.stride = (2, 2), (1, 1)  # type: ignore[union-attr, assignment]


def _make_deformable(body: nn.Module, name: str, wanted: Deformable) -> None:
    for stage in wanted.stages:
        blocks = list(getattr(body, f"layer{stage}", []))
        if not blocks or not all(hasattr(block, "conv3") and block.conv2.kernel_size == (3, 3) for block in blocks):
            raise ConfigError(
                f"model.deformable is for ResNets with bottleneck blocks, not for {name!r}: set it to none"
            )
        for block in blocks:
            DeformableConv2d.of(block.conv2, modulated=wanted.modulated, groups=wanted.groups)


def _replace_batch_norm(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, BatchNormAct2d):
            raise ConfigError("model.norm group is for ResNets, this network's norms hold its activations: use batch")
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, nn.GroupNorm(math.gcd(32, child.num_features), child.num_features))
        else:
            _replace_batch_norm(child)
