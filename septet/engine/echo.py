"""An executor without a model: a token is a hash of (seed, position, tokens before), so text is free of batching.

For tests, engine benchmarks and the simulated engine. With `verify` it is the scheduler's oracle: it keeps rows and KV
contents as a device would and checks every rule of `septet/step.py`, down to each row reading back its whole context
from its slots. It knows plans and results alone: no scheduler, no cache, no torch.
"""

from __future__ import annotations

import struct
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from septet.step import Join, Logprobs, PlanRow, RowResult, StepPlan, StepResult

if TYPE_CHECKING:
    from collections.abc import Iterable

    from septet.request import SamplingParams

__all__ = ["BrokenPlan", "EchoExecutor", "next_token"]

POOL_WIDTH = 8  # of a pooled prompt
EOS_ONE_IN = 32  # of sampled tokens, where the request names an eos id
_M64 = 2**64 - 1


class BrokenPlan(AssertionError):
    """A plan breaks a rule of `septet/step.py`: an error of the scheduler."""


def next_token(tokens: list[int], n_prompt: int, params: SamplingParams, eos: tuple[int, ...], vocab_size: int) -> int:
    """The token after `tokens`: a hash of seed, position and the last two tokens; no stop id before min_tokens."""
    h = (params.seed or 0) * 0x9E3779B97F4A7C15 + len(tokens) * 0xBF58476D1CE4E5B9 + tokens[-1] * 0x94D049BB133111EB
    if len(tokens) > 1:
        h += tokens[-2] * 0xD6E8FEB86659FD93
    h &= _M64
    h = ((h ^ (h >> 31)) * 0xD6E8FEB86659FD93) & _M64
    h ^= h >> 29
    token = eos[h % len(eos)] if eos and h % EOS_ONE_IN == 0 else (h >> 8) % vocab_size
    if len(tokens) - n_prompt < params.min_tokens:
        stops = {*eos, *params.stop_token_ids}
        while token in stops:
            token = (token + 1) % vocab_size
    return token


@dataclass(slots=True)
class Row:
    """What a device keeps of one row: tokens[position], slot_of[position] and the sampling values."""

    request: str
    tokens: list[int]
    slots: list[int]
    n_prompt: int
    params: SamplingParams
    eos: tuple[int, ...]
    forced_end: int = 0  # forced tokens were told up to this position
    chain: list[int] = field(default_factory=list)  # hash of tokens[: p + 1]: what KV of position p stands for


@dataclass(slots=True)
class Done:
    """A step that was computed at launch; `result` takes at least until `ready_at`, as a device would."""

    step: StepResult
    ready_at: float

    def result(self) -> StepResult:
        wait = self.ready_at - time.monotonic() if self.ready_at else 0.0
        if wait > 0:
            time.sleep(wait)
        return self.step


class EchoExecutor:
    """depth: steps in flight, as of any executor. step_s: seconds that each step pretends to take.

    verify False skips the checks and the KV contents, for timing the scheduler alone. forces: up to so many tokens
    after a sampled one are told ahead, as a grammar would that leaves no choice; the text is the same.
    """

    def __init__(
        self, depth: int = 1, vocab_size: int = 1000, *, verify: bool = True, step_s: float = 0.0, forces: int = 0
    ) -> None:
        self.depth = depth
        self.vocab_size = vocab_size
        self.verify = verify
        self.step_s = step_s
        self.forces = forces
        self._rows: dict[int, Row] = {}
        self._content: dict[int, int] = {}  # slot -> chain hash of the position it holds
        self._last_step = -1
        self._free_at = 0.0

    def launch(self, plan: StepPlan) -> Done:
        """Apply and compute `plan`. BrokenPlan names the rule it breaks."""
        if self.verify:
            self._check_plan(plan)
        self._last_step = plan.step
        for join in plan.joins:
            self._join(join)
        for row in plan.rows:
            self._learn(row)
            self._write(row)
        if self.verify:
            for row in plan.rows:
                self._read_back(row)
        results = tuple(self._sample(row) for row in plan.rows if row.n_sample or row.prompt_logprobs)
        if self.step_s:
            self._free_at = max(self._free_at, time.monotonic()) + self.step_s
        return Done(StepResult(plan.step, results), self._free_at)

    def spare(self, busy: bool) -> bool:
        return False

    def close(self) -> None:
        self._rows.clear()
        self._content.clear()

    # -- what a device does -------------------------------------------------------------------------------------------
    def _join(self, join: Join) -> None:
        row = Row(join.request, list(join.tokens), list(join.slots), join.n_prompt, join.params, join.eos_token_ids)
        self._rows[join.row] = row
        if self.verify:
            row.chain = _chain(row.tokens)

    def _learn(self, planned: PlanRow) -> None:
        """Take in tokens that nobody sampled here."""
        if planned.tokens:
            row = self._rows[planned.row]
            for token in planned.tokens[max(0, len(row.tokens) - planned.start) :]:
                self._append(row, token)

    def _append(self, row: Row, token: int) -> None:
        row.tokens.append(token)
        if self.verify:
            row.chain.append(hash((row.chain[-1], token)))

    def _force(self, row: Row) -> tuple[int, ...]:
        """What will follow the last token, if this is one of those with forced ones behind it."""
        n = row.tokens[-1] % (self.forces + 1) if self.forces and row.forced_end <= len(row.tokens) else 0
        tokens = list(row.tokens)
        for _ in range(n):
            tokens.append(next_token(tokens, row.n_prompt, row.params, row.eos, self.vocab_size))
        row.forced_end = max(row.forced_end, len(tokens))
        return tuple(tokens[len(row.tokens) :])

    def _write(self, planned: PlanRow) -> None:
        row = self._rows[planned.row]
        row.slots.extend(planned.slots)
        if self.verify:
            positions = range(planned.start, planned.start + planned.n)
            self._content.update(zip(planned.slots, (row.chain[p] for p in positions), strict=True))

    def _sample(self, planned: PlanRow) -> RowResult:
        row = self._rows[planned.row]
        prompt: tuple[Logprobs, ...] = ()
        if planned.prompt_logprobs:
            stop = min(planned.start + planned.n, row.n_prompt - 1)
            prompt = tuple(_logprob(row.tokens[p]) for p in range(planned.start + 1, stop + 1))
        if not planned.n_sample:
            return RowResult(planned.request, prompt_logprobs=prompt)
        pooled = _pooled(row.tokens, planned.pooling) if planned.pooling else b""
        token = next_token(row.tokens, row.n_prompt, row.params, row.eos, self.vocab_size)
        self._append(row, token)
        logprobs = () if row.params.logprobs is None else (_logprob(token),)
        return RowResult(planned.request, (token,), logprobs, prompt, forced=self._force(row), pooled=pooled)

    # -- the rules of step.py -----------------------------------------------------------------------------------------
    def _check_plan(self, plan: StepPlan) -> None:
        _rule(plan.step == self._last_step + 1, f"step {plan.step} follows step {self._last_step}")
        _rule(len(plan.rows) > 0, "a plan has rows")
        _distinct("rows", (row.row for row in plan.rows))
        _distinct("requests", (row.request for row in plan.rows))
        _distinct("joined rows", (join.row for join in plan.joins))
        _distinct("written slots", (slot for row in plan.rows for slot in row.slots))
        joins = {join.row: join for join in plan.joins}
        _rule(joins.keys() <= {row.row for row in plan.rows}, "each join comes with a row of the same plan")
        for join in plan.joins:
            _rule(0 < join.n_prompt <= len(join.tokens), f"{join.request} joins with its prompt")
            _rule(len(join.slots) < len(join.tokens), f"{join.request} has a token to compute")
        for row in plan.rows:
            self._check_row(row, joins.get(row.row))

    def _check_row(self, planned: PlanRow, join: Join | None) -> None:
        row = self._rows.get(planned.row)
        name = f"{planned.request} in row {planned.row}"
        _rule(join is not None or row is not None, f"{name} has joined")
        request = join.request if join else row.request if row else ""
        computed = len(join.slots) if join else len(row.slots) if row else 0
        known = len(join.tokens) if join else len(row.tokens) if row else 0
        if planned.tokens and row is not None:
            known = self._check_tokens(name, planned, row)
        _rule(request == planned.request, f"{name}: the row belongs to it, not to {request}")
        _rule(not planned.pooling or computed == 0 or join is None, f"{name} is pooled, but finds a cached prefix")
        _rule(planned.start == computed, f"{name} starts at {planned.start}, where {computed} positions are computed")
        _rule(0 < planned.n <= known - computed, f"{name} computes {planned.n} of {known - computed} tokens that exist")
        _rule(len(planned.slots) == planned.n, f"{name}: {len(planned.slots)} slots for {planned.n} tokens")
        _rule(all(slot > 0 for slot in planned.slots), f"{name} writes slot 0 or below")
        at_end = planned.start + planned.n == known
        if row is not None and join is None and planned.start + planned.n < row.forced_end:
            return  # whether the scheduler knew of the forced tokens when it made this plan, nobody here can say
        _rule(planned.n_sample == (1 if at_end else 0), f"{name} samples {planned.n_sample} at {planned.start}")

    def _check_tokens(self, name: str, planned: PlanRow, row: Row) -> int:
        """A chunk with tokens of its own follows forced ones, hence knows them all."""
        _rule(len(planned.tokens) == planned.n, f"{name}: {len(planned.tokens)} tokens for {planned.n} positions")
        _rule(planned.start + planned.n <= row.forced_end, f"{name} is given tokens that were not forced")
        tokens = row.tokens[: planned.start]
        for token in planned.tokens:
            expected = next_token(tokens, row.n_prompt, row.params, row.eos, self.vocab_size)
            _rule(token == expected, f"{name} is given token {token}, where {expected} is forced")
            tokens.append(token)
        return row.forced_end

    def _read_back(self, planned: PlanRow) -> None:
        """Every position of the row's context must still hold the tokens that led to it."""
        row = self._rows[planned.row]
        _distinct(f"slots of {planned.request}", row.slots)
        for position, slot in enumerate(row.slots):
            _rule(
                self._content.get(slot) == row.chain[position],
                f"{planned.request} finds foreign KV in slot {slot}, position {position}",
            )


def _chain(tokens: list[int]) -> list[int]:
    chain, last = [], 0
    for token in tokens:
        last = hash((last, token))
        chain.append(last)
    return chain


def _pooled(tokens: list[int], pooling: str) -> bytes:
    """POOL_WIDTH numbers: how often a token with that remainder occurs, or which remainder the last one has."""
    counted = tokens if pooling == "mean" else tokens[-1:]
    counts = Counter(token % POOL_WIDTH for token in counted)
    return struct.pack(f"<{POOL_WIDTH}f", *(counts[i] / len(counted) for i in range(POOL_WIDTH)))


def _logprob(token: int) -> Logprobs:
    return Logprobs(token, -1.0 - token % 7, 1 + token % 7)


def _rule(holds: bool, what: str) -> None:
    if not holds:
        raise BrokenPlan(f"broken rule: {what}")


def _distinct(what: str, values: Iterable[object]) -> None:
    seen = list(values)
    _rule(len(set(seen)) == len(seen), f"{what} are distinct")
