"""Self-attention with grouped heads: projections around the two attention ops.

Built by models, one per layer. Knows heads and windows; nothing of pages, rows or phases (the ops read the layout).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from septet.layers.linear import Linear, MergedLinear

if TYPE_CHECKING:
    from torch import Tensor

    from septet.kernels.ops import LayerKV, Layout
    from septet.layers.build import Build

__all__ = ["Attention"]


class Attention:
    """Pulls `{name}.q_proj`, `k_proj`, `v_proj`, `o_proj` and, with `qk_norm`, `q_norm` and `k_norm` (E,).

    rope (max_len, E) float32: the layer's rotary table. window: tokens a position may see, itself included; None = all.
    """

    def __init__(
        self, build: Build, name: str, *, rope: Tensor, window: int | None = None, qk_norm: bool = False
    ) -> None:
        config, source = build.config, build.source
        n_q, n_kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.ops = build.ops
        self.rope = rope
        self.window = window
        self.scale = config.scale
        self.soft_cap = config.attention_softcap
        self.eps = config.norm_eps
        names = [f"{name}.{part}_proj" for part in "qkv"]
        self.qkv = MergedLinear(build, names, config.hidden_size, [n_q, n_kv, n_kv], bias=config.attention_bias)
        self.out = Linear(build, f"{name}.o_proj", n_q, config.hidden_size, bias=config.attention_out_bias)
        self.q_norm = source.vector(f"{name}.q_norm.weight", (config.head_dim,)) if qk_norm else None
        self.k_norm = source.vector(f"{name}.k_norm.weight", (config.head_dim,)) if qk_norm else None

    def __call__(self, x: Tensor, kv: LayerKV, layout: Layout) -> Tensor:
        """x (T, D) -> (T, D); writes the tokens' keys and values to `kv`."""
        q = self.ops.qkv_write(self.qkv(x), kv, layout, self.rope, self.q_norm, self.k_norm, self.eps)
        return self.out(self.ops.attention(q, kv, layout, self.scale, self.window, self.soft_cap))
