"""Llama 1 to 3.x (arXiv 2302.13971, 2407.21783) and Mistral (arXiv 2310.06825), which adds a sliding window.

Made by `models/registry.py`. Llama 3.1's rope scaling and Mistral's windows are values of the config.
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

__all__ = ["Llama"]


class LlamaLayer:
    """Norm, attention, norm, MLP: each block reads the norm of the stream and is added to it."""

    def __init__(self, build: Build, index: int, ropes: RopeTables) -> None:
        name, config = f"model.layers.{index}", build.config
        self.attention_norm = RMSNorm(build, f"{name}.input_layernorm")
        self.attention = Attention(
            build, f"{name}.self_attn", rope=ropes.table(config.rope), window=config.windows[index]
        )
        self.mlp_norm = RMSNorm(build, f"{name}.post_attention_layernorm")
        self.mlp = GatedMLP(build, f"{name}.mlp")

    def __call__(self, x: Tensor, residual: Tensor | None, kv: LayerKV, layout: Layout) -> tuple[Tensor, Tensor]:
        x, residual = self.attention_norm.add(x, residual)
        x = self.attention(x, kv, layout)
        x, residual = self.mlp_norm.add(x, residual)
        return self.mlp(x), residual


class Llama(Decoder):
    def __init__(self, build: Build) -> None:
        super().__init__(build, LlamaLayer)
