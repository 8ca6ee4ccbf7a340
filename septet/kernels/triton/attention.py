"""Paged attention for any mix of prefill, chunk and decode rows: one kernel, and a merge when the context is split.

Called by `TritonOps` once a layer. After arXiv 2511.11581 (Q-blocks: the tile's rows are query tokens x the query heads
that share a KV head, so K and V are read once for all of them), arXiv 2205.14135 (online softmax, float32) and
flash-decoding (several programs share one context when there are fewer tiles than multiprocessors). A page is one
token: the loop loads the slot ids of block_n positions, then gathers (block_n, E) of K and of V, E contiguous.

    rows of a tile:  m = token * ratio + head        token < BLOCK_Q, head < ratio = H / G; the rest idle
    its context:     key_lo ... [lo ... hi) ... key_hi     [lo, hi) = this program's share, whole turns of BLOCK_N;
                     masked | seen by every row | masked   scores are masked in the turns that some row sees in part

The loop's pipeline has two loads in a chain, slots then K and V: from 5 stages on they are under way two turns ahead,
with 3 or 4 they start when the turn before has ended (AssignLatencies.cpp of Triton: (stages - 1) / 2 turns each).
"""
# mypy: allow-untyped-defs
# (a kernel's parameters are device pointers and scalars, typed by the launch)

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from septet.kernels.triton.tiles import choose

if TYPE_CHECKING:
    from septet.kernels.ops import LayerKV, Layout

__all__ = ["attention"]

NO_WINDOW = 2**30
LOG2_E = 1.4426950408889634


@triton.jit
def _find_row(q_start_ptr, block, n_rows, BLOCK_Q: tl.constexpr):
    """Row of q-block `block`. Row r's blocks start at q_start[r] // BLOCK_Q + r, which leaves room for its last one."""
    row = -1
    for i in range(0, n_rows, 128):
        r = i + tl.arange(0, 128)
        begin = tl.load(q_start_ptr + r, mask=r < n_rows, other=0) // BLOCK_Q + r
        row += tl.sum(((begin <= block) & (r < n_rows)).to(tl.int32), 0)
    return row


@triton.jit
def _keys(
    k_ptr, v_ptr, slot_of_ptr, start, last, e, k_stride, v_stride, E: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Keys and values (BLOCK_N, BLOCK_D) of positions start .. start + BLOCK_N - 1; those beyond `last` read `last`.

    What is read is always written, so that no element needs a mask, only the scores do.
    """
    slot = tl.load(slot_of_ptr + tl.minimum(start + tl.arange(0, BLOCK_N), last)).to(tl.int64)
    k_at = k_ptr + slot[:, None] * k_stride + e[None, :]
    v_at = v_ptr + slot[:, None] * v_stride + e[None, :]
    if E != BLOCK_D:
        tile = (e < E)[None, :]
        return tl.load(k_at, mask=tile, other=0.0), tl.load(v_at, mask=tile, other=0.0)
    return tl.load(k_at), tl.load(v_at)


@triton.jit
def _fold(acc, top, total, score, v, scale, cap, CAP: tl.constexpr, KIND: tl.constexpr):
    """Scores (M, N), -inf = not seen, and values (N, D) into the softmax state acc (M, D), top (M,), total (M,).

    top is in the scores' own unit: the step to base 2 is one multiply-add an element, or done already (CAP).
    """
    new_top = tl.maximum(top, tl.max(score, 1))
    # A row that has seen nothing yet keeps top = -inf; subtracting 0 instead gives weights of 0, not NaN.
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    if CAP:
        weight, fade = tl.exp2(score - base[:, None]), tl.exp2(top - base)
    else:
        weight, fade = tl.exp2(score * scale - (base * scale)[:, None]), tl.exp2((top - base) * scale)
    total = total * fade + tl.sum(weight, 1)
    acc = tl.dot(weight.to(KIND), v.to(KIND), acc * fade[:, None], input_precision="ieee")
    return acc, new_top, total


@triton.jit
def _sweep(
    q, q_pos, k_ptr, v_ptr, slot_of_ptr, first_pos, last_pos, lo, hi, window, scale, cap, k_stride, v_stride,
    E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr,
    CAP: tl.constexpr,
):  # fmt: skip
    """Attend to context positions lo .. hi - 1 of rows at first_pos .. last_pos -> acc, top, total.

    One loop, so that its pipeline fills once; turns that each row sees in whole are not masked. top is in base 2.
    """
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    e = tl.arange(0, BLOCK_D)
    for start in range(lo, hi, BLOCK_N):
        k, v = _keys(k_ptr, v_ptr, slot_of_ptr, start, last_pos, e, k_stride, v_stride, E, BLOCK_D, BLOCK_N)
        score = tl.dot(q, tl.trans(k).to(q.dtype), input_precision="ieee")
        if CAP:  # cap * tanh(score / cap) in base 2; tanh(y) = 1 - 2 / (exp(2y) + 1)
            score = cap * 1.4426950408889634 * (1.0 - 2.0 / (tl.exp2(score * (scale * 2.0 / cap)) + 1.0))
        cut = start + BLOCK_N > first_pos + 1
        if WINDOW:
            cut = cut | (start <= last_pos - window)
        if cut:
            n = start + tl.arange(0, BLOCK_N)
            seen = n[None, :] <= q_pos[:, None]
            if WINDOW:
                seen = seen & (n[None, :] > q_pos[:, None] - window)
            score = tl.where(seen, score, float("-inf"))
        acc, top, total = _fold(acc, top, total, score, v, scale, cap, CAP, q.dtype)
    return acc, top if CAP else top * scale, total


@triton.jit(do_not_specialize=["n_rows", "splits", "window"])
def _attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, top_ptr, total_ptr, rows_ptr, q_start_ptr, kv_len_ptr, slot_of_ptr, n_rows, splits,
    window, scale, cap, k_stride, v_stride, slot_of_stride, G: tl.constexpr, E: tl.constexpr, RATIO: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, DECODE: tl.constexpr,
    SPLIT: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """Grid (G, q-blocks, splits). KV heads are neighbours, since their elements of a slot are; long tiles start first.

    q and out (T, H, E); k and v (n_slots, G, E), slots k_stride and v_stride apart; the rest as in `Layout`. SPLIT: out
    is (T, H, splits, E) float32, not yet divided; top and total (T, H, splits) float32 are the maximum of the scores in
    base 2 and the sum of the weights, total 0 = this split saw nothing.
    """
    kv_head, split = tl.program_id(0), tl.program_id(2)
    block = tl.num_programs(1) - 1 - tl.program_id(1)
    if DECODE:
        row, q_begin, q_len, first = block, block, 1, 0
    else:
        row = _find_row(q_start_ptr, block, n_rows, BLOCK_Q)
        q_begin = tl.load(q_start_ptr + row)
        q_len = tl.load(q_start_ptr + row + 1) - q_begin
        first = (block - q_begin // BLOCK_Q - row) * BLOCK_Q
        if first >= q_len:
            return
    m, e = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    local = first + m // RATIO  # token of the tile's row, counted within the sequence's tokens of this step
    live = (m < BLOCK_Q * RATIO) & (local < q_len)
    line = (q_begin + local).to(tl.int64) * (G * RATIO) + kv_head * RATIO + m % RATIO  # of (T, H)
    tile = live[:, None] & (e < E)[None, :]
    q = tl.load(q_ptr + line[:, None] * E + e[None, :], mask=tile, other=0.0)

    start_pos = tl.load(kv_len_ptr + row) - q_len
    last_pos = start_pos + tl.minimum(first + BLOCK_Q, q_len) - 1
    key_lo, key_hi = tl.maximum(start_pos + first - window + 1, 0), last_pos + 1  # what some row of the tile sees
    lo, hi = key_lo, key_hi  # this program's share of it
    if SPLIT:
        share = tl.cdiv(tl.cdiv(key_hi - key_lo, BLOCK_N), splits) * BLOCK_N
        lo = key_lo + split * share
        hi = tl.minimum(lo + share, key_hi)
    acc, top, total = _sweep(
        q, start_pos + local, k_ptr + kv_head * E, v_ptr + kv_head * E,
        slot_of_ptr + tl.load(rows_ptr + row) * slot_of_stride, start_pos + first, last_pos, lo, hi,
        window, scale, cap, k_stride, v_stride, E, BLOCK_M, BLOCK_D, BLOCK_N, WINDOW, CAP,
    )  # fmt: skip
    if SPLIT:
        part = line * splits + split
        tl.store(top_ptr + part, top, mask=live)
        tl.store(total_ptr + part, total, mask=live)
        tl.store(out_ptr + part[:, None] * E + e[None, :], acc, mask=tile & (lo < hi))
    else:
        out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + line[:, None] * E + e[None, :], out, mask=tile)


@triton.jit
def _merge_kernel(acc_ptr, top_ptr, total_ptr, out_ptr, E: tl.constexpr, SPLITS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Grid (T * H,). acc (T, H, SPLITS, E), top and total (T, H, SPLITS) float32 -> out (T, H, E)."""
    line = tl.program_id(0).to(tl.int64)
    s, e = tl.arange(0, SPLITS), tl.arange(0, BLOCK_D)
    top = tl.load(top_ptr + line * SPLITS + s)
    total = tl.load(total_ptr + line * SPLITS + s)
    used = total != 0.0  # NaN counts: a poisoned context must show
    weight = tl.where(used, tl.exp2(top - tl.max(tl.where(used, top, float("-inf")), 0)), 0.0)
    tile = used[:, None] & (e < E)[None, :]
    acc = tl.load(acc_ptr + (line * SPLITS + s)[:, None] * E + e[None, :], mask=tile, other=0.0)
    out = tl.sum(acc * weight[:, None], 0) / tl.sum(total * weight, 0)
    tl.store(out_ptr + line * E + e, out.to(out_ptr.dtype.element_ty), mask=e < E)


def attention(
    q: Tensor, kv: LayerKV, layout: Layout, scale: float, window: int | None, soft_cap: float, n_sms: int
) -> Tensor:
    """q (T, H, E) contiguous -> (T, H * E). See `Ops.attention`; n_sms: multiprocessors to fill.

    The slots of the pool may lie any distance apart; a slot's (G, E) elements are contiguous.
    """
    n_tokens, n_heads, dim = q.shape
    n_kv, n_rows = kv.k.shape[1], layout.rows.shape[0]
    out = torch.empty(n_tokens, n_heads * dim, dtype=q.dtype, device=q.device)
    if not n_tokens:
        return out
    context = layout.max_kv if window is None else min(layout.max_kv, window)
    tiles = choose(n_tokens, n_rows, n_heads, n_kv, dim, q.element_size(), layout.max_q, context, n_sms)
    acc, top, total = out, out, out
    if tiles.splits > 1:
        acc = torch.empty(n_tokens, n_heads, tiles.splits, dim, dtype=torch.float32, device=q.device)
        top = torch.empty(n_tokens, n_heads, tiles.splits, dtype=torch.float32, device=q.device)
        total = torch.empty_like(top)
    _attention_kernel[(n_kv, tiles.n_blocks(n_tokens, n_rows), tiles.splits)](
        q, kv.k, kv.v, acc, top, total, layout.rows, layout.q_start, layout.kv_len, layout.slot_of,
        n_rows, tiles.splits, NO_WINDOW if window is None else window, scale * LOG2_E, soft_cap,
        kv.k.stride(0), kv.v.stride(0), layout.slot_of.stride(0),
        G=n_kv, E=dim, RATIO=tiles.ratio, BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_D=tiles.block_d,
        BLOCK_Q=tiles.block_q, DECODE=tiles.decode, SPLIT=tiles.splits > 1, WINDOW=window is not None,
        CAP=soft_cap != 0.0, num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    if tiles.splits > 1:
        _merge_kernel[(n_tokens * n_heads,)](
            acc, top, total, out, E=dim, SPLITS=tiles.splits, BLOCK_D=tiles.block_d, num_warps=4
        )
    return out
