"""y = x W^T for one to four rows of x, at the speed at which W can be read.

Called by `TritonOps` for small decode batches. One program takes `BLOCK_N` rows of W; its first tile of weights is
loaded before the predecessor has ended (see pdl.py), so that memory never idles between kernels. Fused: the RMS norm of
x before (its scale is applied to the sums after), the residual sum or the gated activation after. Products and sums
are float32.
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

from septet.kernels.triton.pdl import launch_options

__all__ = ["MAX_ROWS", "Shape", "gemv", "shape_of"]

MAX_ROWS = 4


@triton.jit
def _tile(w_ptr, n, k, N, K: tl.constexpr, BLOCK_N: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr):
    """(BLOCK_N, BLOCK_K) of W (N, K), read once and not kept in cache."""
    at = w_ptr + n.to(tl.int64)[:, None] * K + k[None, :]
    if EVEN_N and EVEN_K:
        return tl.load(at, eviction_policy="evict_first")
    return tl.load(at, mask=(n < N)[:, None] & (k < K)[None, :], other=0.0, eviction_policy="evict_first")


@triton.jit
def _fold(acc, w, x, M: tl.constexpr):
    """acc (BLOCK_N, M) + w (BLOCK_N, BLOCK_K) times x (M, BLOCK_K), both summed over BLOCK_K."""
    if M == 1:
        return acc + tl.sum(w.to(tl.float32) * x, 1)[:, None]
    return acc + tl.sum(w.to(tl.float32)[:, None, :] * x[None, :, :], 2)


@triton.jit
def _gate(gate, up, GELU: tl.constexpr):
    if GELU:  # as act.py
        return gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)) * up
    return gate * tl.sigmoid(gate) * up


@triton.jit(do_not_specialize=["eps"])
def _gemv_kernel(
    x_ptr, norm_ptr, w_ptr, bias_ptr, residual_ptr, out_ptr, eps, N, K: tl.constexpr, M: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_N: tl.constexpr, NORM: tl.constexpr,
    ACT: tl.constexpr, GELU: tl.constexpr, RESIDUAL: tl.constexpr, BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of N). x (ROWS, K), w (N, K), residual and out (ROWS, N); M: ROWS up to a power of two.

    ACT: w is (2N, K) = [gate | up] and out = act(gate) * up.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k, m = tl.arange(0, BLOCK_K), tl.arange(0, M)
    EVEN_K: tl.constexpr = K % BLOCK_K == 0
    up_ptr = w_ptr + N.to(tl.int64) * K if ACT else w_ptr
    if PDL:
        gdc_launch_dependents()
    w = _tile(w_ptr, n, k, N, K, BLOCK_N, EVEN_N, EVEN_K)
    if ACT:
        u = _tile(up_ptr, n, k, N, K, BLOCK_N, EVEN_N, EVEN_K)
    if NORM:
        scale = tl.load(norm_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    acc = tl.zeros((BLOCK_N, M), tl.float32)
    acc_up = tl.zeros((BLOCK_N, M), tl.float32)
    squares = tl.zeros((M,), tl.float32)
    for start in tl.static_range(0, K, BLOCK_K):
        if start > 0:
            w = _tile(w_ptr, n, start + k, N, K, BLOCK_N, EVEN_N, EVEN_K)
            if ACT:
                u = _tile(up_ptr, n, start + k, N, K, BLOCK_N, EVEN_N, EVEN_K)
            if NORM:
                scale = tl.load(norm_ptr + start + k, mask=start + k < K, other=0.0).to(tl.float32)
        inside = (m < ROWS)[:, None] & (start + k < K)[None, :]
        x = tl.load(x_ptr + m[:, None] * K + (start + k)[None, :], mask=inside, other=0.0).to(tl.float32)
        if NORM:
            squares += tl.sum(x * x, 1)
            x = x * scale[None, :]
        acc = _fold(acc, w, x, M)
        if ACT:
            acc_up = _fold(acc_up, u, x, M)
    kind = out_ptr.dtype.element_ty
    if NORM:
        inverse = tl.rsqrt(squares / K + eps)[None, :]
        acc = acc * inverse
        acc_up = acc_up * inverse
    if BIAS:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
        if ACT:
            acc_up += tl.load(bias_ptr + N + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    to = m[None, :] * N + n[:, None]
    live = (n < N)[:, None] & (m < ROWS)[None, :]
    acc = acc.to(kind).to(tl.float32)  # rounded where an unfused product would be
    if ACT:
        acc = _gate(acc, acc_up.to(kind).to(tl.float32), GELU)
    if RESIDUAL:
        acc += tl.load(residual_ptr + to, mask=live, other=0.0).to(tl.float32)
    tl.store(out_ptr + to, acc.to(kind), mask=live)


@dataclass(frozen=True, slots=True)
class Shape:
    """block_n rows of W by block_k columns in one tile of one program."""

    block_n: int
    block_k: int
    num_warps: int


def shape_of(n_out: int, n_in: int, n_rows: int, pair: bool) -> Shape:
    """Measured on an H100 with cold L2; `pair`: gate and up are two tiles of one program."""
    block_k = next((b for b in (2048, 1024, 512) if n_in % b == 0), min(triton.next_power_of_2(n_in), 1024))
    big = n_out * n_in * (2 if pair else 1) >= 24e6
    weights = (8192 if big else 4096) // (2 if n_rows > 2 else 1)
    block_n = max(weights // block_k // (2 if pair else 1), 1)
    return Shape(block_n, block_k, 8 if big else 4)


def gemv(
    x: Tensor,
    weight: Tensor,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    act: str | None = None,
    shape: Shape | None = None,
) -> Tensor:
    """x (T, K), T <= MAX_ROWS, weight (N, K) -> (T, N), or (T, N / 2) with `act` ("silu", "gelu_tanh").

    norm (K,): x is RMS-normed first. residual (T, N) is added to the rounded product.
    """
    n_rows, n_in = x.shape
    n_out = weight.shape[0] // (2 if act else 1)
    out = torch.empty(n_rows, n_out, dtype=x.dtype, device=x.device)
    s = shape or shape_of(n_out, n_in, n_rows, act is not None)
    _gemv_kernel[(triton.cdiv(n_out, s.block_n),)](
        x, norm if norm is not None else x, weight, bias if bias is not None else x,
        residual if residual is not None else x, out, eps, n_out, K=n_in, M=triton.next_power_of_2(n_rows),
        ROWS=n_rows, BLOCK_N=s.block_n, BLOCK_K=s.block_k, EVEN_N=n_out % s.block_n == 0, NORM=norm is not None,
        ACT=act is not None, GELU=act == "gelu_tanh", RESIDUAL=residual is not None, BIAS=bias is not None,
        num_warps=s.num_warps, **launch_options(),
    )  # fmt: skip
    return out
