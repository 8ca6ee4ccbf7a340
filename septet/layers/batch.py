"""What every layer gets in forward: the step's tokens and their layout. Built once a step by the runner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from septet.kernels.ops import LayerKV, Layout

__all__ = ["ForwardBatch"]


@dataclass(slots=True)
class ForwardBatch:
    ids: Tensor  # (T,) int64
    layout: Layout
    kv: list[LayerKV]  # (num_layers,)
    logits_at: Tensor  # (S,) int64: tokens of the step whose next-token logits are wanted
