"""The way between host and device that nobody waits for: values packed into pinned memory, sent at once, split there.

Used by the runner and the sampler. A step is launched while the one before it still runs, so a copy must neither wait
for the device nor read memory that the host has filled again: each send takes pinned memory of its own, which torch's
host allocator hands out again only after the copy out of it has ended.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

__all__ = ["HostCopy", "Staging", "floats", "on_device"]


def floats(values: Sequence[float]) -> np.ndarray:
    """Floats as the bits of float64 in int64, so that they travel with the integers; viewed back on the other side."""
    return np.array(values, dtype=np.float64).view(np.int64)


def on_device(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A short list as a device tensor, in stream order; `torch.tensor(values, device=...)` would wait for it."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


class Staging:
    def __init__(self, device: torch.device) -> None:
        self.device = device

    def send(self, parts: Sequence[np.ndarray]) -> list[Tensor]:
        """int64 arrays -> device tensors of the same lengths (views of one buffer), in stream order."""
        sizes = [len(part) for part in parts]
        buffer = torch.empty(sum(sizes), dtype=torch.int64, pin_memory=self.device.type == "cuda")
        np.concatenate(parts, out=buffer.numpy())
        return list(buffer.to(self.device, non_blocking=True).split(sizes))

    def fill(self, target: Tensor, write: Callable[[np.ndarray], None]) -> None:
        """`write` sets an int64 array of the target's length, which then travels there, in stream order."""
        buffer = torch.empty(len(target), dtype=torch.int64, pin_memory=self.device.type == "cuda")
        write(buffer.numpy())
        target.copy_(buffer, non_blocking=True)


class HostCopy:
    """A tensor on its way to the host. `numpy()` waits for it."""

    def __init__(self, tensor: Tensor) -> None:
        self.event = None
        if tensor.is_cuda:
            self.tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self.tensor.copy_(tensor, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()
        else:
            self.tensor = tensor.clone()

    def numpy(self) -> np.ndarray:
        if self.event is not None:
            self.event.synchronize()
        return self.tensor.numpy()
