"""Arrays of the host for the native library: numpy's as they are, torch's over the same memory.

Called by the files of this room alone, while a model is packed and recorded. A tensor that comes here has brought torch
with it; nothing here imports it for an array. bfloat16, which numpy does not know, travels as its bits in uint16.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["STORES", "address", "as_bytes", "as_floats", "dtype_name", "round_to"]

STORES = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}
"""What keys and values are stored as: name -> numpy's type of the same size. Number = index, as in csrc/tape.h."""


def dtype_name(dtype: object) -> str:
    """The name ("float32", "bfloat16", "uint8", ...) of a dtype of numpy's or torch's, or that name itself."""
    return str(dtype).removeprefix("torch.")


def address(values: Any) -> tuple[int, tuple[int, ...]]:
    """(address of the first element, elements from one to the next in each dimension)."""
    if isinstance(values, np.ndarray):
        return values.ctypes.data, tuple(step // values.itemsize for step in values.strides)
    return values.data_ptr(), tuple(values.stride())


def as_floats(values: Any) -> np.ndarray | None:
    """As the native code reads vectors and tables: float32, contiguous, in memory that stays. None stays None."""
    if values is None:
        return None
    if not isinstance(values, np.ndarray):
        values = values.detach().float().cpu().numpy()
    return np.ascontiguousarray(values, dtype=np.float32)


def as_bytes(values: Any) -> np.ndarray:
    """(N, K) of any type -> (N, bytes of a row) uint8, contiguous: the same memory where that was."""
    if isinstance(values, np.ndarray):
        return np.ascontiguousarray(values).view(np.uint8)
    import torch

    flat: np.ndarray = values.detach().contiguous().view(torch.uint8).numpy()
    return flat


def round_to(values: np.ndarray, dtype: object) -> np.ndarray:
    """float32 -> float32, each rounded to what `dtype` (a name, or torch's) can hold: to the nearest, ties to even."""
    name = dtype_name(dtype)
    if name == "bfloat16":
        bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
        odd = (bits >> np.uint32(16)) & np.uint32(1)
        rounded = ((bits + np.uint32(0x7FFF) + odd) & np.uint32(0xFFFF0000)).view(np.float32)
        return np.where(np.isnan(values), values, rounded)
    return values.astype(name).astype(np.float32)
