"""How a step's logits are computed: the model called op by op, or its native tape.

The runner holds one `Forward`. Made by `engine/build.py`. Knows no plans, rows or sampling.
"""

from __future__ import annotations

from dataclasses import replace
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

ARRAYS = ("positions", "slots", "rows", "q_start", "kv_len", "slot_of")  # of a `Layout`


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
    """The recorded model, one native call a step, under torch's name: the same memory on both sides."""

    def __init__(self, tape: Tape) -> None:
        self.tape = tape

    def run(self, batch: ForwardBatch, wanted: bool) -> Tensor | None:
        layout = batch.layout
        arrays = {name: getattr(layout, name).numpy() for name in ARRAYS}
        at = batch.logits_at.numpy() if wanted else None
        return _tensor(self.tape.run(batch.ids.numpy(), replace(layout, **arrays), at))

    def logits(self, at: Tensor) -> Tensor:
        return _tensor(self.tape.logits(at.numpy()))

    def states(self) -> Tensor:
        return _tensor(self.tape.hidden())


def _tensor(values: Any) -> Any:
    """None stays None."""
    import torch

    return None if values is None else torch.from_numpy(values)


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
