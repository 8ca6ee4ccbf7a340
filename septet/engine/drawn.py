"""A launched step whose tokens were drawn on the device, and of which nothing else is asked: the usual one.

Made by the runner; `executor.PendingStep`. Kept apart because it is read once a step with hundreds of rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from septet.step import RowResult, StepResult

if TYPE_CHECKING:
    from septet.engine.staging import HostCopy

__all__ = ["NAN_LOGITS", "DrawnStep"]

NAN_LOGITS = "the model produced NaN logits for this request"


@dataclass(slots=True)
class DrawnStep:
    step: int
    requests: list[str]  # of the rows that sample
    tokens: HostCopy  # one for each of them, at least one

    def result(self) -> StepResult:
        tokens = self.tokens.numpy()[: len(self.requests)].tolist()
        rows = [RowResult(request, (token,)) for request, token in zip(self.requests, tokens, strict=True)]
        if tokens and min(tokens) < 0:
            rows = [row if row.tokens[0] >= 0 else RowResult(row.request, error=NAN_LOGITS) for row in rows]
        return StepResult(self.step, tuple(rows))
