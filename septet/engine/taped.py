"""Steps on the tape that ask for tokens and nothing else: rows' tables in, tokens out, in numpy.

Called by `native.py`. A decode step is one native call (`TapedDecode`): the native side reads and writes the rows'
tables itself, runs the model and draws the tokens (temperature, top-k, top-p, min-p), under the masks of grammars too.
Steps with prompts are laid out here first (`TapedPrompts`). What needs more (penalties, bias, log-probabilities) takes
the logits from here and samples in torch (`taped_torch.py`).

Most steps are decode steps of known rows: `quick` is all of such a step, without an array. A step reads all weights, so
what Python touches between two of them comes from memory, not from a cache.
"""

from __future__ import annotations

from ctypes import addressof, c_int64
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from septet.engine.drawn import NAN_LOGITS, judge
from septet.engine.tables import TABLES
from septet.engine.tries import Tries
from septet.kernels.native.tape import Decode
from septet.kernels.ops import Layout
from septet.step import RowResult, StepResult

if TYPE_CHECKING:
    from collections.abc import Sequence
    from ctypes import Structure

    from septet.engine.constraints import Constraints, Verdict
    from septet.engine.tables import RowInfo, Tables
    from septet.kernels.native.draw import Draw
    from septet.kernels.native.tape import Tape
    from septet.step import PlanRow, StepPlan

__all__ = ["TakenStep", "TapedDecode", "TapedPrompts", "serves", "serves_masked"]


@dataclass(slots=True)
class TakenStep:
    """A step whose tokens are there (`executor.PendingStep`), one for each of its rows."""

    step: int
    rows: Sequence[PlanRow]
    tokens: list[int]
    verdicts: dict[int, Verdict] | None = None  # of grammars, by the number of the row

    def result(self) -> StepResult:
        pairs = zip(self.rows, self.tokens, strict=True)
        if min(self.tokens, default=0) >= 0 and not self.verdicts:
            return StepResult(self.step, tuple([RowResult(row.request, (token,)) for row, token in pairs]))
        rows = [
            RowResult(row.request, (token,)) if token >= 0 else RowResult(row.request, error=NAN_LOGITS)
            for row, token in pairs
        ]
        judge(rows, self.verdicts or {})
        return StepResult(self.step, tuple(rows))


def serves(info: RowInfo | None) -> bool:
    """Can this row's token be drawn here? (None: nobody has joined it.)"""
    return info is not None and info.unadjusted


def serves_masked(info: RowInfo | None) -> bool:
    """The same for a row that may follow a grammar."""
    if info is None:
        return False
    params = info.params
    adjusts = info.penalises or params.logit_bias or params.logprobs is not None
    return info.unadjusted or (params.structured is not None and not adjusts)


class TapedDecode:
    """Steps in which every row computes one token."""

    def __init__(self, tape: Tape, tables: Tables) -> None:
        self.tape = tape
        self.tables = tables
        self.max_rows = len(tables.info)
        self.fill = (c_int64 * self.max_rows * 3)()  # row, start, slot
        self.drawn = (c_int64 * self.max_rows)()  # the tokens of the last step that drew
        # Pages are taken as rows are used; a new array a step would cost a page fault for every 4 KiB of logits.
        self.logits = np.empty((self.max_rows, tape.vocab), dtype=np.float32)
        self.arguments = self._arguments()

    def _arguments(self) -> Structure:
        tables = self.tables
        arrays = {name: getattr(tables, name) for name in TABLES}
        assert all(array.flags.c_contiguous for array in arrays.values())
        row, start, slots = (addressof(line) for line in self.fill)
        return Decode(
            row=row,
            start=start,
            slots=slots,
            stride=tables.tokens.shape[1],
            logits=self.logits.ctypes.data,
            **{name: array.ctypes.data for name, array in arrays.items()},
        )

    def quick(self, plan: StepPlan, limits: Constraints | None = None) -> TakenStep | None:
        """All of a step in which known rows decode and sample and ask for nothing else; None for any other step."""
        return None if plan.joins else self.take(plan, limits)

    def take(self, plan: StepPlan, limits: Constraints | None = None) -> TakenStep | None:
        """The same after the joins and with what the host gives. limits: the grammars of the rows that have one."""
        rows, info, bound = plan.rows, self.tables.info, False
        if len(rows) > self.max_rows:
            return None
        for row in rows:
            if row.n != 1 or row.n_sample != 1 or row.tokens or row.prompt_logprobs or row.pooling:
                return None
            if not serves(info[row.row]):
                if limits is None or not serves_masked(info[row.row]):
                    return None
                bound = True
        if bound and limits is not None:
            return self._bound(plan, Tries(limits, rows))
        self.run(rows, sample=True)
        return TakenStep(plan.step, rows, self.drawn[: len(rows)])

    def _bound(self, plan: StepPlan, tries: Tries) -> TakenStep:
        """With rows that follow a grammar."""
        rows, masks = plan.rows, tries.masks()
        self.run(rows, sample=True, masks=None if masks is None else (masks.words, masks.line))
        tokens = self.drawn[: len(rows)]
        again = tries.refused(tokens)
        for i in tries.given:
            self.tables.tokens[rows[i].row, rows[i].start + 1] = tokens[i]
        if again is not None:
            self._masked(again.words, again.line)
            self.tape.draw_again(self.arguments)
            for i, line in enumerate(again.line.tolist()):
                if line >= 0:
                    tokens[i] = self.drawn[i]
        return TakenStep(plan.step, rows, tokens, tries.verdicts(tokens))

    def run(self, rows: Sequence[PlanRow], sample: bool, masks: tuple[np.ndarray, np.ndarray] | None = None) -> None:
        """One step -> `logits`; with `sample`, tokens are drawn, to `drawn` and to the rows' tables. masks: (words,
        line) as in `Ops.apply_mask`; they are applied to the logits in place."""
        n, (row, start, slot) = len(rows), self.fill
        row[:n] = [one.row for one in rows]
        start[:n] = [one.start for one in rows]
        slot[:n] = [one.slots[0] for one in rows]
        arguments: Any = self.arguments
        arguments.n, arguments.line = n, None
        arguments.sampled = addressof(self.drawn) if sample else None
        if masks is not None:
            self._masked(*masks)
        self.tape.decode(arguments)

    def _masked(self, words: np.ndarray, line: np.ndarray) -> None:
        arguments: Any = self.arguments
        assert words.flags.c_contiguous
        assert 32 * words.shape[1] >= self.tape.vocab
        assert len(line) == arguments.n
        arguments.words, arguments.words_stride = words.ctypes.data, words.shape[1]
        arguments.line = line.ctypes.data


class TapedPrompts:
    """Steps of any rows, each of which samples one token or none."""

    def __init__(self, tape: Tape, tables: Tables, draw: Draw) -> None:
        self.tape = tape
        self.tables = tables
        self.draw = draw

    def take(self, plan: StepPlan) -> TakenStep | None:
        """All of a step after the joins and with what the host gives; None where a row asks for more than a token."""
        for row in plan.rows:
            if row.n_sample > 1 or row.prompt_logprobs or row.pooling:
                return None
            if row.n_sample and not serves(self.tables.info[row.row]):
                return None
        ids, layout = self._lay_out(plan.rows)
        sampling = [i for i, row in enumerate(plan.rows) if row.n_sample]
        if not sampling:
            self.tape.run(ids, layout, None)
            return TakenStep(plan.step, (), [])
        logits = self.tape.run(ids, layout, layout.q_start[1:][sampling] - 1)
        assert logits is not None
        tokens = self._draw(logits, layout.rows[sampling], layout.kv_len[sampling])
        return TakenStep(plan.step, [plan.rows[i] for i in sampling], tokens.tolist())

    def _lay_out(self, rows: Sequence[PlanRow]) -> tuple[np.ndarray, Any]:
        """-> token ids (T,) int64 and the step's `Layout` in arrays; slots are noted in the tables."""
        row, start, n = (np.array(v, dtype=np.int64) for v in zip(*((r.row, r.start, r.n) for r in rows), strict=True))
        slots = np.array([slot for r in rows for slot in r.slots], dtype=np.int64)
        q_start = np.concatenate(([0], n.cumsum()))
        of = np.repeat(np.arange(len(rows)), n)  # (T,) which of the rows
        positions = start[of] + np.arange(len(of)) - q_start[of]
        tables, line = self.tables, row[of]
        tables.slot_of[line, positions] = slots
        arrays: dict[str, Any] = {
            "positions": positions,
            "slots": slots,
            "rows": row,
            "q_start": q_start,
            "kv_len": start + n,
            "slot_of": tables.slot_of,
        }
        layout = Layout(**arrays, max_q=int(n.max()), max_kv=int((start + n).max()))
        return tables.tokens[line, positions].astype(np.int64), layout

    def _draw(self, logits: np.ndarray, row: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """(S,) int64 tokens, also noted in the rows' tables; logits may be overwritten."""
        tables = self.tables
        temperature = tables.temperature[row]
        infos = [tables.info[r] for r in row]
        on = [i for i, info in enumerate(infos) if info is not None and info.filters]
        if on:
            r = row[on]
            logits[on] = self.draw.filter(
                logits[on], temperature[on], tables.top_k[r], tables.top_p[r], tables.min_p[r]
            )
        tokens = self.draw.gumbel(logits, temperature, tables.seed[row], positions)
        tables.tokens[row, positions] = np.maximum(tokens, 0)
        return tokens
