"""How a step's logits are computed: the model called op by op, or its native tape.

The runner holds one `Forward`. Made by `engine/build.py`. Knows no plans, rows or sampling.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, cast

from septet.layers.batch import ForwardBatch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from septet.kernels.native.record import TapeOps
    from septet.kernels.native.tape import Tape
    from septet.kernels.ops import LayerKV, Ops
    from septet.models.registry import Model

__all__ = ["EagerForward", "Forward", "TapeForward", "record"]


class Forward(Protocol):
    def run(self, batch: ForwardBatch, wanted: bool) -> Tensor | None:
        """Compute the step, write its keys and values -> (S, V) logits of `batch.logits_at`; None if not `wanted`."""
        ...

    def logits(self, at: Tensor) -> Tensor:
        """at (S,) int64: other tokens of the last step -> (S, V) logits."""
        ...

    def states(self) -> Tensor:
        """(T, D) final hidden states of the last step's tokens, normed; the next step may overwrite them."""
        ...


class EagerForward:
    """The model's own forward over whatever ops it was built with."""

    def __init__(self, model: Model, ops: Ops) -> None:
        self.model = model
        self.ops = ops
        self.hidden: Tensor | None = None

    def run(self, batch: ForwardBatch, wanted: bool) -> Tensor | None:
        self.hidden = self.model.hidden(batch)
        return self.logits(batch.logits_at) if wanted else None

    def logits(self, at: Tensor) -> Tensor:
        assert self.hidden is not None
        return self.model.logits(self.ops.take_rows(self.hidden, at))

    def states(self) -> Tensor:
        assert self.hidden is not None
        return self.hidden


class TapeForward:
    """The recorded model: one native call a step."""

    def __init__(self, tape: Tape) -> None:
        self.tape = tape

    def run(self, batch: ForwardBatch, wanted: bool) -> Tensor | None:
        return self.tape.run(batch.ids, batch.layout, batch.logits_at if wanted else None)

    def logits(self, at: Tensor) -> Tensor:
        return self.tape.logits(at)

    def states(self) -> Tensor:
        return self.tape.hidden()


def record(model: Model, ops: TapeOps, kv: Sequence[LayerKV]) -> Tape:
    """Call the model once with symbols and make the tape of what it did. The model itself is not needed afterwards.

    UnsupportedModel if its forward does something that can't be recorded.
    """
    from septet.kernels.native.record import Recording, Sym
    from septet.kernels.native.tape import Tape

    ops.layers, ops.nodes = kv, []
    ids: Any = Sym("tokens", 0)
    at: Any = Sym("picks", 0)
    layout: Any = None
    hidden = cast("Any", model.hidden(ForwardBatch(ids, layout, list(kv), at)))
    split = len(ops.nodes)
    logits = cast("Any", model.logits(ops.take_rows(hidden, at)))
    return Tape(ops.library, ops.pool, ops.packer.path, Recording(ops.nodes, split, hidden, logits), kv)
