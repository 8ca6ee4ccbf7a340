"""Steps of a fixed shape: named input buffers, the layout made from them on the device, logits, drawn tokens.

What a captured step consists of; `graphs.py` records and replays the two halves, tests call them as they are. Nothing
in here depends on a value of the inputs, only on the shape. Padding writes to the scratch row and to slot 0: a decode
step's surplus rows compute position 0 of it, a chunk's surplus tokens are one row of their own, the last.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from septet.engine.layout import lay_out, lay_out_decode
from septet.layers.batch import ForwardBatch

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from torch import Tensor

    from septet.engine.buckets import Shape
    from septet.engine.masked import MaskBuffers
    from septet.engine.rows import Rows
    from septet.kernels.ops import LayerKV, Layout, Ops
    from septet.models.registry import Model
    from septet.step import PlanRow

__all__ = ["ChunkStep", "DecodeStep", "Machine", "StaticStep", "input_length", "static_step"]


@dataclass(frozen=True, slots=True)
class Machine:
    """What a step computes with, and where its inputs and tokens lie: buffers that all steps share, one at a time."""

    model: Model
    ops: Ops
    kv: list[LayerKV]
    rows: Rows
    inputs: Tensor  # (longest input,) int64
    tokens: Tensor  # (max_rows,) int64
    masks: MaskBuffers


class StaticStep:
    """One shape. `forward`, then `draw`; `pack` says what the inputs must be for some plan rows.

    Rows that sample come first: entry i of `row`, `position()`, logits and tokens belongs to the i-th row of the plan
    that samples.
    """

    row: Tensor  # (rows,) int64: whose sampling values count, and whose tokens are written
    logits: Tensor  # (rows, V), since the last `forward`

    def __init__(self, machine: Machine, shape: Shape) -> None:
        self.machine = machine
        self.shape = shape
        self.inputs = machine.inputs[: input_length(shape)]

    def pack(self, rows: Sequence[PlanRow], out: np.ndarray) -> None:
        """The inputs of a step of these rows, padding included, into `out` (length of `inputs`) int64."""
        raise NotImplementedError

    def lay_out(self) -> tuple[Tensor, Layout, Tensor | None]:
        """-> ids, layout, which tokens' logits are wanted (None: of all)."""
        raise NotImplementedError

    def forward(self) -> None:
        machine = self.machine
        ids, layout, at = self.lay_out()
        if at is None:
            self.logits = machine.model.decode(ForwardBatch(ids, layout, machine.kv, layout.rows))
        else:
            self.logits = machine.model.forward(ForwardBatch(ids, layout, machine.kv, at))

    def draw(self) -> None:
        """Sample by temperature, seed and `masks` alone; the tokens go to `machine.tokens` and to the rows' state."""
        machine, rows, row, position = self.machine, self.machine.rows, self.row, self.position()
        words, line = machine.masks.lines(*self.logits.shape)
        machine.ops.draw_write(
            self.logits, words, line, rows.temperature, rows.seed, rows.tokens, row, position, machine.tokens
        )

    @property
    def tokens(self) -> Tensor:
        """(max_rows,) int64: what `draw` has drawn."""
        return self.machine.tokens

    def position(self) -> Tensor:
        """(rows,) int64: where the drawn tokens will stand."""
        raise NotImplementedError


class DecodeStep(StaticStep):
    """Every row computes one token and samples. Inputs: row (R,) | start (R,) | slot (R,)."""

    def __init__(self, machine: Machine, shape: Shape) -> None:
        super().__init__(machine, shape)
        self.row, self.start, self.slots = self.inputs.view(3, shape.rows)

    def pack(self, rows: Sequence[PlanRow], out: np.ndarray) -> None:
        n, table = len(rows), out.reshape(3, -1)
        table[0, :n] = [row.row for row in rows]
        table[1, :n] = [row.start for row in rows]
        table[2, :n] = [row.slots[0] for row in rows]
        table[0, n:] = self.machine.rows.scratch
        table[1:, n:] = 0

    def lay_out(self) -> tuple[Tensor, Layout, None]:
        ids, layout = lay_out_decode(
            self.machine.ops, self.machine.rows, self.row, self.start, self.slots, self.shape.max_kv
        )
        return ids, layout, None

    def position(self) -> Tensor:
        return self.start + 1


class ChunkStep(StaticStep):
    """Any mix of prompts, chunks and decoding rows; each samples one token or none.

    Inputs: row (R + 1,) | start (R + 1,) | n (R + 1,) | row that samples (R,), scratch = none | position (R,) |
    slot (T,). Row R owns the padding tokens: n of them, from position 0 of the scratch row.
    """

    def __init__(self, machine: Machine, shape: Shape) -> None:
        super().__init__(machine, shape)
        n = shape.rows
        table, self.slots = self.inputs.split([5 * n + 3, shape.tokens])
        self.rows, self.start, self.n, self.row, self.at = table.split([n + 1, n + 1, n + 1, n, n])

    def pack(self, rows: Sequence[PlanRow], out: np.ndarray) -> None:
        size, scratch = self.shape.rows, self.machine.rows.scratch
        rows = sorted(rows, key=lambda row: not row.n_sample)
        n, n_sampling = len(rows), sum(1 for row in rows if row.n_sample)
        table, slots = out[: 3 * size + 3].reshape(3, size + 1), out[5 * size + 3 :]
        table[0, :n] = [row.row for row in rows]
        table[1, :n] = [row.start for row in rows]
        table[2, :n] = [row.n for row in rows]
        table[0, n:] = scratch
        table[1:, n:] = 0
        sampling, position = out[3 * size + 3 : 5 * size + 3].reshape(2, size)
        sampling[:n_sampling], sampling[n_sampling:] = table[0, :n_sampling], scratch
        position[:n_sampling], position[n_sampling:] = (table[1] + table[2])[:n_sampling], 0
        flat = [slot for row in rows for slot in row.slots]
        slots[: len(flat)], slots[len(flat) :] = flat, 0
        table[2, size] = len(slots) - len(flat)

    def lay_out(self) -> tuple[Tensor, Layout, Tensor]:
        tokens, max_kv = self.shape.tokens, self.shape.max_kv
        ids, layout = lay_out(self.machine.rows, self.rows, self.start, self.n, self.slots, tokens, max_kv)
        ends = layout.q_start[1:-1].long()  # a surplus row of no tokens samples its neighbour's
        return ids, layout, (ends - 1).clamp(min=0)

    def position(self) -> Tensor:
        return self.at


def static_step(machine: Machine, shape: Shape) -> StaticStep:
    return DecodeStep(machine, shape) if shape.decode else ChunkStep(machine, shape)


def input_length(shape: Shape) -> int:
    return 3 * shape.rows if shape.decode else 5 * shape.rows + 3 + shape.tokens
