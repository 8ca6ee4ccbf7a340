"""The executor that runs plans on a device of this process. Called by the engine loop."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from septet.errors import OutOfMemory

if TYPE_CHECKING:
    from collections.abc import Callable

    from septet.engine.drawn import BoundStep, DrawnStep
    from septet.engine.grammars import Grammars
    from septet.engine.runner import Runner, StepOnDevice
    from septet.step import StepPlan

__all__ = ["LocalExecutor"]

log = logging.getLogger(__name__)


class LocalExecutor:
    """`executor.Executor` over one `Runner`. `depth` 2 overlaps scheduling with an asynchronous device."""

    def __init__(self, runner: Runner, depth: int, on_close: Callable[[], None] = lambda: None) -> None:
        self.runner = runner
        self.depth = depth
        self._on_close = on_close

    def launch(self, plan: StepPlan) -> StepOnDevice | DrawnStep | BoundStep:
        """Where memory runs out: once more without what the allocator keeps. OutOfMemory if that does not help."""
        try:
            return self.runner.run(plan)
        except torch.OutOfMemoryError:
            log.warning("step %d ran out of memory: once more, with an empty cache", plan.step)
        torch.cuda.empty_cache()
        try:
            return self.runner.run(plan)
        except torch.OutOfMemoryError:
            raise OutOfMemory(
                f"a step of {plan.n_tokens} tokens did not fit into the device's memory, and this request had the "
                "largest share of it: send a shorter prompt, or start with a smaller --max-num-batched-tokens"
            ) from None

    def constrain(self, grammars: Grammars, vocab_size: int) -> None:
        """Hold constrained requests to the grammars that are kept there."""
        from septet.engine.constraints import Constraints

        self.runner.constraints = Constraints(grammars, vocab_size, self.runner.staging.device)

    def spare(self, busy: bool) -> bool:
        """Capture steps that were put off at the start."""
        graphs = self.runner.graphs
        if graphs is None:
            return False
        if graphs.due(busy):
            self.runner.finish()  # its logits lie where a capture computes
        return graphs.spare(busy)

    def close(self) -> None:
        self._on_close()
        self.runner.graphs = None
