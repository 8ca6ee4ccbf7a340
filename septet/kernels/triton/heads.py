"""What the kernels of a decode step do with heads: read them from the QKV product, rotate, score, fold.

Used by decode.py and prefix.py. Heads are held as two halves, which the rotation pairs; scores are in base 2.
"""
# mypy: allow-untyped-defs
# (a kernel's parameters are device pointers and scalars, typed by the launch)

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["capped", "fold", "keys", "read", "rotated", "score_of"]


@triton.jit
def read(qkv_ptr, line, at, tile, PARTS: tl.constexpr, part_stride, KIND: tl.constexpr):
    """Elements of the QKV product, summed over its float32 parts and rounded as one product would be."""
    if PARTS == 1:
        return tl.load(qkv_ptr + line + at, mask=tile, other=0.0).to(tl.float32)
    x = tl.load(qkv_ptr + line + at, mask=tile, other=0.0)
    for part in tl.static_range(1, PARTS):
        x += tl.load(qkv_ptr + part * part_stride + line + at, mask=tile, other=0.0)
    return x.to(KIND).to(tl.float32)


@triton.jit
def rotated(
    qkv_ptr, line, at, inside, half: tl.constexpr, cos, sin, norm_ptr, eps, E: tl.constexpr, NORM: tl.constexpr,
    PARTS: tl.constexpr, part_stride, KIND: tl.constexpr,
):  # fmt: skip
    """Heads at `line` (heads, 1): both halves (heads, E / 2), normed and rotated, in KIND."""
    a = read(qkv_ptr, line, at, inside, PARTS, part_stride, KIND)
    b = read(qkv_ptr, line, half + at, inside, PARTS, part_stride, KIND)
    if NORM:  # rounded to the compute dtype before the rotation, as the reference does
        inverse = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / E + eps)[:, None]
        a = (a * inverse * tl.load(norm_ptr + at, mask=at < half, other=0.0).to(tl.float32)).to(KIND).to(tl.float32)
        b = (b * inverse * tl.load(norm_ptr + half + at, mask=at < half, other=0.0).to(tl.float32)).to(KIND)
        b = b.to(tl.float32)
    return (a * cos - b * sin).to(KIND), (b * cos + a * sin).to(KIND)


@triton.jit
def keys(k_ptr, v_ptr, slot_of_ptr, start, hi, at, e, k_stride, v_stride, E: tl.constexpr, BLOCK_N: tl.constexpr,
          HOLES: tl.constexpr):  # fmt: skip
    """Keys (both halves) and values of positions start .. min(start + BLOCK_N, hi) - 1, and which these are.

    Beyond: zeros if HOLES, else position hi - 1 again, which there must be; that needs no mask.
    """
    half: tl.constexpr = E // 2
    n = start + tl.arange(0, BLOCK_N)
    here = n < hi
    if HOLES:
        slot = tl.load(slot_of_ptr + n, mask=here, other=0).to(tl.int64)
    else:
        slot = tl.load(slot_of_ptr + tl.minimum(n, hi - 1)).to(tl.int64)
    k_at, v_at = k_ptr + slot[:, None] * k_stride + at, v_ptr + slot[:, None] * v_stride + e
    if HOLES or e.shape[1] != E:
        inside = here[:, None] if HOLES else slot[:, None] >= 0
        tile = inside & (at < half)
        first = tl.load(k_at, mask=tile, other=0.0)
        return first, tl.load(k_at + half, mask=tile, other=0.0), tl.load(v_at, mask=inside & (e < E), other=0.0), here
    return tl.load(k_at), tl.load(k_at + half), tl.load(v_at), here


@triton.jit
def fold(acc, top, total, score, v, KIND: tl.constexpr):
    """Scores (M, N) in base 2, -inf = not seen, and values (N, E) into the softmax state."""
    new_top = tl.maximum(top, tl.max(score, 1))
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    weight = tl.exp2(score - base[:, None])
    fade = tl.exp2(top - base)
    total = total * fade + tl.sum(weight, 1)
    acc = tl.dot(weight.to(KIND), v.to(KIND), acc * fade[:, None], input_precision="ieee")
    return acc, new_top, total


@triton.jit
def score_of(q1, q2, k1, k2, here, scale, cap, CAP: tl.constexpr):
    score = tl.dot(q1, tl.trans(k1).to(q1.dtype), input_precision="ieee")
    score = tl.dot(q2, tl.trans(k2).to(q2.dtype), score, input_precision="ieee") * scale
    if CAP:
        score = capped(score, cap)
    return tl.where(here[None, :], score, float("-inf"))


@triton.jit
def capped(score, cap):
    """cap * tanh(score / cap) in base 2, as attention.py."""
    return cap * 1.4426950408889634 * (1.0 - 2.0 / (tl.exp2(score * (2.0 / cap)) + 1.0))
