"""Steps of a fixed shape: named input buffers, the layout made from them on the device, logits, drawn tokens.

What a captured step consists of; `graphs.py` records and replays the two halves, tests call them as they are. Nothing
in here depends on a value of the inputs, only on the shape. Padding writes to the scratch row and to slot 0: a decode
step's surplus rows compute position 0 of it, a chunk's surplus tokens are one row of their own, the last.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from septet.engine.layout import lay_out_decode
from septet.kernels.ops import Layout
from septet.layers.batch import ForwardBatch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from septet.engine.buckets import Shape
    from septet.engine.masked import MaskBuffers
    from septet.engine.rows import Rows
    from septet.kernels.ops import LayerKV, Ops
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
        """(rows,) int32 or int64: where the drawn tokens will stand."""
        raise NotImplementedError


class DecodeStep(StaticStep):
    """Every row computes one token and samples. Inputs: row (R,) | start (R,) | slot (R,) | and, if the shape says so,
    how many positions the rows share (1,)."""

    def __init__(self, machine: Machine, shape: Shape) -> None:
        super().__init__(machine, shape)
        self.row, self.start, self.slots = self.inputs[: 3 * shape.rows].view(3, shape.rows)
        self.shared = self.inputs[3 * shape.rows :] if shape.shared else None
        self.n_shared = 0  # for the next `pack`

    def pack(self, rows: Sequence[PlanRow], out: np.ndarray) -> None:
        n, table = len(rows), out[: 3 * self.shape.rows].reshape(3, -1)
        out[3 * self.shape.rows :] = self.n_shared
        table[0, :n] = [row.row for row in rows]
        table[1, :n] = [row.start for row in rows]
        table[2, :n] = [row.slots[0] for row in rows]
        table[0, n:] = self.machine.rows.scratch
        table[1:, n:] = 0

    def lay_out(self) -> tuple[Tensor, Layout, None]:
        ids, layout = lay_out_decode(
            self.machine.ops, self.machine.rows, self.row, self.start, self.slots, self.shape.max_kv
        )
        layout.shared = self.shared
        self.length = layout.kv_len  # start + 1; kept, so that what `draw` reads is not given to others of the pool
        return ids, layout, None

    def position(self) -> Tensor:
        return self.length


class ChunkStep(StaticStep):
    """Any mix of prompts, chunks and decoding rows; each samples one token or none.

    The layout comes whole from the host, which knows it: on the device it would be a dozen small kernels. Inputs: see
    `_parts`. Row R owns the padding tokens, from position 0 of the scratch row on.
    """

    def __init__(self, machine: Machine, shape: Shape) -> None:
        super().__init__(machine, shape)
        tokens, self.row, self.at, self.ends, short, self.rows = _parts(shape, self.inputs)
        self.q_start, self.kv_len = _bounds(shape, short.view(torch.int32))
        self.token_row, self.positions, self.slots = tokens.view(3, -1)

    def pack(self, rows: Sequence[PlanRow], out: np.ndarray) -> None:
        size, scratch = self.shape.rows, self.machine.rows.scratch
        rows = sorted(rows, key=lambda row: not row.n_sample)
        n, n_sampling = len(rows), sum(1 for row in rows if row.n_sample)
        tokens, sampling, position, ends, short, owners = _parts(self.shape, out)
        q_start, kv_len = _bounds(self.shape, short.view(np.int32))
        owners[:n], owners[n:] = [row.row for row in rows], scratch
        start = np.zeros(size + 1, dtype=np.int64)
        start[:n] = [row.start for row in rows]
        length = np.zeros(size + 1, dtype=np.int64)
        length[:n] = [row.n for row in rows]
        n_tokens = int(length.sum())
        length[size] = self.shape.tokens - n_tokens
        q_start[0], q_start[1:], kv_len[:] = 0, np.cumsum(length), start + length
        sampling[:n_sampling], sampling[n_sampling:] = owners[:n_sampling], scratch
        position[:n_sampling], position[n_sampling:] = kv_len[:n_sampling], 0
        np.maximum(q_start[1 : size + 1] - 1, 0, out=ends)  # a surplus row of no tokens samples its neighbour's
        token_row, positions, slots = tokens.reshape(3, -1)
        token_row[:] = np.repeat(owners, length)
        positions[:] = np.arange(self.shape.tokens) + np.repeat(start - q_start[:-1], length)
        slots[:n_tokens], slots[n_tokens:] = [slot for row in rows for slot in row.slots], 0

    def lay_out(self) -> tuple[Tensor, Layout, Tensor]:
        rows, tokens, max_kv = self.machine.rows, self.shape.tokens, self.shape.max_kv
        ids, _ = self.machine.ops.place_write(rows.tokens, rows.slot_of, self.token_row, self.positions, self.slots)
        layout = Layout(
            self.positions, self.slots, self.rows, self.q_start, self.kv_len, rows.slot_of, tokens, max_kv
        )  # fmt: skip
        return ids, layout, self.ends

    def position(self) -> Tensor:
        return self.at


def _parts(shape: Shape, inputs: Any) -> list[Any]:
    """A chunk's int64 inputs -> token's row, position and slot (3 T,) | row that samples (R,), scratch = none | its
    token's position (R,) | token whose logits it wants (R,) | `_bounds` as int64 | rows (R + 1,)."""
    ends = list(accumulate((3 * shape.tokens, *(shape.rows,) * 3, shape.rows + 2, shape.rows + 1)))
    return [inputs[a:b] for a, b in pairwise((0, *ends))]


def _bounds(shape: Shape, short: Any) -> tuple[Any, Any]:
    """(2 R + 4,) int32 -> q_start (R + 2,), kv_len (R + 1,); one is left over."""
    return short[: shape.rows + 2], short[shape.rows + 2 : 2 * shape.rows + 3]


def static_step(machine: Machine, shape: Shape) -> StaticStep:
    return DecodeStep(machine, shape) if shape.decode else ChunkStep(machine, shape)


def input_length(shape: Shape) -> int:
    return 3 * shape.rows + shape.shared if shape.decode else 5 * shape.rows + 3 + 3 * shape.tokens
