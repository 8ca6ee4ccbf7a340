"""The native library's ops on real tensors: choosing tokens. The forward pass itself is a tape (`tape.py`).

Held by the runner where the kernels are native; everything else is inherited from the reference. CPU tensors only.
"""

from __future__ import annotations

from ctypes import c_int, c_int64, c_void_p
from typing import TYPE_CHECKING

import numpy as np
import torch

from septet.errors import OutOfMemory
from septet.kernels.native.library import PATHS, NativeUnavailable, signature
from septet.kernels.reference import ReferenceOps, mask_rows

if TYPE_CHECKING:
    from torch import Tensor

    from septet.kernels.native.library import Library, Pool

__all__ = ["NativeOps"]


class NativeOps(ReferenceOps):
    """`argmax`, `gumbel_argmax` and `filter_logits` without a pass in torch; rows are shared by the pool's threads."""

    name = "native"

    def __init__(self, library: Library, pool: Pool, path: str) -> None:
        signature(library, "septet_argmax", c_int, [c_void_p, c_int, c_void_p, c_int64, c_int64, c_int64, c_void_p])
        pointers = [c_void_p] * 4
        signature(library, "septet_gumbel", c_int, [c_void_p, c_int, c_void_p, c_int64, c_int64, c_int64, *pointers])
        filters: list[object] = [c_void_p, c_int, c_void_p, c_int64, c_int64, *pointers, c_void_p]
        signature(library, "septet_filter", c_int, filters)
        self._library = library
        self._pool = pool
        self._path = PATHS.index(path)
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
        logits, out = logits.float().contiguous(), torch.empty(logits.shape)
        n, vocab = logits.shape
        held = [t.contiguous() for t in (temperature.float(), top_k, top_p.float(), min_p.float(), out)]
        rows = [t.data_ptr() for t in held]
        if self._library.septet_filter(self._pool.handle, self._path, logits.data_ptr(), n, vocab, *rows):
            raise OutOfMemory(f"no memory to filter {n} rows of logits")
        return out

    def argmax(self, logits: Tensor) -> Tensor:
        logits, out = logits.float().contiguous(), torch.empty(len(logits), dtype=torch.int64)
        n, vocab = logits.shape
        where = logits.data_ptr(), n, vocab, vocab, out.data_ptr()
        self._check(self._library.septet_argmax(self._pool.handle, self._path, *where))
        return out

    def gumbel_argmax(self, logits: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
        logits, out = logits.float().contiguous(), torch.empty(len(logits), dtype=torch.int64)
        n, vocab = logits.shape
        temperature, seeds, positions = temperature.float().contiguous(), seeds.contiguous(), positions.contiguous()
        rows = (temperature.data_ptr(), seeds.data_ptr(), positions.data_ptr(), out.data_ptr())
        where = logits.data_ptr(), n, vocab, vocab
        self._check(self._library.septet_gumbel(self._pool.handle, self._path, *where, *rows))
        return out

    def _check(self, status: int) -> None:
        if status:
            raise NativeUnavailable(f"this CPU lacks path {PATHS[self._path]}")
