"""Pooled hidden states of prompts, gathered over the steps that compute them.

Called by the runner for steps with rows that have `PlanRow.pooling`. Holds a sum per row, so that a prompt may be cut
into steps anywhere; a row begins anew at position 0. Knows no scheduling.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from septet.step import PlanRow

__all__ = ["Pooling"]


class Pooling:
    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}  # row -> (D,) float32 over its positions so far

    def add(self, rows: Sequence[PlanRow], states: Callable[[], Tensor]) -> list[tuple[str, Tensor]]:
        """Take in a step; `states` gives its (T, D) hidden states -> (request, (D,) float32) of prompts that end."""
        hidden, lo, ended = states(), 0, []
        for row in rows:
            if row.pooling:
                pooled = self._pooled(row, hidden[lo : lo + row.n])
                if row.n_sample:
                    self._sums.pop(row.row, None)
                    ended.append((row.request, pooled))
            lo += row.n
        return ended

    def _pooled(self, row: PlanRow, hidden: Tensor) -> Tensor:
        """What is known after this row's part: the mean so far, or the last state."""
        if row.pooling == "last":
            return hidden[-1].float().clone()
        total = hidden.sum(0, dtype=torch.float32)
        if row.start > 0:
            total += self._sums[row.row]
        self._sums[row.row] = total
        return total / (row.start + row.n)
