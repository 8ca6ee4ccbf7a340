"""The native library's ops on real tensors: choosing tokens. The forward pass itself is a tape (`tape.py`).

Held by the runner where the kernels are native; everything else is inherited from the reference. CPU tensors only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from septet.kernels.native.draw import Draw
from septet.kernels.reference import ReferenceOps, mask_rows

if TYPE_CHECKING:
    from torch import Tensor

    from septet.kernels.native.library import Library, Pool

__all__ = ["NativeOps"]


class NativeOps(ReferenceOps):
    """`argmax`, `gumbel_argmax` and `filter_logits` without a pass in torch; rows are shared by the pool's threads."""

    name = "native"

    def __init__(self, library: Library, pool: Pool, path: str) -> None:
        self._draw = Draw(library, pool, path)
        self._masked = np.empty((0, 0), dtype=np.float32)

    def apply_mask(self, logits: Tensor, mask: Tensor, line: Tensor) -> Tensor:
        """Into memory of its own, valid until the next call: fresh pages would cost more than the work."""
        given = logits.float().numpy()
        if self._masked.shape[0] < len(given) or self._masked.shape[1:] != given.shape[1:]:
            self._masked = np.empty_like(given)
        out = self._masked[: len(given)]
        mask_rows(given, mask.contiguous().numpy(), line.tolist(), out)
        return torch.from_numpy(out)

    def filter_logits(
        self, logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, width: int
    ) -> Tensor:
        rows = (temperature.numpy(), top_k.numpy(), top_p.numpy(), min_p.numpy())
        return torch.from_numpy(self._draw.filter(logits.float().numpy(), *rows))

    def argmax(self, logits: Tensor) -> Tensor:
        return torch.from_numpy(self._draw.argmax(logits.float().numpy()))

    def gumbel_argmax(self, logits: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
        rows = (temperature.numpy(), seeds.numpy(), positions.numpy())
        return torch.from_numpy(self._draw.gumbel(logits.float().numpy(), *rows))
