"""y = x W^T for 2 to 128 rows of x: W is the tall side of each tensor-core product and is read once.

Called by `TritonOps` for decode batches between gemv.py's and cuBLAS's. Matrices with few rows are split over K as
well; the parts, float32, are summed by whoever reads them next (`Parts`): the residual norm, the attention prologue.
"""
# mypy: allow-untyped-defs
# (a kernel's parameters are device pointers and scalars, typed by the launch)

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from septet.kernels.triton.gemv import _gate
from septet.kernels.triton.pdl import launch_options, prefetch

__all__ = ["MAX_ROWS", "Shape", "fits", "shape_of", "skinny"]

MAX_ROWS = 128


@triton.jit
def _skinny_kernel(
    x_ptr, w_ptr, bias_ptr, out_ptr, M, N, K: tl.constexpr, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr, ACT: tl.constexpr,
    GELU: tl.constexpr, BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (N / BLOCK_N, SPLITS). x (M, K), w (N, K), out (M, N), or (SPLITS, M, N) float32 parts; K splits evenly.

    ACT: w is (2N, K) = [gate | up] and out = act(gate) * up. BIAS goes to the first part. AHEAD: cache lines of each
    row of W that are on their way before the predecessor has ended.
    """
    part = tl.program_id(1)
    m, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    SHARE: tl.constexpr = K // SPLITS
    if PDL:
        gdc_launch_dependents()
        if AHEAD > 0:
            line = tl.arange(0, AHEAD) * (128 // w_ptr.dtype.element_ty.itemsize)
            lines = w_ptr + n.to(tl.int64)[:, None] * K + part * SHARE + line[None, :]
            prefetch(lines)
            if ACT:
                prefetch(lines + N.to(tl.int64) * K)
        gdc_wait()
    w_at = w_ptr + n.to(tl.int64)[:, None] * K + part * SHARE + k[None, :]
    u_at = w_at + N.to(tl.int64) * K if ACT else w_at
    x_at = x_ptr + m[None, :] * K + part * SHARE + k[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    acc_up = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for _ in tl.range(0, SHARE, BLOCK_K, num_stages=STAGES):
        x = tl.load(x_at, mask=(m < M)[None, :], other=0.0)
        w = tl.load(w_at, eviction_policy="evict_first")
        acc = tl.dot(w, x, acc, input_precision="ieee")
        if ACT:
            u = tl.load(u_at, eviction_policy="evict_first")
            acc_up = tl.dot(u, x, acc_up, input_precision="ieee")
            u_at += BLOCK_K
        x_at += BLOCK_K
        w_at += BLOCK_K
    if BIAS:
        if part == 0:
            acc += tl.load(bias_ptr + n).to(tl.float32)[:, None]
        if ACT:
            acc_up += tl.load(bias_ptr + N + n).to(tl.float32)[:, None]
    kind = out_ptr.dtype.element_ty
    if ACT:
        acc = _gate(acc.to(kind).to(tl.float32), acc_up.to(kind).to(tl.float32), GELU)
    to = out_ptr + part.to(tl.int64) * M * N + m[None, :] * N + n[:, None]
    tl.store(to, acc.to(kind), mask=(m < M)[None, :])


@dataclass(frozen=True, slots=True)
class Shape:
    block_n: int
    block_k: int
    splits: int
    num_warps: int
    num_stages: int
    ahead: int = 4  # cache lines, a power of two


def fits(n_rows: int, n_out: int, n_in: int) -> bool:
    """Even tiles alone: what they do not divide goes to cuBLAS."""
    return n_rows <= MAX_ROWS and n_out % 64 == 0 and n_in % 256 == 0 and n_in >= 512


def shape_of(n_out: int, n_in: int, n_rows: int, act: bool) -> Shape:
    """Measured on an H100 with cold L2: as many programs as fill it, by splitting K where rows of W are few. Parts cost
    traffic that grows with the rows of x, so that fewer programs are best there."""
    if act:
        return Shape(64, 128, 1, 8, 3) if n_rows > 64 else Shape(64, 128, 1, 4, 4)
    splits, enough = 1, 256 if n_rows <= 32 else 96
    while n_out // 64 * splits < enough and splits < 4 and n_in % (256 * splits) == 0:
        splits *= 2
    return Shape(64, 128, splits, 4, 4)


def skinny(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, act: str | None = None, shape: Shape | None = None
) -> Tensor:
    """x (T, K), weight (N, K) -> (T, N), (T, N / 2) with `act`, or float32 parts (splits, T, N) to be summed."""
    n_rows, n_in = x.shape
    n_out = weight.shape[0] // (2 if act else 1)
    s = shape or shape_of(n_out, n_in, n_rows, act is not None)
    whole = s.splits == 1
    size = (n_rows, n_out) if whole else (s.splits, n_rows, n_out)
    out = torch.empty(size, dtype=x.dtype if whole else torch.float32, device=x.device)
    _skinny_kernel[(n_out // s.block_n, s.splits)](
        x, weight, bias if bias is not None else x, out, n_rows, n_out, K=n_in, SPLITS=s.splits,
        BLOCK_M=max(triton.next_power_of_2(n_rows), 16), BLOCK_N=s.block_n, BLOCK_K=s.block_k, STAGES=s.num_stages,
        AHEAD=s.ahead,
        ACT=act is not None, GELU=act == "gelu_tanh", BIAS=bias is not None, num_warps=s.num_warps,
        **launch_options(),
    )  # fmt: skip
    return out
