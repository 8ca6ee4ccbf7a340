"""What a packed weight is, and how to multiply by it.

A layer holds a `PackedWeight` and asks its scheme; no layer and no model names a format. Schemes are stateless and
frozen; one file each (`none.py`, `gguf.py`, ...). The oracle of every scheme is `Dense` on its `dequantize`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from septet.kernels.ops import Ops

__all__ = ["PackedWeight", "Scheme"]


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A logical (N, K) matrix in some format. `tensors` are the scheme's own, by its own names."""

    scheme: Scheme
    tensors: dict[str, Tensor]
    shape: tuple[int, int]  # (N, K) = (output features, input features)

    def linear(self, ops: Ops, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (T, K) -> (T, N)."""
        return self.scheme.linear(ops, x, self, bias)

    def embed(self, ops: Ops, ids: Tensor, dtype: torch.dtype | str, scale: float = 1.0) -> Tensor:
        """ids (T,) -> (T, K): rows of the matrix."""
        return self.scheme.embed(ops, ids, self, dtype, scale)

    def dequantize(self, ops: Ops, dtype: torch.dtype) -> Tensor:
        """-> (N, K) in `dtype`."""
        return self.scheme.dequantize(ops, self, dtype)

    @property
    def n_bytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())


class Scheme(Protocol):
    """How one format multiplies, looks up and stacks."""

    @property
    def name(self) -> str: ...

    def linear(self, ops: Ops, x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor: ...

    def embed(self, ops: Ops, ids: Tensor, weight: PackedWeight, dtype: torch.dtype | str, scale: float) -> Tensor: ...

    def dequantize(self, ops: Ops, weight: PackedWeight, dtype: torch.dtype) -> Tensor: ...

    def concat(self, weights: list[PackedWeight]) -> PackedWeight | None:
        """Stack by output features (q, k, v or gate, up) into one weight; None where the formats differ."""
        ...
