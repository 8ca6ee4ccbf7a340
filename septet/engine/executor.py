"""Who computes a plan: the seam between the scheduler and the machine.

Implementations: `LocalExecutor` (a runner in this process), `EchoExecutor` (no model: tests and engine benchmarks);
later tensor-parallel ranks, pipeline stages and a simulated clock. All receive the same `StepPlan`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from septet.step import StepPlan, StepResult

__all__ = ["Executor", "PendingStep"]


class PendingStep(Protocol):
    def result(self) -> StepResult:
        """Wait for the step and return what it produced. Raises what the step raised."""
        ...


class Executor(Protocol):
    depth: int
    """Steps that may be in flight: 1 = each result is awaited before the next plan, 2 = overlapped scheduling."""

    def launch(self, plan: StepPlan) -> PendingStep:
        """Start a step. Plans are applied in order; a failed launch leaves the rows of that plan undefined."""
        ...

    def spare(self, busy: bool) -> bool:
        """Between steps: do a piece of the work that could wait. With busy False (a pause) at once, else seldom.

        False: nothing is left for a pause.
        """
        ...

    def close(self) -> None: ...
