"""The prologue of attention in one kernel: split, per-head norm, rotation, write of k and v to the pool.

Called by `TritonOps`. One program takes one token and a block of its H + 2G heads; a tile is (heads, E/2), once for
each half of the head, so that both elements of a rotated pair meet in one thread.
"""
# mypy: allow-untyped-defs
# (a kernel's parameters are device pointers and scalars, typed by the launch)

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from septet.kernels.ops import LayerKV, Layout

__all__ = ["qkv_write"]

TILE = 512  # elements of one half-tile: 8 a thread with two warps


@triton.jit
def _qkv_kernel(
    qkv_ptr,  # (T, H + 2G, E)
    q_ptr,  # (T, H, E)
    k_ptr,  # (n_slots, G, E), slots k_stride apart
    v_ptr,
    slots_ptr,  # (T,) int64
    positions_ptr,  # (T,) int64
    cos_sin_ptr,  # (max_position, E) float32
    q_norm_ptr,  # (E,)
    k_norm_ptr,
    eps,
    k_stride,
    v_stride,
    H: tl.constexpr,
    G: tl.constexpr,
    E: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Grid (T, blocks of heads). BLOCK_E: E/2 rounded up to a power of two."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    at = tl.arange(0, BLOCK_E)
    half: tl.constexpr = E // 2
    tile = (head < H + 2 * G)[:, None] & (at < half)[None, :]
    source = qkv_ptr + token * (H + 2 * G) * E + head[:, None] * E + at[None, :]
    a = tl.load(source, mask=tile, other=0.0)
    b = tl.load(source + half, mask=tile, other=0.0)
    x, y = a.to(tl.float32), b.to(tl.float32)
    if NORM:  # rounded to the compute dtype before the rotation, as the reference does
        inverse = tl.rsqrt((tl.sum(x * x, 1) + tl.sum(y * y, 1)) / E + eps)[:, None]
        is_q = (head < H)[:, None]
        wq, wk = tl.load(q_norm_ptr + at, mask=at < half), tl.load(k_norm_ptr + at, mask=at < half)
        x = (x * inverse * tl.where(is_q, wq[None, :], wk[None, :]).to(tl.float32)).to(a.dtype).to(tl.float32)
        wq, wk = tl.load(q_norm_ptr + half + at, mask=at < half), tl.load(k_norm_ptr + half + at, mask=at < half)
        y = (y * inverse * tl.where(is_q, wq[None, :], wk[None, :]).to(tl.float32)).to(a.dtype).to(tl.float32)
    angle = cos_sin_ptr + tl.load(positions_ptr + token) * E + at
    cos = tl.load(angle, mask=at < half, other=0.0)[None, :]
    sin = tl.load(angle + half, mask=at < half, other=0.0)[None, :]
    first, second = x * cos - y * sin, y * cos + x * sin

    q_to = q_ptr + token * H * E + head[:, None] * E + at[None, :]
    q_tile = tile & (head < H)[:, None]
    tl.store(q_to, first.to(q_ptr.dtype.element_ty), mask=q_tile)
    tl.store(q_to + half, second.to(q_ptr.dtype.element_ty), mask=q_tile)
    slot = tl.load(slots_ptr + token)
    k_to = k_ptr + slot * k_stride + (head - H)[:, None] * E + at[None, :]
    k_tile = tile & ((head >= H) & (head < H + G))[:, None]
    tl.store(k_to, first.to(k_ptr.dtype.element_ty), mask=k_tile)
    tl.store(k_to + half, second.to(k_ptr.dtype.element_ty), mask=k_tile)
    v_to = v_ptr + slot * v_stride + (head - H - G)[:, None] * E + at[None, :]
    v_tile = tile & (head >= H + G)[:, None]
    tl.store(v_to, a.to(v_ptr.dtype.element_ty), mask=v_tile)
    tl.store(v_to + half, b.to(v_ptr.dtype.element_ty), mask=v_tile)


def qkv_write(
    qkv: Tensor,
    kv: LayerKV,
    layout: Layout,
    cos_sin: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """qkv (T, (H + 2G) E) contiguous -> q (T, H, E); k and v to `kv` at `layout.slots`. See `Ops.qkv_write`.

    The slots of the pool may lie any distance apart; a slot's (G, E) elements are contiguous.
    """
    n_kv, dim = kv.k.shape[1:]
    n_tokens, n_heads = qkv.shape[0], qkv.shape[1] // dim - 2 * n_kv
    q = torch.empty(n_tokens, n_heads, dim, dtype=qkv.dtype, device=qkv.device)
    if not n_tokens:
        return q
    block_e = triton.next_power_of_2(dim // 2)
    block_h = min(max(TILE // block_e, 1), triton.next_power_of_2(n_heads + 2 * n_kv))
    norm = q_norm is not None and k_norm is not None
    _qkv_kernel[(n_tokens, triton.cdiv(n_heads + 2 * n_kv, block_h))](
        qkv, q, kv.k, kv.v, layout.slots, layout.positions, cos_sin,
        q_norm if norm else qkv, k_norm if norm else qkv, eps, kv.k.stride(0), kv.v.stride(0),
        H=n_heads, G=n_kv, E=dim, NORM=norm, BLOCK_H=block_h, BLOCK_E=block_e, num_warps=2,
    )  # fmt: skip
    return q
