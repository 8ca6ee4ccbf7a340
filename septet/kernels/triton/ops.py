"""The table of Triton ops: `ReferenceOps` with the hot ones replaced.

Made by engine/build when the device is a GPU; called by layers and the sampler through `Ops`. Every launch is safe
under CUDA graph capture: grids and tile sizes follow from tensor shapes and the host integers of `Layout` alone,
nothing is read back. Matrix products of dense weights stay with torch (cuBLAS). Knows no layers, requests or models.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from septet.kernels.reference import ReferenceOps
from septet.kernels.triton.act import gated_act
from septet.kernels.triton.attention import attention
from septet.kernels.triton.embed import embed
from septet.kernels.triton.mask import apply_mask
from septet.kernels.triton.norm import add_rms_norm, rms_norm
from septet.kernels.triton.qkv import qkv_write
from septet.kernels.triton.sample import argmax, gumbel_argmax

if TYPE_CHECKING:
    from septet.kernels.ops import LayerKV, Layout

__all__ = ["TritonOps"]

H100_SMS = 132


class TritonOps(ReferenceOps):
    """`n_sms`: multiprocessors to fill, which decides when attention is split over the context; None = the GPU's."""

    name = "triton"

    def __init__(self, n_sms: int | None = None) -> None:
        if n_sms is None:
            on_gpu = torch.cuda.is_available()
            n_sms = torch.cuda.get_device_properties().multi_processor_count if on_gpu else H100_SMS
        self.n_sms = n_sms

    def embed(self, ids: Tensor, table: Tensor, scale: float = 1.0) -> Tensor:
        """As the contract; an id outside of the table gives a row of NaN, which the sampler reports as -1."""
        return embed(ids, table, scale)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rms_norm(x, weight, eps)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return add_rms_norm(x, residual, weight, eps)

    def gated_act(self, gate_up: Tensor, kind: str) -> Tensor:
        return gated_act(gate_up, kind)

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
        return qkv_write(qkv, kv, layout, cos_sin, q_norm, k_norm, eps)

    def attention(
        self, q: Tensor, kv: LayerKV, layout: Layout, scale: float, window: int | None = None, soft_cap: float = 0.0
    ) -> Tensor:
        return attention(q, kv, layout, scale, window, soft_cap, self.n_sms)

    def argmax(self, logits: Tensor) -> Tensor:
        return argmax(logits)

    def apply_mask(self, logits: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
        return apply_mask(logits, mask, rows)

    def gumbel_argmax(self, logits: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
        return gumbel_argmax(logits, temperature, seeds, positions)
