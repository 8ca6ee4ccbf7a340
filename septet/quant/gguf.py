"""A weight that stays in GGUF's blocks: (N, row_bytes) bytes, multiplied by `Ops.block_linear`.

Made by the loader where the ops at hand list the block type in `block_kinds`; called by layers through `PackedWeight`.
Must not know files, names or layers; how a block is laid out is the kernels' (`kernels/ggml.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from septet.geometry import BLOCKS
from septet.quant.scheme import PackedWeight

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from septet.kernels.ops import Ops

__all__ = ["GGUFBlocks"]


@dataclass(frozen=True, slots=True)
class GGUFBlocks:
    """Tensors: {"blocks": (N, bytes of K weights) uint8 in block type `kind`}."""

    kind: str  # "Q4_0", ...: a key of geometry.BLOCKS

    @property
    def name(self) -> str:
        return f"gguf-{self.kind.lower()}"

    def pack(self, blocks: Tensor) -> PackedWeight:
        """blocks (N, row_bytes) uint8 -> the same memory as a PackedWeight. ValueError if rows are no whole blocks.

        Where the ops read addresses, numpy arrays do as well as tensors.
        """
        elements, size = BLOCKS[self.kind]
        n, row_bytes = blocks.shape
        if str(blocks.dtype).removeprefix("torch.") != "uint8" or row_bytes % size:
            raise ValueError(
                f"blocks: {self.kind} needs rows of a multiple of {size} uint8, found {row_bytes} {blocks.dtype}"
            )
        return PackedWeight(scheme=self, tensors={"blocks": blocks}, shape=(n, row_bytes // size * elements))

    def linear(self, ops: Ops, x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
        """x (T, K) -> (T, N)."""
        return ops.block_linear(x, weight.tensors["blocks"], self.kind, bias)

    def embed(self, ops: Ops, ids: Tensor, weight: PackedWeight, dtype: torch.dtype | str, scale: float) -> Tensor:
        """ids (T,) int64 -> (T, K) in `dtype`: only these rows are decoded."""
        return ops.block_embed(ids, weight.tensors["blocks"], self.kind, dtype, scale)

    def dequantize(self, ops: Ops, weight: PackedWeight, dtype: torch.dtype) -> Tensor:
        """-> (N, K) in `dtype`."""
        return ops.dequantize(weight.tensors["blocks"], self.kind, dtype)

    def concat(self, weights: list[PackedWeight]) -> PackedWeight | None:
        """Stack by rows, a copy: rows are whole blocks. None where a block type or K differs."""
        if any(w.scheme != self or w.shape[1] != weights[0].shape[1] for w in weights):
            return None
        import torch

        return self.pack(torch.cat([w.tensors["blocks"] for w in weights]))
