"""The gated feed-forward block: down(act(gate(x)) * up(x)) (arXiv 2002.05202).

Built by models, one per layer; the activation is the config's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from septet.layers.linear import Linear, MergedLinear

if TYPE_CHECKING:
    from torch import Tensor

    from septet.layers.build import Build

__all__ = ["GatedMLP"]


class GatedMLP:
    """Pulls `{name}.gate_proj`, `up_proj` and `down_proj`."""

    def __init__(self, build: Build, name: str) -> None:
        config = build.config
        n_hidden, n_inner = config.hidden_size, config.intermediate_size
        names = [f"{name}.gate_proj", f"{name}.up_proj"]
        self.ops = build.ops
        self.activation = config.activation
        self.gate_up = MergedLinear(build, names, n_hidden, [n_inner, n_inner], bias=config.mlp_bias)
        self.down = Linear(build, f"{name}.down_proj", n_inner, n_hidden, bias=config.mlp_bias)

    def __call__(self, x: Tensor) -> Tensor:
        """x (T, D) -> (T, D)."""
        return self.down(self.ops.gated_act(self.gate_up(x), self.activation))
