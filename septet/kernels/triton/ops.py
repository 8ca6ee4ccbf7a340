"""The table of Triton ops: `ReferenceOps` with the hot ones replaced, and fused where a step has few tokens.

Made by engine/build when the device is a GPU; called by layers and the sampler through `Ops`. Every launch is safe
under CUDA graph capture: grids and tile sizes follow from tensor shapes and the host integers of `Layout` alone,
nothing is read back. Products of many rows stay with torch (cuBLAS). Knows no layers, requests or models.

    tokens in the step   products                        what is fused (lazy.py)
    1                    gemv.py: W at memory speed      norm before, activation or residual after
    2 to 128             skinny.py, split over K         activation; the parts are summed by the residual norm
    more                 cuBLAS                          -
    one a row            decode.py                       head norm, rotation, KV write, attention, merge
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch

from septet.kernels.reference import ReferenceOps
from septet.kernels.triton import skinny as some
from septet.kernels.triton.act import gated_act
from septet.kernels.triton.attention import attention
from septet.kernels.triton.decode import decode_attention
from septet.kernels.triton.embed import embed
from septet.kernels.triton.gemv import gemv
from septet.kernels.triton.lazy import Attended, Gated, Normed, Product, Rotated
from septet.kernels.triton.mask import apply_mask
from septet.kernels.triton.norm import add_rms_norm, rms_norm, sum_parts
from septet.kernels.triton.prefix import prefix_attention
from septet.kernels.triton.qkv import qkv_write
from septet.kernels.triton.sample import argmax, draw, gumbel_argmax, place

if TYPE_CHECKING:
    from torch import Tensor

    from septet.kernels.ops import LayerKV, Layout

__all__ = ["TritonOps"]

H100_SMS = 132
COUNTERS = 1 << 16  # rows x KV heads of the largest decode step


class TritonOps(ReferenceOps):
    """`n_sms`: multiprocessors to fill, which decides when attention is split over the context; None = the GPU's.

    fuse: hand out lazy results for small steps. Off, every op is one kernel and returns a tensor.
    """

    name = "triton"

    def __init__(self, n_sms: int | None = None, fuse: bool = True) -> None:
        if n_sms is None:
            on_gpu = torch.cuda.is_available()
            n_sms = torch.cuda.get_device_properties().multi_processor_count if on_gpu else H100_SMS
        self.n_sms = n_sms
        self.fuse = fuse
        self._arrived: Tensor | None = None

    def value(self, x: Tensor) -> Tensor:
        """The tensor of any result of these ops; launches what is still owed."""
        if isinstance(x, torch.Tensor):
            return x
        if isinstance(x, Normed):
            return rms_norm(x.x, x.weight, x.eps)
        if isinstance(x, Product):
            out = self._product(x)
            return sum_parts(out, x.weight.dtype) if out.dim() == 3 else out
        if isinstance(x, Gated):
            return self._gated(x)
        if isinstance(x, Attended):
            return self._attended(x)
        assert isinstance(x, Rotated)
        return qkv_write(self.value(x.qkv), x.kv, x.layout, x.cos_sin, x.q_norm, x.k_norm, x.eps)

    # -- products -----------------------------------------------------------------------------------------------------
    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        rows = x.shape[0]
        if self.fuse and weight.is_contiguous() and rows > 0 and (rows == 1 or some.fits(rows, *weight.shape)):
            if isinstance(x, Attended):
                x = self._attended(x, ahead=weight)
            kept = x if isinstance(x, Normed) and rows == 1 else self.value(x)
            return cast("Tensor", Product(kept, weight, bias))
        return super().linear(self.value(x), weight, bias)

    def _product(self, p: Product, residual: Tensor | None = None, act: str | None = None) -> Tensor:
        """(T, N), or float32 parts (P, T, N). residual and act: for what gemv.py computes (act: skinny.py too)."""
        if p.shape[0] > 1:
            return some.skinny(cast("Tensor", p.x), p.weight, p.bias, act)
        if isinstance(p.x, Normed):
            return gemv(
                p.x.x, p.weight, norm=p.x.weight, eps=p.x.eps, bias=p.bias, residual=residual, act=act
            )  # fmt: skip
        return gemv(p.x, p.weight, bias=p.bias, residual=residual, act=act)

    def _gated(self, g: Gated) -> Tensor:
        return self._product(g.gate_up, act=g.act)

    def gated_act(self, gate_up: Tensor, kind: str) -> Tensor:
        if isinstance(gate_up, Product) and kind in ("silu", "gelu_tanh"):
            return self._gated(Gated(gate_up, kind))
        return gated_act(self.value(gate_up), kind)

    # -- norms and lookups --------------------------------------------------------------------------------------------
    def embed(self, ids: Tensor, table: Tensor, scale: float = 1.0) -> Tensor:
        """As the contract; an id outside of the table gives a row of NaN, which the sampler reports as -1."""
        return embed(ids, table, scale)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = self.value(x)
        return self._normed(x, weight, eps) or rms_norm(x, weight, eps)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        residual = self.value(residual)
        if isinstance(x, Product):
            if x.shape[0] == 1:
                total = self._product(x, residual=residual)
                return cast("Tensor", Normed(total, weight, eps)), total
            x = self._product(x)  # float32 parts are summed by the norm
        return add_rms_norm(self.value(x), residual, weight, eps)

    def _normed(self, x: Tensor, weight: Tensor, eps: float) -> Tensor | None:
        if self.fuse and x.dim() == 2 and x.shape[0] == 1:
            return cast("Tensor", Normed(x, weight, eps))
        return None

    def soft_cap(self, x: Tensor, cap: float) -> Tensor:
        return super().soft_cap(self.value(x), cap)

    def take_rows(self, x: Tensor, index: Tensor) -> Tensor:
        return super().take_rows(self.value(x), index)

    def join(self, parts: list[Tensor]) -> Tensor:
        return super().join([self.value(part) for part in parts])

    def block_linear(self, x: Tensor, blocks: Tensor, kind: str, bias: Tensor | None = None) -> Tensor:
        return super().block_linear(self.value(x), blocks, kind, bias)

    # -- attention ----------------------------------------------------------------------------------------------------
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
        """In a decode step nothing is written before `attention` (or `value`) gets the result."""
        if self.fuse and layout.max_q == 1 and qkv.shape[0] == layout.rows.shape[0] > 0:
            return cast("Tensor", Rotated(qkv, kv, layout, cos_sin, q_norm, k_norm, eps))
        return qkv_write(self.value(qkv), kv, layout, cos_sin, q_norm, k_norm, eps)

    def attention(
        self, q: Tensor, kv: LayerKV, layout: Layout, scale: float, window: int | None = None, soft_cap: float = 0.0
    ) -> Tensor:
        if not isinstance(q, Rotated):
            return attention(self.value(q), kv, layout, scale, window, soft_cap, self.n_sms)
        owed = Attended(q, scale, window, soft_cap)
        return cast("Tensor", owed) if owed.shape[0] == 1 else self._attended(owed)

    def _attended(self, a: Attended, ahead: Tensor | None = None) -> Tensor:
        q = a.q
        qkv = self._product(q.qkv) if isinstance(q.qkv, Product) else q.qkv
        dtype = q.qkv.weight.dtype if isinstance(q.qkv, Product) else qkv.dtype
        prefix = None
        if a.window is None:
            q_norm = q.q_norm if q.k_norm is not None else None
            prefix = prefix_attention(
                qkv, q.kv, q.layout, q.cos_sin, q_norm, q.eps, a.scale, a.soft_cap, dtype, self.n_sms
            )
        return decode_attention(
            qkv, q.kv, q.layout, q.cos_sin, q.q_norm, q.k_norm, q.eps, a.scale, a.window, a.soft_cap, dtype,
            self._counters(qkv.device), self.n_sms, ahead, prefix=prefix,
        )  # fmt: skip

    def _counters(self, device: torch.device) -> Tensor:
        """Zeros that decode.py leaves as it found them. Made once, outside of any capture."""
        if self._arrived is None or self._arrived.device != device:
            self._arrived = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
        return self._arrived

    # -- choosing tokens ----------------------------------------------------------------------------------------------
    def argmax(self, logits: Tensor) -> Tensor:
        return argmax(self.value(logits))

    def apply_mask(self, logits: Tensor, mask: Tensor, line: Tensor) -> Tensor:
        return apply_mask(logits, mask, line)

    def gumbel_argmax(self, logits: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
        return gumbel_argmax(logits, temperature, seeds, positions)

    # -- state of the rows between steps ------------------------------------------------------------------------------
    def place_write(
        self, tokens: Tensor, slot_of: Tensor, row: Tensor, start: Tensor, slots: Tensor
    ) -> tuple[Tensor, Tensor]:
        return place(tokens, slot_of, row, start, slots)

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
        draw(logits, mask, line, temperature, seeds, tokens, row, positions, drawn)
