"""torch.compile for the cascade: what is compiled, for which sizes, where the code is kept.

Imported only where something is compiled. Trunk (normalisation, backbone, FPN), RPN convolutions and heads have static
shapes and are compiled; what depends on the data (proposals, NMS, RoIAlign, which is a kernel of its own) is not.

Images are padded to one of a few sizes (``data.loader.bucket_sizes``), and code is made once for each. More padding
must not change what is found: a convolution would see the image's border move away, so everything outside the part that
the image fills by itself is kept at zero. Compiled, that multiplication joins the ReLU before it.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cascade_rcnn import cache
from cascade_rcnn.errors import UserError
from cascade_rcnn.models.cascade_rcnn import CascadeRCNN
from cascade_rcnn.models.ops.winograd import WinogradConv2d
from cascade_rcnn.models.rpn import RPN, RPNOutputs
from cascade_rcnn.rounding import ceil_div, round_up
from cascade_rcnn.structures import ImageBatch, RawDetections

_MAX_VARIANTS = 64  # of one function: sizes times batches; torch's own limit of 8 would fall back to eager silently
_STRIDES = (1, 2, 4, 8, 16, 32, 64)  # of the maps, from the image itself to p6


def cache_folder() -> Path:
    """Where compiled code is kept from process to process: ``TORCHINDUCTOR_CACHE_DIR``, or the user's cache folder."""
    chosen = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    # torch sets the variable itself, to a folder among the temporary files, which do not outlive the machine's restart
    if chosen and not chosen.startswith(str(Path(tempfile.gettempdir()) / "torchinductor_")):
        return Path(chosen)
    return cache.cache_folder("compiled")


def check_compiler(device: torch.device) -> None:
    """Raises UserError where torch.compile lacks what it needs on this machine."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            raise UserError("--compile needs Triton on a GPU: pip install triton, or drop --compile")
        return
    usual = {"win32": "cl", "darwin": "clang++"}.get(sys.platform, "g++")
    name = os.environ.get("CXX") or usual
    if shutil.which(name) is None:
        raise UserError(
            f"--compile needs a C++ compiler, and {name!r} is not there: install one (Debian, Ubuntu: apt "
            "install g++) or name it in the variable CXX, or drop --compile"
        )


def compile_for_inference(model: CascadeRCNN, *, multiple: int = 32) -> CompiledCascadeRCNN:
    """The same network with compiled trunk and heads; ``model`` has gone through ``optimize_for_inference``.

    Its modules are taken over: use what is returned instead. ``multiple`` is ``data.pad_multiple``, to which an image
    alone is padded. Raises UserError without a compiler.
    """
    check_compiler(model.mean.device)
    return CompiledCascadeRCNN(model, multiple=multiple)


def compile_for_training(model: CascadeRCNN, *, fixed_sizes: bool) -> None:
    """Compile the parts of static structure in place; the names in the state_dict stay as they are.

    ``fixed_sizes``: images come in a few sizes, and code is made for each; else from the second size on for any.
    No CUDA graphs here: a step's gradients would have to be copied out of them before the next pass.
    """
    check_compiler(model.mean.device)
    # Code is made while the steps run, so these hold for the rest of the process.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache_folder())
    for name, value in _dynamo_limit().items():
        setattr(torch._dynamo.config, name, value)
    for part in (model.backbone, model.fpn, model.rpn):
        part.compile(dynamic=False if fixed_sizes else None)
    for head in model.cascade.box_heads:
        head.compile()
    for head in model.cascade.mask_heads:
        head.features = torch.compile(head.features)  # type: ignore


def _dynamo_limit() -> dict[str, int]:
    """The setting of ``torch._dynamo.config`` that allows ``_MAX_VARIANTS``."""
    import torch._dynamo

    newer = hasattr(torch._dynamo.config, "recompile_limit")
    return {"recompile_limit" if newer else "cache_size_limit": _MAX_VARIANTS}  # the second is its name in torch 2.6


@contextmanager
def _compiler_settings(*, freezing: bool) -> Iterator[None]:
    """torch's settings for compiling, while a function is called that may have to be compiled.

    The folder where code is kept has no other setting than an environment variable.
    """
    import torch._dynamo
    import torch._inductor.config as inductor

    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache_folder())
    try:
        with torch._dynamo.config.patch(_dynamo_limit()), inductor.patch(freezing=freezing):
            yield
    finally:
        if before is None:
            del os.environ["TORCHINDUCTOR_CACHE_DIR"]
        else:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = before


class CompiledCascadeRCNN(CascadeRCNN):
    """A network for inference that makes code for each size of batch when it first meets it, and says so."""

    def __init__(self, model: CascadeRCNN, *, multiple: int = 32) -> None:
        super().__init__(
            model.backbone,
            model.fpn,
            model.rpn,
            model.cascade,
            mean=model.mean.flatten().tolist(),
            std=model.std.flatten().tolist(),
            bgr=model.bgr,
        )
        self.to(model.mean.device).eval()
        self._gpu = model.mean.device.type == "cuda"
        self._multiple = multiple
        self._batches: dict[tuple[int, int], int] = {}  # largest batch met, by (height, width)
        self._unpadded = _UnpaddedPart()
        self._unpadded.watch(self)
        # Anchors beyond the part that an image fills by itself belong to nobody, whatever the semantics.
        self.rpn.details = replace(self.rpn.details, mask_padding=True)
        self.recorder = model.recorder  # on a GPU: the whole prediction as one graph, compiled parts and all others
        self._trunk = torch.compile(self._eager_trunk, dynamic=False)
        for head in self.cascade.box_heads:
            head.compile()  # on a CPU the number of RoIs varies: from the second on, for any number
        for head in self.cascade.mask_heads:
            head.features = torch.compile(head.features)  # type: ignore

    def _eager_trunk(self, pixels: Tensor, sizes: Tensor, unpadded: Tensor) -> tuple[list[Tensor], RPNOutputs]:
        """Everything of static shapes in one piece: the pyramid, and what the RPN says of it."""
        self._unpadded.sizes, self._unpadded.canvas = unpadded, (pixels.shape[2], pixels.shape[3])
        pyramid = self.fpn(self.backbone(self.normalize(ImageBatch(pixels, sizes, sizes))))
        outputs = RPN.forward(self.rpn, pyramid)
        return [self._unpadded.with_border(level) for level in pyramid], outputs

    def _pyramid_and_rpn(self, images: ImageBatch) -> tuple[list[Tensor], RPNOutputs]:
        made: tuple[list[Tensor], RPNOutputs] = self._trunk(
            images.pixels, images.sizes, round_up(images.sizes, self._multiple)
        )
        return made

    def pyramid(self, images: ImageBatch) -> list[Tensor]:
        return self._pyramid_and_rpn(images)[0]

    @torch.no_grad()
    def detect(self, images: ImageBatch) -> RawDetections:
        """As that of the network itself, up to rounding, also for images padded more than they need."""
        size = (int(images.pixels.shape[2]), int(images.pixels.shape[3]))
        count, known = len(images), self._batches.get(size, 0)
        if count <= known:
            found = self._run(_filled(images, known))
            return found if count == known else found._map(lambda tensor: tensor[:count])
        self._batches[size] = count
        with _announced(f"{count} x {size[0]} x {size[1]}"):
            return self._run(images)

    def _run(self, images: ImageBatch) -> RawDetections:
        # Freezing lays weights out for the CPU's convolutions and joins these with what follows. Weights in that layout
        # cannot be kept on disk, so that half of the work is done again in each process; without it nothing is gained.
        with _compiler_settings(freezing=not self._gpu):
            return super().detect(images)

    def _detect(self, images: ImageBatch) -> RawDetections:
        pyramid, outputs = self._pyramid_and_rpn(images)
        proposals = self.rpn.propose(pyramid, images.sizes, outputs)
        return self.cascade.detect(pyramid, proposals, images)


class _UnpaddedPart:
    """The part of each image in a batch that it would fill if it were alone, and zeros everywhere else."""

    def __init__(self) -> None:
        self.sizes = torch.zeros(0, 2, dtype=torch.int64)  # [B, 2] (height, width), of the batch under way
        self.canvas = (0, 0)  # the batch's padded (height, width)

    def watch(self, model: CascadeRCNN) -> None:
        """Keep the input of everything that looks at neighbours at zero outside."""
        parts = (model.backbone, model.fpn, model.rpn)
        for module in [module for part in parts for module in part.modules()]:
            wide = isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1)
            if wide or isinstance(module, (nn.MaxPool2d, WinogradConv2d)):
                module.register_forward_pre_hook(self._before)

    def _before(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        x = inputs[0]
        height, width = self._extent(x)
        row, column = torch.arange(x.shape[2], device=x.device), torch.arange(x.shape[3], device=x.device)
        inside = (row[:, None] < height[:, None, None]) & (column < width[:, None, None])  # [B, h, w]
        return x * inside[:, None].to(x.dtype)

    def _extent(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and columns [B] of a map [B, C, h, w] that belong to the images themselves."""
        stride = self._stride(x)
        return ceil_div(self.sizes[:, 0], stride), ceil_div(self.sizes[:, 1], stride)

    def _stride(self, x: Tensor) -> int:
        """The stride at which the canvas has a map's height and width; every layer rounds up."""
        shape = (x.shape[2], x.shape[3])
        for stride in _STRIDES:
            if (ceil_div(self.canvas[0], stride), ceil_div(self.canvas[1], stride)) == shape:
                return stride
        raise ValueError(f"a map of {shape} is no stride of {_STRIDES} on a canvas of {self.canvas}")

    def with_border(self, x: Tensor) -> Tensor:
        """Repeat an image's last row and column once: RoIAlign reads half a pixel beyond what is its own."""
        height, width = self._extent(x)
        column = torch.arange(x.shape[3], device=x.device) < width[:, None]  # [B, w]
        x = torch.where(column[:, None, None, :], x, F.pad(x[..., :-1], (1, 0)))
        row = torch.arange(x.shape[2], device=x.device) < height[:, None]
        return torch.where(row[:, None, :, None], x, F.pad(x[..., :-1, :], (0, 0, 1, 0)))


def _filled(images: ImageBatch, batch: int) -> ImageBatch:
    """Empty images behind those that are there, up to ``batch``: cheaper than making code for one more size."""
    missing = batch - len(images)
    if not missing:
        return images
    pixels = F.pad(images.pixels, (0, 0, 0, 0, 0, 0, 0, missing)).contiguous(memory_format=torch.channels_last)
    others = {
        field.name: value
        for field in fields(images)
        if field.name != "pixels" and isinstance(value := getattr(images, field.name), Tensor)
    }
    longer: dict[str, Any] = {
        name: torch.cat([value, value.new_ones(missing, *value.shape[1:])]) for name, value in others.items()
    }
    return replace(images, pixels=pixels, **longer)


@contextmanager
def _announced(what: str) -> Iterator[None]:
    """Tell on stderr that code is made, how long it took, and whether it was found in the cache."""
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    # on a CPU beside an installed CUDA toolkit it says that there is no GPU, in the middle of our line
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    print(f"compiling for {what} ... ", end="", file=sys.stderr, flush=True)
    before, start = _files(), time.perf_counter()
    try:
        with warnings.catch_warnings():
            # float32 without TF32 is what was asked for
            warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores", category=UserWarning)
            yield
    except (TorchDynamoException, CppCompileError, InvalidCxxCompiler) as error:
        print("failed", file=sys.stderr)
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"torch.compile failed ({reason}): drop --compile") from error
    kept = "kept in" if _files() > before else "with code found in"
    print(f"{time.perf_counter() - start:.0f} s, {kept} {cache_folder()}", file=sys.stderr)


def _files() -> int:
    """How many; other processes may take their temporary folders away meanwhile, which ``os.walk`` forgives."""
    return sum(
        name.endswith((".so", ".cubin", ".dylib", ".pyd")) for *_, names in os.walk(cache_folder()) for name in names
    )
