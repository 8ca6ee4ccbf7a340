"""Runs a `StepPlan` on one device, in torch: state of the rows, layout, forward, sampling.

Called by `LocalExecutor`, and by `NativeExecutor` for steps that ask for more than tokens. Every sampled token is
written back to the row's state on the device before the step returns, so the next plan may be launched without waiting.
What the host needs travels to it asynchronously (`StepOnDevice`). Knows no scheduling.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from septet.engine.drawn import BoundStep, DrawnStep
from septet.engine.layout import lay_out, lay_out_decode
from septet.engine.pooling import Pooling
from septet.engine.sampler import Pick, Sampled, TopLogprobs, sample, top_logprobs
from septet.engine.staging import HostCopy
from septet.engine.taped_torch import TapedSteps
from septet.layers.batch import ForwardBatch
from septet.step import Logprobs, RowResult, StepResult

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from septet.engine.common import Sharing
    from septet.engine.constraints import Answer, Constraints, Filling, TokenMasks
    from septet.engine.forward import Forward
    from septet.engine.graphs import Captured, StepGraphs
    from septet.engine.rows import Rows
    from septet.engine.staging import Staging
    from septet.engine.static import StaticStep
    from septet.engine.taped_torch import Buffers
    from septet.kernels.ops import LayerKV, Ops
    from septet.step import Join, PlanRow, StepPlan

__all__ = ["Runner", "StepOnDevice"]

LOGPROB_ROWS = 64  # prompt positions whose logits are held at once


class LogprobsCopy:
    """`TopLogprobs` on its way to the host."""

    def __init__(self, top: TopLogprobs) -> None:
        self.parts = [HostCopy(t) for t in (top.chosen, top.rank, top.values, top.ids)]

    def read(self, index: int, token: int, k: int) -> Logprobs:
        chosen, rank, values, ids = (part.numpy() for part in self.parts)
        top = tuple((int(t), float(v)) for t, v in zip(ids[index, :k], values[index, :k], strict=True))
        return Logprobs(token, float(chosen[index]), int(rank[index]), top)


@dataclass(slots=True)
class PromptPart:
    """Log-probabilities of one row's prompt positions, in slices."""

    request: str
    tokens: HostCopy  # (m,) the prompt tokens at those positions
    slices: list[LogprobsCopy]
    k: int

    def read(self) -> tuple[Logprobs, ...]:
        tokens = self.tokens.numpy()
        return tuple(
            self.slices[i // LOGPROB_ROWS].read(i % LOGPROB_ROWS, int(token), self.k) for i, token in enumerate(tokens)
        )


@dataclass(slots=True)
class PooledPart:
    """One row's pooled hidden states."""

    request: str
    values: HostCopy  # (D,) float32

    def read(self) -> bytes:
        return self.values.numpy().astype("<f4").tobytes()


@dataclass(slots=True)
class StepOnDevice:
    """A launched step (`executor.PendingStep`)."""

    step: int
    picks: list[tuple[str, Pick]]
    tokens: HostCopy | None
    logprobs: LogprobsCopy | None
    prompts: list[PromptPart]
    answer: Answer | None = None  # what the grammars say of the tokens
    pools: list[PooledPart] = field(default_factory=list)

    def result(self) -> StepResult:
        prompts = {part.request: part.read() for part in self.prompts}
        sampled: dict[str, list[int]] = {}
        logprobs: dict[str, list[Logprobs]] = {}
        tokens = self.tokens.numpy().tolist() if self.tokens is not None else []
        for i, (request, pick) in enumerate(self.picks):
            sampled.setdefault(request, []).append(tokens[i])
            k = pick.info.params.logprobs
            if k is not None and self.logprobs is not None:
                logprobs.setdefault(request, []).append(self.logprobs.read(i, tokens[i], k))
        pools = {part.request: part.read() for part in self.pools}
        requests = dict.fromkeys((*sampled, *prompts))
        results = [_row_result(r, sampled.get(r, []), tuple(logprobs.get(r, ())), prompts.get(r, ())) for r in requests]
        for got in results:
            if got.error is None:
                got.pooled = pools.get(got.request, b"")
        return StepResult(self.step, tuple(results if self.answer is None else self._judged(self.answer, results)))

    def _judged(self, answer: Answer, results: list[RowResult]) -> list[RowResult]:
        """The results with what their grammars say."""
        answer.read()
        verdicts = {self.picks[i][0]: verdict for i, verdict in answer.verdicts().items()}
        for k, got in enumerate(results):
            verdict = verdicts.get(got.request)
            if verdict is None or got.error is not None:
                continue
            got.forced, got.ended = verdict.forced, verdict.ended
            if verdict.error is not None:
                results[k] = RowResult(got.request, error=verdict.error.message, error_kind=verdict.error.kind)
        return results


def _row_result(
    request: str, tokens: list[int], logprobs: tuple[Logprobs, ...], prompt: tuple[Logprobs, ...]
) -> RowResult:
    if any(token < 0 for token in tokens):
        return RowResult(request, error="the model produced NaN logits for this request")
    return RowResult(request, tuple(tokens), logprobs, prompt)


@dataclass(frozen=True, slots=True)
class Sent:
    """A plan on the device: (R,) row, start, n; (T,) slots; (S,) where logits are wanted, and for whom."""

    row: Tensor
    start: Tensor
    n: Tensor
    slots: Tensor
    logits_at: Tensor
    pick_row: Tensor
    pick_position: Tensor


def _kind(rows: Sequence[PlanRow]) -> tuple[bool, bool]:
    """(every row samples one token or none and asks for nothing else, every row computes one token and samples)."""
    decode = True
    for row in rows:
        if row.n_sample > 1 or row.prompt_logprobs or row.pooling:
            return False, False
        if row.n != 1 or row.n_sample != 1:
            decode = False
    return True, decode


class Runner:
    def __init__(self, forward: Forward, ops: Ops, kv: list[LayerKV], rows: Rows, staging: Staging) -> None:
        self.forward = forward
        self.ops = ops
        self.kv = kv
        self.rows = rows
        self.staging = staging
        self.graphs: StepGraphs | TapedSteps | None = None
        self.sharing: Sharing | None = None  # followed where `graphs` wants to know it
        self.constraints: Constraints | None = None
        self.fetch: Callable[[Tensor], HostCopy] = HostCopy
        self.pooling = Pooling()
        self._undrawn: BoundStep | None = None  # the last step, if its draw waits for masks

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepOnDevice | DrawnStep | BoundStep:
        """Launch one step. Returns before the device has finished, where the device is asynchronous."""
        self.finish()
        self.rows.join(plan.joins, self.staging)
        self.rows.write(plan.rows, self.staging)
        self.follow(plan.joins)
        return self.joined(plan)

    def follow(self, joins: Sequence[Join]) -> None:
        """The joins are in the rows: grammars of the rows change too."""
        if self.constraints is not None:
            self.constraints.join(joins)

    @torch.inference_mode()
    def joined(self, plan: StepPlan) -> StepOnDevice | DrawnStep | BoundStep:
        """`run` after the joins, and with what the host gives in the rows."""
        if self.sharing is not None:
            self.sharing.follow(plan)
        usual, decode = _kind(plan.rows)
        found = self.graphs.find(plan.rows, decode) if self.graphs is not None and usual else None
        return self._eager(plan, self._picks(plan.rows), decode) if found is None else self._captured(plan, found)

    def _captured(self, plan: StepPlan, found: Captured | TapedSteps) -> StepOnDevice | DrawnStep | BoundStep:
        """Replay the step; what its sampler can't draw is drawn here from its logits."""
        assert self.graphs is not None
        sampling = [row for row in plan.rows if row.n_sample]
        infos = [self.rows.info[row.row] for row in sampling]
        plain = all(map(self.graphs.serves, infos))
        masked = not plain and all(map(self.graphs.serves_masked, infos))
        if masked and isinstance(found, TapedSteps):
            return self._taken(plan, sampling, found)
        out = found.run(plan.rows, sample=plain)
        n = len(sampling)
        if plain:
            requests = [row.request for row in sampling]
            return DrawnStep(plan.step, requests, self.fetch(out.tokens[: max(n, 1)]))  # one at least, to be waited for
        if masked and not isinstance(found, TapedSteps):
            return self._bound(plan, sampling, found, out)
        picks, row, position = self._picks(plan.rows), out.row[:n], out.position()[:n]
        return self._written(plan, picks, self._sample(out.logits[:n], picks, row, position), row, position, [])

    def _taken(self, plan: StepPlan, sampling: list[PlanRow], taped: TapedSteps) -> BoundStep:
        """The tokens of the step before are there: masks first, then the forward pass and the draw in one call."""
        limits, spots = self.constraints, [(row.row, row.start + row.n) for row in sampling]
        out = taped.run(plan.rows, sample=True, masks=limits.masks(spots) if limits is not None else None)
        tokens = self.fetch(out.tokens)
        drawn = tokens, self._answer(tokens, len(sampling))
        return BoundStep(plan.step, [row.request for row in sampling], None, drawn)

    def _bound(self, plan: StepPlan, sampling: list[PlanRow], found: Captured, out: StaticStep | Buffers) -> BoundStep:
        """The forward pass is under way; the draw follows when the masks are there. Where the device computes by
        itself, the loop commits and plans meanwhile."""
        limits, spots = self.constraints, [(row.row, row.start + row.n) for row in sampling]
        overlaps = limits is not None and limits.overlaps
        filling = limits.begin(spots, later=overlaps) if limits is not None else None
        draw = partial(self._draw, found, filling, out, len(sampling))
        step = BoundStep(plan.step, [row.request for row in sampling], draw)
        if overlaps:
            self._undrawn = step
        else:
            step.drawn, step.draw = draw(), None
        return step

    @torch.inference_mode()
    def _draw(
        self, found: Captured, filling: Filling | None, out: StaticStep | Buffers, n: int
    ) -> tuple[HostCopy, Answer | None]:
        found.draw_masked(filling.masks() if filling is not None else None)
        tokens = self.fetch(out.tokens[:n])
        return tokens, self._answer(tokens, n)

    def finish(self) -> None:
        """Draw what was not drawn yet: before anything else computes."""
        step, self._undrawn = self._undrawn, None
        if step is not None:
            step.finish()

    def _eager(self, plan: StepPlan, picks: list[tuple[str, Pick]], decode: bool) -> StepOnDevice:
        sent = self._send(plan.rows, picks)
        max_kv = max(row.start + row.n for row in plan.rows)
        if decode:
            ids, layout = lay_out_decode(self.ops, self.rows, sent.row, sent.start, sent.slots, max_kv)
        else:
            max_q = max(row.n for row in plan.rows)
            ids, layout = lay_out(self.rows, sent.row, sent.start, sent.n, sent.slots, max_q, max_kv)
        batch = ForwardBatch(ids, layout, self.kv, sent.logits_at)
        logits = self.forward.run(batch, wanted=bool(picks))
        pools = self.pooling.add(plan.rows, self.forward.states) if any(row.pooling for row in plan.rows) else []
        prompts = self._prompt_logprobs(plan.rows)
        if logits is None:
            return StepOnDevice(plan.step, picks, HostCopy(sent.start[:1]), None, prompts)  # only to be waited for
        sampled = self._sample(logits, picks, sent.pick_row, sent.pick_position)
        step = self._written(plan, picks, sampled, sent.pick_row, sent.pick_position, prompts)
        step.pools = [PooledPart(request, HostCopy(values)) for request, values in pools]
        return step

    def _sample(self, logits: Tensor, picks: list[tuple[str, Pick]], row: Tensor, position: Tensor) -> Sampled:
        """The forward pass is under way: now wait for the masks, which need the tokens of the step before."""
        masks = self._masks([(pick.row, pick.position) for _, pick in picks])
        return sample(self.ops, logits, [pick for _, pick in picks], self.rows, row, position, masks)

    def _masks(self, spots: list[tuple[int, int]]) -> TokenMasks | None:
        return self.constraints.masks(spots) if self.constraints is not None else None

    def _written(
        self,
        plan: StepPlan,
        picks: list[tuple[str, Pick]],
        sampled: Sampled,
        row: Tensor,
        position: Tensor,
        prompts: list[PromptPart],
    ) -> StepOnDevice:
        self.rows.tokens[row, position] = sampled.tokens.clamp(min=0).int()
        logprobs = LogprobsCopy(sampled.logprobs) if sampled.logprobs is not None else None
        tokens = HostCopy(sampled.tokens)
        return StepOnDevice(plan.step, picks, tokens, logprobs, prompts, self._answer(tokens, len(picks)))

    def _answer(self, tokens: HostCopy, n: int) -> Answer | None:
        """The tokens are on their way, and the grammars will read them."""
        return self.constraints.follow(tokens, n) if self.constraints is not None else None

    def _picks(self, plan_rows: Sequence[PlanRow]) -> list[tuple[str, Pick]]:
        picks = []
        for row in plan_rows:
            if row.n_sample:
                info = self.rows.info[row.row]
                if info is None:
                    raise ValueError(f"row {row.row} of step samples for {row.request!r} but nobody joined it")
                end = row.start + row.n
                picks += [(row.request, Pick(row.row, end - i, info)) for i in range(row.n_sample - 1, -1, -1)]
        return picks

    def _send(self, plan_rows: Sequence[PlanRow], picks: list[tuple[str, Pick]]) -> Sent:
        ends = np.cumsum([row.n for row in plan_rows])
        at = [end - i for row, end in zip(plan_rows, ends, strict=True) for i in range(row.n_sample, 0, -1)]
        parts = (
            [row.row for row in plan_rows],
            [row.start for row in plan_rows],
            [row.n for row in plan_rows],
            [slot for row in plan_rows for slot in row.slots],
            at,
            [pick.row for _, pick in picks],
            [pick.position for _, pick in picks],
        )
        return Sent(*self.staging.send([np.array(part, dtype=np.int64) for part in parts]))

    def _prompt_logprobs(self, plan_rows: Sequence[PlanRow]) -> list[PromptPart]:
        parts, lo = [], 0
        for row in plan_rows:
            info = self.rows.info[row.row]
            if row.prompt_logprobs and info is not None:
                n = min(row.n, info.n_prompt - 1 - row.start)  # positions start + 1 .. start + n, in the prompt
                k = info.params.prompt_logprobs or 0
                if n > 0:
                    parts.append(self._prompt_part(row, lo, n, k))
            lo += row.n
        return parts

    def _prompt_part(self, row: PlanRow, first: int, n: int, k: int) -> PromptPart:
        """Tokens first .. first + n - 1 of the step: what they say of the tokens after them."""
        tokens = self.rows.tokens[row.row, row.start + 1 : row.start + 1 + n].long()
        at = torch.arange(first, first + n, device=tokens.device)
        slices = []
        for lo in range(0, n, LOGPROB_ROWS):
            logits = self.forward.logits(at[lo : lo + LOGPROB_ROWS]).float()
            slices.append(LogprobsCopy(top_logprobs(logits, tokens[lo : lo + LOGPROB_ROWS], k)))
        return PromptPart(row.request, HostCopy(tokens.clone()), slices, k)
