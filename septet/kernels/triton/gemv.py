"""y = x W^T for one row of x, at the speed at which W can be read.

Called by `TritonOps` for a step of one token. One program takes `BLOCK_N` rows of W; its first tile of weights is
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

__all__ = ["Shape", "gemv", "shape_of"]


@triton.jit
def _tile(w_ptr, n, k, N, K: tl.constexpr, BLOCK_N: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr):
    """(BLOCK_N, BLOCK_K) of W (N, K), read once and not kept in cache."""
    at = w_ptr + n.to(tl.int64)[:, None] * K + k[None, :]
    if EVEN_N and EVEN_K:
        return tl.load(at, eviction_policy="evict_first")
    return tl.load(at, mask=(n < N)[:, None] & (k < K)[None, :], other=0.0, eviction_policy="evict_first")


@triton.jit
def _gate(gate, up, GELU: tl.constexpr):
    if GELU:  # as act.py
        return gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)) * up
    return gate * tl.sigmoid(gate) * up


@triton.jit(do_not_specialize=["eps"])
def _gemv_kernel(
    x_ptr, norm_ptr, w_ptr, bias_ptr, residual_ptr, out_ptr, eps, N, K: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, EVEN_N: tl.constexpr, NORM: tl.constexpr, ACT: tl.constexpr, GELU: tl.constexpr,
    RESIDUAL: tl.constexpr, BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of N). x (K,), w (N, K), residual and out (N,). ACT: w is (2N, K) = [gate | up], out = act(gate) up.

    The sum over K is over tiles first, lanes last.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
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
    acc = tl.zeros((BLOCK_N,), tl.float32)
    acc_up = tl.zeros((BLOCK_N,), tl.float32)
    squares = 0.0
    for start in tl.static_range(0, K, BLOCK_K):
        if start > 0:
            w = _tile(w_ptr, n, start + k, N, K, BLOCK_N, EVEN_N, EVEN_K)
            if ACT:
                u = _tile(up_ptr, n, start + k, N, K, BLOCK_N, EVEN_N, EVEN_K)
            if NORM:
                scale = tl.load(norm_ptr + start + k, mask=start + k < K, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + start + k, mask=start + k < K, other=0.0).to(tl.float32)
        if NORM:
            squares += tl.sum(x * x, 0)
            x = x * scale
        acc += tl.sum(w.to(tl.float32) * x[None, :], 1)
        if ACT:
            acc_up += tl.sum(u.to(tl.float32) * x[None, :], 1)
    kind = out_ptr.dtype.element_ty
    live = n < N
    if NORM:
        inverse = tl.rsqrt(squares / K + eps)
        acc = acc * inverse
        acc_up = acc_up * inverse
    if BIAS:
        acc += tl.load(bias_ptr + n, mask=live, other=0.0).to(tl.float32)
        if ACT:
            acc_up += tl.load(bias_ptr + N + n, mask=live, other=0.0).to(tl.float32)
    acc = acc.to(kind).to(tl.float32)  # rounded where an unfused product would be
    if ACT:
        acc = _gate(acc, acc_up.to(kind).to(tl.float32), GELU)
    if RESIDUAL:
        acc += tl.load(residual_ptr + n, mask=live, other=0.0).to(tl.float32)
    tl.store(out_ptr + n, acc.to(kind), mask=live)


@dataclass(frozen=True, slots=True)
class Shape:
    """block_n rows of W by block_k columns in one tile of one program."""

    block_n: int
    block_k: int
    num_warps: int


def shape_of(n_out: int, n_in: int, pair: bool) -> Shape:
    """Measured on an H100 with cold L2; `pair`: gate and up are two tiles of one program."""
    block_k = next((b for b in (2048, 1024, 512) if n_in % b == 0), min(triton.next_power_of_2(n_in), 1024))
    deep = n_in > 4096 or (pair and n_in > 2048)  # several tiles a row: more warps keep more loads under way
    weights = 4096 if (pair and not deep) or n_out >= 32768 else 8192
    return Shape(max(weights // block_k // (2 if pair else 1), 1), block_k, 8 if deep else 4)


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
    """x (1, K), weight (N, K) -> (1, N), or (1, N / 2) with `act` ("silu", "gelu_tanh").

    norm (K,): x is RMS-normed first. residual (1, N) is added to the rounded product.
    """
    n_in = x.shape[1]
    n_out = weight.shape[0] // (2 if act else 1)
    out = torch.empty(1, n_out, dtype=x.dtype, device=x.device)
    s = shape or shape_of(n_out, n_in, act is not None)
    _gemv_kernel[(triton.cdiv(n_out, s.block_n),)](
        x, norm if norm is not None else x, weight, bias if bias is not None else x,
        residual if residual is not None else x, out, eps, n_out, K=n_in, BLOCK_N=s.block_n, BLOCK_K=s.block_k,
        EVEN_N=n_out % s.block_n == 0, NORM=norm is not None, ACT=act is not None, GELU=act == "gelu_tanh",
        RESIDUAL=residual is not None, BIAS=bias is not None, num_warps=s.num_warps, **launch_options(),
    )  # fmt: skip
    return out
