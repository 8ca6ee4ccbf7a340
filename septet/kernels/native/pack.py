"""Packed weights as Python holds them: GGUF blocks or dense rows in, a handle to the interleaved copy out.

Called by the native ops and the tape while a model loads; layouts and conversions are csrc/pack.h's. The source is read
during the call only, so that a mapped file stays the only other copy. A weight's memory goes with its last reference.
Must not know layers, files or models.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from septet.errors import OutOfMemory, UnsupportedModel
from septet.geometry import BLOCKS
from septet.kernels.native.arrays import address, as_bytes, dtype_name
from septet.kernels.native.library import PATHS, Library, Pool, choose_path

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

__all__ = ["KINDS", "PackedMatrix", "Packer"]

KINDS = {  # GGUF's numbers of its types (ggml.h)
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q5_0": 6,
    "Q5_1": 7,
    "Q8_0": 8,
    "Q2_K": 10,
    "Q3_K": 11,
    "Q4_K": 12,
    "Q5_K": 13,
    "Q6_K": 14,
    "IQ4_NL": 20,
    "IQ4_XS": 23,
    "BF16": 30,
}


DENSE = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class PackedMatrix:
    """A packed (N, K) weight of GGUF type `kind` (as it came; Q3_K, IQ4_NL and IQ4_XS are widened, without loss)."""

    def __init__(self, library: Library, handle: int, kind: str, shape: tuple[int, int]) -> None:
        self._library = library
        self.handle = handle  # a Packed*, valid while this object lives
        self.kind = kind
        self.shape = shape

    @property
    def n_bytes(self) -> int:
        """Bytes of the packed copy."""
        return int(self._library.septet_packed_bytes(self.handle))

    def linear(self, pool: Pool, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (T, K) float32 -> (T, N) float32; bias (N,) float32. Quantised weights: x goes through int8, 32 a scale."""
        import torch

        n, k = self.shape
        if x.dim() != 2 or x.shape[1] != k or x.dtype != torch.float32 or (x.shape[0] and x.stride(1) != 1 and k > 1):
            raise ValueError(f"x: needs (T, {k}) float32 with adjacent columns, found {tuple(x.shape)} {x.dtype}")
        if bias is not None and (bias.shape != (n,) or bias.dtype != torch.float32 or not bias.is_contiguous()):
            raise ValueError(f"bias: needs ({n},) float32, found {tuple(bias.shape)} {bias.dtype}")
        y = torch.empty(x.shape[0], n)
        where = 0 if bias is None else bias.data_ptr()
        stride = x.stride(0) if x.shape[0] > 1 else k
        if x.shape[0] and self._library.septet_linear(
            pool.handle, self.handle, x.data_ptr(), stride, x.shape[0], y.data_ptr(), n, where
        ):
            raise OutOfMemory(f"no memory for the quantised input of {x.shape[0]} tokens by {k}")
        return y

    def rows(self, ids: Tensor) -> Tensor:
        """ids (T,) int64 -> (T, K) float32: rows as GGUF defines them, exactly. IndexError for an id outside."""
        import torch

        ids = ids.to(torch.int64).contiguous()
        out = torch.empty(ids.shape[0], self.shape[1])
        if self._library.septet_packed_rows(self.handle, ids.data_ptr(), ids.shape[0], out.data_ptr(), self.shape[1]):
            raise IndexError(f"row ids must lie in 0 .. {self.shape[0] - 1}")
        return out

    def __del__(self) -> None:
        self._library.septet_packed_release(self.handle)


class Packer:
    """Packs the weights of one model, side by side in huge pages, for one path. `pool` only speeds it up."""

    def __init__(self, library: Library, pool: Pool, path: str = "") -> None:
        self._library = library
        self._pool = pool
        self.path, self.reason = choose_path(library, path)
        self._arena = library.septet_arena_create()
        if not self._arena:
            raise OutOfMemory("no memory for packed weights")

    def pack(self, blocks: Tensor | np.ndarray, kind: str) -> PackedMatrix:
        """blocks (N, bytes of K weights) uint8 in GGUF type `kind` -> packed. Contiguous, CPU.

        UnsupportedModel for a type without native form, ValueError for bytes that are no rows of whole blocks,
        OutOfMemory.
        """
        if kind not in KINDS:
            raise UnsupportedModel(f"block type {kind} is not native; use one of {', '.join(KINDS)}")
        elements, size = BLOCKS[kind]
        at, steps = address(blocks)
        sound = blocks.ndim == 2 and dtype_name(blocks.dtype) == "uint8" and blocks.shape[1] % size == 0
        if not sound or steps[1] != 1 or (blocks.shape[0] > 1 and steps[0] != blocks.shape[1]):
            found = f"{tuple(blocks.shape)} {blocks.dtype}"
            raise ValueError(f"blocks: {kind} needs contiguous (N, a multiple of {size}) uint8, found {found}")
        n, k = blocks.shape[0], blocks.shape[1] // size * elements
        error = ctypes.c_char_p()
        path = PATHS.index(self.path)
        handle = self._library.septet_pack(
            self._arena, self._pool.handle, at, n, k, KINDS[kind], path, ctypes.byref(error)
        )
        if handle:
            return PackedMatrix(self._library, handle, kind, (n, k))
        why = (error.value or b"unknown reason").decode()
        if why == "out of memory":
            raise OutOfMemory(f"no memory to pack a weight of {n} x {k} in {kind}")
        raise ValueError(f"can't pack ({n}, {k}) in {kind}: {why}")

    def pack_dense(self, weight: Tensor | np.ndarray) -> PackedMatrix:
        """weight (N, K) float32, bfloat16 or float16 -> packed in its own type."""
        kind = DENSE.get(dtype_name(weight.dtype))
        if kind is None or weight.ndim != 2:
            raise ValueError(f"weight: needs (N, K) in a float type, found {tuple(weight.shape)} {weight.dtype}")
        return self.pack(as_bytes(weight), kind)

    def __del__(self) -> None:
        if getattr(self, "_arena", None):
            self._library.septet_arena_release(self._arena)
