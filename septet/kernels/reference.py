"""The torch reference of every op: the oracle of the contract tests and the path of machines without fast kernels.

Written to be read beside `ops.py`; correct before fast, but whole-tensor throughout, so that small models are usable.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from septet.kernels import ggml
from septet.kernels.ops import LayerKV, Layout, Ops

__all__ = ["ReferenceOps", "mask_rows"]

_M32 = 0xFFFFFFFF
FEW_WORDS = 256  # of a mask: up to so many with a bit set, tokens are picked out one by one
_BITS = np.arange(32, dtype=np.uint32)

# For each byte of a mask, what to do with the bits of 8 logits: keep them all, or make them those of -inf.
_ALLOWED = (np.arange(256)[:, None] >> np.arange(8)) & 1 == 1
_KEPT = np.where(_ALLOWED, 0xFFFFFFFF, 0).astype(np.uint32)
_FORBIDDEN = np.where(_ALLOWED, 0, 0xFF800000).astype(np.uint32)


def _mix(h: Tensor) -> Tensor:
    """MurmurHash3's 32-bit finaliser on int64 tensors that hold values in 0 .. 2**32 - 1."""
    h = h ^ (h >> 16)
    h = (h * 0x85EBCA6B) & _M32
    h = h ^ (h >> 13)
    h = (h * 0xC2B2AE35) & _M32
    return h ^ (h >> 16)


def gumbel_noise(seeds: Tensor, positions: Tensor, vocab: int) -> Tensor:
    """(S,), (S,) int64 -> (S, V) float32 of standard Gumbel noise, as `Ops.gumbel_argmax` defines it."""
    low, high = seeds & _M32, (seeds >> 32) & _M32
    key = _mix(low ^ _mix((high + positions * 0x9E3779B9) & _M32))
    token = torch.arange(vocab, device=seeds.device, dtype=torch.int64) * 0x85EBCA6B
    h = _mix((key[:, None] + token) & _M32)
    u = ((h >> 9).to(torch.float32) + 0.5) * 2.0**-23  # 24 bits in all: exact, so never 1, whose noise is infinite
    return -torch.log(-torch.log(u))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (T, heads, E), cos and sin (T, 1, E/2) float32 -> rotated in halves, in x's dtype."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class ReferenceOps(Ops):
    name = "reference"

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, weight, bias)

    def block_linear(self, x: Tensor, blocks: Tensor, kind: str, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, ggml.dequantize(blocks, kind, x.dtype), bias)

    def embed(self, ids: Tensor, table: Tensor, scale: float = 1.0) -> Tensor:
        x = F.embedding(ids, table)
        return x if scale == 1.0 else x * torch.tensor(scale, dtype=x.dtype).item()

    def block_embed(self, ids: Tensor, blocks: Tensor, kind: str, dtype: object, scale: float = 1.0) -> Tensor:
        x = ggml.dequantize(blocks[ids], kind, dtype)  # type: ignore[arg-type]
        return x if scale == 1.0 else x * torch.tensor(scale, dtype=x.dtype).item()

    def dequantize(self, blocks: Tensor, kind: str, dtype: object) -> Tensor:
        return ggml.dequantize(blocks, kind, dtype)  # type: ignore[arg-type]

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        f = x.float()
        f = f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + eps)
        return (f * weight.float()).to(x.dtype)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total = x + residual
        return self.rms_norm(total, weight, eps), total

    def gated_act(self, gate_up: Tensor, kind: str) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        if kind == "silu":
            return F.silu(gate) * up
        if kind == "gelu_tanh":
            return F.gelu(gate, approximate="tanh") * up
        raise ValueError(f"kind must be silu or gelu_tanh, not {kind!r}")

    def soft_cap(self, x: Tensor, cap: float) -> Tensor:
        return cap * torch.tanh(x / cap)

    def take_rows(self, x: Tensor, index: Tensor) -> Tensor:
        return x[index]

    def join(self, parts: list[Tensor]) -> Tensor:
        return torch.cat(parts, dim=-1)

    def qkv_write(
        self,
        qkv: Tensor,
        kv: LayerKV,
        layout: Layout,
        cos_sin: Tensor,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        eps: float = 0.0,
    ) -> Tensor:
        n_kv, dim = kv.k.shape[1:]
        heads = qkv.view(qkv.shape[0], -1, dim)
        q, k, v = heads.split([heads.shape[1] - 2 * n_kv, n_kv, n_kv], dim=1)
        if q_norm is not None and k_norm is not None:
            q, k = self.rms_norm(q, q_norm, eps), self.rms_norm(k, k_norm, eps)
        cos, sin = cos_sin[layout.positions].unsqueeze(1).chunk(2, dim=-1)
        kv.k[layout.slots] = _rotate(k, cos, sin).to(kv.k.dtype)
        kv.v[layout.slots] = v.to(kv.v.dtype)
        return _rotate(q, cos, sin)

    def attention(
        self, q: Tensor, kv: LayerKV, layout: Layout, scale: float, window: int | None = None, soft_cap: float = 0.0
    ) -> Tensor:
        if layout.max_q == 1:
            return self._decode(q, kv, layout, scale, window, soft_cap)
        starts, lengths = layout.q_start.tolist(), layout.kv_len.tolist()
        out = torch.empty(q.shape[0], q.shape[1] * q.shape[2], dtype=q.dtype, device=q.device)
        for r, row in enumerate(layout.rows.tolist()):
            lo, hi, length = starts[r], starts[r + 1], lengths[r]
            slots = layout.slot_of[row, :length].long()
            at = torch.arange(length, device=q.device)
            seen = _visible(layout.positions[lo:hi, None], at, window)
            out[lo:hi] = _attend(q[lo:hi].unsqueeze(0), kv.k[slots][None], kv.v[slots][None], seen, scale, soft_cap)
        return out

    def _decode(
        self, q: Tensor, kv: LayerKV, layout: Layout, scale: float, window: int | None, soft_cap: float
    ) -> Tensor:
        """One token a row: rows padded to the longest context, which makes each row its own batch entry."""
        slots = layout.slot_of[layout.rows, : layout.max_kv].long()  # (R, max_kv); beyond kv_len: stale, masked
        at = torch.arange(layout.max_kv, device=q.device)
        seen = _visible(layout.positions[:, None], at, window)[:, None, None, :]
        # Masked places read the row's own first slot: an unused one may hold NaN, which no mask takes out again.
        slots = torch.where(at[None] < layout.kv_len[:, None], slots, slots[:, :1])
        return _attend(q.unsqueeze(1), kv.k[slots], kv.v[slots], seen, scale, soft_cap)

    def argmax(self, logits: Tensor) -> Tensor:
        bad = torch.isnan(logits).any(-1)
        return torch.where(bad, -1, logits.argmax(-1))

    def apply_mask(self, logits: Tensor, mask: Tensor, line: Tensor) -> Tensor:
        if not logits.is_cuda:
            return _masked_on_host(logits, mask, line)
        words = mask[line.clamp(min=0)]
        bits = (words[:, :, None] >> torch.arange(32, device=mask.device, dtype=torch.int32)) & 1
        forbidden = (bits.flatten(1)[:, : logits.shape[1]] == 0) & (line >= 0)[:, None]
        return logits.float().masked_fill(forbidden, float("-inf"))

    def filter_logits(
        self, logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, width: int
    ) -> Tensor:
        vocab = logits.shape[1]
        ranked, ids = (logits / temperature[:, None]).topk(min(width, vocab), dim=-1)
        k = torch.where(top_k > 0, top_k, vocab)
        keep = torch.arange(ranked.shape[1], device=logits.device)[None] < k[:, None]
        prob = torch.softmax(ranked.masked_fill(~keep, float("-inf")), dim=-1)
        keep &= (prob.cumsum(-1) - prob < top_p[:, None]) | (top_p >= 1.0)[:, None]  # 1 = off, whatever sums round to
        keep &= prob >= min_p[:, None] * prob[:, :1]
        best = ids[:, :1]  # entries that fall out are pointed at the best token, whose value is restored after
        kept = torch.full_like(logits, float("-inf")).scatter(1, ids.where(keep, best), logits.gather(1, ids))
        return kept.scatter_(1, best, logits.gather(1, best))

    def gumbel_argmax(self, logits: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
        hot = (temperature > 0)[:, None]
        scaled = logits / torch.where(hot, temperature[:, None], 1.0)
        noisy = torch.where(hot, scaled + gumbel_noise(seeds, positions, logits.shape[1]), scaled)
        return self.argmax(noisy)

    def place_write(
        self, tokens: Tensor, slot_of: Tensor, row: Tensor, start: Tensor, slots: Tensor
    ) -> tuple[Tensor, Tensor]:
        slot_of[row, start] = slots.int()
        return tokens[row, start].long(), (start + 1).int()

    def draw_write(
        self,
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
        masked, positions = self.apply_mask(logits, mask, line), positions.long()
        chosen = self.gumbel_argmax(masked, temperature[row], seeds[row], positions)
        tokens[row, positions] = chosen.clamp(min=0).int()
        drawn[: len(chosen)].copy_(chosen)


def _masked_on_host(logits: Tensor, mask: Tensor, line: Tensor) -> Tensor:
    """`apply_mask` without torch's threads: starting a team of them would cost more than the work."""
    given = logits.float().numpy()
    out = np.empty_like(given)
    mask_rows(given, mask.contiguous().numpy(), line.tolist(), out)
    return torch.from_numpy(out)


def mask_rows(logits: np.ndarray, mask: np.ndarray, lines: list[int], out: np.ndarray) -> None:
    """logits and out (S, V) float32, mask (C, words) int32. Where few tokens are allowed, only these are touched."""
    vocab = logits.shape[1]
    for row, at, to in zip(logits, lines, out, strict=True):
        if at < 0:
            to[:] = row
            continue
        words = mask[at, : (vocab + 31) // 32].view(np.uint32)
        some = np.flatnonzero(words)
        if len(some) <= FEW_WORDS:
            tokens = (32 * some[:, None] + _BITS)[(words[some, None] >> _BITS) & 1 == 1]
            tokens = tokens[tokens < vocab]
            to.fill(-np.inf)
            to[tokens] = row[tokens]
        else:
            groups, target = words.view(np.uint8), to.view(np.uint32)
            np.bitwise_and(row.view(np.uint32), _KEPT[groups].reshape(-1)[:vocab], out=target)
            np.bitwise_or(target, _FORBIDDEN[groups].reshape(-1)[:vocab], out=target)


def _visible(positions: Tensor, at: Tensor, window: int | None) -> Tensor:
    """positions (..., 1), at (L,) -> (..., L) bool: which context positions a query position may see."""
    seen = at <= positions
    return seen if window is None else seen & (at > positions - window)


def _attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, soft_cap: float) -> Tensor:
    """q (B, Q, H, E), k and v (B, L, G, E), seen broadcastable to (B, H, Q, L) -> (B * Q, H * E)."""
    batch, n_q, heads, dim = q.shape
    q, k, v = q.transpose(1, 2), k.to(q.dtype).transpose(1, 2), v.to(q.dtype).transpose(1, 2)
    if soft_cap == 0.0:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=heads != k.shape[1])
    else:
        groups = heads // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        score = soft_cap * torch.tanh((q.float() @ k.float().transpose(-1, -2)) * scale / soft_cap)
        out = score.masked_fill(~seen, float("-inf")).softmax(-1).to(q.dtype) @ v
    return out.transpose(1, 2).reshape(batch * n_q, heads * dim)
