"""Token embedding and output head: the two ends of a decoder, which may share one matrix.

Built by `layers/decoder.py`. The matrix is a packed weight like any other, so both ends work on quantised blocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from septet.layers.build import Build

__all__ = ["Embedding", "OutputHead"]


class Embedding:
    """Pulls `{name}.weight` (V, D); rows times `config.embedding_scale`."""

    def __init__(self, build: Build, name: str) -> None:
        self.ops = build.ops
        self.weight = build.source.matrix(f"{name}.weight", (build.config.vocab_size, build.config.hidden_size))
        self.dtype = build.dtype
        self.scale = build.config.embedding_scale

    def __call__(self, ids: Tensor) -> Tensor:
        """ids (T,) int64 -> (T, D)."""
        return self.weight.embed(self.ops, ids, self.dtype, self.scale)


class OutputHead:
    """Hidden states to logits: `lm_head.weight` (V, D), or the embedding's matrix where the model ties them."""

    def __init__(self, build: Build, embedding: Embedding) -> None:
        config = build.config
        self.ops = build.ops
        self.soft_cap = config.logit_softcap
        if config.tie_embeddings:
            self.weight = embedding.weight
        else:
            self.weight = build.source.matrix("lm_head.weight", (config.vocab_size, config.hidden_size))

    def __call__(self, x: Tensor) -> Tensor:
        """x (S, D) -> (S, V) in the compute dtype."""
        logits = self.weight.linear(self.ops, x)
        return self.ops.soft_cap(logits, self.soft_cap) if self.soft_cap else logits
