"""Grammar masks over logits: one program per constrained row and block of tokens. Called by `TritonOps`."""
# mypy: allow-untyped-defs
# (a kernel's parameters are device pointers and scalars, typed by the launch)

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["apply_mask"]

BLOCK = 4096


@triton.jit
def _apply_mask_kernel(logits_ptr, mask_ptr, rows_ptr, V, W, BLOCK: tl.constexpr):
    """Grid (C, blocks of V). logits (S, V) in place; mask (C, W) int32; rows (C,) int64. Stores only what is forbidden.

    Each word is loaded by 32 neighbouring lanes: one transaction, so no shuffle is worth its code.
    """
    c = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + c)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    word = tl.load(mask_ptr + c * W + at // 32, mask=at < V, other=-1)
    forbidden = ((word >> (at % 32)) & 1) == 0
    tl.store(logits_ptr + row * V + at, float("-inf"), mask=forbidden & (at < V))


def apply_mask(logits: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
    """See `Ops.apply_mask`. logits (S, V) contiguous."""
    out = logits.clone()
    if len(rows):
        grid = (len(rows), triton.cdiv(logits.shape[1], BLOCK))
        _apply_mask_kernel[grid](out, mask, rows, logits.shape[1], mask.shape[1], BLOCK=BLOCK, num_warps=4)
    return out
