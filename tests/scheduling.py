"""Drive a scheduler and an EchoExecutor as the engine's loop does; and what each request must get, computed alone."""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from septet.engine.echo import EchoExecutor, next_token
from septet.engine.scheduler import Scheduler, SchedulerLimits
from septet.kv.cache import KVCache
from septet.request import FinishReason, Request, SamplingParams

if TYPE_CHECKING:
    from septet.engine.executor import PendingStep
    from septet.engine.messages import Update
    from septet.step import Logprobs, StepPlan

VOCAB = 50


def request(id: str, tokens: list[int], max_tokens: int = 8, **more: object) -> Request:
    """`more`: fields of Request, and of SamplingParams."""
    names = ("priority", "arrival", "eos_token_ids", "cache_salt", "pins")
    own = {name: more.pop(name) for name in names if name in more}
    params = SamplingParams(**{"seed": 0, "max_tokens": max_tokens, **more})  # type: ignore[arg-type]
    return Request(id=id, tokens=tuple(tokens), params=params, **own)  # type: ignore[arg-type]


def prompt(n: int, start: int = 0) -> list[int]:
    return [(start + 7 * i) % VOCAB for i in range(n)]


def alone(asked: Request, max_model_len: int = 10**9, capacity: int = 10**9) -> tuple[list[int], FinishReason]:
    """The output of a request computed token by token with nobody else around."""
    params, tokens = asked.params, list(asked.tokens)
    assert params.max_tokens is not None
    end = min(len(tokens) + params.max_tokens, max_model_len, capacity + 1)
    stops = set(params.stop_token_ids) | (set() if params.ignore_eos else set(asked.eos_token_ids))
    n = len(tokens)
    while len(tokens) < end:
        tokens.append(next_token(tokens, n, params, asked.eos_token_ids, VOCAB))
        if tokens[-1] in stops and len(tokens) - n > params.min_tokens:
            return tokens[n:], FinishReason.STOP
    return tokens[n:], FinishReason.LENGTH


@dataclass
class Got:
    """All updates of one request, put together."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    prompt_logprobs: list[Logprobs] = field(default_factory=list)
    cached: list[int] = field(default_factory=list)  # one per update
    pinned: list[tuple[int, ...]] = field(default_factory=list)  # where some are told
    final: Update | None = None

    def take(self, update: Update) -> None:
        assert self.final is None, f"{update.request} was answered after its final update"
        self.tokens += update.tokens
        self.logprobs += update.logprobs
        self.prompt_logprobs += update.prompt_logprobs
        self.cached.append(update.cached_tokens)
        self.pinned += [update.pinned] if update.pinned else []
        if update.finish_reason is not None:
            self.final = update

    @property
    def reason(self) -> FinishReason | None:
        return self.final.finish_reason if self.final else None


class Engine:
    """One turn at a time: plan, launch, commit the step before; every turn ends with an audit."""

    def __init__(
        self,
        rows: int = 4,
        budget: int = 64,
        length: int = 200,
        capacity: int = 400,
        depth: int = 1,
        prefix: bool = True,
        waiting: int = 1000,
        forces: int = 0,
    ) -> None:
        limits = SchedulerLimits(
            max_num_seqs=rows, max_num_batched_tokens=budget, max_model_len=length, max_waiting=waiting
        )
        self.cache = KVCache(capacity + 1, prefix)
        self.scheduler = Scheduler(limits, self.cache, VOCAB)
        self.executor = EchoExecutor(depth, VOCAB, forces=forces)
        self.in_flight: deque[tuple[StepPlan, PendingStep]] = deque()
        self.got: defaultdict[str, Got] = defaultdict(Got)
        self.plans: list[StepPlan] = []

    def submit(self, *requests: Request) -> None:
        for asked in requests:
            self.scheduler.submit(asked)

    def abort(self, id: str) -> None:
        self.take(self.scheduler.abort(id))

    def take(self, updates: list[Update]) -> None:
        for update in updates:
            self.got[update.request].take(update)

    def turn(self) -> StepPlan | None:
        plan = self.scheduler.plan()
        if plan is not None:
            self.plans.append(plan)
            self.in_flight.append((plan, self.executor.launch(plan)))
        if self.in_flight and (plan is None or len(self.in_flight) >= self.executor.depth):
            self.take(self.scheduler.commit(self.in_flight.popleft()[1].result()))
        self.scheduler.audit()
        return plan

    def fail_oldest(self, error: Exception) -> None:
        self.take(self.scheduler.fail(self.in_flight.popleft()[0], error))
        self.scheduler.audit()

    @property
    def busy(self) -> bool:
        stats = self.scheduler.stats
        return bool(self.in_flight) or stats.running + stats.waiting > 0

    def run(self, turns: int = 10_000) -> None:
        """Until everything has ended. Fails if that takes more than `turns`."""
        while self.busy:
            turns -= 1
            assert turns >= 0, f"no end in sight: {self.scheduler.stats}"
            self.turn()
        assert self.scheduler.plan() is None
        assert self.cache.leased == 0

    def rows(self, plan: StepPlan | None = None) -> list[tuple[str, int, int, int]]:
        """(request, start, n, n_sample) of the rows of a plan, the newest by default."""
        return [(row.request, row.start, row.n, row.n_sample) for row in (plan or self.plans[-1]).rows]

    def check(self, *requests: Request) -> None:
        """Each got exactly what it gets alone."""
        limits = self.scheduler.limits
        for asked in requests:
            tokens, reason = alone(asked, limits.max_model_len, self.cache.capacity)
            assert (self.got[asked.id].tokens, self.got[asked.id].reason) == (tokens, reason), asked.id
