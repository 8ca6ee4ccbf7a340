"""A GGUF file's weights in another block type: the simplest quantiser of each type, for tests of quality and speed.

The five types of 32 by the gguf package; K types (256) here, which the package can read but not write. Rows that are no
whole blocks of the type are kept as Q8_0. Deterministic: element-wise float32 arithmetic only. Needs gguf and numpy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gguf
import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["KINDS", "quantize", "requantize"]

K_KINDS = ("Q4_K", "Q5_K", "Q6_K")
KINDS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", *K_KINDS)
Array = np.ndarray[Any, np.dtype[Any]]


def requantize(source: Path, target: Path, kind: str) -> Path:
    """Write `target` with every matrix of `source` in `kind`, all else as it is."""
    reader = gguf.GGUFReader(source)
    arch = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, arch)
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if values.ndim < 2:
            writer.add_tensor(tensor.name, values)
            continue
        fits = values.shape[-1] % (256 if kind in K_KINDS else 32) == 0
        own = kind if fits else "Q8_0"
        writer.add_tensor(tensor.name, quantize(values, own), raw_dtype=gguf.GGMLQuantizationType[own])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def quantize(values: Array, kind: str) -> Array:
    """(N, K) float32 -> (N, bytes of K weights) uint8."""
    if kind not in K_KINDS:
        packed: Array = gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])
        return packed
    blocks = values.reshape(-1, 256).astype(np.float32)
    rows = _q6_k(blocks) if kind == "Q6_K" else _q45_k(blocks, 5 if kind == "Q5_K" else 4)
    return rows.reshape(values.shape[0], -1)


def _q45_k(blocks: Array, bits: int) -> Array:
    """Eight groups of 32, w = d * scale * q - dmin * least: ggml-common.h, block_q4_K and block_q5_K."""
    groups = blocks.reshape(-1, 8, 32)
    least = np.maximum(0, -groups.min(axis=2))
    step = (groups.max(axis=2) + least) / (2**bits - 1)
    d, scale = _in_six_bits(step)
    dmin, offset = _in_six_bits(least)
    width = (_wide(d) * scale)[:, :, None]
    q = _rounded((groups + (_wide(dmin) * offset)[:, :, None]) / np.where(width, width, 1), 0, 2**bits - 1)
    parts = [d.view(np.uint8), dmin.view(np.uint8), _scales(scale, offset)]
    if bits == 5:
        high = (q >> 4) << np.arange(8, dtype=np.uint8)[None, :, None]
        parts.append(np.bitwise_or.reduce(high, axis=1))
    low = q & 15
    parts.append((low[:, 0::2] | (low[:, 1::2] << 4)).reshape(-1, 128))
    return np.concatenate(parts, axis=1)


def _in_six_bits(values: Array) -> tuple[Array, Array]:
    """(B, 8) >= 0 -> (B, 1) float16 unit, (B, 8) uint8 multiples of it, at most 63."""
    unit = (values.max(axis=1, keepdims=True) / 63).astype(np.float16)
    return unit, _rounded(values / np.where(unit, _wide(unit), 1), 0, 63)


def _scales(scale: Array, least: Array) -> Array:
    """Two times eight numbers of six bits in twelve bytes."""
    low = scale[:, :4] | ((scale[:, 4:] >> 4) << 6), least[:, :4] | ((least[:, 4:] >> 4) << 6)
    return np.concatenate([*low, (scale[:, 4:] & 15) | ((least[:, 4:] & 15) << 4)], axis=1)


def _q6_k(blocks: Array) -> Array:
    """Sixteen groups of 16, w = d * scale * (q - 32), scales of eight bits with sign: block_q6_K."""
    groups = blocks.reshape(-1, 16, 16)
    step = np.abs(groups).max(axis=2) / 31
    d = (step.max(axis=1, keepdims=True) / 127).astype(np.float16)
    scale = _rounded(step / np.where(d, _wide(d), 1), 0, 127)
    width = (_wide(d) * scale)[:, :, None]
    q = (_rounded(groups / np.where(width, width, 1) + 32, 0, 63)).reshape(-1, 2, 4, 32)  # half, quarter of it
    low = (q[:, :, :2] & 15) | ((q[:, :, 2:] & 15) << 4)
    high = np.bitwise_or.reduce((q >> 4) << np.array([0, 2, 4, 6], dtype=np.uint8)[None, None, :, None], axis=2)
    return np.concatenate([low.reshape(-1, 128), high.reshape(-1, 64), scale, d.view(np.uint8)], axis=1)


def _rounded(values: Array, least: int, most: int) -> Array:
    clipped: Array = np.clip(np.floor(values + 0.5), least, most).astype(np.uint8)
    return clipped


def _wide(values: Array) -> Array:
    return values.astype(np.float32)
