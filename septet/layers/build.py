"""What every layer gets in its constructor: frozen, passed down, never fetched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from septet.config import ModelConfig
    from septet.kernels.ops import Ops
    from septet.weights.source import Source

__all__ = ["Build"]


@dataclass(frozen=True, slots=True)
class Build:
    config: ModelConfig
    ops: Ops
    source: Source
    device: torch.device
    dtype: torch.dtype  # compute dtype of activations
    max_len: int  # tokens: how long the rotary tables must be
