"""How many bytes a checkpoint's weights take once loaded: one sum for the engine, the pool of models and the planner.

Reads headers only. On the native CPU library a GGUF file's blocks stay blocks, a little wider where a block type is
widened or its scales are unpacked (layouts: csrc/pack.h); everywhere else weights are dense in the compute dtype.
Must not know torch or any kernel.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from septet.geometry import BLOCKS, weight_bytes
from septet.hub.gguf import GGUFFile

if TYPE_CHECKING:
    from septet.config import ModelConfig
    from septet.hub.gguf import TensorInfo

__all__ = ["NATIVE_BYTES", "ROW_BYTES", "loaded_bytes"]

NATIVE_BYTES = {  # of 256 inputs of one row, packed; types that are not named keep the file's size
    "Q2_K": 228,
    "Q3_K": 210,
    "Q4_K": 148,
    "Q5_K": 180,
    "IQ4_NL": 288,
    "IQ4_XS": 288,
}
ROW_BYTES = {"Q4_0": 2}  # besides, for each row: a scale, which the AVX2 path alone keeps


def loaded_bytes(path: str | Path, config: ModelConfig, dtype: str, native: bool) -> int:
    """Bytes of the weights of the checkpoint at `path` in memory. `native`: the CPU library packs them.

    `dtype`: of dense weights. A file that is mapped, and whose pages the system may drop, is not counted.
    """
    path = Path(path)
    if not native or path.is_dir():
        return weight_bytes(config, dtype)
    with GGUFFile.open(path) as file:
        return sum(_packed(info) for info in file.tensors.values())


def _packed(info: TensorInfo) -> int:
    """Rows are packed 16 together."""
    if len(info.shape) < 2:
        return info.n_bytes
    n_bytes = info.n_bytes
    if info.kind in NATIVE_BYTES:
        elements, size = BLOCKS[info.kind]
        n_bytes = n_bytes // size * elements * NATIVE_BYTES[info.kind] // 256
    return n_bytes + prod(info.shape[:-1]) * ROW_BYTES.get(info.kind, 0)
