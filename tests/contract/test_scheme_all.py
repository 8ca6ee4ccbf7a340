"""Every scheme against its oracle: `Dense` on the scheme's own `dequantize`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import gguf
import numpy as np
import pytest
import torch

from septet.geometry import BLOCKS
from septet.kernels.ggml import KINDS
from septet.kernels.reference import ReferenceOps
from septet.quant.gguf import GGUFBlocks
from septet.quant.none import Dense

if TYPE_CHECKING:
    from septet.quant.scheme import PackedWeight

OPS = ReferenceOps()
QUANTISED = sorted(KINDS - {"F32", "F16", "BF16"})
SCHEMES = ["dense", *QUANTISED]
DTYPES = [torch.float32, torch.bfloat16]
N, K = 24, 512


def packed(scheme: str, dtype: torch.dtype, n: int = N, seed: int = 0) -> PackedWeight:
    """A weight (n, K). Random codes under scales of one hundredth, where the gguf package can't quantise."""
    generator = torch.Generator().manual_seed(seed)
    if scheme == "dense":
        return Dense.pack(torch.randn(n, K, generator=generator).to(dtype))
    try:
        values = torch.randn(n, K, generator=generator).numpy()
        blocks = torch.from_numpy(gguf.quants.quantize(values, gguf.GGMLQuantizationType[scheme]))
    except NotImplementedError:
        elements, size = BLOCKS[scheme]
        codes = torch.randint(0, 256, (n, K // elements, size), generator=generator, dtype=torch.uint8)
        scale = torch.from_numpy(np.array([0.01], dtype=np.float16).view(np.uint8))
        for at in {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,)}.get(
            scheme, (0, 2)
        ):
            codes[:, :, at : at + 2] = scale
        blocks = codes.view(n, -1)
    return GGUFBlocks(scheme).pack(blocks)


def oracle(weight: PackedWeight, dtype: torch.dtype) -> PackedWeight:
    return Dense.pack(weight.dequantize(OPS, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_dequantize_has_the_logical_shape(scheme: str, dtype: torch.dtype) -> None:
    weight = packed(scheme, dtype)
    dense = weight.dequantize(OPS, dtype)
    assert weight.shape == tuple(dense.shape) == (N, K)
    assert dense.dtype == dtype
    assert 0.005 < dense.float().std() < 1000
    assert weight.n_bytes == (
        N * K * dtype.itemsize if scheme == "dense" else N * K // BLOCKS[scheme][0] * BLOCKS[scheme][1]
    )


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_linear(scheme: str, dtype: torch.dtype, biased: bool) -> None:
    weight = packed(scheme, dtype)
    x, bias = torch.randn(5, K).to(dtype), torch.randn(N).to(dtype) if biased else None
    got = weight.linear(OPS, x, bias)
    want = oracle(weight, dtype).linear(OPS, x, bias)
    assert got.shape == (5, N)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_embed(scheme: str, dtype: torch.dtype) -> None:
    weight = packed(scheme, dtype)
    ids = torch.tensor([0, N - 1, 3, 3])
    got = weight.embed(OPS, ids, dtype, 1.5)
    assert torch.equal(got, oracle(weight, dtype).embed(OPS, ids, dtype, 1.5))
    assert torch.equal(weight.embed(OPS, ids, dtype), weight.dequantize(OPS, dtype)[ids])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_concat_stacks_rows_in_order(scheme: str) -> None:
    parts = [packed(scheme, torch.float32, n, seed=n) for n in (8, 3, 5)]
    joined = parts[0].scheme.concat(parts)
    assert joined is not None
    assert joined.shape == (16, K)
    assert joined.scheme == parts[0].scheme
    want = torch.cat([p.dequantize(OPS, torch.float32) for p in parts])
    assert torch.equal(joined.dequantize(OPS, torch.float32), want)


@pytest.mark.parametrize(("one", "other"), [("dense", "Q8_0"), ("Q8_0", "dense"), ("Q4_K", "Q5_K"), ("Q4_0", "IQ4_NL")])
def test_concat_of_different_formats_is_refused(one: str, other: str) -> None:
    """Q4_0 and IQ4_NL have blocks of one size: only the kind tells them apart."""
    weights = [packed(one, torch.float32), packed(other, torch.float32)]
    assert weights[0].scheme.concat(weights) is None


def test_concat_of_other_dtypes_or_widths_is_refused() -> None:
    narrow = Dense.pack(torch.zeros(2, K // 2))
    assert Dense().concat([packed("dense", torch.float32), packed("dense", torch.bfloat16)]) is None
    assert Dense().concat([packed("dense", torch.float32), narrow]) is None
    blocks = packed("Q8_0", torch.float32)
    shorter = GGUFBlocks("Q8_0").pack(blocks.tensors["blocks"][:, :34].contiguous())
    assert shorter.shape == (N, 32)
    assert blocks.scheme.concat([blocks, shorter]) is None


def test_blocks_of_broken_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="Q4_0"):
        GGUFBlocks("Q4_0").pack(torch.zeros(2, 17, dtype=torch.uint8))
    with pytest.raises(ValueError, match="uint8"):
        GGUFBlocks("Q4_0").pack(torch.zeros(2, 18))


def test_names_tell_formats_apart() -> None:
    assert {packed(s, torch.float32).scheme.name for s in SCHEMES} == {"dense"} | {
        f"gguf-{k.lower()}" for k in QUANTISED
    }
