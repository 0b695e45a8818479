"""What the processor says of itself: bfloat16 and 8-bit units, by each name that torch has for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cascade_rcnn.models.ops.capabilities import has_bfloat16_units, has_int8_units

AVX2 = {"architecture": "x86_64", "avx2": True, "fma3": True, "avx512_bf16": False, "avx512_vnni": False}


@pytest.mark.parametrize(
    ("known", "bfloat16", "int8"),
    [
        (AVX2, False, False),
        (AVX2 | {"avx512_f": True}, False, False),  # Skylake: wide, but neither
        (AVX2 | {"avx512_vnni": True}, False, True),  # Ice Lake
        (AVX2 | {"avx_vnni": True}, False, True),  # desktops since Alder Lake
        (AVX2 | {"avx512_vnni": True, "avx512_bf16": True}, True, True),  # Zen 4
        (AVX2 | {"amx_bf16": True, "amx_int8": True}, True, True),  # Sapphire Rapids
        ({"architecture": "aarch64", "neon": True, "bf16": True, "dot": True}, True, True),  # Graviton 3
        ({"architecture": "aarch64", "neon": True, "dot": True, "bf16": False}, False, True),  # Graviton 2
    ],
)
def test_units_of_processors(
    known: dict[str, Any], bfloat16: bool, int8: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    assert has_bfloat16_units.__wrapped__() is bfloat16
    assert has_int8_units.__wrapped__() is int8


@pytest.mark.parametrize("has", [True, False])
def test_units_before_torch_had_the_list(has: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: has, raising=False)
    assert has_bfloat16_units.__wrapped__() is has
    assert has_int8_units.__wrapped__() is has
