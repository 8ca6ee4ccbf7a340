"""Decode steps on the tape: rows' tables in, sampled tokens out, one native call.

Called by the runner for steps in which every row computes one token, as `StepGraphs` is on a GPU: the native side
reads and writes the rows' tables itself, runs the model and draws the tokens (temperature, top-k, top-p, min-p), under
the masks of grammars too. What needs more (penalties, bias, log-probabilities) takes the
logits from here and samples in Python.

Most steps ask for nothing else: `quick` is all of such a step, without a tensor. A step reads all weights, so what
Python touches between two of them comes from memory, not from a cache, and each torch op costs tens of microseconds.
"""

from __future__ import annotations

from ctypes import addressof, c_int64
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from septet.engine.drawn import NAN_LOGITS
from septet.kernels.native.tape import Decode
from septet.step import RowResult, StepResult

if TYPE_CHECKING:
    from collections.abc import Sequence
    from ctypes import Structure

    from torch import Tensor

    from septet.engine.constraints import TokenMasks
    from septet.engine.rows import RowInfo, Rows
    from septet.kernels.native.tape import Tape
    from septet.step import PlanRow, StepPlan

__all__ = ["TakenStep", "TapedDecode"]


@dataclass(slots=True)
class Buffers:
    """What `run` gives back; overwritten by the next step."""

    row: Tensor  # (max_rows,) int64
    start: Tensor  # (max_rows,) int64
    logits: Tensor  # (max_rows, V) float32
    tokens: Tensor  # (n,) int64, of this step alone

    def position(self) -> Tensor:
        """(max_rows,) int64: where the tokens stand."""
        return self.start + 1


@dataclass(slots=True)
class TakenStep:
    """A step whose tokens are there (`executor.PendingStep`), one for each of its rows."""

    step: int
    rows: Sequence[PlanRow]
    tokens: list[int]

    def result(self) -> StepResult:
        pairs = zip(self.rows, self.tokens, strict=True)
        if min(self.tokens) >= 0:
            return StepResult(self.step, tuple([RowResult(row.request, (token,)) for row, token in pairs]))
        return StepResult(
            self.step,
            tuple(
                RowResult(row.request, (token,)) if token >= 0 else RowResult(row.request, error=NAN_LOGITS)
                for row, token in pairs
            ),
        )


class TapedDecode:
    def __init__(self, tape: Tape, rows: Rows, max_rows: int) -> None:
        self.tape = tape
        self.rows = rows
        self.max_rows = max_rows
        self.fill = (c_int64 * max_rows * 3)()  # row, start, slot
        self.drawn = (c_int64 * max_rows)()  # the tokens of `quick`
        self.inputs = torch.frombuffer(self.fill, dtype=torch.int64).view(3, max_rows)
        # Pages are taken as rows are used; a new tensor a step would cost a page fault for every 4 KiB of logits.
        self.logits = torch.from_numpy(np.empty((max_rows, tape.vocab), dtype=np.float32))
        self.tokens = torch.empty(0, dtype=torch.int64)  # of the last step
        self.arguments = self._arguments()

    def _arguments(self) -> Structure:
        rows = self.rows
        tables = ("tokens", "slot_of", "temperature", "top_p", "min_p", "top_k", "seed")
        for name in tables:
            assert getattr(rows, name).is_contiguous()
        return Decode(
            row=self.inputs[0].data_ptr(),
            start=self.inputs[1].data_ptr(),
            slots=self.inputs[2].data_ptr(),
            stride=rows.tokens.shape[1],
            logits=self.logits.data_ptr(),
            **{name: getattr(rows, name).data_ptr() for name in tables},
        )

    def find(self, rows: Sequence[PlanRow], decode: bool) -> TapedDecode | None:
        """Itself where it can run these rows; decode: each computes and samples one token."""
        return self if decode and 0 < len(rows) <= self.max_rows else None

    def serves(self, info: RowInfo | None) -> bool:
        """Can `run` draw this row's token itself? (None: nobody has joined it.)"""
        return info is not None and info.unadjusted

    def serves_masked(self, info: RowInfo | None) -> bool:
        """The same under a mask."""
        if info is None:
            return False
        params = info.params
        adjusts = info.penalises or params.logit_bias or params.logprobs is not None
        return info.unadjusted or (params.structured is not None and not adjusts)

    def due(self, busy: bool) -> bool:
        return False

    def spare(self, busy: bool) -> bool:
        """Nothing is put off."""
        return False

    def quick(self, plan: StepPlan) -> TakenStep | None:
        """All of a step in which known rows decode and sample and ask for nothing else; None for any other step."""
        rows, info = plan.rows, self.rows.info
        if plan.joins or len(rows) > self.max_rows:
            return None
        for row in rows:
            if row.n != 1 or row.n_sample != 1 or row.tokens or row.prompt_logprobs or row.pooling:
                return None
            if not self.serves(info[row.row]):
                return None
        self._fill(rows)
        arguments: Any = self.arguments
        arguments.n, arguments.line = len(rows), None
        arguments.sampled = addressof(self.drawn)
        self.tape.decode(arguments)
        return TakenStep(plan.step, rows, self.drawn[: len(rows)])

    def _fill(self, rows: Sequence[PlanRow]) -> None:
        n, (row, start, slot) = len(rows), self.fill
        row[:n] = [one.row for one in rows]
        start[:n] = [one.start for one in rows]
        slot[:n] = [one.slots[0] for one in rows]

    def run(self, rows: Sequence[PlanRow], sample: bool, masks: TokenMasks | None = None) -> Buffers:
        """One step; with `sample`, tokens are drawn and written to the rows' state. Masks are applied to the logits
        in place."""
        n = len(rows)
        self._fill(rows)
        self.tokens = torch.empty(n, dtype=torch.int64)
        arguments: Any = self.arguments
        arguments.n, arguments.line = n, None
        arguments.sampled = self.tokens.data_ptr() if sample else None
        if masks is not None:
            words, line = masks.words, masks.line
            assert words.is_contiguous()
            assert 32 * words.shape[1] >= self.tape.vocab
            assert len(line) == n
            arguments.words, arguments.words_stride = words.data_ptr(), words.shape[1]
            arguments.line = line.data_ptr()
        self.tape.decode(arguments)
        return Buffers(self.inputs[0], self.inputs[1], self.logits, self.tokens)
