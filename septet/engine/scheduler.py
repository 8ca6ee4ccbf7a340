"""Which tokens are computed in each step: requests in token ids go in, plans come out, results become updates.

Owns the waiting and running sequences, their rows and leases, and the plans in flight; called by `engine/loop.py`, in
one thread. Pure Python: it must not know torch, text, sockets or how a plan is computed. Time is nowhere in it.

One rule for all phases: a sequence has `planned` and `length`, and wants the tokens between. Decoding rows come first,
prefill chunks fill the rest of the token budget. How a result finds its request: by id, in the order of plans. A
preempted sequence is not admitted again while a plan that names it is in flight, so no id ever has results of two lives
under way; what arrives for an ended request (overshoot past a stop id, an abort) is dropped. Its slots and row were
given back at once, which is safe because plans run in order on the device.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from septet.engine.admission import SchedulerLimits, check_tokens, output_limit, stop_ids
from septet.engine.messages import EngineStats, Update
from septet.engine.policy import OrderedSequences, OutputEstimate, choose_victim
from septet.engine.sequence import NOTHING_OWED, Sequence
from septet.engine.sharing import Prefills
from septet.engine.tally import Tally
from septet.errors import InvalidRequest, OutOfMemory, Overloaded, SeptetError
from septet.request import FinishReason, Request
from septet.step import Join, Logprobs, PlanRow, RowResult, StepPlan, StepResult

if TYPE_CHECKING:
    from array import array
    from collections.abc import Iterable

    from septet.kv.cache import KVCache, Lease

__all__ = ["Scheduler", "SchedulerLimits"]

_NOTHING = RowResult("")  # what a row yields that neither samples nor asks for log-probabilities
MAX_PASSED_OVER = 32  # waiting sequences that later ones may overtake in one plan (they wait for a shared prefix)


@dataclass(slots=True)
class Draft:
    """A plan being made. `sequences[i]` is the one of `rows[i]`."""

    step: int
    budget: int  # tokens left
    joins: list[Join] = field(default_factory=list)
    rows: list[PlanRow] = field(default_factory=list)
    sequences: list[Sequence] = field(default_factory=list)


class Scheduler:
    """`submit`, `abort`; `plan`, then `commit` or `fail` once for each plan, oldest first.

    Every submitted request gets exactly one update with a finish reason.
    """

    def __init__(
        self, limits: SchedulerLimits, cache: KVCache, vocab_size: int, estimate: OutputEstimate | None = None
    ) -> None:
        self.limits = limits
        self.cache = cache
        self.vocab_size = vocab_size
        self.estimate = estimate or OutputEstimate()
        self._live: dict[str, Sequence] = {}
        self._waiting = OrderedSequences()
        self._running = OrderedSequences()
        self._prefills = Prefills()
        self._free_rows = list(range(limits.max_num_seqs))  # a heap: low rows first, so that rows in use stay dense
        self._blocked: Sequence | None = None  # did not fit beside the running ones; try again when one leaves
        self._in_flight: deque[Draft] = deque()
        self._tally = Tally()
        self._step = 0
        self._number = 0

    # -- requests -----------------------------------------------------------------------------------------------------
    def submit(self, request: Request) -> None:
        """Queue a request. InvalidRequest: this engine can't run it. Overloaded: max_waiting are queued already."""
        tokens = self.check(request)
        self._number += 1
        seq = Sequence(
            request,
            tokens,
            n_prompt=len(tokens),
            limit=output_limit(request, self.limits, self.cache.capacity),
            order=(request.priority, request.arrival, self._number),
            stops=stop_ids(request),
            length=len(tokens),
            wants_prompt_logprobs=request.params.prompt_logprobs is not None and len(tokens) > 1,
        )
        self._live[request.id] = seq
        self._waiting.add(seq)

    def check(self, request: Request) -> array[int]:
        """The prompt of a request that could be submitted now; raises what `submit` would raise."""
        if request.id in self._live:
            raise InvalidRequest(f"a request with id {request.id!r} is under way", param="id")
        if len(self._waiting) >= self.limits.max_waiting:
            raise Overloaded(f"{len(self._waiting)} requests are waiting already: try again later")
        return check_tokens(request, self.limits, self.vocab_size, self.cache.capacity)

    def abort(self, id: str) -> list[Update]:
        """End a request wherever it is: its final update, or nothing for an id that is unknown or finished."""
        seq = self._live.get(id)
        return [] if seq is None else [self._end(seq, FinishReason.ABORT)]

    def abort_all(self) -> list[Update]:
        return [self._end(seq, FinishReason.ABORT) for seq in list(self._live.values())]

    # -- planning -----------------------------------------------------------------------------------------------------
    def plan(self) -> StepPlan | None:
        """The next step, or None: nothing to compute, or nothing that can be before a plan in flight is committed."""
        self._make_way()
        while True:
            draft = Draft(self._step, self.limits.max_num_batched_tokens)
            prefills = self._plan_decodes(draft)
            n_decodes = len(draft.rows)
            prefills += self._admit(draft.budget - sum(seq.wanted for seq in prefills))
            self._plan_prefills(draft, prefills)
            if draft.rows:
                return self._send(draft, n_decodes)
            if self._in_flight or not self._running:
                return None
            # All rows want slots, none is left and nothing in flight will free one: somebody must give way.
            self._preempt(choose_victim(self._running, draft.step))

    def _plan_decodes(self, draft: Draft) -> list[Sequence]:
        """Rows of all sequences that want one token, best first; the last in order give way when slots run out.

        Returns the sequences that want more than one token.
        """
        decodes: list[Sequence] = []
        leases: list[Lease] = []
        prefills: list[Sequence] = []
        for seq in self._running:
            if seq.length < seq.limit and seq.lease is not None:  # else its last token is in flight
                if seq.length - seq.planned <= 1:
                    decodes.append(seq)
                    leases.append(seq.lease)
                else:
                    prefills.append(seq)
        slots = self.cache.grow_each(leases)
        if slots is None:
            self._plan_scarce(draft)
            return [seq for seq in prefills if seq.lease is not None]
        step, add, before = draft.step, draft.rows.append, draft.budget
        for seq, slot in zip(decodes, slots, strict=True):
            start = seq.planned
            if start >= seq.owed or seq.private or not seq.joined:
                self._add(draft, seq, 1, (slot,))
                continue
            seq.planned = end = start + 1  # as `_add`, for the usual row: hundreds of these a step
            seq.length = end + 1
            seq.in_flight += 1
            seq.last_step = step
            add(PlanRow(seq.id, seq.row, start, 1, (slot,), 1))
        draft.sequences[:] = decodes  # each has one row of one token, whichever way it was added
        draft.budget = before - len(decodes)
        return prefills

    def _plan_scarce(self, draft: Draft) -> None:
        """The decoding rows one by one, as there are not slots for all."""
        for seq in list(self._running):
            if seq.length >= seq.limit or seq.lease is None or seq.length - seq.planned > 1:
                continue
            slots = self.cache.grow(seq.lease, 1)
            while slots is None:
                victim = choose_victim(self._running, draft.step)  # never in the draft: those come before `seq`
                self._preempt(victim)
                if victim is seq:
                    break
                slots = self.cache.grow(seq.lease, 1)
            if slots is not None:
                self._add(draft, seq, 1, slots)

    def _plan_prefills(self, draft: Draft, prefills: list[Sequence]) -> None:
        """Chunks of the sequences that want several tokens, best first, as far as budget and slots go."""
        prefills.sort(key=lambda seq: seq.order)
        for seq in prefills:
            n = min(seq.wanted, draft.budget, self.cache.available)
            if n == 0:
                return
            assert seq.lease is not None
            slots = self.cache.grow(seq.lease, n)
            assert slots is not None, "the cache grants what it says is available"
            self._add(draft, seq, n, slots)

    def _add(self, draft: Draft, seq: Sequence, n: int, slots: tuple[int, ...]) -> None:
        """Plan the next `n` tokens of `seq`. If they are its last, one more will exist: sampled, its value unknown."""
        request, start = seq.request, seq.planned
        if not seq.joined:
            draft.joins.append(_join(seq))
            seq.joined = True
        seq.planned = start + n
        n_sample = 1 if seq.planned == seq.length else 0
        seq.length += n_sample
        seq.in_flight += 1
        seq.last_step = draft.step
        with_prompt = seq.wants_prompt_logprobs and start < seq.n_prompt - 1
        tokens = self._owed(seq, start, start + n) if start + n > seq.owed else ()
        draft.rows.append(PlanRow(request.id, seq.row, start, n, slots, n_sample, with_prompt, tokens, request.pooling))
        draft.sequences.append(seq)
        draft.budget -= n

    @staticmethod
    def _owed(seq: Sequence, start: int, stop: int) -> tuple[int, ...]:
        """The tokens of a chunk that reaches into what the executor was not given."""
        seq.owed = stop if stop < len(seq.tokens) else NOTHING_OWED
        return tuple(seq.tokens[start:stop])

    def _send(self, draft: Draft, n_decodes: int) -> StepPlan:
        self._step += 1
        self._in_flight.append(draft)
        n_tokens = self.limits.max_num_batched_tokens - draft.budget
        self._tally.step(len(draft.rows), n_tokens, n_tokens - n_decodes, self._unused(), self.cache.leased)
        return StepPlan(draft.step, tuple(draft.joins), tuple(draft.rows))

    # -- admission ----------------------------------------------------------------------------------------------------
    def _admit(self, budget: int) -> list[Sequence]:
        """Start waiting sequences, best first, while rows, expected slots and the step's tokens last."""
        admitted: list[Sequence] = []
        if not self._waiting or not self._free_rows:
            return admitted
        expected = self.estimate.slots_of(self._running)
        index = 0
        while self._free_rows and index < min(len(self._waiting), MAX_PASSED_OVER):
            seq = self._waiting[index]
            urgent = bool(self._running) and seq.priority < self._running[-1].priority
            if seq.in_flight or (budget <= 0 and not urgent):
                break
            if self._should_follow(seq):
                index += 1
                continue
            if self._running and (seq is self._blocked or self._shortfall(seq, expected) > 0):
                self._blocked = seq
                break
            self._start(seq)
            admitted.append(seq)
            expected += self.estimate.slots(seq)
            budget -= seq.wanted
        return admitted

    def _make_way(self) -> None:
        """Let the first waiting sequence have the rows and slots of running ones of strictly lower priority."""
        if not self._waiting or not self._running:
            return
        seq = self._waiting[0]
        if self._running[-1].priority <= seq.priority or seq.in_flight or self._should_follow(seq):
            return
        while self._running and self._running[-1].priority > seq.priority:
            short = self._shortfall(seq, self.estimate.slots_of(self._running))
            if self._free_rows and short <= 0:
                return
            lower = [other for other in self._running if other.priority > seq.priority]
            if short > sum(len(other.lease.slots) + self.estimate.slots(other) for other in lower if other.lease):
                return  # even all of them would not make room
            self._preempt(self._running[-1])

    def _should_follow(self, seq: Sequence) -> bool:
        """Is a long prefix of it being computed by a running sequence, so that waiting for it saves work?"""
        if seq.whole_prompt or not self.cache.enable_prefix:
            return False
        return self._prefills.worth_waiting(seq, self._probe(seq)[0])

    def _shortfall(self, seq: Sequence, expected: int) -> int:
        """Slots that would be missing if `seq` ran beside the running ones, which are `expected` to want so many more.

        A cached prefix that nobody else locks counts as wanted: it is among the available slots now.
        """
        wanted = len(seq.tokens) - self._probe(seq)[1]
        short = wanted + self.estimate.output(seq) + expected - self.cache.available
        return short if short <= 0 else self.estimate.peak(self._running, seq, wanted) - self.cache.available

    def _probe(self, seq: Sequence) -> tuple[int, int]:
        """(held, locked) tokens of its cached prefix, looked up again only after the cache has changed."""
        if seq.whole_prompt:
            return 0, 0
        version, held, locked = seq.probe
        if version != self.cache.version:
            held, locked = self.cache.probe(seq.tokens, seq.request.cache_salt)
            seq.probe = (self.cache.version, held, locked)
        return held, locked

    def _start(self, seq: Sequence) -> None:
        """Waiting -> running: a row and a lease on its longest cached prefix."""
        self._waiting.discard(seq)
        # Prompt log-probabilities and pools need every position computed. Sharing such a prompt early would lock what
        # the cache holds of it beside our own copy, and one that fills the pool could then never finish.
        seq.private = seq.whole_prompt
        seq.lease = self.cache.open(seq.tokens, seq.request.cache_salt, reuse=not seq.private)
        seq.row = heapq.heappop(self._free_rows)
        seq.joined = False
        seq.length = seq.n_known = len(seq.tokens)
        seq.owed = NOTHING_OWED
        seq.planned = seq.computed = seq.lease.n_cached
        self._running.add(seq)
        if not seq.private:
            self._prefills.add(seq)
        if seq.cached_tokens is None:
            seq.cached_tokens = seq.lease.n_cached
            self._tally.prompt_tokens += seq.n_prompt
            self._tally.cached_tokens += seq.lease.n_cached

    # -- leaving ------------------------------------------------------------------------------------------------------
    def _preempt(self, seq: Sequence) -> None:
        """Running -> waiting, output kept. One whose last token is in flight just waits for that, without a lease."""
        self._release(seq)
        if not seq.ending:
            self._waiting.add(seq)
            self._tally.preemptions += 1
            self.estimate.preempted()

    def _release(self, seq: Sequence, *, sound: bool = True) -> None:
        """Give back row and lease. What is computed stays cached, so resumption often is a prefix hit."""
        lease = seq.lease
        assert lease is not None
        if sound:
            self.cache.commit(lease, seq.tokens[lease.n_committed : seq.computed])
        self.cache.close(lease)
        heapq.heappush(self._free_rows, seq.row)
        seq.lease, seq.row = None, -1
        self._blocked = None
        self._running.discard(seq)
        self._prefills.discard(seq)

    def _end(self, seq: Sequence, reason: FinishReason, error: Exception | None = None) -> Update:
        """The final update of a request: it holds nothing any more, and what is in flight for it will be dropped."""
        if seq.lease is not None:
            self._release(seq, sound=reason is not FinishReason.ERROR)
        self._waiting.discard(seq)
        del self._live[seq.request.id]
        seq.ended = True
        self._tally.finished[reason.value] += 1
        if error is None:
            return Update(seq.request.id, finish_reason=reason, cached_tokens=self._first_answer(seq))
        shown = str(error) if isinstance(error, SeptetError) else f"the step failed: {type(error).__name__}"
        kind = error.kind if isinstance(error, SeptetError) else SeptetError.kind
        return Update(seq.request.id, finish_reason=reason, error=shown, error_kind=kind)

    # -- results ------------------------------------------------------------------------------------------------------
    def commit(self, result: StepResult) -> list[Update]:
        """The oldest plan in flight is computed: append tokens, stop, share prefixes. ValueError for another step."""
        draft = self._take(result.step)
        updates: list[Update] = []
        told, vocab, usual = updates.append, self.vocab_size, 0
        for row, seq, got in zip(draft.rows, draft.sequences, _in_order(draft.rows, result.rows), strict=True):
            seq.in_flight -= 1
            if seq.ended:
                continue
            # Most rows of most steps: one more token behind all known ones, in the middle of an answer. What is known
            # reaches beyond the row unless it computes the last position and samples, so `n` and `n_sample` are 1.
            tokens, end = got.tokens, row.start + 1
            if end == len(seq.tokens) and end > seq.n_known and len(tokens) == 1 and end + 1 < seq.limit:
                token = tokens[0]
                fine = got.error is None and not got.forced and not got.ended and not got.pooled
                if fine and 0 <= token < vocab and token not in seq.stops:
                    if seq.lease is not None:
                        seq.computed = end
                    seq.tokens.append(token)
                    usual += 1
                    told(Update(row.request, tokens, got.logprobs))
                    continue
            if (update := self._look_closely(seq, row, got)) is not None:
                told(update)
        self._tally.generated_tokens += usual
        return updates

    def _look_closely(self, seq: Sequence, row: PlanRow, got: RowResult) -> Update | None:
        """Whatever a row may come to."""
        fault = _fault(row, got, self.vocab_size)
        if fault is not None:
            return self._end(seq, FinishReason.ERROR, _error(got.error_kind, fault))
        if seq.lease is not None:  # else it was preempted since: its token counts, its slots are gone
            seq.computed = row.start + row.n
            if row.start < seq.n_known and not seq.private:
                self._share(seq, row)
        if row.n_sample and row.start + row.n < len(seq.tokens):
            return None  # a forced token, which was told with the one before it
        return self._answer(seq, row, got) if row.n_sample or row.prompt_logprobs else None

    def fail(self, plan: StepPlan, error: Exception) -> list[Update]:
        """The oldest plan in flight raised: its requests end with the error. ValueError for another step.

        If it was too large for the device's memory, the request with most tokens in it ends, and the others start
        again; a later plan in flight that names one builds on the failed step, so such a request ends too.
        """
        draft = self._take(plan.step)
        for seq in draft.sequences:
            seq.in_flight -= 1
        alive = [(row, seq) for row, seq in zip(draft.rows, draft.sequences, strict=True) if not seq.ended]
        if not isinstance(error, OutOfMemory):
            return [self._end(seq, FinishReason.ERROR, error) for _, seq in alive]
        largest = max(alive, key=lambda pair: (pair[0].n, pair[1].order), default=(None, None))[1]
        updates = []
        for _, seq in alive:
            if seq is largest or seq.in_flight:
                updates.append(self._end(seq, FinishReason.ERROR, error))
            else:
                self._restart(seq)
        return updates

    def _restart(self, seq: Sequence) -> None:
        """What its last plan would have sampled never came to be: back to waiting, with what the host knows of it."""
        was_ending, seq.length = seq.ending, len(seq.tokens)
        if seq.lease is not None:
            self._preempt(seq)
        elif was_ending:
            self._waiting.add(seq)

    def _take(self, step: int) -> Draft:
        if not self._in_flight or self._in_flight[0].step != step:
            expected = self._in_flight[0].step if self._in_flight else "none"
            raise ValueError(f"result of step {step}, but the oldest step in flight is {expected}")
        return self._in_flight.popleft()

    def _share(self, seq: Sequence, row: PlanRow) -> None:
        """Give a prefilled chunk to the cache at once. Decoded tokens follow in one go when the sequence leaves."""
        assert seq.lease is not None
        self.cache.commit(seq.lease, seq.tokens[row.start : seq.computed])
        if seq.computed >= seq.n_known:
            self._prefills.discard(seq)

    def _answer(self, seq: Sequence, row: PlanRow, got: RowResult) -> Update:
        """The update of one row: its token, if it samples, and whether that ends the request."""
        prompt_logprobs = self._prompt_logprobs(seq, row, got) if row.prompt_logprobs else ()
        tokens, reason, stop_token = got.tokens, None, None
        if row.n_sample:
            reason, stop_token = self._append(seq, got.tokens[0], ended=got.ended and not got.forced)
            if got.forced and reason is None:
                tokens, reason, stop_token = self._append_forced(seq, got)
        first = row.n_sample and len(seq.tokens) - seq.n_prompt == len(tokens)
        pinned = self._pin(seq) if first and seq.request.pins else ()
        cached = 0 if seq.answered else self._first_answer(seq)
        if reason is not None:
            self.estimate.finished(len(seq.tokens) - seq.n_prompt, seq.limit - seq.n_prompt)
            self._end(seq, reason)
        return Update(
            got.request, tokens, got.logprobs, prompt_logprobs, reason, stop_token, cached, pinned, pooled=got.pooled
        )

    def _pin(self, seq: Sequence) -> tuple[int, ...]:
        """The prompt is computed and shared: hold what was asked for. Tokens held by each pin, 0 = none."""
        request, held = seq.request, []
        for pin in request.pins:
            tokens = seq.tokens[: min(pin.length, seq.n_prompt)]
            done = self.cache.pin(tokens, request.cache_salt, pin.owner, pin.ttl_s)
            held.append(len(tokens) if done else 0)
        return tuple(held)

    def _append(self, seq: Sequence, token: int, ended: bool) -> tuple[FinishReason | None, int | None]:
        """One more token of the output: (why it is the last, the stop id that it is)."""
        seq.tokens.append(token)
        self._tally.generated_tokens += 1
        n_tokens = len(seq.tokens)
        if token in seq.stops and n_tokens - seq.n_prompt > seq.request.params.min_tokens:
            return FinishReason.STOP, token
        if ended:
            return FinishReason.STOP, None
        return (FinishReason.LENGTH if n_tokens >= seq.limit else None), None

    def _append_forced(self, seq: Sequence, got: RowResult) -> tuple[tuple[int, ...], FinishReason | None, int | None]:
        """The tokens that must follow the sampled one: (all tokens of this answer, why the last is the last, stop id).

        Steps in flight sample some of these positions; what lies behind them the executor must be given.
        """
        known = max(len(seq.tokens), seq.length)
        reason = stop_token = None
        for n, token in enumerate(got.forced, start=1):
            reason, stop_token = self._append(seq, token, ended=got.ended and n == len(got.forced))
            if reason is not None:
                break
        if len(seq.tokens) > known:
            seq.owed = min(seq.owed, known)
            seq.length = len(seq.tokens)
        return (*got.tokens, *got.forced[:n]), reason, stop_token

    def _prompt_logprobs(self, seq: Sequence, row: PlanRow, got: RowResult) -> tuple[Logprobs, ...]:
        """Those not delivered before: a preempted sequence computes its prompt again."""
        new = got.prompt_logprobs[max(0, seq.n_prompt_logprobs - row.start) :]
        seq.n_prompt_logprobs += len(new)
        seq.wants_prompt_logprobs = seq.n_prompt_logprobs < seq.n_prompt - 1
        return new

    def _first_answer(self, seq: Sequence) -> int:
        """Cached prompt tokens, to be told once."""
        if seq.answered:
            return 0
        seq.answered = True
        return seq.cached_tokens or 0

    # -- watching -----------------------------------------------------------------------------------------------------
    @property
    def stats(self) -> EngineStats:
        """Counters and gauges; the times in it are the loop's to fill."""
        waiting = len(self._live) - len(self._running)
        return self._tally.stats(self.cache, len(self._running), waiting, self._unused())

    def _unused(self) -> int:
        """Leased slots that are neither computed nor being computed in a step in flight."""
        return self.cache.granted - sum([seq.planned for seq in self._running])

    def audit(self) -> None:
        """AssertionError unless each slot and each row has one owner and the queues agree. Between steps; O(pool)."""
        self.cache.audit()
        rows = sorted([*self._free_rows, *(seq.row for seq in self._running)])
        assert rows == list(range(self.limits.max_num_seqs)), f"rows lost or doubled: {rows}"
        assert self._unused() >= 0, f"{-self._unused()} positions are planned without a slot"
        for seq in self._running:
            assert seq.computed <= seq.planned <= seq.length <= seq.limit, f"counts of {seq.request.id} disagree"
        if not self._live:
            assert self.cache.leased == 0, f"{self.cache.leased} slots are leased, but no request is alive"


def _in_order(rows: list[PlanRow], results: tuple[RowResult, ...]) -> Iterable[RowResult]:
    """The result of each row. Where every row has one they come in this order already."""
    if [got.request for got in results] == [row.request for row in rows]:
        return results
    by_request = {got.request: got for got in results}
    return [by_request.get(row.request, _NOTHING) for row in rows]


def _join(seq: Sequence) -> Join:
    assert seq.lease is not None
    prefix, request = tuple(seq.lease.slots[: seq.lease.n_cached]), seq.request
    return Join(
        request.id, seq.row, tuple(seq.tokens), seq.n_prompt, prefix, request.params, tuple(request.eos_token_ids)
    )


def _error(kind: str, message: str) -> SeptetError:
    return InvalidRequest(message) if kind == InvalidRequest.kind else SeptetError(message)


def _fault(row: PlanRow, got: RowResult, vocab_size: int) -> str | None:
    """What is wrong with the answer to a row, if anything."""
    tokens = got.tokens
    sampled = len(tokens) == row.n_sample and (not tokens or 0 <= tokens[0] < vocab_size)
    pooled = got.pooled or not (row.pooling and row.n_sample)
    if got.error is None and sampled and pooled and (got.prompt_logprobs or not row.prompt_logprobs):
        return None
    if got.error is not None:
        return got.error
    if not pooled:
        return "the executor did not return the pooled hidden states"
    if len(tokens) != row.n_sample:
        return f"the executor sampled {len(tokens)} tokens where {row.n_sample} were planned"
    if sampled:
        return "the executor did not return the prompt's log-probabilities"
    return f"the executor sampled token id {tokens[0]}, which is outside the vocabulary"
