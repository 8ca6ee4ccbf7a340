"""The real scheduler and cache over a virtual clock: what a workload would see, without a model or a device.

Called by `septet simulate`. Each replica is a `Scheduler` with its `KVCache`; a `SimulatedExecutor` answers plans at
once with made-up tokens and says how long the step would take (`estimate.StepModel`). A heap of events drives any
number of replicas behind a router. Deterministic. What is not simulated: tokenising, HTTP, the network.
"""

from __future__ import annotations

import heapq
import itertools
import zlib
from array import array
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from septet.advisor.estimate import Work
from septet.engine.scheduler import Scheduler, SchedulerLimits
from septet.errors import InvalidRequest
from septet.kv.cache import KVCache
from septet.kv.radix import RadixTree
from septet.request import Request, SamplingParams
from septet.step import RowResult, StepResult

if TYPE_CHECKING:
    from collections.abc import Iterable

    from septet.advisor.arrivals import Arrival
    from septet.advisor.estimate import StepModel
    from septet.step import StepPlan

__all__ = ["ROUTERS", "Fleet", "Outcome", "Served", "SimulatedExecutor", "group_of", "simulate"]

VOCAB = 1 << 31
TOKEN = 7  # what every step draws, and what prompts are made of after the token that tells them apart
EVICT_AT_ONCE = 256  # slots; at most this share of the pool:
EVICT_SHARE = 1 / 256
ROUTERS = ("round-robin", "least-loaded", "prefix")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """Replicas alike. With `prefill_replicas`, those compute prompts alone and hand their keys and values on."""

    step_model: StepModel
    kv_slots: int
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192  # of a step: what a prompt is cut into
    max_model_len: int = 131072
    replicas: int = 1
    router: str = "least-loaded"
    prefix_caching: bool = True
    chunked_prefill: bool = True  # False: a prompt is never cut, however long the others wait for it
    prefill_replicas: int = 0
    hand_over_s: float = 0.0  # per prompt token, when prefill and decode are apart
    seed: int = 0

    def __post_init__(self) -> None:
        if self.router not in ROUTERS:
            raise InvalidRequest(f"router must be one of {', '.join(ROUTERS)}, not {self.router!r}", param="router")
        if self.replicas < 1 or self.prefill_replicas < 0:
            raise InvalidRequest("replicas must be at least 1, prefill_replicas at least 0", param="replicas")


@dataclass(slots=True)
class Served:
    """One request's times, seconds."""

    arrival: float
    prompt: int
    output: int
    first: float = -1.0  # when its first token was there
    end: float = -1.0
    refused: str = ""  # why it was not taken

    @property
    def ttft(self) -> float:
        return self.first - self.arrival

    @property
    def tpot(self) -> float:
        """Per output token after the first; 0 for answers of one token."""
        return (self.end - self.first) / (self.output - 1) if self.output > 1 else 0.0


@dataclass(slots=True)
class Outcome:
    served: list[Served]
    seconds: float = 0.0  # of virtual time, until the last answer
    busy_s: float = 0.0  # replica seconds in steps
    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    replicas: int = 1

    @property
    def hit_rate(self) -> float:
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0


@dataclass(slots=True)
class SimulatedExecutor:
    """Answers a plan with tokens that mean nothing, and says how long it takes. free_prompts: their keys and values
    come from elsewhere, and what is left of a prompt is its last token, a decoding row."""

    step_model: StepModel
    free_prompts: bool = False
    drawn: dict[str, RowResult] = field(default_factory=dict)  # by request: always the same token

    def run(self, plan: StepPlan) -> tuple[StepResult, float]:
        rows = context = prefill = 0
        pairs = 0.0
        for row in plan.rows:
            if row.n == 1 and row.n_sample:
                rows += 1
                context += row.start + 1
            elif self.free_prompts:
                rows += row.n_sample
                context += (row.start + row.n) * row.n_sample
            else:
                prefill += row.n
                pairs += row.n * (row.start + (row.n + 1) / 2)
        known = self.drawn
        for join in plan.joins:
            known[join.request] = RowResult(join.request, (TOKEN,))
        drawn = tuple([known[row.request] for row in plan.rows if row.n_sample])
        return StepResult(plan.step, drawn), self.step_model.step_s(Work(rows, context, prefill, pairs))


class PatientTree(RadixTree):
    """Evicts in the tree's order, but `at_once` slots a time: a full pool would else evict for every single token."""

    def __init__(self, at_once: int) -> None:
        super().__init__()
        self.at_once = at_once

    def evict(self, n: int) -> list[int]:
        return super().evict(min(max(n, self.at_once), self.n_slots - self.n_locked))


@dataclass(slots=True)
class Replica:
    """One engine, and the result of the step under way."""

    scheduler: Scheduler
    executor: SimulatedExecutor
    open: int = 0  # requests
    busy: bool = False
    pending: deque[StepResult] = field(default_factory=deque)


class Simulation:
    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.decoders = [self._replica(free=fleet.prefill_replicas > 0) for _ in range(fleet.replicas)]
        self.prefillers = [self._replica(free=False) for _ in range(fleet.prefill_replicas)]
        self.events: list[tuple[float, int, object]] = []
        self.numbers = itertools.count()
        self.turn = itertools.count()
        self.requests: dict[str, tuple[Served, Arrival, array[int]]] = {}
        self.unanswered: set[str] = set()
        self.outcome = Outcome([], replicas=fleet.replicas + fleet.prefill_replicas)
        self.now = 0.0

    def _replica(self, free: bool) -> Replica:
        f = self.fleet
        length = min(f.max_model_len, f.kv_slots)
        most = length * f.max_num_seqs if free else f.max_num_batched_tokens if f.chunked_prefill else length
        limits = SchedulerLimits(
            max_num_seqs=f.max_num_seqs,
            max_num_batched_tokens=max(most, f.max_num_seqs),
            max_model_len=length,
            max_waiting=1 << 30,
        )
        index = PatientTree(max(1, min(EVICT_AT_ONCE, int(f.kv_slots * EVICT_SHARE))))
        scheduler = Scheduler(limits, KVCache(f.kv_slots + 1, index=index), VOCAB)
        return Replica(scheduler, SimulatedExecutor(f.step_model, free))

    # -- running ------------------------------------------------------------------------------------------------------
    def run(self, arrivals: Iterable[Arrival]) -> Outcome:
        waiting = iter(arrivals)
        upcoming = next(waiting, None)
        while upcoming is not None or self.events:
            if upcoming is not None and (not self.events or upcoming.at <= self.events[0][0]):
                self.now = upcoming.at
                self._arrive(upcoming)
                upcoming = next(waiting, None)
            else:
                self.now, _, what = heapq.heappop(self.events)
                if isinstance(what, Replica):
                    self._finish(what)
                else:
                    self._submit(self._choose(self.decoders, self.requests[str(what)][1]), str(what))
        for replica in (*self.decoders, *self.prefillers):
            stats = replica.scheduler.stats
            self.outcome.prompt_tokens += 0 if replica.executor.free_prompts else stats.prompt_tokens
            self.outcome.cached_tokens += 0 if replica.executor.free_prompts else stats.cached_tokens
            self.outcome.preemptions += stats.preemptions
            replica.scheduler.cache.audit()
        self.outcome.seconds = self.now
        return self.outcome

    def _at(self, when: float, what: object) -> None:
        heapq.heappush(self.events, (when, next(self.numbers), what))

    def _arrive(self, arrival: Arrival) -> None:
        served = Served(arrival.at, arrival.prompt, arrival.output)
        self.outcome.served.append(served)
        name = str(len(self.outcome.served))
        self.requests[name] = (served, arrival, _tokens(arrival, len(self.outcome.served)))
        self.unanswered.add(name)
        self._submit(self._choose(self.prefillers or self.decoders, arrival), name)

    def _choose(self, pool: list[Replica], arrival: Arrival) -> Replica:
        if len(pool) == 1:
            return pool[0]
        if self.fleet.router == "round-robin":
            return pool[next(self.turn) % len(pool)]
        if self.fleet.router == "prefix" and arrival.prefix_id:
            return pool[group_of(arrival, len(pool))]
        return min(pool, key=lambda r: r.open)

    def _submit(self, replica: Replica, name: str) -> None:
        served, arrival, tokens = self.requests[name]
        output = arrival.output
        if self.prefillers:  # the first token is drawn where the prompt is computed, the others after it
            handed = replica.executor.free_prompts
            tokens, output = (tokens + array("i", [TOKEN]), output - 1) if handed else (tokens, 1)
        params = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True, seed=0)
        salt = "" if self.fleet.prefix_caching else name
        try:
            replica.scheduler.submit(
                Request(id=name, tokens=cast("tuple[int, ...]", tokens), params=params, cache_salt=salt)
            )
        except InvalidRequest as error:
            served.refused = error.message
            return
        replica.open += 1
        self._start(replica)

    def _start(self, replica: Replica) -> None:
        if replica.busy:
            return
        plan = replica.scheduler.plan()
        if plan is None:
            return
        result, seconds = replica.executor.run(plan)
        replica.pending.append(result)
        replica.busy = True
        self.outcome.steps += 1
        self.outcome.busy_s += seconds
        self._at(self.now + seconds, replica)

    def _finish(self, replica: Replica) -> None:
        replica.busy = False
        apart = bool(self.prefillers) and not replica.executor.free_prompts
        unanswered = self.unanswered
        for update in replica.scheduler.commit(replica.pending.popleft()):
            if update.finish_reason is None and update.request not in unanswered:
                continue
            served, arrival, _ = self.requests[update.request]
            if update.request in unanswered:
                unanswered.remove(update.request)
                served.first = self.now
            if update.finish_reason is not None:
                replica.open -= 1
                del replica.executor.drawn[update.request]
                if apart and arrival.output > 1:
                    self._at(self.now + arrival.prompt * self.fleet.hand_over_s, update.request)
                else:
                    served.end = self.now
                    del self.requests[update.request]
        self._start(replica)


def group_of(arrival: Arrival, replicas: int) -> int:
    """The replica that keeps this prefix."""
    return zlib.crc32(str(arrival.prefix_id).encode()) % replicas


def simulate(fleet: Fleet, arrivals: Iterable[Arrival]) -> Outcome:
    """Serve `arrivals`, in order of time, until the last answer has ended."""
    return Simulation(fleet).run(arrivals)


def _tokens(arrival: Arrival, number: int) -> array[int]:
    """A prompt that shares its prefix with its group and nothing else with anybody: one token tells them apart."""
    tokens = array("i", [TOKEN]) * arrival.prompt
    if arrival.prefix:
        tokens[0] = -arrival.prefix_id % VOCAB
    if arrival.prefix < arrival.prompt:
        tokens[arrival.prefix] = TOKEN + number
    return tokens
