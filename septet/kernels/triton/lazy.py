"""Results that are not computed yet, so that a small step's kernels can be fused across op calls.

`TritonOps` hands these out in place of tensors when a step has few tokens: a product whose consumer may add the
residual, a norm that the next product can apply while it reads, a rotation that attention does itself. Its `value`
makes a tensor of any of them; every op calls it on inputs that it does not fuse. Nothing here launches a kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from septet.kernels.ops import LayerKV, Layout

__all__ = ["Attended", "Gated", "Lazy", "Normed", "Product", "Rotated"]


@dataclass(frozen=True, slots=True)
class Normed:
    """rms_norm(x) * weight; x (T, D)."""

    x: Tensor
    weight: Tensor
    eps: float

    @property
    def shape(self) -> torch.Size:
        return self.x.shape


@dataclass(frozen=True, slots=True)
class Product:
    """x W^T + bias; x (T, K), weight (N, K)."""

    x: Tensor | Normed
    weight: Tensor
    bias: Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        return (self.x.shape[0], self.weight.shape[0])


@dataclass(frozen=True, slots=True)
class Gated:
    """act(gate) * up of the product [gate | up]."""

    gate_up: Product
    act: str

    @property
    def shape(self) -> tuple[int, int]:
        rows, width = self.gate_up.shape
        return (rows, width // 2)


@dataclass(frozen=True, slots=True)
class Rotated:
    """q of a QKV product, before norm, rotation and KV write; one token a row."""

    qkv: Tensor | Product
    kv: LayerKV
    layout: Layout
    cos_sin: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    eps: float


@dataclass(frozen=True, slots=True)
class Attended:
    """Attention of one row; its program may prefetch the weight that multiplies it."""

    q: Rotated
    scale: float
    window: int | None
    soft_cap: float

    @property
    def shape(self) -> tuple[int, int]:
        heads, dim = self.q.kv.k.shape[1:]
        return (self.q.qkv.shape[0], self.q.qkv.shape[1] - 2 * heads * dim)


Lazy = Normed | Product | Gated | Rotated | Attended
