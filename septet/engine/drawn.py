"""A launched step whose tokens were drawn on the device, and of which nothing else is asked: the usual one.

Made by the runner; `executor.PendingStep`. Kept apart because it is read once a step with hundreds of rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from septet.step import RowResult, StepResult

if TYPE_CHECKING:
    from septet.engine.constraints import Answer
    from septet.engine.staging import HostCopy

__all__ = ["NAN_LOGITS", "BoundStep", "DrawnStep"]

NAN_LOGITS = "the model produced NaN logits for this request"


@dataclass(slots=True)
class DrawnStep:
    step: int
    requests: list[str]  # of the rows that sample
    tokens: HostCopy  # one for each of them, at least one

    def result(self) -> StepResult:
        return StepResult(self.step, tuple(_rows(self.requests, self.tokens)))


@dataclass(slots=True)
class BoundStep:
    """The same with rows that follow a grammar."""

    step: int
    requests: list[str]
    tokens: HostCopy
    answer: Answer  # what the grammars say of the tokens

    def result(self) -> StepResult:
        rows = _rows(self.requests, self.tokens)
        self.answer.read()
        for i, verdict in self.answer.verdicts().items():
            got = rows[i]
            if got.error is not None:
                continue
            if verdict.error is not None:
                rows[i] = RowResult(got.request, error=verdict.error.message, error_kind=verdict.error.kind)
            else:
                got.forced, got.ended = verdict.forced, verdict.ended
        return StepResult(self.step, tuple(rows))


def _rows(requests: list[str], copy: HostCopy) -> list[RowResult]:
    tokens = copy.numpy()[: len(requests)].tolist()
    rows = [RowResult(request, (token,)) for request, token in zip(requests, tokens, strict=True)]
    if tokens and min(tokens) < 0:
        rows = [row if row.tokens[0] >= 0 else RowResult(row.request, error=NAN_LOGITS) for row in rows]
    return rows
