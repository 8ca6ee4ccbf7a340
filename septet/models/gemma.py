"""Gemma 3, text (arXiv 2503.19786): norms before and after each block, head norms, local and global layers.

Made by `models/registry.py`. Five layers of six see a sliding window and rotate with their own base; the embedding is
scaled by sqrt(D), the gate is tanh-GELU: values of the config.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from septet.layers.attention import Attention
from septet.layers.decoder import Decoder
from septet.layers.mlp import GatedMLP
from septet.layers.norm import RMSNorm

if TYPE_CHECKING:
    from torch import Tensor

    from septet.kernels.ops import LayerKV, Layout
    from septet.layers.build import Build
    from septet.layers.rope import RopeTables

__all__ = ["Gemma3"]


class Gemma3Layer:
    """Each block reads the norm of the stream, and its own norm is added to it."""

    def __init__(self, build: Build, index: int, ropes: RopeTables) -> None:
        name, config = f"model.layers.{index}", build.config
        window = config.windows[index]
        rope = config.rope if window is None else config.rope_local or config.rope
        self.attention_norm = RMSNorm(build, f"{name}.input_layernorm")
        self.attention = Attention(build, f"{name}.self_attn", rope=ropes.table(rope), window=window, qk_norm=True)
        self.attention_out_norm = RMSNorm(build, f"{name}.post_attention_layernorm")
        self.mlp_norm = RMSNorm(build, f"{name}.pre_feedforward_layernorm")
        self.mlp = GatedMLP(build, f"{name}.mlp")
        self.mlp_out_norm = RMSNorm(build, f"{name}.post_feedforward_layernorm")

    def __call__(self, x: Tensor, residual: Tensor | None, kv: LayerKV, layout: Layout) -> tuple[Tensor, Tensor]:
        x, residual = self.attention_norm.add(x, residual)
        x = self.attention_out_norm(self.attention(x, kv, layout))
        x, residual = self.mlp_norm.add(x, residual)
        return self.mlp_out_norm(self.mlp(x)), residual


class Gemma3(Decoder):
    def __init__(self, build: Build) -> None:
        super().__init__(build, Gemma3Layer)
