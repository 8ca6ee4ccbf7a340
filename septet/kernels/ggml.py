"""GGUF block types in torch: exact dequantisation, vectorised, on any device.

Called by `reference.py`, by the fast versions' tests and by the loader. One decoder per type turns whole blocks into
float32 by the format's own definition (ggml's `ggml-quants.c`; the `gguf` package is the oracle of the tests: equal bit
for bit). No host synchronisation and no copies from the host, so that a decoder may run inside a captured step.
Must not know what a layer, a file or a scheme is. Sizes of blocks live in `septet.geometry.BLOCKS`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from septet.errors import UnsupportedModel
from septet.geometry import BLOCKS

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["KINDS", "dequantize"]

_IQ4_LOW = 0xF6EADDCFBFAD9881  # the 16 values of IQ4, int8 each, lowest byte first: -127 -104 -83 -65 -49 -35 -22 -10
_IQ4_HIGH = 0x7159453526190D01  # 1 13 25 38 53 69 89 113


def dequantize(blocks: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """blocks (N, row_bytes) uint8, rows of whole blocks of type `kind` -> (N, K) in `dtype`, float32 first.

    UnsupportedModel for a type that is not in `KINDS`, ValueError for bytes that are no rows of whole blocks.
    """
    decode = _DECODERS.get(kind)
    if decode is None:
        raise UnsupportedModel(f"GGUF block type {kind} is not implemented; use one of {', '.join(sorted(KINDS))}")
    elements, size = BLOCKS[kind]
    if blocks.dtype != torch.uint8 or blocks.dim() != 2 or blocks.shape[1] % size:
        found = f"{tuple(blocks.shape)} {blocks.dtype}"
        raise ValueError(f"blocks: {kind} needs (N, a multiple of {size}) uint8, found {found}")
    n, row_bytes = blocks.shape
    return decode(blocks.reshape(n * (row_bytes // size), size)).reshape(n, row_bytes // size * elements).to(dtype)


def _half(block: Tensor, at: int) -> Tensor:
    """(n, 1) float32: the float16 at byte `at` of each block."""
    return block[:, at : at + 2].view(torch.float16).float()


def _fields(packed: Tensor, bits: int, width: int) -> Tensor:
    """(n, m) uint8 -> (n, m * 8 / bits) uint8: unpack fields of `bits` bits.

    Bytes come in groups of `width`; a group gives the lowest field of all its bytes, then the next field of all, ...
    """
    n, m = packed.shape
    groups = packed.reshape(n, m // width, 1, width)
    mask = (1 << bits) - 1
    parts = [(groups >> shift) & mask for shift in range(0, 8, bits)]
    return torch.cat(parts, dim=2).reshape(n, m * 8 // bits)


def _scaled(q: Tensor, scale: Tensor, minimum: Tensor | None = None) -> Tensor:
    """q (n, 256), scale and minimum (n, groups) float32 -> q * scale - minimum of each group, (n, 256) float32."""
    n, groups = scale.shape
    values = q.reshape(n, groups, 256 // groups).float() * scale[:, :, None]
    return (values if minimum is None else values - minimum[:, :, None]).reshape(q.shape)


def _signed(q: Tensor, offset: int) -> Tensor:
    """uint8 codes less `offset`, int8."""
    return q.to(torch.int8) - offset


# -- plain numbers ----------------------------------------------------------------------------------------------------
def _f32(b: Tensor) -> Tensor:
    return b.view(torch.float32)


def _f16(b: Tensor) -> Tensor:
    return b.view(torch.float16).float()


def _bf16(b: Tensor) -> Tensor:
    return b.view(torch.bfloat16).float()


# -- 32 weights a block -----------------------------------------------------------------------------------------------
def _q4_0(b: Tensor) -> Tensor:
    """d, 16 bytes of nibbles: d * (q - 8)."""
    return _signed(_fields(b[:, 2:], 4, 16), 8).float() * _half(b, 0)


def _q4_1(b: Tensor) -> Tensor:
    """d, m, 16 bytes of nibbles: d * q + m."""
    return _fields(b[:, 4:], 4, 16).float() * _half(b, 0) + _half(b, 2)


def _q5_0(b: Tensor) -> Tensor:
    """d, 32 fifth bits, 16 bytes of nibbles: d * (q - 16)."""
    q = _fields(b[:, 6:], 4, 16) | (_fields(b[:, 2:6], 1, 1) << 4)
    return _signed(q, 16).float() * _half(b, 0)


def _q5_1(b: Tensor) -> Tensor:
    """d, m, 32 fifth bits, 16 bytes of nibbles: d * q + m."""
    q = _fields(b[:, 8:], 4, 16) | (_fields(b[:, 4:8], 1, 1) << 4)
    return q.float() * _half(b, 0) + _half(b, 2)


def _q8_0(b: Tensor) -> Tensor:
    """d, 32 int8: d * q."""
    return b[:, 2:].view(torch.int8).float() * _half(b, 0)


# -- 256 weights a block ----------------------------------------------------------------------------------------------
def _q2_k(b: Tensor) -> Tensor:
    """16 bytes (scale | min << 4) of 16 weights each, 64 bytes of 2-bit codes, d, dmin."""
    scale = (b[:, :16] & 15).float() * _half(b, 80)
    minimum = (b[:, :16] >> 4).float() * _half(b, 82)
    return _scaled(_fields(b[:, 16:80], 2, 32), scale, minimum)


def _q3_k(b: Tensor) -> Tensor:
    """32 bytes of inverted third bits, 64 bytes of 2-bit codes, 12 bytes of 16 6-bit scales, d."""
    low = _fields(b[:, 32:96], 2, 32)
    high = _fields(b[:, :32], 1, 32)  # set bit: no offset; clear bit: less 4
    codes = _signed(low | (high << 2), 4)
    scales = _fields(b[:, 96:104], 4, 8) | (_fields(b[:, 104:108], 2, 4) << 4)
    return _scaled(codes, _signed(scales, 32).float() * _half(b, 108))


def _scales_k4(packed: Tensor) -> tuple[Tensor, Tensor]:
    """(n, 12) bytes of Q4_K and Q5_K -> 8 scales and 8 minima of 6 bits, (n, 8) uint8 each.

    Bytes 0-3: low 6 bits are scales 0-3, bytes 4-7: minima 0-3; their top 2 bits are the top of number 4-7, whose low
    4 bits are in bytes 8-11 (scale in the low nibble, minimum in the high one).
    """
    d, m, rest = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scale = torch.cat((d & 0x3F, (rest & 0x0F) | ((d >> 2) & 0x30)), dim=1)
    minimum = torch.cat((m & 0x3F, (rest >> 4) | ((m >> 2) & 0x30)), dim=1)
    return scale, minimum


def _q4_k(b: Tensor) -> Tensor:
    """d, dmin, 12 bytes of 6-bit scales and minima of 32 weights each, 128 bytes of nibbles."""
    scale, minimum = _scales_k4(b[:, 4:16])
    return _scaled(_fields(b[:, 16:], 4, 32), scale.float() * _half(b, 0), minimum.float() * _half(b, 2))


def _q5_k(b: Tensor) -> Tensor:
    """As Q4_K, with 32 bytes of fifth bits before the nibbles."""
    scale, minimum = _scales_k4(b[:, 4:16])
    q = _fields(b[:, 48:], 4, 32) | (_fields(b[:, 16:48], 1, 32) << 4)
    return _scaled(q, scale.float() * _half(b, 0), minimum.float() * _half(b, 2))


def _q6_k(b: Tensor) -> Tensor:
    """128 bytes of low nibbles, 64 bytes of top 2 bits, 16 int8 scales of 16 weights each, d."""
    q = _fields(b[:, :128], 4, 64) | (_fields(b[:, 128:192], 2, 32) << 4)
    return _scaled(_signed(q, 32), b[:, 192:208].view(torch.int8).float() * _half(b, 208))


# -- non-linear 4 bits ------------------------------------------------------------------------------------------------
def _iq4_values(q: Tensor) -> Tensor:
    """Codes 0 .. 15 -> the values of IQ4, float32. The table is made on the device, out of two integers."""
    index = torch.arange(16, device=q.device)
    low, high = _IQ4_LOW - (1 << 64), _IQ4_HIGH  # as int64
    word = torch.where(index < 8, low, high) >> (index % 8 * 8)
    table = (word & 0xFF).to(torch.uint8).view(torch.int8).float()
    return table.index_select(0, q.reshape(-1).int()).reshape(q.shape)


def _iq4_nl(b: Tensor) -> Tensor:
    """d, 16 bytes of nibbles: d * value of q."""
    return _iq4_values(_fields(b[:, 2:], 4, 16)) * _half(b, 0)


def _iq4_xs(b: Tensor) -> Tensor:
    """d, 8 top 2 bits of scales, 8 low nibbles of scales, 128 bytes of nibbles; 8 groups of 32 weights."""
    scales = _fields(b[:, 4:8], 4, 1) | (_fields(b[:, 2:4], 2, 1) << 4)
    return _scaled(_iq4_values(_fields(b[:, 8:], 4, 16)), _signed(scales, 32).float() * _half(b, 0))


_DECODERS: dict[str, Callable[[Tensor], Tensor]] = {
    "F32": _f32,
    "F16": _f16,
    "BF16": _bf16,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
}

KINDS = frozenset(_DECODERS)
"""Block types that `dequantize` knows."""
