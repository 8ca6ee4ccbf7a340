"""How many first positions the rows of a decode step have in common: the same slots, so the same keys and values.

Followed by the runner, asked by `graphs.py`: a step over one system prompt or one document reads that once for all
rows (`Layout.shared`). Requests share slots because the KV cache gave them the same prefix; nothing here asks why.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from septet.step import PlanRow, StepPlan

__all__ = ["Sharing"]

MIN_POSITIONS = 256  # fewer do not pay for a kernel of their own
EMPTY = np.zeros(0, dtype=np.int64)


class Sharing:
    """Remembers where the prompts' positions of each row lie; the tokens it samples later are nobody else's yet."""

    def __init__(self) -> None:
        self._slots: dict[int, np.ndarray] = {}  # row: slots of its first positions
        self._asked: list[int] = []
        self._answer = 0

    def follow(self, plan: StepPlan) -> None:
        """A plan that is about to be launched."""
        for join in plan.joins:
            self._slots[join.row] = np.array(join.slots, dtype=np.int64)
            self._asked = []
        for row in plan.rows:
            if row.n > 1 and len(known := self._slots.get(row.row, EMPTY)) == row.start:
                self._slots[row.row] = np.append(known, np.array(row.slots, dtype=np.int64))
                self._asked = []

    def of(self, rows: Sequence[PlanRow]) -> int:
        """Positions 0 .. of - 1 lie in the same slots for all these rows, and each is longer; 0: too few to count."""
        asked = [row.row for row in rows]
        if asked != self._asked:
            self._asked, self._answer = asked, self._common(asked)
        return self._answer

    def _common(self, rows: list[int]) -> int:
        first = self._slots.get(rows[0], EMPTY)
        n = len(first)
        for row in rows[1:]:
            slots = self._slots.get(row, EMPTY)
            n = min(n, len(slots))
            if n < MIN_POSITIONS or slots[MIN_POSITIONS - 1] != first[MIN_POSITIONS - 1]:
                return 0
            different = np.flatnonzero(slots[:n] != first[:n])
            if len(different):
                n = int(different[0])
        return n if n >= MIN_POSITIONS else 0
