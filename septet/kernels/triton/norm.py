"""RMS norm, with and without the residual sum: one program per token, the whole row in registers.

Called by `TritonOps`. Sums of squares in float32, one rounding at the end (arXiv 1910.07467).
"""
# mypy: allow-untyped-defs
# (a kernel's parameters are device pointers and scalars, typed by the launch)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["add_rms_norm", "rms_norm"]


@triton.jit
def _norm_kernel(x_ptr, residual_ptr, weight_ptr, total_ptr, out_ptr, eps, D, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (T,). Rows are D elements apart in every tensor. ADD: x + residual goes to `total` and is what is normed."""
    row = tl.program_id(0).to(tl.int64) * D
    at = tl.arange(0, BLOCK)
    inside = at < D
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + row + at, mask=inside, other=0.0)
    if ADD:
        residual = tl.load(residual_ptr + row + at, mask=inside, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
        tl.store(total_ptr + row + at, x, mask=inside)
    f = x.to(tl.float32)
    f = f * tl.rsqrt(tl.sum(f * f, 0) / D + eps)
    tl.store(out_ptr + row + at, (f * weight).to(out_ptr.dtype.element_ty), mask=inside)


def _warps(block: int) -> int:
    """8 elements a thread, 1 to 16 warps."""
    return min(max(block // 256, 1), 16)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (T, D) contiguous, weight (D,) -> (T, D). See `Ops.rms_norm`."""
    out = torch.empty_like(x)
    if x.numel():
        width = x.shape[-1]
        block = triton.next_power_of_2(width)
        grid = (x.numel() // width,)
        _norm_kernel[grid](x, x, weight, out, out, eps, width, ADD=False, BLOCK=block, num_warps=_warps(block))
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x, residual (T, D) contiguous, weight (D,) -> (normed, sum), both (T, D). See `Ops.add_rms_norm`."""
    out, total = torch.empty_like(x), torch.empty_like(x)
    if x.numel():
        width = x.shape[-1]
        block = triton.next_power_of_2(width)
        grid = (x.numel() // width,)
        _norm_kernel[grid](x, residual, weight, total, out, eps, width, ADD=True, BLOCK=block, num_warps=_warps(block))
    return out, total
