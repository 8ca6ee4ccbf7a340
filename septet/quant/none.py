"""A weight that is not packed: one dense (N, K) tensor. The oracle of every other scheme.

Made by the loader for float checkpoints and for formats that the ops at hand can't multiply; called by layers through
`PackedWeight`. Must not know files, names or layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from septet.quant.scheme import PackedWeight

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from septet.kernels.ops import Ops

__all__ = ["Dense"]


@dataclass(frozen=True, slots=True)
class Dense:
    """Tensors: {"weight": (N, K) in any float dtype; activations must have the same}."""

    name: str = "dense"

    @staticmethod
    def pack(weight: Tensor) -> PackedWeight:
        """weight (N, K) -> the same memory as a PackedWeight."""
        n, k = weight.shape
        return PackedWeight(scheme=Dense(), tensors={"weight": weight}, shape=(n, k))

    def linear(self, ops: Ops, x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
        """x (T, K) -> (T, N)."""
        return ops.linear(x, weight.tensors["weight"], bias)

    def embed(self, ops: Ops, ids: Tensor, weight: PackedWeight, dtype: torch.dtype | str, scale: float) -> Tensor:
        """ids (T,) int64 -> (T, K) in `dtype`."""
        return ops.embed(ids, weight.tensors["weight"], scale).to(dtype)

    def dequantize(self, ops: Ops, weight: PackedWeight, dtype: torch.dtype) -> Tensor:
        """-> (N, K) in `dtype`; the weight's own memory where it has that dtype already."""
        return weight.tensors["weight"].to(dtype)

    def concat(self, weights: list[PackedWeight]) -> PackedWeight | None:
        """Stack by rows, a copy. None where a scheme, a dtype or K differs."""
        tensors = [w.tensors["weight"] for w in weights if isinstance(w.scheme, Dense)]
        same = len(tensors) == len(weights) and len({(t.dtype, t.shape[1], t.device) for t in tensors}) == 1
        if not same:
            return None
        import torch

        return Dense.pack(torch.cat(tensors))
