"""Every GGUF block type against the `gguf` package's decoder, bit for bit in float32."""

from __future__ import annotations

from typing import TYPE_CHECKING

import gguf
import numpy as np
import pytest
import torch

from septet.errors import UnsupportedModel
from septet.geometry import BLOCKS
from septet.hub.gguf import GGUFFile
from septet.kernels import ggml

if TYPE_CHECKING:
    from pathlib import Path

HALVES = {  # byte offsets of float16 scales in a block
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
}
PLAIN = {"F32": np.float32, "F16": np.float16}


def random_rows(kind: str, n: int, n_blocks: int, seed: int = 0) -> np.ndarray:
    """(n, n_blocks * size) uint8: any codes, scales that are finite numbers."""
    rng = np.random.default_rng(seed)
    _, size = BLOCKS[kind]
    if kind in PLAIN:
        return rng.standard_normal((n, n_blocks)).astype(PLAIN[kind]).view(np.uint8)
    if kind == "BF16":
        values = rng.standard_normal((n, n_blocks)).astype(np.float32)
        return gguf.quants.quantize(values, gguf.GGMLQuantizationType.BF16).view(np.uint8)
    rows = rng.integers(0, 256, (n, n_blocks, size), dtype=np.uint8)
    for at in HALVES[kind]:
        rows[:, :, at : at + 2] = (rng.standard_normal((n, n_blocks, 1)) * 0.01).astype(np.float16).view(np.uint8)
    return rows.reshape(n, -1)


def oracle(rows: np.ndarray, kind: str) -> np.ndarray:
    if kind in PLAIN:
        return rows.view(PLAIN[kind]).astype(np.float32)
    return gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[kind])


def bits(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).view(np.uint32)


@pytest.mark.parametrize("kind", sorted(ggml.KINDS))
def test_equals_the_oracle_bit_for_bit(kind: str) -> None:
    rows = random_rows(kind, 19, 3)
    got = ggml.dequantize(torch.from_numpy(rows), kind, torch.float32)
    want = oracle(rows, kind)
    assert got.shape == want.shape == (19, 3 * BLOCKS[kind][0])
    np.testing.assert_array_equal(bits(got.numpy()), bits(want))


@pytest.mark.parametrize("kind", ["Q4_K", "IQ4_XS", "Q8_0"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_are_rounded_once_from_float32(kind: str, dtype: torch.dtype) -> None:
    rows = torch.from_numpy(random_rows(kind, 5, 2))
    assert torch.equal(ggml.dequantize(rows, kind, dtype), ggml.dequantize(rows, kind, torch.float32).to(dtype))


@pytest.mark.parametrize("kind", sorted(ggml.KINDS))
def test_any_rows_of_a_larger_tensor(kind: str) -> None:
    """Gathered rows (an embedding) and every second row (a strided view) decode as the whole does."""
    rows = torch.from_numpy(random_rows(kind, 8, 2))
    whole = ggml.dequantize(rows, kind, torch.float32)
    ids = torch.tensor([5, 0, 5])
    assert torch.equal(ggml.dequantize(rows[ids], kind, torch.float32), whole[ids])
    assert torch.equal(ggml.dequantize(rows[1::2], kind, torch.float32), whole[1::2])
    assert ggml.dequantize(rows[:0], kind, torch.float32).shape == (0, 2 * BLOCKS[kind][0])


@pytest.mark.parametrize("kind", sorted(ggml.KINDS))
def test_the_host_reads_nothing(kind: str) -> None:
    """Tensors without data decode to tensors without data: a decoder can run inside a captured step."""
    rows = torch.empty(3, 2 * BLOCKS[kind][1], dtype=torch.uint8, device="meta")
    got = ggml.dequantize(rows, kind, torch.bfloat16)
    assert (got.device.type, got.dtype, got.shape) == ("meta", torch.bfloat16, (3, 2 * BLOCKS[kind][0]))


def test_kinds_are_those_of_the_geometry_table() -> None:
    assert set(BLOCKS) >= ggml.KINDS
    sizes = {k.name: v for k, v in gguf.GGML_QUANT_SIZES.items()}
    assert {kind: BLOCKS[kind] for kind in ggml.KINDS} == {kind: sizes[kind] for kind in ggml.KINDS}


def test_unknown_kind_is_named() -> None:
    with pytest.raises(UnsupportedModel, match="IQ2_XXS"):
        ggml.dequantize(torch.zeros(1, 66, dtype=torch.uint8), "IQ2_XXS", torch.float32)


@pytest.mark.parametrize("shape", [(2, 35), (36,), (1, 1, 34)])
def test_bytes_that_are_no_blocks_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="Q8_0"):
        ggml.dequantize(torch.zeros(shape, dtype=torch.uint8), "Q8_0", torch.float32)


def compare_file(path: Path, kinds: set[str]) -> None:
    """All types of a real file: the first 64 rows of one tensor of each."""
    seen: set[str] = set()
    with GGUFFile.open(path) as file:
        for info in file.tensors.values():
            if info.kind in seen or len(info.shape) != 2:
                continue
            seen.add(info.kind)
            rows = np.frombuffer(file.data(info), np.uint8).reshape(info.shape[0], -1)[:64].copy()
            got = ggml.dequantize(torch.from_numpy(rows), info.kind, torch.float32)
            np.testing.assert_array_equal(bits(got.numpy()), bits(oracle(rows, info.kind)))
    assert seen == kinds


def test_smollm2_decodes_as_the_oracle(smollm2_path: Path) -> None:
    compare_file(smollm2_path, {"Q4_1", "Q8_0"})


def test_gemma3_decodes_as_the_oracle(gemma3_path: Path) -> None:
    compare_file(gemma3_path, {"Q5_0", "Q4_K", "Q8_0", "Q6_K"})
