"""Grammar masks over logits: one program per row and block of tokens, one pass. Called by `TritonOps`."""
# mypy: allow-untyped-defs
# (a kernel's parameters are device pointers and scalars, typed by the launch)

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["apply_mask"]

BLOCK = 4096


@triton.jit
def _apply_mask_kernel(logits_ptr, mask_ptr, line_ptr, out_ptr, V, W, stride, BLOCK: tl.constexpr):
    """Grid (S, blocks of V). logits (S, V), rows `stride` apart; mask (C, W) int32; line (S,) int64; out (S, V)
    float32. A row without a mask loads no word. Each word is loaded by 32 neighbouring lanes: one transaction, so no
    shuffle is worth its code.
    """
    row = tl.program_id(0).to(tl.int64)
    line = tl.load(line_ptr + row)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < V
    x = tl.load(logits_ptr + row * stride + at, mask=inside, other=0.0).to(tl.float32)
    word = tl.load(mask_ptr + line * W + at // 32, mask=inside & (line >= 0), other=-1)
    x = tl.where(((word >> (at % 32)) & 1) == 0, float("-inf"), x)
    tl.store(out_ptr + row * V + at, x, mask=inside)


def apply_mask(logits: Tensor, mask: Tensor, line: Tensor) -> Tensor:
    """See `Ops.apply_mask`. Rows of logits (S, V) and of mask are contiguous."""
    n_rows, vocab = logits.shape
    out = torch.empty(n_rows, vocab, dtype=torch.float32, device=logits.device)
    if n_rows:
        grid = (n_rows, triton.cdiv(vocab, BLOCK))
        _apply_mask_kernel[grid](
            logits, mask, line, out, vocab, mask.stride(0), logits.stride(0), BLOCK=BLOCK, num_warps=4
        )
    return out
