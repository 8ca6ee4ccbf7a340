"""The KV pool's memory: one allocation, cut into layers. Who owns which slot is `kv/cache.py`'s business."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from septet.kernels.native.arrays import STORES, dtype_name
from septet.kernels.ops import LayerKV

if TYPE_CHECKING:
    import torch

    from septet.config import ModelConfig

__all__ = ["allocate_pool", "host_pool"]


def allocate_pool(config: ModelConfig, n_slots: int, dtype: torch.dtype, device: torch.device) -> list[LayerKV]:
    """`n_slots` usable slots plus slot 0 for padding -> (num_layers,) LayerKV of (n_slots + 1, G, E). Zeroed: stale
    memory may hold NaN, and 0 * NaN would leak through a masked product."""
    import torch

    if device.type == "cpu":
        pool = torch.from_numpy(_zeros(config, n_slots, dtype_name(dtype))).view(dtype)
    else:
        pool = torch.zeros(_shape(config, n_slots), dtype=dtype, device=device)
    return [LayerKV(k=layer[0], v=layer[1]) for layer in pool]


def host_pool(config: ModelConfig, n_slots: int, dtype: str) -> list[LayerKV]:
    """The same as numpy arrays, for kernels that read addresses; bfloat16 as its bits."""
    pool: Any = _zeros(config, n_slots, dtype)
    return [LayerKV(k=layer[0], v=layer[1]) for layer in pool]


def _zeros(config: ModelConfig, n_slots: int, dtype: str) -> np.ndarray:
    """The operating system's zero pages, so that slots cost memory only once they are written."""
    return np.zeros(_shape(config, n_slots), dtype=STORES[dtype])


def _shape(config: ModelConfig, n_slots: int) -> tuple[int, ...]:
    return (config.num_layers, 2, n_slots + 1, config.num_kv_heads, config.head_dim)
