"""The KV pool's tensors: one allocation, cut into layers. Who owns which slot is `kv/cache.py`'s business."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from septet.kernels.ops import LayerKV

if TYPE_CHECKING:
    from septet.config import ModelConfig

__all__ = ["allocate_pool"]


def allocate_pool(config: ModelConfig, n_slots: int, dtype: torch.dtype, device: torch.device) -> list[LayerKV]:
    """`n_slots` usable slots plus slot 0 for padding -> (num_layers,) LayerKV of (n_slots + 1, G, E). Zeroed: stale
    memory may hold NaN, and 0 * NaN would leak through a masked product. On a CPU the operating system's zero pages
    serve, so that slots cost memory only once they are written."""
    shape = (config.num_layers, 2, n_slots + 1, config.num_kv_heads, config.head_dim)
    if device.type == "cpu":
        n_bytes = math.prod(shape) * dtype.itemsize
        pool = torch.from_numpy(np.zeros(n_bytes, dtype=np.uint8)).view(dtype).view(shape)
    else:
        pool = torch.zeros(shape, dtype=dtype, device=device)
    return [LayerKV(k=layer[0], v=layer[1]) for layer in pool]
