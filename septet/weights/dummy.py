"""Random weights of any shape: to measure a model's speed without its file (`--load-format dummy`), and to test.

Called by `engine/build.py`. The same name and seed give the same values on the same kind of device, in whatever order
layers ask. Knows no files.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import torch

from septet.quant.none import Dense

if TYPE_CHECKING:
    from torch import Tensor

    from septet.config import ModelConfig
    from septet.quant.scheme import PackedWeight

__all__ = ["DummySource"]

STD = 0.02  # of the usual initialisation: activations stay in range through any depth that trained


class DummySource:
    """A `Source` that has every tensor: matrices normal with std 0.02, norms one, biases zero."""

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype, seed: int = 0) -> None:
        self.config = config
        self.device = device
        self.dtype = dtype
        self.seed = seed

    def matrix(self, name: str, shape: tuple[int, int]) -> PackedWeight:
        """(N, K) made where it will live, in the compute dtype."""
        generator = torch.Generator(self.device).manual_seed(zlib.crc32(name.encode(), self.seed & 0xFFFFFFFF))
        weight = torch.empty(shape, dtype=self.dtype, device=self.device)
        return Dense.pack(weight.normal_(0.0, STD, generator=generator))

    def vector(self, name: str, shape: tuple[int, ...]) -> Tensor:
        fill = 1.0 if name.endswith("norm.weight") else 0.0
        return torch.full(shape, fill, dtype=self.dtype, device=self.device)

    def optional(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        return None

    def has(self, name: str) -> bool:
        return not (name == "lm_head.weight" and self.config.tie_embeddings) and name != "rope_freqs.weight"

    def finish(self) -> None:
        """Nothing can be left over."""
