"""Attention of a decode step over the context that all its rows share: each key is read once for many rows.

Called by `TritonOps` before decode.py where the step says that the first positions of all rows lie in the same slots
(`Layout.shared`: one system prompt, one document). A program takes one KV head, the query heads of a group of rows and
a part of the shared context, and leaves its softmax state in memory; decode.py reads what follows the shared context
and folds these states in (the split of Hydragen, arXiv 2402.05099). Query heads are normed and rotated here too, from
the same product: that is cheaper than a third kernel.
"""
# mypy: allow-untyped-defs
# (a kernel's parameters are device pointers and scalars, typed by the launch)

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from septet.kernels.triton.attention import LOG2_E
from septet.kernels.triton.heads import fold, keys, rotated, score_of
from septet.kernels.triton.pdl import launch_options
from septet.kernels.triton.tiles import prefix_tile

if TYPE_CHECKING:
    from torch import Tensor

    from septet.kernels.ops import LayerKV, Layout

__all__ = ["SharedStates", "prefix_attention"]


@dataclass(frozen=True, slots=True)
class SharedStates:
    """Softmax states (base 2) of each query head over parts of the shared context, not yet divided."""

    shared: Tensor  # (1,) int64: positions that all rows share
    acc: Tensor  # (R, G, parts, heads, BLOCK_E) float32
    top: Tensor  # (R, G, parts, heads) float32
    total: Tensor  # the same
    block: int  # positions of a part are a multiple of it

    @property
    def parts(self) -> int:
        return self.acc.shape[2]

    @property
    def heads(self) -> int:
        return self.acc.shape[3]


@triton.jit
def part_of(shared, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Positions of one part of the shared context. Both kernels must say the same."""
    return tl.cdiv(tl.cdiv(shared, BLOCK), PARTS) * BLOCK


@triton.jit(do_not_specialize=["eps", "scale", "cap"])
def _prefix_kernel(
    qkv_ptr, acc_ptr, top_ptr, total_ptr, k_ptr, v_ptr, rows_ptr, kv_len_ptr, slot_of_ptr, cos_sin_ptr, q_norm_ptr,
    shared_ptr, R, eps, scale, cap, part_stride, k_stride, v_stride, slot_of_stride, G: tl.constexpr, E: tl.constexpr,
    RATIO: tl.constexpr, HEADS: tl.constexpr, SHARES: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, STAGES: tl.constexpr, KIND: tl.constexpr, NORM: tl.constexpr,
    CAP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (G, groups of BLOCK_M / HEADS rows, SHARES). qkv (PARTS, R, (H + 2G) E), k and v (n_slots, G, E).

    acc, top, total: see `SharedStates`; HEADS is RATIO padded to a power of two. KIND: the compute dtype.
    """
    kv_head, group, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    half: tl.constexpr = E // 2
    m, at, e = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_E // 2)[None, :], tl.arange(0, BLOCK_E)[None, :]
    if PDL:
        gdc_launch_dependents()
    shared = tl.load(shared_ptr).to(tl.int32)
    share = part_of(shared, SHARES, BLOCK_N)
    lo = split * share
    hi = tl.minimum(lo + share, shared)
    if lo >= hi:
        return
    row, head = group * (BLOCK_M // HEADS) + m // HEADS, m % HEADS
    inside = (row < R) & (head < RATIO)
    past = tl.load(kv_len_ptr + row, mask=inside, other=1) - 1
    angle = cos_sin_ptr + past.to(tl.int64) * E + at
    cos = tl.load(angle, mask=inside & (at < half), other=0.0)
    sin = tl.load(angle + half, mask=inside & (at < half), other=0.0)
    slot_line = slot_of_ptr + tl.load(rows_ptr) * slot_of_stride  # of any row: they are the same here
    if PDL:
        gdc_wait()
    line = row.to(tl.int64) * ((RATIO + 2) * G * E) + (kv_head * RATIO + head) * E
    q1, q2 = rotated(qkv_ptr, line, at, inside & (at < half), half, cos, sin, q_norm_ptr, eps, E, NORM, PARTS,
                     part_stride, KIND)  # fmt: skip
    acc = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    top, total = tl.full((BLOCK_M,), float("-inf"), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    for start in tl.range(lo, hi, BLOCK_N, num_stages=STAGES):
        k1, k2, v, here = keys(k_ptr + kv_head * E, v_ptr + kv_head * E, slot_line, start, hi, at, e, k_stride,
                               v_stride, E, BLOCK_N, False)  # fmt: skip
        acc, top, total = fold(acc, top, total, score_of(q1, q2, k1, k2, here, scale, cap, CAP), v, KIND)
    state = ((row.to(tl.int64) * G + kv_head) * SHARES + split) * HEADS + head  # (BLOCK_M, 1)
    tl.store(acc_ptr + state * BLOCK_E + e, acc, mask=inside)
    tl.store(top_ptr + state, top[:, None], mask=inside)
    tl.store(total_ptr + state, total[:, None], mask=inside)


@triton.jit
def with_prefix(
    acc, top, total, acc_ptr, top_ptr, total_ptr, pair, shared, SHARES: tl.constexpr, HEADS: tl.constexpr,
    RATIO: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row's softmax state with those of the shared context folded in. pair: row * G + KV head; shared: 0 = none."""
    BLOCK_M: tl.constexpr = acc.shape[0]
    BLOCK_E: tl.constexpr = acc.shape[1]
    m, e = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_E)[None, :]
    for i in tl.range(0, tl.cdiv(shared, tl.maximum(part_of(shared, SHARES, BLOCK), 1)), loop_unroll_factor=4):
        state = (pair.to(tl.int64) * SHARES + i) * HEADS + m
        its_top = tl.load(top_ptr + state, mask=m < RATIO, other=float("-inf"))
        its_total = tl.load(total_ptr + state, mask=m < RATIO, other=0.0)
        its_acc = tl.load(acc_ptr + state[:, None] * BLOCK_E + e, mask=m[:, None] < RATIO, other=0.0)
        new_top = tl.maximum(top, its_top)
        fade, weight = tl.exp2(top - new_top), tl.exp2(its_top - new_top)
        acc, total = acc * fade[:, None] + its_acc * weight[:, None], total * fade + its_total * weight
        top = new_top
    return acc, top, total


def prefix_attention(
    qkv: Tensor,
    kv: LayerKV,
    layout: Layout,
    cos_sin: Tensor,
    q_norm: Tensor | None,
    eps: float,
    scale: float,
    soft_cap: float,
    dtype: torch.dtype,
    n_sms: int,
) -> SharedStates | None:
    """qkv (R, (H + 2G) E), or its float32 parts (P, R, ...), of a decode step -> what its heads see of the shared
    context; None: the step does not say that there is one."""
    if layout.shared is None:
        return None
    n_kv, dim = kv.k.shape[1:]
    parts, n_rows, width = (1, *qkv.shape) if qkv.dim() == 2 else qkv.shape
    ratio = width // dim // n_kv - 2
    heads, block_e = triton.next_power_of_2(ratio), max(triton.next_power_of_2(dim), 32)
    t = prefix_tile(n_rows, n_kv, heads, block_e * kv.k.element_size(), n_sms)
    acc = torch.empty(n_rows, n_kv, t.shares, heads, block_e, dtype=torch.float32, device=qkv.device)
    top = torch.empty(n_rows, n_kv, t.shares, heads, dtype=torch.float32, device=qkv.device)
    states = SharedStates(layout.shared, acc, top, torch.empty_like(top), t.block_n)
    _prefix_kernel[(n_kv, triton.cdiv(n_rows * heads, t.block_m), t.shares)](
        qkv, acc, top, states.total, kv.k, kv.v, layout.rows, layout.kv_len, layout.slot_of, cos_sin,
        q_norm if q_norm is not None else qkv, layout.shared, n_rows, eps, scale * LOG2_E, soft_cap, n_rows * width,
        kv.k.stride(0), kv.v.stride(0), layout.slot_of.stride(0), G=n_kv, E=dim, RATIO=ratio, HEADS=heads,
        SHARES=t.shares, PARTS=parts, BLOCK_M=t.block_m, BLOCK_N=t.block_n, BLOCK_E=block_e, STAGES=t.num_stages,
        KIND=_TYPES[dtype], NORM=q_norm is not None, CAP=soft_cap != 0.0, num_warps=t.num_warps, **launch_options(),
    )  # fmt: skip
    return states


_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
