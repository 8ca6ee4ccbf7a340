"""What every layer gets in its constructor: frozen, passed down, never fetched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
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
    device: torch.device | None  # where tensors live; None: arrays of the host, and no torch
    dtype: torch.dtype | str  # compute dtype of activations; its name where there is no torch
    max_len: int  # tokens: how long the rotary tables must be

    def place(self, values: np.ndarray) -> Any:
        """A table that a layer has computed, put where the model's weights are."""
        if self.device is None:
            return values
        import torch

        return torch.from_numpy(values).to(self.device)
