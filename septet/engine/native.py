"""The executor of the native kernels: steps on the tape, in numpy. Called by the engine loop.

torch is not imported for tokens alone, whatever their temperature, top-k, top-p and min-p. A request that asks for more
(`asks_more`) brings it in, and the `Runner` over the same memory, which takes its steps from then on.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from septet.engine.tables import RowInfo
from septet.engine.taped import TapedDecode, TapedPrompts
from septet.kernels.native.draw import Draw

if TYPE_CHECKING:
    from septet.engine.drawn import BoundStep, DrawnStep
    from septet.engine.grammars import Grammars
    from septet.engine.runner import Runner, StepOnDevice
    from septet.engine.tables import Tables
    from septet.engine.taped import TakenStep
    from septet.kernels.native.library import Library, Pool
    from septet.kernels.native.tape import Tape
    from septet.request import Request
    from septet.step import StepPlan

__all__ = ["NativeExecutor", "asks_more", "import_torch"]


def asks_more(request: Request) -> bool:
    """Whether the request needs more than tokens that the tape can draw: penalties, a bias, `min_tokens`, a grammar,
    log-probabilities, hidden states."""
    params = request.params
    plain = RowInfo(params, len(request.tokens), ()).unadjusted
    return not plain or params.prompt_logprobs is not None or bool(request.pooling)


def import_torch() -> None:
    """All that the runner will need, in any thread."""
    import_module("septet.engine.runner")


class NativeExecutor:
    """`executor.Executor` over one tape and the tables of its rows."""

    def __init__(
        self,
        tape: Tape,
        tables: Tables,
        kernels: tuple[Library, Pool, str],
        *,
        depth: int = 1,
        enforce_eager: bool = False,
    ) -> None:
        """kernels: the library, its threads and the path, to draw with. enforce_eager: decode steps are laid out like
        any others."""
        self.depth = depth
        self.tape = tape
        self.tables = tables
        self.decode = None if enforce_eager else TapedDecode(tape, tables)
        self.prompts = TapedPrompts(tape, tables, Draw(*kernels))
        self._kernels = kernels
        self._runner: Runner | None = None
        self._grammars: tuple[Grammars, int] | None = None

    @property
    def runner(self) -> Runner:
        """For steps that need torch; made when it is first asked for."""
        if self._runner is None:
            from septet.engine.taped_torch import constrain, runner_over

            self._runner = runner_over(self.tape, self.tables, self.decode, self._kernels)
            if self._grammars is not None:
                constrain(self._runner, *self._grammars)
        return self._runner

    def launch(self, plan: StepPlan) -> TakenStep | StepOnDevice | DrawnStep | BoundStep:
        limits = self._runner.constraints if self._runner is not None else None
        taken = self.decode.quick(plan, limits) if self.decode is not None else None
        if taken is not None:
            return taken
        self.tables.join(plan.joins)
        self.tables.write(plan.rows)
        if self._runner is not None or any(join.params.structured is not None for join in plan.joins):
            self.runner.follow(plan.joins)
            limits = self.runner.constraints
        if self.decode is not None:
            taken = self.decode.take(plan, limits)
        if taken is None:
            taken = self.prompts.take(plan)
        return self.runner.joined(plan) if taken is None else taken

    def constrain(self, grammars: Grammars, vocab_size: int) -> None:
        """Hold constrained requests to the grammars that are kept there."""
        self._grammars = grammars, vocab_size

    def spare(self, busy: bool) -> bool:
        """Nothing is put off."""
        return False

    def close(self) -> None:
        """The memory goes with the last reference."""
