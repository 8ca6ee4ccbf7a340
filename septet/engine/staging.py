"""The one copy from host to device that a step makes: arrays packed into a pinned buffer, sent at once, split there.

Used by the runner only. A ring of buffers makes reuse safe: with at most `RING - 2` steps in flight, the copy out of a
buffer has ended before it is filled again (its step was committed).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["Staging", "floats"]

RING = 4


def floats(values: Sequence[float]) -> np.ndarray:
    """Floats as the bits of float64 in int64, so that they travel with the integers; `as_floats` on the other side."""
    return np.array(values, dtype=np.float64).view(np.int64)


class Staging:
    def __init__(self, device: torch.device, capacity: int = 1 << 16) -> None:
        self.device = device
        self.turn = 0
        self.pinned = device.type == "cuda"
        self.ring = [self._buffer(capacity) for _ in range(RING)] if self.pinned else []

    def _buffer(self, n: int) -> Tensor:
        return torch.empty(n, dtype=torch.int64, pin_memory=True)

    def send(self, parts: Sequence[np.ndarray]) -> list[Tensor]:
        """int64 arrays -> device tensors of the same lengths (views of one buffer), in stream order."""
        sizes = [len(p) for p in parts]
        flat = np.concatenate(parts)
        if not self.pinned:
            return list(torch.from_numpy(flat).split(sizes))
        self.turn = (self.turn + 1) % RING
        if self.ring[self.turn].numel() < flat.size:
            self.ring[self.turn] = self._buffer(2 * flat.size)
        buffer = self.ring[self.turn]
        buffer.numpy()[: flat.size] = flat
        return list(buffer[: flat.size].to(self.device, non_blocking=True).split(sizes))
