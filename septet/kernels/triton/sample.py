"""argmax and Gumbel-max over the vocabulary, in two launches: the best of each block, then the best of the blocks.

Called by `TritonOps`. The rule of both launches: highest value first, lowest index on ties, and a NaN beats everything
as the pair (+inf, -1). The noise is the one that `Ops.gumbel_argmax` defines, so a seed gives the same token here as
in the reference.
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

__all__ = ["argmax", "draw", "gumbel_argmax", "place"]

BLOCK = 2048
NO_INDEX = tl.constexpr(2**31 - 1)


@triton.jit
def _mix(h):
    """MurmurHash3's 32-bit finaliser, on uint32 (products wrap)."""
    h = h ^ (h >> 16)
    h = h * 0x85EBCA6B
    h = h ^ (h >> 13)
    h = h * 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def _best(x, index, inside):
    """x float32, index int32, inside bool, all (BLOCK,) -> the best (value, index) by the module's rule."""
    bad = tl.max(((x != x) & inside).to(tl.int32), 0)
    x = tl.where(inside, x, float("-inf"))
    top = tl.max(tl.where(x != x, float("-inf"), x), 0)
    where = tl.min(tl.where((x == top) & inside, index, NO_INDEX), 0)
    return tl.where(bad > 0, float("inf"), top), tl.where(bad > 0, -1, where)


@triton.jit
def _block_kernel(
    logits_ptr, mask_ptr, line_ptr, temperature_ptr, seeds_ptr, rows_ptr, positions_ptr, value_ptr, index_ptr, V,
    stride, mask_stride, NOISE: tl.constexpr, MASK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid (S, blocks of V). logits (S, V), rows `stride` apart; value float32 and index int32 (S, blocks).

    ROWS: temperature and seeds are of row rows[s]. MASK: see `Ops.apply_mask`.
    """
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < V
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    x = tl.load(logits_ptr + row * stride + at, mask=inside, other=float("-inf")).to(tl.float32)
    if MASK:
        line = tl.load(line_ptr + row)
        word = tl.load(mask_ptr + line * mask_stride + at // 32, mask=inside & (line >= 0), other=-1)
        x = tl.where(((word >> (at % 32)) & 1) == 0, float("-inf"), x)
    if NOISE:
        of = tl.load(rows_ptr + row) if ROWS else row
        temperature = tl.load(temperature_ptr + of)
        if temperature > 0:
            seed = tl.load(seeds_ptr + of)
            high = (seed >> 32).to(tl.uint32) + tl.load(positions_ptr + row).to(tl.uint32) * 0x9E3779B9
            key = _mix(seed.to(tl.uint32) ^ _mix(high))
            h = _mix(key + at.to(tl.uint32) * 0x85EBCA6B)
            u = ((h >> 9).to(tl.float32) + 0.5) * (1.0 / 8388608.0)
            x = tl.div_rn(x, temperature + tl.zeros_like(x)) - tl.log(-tl.log(u))
    top, where = _best(x, at, inside)
    tl.store(value_ptr + row * tl.num_programs(1) + block, top)
    tl.store(index_ptr + row * tl.num_programs(1) + block, where)


@triton.jit
def _merge_kernel(
    value_ptr, index_ptr, out_ptr, rows_ptr, positions_ptr, tokens_ptr, N, tokens_stride, WRITE: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (S,). value and index (S, N) -> out (S,) int64. WRITE: also to tokens[rows[s], positions[s]], 0 for -1."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    if PDL:
        gdc_wait()
    value = tl.load(value_ptr + row * N + at, mask=at < N, other=float("-inf"))
    index = tl.load(index_ptr + row * N + at, mask=at < N, other=NO_INDEX)
    _, where = _best(value, index, at < N)
    tl.store(out_ptr + row, where.to(tl.int64))
    if WRITE:
        to = tl.load(rows_ptr + row) * tokens_stride + tl.load(positions_ptr + row)
        tl.store(tokens_ptr + to, tl.maximum(where, 0).to(tl.int32))


@triton.jit
def _place_kernel(tokens_ptr, slot_of_ptr, rows_ptr, start_ptr, slots_ptr, ids_ptr, length_ptr, R, tokens_stride,
                  slot_of_stride, BLOCK: tl.constexpr):  # fmt: skip
    """Grid (blocks of R). See `Ops.place_write`. Launched the plain way: what follows may overlap (pdl.py)."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < R
    row, start = tl.load(rows_ptr + at, mask=inside, other=0), tl.load(start_ptr + at, mask=inside, other=0)
    slot = tl.load(slots_ptr + at, mask=inside, other=0)
    tl.store(slot_of_ptr + row * slot_of_stride + start, slot.to(tl.int32), mask=inside)
    token = tl.load(tokens_ptr + row * tokens_stride + start, mask=inside, other=0)
    tl.store(ids_ptr + at, token.to(tl.int64), mask=inside)
    tl.store(length_ptr + at, (start + 1).to(tl.int32), mask=inside)


def place(tokens: Tensor, slot_of: Tensor, row: Tensor, start: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """See `Ops.place_write`."""
    n = row.shape[0]
    ids, length = torch.empty_like(row), torch.empty(n, dtype=torch.int32, device=row.device)
    if n:
        _place_kernel[(triton.cdiv(n, 128),)](
            tokens, slot_of, row, start, slots, ids, length, n, tokens.stride(0), slot_of.stride(0), BLOCK=128,
            num_warps=4,
        )  # fmt: skip
    return ids, length


def draw(
    logits: Tensor,
    mask: Tensor,
    line: Tensor,
    temperature: Tensor,
    seeds: Tensor,
    tokens: Tensor,
    row: Tensor,
    positions: Tensor,
    drawn: Tensor,
) -> None:
    """See `Ops.draw_write`."""
    n_rows, vocab = logits.shape
    if not n_rows:
        return
    n_blocks = triton.cdiv(vocab, BLOCK)
    value = torch.empty(n_rows, n_blocks, dtype=torch.float32, device=logits.device)
    index = torch.empty(n_rows, n_blocks, dtype=torch.int32, device=logits.device)
    _block_kernel[(n_rows, n_blocks)](
        logits, mask, line, temperature, seeds, row, positions, value, index, vocab, logits.stride(0), mask.stride(0),
        NOISE=True, MASK=True, ROWS=True, BLOCK=BLOCK, num_warps=4, **launch_options(),
    )  # fmt: skip
    _merge_kernel[(n_rows,)](
        value, index, drawn, row, positions, tokens, n_blocks, tokens.stride(0), WRITE=True,
        BLOCK=triton.next_power_of_2(n_blocks), num_warps=1, **launch_options(),
    )  # fmt: skip


def _choose(logits: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor, noise: bool) -> Tensor:
    n_rows, vocab = logits.shape
    out = torch.empty(n_rows, dtype=torch.int64, device=logits.device)
    if not n_rows:
        return out
    n_blocks = triton.cdiv(vocab, BLOCK)
    value = torch.empty(n_rows, n_blocks, dtype=torch.float32, device=logits.device)
    index = torch.empty(n_rows, n_blocks, dtype=torch.int32, device=logits.device)
    _block_kernel[(n_rows, n_blocks)](
        logits, logits, logits, temperature, seeds, logits, positions, value, index, vocab, logits.stride(0), 0,
        NOISE=noise, MASK=False, ROWS=False, BLOCK=BLOCK, num_warps=4, PDL=False,
    )  # fmt: skip
    _merge_kernel[(n_rows,)](
        value, index, out, out, out, out, n_blocks, 0, WRITE=False, BLOCK=triton.next_power_of_2(n_blocks),
        num_warps=1, PDL=False,
    )  # fmt: skip
    return out


def argmax(logits: Tensor) -> Tensor:
    """logits (S, V), rows contiguous -> (S,) int64. See `Ops.argmax`."""
    return _choose(logits, logits, logits, logits, noise=False)


def gumbel_argmax(logits: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """logits (S, V) float32, temperature (S,) float32, seeds and positions (S,) int64 -> (S,) int64.

    See `Ops.gumbel_argmax`.
    """
    return _choose(logits, temperature, seeds, positions, noise=True)
