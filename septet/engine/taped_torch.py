"""Decode steps on the tape as the runner sees them: `taped.TapedDecode` under torch's name.

Made with the runner, for the first request that asks for more than tokens; stands where `StepGraphs` does on a GPU.
Each tensor here is the memory of an array or a buffer of the tape's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from septet.engine.constraints import Constraints
from septet.engine.forward import TapeForward
from septet.engine.rows import Rows
from septet.engine.staging import Staging
from septet.engine.taped import serves, serves_masked
from septet.kernels.native.ops import NativeOps

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from septet.engine.constraints import TokenMasks
    from septet.engine.grammars import Grammars
    from septet.engine.runner import Runner
    from septet.engine.tables import RowInfo, Tables
    from septet.engine.taped import TapedDecode
    from septet.kernels.native.library import Library, Pool
    from septet.kernels.native.tape import Tape
    from septet.step import PlanRow

__all__ = ["TapedSteps", "constrain", "runner_over"]

CPU = torch.device("cpu")


def runner_over(tape: Tape, tables: Tables, decode: TapedDecode | None, kernels: tuple[Library, Pool, str]) -> Runner:
    """A runner over the memory that the tape computes in."""
    from septet.engine.runner import Runner  # which knows this file's steps

    runner = Runner(TapeForward(tape), NativeOps(*kernels), [], Rows.over(tables), Staging(CPU))
    runner.graphs = None if decode is None else TapedSteps(decode)
    return runner


def constrain(runner: Runner, grammars: Grammars, vocab_size: int) -> None:
    """Hold constrained rows to the grammars that are kept there."""
    runner.constraints = Constraints(grammars, vocab_size, CPU)


@dataclass(slots=True)
class Buffers:
    """What `run` gives back; overwritten by the next step."""

    row: Tensor  # (max_rows,) int64
    start: Tensor  # (max_rows,) int64
    logits: Tensor  # (max_rows, V) float32
    tokens: Tensor  # (n,) int64

    def position(self) -> Tensor:
        """(max_rows,) int64: where the tokens stand."""
        return self.start + 1


class TapedSteps:
    def __init__(self, decode: TapedDecode) -> None:
        self.decode = decode
        self.row, self.start, _ = torch.frombuffer(decode.fill, dtype=torch.int64).view(3, decode.max_rows)
        self.drawn = torch.frombuffer(decode.drawn, dtype=torch.int64)
        self.logits = torch.from_numpy(decode.logits)

    def find(self, rows: Sequence[PlanRow], decode: bool) -> TapedSteps | None:
        """Itself where it can run these rows; decode: each computes and samples one token."""
        return self if decode and 0 < len(rows) <= self.decode.max_rows else None

    def serves(self, info: RowInfo | None) -> bool:
        """Can `run` draw this row's token itself?"""
        return serves(info)

    def serves_masked(self, info: RowInfo | None) -> bool:
        """The same under a mask."""
        return serves_masked(info)

    def due(self, busy: bool) -> bool:
        return False

    def spare(self, busy: bool) -> bool:
        """Nothing is put off."""
        return False

    def run(self, rows: Sequence[PlanRow], sample: bool, masks: TokenMasks | None = None) -> Buffers:
        """One step; with `sample`, tokens are drawn and written to the rows' state. Masks are applied to the logits
        in place."""
        self.decode.run(rows, sample, None if masks is None else (masks.words.numpy(), masks.line.numpy()))
        return Buffers(self.row, self.start, self.logits, self.drawn[: len(rows)])
