"""Attention of a decode step from the QKV product on: norm, rotation, KV write, attention, merge, in one kernel.

Called by `TritonOps` where every row computes one token: what qkv.py and attention.py do in three kernels. A program
takes one KV head of one row and a share of its context (what all rows share is left to prefix.py); its first keys and
values, and their slots, are loaded before the predecessor has ended (pdl.py: all but this step's token was written by
earlier steps). The step's own key and value never make the way through memory: the first program of a row folds them in
from registers, and writes them to the pool. The last program of a row to arrive merges the shares (a counter in memory;
arXiv 2205.14135 for the softmax).
"""
# mypy: allow-untyped-defs
# (a kernel's parameters are device pointers and scalars, typed by the launch)

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from septet.kernels.triton.attention import LOG2_E
from septet.kernels.triton.heads import capped, fold, keys, read, rotated, score_of
from septet.kernels.triton.pdl import launch_options, overlaps, prefetch
from septet.kernels.triton.prefix import with_prefix
from septet.kernels.triton.tiles import decode_splits, decode_tile

if TYPE_CHECKING:
    from septet.kernels.ops import LayerKV, Layout
    from septet.kernels.triton.prefix import SharedStates
    from septet.kernels.triton.tiles import DecodeTile

__all__ = ["decode_attention"]

BLOCK_M = 16  # rows of the smallest matrix instruction: the query heads of one KV head, the rest idle


@triton.jit
def _fetch_ahead(next_ptr, next_lines, idle, n_idle):
    """Idle program `idle` of n_idle: ask the cache for its part of the weights that the next kernel reads."""
    line = tl.arange(0, 128).to(tl.int64)
    for first in range(idle, tl.cdiv(next_lines, 128), n_idle):
        at_line = tl.minimum(first * 128 + line, next_lines - 1)
        prefetch(next_ptr + at_line * (128 // next_ptr.dtype.element_ty.itemsize))


@triton.jit
def _own_token(
    acc, top, total, q1, q2, qkv_ptr, head, k_at, v_at, cos, sin, norm_ptr, eps, scale, cap, part_stride,
    G: tl.constexpr, E: tl.constexpr, NORM: tl.constexpr, CAP: tl.constexpr, PARTS: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """This step's key at `head` of the QKV product and its value: store them, fold them into the softmax state."""
    HALF: tl.constexpr = q1.shape[1]
    BLOCK_E: tl.constexpr = acc.shape[1]
    half: tl.constexpr = E // 2
    one, at, e = tl.arange(0, 1)[:, None], tl.arange(0, HALF)[None, :], tl.arange(0, BLOCK_E)[None, :]
    own = (one == 0) & (at < half)
    k1, k2 = rotated(qkv_ptr, head + one * E, at, own, half, cos, sin, norm_ptr, eps, E, NORM, PARTS, part_stride,
                      KIND)  # fmt: skip
    v = read(qkv_ptr, head + G * E + one * E, e, e < E, PARTS, part_stride, KIND)
    k1, k2 = k1.to(k_at.dtype.element_ty), k2.to(k_at.dtype.element_ty)
    tl.store(k_at + at, k1, mask=own)
    tl.store(k_at + half + at, k2, mask=own)
    tl.store(v_at + e, v.to(v_at.dtype.element_ty), mask=e < E)
    score = tl.sum(q1.to(tl.float32) * k1.to(tl.float32), 1) + tl.sum(q2.to(tl.float32) * k2.to(tl.float32), 1)
    score = score * scale
    if CAP:
        score = capped(score, cap)
    new_top = tl.maximum(top, score)
    fade, weight = tl.exp2(top - new_top), tl.exp2(score - new_top)
    acc = acc * fade[:, None] + weight.to(KIND).to(tl.float32)[:, None] * v
    return acc, new_top, total * fade + weight


@triton.jit
def _shared_before(shared_ptr, past):
    """Positions of the shared context, if the row is longer; else 0."""
    shared = tl.load(shared_ptr).to(tl.int32)
    return tl.where(shared <= past, shared, 0)


@triton.jit
def _angles(angles_ptr, at, half: tl.constexpr):
    """cos and sin of one position, (1, E / 2) each."""
    cos = tl.load(angles_ptr + at, mask=at < half, other=0.0)
    return cos, tl.load(angles_ptr + half + at, mask=at < half, other=0.0)


@triton.jit
def _give(
    acc, top, total, acc_ptr, top_ptr, total_ptr, arrived_at, out_at, out_tile, first, split, used, RATIO: tl.constexpr,
    SPLITS: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """The row's output, if this program has all of its context; else its share."""
    if SPLITS == 1 or used == 1:
        tl.store(out_at, (acc / total[:, None]).to(KIND), mask=out_tile)
    else:
        _merge_shares(acc, top, total, acc_ptr, top_ptr, total_ptr, arrived_at, out_at, out_tile, first, split, used,
                      RATIO, SPLITS, KIND)  # fmt: skip


@triton.jit
def _merge_shares(
    acc, top, total, acc_ptr, top_ptr, total_ptr, arrived_at, out_at, out_tile, first, split, used, RATIO: tl.constexpr,
    SPLITS: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Leave this share in memory; the program whose share is the last of `used` merges them all."""
    BLOCK_M: tl.constexpr = acc.shape[0]
    BLOCK_E: tl.constexpr = acc.shape[1]
    m, s = tl.arange(0, BLOCK_M), tl.arange(0, SPLITS)
    cell = m[:, None] * BLOCK_E + tl.arange(0, BLOCK_E)[None, :]
    tl.store(top_ptr + (first + split) * BLOCK_M + m, top)
    tl.store(total_ptr + (first + split) * BLOCK_M + m, total)
    heads = m[:, None] < RATIO  # the other rows are idle
    tl.store(acc_ptr + (first + split) * (BLOCK_M * BLOCK_E) + cell, acc, mask=heads)
    tl.debug_barrier()  # every thread's part is written before the counter says so
    if tl.atomic_add(arrived_at, 1, sem="acq_rel") == used - 1:
        seen = (s < used)[:, None] & (m < RATIO)[None, :]
        states = (first + s)[:, None] * BLOCK_M + m[None, :]
        tops = tl.load(top_ptr + states, mask=seen, other=float("-inf"), cache_modifier=".cg")
        best = tl.max(tops, 0)
        best = tl.where(best == float("-inf"), 0.0, best)
        totals = tl.load(total_ptr + states, mask=seen, other=0.0, cache_modifier=".cg")
        whole = tl.sum(totals * tl.exp2(tops - best[None, :]), 0)
        merged = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
        for i in tl.range(0, used, loop_unroll_factor=4):
            its_top = tl.load(top_ptr + (first + i) * BLOCK_M + m, cache_modifier=".cg")
            its_share = tl.load(
                acc_ptr + (first + i) * (BLOCK_M * BLOCK_E) + cell, mask=heads, other=0.0, cache_modifier=".cg"
            )
            merged += its_share * tl.exp2(its_top - best)[:, None]
        tl.store(out_at, (merged / whole[:, None]).to(KIND), mask=out_tile)
        tl.store(arrived_at, 0)


@triton.jit(do_not_specialize=["eps", "window", "scale", "cap"])
def _decode_kernel(
    qkv_ptr, out_ptr, acc_ptr, top_ptr, total_ptr, arrived_ptr, k_ptr, v_ptr, rows_ptr, kv_len_ptr, slots_ptr,
    slot_of_ptr, cos_sin_ptr, q_norm_ptr, k_norm_ptr, next_ptr, shared_ptr, pre_acc_ptr, pre_top_ptr, pre_total_ptr,
    next_lines, eps, window, scale, cap, part_stride, k_stride, v_stride, slot_of_stride, G: tl.constexpr,
    E: tl.constexpr, RATIO: tl.constexpr, SPLITS: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, STAGES: tl.constexpr, LEAST: tl.constexpr, PRELOAD: tl.constexpr,
    AHEAD: tl.constexpr, SHARES: tl.constexpr, HEADS: tl.constexpr, SHARED_BLOCK: tl.constexpr, NORM: tl.constexpr,
    WINDOW: tl.constexpr, CAP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (G, R, SPLITS). qkv (PARTS, R, (H + 2G) E), out (R, H, E), k and v (n_slots, G, E).

    acc (R, G, SPLITS, BLOCK_M, BLOCK_E), top and total (R, G, SPLITS, BLOCK_M): float32 shares, not yet divided;
    arrived (R, G) int32: zero, and left zero. LEAST: tokens of a share but for the last one; whole turns. AHEAD: one
    row; programs without a share prefetch the constant `next`. SHARES: parts of a shared context (`SharedStates`); 0:
    none. Padding, which ends before it, reads nothing of it."""
    if PDL:
        gdc_launch_dependents()
    kv_head, row, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    half: tl.constexpr = E // 2
    KIND: tl.constexpr = out_ptr.dtype.element_ty
    m, at, e = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_E // 2)[None, :], tl.arange(0, BLOCK_E)[None, :]
    past = tl.load(kv_len_ptr + row) - 1  # tokens written by earlier steps; this step's has position `past`
    slot_line = slot_of_ptr + tl.load(rows_ptr + row) * slot_of_stride
    shared = _shared_before(shared_ptr, past) if SHARES else 0
    key_lo = tl.maximum(past - window + 1, 0) if WINDOW else shared
    share = tl.maximum(tl.cdiv(tl.cdiv(past - key_lo, BLOCK_N), SPLITS) * BLOCK_N, LEAST)
    used = tl.maximum(tl.cdiv(past - key_lo, share), 1)  # programs with a share; the first has this step's token too
    if split >= used:  # the others' waiting keeps the order
        if AHEAD:
            _fetch_ahead(next_ptr, next_lines, (split - used) * G + kv_head, (SPLITS - used) * G)
        return
    lo = key_lo + split * share
    hi, k_head, v_head = tl.minimum(lo + share, past), k_ptr + kv_head * E, v_ptr + kv_head * E
    if PRELOAD:
        k1, k2, v, here = keys(k_head, v_head, slot_line, lo, hi, at, e, k_stride, v_stride, E, BLOCK_N, True)
    slot, line = tl.load(slots_ptr + row), row.to(tl.int64) * ((RATIO + 2) * G * E)
    cos, sin = _angles(cos_sin_ptr + past.to(tl.int64) * E, at, half)
    if PDL:
        gdc_wait()
    q1, q2 = rotated(qkv_ptr, line + (kv_head * RATIO + m) * E, at, (m < RATIO) & (at < half), half, cos, sin,
                     q_norm_ptr, eps, E, NORM, PARTS, part_stride, KIND)  # fmt: skip
    acc = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    top, total = tl.full((BLOCK_M,), float("-inf"), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    if PRELOAD:
        acc, top, total = fold(acc, top, total, score_of(q1, q2, k1, k2, here, scale, cap, CAP), v, KIND)
        lo += BLOCK_N
    for start in tl.range(lo, hi, BLOCK_N, num_stages=STAGES):
        k1, k2, v, here = keys(k_head, v_head, slot_line, start, hi, at, e, k_stride, v_stride, E, BLOCK_N, False)
        acc, top, total = fold(acc, top, total, score_of(q1, q2, k1, k2, here, scale, cap, CAP), v, KIND)
    if split == 0:
        acc, top, total = _own_token(
            acc, top, total, q1, q2, qkv_ptr, line + (RATIO * G + kv_head) * E, k_head + slot * k_stride,
            v_head + slot * v_stride, cos, sin, k_norm_ptr, eps, scale, cap, part_stride, G, E, NORM, CAP, PARTS, KIND,
        )  # fmt: skip
        if SHARES:
            acc, top, total = with_prefix(acc, top, total, pre_acc_ptr, pre_top_ptr, pre_total_ptr, row * G + kv_head,
                                          shared, SHARES, HEADS, RATIO, SHARED_BLOCK)  # fmt: skip
    pair, out_at = row.to(tl.int64) * G + kv_head, out_ptr + row.to(tl.int64) * (G * RATIO * E)
    _give(acc, top, total, acc_ptr, top_ptr, total_ptr, arrived_ptr + pair, out_at + (kv_head * RATIO + m) * E + e,
          (m < RATIO) & (e < E), pair * SPLITS, split, used, RATIO, SPLITS, KIND)  # fmt: skip


def _worth_fetching(weight: Tensor) -> bool:
    """Measured on an H100: a step with 33 MB here is 2 % faster, one with 8 MB, soon read anyway, 2 % slower."""
    return weight.numel() * weight.element_size() >= 16 << 20


def decode_attention(
    qkv: Tensor,
    kv: LayerKV,
    layout: Layout,
    cos_sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    scale: float,
    window: int | None,
    soft_cap: float,
    dtype: torch.dtype,
    arrived: Tensor,
    n_sms: int,
    ahead: Tensor | None = None,
    tile: DecodeTile | None = None,
    prefix: SharedStates | None = None,
) -> Tensor:
    """qkv (R, (H + 2G) E), or its float32 parts (P, R, ...) -> (R, H E) in `dtype`; one token a row.

    Writes the tokens' keys and values to `kv`. ahead: the weight that the next kernel reads. arrived: int32 zeros, at
    least R * G; zeros again afterwards. prefix: of the shared context, which is then not read; not with a window. The
    rest as in `Ops.qkv_write` and `Ops.attention`.
    """
    n_kv, dim = kv.k.shape[1:]
    parts, n_rows, width = (1, *qkv.shape) if qkv.dim() == 2 else qkv.shape
    ratio = width // dim // n_kv - 2
    out = torch.empty(n_rows, ratio * n_kv * dim, dtype=dtype, device=qkv.device)
    block_e = max(triton.next_power_of_2(dim), 32)
    context = layout.max_kv if window is None else min(layout.max_kv, window)
    splits = decode_splits(n_rows, n_kv, context, n_sms)
    block_m = max(BLOCK_M, triton.next_power_of_2(ratio))
    acc = top = total = out
    if splits > 1:
        acc = torch.empty(n_rows, n_kv, splits, block_m, block_e, dtype=torch.float32, device=qkv.device)
        top = torch.empty(n_rows, n_kv, splits, block_m, dtype=torch.float32, device=qkv.device)
        total = torch.empty_like(top)
    t = tile or decode_tile(n_kv * n_rows, block_e * kv.k.element_size(), n_sms)
    norm = q_norm is not None and k_norm is not None
    prefetches = ahead is not None and _worth_fetching(ahead) and n_rows == 1 and splits > 1 and overlaps()
    weight = ahead if ahead is not None else qkv
    states = (
        (prefix.shared, prefix.acc, prefix.top, prefix.total) if prefix is not None else (layout.kv_len, out, out, out)
    )
    assert prefix is None or window is None
    _decode_kernel[(n_kv, n_rows, splits)](
        qkv, out, acc, top, total, arrived, kv.k, kv.v, layout.rows, layout.kv_len, layout.slots, layout.slot_of,
        cos_sin, q_norm if norm else qkv, k_norm if norm else qkv, weight,
        *states, weight.numel() * weight.element_size() // 128, eps, 0 if window is None else window,
        scale * LOG2_E, soft_cap, n_rows * width, kv.k.stride(0), kv.v.stride(0), layout.slot_of.stride(0),
        G=n_kv, E=dim, RATIO=ratio, SPLITS=splits, PARTS=parts, BLOCK_M=block_m, BLOCK_N=t.block_n, BLOCK_E=block_e,
        STAGES=t.num_stages, LEAST=t.least, PRELOAD=t.preload, AHEAD=prefetches,
        SHARES=prefix.parts if prefix is not None else 0, HEADS=prefix.heads if prefix is not None else 1,
        SHARED_BLOCK=prefix.block if prefix is not None else 1, NORM=norm, WINDOW=window is not None,
        CAP=soft_cap != 0.0, num_warps=t.num_warps, **launch_options(),
    )  # fmt: skip
    return out
