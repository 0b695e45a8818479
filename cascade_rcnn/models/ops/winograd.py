"""3x3 convolutions with a quarter of the multiplications: minimal filtering (Winograd; Lavin & Gray, arXiv 1509.09308).

A tile of 4 x 4 outputs needs 6 x 6 inputs. Both are transformed to a basis in which the convolution is 36 products
instead of 144 per pair of channels: 36 matrix products over all tiles. Plain torch: no compiler is needed.

The basis is evaluation at six points. With 0, +-sqrt(1/2), +-sqrt(2) and infinity the rounding error is half of that
with the usual 0, +-1, +-2: 9e-7 (root mean square) at outputs of unit size, where the direct way has 2e-7 to 6e-7.

It pays on CPUs for wide layers on large maps: FPN, RPN, mask head. GPUs' libraries choose such algorithms themselves.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cascade_rcnn.rounding import round_up

TILE = 4  # outputs per side
PATCH = TILE + 2  # inputs per side
_POINTS = (0.0, math.sqrt(0.5), -math.sqrt(0.5), math.sqrt(2.0), -math.sqrt(2.0))
_WORKING_SET = 1 << 18  # input values of a batch of tiles: 7 MB with all transforms, which stays in the cache
_WEIGHT_ROWS = 16  # input channels whose filters are transformed at a time
_MIN_CHANNELS = 192  # below, the transforms cost as much as they save


@functools.cache
def _bases() -> tuple[Tensor, Tensor, Tensor]:
    """Float64 matrices that evaluate 4 outputs' polynomial [6, 4], a filter's [6, 3], and take inputs there [6, 6].

    Multiplying polynomials is evaluating, multiplying the values and interpolating; a convolution that keeps only the
    complete outputs is the transpose of that (Lavin & Gray, section 4; Toom and Cook before them).
    """

    def evaluate(terms: int) -> Tensor:
        rows = [[point**power for power in range(terms)] for point in _POINTS]
        return torch.tensor([*rows, [0.0] * (terms - 1) + [1.0]], dtype=torch.float64)  # the last: at infinity

    return evaluate(TILE), evaluate(3), torch.linalg.inv(evaluate(PATCH)).T


def _both_sides(basis: Tensor, values: Tensor) -> Tensor:
    """``basis`` [n, 6] applied to the rows and to the columns of 6 x 6 patches [6, 6 * ...]: [n, n, ...]."""
    by_rows = torch.mm(basis, values).view(len(basis), PATCH, -1)
    return torch.matmul(basis, by_rows)


class WinogradConv2d(nn.Module):
    """The function of a 3x3 convolution of stride 1 and padding 1, for inference on CPUs; channels-last in and out."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        outputs, filters, inputs = _bases()
        weight = conv.weight.new_empty(PATCH * PATCH, conv.in_channels, conv.out_channels)
        for first in range(0, conv.in_channels, _WEIGHT_ROWS):  # in float64, but not all of it at once
            part = conv.weight.detach()[:, first : first + _WEIGHT_ROWS].double()
            weight[:, first : first + _WEIGHT_ROWS] = torch.einsum("ar,oirs,bs->abio", filters, part, filters).flatten(
                0, 1
            )
        self.register_buffer("weight", weight)  # [36, in, out]
        self.register_buffer("bias", None if conv.bias is None else conv.bias.detach().clone())
        self.register_buffer("to_basis", inputs.float().contiguous(), persistent=False)  # [6, 6]
        self.register_buffer("from_basis", outputs.T.float().contiguous(), persistent=False)  # [4, 6]
        self.weight: Tensor
        self.bias: Tensor | None
        self.to_basis: Tensor
        self.from_basis: Tensor

    @staticmethod
    def fits(conv: nn.Module) -> bool:
        """Whether a layer is such a convolution and wide enough to benefit."""
        return (
            type(conv) is nn.Conv2d
            and conv.kernel_size == (3, 3)
            and conv.stride == (1, 1)
            and conv.padding == (1, 1)
            and conv.dilation == (1, 1)
            and conv.groups == 1
            and conv.padding_mode == "zeros"
            and min(conv.in_channels, conv.out_channels) >= _MIN_CHANNELS
            and conv.weight.dtype == torch.float32
            and conv.weight.device.type == "cpu"
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, out, H, W]."""
        # For torch.compile one operator: the loop over bands, unrolled, would compile for minutes and gain nothing.
        convolve = _operator if torch.compiler.is_compiling() else _convolve
        with torch.autocast(x.device.type, enabled=False):  # in half precision the transforms would lose what is left
            made = convolve(x.to(self.weight.dtype), self.weight, self.bias, self.to_basis, self.from_basis)
        return made.to(x.dtype)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, to_basis: Tensor, from_basis: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    maps = x.permute(0, 2, 3, 1)  # [B, H, W, C]
    result = _whole_tiles(x, weight)
    down, across = result.shape[1] // TILE, result.shape[2] // TILE
    bands = max(1, _WORKING_SET // (TILE * TILE * across * channels))  # rows of tiles at a time

    def band(images: slice, first: int, last: int) -> None:
        """Tiles of the rows ``first`` to ``last``."""
        patches = _patches(maps[images], first, last, across)
        values = _both_sides(to_basis, patches)  # [36, tiles * C]
        products = torch.bmm(values.view(PATCH * PATCH, -1, channels), weight)  # [36, tiles, out]
        tiles = _both_sides(from_basis, products.view(PATCH, -1))  # [16, tiles * out]
        tiles = tiles.view(TILE, TILE, -1, last - first, across, weight.shape[2])
        target = result[images, first * TILE : last * TILE].unflatten(2, (across, TILE)).unflatten(1, (-1, TILE))
        tiles = tiles.permute(2, 3, 0, 4, 1, 5)  # [B, rows, 4, across, 4, out]
        if bias is None:
            target.copy_(tiles)
        else:
            torch.add(tiles, bias, out=target)

    if batch > 1 and down <= bands:  # many small maps, such as a mask head's
        many = max(1, bands // down)
        for start in range(0, batch, many):
            band(slice(start, start + many), 0, down)
    else:
        for image in range(batch):
            for first in range(0, down, bands):
                band(slice(image, image + 1), first, min(first + bands, down))
    return result[:, :height, :width].permute(0, 3, 1, 2)


def _patches(maps: Tensor, first: int, last: int, across: int) -> Tensor:
    """Overlapping patches of the rows of tiles ``first`` to ``last`` of maps [B, H, W, C]: [6, 6 * B * tiles * C]."""
    batch, height, width, channels = maps.shape
    top, bottom = first * TILE - 1, last * TILE + 1
    above, below = max(0, -top), max(0, bottom - height)
    rows = F.pad(maps[:, top + above : bottom - below], (0, 0, 1, across * TILE + 1 - width, above, below))
    image, row, column = rows.stride(0), rows.stride(1), rows.stride(2)
    patches = rows.as_strided(
        (PATCH, PATCH, batch, last - first, across, channels),
        (row, column, image, TILE * row, TILE * column, 1),
    )
    return patches.reshape(PATCH, -1)


def _whole_tiles(x: Tensor, weight: Tensor) -> Tensor:
    """Room for the result, [B, H, W, out] with both sides rounded up to whole tiles."""
    down, across = (round_up(side, TILE) for side in x.shape[2:])
    return x.new_empty(x.shape[0], down, across, weight.shape[2])


@torch.library.custom_op("cascade_rcnn::winograd", mutates_args=())
def _operator(x: Tensor, weight: Tensor, bias: Tensor | None, to_basis: Tensor, from_basis: Tensor) -> Tensor:
    return _convolve(x, weight, bias, to_basis, from_basis)


@_operator.register_fake
def _shape(x: Tensor, weight: Tensor, *_: Tensor | None) -> Tensor:
    return _whole_tiles(x, weight)[:, : x.shape[2], : x.shape[3]].permute(0, 3, 1, 2)


def use_winograd(module: nn.Module) -> int:
    """Replace the convolutions of ``module`` that benefit, for inference only; returns how many."""
    count = 0
    for name, child in module.named_children():
        if WinogradConv2d.fits(child):
            setattr(module, name, WinogradConv2d(child))  # type: ignore[arg-type]
            count += 1
        else:
            count += use_winograd(child)
    return count
