"""The trunk that every decoder-only family shares: embed, run the layers, norm, head.

Models derive from `Decoder` and bring their layer. What passes between layers is a pair: `x`, the last block's output
that is not yet added, and `residual`, the stream without it; so that each sum is fused with the norm that follows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from septet.layers.embedding import Embedding, OutputHead
from septet.layers.norm import RMSNorm
from septet.layers.rope import RopeTables

if TYPE_CHECKING:
    from torch import Tensor

    from septet.kernels.ops import LayerKV, Layout
    from septet.layers.batch import ForwardBatch
    from septet.layers.build import Build

__all__ = ["Decoder", "Layer"]


class Layer(Protocol):
    """One transformer layer."""

    def __init__(self, build: Build, index: int, ropes: RopeTables) -> None: ...

    def __call__(self, x: Tensor, residual: Tensor | None, kv: LayerKV, layout: Layout) -> tuple[Tensor, Tensor]:
        """x, residual (T, D); residual None in the first layer -> the same pair after this layer."""
        ...


class Decoder:
    """A decoder-only transformer of `config.num_layers` layers of one class."""

    def __init__(self, build: Build, layer: type[Layer]) -> None:
        ropes = RopeTables(build)
        self.ops = build.ops
        self.embedding = Embedding(build, "model.embed_tokens")
        self.layers = [layer(build, index, ropes) for index in range(build.config.num_layers)]
        self.norm = RMSNorm(build, "model.norm")
        self.head = OutputHead(build, self.embedding)

    def hidden(self, batch: ForwardBatch) -> Tensor:
        """(T, D) final hidden states, normed, of every token of the step; writes the step's keys and values."""
        return self.ops.value(self._trunk(batch))

    def _trunk(self, batch: ForwardBatch) -> Tensor:
        """As `hidden`, but the last norm may still be owed (`Ops.value`), for the head to apply."""
        x, residual = self.embedding(batch.ids), None
        for layer, kv in zip(self.layers, batch.kv, strict=True):
            x, residual = layer(x, residual, kv, batch.layout)
        return self.norm.add(x, residual)[0]

    def forward(self, batch: ForwardBatch) -> Tensor:
        """(S, V) next-token logits of `batch.logits_at`, in the compute dtype."""
        return self.logits(self.ops.take_rows(self.hidden(batch), batch.logits_at))

    def decode(self, batch: ForwardBatch) -> Tensor:
        """(T, V) next-token logits of every token of the step, in the compute dtype."""
        return self.logits(self._trunk(batch))

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (S, D) of `hidden(batch)` -> (S, V) next-token logits, in the compute dtype."""
        return self.ops.value(self.head(hidden))
