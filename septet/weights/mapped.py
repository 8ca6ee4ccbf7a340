"""A GGUF file for ops that read addresses: its matrices as numpy arrays over the mapped file. No torch.

`engine/build_native.py` makes it; layers pull from it (contract: `source.py`). What `load.GGUFSource` gives as tensors,
and in the same layouts. Only a vector in blocks, which no converter writes, is decoded by torch. Knows no layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from septet.hub.gguf import GGUFFile
from septet.kernels.native.arrays import round_to
from septet.quant.gguf import GGUFBlocks
from septet.weights.inventory import Inventory, row_order
from septet.weights.names import canonical_of_gguf

if TYPE_CHECKING:
    from pathlib import Path

    from septet.config import ModelConfig
    from septet.hub.gguf import TensorInfo
    from septet.quant.scheme import PackedWeight

__all__ = ["MappedSource"]


class MappedSource:
    """`weights.source.Source` of arrays."""

    def __init__(self, path: str | Path, config: ModelConfig, dtype: str) -> None:
        """`dtype`: the compute dtype's name, to which vectors are rounded. ModelNotFound, ModelFileError."""
        self.file = GGUFFile.open(path)
        self.config = config
        self.dtype = dtype
        entries = (
            (canonical_of_gguf(t.name, config.architecture), t.name, t.shape) for t in self.file.tensors.values()
        )
        self.inventory = Inventory(self.file.name, entries)

    def matrix(self, name: str, shape: tuple[int, int]) -> PackedWeight:
        info = self.file.tensors[self.inventory.take(name, shape)]
        rows, order = self._rows(info), row_order(self.config, name, shape[0])
        blocks: Any = rows if order is None else rows[order]
        return GGUFBlocks(info.kind).pack(blocks)

    def vector(self, name: str, shape: tuple[int, ...]) -> Any:
        """float32, rounded."""
        return round_to(self._floats(name, shape), self.dtype)

    def optional(self, name: str, shape: tuple[int, ...]) -> Any:
        return self._floats(name, shape) if self.has(name) else None

    def has(self, name: str) -> bool:
        return name in self.inventory.known

    def finish(self) -> None:
        self.file.close()  # blocks that are views keep the mapping alive
        self.inventory.check_all_taken(self.config.tie_embeddings)

    def _rows(self, info: TensorInfo) -> np.ndarray:
        """(N, row_bytes) uint8 over the mapped file, read-only. A vector is one row."""
        n_rows = info.shape[0] if len(info.shape) > 1 else 1
        return np.frombuffer(self.file.data(info), dtype=np.uint8).reshape(n_rows, info.n_bytes // n_rows)

    def _floats(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """A small tensor in float32, in memory of its own."""
        info = self.file.tensors[self.inventory.take(name, shape)]
        values = _decoded(self._rows(info), info.kind).reshape(shape)
        order = row_order(self.config, name, shape[0])
        return values if order is None else values[order]


def _decoded(rows: np.ndarray, kind: str) -> np.ndarray:
    """(N, row_bytes) uint8 -> (N, K) float32, a copy."""
    if kind == "F32":
        return rows.view(np.float32).copy()
    if kind == "F16":
        return rows.view(np.float16).astype(np.float32)
    if kind == "BF16":
        return (rows.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    import torch

    from septet.kernels import ggml

    values: np.ndarray = ggml.dequantize(torch.from_numpy(rows.copy()), kind, torch.float32).numpy()
    return values
