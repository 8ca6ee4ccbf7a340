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
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from septet.kernels.triton.pdl import launch_options

__all__ = ["add_rms_norm", "rms_norm", "sum_parts"]

OVERLAP_ROWS = 64  # beyond, kernels fill the GPU and an early start gains nothing


@triton.jit
def _summed(x_ptr, at, inside, part_stride, PARTS: tl.constexpr, KIND: tl.constexpr):
    """One row, summed over its parts and rounded as one product would be; float32."""
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        x += tl.load(x_ptr + part * part_stride + at, mask=inside, other=0.0)
    return x.to(KIND).to(tl.float32)


@triton.jit
def _norm_kernel(
    x_ptr, residual_ptr, weight_ptr, total_ptr, out_ptr, eps, D, part_stride, PARTS: tl.constexpr, ADD: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (T,). Rows are D elements apart in every tensor. ADD: x + residual goes to `total` and is what is normed."""
    row = tl.program_id(0).to(tl.int64) * D
    at = tl.arange(0, BLOCK)
    inside = at < D
    if PDL:
        gdc_launch_dependents()
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    kind = out_ptr.dtype.element_ty
    x = _summed(x_ptr, row + at, inside, part_stride, PARTS, kind)
    if ADD:
        residual = tl.load(residual_ptr + row + at, mask=inside, other=0.0)
        x = (x + residual.to(tl.float32)).to(kind)
        tl.store(total_ptr + row + at, x, mask=inside)
    f = x.to(tl.float32)
    f = f * tl.rsqrt(tl.sum(f * f, 0) / D + eps)
    tl.store(out_ptr + row + at, (f * weight).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _sum_kernel(x_ptr, out_ptr, n, part_stride, PARTS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Grid (blocks of n). x (PARTS, n) float32 -> out (n,)."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    x = _summed(x_ptr, at, at < n, part_stride, PARTS, out_ptr.dtype.element_ty)
    tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), mask=at < n)


def sum_parts(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """parts (P, T, N) float32 -> their sum (T, N)."""
    out = torch.empty(parts.shape[1:], dtype=dtype, device=parts.device)
    n = out.numel()
    _sum_kernel[(triton.cdiv(n, 1024),)](
        parts, out, n, n, PARTS=parts.shape[0], BLOCK=1024, num_warps=4, **launch_options()
    )
    return out


def _warps(block: int) -> int:
    """8 elements a thread, 1 to 16 warps."""
    return min(max(block // 256, 1), 16)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (T, D) contiguous, weight (D,) -> (T, D). See `Ops.rms_norm`."""
    out = torch.empty_like(x)
    if x.numel():
        _launch(x, x, weight, out, out, eps, add=False)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x, residual (T, D) contiguous, weight (D,) -> (normed, sum), both (T, D). See `Ops.add_rms_norm`.

    x may be (P, T, D) float32: parts of a product, summed first.
    """
    out, total = torch.empty_like(residual), torch.empty_like(residual)
    if x.numel():
        _launch(x, residual, weight, total, out, eps, add=True)
    return out, total


def _launch(x: Tensor, residual: Tensor, weight: Tensor, total: Tensor, out: Tensor, eps: float, add: bool) -> None:
    width = out.shape[-1]
    block, rows = triton.next_power_of_2(width), out.numel() // width
    _norm_kernel[(rows,)](
        x, residual, weight, total, out, eps, width, out.numel(), PARTS=x.numel() // out.numel(), ADD=add, BLOCK=block,
        num_warps=_warps(block), **(launch_options() if rows <= OVERLAP_ROWS else {"PDL": False}),
    )  # fmt: skip
