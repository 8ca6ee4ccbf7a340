"""A weight that is never stacked with its neighbours: for ops that keep their own copy of each matrix.

Made by `SeparateSource` around what a checkpoint gives, when the forward is recorded for the native tape, which packs
each matrix straight from the mapped file and lays products of one input side by side itself. Stacking q, k and v, or
gate and up, would only make a second copy of the model while it loads. Must not know files, layers or the tape.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from septet.kernels.ops import Ops
    from septet.quant.scheme import PackedWeight, Scheme

__all__ = ["Separate"]


@dataclass(frozen=True, slots=True)
class Separate:
    """`scheme`, which does all the work, without its `concat`."""

    scheme: Scheme

    @property
    def name(self) -> str:
        return self.scheme.name

    @staticmethod
    def of(weight: PackedWeight) -> PackedWeight:
        """The same tensors, never to be stacked."""
        return replace(weight, scheme=Separate(weight.scheme))

    def linear(self, ops: Ops, x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
        return self.scheme.linear(ops, x, weight, bias)

    def embed(self, ops: Ops, ids: Tensor, weight: PackedWeight, dtype: torch.dtype | str, scale: float) -> Tensor:
        return self.scheme.embed(ops, ids, weight, dtype, scale)

    def dequantize(self, ops: Ops, weight: PackedWeight, dtype: torch.dtype) -> Tensor:
        return self.scheme.dequantize(ops, weight, dtype)

    def concat(self, weights: list[PackedWeight]) -> None:
        """None: these weights stay apart."""
        return
