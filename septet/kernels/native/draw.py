"""Choosing tokens on arrays: the library's argmax, filters and Gumbel draw (contracts: `kernels.ops.Ops`).

Used by `ops.py` under torch's name and by the engine's steps on the tape; rows are shared by the pool's threads.
"""

from __future__ import annotations

from ctypes import c_int, c_int64, c_void_p
from typing import TYPE_CHECKING

import numpy as np

from septet.errors import OutOfMemory
from septet.kernels.native.library import PATHS, NativeUnavailable, signature

if TYPE_CHECKING:
    from septet.kernels.native.library import Library, Pool

__all__ = ["Draw"]


class Draw:
    """Arguments may be of any strides; what is not of the stated type is converted."""

    def __init__(self, library: Library, pool: Pool, path: str) -> None:
        signature(library, "septet_argmax", c_int, [c_void_p, c_int, c_void_p, c_int64, c_int64, c_int64, c_void_p])
        pointers = [c_void_p] * 4
        signature(library, "septet_gumbel", c_int, [c_void_p, c_int, c_void_p, c_int64, c_int64, c_int64, *pointers])
        filters: list[object] = [c_void_p, c_int, c_void_p, c_int64, c_int64, *pointers, c_void_p]
        signature(library, "septet_filter", c_int, filters)
        self._library = library
        self._pool = pool
        self._path = PATHS.index(path)

    def argmax(self, logits: np.ndarray) -> np.ndarray:
        """logits (S, V) float32 -> (S,) int64, -1 for a row with a NaN."""
        logits, out = _as(np.float32, logits), np.empty(len(logits), dtype=np.int64)
        n, vocab = logits.shape
        where = logits.ctypes.data, n, vocab, vocab, out.ctypes.data
        self._check(self._library.septet_argmax(self._pool.handle, self._path, *where))
        return out

    def gumbel(
        self, logits: np.ndarray, temperature: np.ndarray, seeds: np.ndarray, positions: np.ndarray
    ) -> np.ndarray:
        """logits (S, V), temperature (S,) float32; seeds, positions (S,) int64 -> (S,) int64, -1 for a NaN."""
        logits, out = _as(np.float32, logits), np.empty(len(logits), dtype=np.int64)
        n, vocab = logits.shape
        held = [_as(np.float32, temperature), _as(np.int64, seeds), _as(np.int64, positions), out]
        where = logits.ctypes.data, n, vocab, vocab
        self._check(self._library.septet_gumbel(self._pool.handle, self._path, *where, *_addresses(held)))
        return out

    def filter(
        self, logits: np.ndarray, temperature: np.ndarray, top_k: np.ndarray, top_p: np.ndarray, min_p: np.ndarray
    ) -> np.ndarray:
        """logits (S, V), temperature, top_p, min_p (S,) float32, top_k (S,) int64 -> (S, V), -inf for what is out."""
        logits = _as(np.float32, logits)
        n, vocab = logits.shape
        held = [_as(np.float32, temperature), _as(np.int64, top_k), _as(np.float32, top_p), _as(np.float32, min_p)]
        held.append(np.empty_like(logits))
        addresses = _addresses(held)
        if self._library.septet_filter(self._pool.handle, self._path, logits.ctypes.data, n, vocab, *addresses):
            raise OutOfMemory(f"no memory to filter {n} rows of logits")
        return held[-1]

    def _check(self, status: int) -> None:
        if status:
            raise NativeUnavailable(f"this CPU lacks path {PATHS[self._path]}")


def _as(dtype: type, values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values, dtype=dtype)


def _addresses(arrays: list[np.ndarray]) -> list[int]:
    return [array.ctypes.data for array in arrays]
