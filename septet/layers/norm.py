"""RMS normalisation with a learned weight (arXiv 1910.07467), alone or fused with the residual sum before it.

Built by models. A source gives the weight as it multiplies: Gemma's "1 + weight" is folded while loading.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from septet.layers.build import Build

__all__ = ["RMSNorm"]


class RMSNorm:
    """Pulls `{name}.weight` (config.hidden_size,)."""

    def __init__(self, build: Build, name: str) -> None:
        self.ops = build.ops
        self.weight = build.source.vector(f"{name}.weight", (build.config.hidden_size,))
        self.eps = build.config.norm_eps

    def __call__(self, x: Tensor) -> Tensor:
        """x (T, D) -> (T, D)."""
        return self.ops.rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """-> (norm(x + residual), x + residual), both (T, D): the stream goes on, its norm feeds the next block.

        Without a residual (the first layer) the stream is x itself.
        """
        if residual is None:
            return self(x), x
        return self.ops.add_rms_norm(x, residual, self.weight, self.eps)
