"""The contract of `septet/kernels/ops.py` once more, as slowly and plainly as it can be said: token by token, head by
head, in float64 and Python integers. The oracle of the contract tests; shares no code with any implementation.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from septet.kernels.ops import LayerKV, Layout, Ops

__all__ = ["NaiveOps", "noise"]

M32 = 2**32 - 1


def mix(h: int) -> int:
    """MurmurHash3's fmix32 (Appleby, public domain description)."""
    h ^= h >> 16
    h = h * 0x85EBCA6B & M32
    h ^= h >> 13
    h = h * 0xC2B2AE35 & M32
    return h ^ h >> 16


def noise(seed: int, position: int, token: int) -> float:
    low, high = seed & M32, seed >> 32 & M32
    key = mix(low ^ mix(high + position * 0x9E3779B9 & M32))
    h = mix(key + token * 0x85EBCA6B & M32)
    return -math.log(-math.log(((h >> 9) + 0.5) / 2**23))


def _row_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (D,), weight (D,), float64."""
    return x / math.sqrt(sum(v * v for v in x.tolist()) / len(x) + eps) * weight


class NaiveOps(Ops):
    name = "naive"

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        rows = [[(a * b).sum() for b in weight.double()] for a in x.double()]
        out = torch.tensor(rows, dtype=torch.float64, device=x.device)
        return (out if bias is None else out + bias.double()).to(x.dtype)

    def embed(self, ids: Tensor, table: Tensor, scale: float = 1.0) -> Tensor:
        rounded = torch.tensor(scale).to(table.dtype).double()
        return torch.stack([table[i].double() * rounded for i in ids.tolist()]).to(table.dtype)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return torch.stack([_row_norm(row, weight.double(), eps) for row in x.double()]).to(x.dtype)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total = (x.double() + residual.double()).to(x.dtype)
        return self.rms_norm(total, weight, eps), total

    def gated_act(self, gate_up: Tensor, kind: str) -> Tensor:
        half = gate_up.shape[1] // 2
        gate, up = gate_up[:, :half].double(), gate_up[:, half:].double()
        if kind == "silu":
            return (gate / (1 + torch.exp(-gate)) * up).to(gate_up.dtype)
        inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
        return (0.5 * gate * (1 + torch.tanh(inner)) * up).to(gate_up.dtype)

    def soft_cap(self, x: Tensor, cap: float) -> Tensor:
        return (cap * torch.tanh(x.double() / cap)).to(x.dtype)

    def take_rows(self, x: Tensor, index: Tensor) -> Tensor:
        return torch.stack([x[i] for i in index.tolist()])

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
        n_heads = qkv.shape[1] // dim - 2 * n_kv
        heads = qkv.view(len(qkv), -1, dim).double()
        q = torch.empty(len(qkv), n_heads, dim, dtype=qkv.dtype, device=qkv.device)
        for t, (position, slot) in enumerate(zip(layout.positions.tolist(), layout.slots.tolist(), strict=True)):
            turn = torch.complex(cos_sin[position, : dim // 2].double(), cos_sin[position, dim // 2 :].double())
            for h in range(n_heads + n_kv):
                norm = q_norm if h < n_heads else k_norm
                x = heads[t, h] if norm is None else _row_norm(heads[t, h], norm.double(), eps)
                z = torch.complex(x[: dim // 2], x[dim // 2 :]) * turn
                target = q[t, h] if h < n_heads else kv.k[slot, h - n_heads]
                target.copy_(torch.cat((z.real, z.imag)))
            kv.v[slot] = heads[t, n_heads + n_kv :].to(kv.v.dtype)
        return q

    def attention(
        self, q: Tensor, kv: LayerKV, layout: Layout, scale: float, window: int | None = None, soft_cap: float = 0.0
    ) -> Tensor:
        n_tokens, n_heads, dim = q.shape
        ratio = n_heads // kv.k.shape[1]
        out = torch.empty(n_tokens, n_heads, dim, dtype=q.dtype, device=q.device)
        starts, lengths = layout.q_start.tolist(), layout.kv_len.tolist()
        for r, row in enumerate(layout.rows.tolist()):
            for t in range(starts[r], starts[r + 1]):
                position = lengths[r] - (starts[r + 1] - t)
                first = 0 if window is None else max(0, position - window + 1)
                slots = layout.slot_of[row, first : position + 1].long()
                for h in range(n_heads):
                    score = kv.k[slots, h // ratio].double() @ q[t, h].double() * scale
                    if soft_cap:
                        score = soft_cap * torch.tanh(score / soft_cap)
                    weight = torch.exp(score - score.max())
                    out[t, h] = (weight / weight.sum()) @ kv.v[slots, h // ratio].double()
        return out.view(n_tokens, n_heads * dim)

    def argmax(self, logits: Tensor) -> Tensor:
        return torch.tensor([_best(row) for row in logits.tolist()], device=logits.device)

    def gumbel_argmax(self, logits: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
        chosen = []
        for row, t, s, p in zip(logits.tolist(), temperature.tolist(), seeds.tolist(), positions.tolist(), strict=True):
            chosen.append(_best([x / t + noise(s, p, v) for v, x in enumerate(row)] if t > 0 else row))
        return torch.tensor(chosen, device=logits.device)


def _best(row: list[float]) -> int:
    if any(math.isnan(x) for x in row):
        return -1
    return max(range(len(row)), key=lambda i: (row[i], -i))
