"""Embedding lookup with the scale of Gemma. Called by `TritonOps`.

An id outside of the table (-1 is what the samplers give for a row with a NaN) reads nothing and gives a row of NaN, so
that the fault stays in its row and shows at the next sample; torch would end the whole process.
"""
# mypy: allow-untyped-defs
# (a kernel's parameters are device pointers and scalars, typed by the launch)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["embed"]

BLOCK = 1024


@triton.jit
def _embed_kernel(ids_ptr, table_ptr, out_ptr, scale, V, D, BLOCK: tl.constexpr):
    """Grid (T, blocks of D). ids (T,) int64, table (V, D), out (T, D)."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(ids_ptr + token)
    known = (row >= 0) & (row < V)
    x = tl.load(table_ptr + row * D + at, mask=(at < D) & known, other=float("nan"))
    out = (x.to(tl.float32) * scale).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + token * D + at, out, mask=at < D)


def embed(ids: Tensor, table: Tensor, scale: float = 1.0) -> Tensor:
    """ids (T,) int64, table (V, D) contiguous -> (T, D). See `Ops.embed`."""
    vocab, width = table.shape
    out = torch.empty(ids.shape[0], width, dtype=table.dtype, device=table.device)
    if ids.shape[0]:
        rounded = torch.tensor(scale, dtype=table.dtype).item()  # on the host: nothing waits for the GPU
        grid = (ids.shape[0], triton.cdiv(width, BLOCK))
        _embed_kernel[grid](ids, table, out, rounded, vocab, width, BLOCK=BLOCK, num_warps=4)
    return out
