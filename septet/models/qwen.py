"""Qwen2, Qwen2.5 (arXiv 2407.10671: bias on q, k and v) and Qwen3 (arXiv 2505.09388: norm on each head of q and k).

Made by `models/registry.py`. The bias is a value of the config; the head norms are the family's.
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

__all__ = ["Qwen2", "Qwen3"]


class Qwen2Layer:
    """Norm, attention, norm, MLP: each block reads the norm of the stream and is added to it."""

    qk_norm = False

    def __init__(self, build: Build, index: int, ropes: RopeTables) -> None:
        name, config = f"model.layers.{index}", build.config
        rope, window = ropes.table(config.rope), config.windows[index]
        self.attention_norm = RMSNorm(build, f"{name}.input_layernorm")
        self.attention = Attention(build, f"{name}.self_attn", rope=rope, window=window, qk_norm=self.qk_norm)
        self.mlp_norm = RMSNorm(build, f"{name}.post_attention_layernorm")
        self.mlp = GatedMLP(build, f"{name}.mlp")

    def __call__(self, x: Tensor, residual: Tensor | None, kv: LayerKV, layout: Layout) -> tuple[Tensor, Tensor]:
        x, residual = self.attention_norm.add(x, residual)
        x = self.attention(x, kv, layout)
        x, residual = self.mlp_norm.add(x, residual)
        return self.mlp(x), residual


class Qwen3Layer(Qwen2Layer):
    qk_norm = True


class Qwen2(Decoder):
    def __init__(self, build: Build) -> None:
        super().__init__(build, Qwen2Layer)


class Qwen3(Decoder):
    def __init__(self, build: Build) -> None:
        super().__init__(build, Qwen3Layer)
