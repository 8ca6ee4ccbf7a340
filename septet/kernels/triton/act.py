"""Gated activation, act(gate) * up, in float32 with one rounding. Called by `TritonOps`."""
# mypy: allow-untyped-defs
# (a kernel's parameters are device pointers and scalars, typed by the launch)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["gated_act"]

BLOCK = 1024


@triton.jit
def _gated_act_kernel(gate_up_ptr, out_ptr, F, GELU: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (T, blocks of F). gate_up (T, 2F) = [gate | up], out (T, F).

    gelu_tanh(x) = x/2 (1 + tanh y) = x sigmoid(2y) with y = sqrt(2/pi) (x + 0.044715 x^3) (arXiv 1606.08415).
    """
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < F
    gate = tl.load(gate_up_ptr + token * 2 * F + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + token * 2 * F + F + at, mask=inside, other=0.0).to(tl.float32)
    if GELU:
        y = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)  # 2 sqrt(2 / pi) (...)
    else:
        y = gate
    out = gate * tl.sigmoid(y) * up
    tl.store(out_ptr + token * F + at, out.to(out_ptr.dtype.element_ty), mask=inside)


def gated_act(gate_up: Tensor, kind: str) -> Tensor:
    """gate_up (T, 2F) contiguous -> (T, F). See `Ops.gated_act`."""
    if kind not in ("silu", "gelu_tanh"):
        raise ValueError(f"kind must be silu or gelu_tanh, not {kind!r}")
    n_tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(n_tokens, width, dtype=gate_up.dtype, device=gate_up.device)
    if n_tokens:
        grid = (n_tokens, triton.cdiv(width, BLOCK))
        _gated_act_kernel[grid](gate_up, out, width, GELU=kind == "gelu_tanh", BLOCK=BLOCK, num_warps=4)
    return out
