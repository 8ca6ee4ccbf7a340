"""The real scheduler and cache over a virtual clock: what a workload would see, without a model or a device.

Called by `septet simulate`. Each replica is a `Scheduler` with its `KVCache`; a `SimulatedExecutor` answers plans at
once with made-up tokens and says how long the step would take (`estimate.StepModel`). A heap of events drives any
number of replicas behind a router. Steps that nobody comes into or leaves are taken several at once (`leap.py`), which
changes no figure. Deterministic. What is not simulated: tokenising, HTTP, the network.
"""

from __future__ import annotations

import gc
import heapq
import itertools
import math
import zlib
from array import array
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from septet.advisor.estimate import Work
from septet.advisor.leap import LeapingScheduler
from septet.engine.scheduler import SchedulerLimits
from septet.errors import InvalidRequest
from septet.kv.cache import KVCache
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
MOST_AHEAD = 64  # steps taken at once
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
    request_s: float = 0.0  # from a client to the scheduler and back
    overlap: bool = False  # step N + 1 is planned while N runs, so that who comes meanwhile is in N + 2 at the soonest

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

    def run(self, plan: StepPlan) -> tuple[StepResult, Work]:
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
        return StepResult(plan.step, drawn), Work(rows, context, prefill, pairs)


@dataclass(slots=True, eq=False)
class Replica:
    """One engine, and its steps under way: a planned one, or several that will follow each other if nothing comes."""

    rank: int  # which of those that end at the same time is first
    scheduler: LeapingScheduler
    executor: SimulatedExecutor
    open: int = 0  # requests
    busy: bool = False
    result: StepResult | None = None  # of the step under way; None: of several that only decode
    took: list[float] = field(default_factory=list)  # seconds of each step under way
    ends: list[float] = field(default_factory=list)
    event: int = -1  # the number of the one that ends them
    fresh: list[str] = field(default_factory=list)  # with overlap: who came since the step under way began,
    ready: list[str] = field(default_factory=list)  # and since the one before it
    busy_s: float = 0.0


class Simulation:
    """`leaps` False: every step by itself. The answer is the same."""

    def __init__(self, fleet: Fleet, leaps: bool = True) -> None:
        self.fleet = fleet
        self.leaps = leaps
        ranks = itertools.count()
        self.decoders = [self._replica(next(ranks), free=fleet.prefill_replicas > 0) for _ in range(fleet.replicas)]
        self.prefillers = [self._replica(next(ranks), free=False) for _ in range(fleet.prefill_replicas)]
        self.replicas = (*self.decoders, *self.prefillers)
        # (when, rank, number, what): ends of steps by replica, then hand-overs by request
        self.events: list[tuple[float, int, int, Replica | str]] = []
        self.numbers = itertools.count()
        self.turn = itertools.count()
        self.requests: dict[str, tuple[Served, Arrival, array[int]]] = {}
        self.unanswered: set[str] = set()
        self.params: dict[int, SamplingParams] = {}  # by output
        self.outcome = Outcome([], replicas=len(self.replicas))
        self.now = 0.0
        self.next_arrival = math.inf

    def _replica(self, rank: int, free: bool) -> Replica:
        f = self.fleet
        length = min(f.max_model_len, f.kv_slots)
        most = length * f.max_num_seqs if free else f.max_num_batched_tokens if f.chunked_prefill else length
        limits = SchedulerLimits(
            max_num_seqs=f.max_num_seqs,
            max_num_batched_tokens=max(most, f.max_num_seqs),
            max_model_len=length,
            max_waiting=1 << 30,
        )
        scheduler = LeapingScheduler(limits, KVCache(f.kv_slots + 1), VOCAB)
        return Replica(rank, scheduler, SimulatedExecutor(f.step_model, free))

    # -- running ------------------------------------------------------------------------------------------------------
    def run(self, arrivals: Iterable[Arrival]) -> Outcome:
        waiting = iter(arrivals)
        upcoming, way = next(waiting, None), self.fleet.request_s
        while upcoming is not None or self.events:
            if upcoming is not None and (not self.events or upcoming.at + way <= self.events[0][0]):
                arrived, upcoming = upcoming, next(waiting, None)
                self.now, self.next_arrival = arrived.at + way, math.inf if upcoming is None else upcoming.at + way
                self._arrive(arrived)
            else:
                when, _, number, what = heapq.heappop(self.events)
                if isinstance(what, str):
                    self.now = when
                    self._submit(self._choose(self.decoders, self.requests[what][1]), what)
                elif number == what.event:
                    self.now = when
                    self._finish(what)
        for replica in self.replicas:
            stats = replica.scheduler.stats
            self.outcome.prompt_tokens += 0 if replica.executor.free_prompts else stats.prompt_tokens
            self.outcome.cached_tokens += 0 if replica.executor.free_prompts else stats.cached_tokens
            self.outcome.preemptions += stats.preemptions
            self.outcome.steps += stats.steps
            self.outcome.busy_s += replica.busy_s
            replica.scheduler.audit()
        self.outcome.seconds = self.now
        return self.outcome

    # -- requests -----------------------------------------------------------------------------------------------------
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
        replica.open += 1
        if not replica.busy:
            self._enter(replica, name)
            self._start(replica)
            return
        if self.fleet.overlap:
            replica.fresh.append(name)
        else:
            self._enter(replica, name)
        if len(replica.ends) > 1:  # the step under way now is the last without it; arrivals come before ends
            handed = replica.executor.free_prompts
            self._cut(replica, (bisect_right if handed else bisect_left)(replica.ends, self.now) + 1)

    def _enter(self, replica: Replica, name: str) -> None:
        served, arrival, tokens = self.requests[name]
        output, handed = arrival.output, replica.executor.free_prompts
        if self.prefillers:  # the first token is drawn where the prompt is computed, the others after it
            tokens, output = (tokens + array("i", [TOKEN]), output - 1) if handed else (tokens, 1)
        params = self.params.get(output)
        if params is None:
            params = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True, seed=0)
            self.params[output] = params
        salt = "" if self.fleet.prefix_caching else name
        try:
            replica.scheduler.submit(
                Request(id=name, tokens=cast("tuple[int, ...]", tokens), params=params, cache_salt=salt)
            )
        except InvalidRequest as error:
            served.refused = error.message
            replica.open -= 1

    # -- steps --------------------------------------------------------------------------------------------------------
    def _start(self, replica: Replica) -> None:
        for name in replica.ready:
            self._enter(replica, name)
        replica.busy = self._step(replica)
        if not replica.busy and replica.fresh:  # no step was planned meanwhile that they would have to wait for
            for name in replica.fresh:
                self._enter(replica, name)
            replica.fresh = []
            replica.busy = self._step(replica)
        replica.ready, replica.fresh = replica.fresh, []

    def _step(self, replica: Replica) -> bool:
        """The next step, or several alike; False: there is nothing to compute."""
        ahead = replica.scheduler.ahead() if self.leaps else None
        if ahead is not None:
            replica.result = None
            self._look_ahead(replica, 1 if replica.fresh else ahead.steps, ahead.rows, ahead.context)
        else:
            plan = replica.scheduler.plan()
            if plan is None:
                return False
            replica.result, work = replica.executor.run(plan)
            seconds = self.fleet.step_model.step_s(work)
            replica.took, replica.ends = [seconds], [self.now + seconds]
        self._await(replica)
        return True

    def _look_ahead(self, replica: Replica, steps: int, rows: int, context: int) -> None:
        """The steps that will follow if nobody comes: one more token of context for each row in each."""
        until = self.next_arrival if len(self.replicas) == 1 else math.inf
        end, step_s, took, ends = self.now, self.fleet.step_model.step_s, [], []
        for _ in range(min(steps, MOST_AHEAD)):
            seconds = step_s(Work(rows, context))
            end += seconds
            took.append(seconds)
            ends.append(end)
            if end >= until:
                break
            context += rows
        replica.took, replica.ends = took, ends

    def _cut(self, replica: Replica, n: int) -> None:
        """Only `n` of the steps under way are to be taken."""
        if n < len(replica.ends):
            del replica.took[n:], replica.ends[n:]
            self._await(replica)

    def _await(self, replica: Replica) -> None:
        replica.event = next(self.numbers)
        heapq.heappush(self.events, (replica.ends[-1], replica.rank, replica.event, replica))

    def _finish(self, replica: Replica) -> None:
        for seconds in replica.took:
            replica.busy_s += seconds
        if replica.result is None:
            for name in replica.scheduler.leap(len(replica.ends), TOKEN):
                self._ended(replica, name)
        else:
            unanswered = self.unanswered
            for update in replica.scheduler.commit(replica.result):
                if update.request in unanswered:
                    unanswered.remove(update.request)
                    self.requests[update.request][0].first = self.now
                if update.finish_reason is not None:
                    self._ended(replica, update.request)
        self._start(replica)

    def _ended(self, replica: Replica, name: str) -> None:
        served, arrival, _ = self.requests[name]
        replica.open -= 1
        del replica.executor.drawn[name]
        if self.prefillers and not replica.executor.free_prompts and arrival.output > 1:
            when = self.now + arrival.prompt * self.fleet.hand_over_s
            heapq.heappush(self.events, (when, len(self.replicas), int(name), name))
        else:
            served.end = self.now
            del self.requests[name]


def group_of(arrival: Arrival, replicas: int) -> int:
    """The replica that keeps this prefix."""
    return zlib.crc32(str(arrival.prefix_id).encode()) % replicas


def simulate(fleet: Fleet, arrivals: Iterable[Arrival], leaps: bool = True) -> Outcome:
    """Serve `arrivals`, in order of time, until the last answer has ended."""
    collecting = gc.isenabled()
    gc.disable()  # what a request leaves behind holds no cycles, and its rounds would look at all requests so far
    try:
        return Simulation(fleet, leaps).run(arrivals)
    finally:
        if collecting:
            gc.enable()


def _tokens(arrival: Arrival, number: int) -> array[int]:
    """A prompt that shares its prefix with its group and nothing else with anybody: one token tells them apart."""
    tokens = array("i", [TOKEN]) * arrival.prompt
    if arrival.prefix:
        tokens[0] = -arrival.prefix_id % VOCAB
    if arrival.prefix < arrival.prompt:
        tokens[arrival.prefix] = TOKEN + number
    return tokens
