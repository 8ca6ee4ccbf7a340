"""What grammars cost the host in each step, without a device: the engine's real loop over a stand-in for one.

    python -m septet.bench.structured_host TOKENIZER [--rows 64] [--steps 300] [--forward-ms 1.3] [--threads 14]

TOKENIZER: a GGUF file, a checkpoint's directory, or a tokenizer.json whose bytes count. Scheduler, runner, constraints
and masks are the engine's own. The clock is this thread's CPU time. The forward pass takes a fixed time of it; it stops
while the stand-in draws tokens (at random, under the masks: strings run into their maxLength) and jumps where the host
would wait. CUDA calls are missing: some tens of microseconds a step on either side.

Masks are made one after the other and timed one by one, since the machine at hand may have few CPUs; with --threads the
clock then counts what so many threads would have taken, each lane of a grammar on one thread at a time. That is an
estimate; --threads 1 is a measurement.
"""

from __future__ import annotations

import argparse
import gc
import heapq
import json
import random
import time
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from septet.bench.structured import ENDLESS
from septet.engine.constraints import Constraints
from septet.engine.grammars import Grammars
from septet.engine.local import LocalExecutor
from septet.engine.loop import EngineLoop
from septet.engine.messages import Submit, Teach
from septet.engine.rows import Rows
from septet.engine.runner import Runner
from septet.engine.scheduler import Scheduler, SchedulerLimits
from septet.engine.staging import HostCopy, Staging
from septet.grammar.masks import Masks
from septet.grammar.vocabulary import Vocabulary
from septet.kv.cache import KVCache
from septet.request import Request, SamplingParams
from septet.structured import Structured

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from llguidance import LLMatcher

    from septet.engine.constraints import TokenMasks
    from septet.engine.rows import RowInfo
    from septet.step import PlanRow

N_PROMPT = 128
DRAW_S = 30e-6
START_S = 60e-6  # of this thread's time, to have masks made on others


class Clock:
    """CPU time of this thread, where waiting is a jump and other programs do not count."""

    def __init__(self) -> None:
        self.skew = 0.0
        self.parts: dict[str, list[float]] = defaultdict(list)

    def now(self) -> float:
        return time.thread_time() + self.skew

    def wait(self, until: float) -> None:
        self.skew += max(0.0, until - self.now())

    @contextmanager
    def still(self) -> Iterator[None]:
        began = time.thread_time()
        yield
        self.skew -= time.thread_time() - began

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        began = self.now()
        yield
        self.parts[name].append(self.now() - began)


class Device:
    """Runs forward passes and draws in turn; as `StepGraphs`, for every shape."""

    def __init__(self, clock: Clock, rows: Rows, max_rows: int, vocab: int, forward_s: float) -> None:
        self.clock = clock
        self.vocab = vocab
        self.forward_s = forward_s
        self.free_at = 0.0
        self.rows = rows
        self.tokens = self.row = torch.zeros(max_rows, dtype=torch.int64)
        self.dice = random.Random(1)
        self.plan: Sequence[PlanRow] = ()

    def find(self, rows: Sequence[PlanRow], decode: bool) -> Device:
        return self

    def due(self, busy: bool) -> bool:
        return False

    def spare(self, busy: bool) -> bool:
        return False

    def position(self) -> torch.Tensor:
        return self.row

    def serves(self, info: RowInfo | None) -> bool:
        return info is not None and info.plain

    def serves_masked(self, info: RowInfo | None) -> bool:
        return info is not None and (info.plain or info.masked)

    def run(self, rows: Sequence[PlanRow], sample: bool) -> Device:
        self.free_at = max(self.free_at, self.clock.now()) + self.forward_s
        self.plan = rows
        if sample:
            self.draw_masked(None)
        return self

    def draw_masked(self, masks: TokenMasks | None) -> None:
        self.free_at = max(self.free_at, self.clock.now()) + DRAW_S
        with self.clock.still():
            n = sum(1 for row in self.plan if row.n_sample)
            self.tokens = torch.tensor([self.dice.randrange(1000, self.vocab) for _ in range(n)])
            if masks is not None:
                words = masks.words.numpy().view(np.uint32)
                drawn = [(i, self._any(words[line])) for i, line in enumerate(masks.line.tolist()) if line >= 0]
                for i, token in drawn:
                    self.tokens[i] = token

    def _any(self, words: np.ndarray) -> int:
        """One of the tokens, each as likely; without reading more than the words, which would empty the caches."""
        some = np.flatnonzero(words)
        while True:
            at, bit = int(some[self.dice.randrange(len(some))]), self.dice.randrange(32)
            if int(words[at]) >> bit & 1:
                return 32 * at + bit


class TimedCopy(HostCopy):
    """Is there when the device has come so far."""

    device: Device

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__(tensor)
        self.ready_at = self.device.free_at

    def numpy(self) -> np.ndarray:
        self.device.clock.wait(self.ready_at)
        return super().numpy()


class TimedMasks(Masks):
    """One by one on this thread; the clock counts what `threads` would have taken."""

    def __init__(self, clock: Clock, threads: int) -> None:
        super().__init__(1)
        self.clock = clock
        self.n_threads = threads
        self.constraints: Constraints
        self.lane_of: dict[int, int] = {}  # by id of the matcher

    def fill(self, matchers: Sequence[LLMatcher], out: np.ndarray) -> None:
        self.start(matchers, out)()

    def start(self, matchers: Sequence[LLMatcher], out: np.ndarray) -> Callable[[], None]:
        one = super().fill
        began = self.clock.now()
        took = self._each("fill, one row", matchers, lambda i: one([matchers[i]], out[i : i + 1]))
        self.clock.parts["fill"].append(took)
        until = began + took + (START_S if self.n_threads > 1 else 0.0)
        self.clock.skew += began - self.clock.now() + (START_S if self.n_threads > 1 else took)
        return lambda: self.clock.wait(until)

    def accept(self, matchers: Sequence[LLMatcher], tokens: Sequence[int]) -> list[bool]:
        taken: list[bool] = []
        one = super().accept
        began = self.clock.now()
        took = self._each("accept, one row", matchers, lambda i: taken.extend(one([matchers[i]], [tokens[i]])))
        self.clock.parts["accept"].append(took)
        self.clock.skew += began - self.clock.now() + took
        return taken

    def _each(self, name: str, matchers: Sequence[LLMatcher], do: Callable[[int], None]) -> float:
        times = []
        for i in range(len(matchers)):
            start = time.thread_time()
            do(i)
            times.append(time.thread_time() - start)
        self.clock.parts[name] += times
        return self._makespan(matchers, times) if self.n_threads > 1 else sum(times)

    def _makespan(self, matchers: Sequence[LLMatcher], times: list[float]) -> float:
        """Lanes in order, each on the thread that is free first."""
        if any(id(matcher) not in self.lane_of for matcher in matchers):
            self.lane_of = {id(row.matcher): row.lane for row in self.constraints.rows.values()}
        lanes: dict[int, float] = defaultdict(float)
        for matcher, seconds in zip(matchers, times, strict=True):
            lanes[self.lane_of[id(matcher)]] += seconds
        threads = [0.0] * self.n_threads
        for seconds in lanes.values():
            heapq.heappush(threads, heapq.heappop(threads) + seconds)
        return max(threads)


class Box:
    """Inbox and outbox."""

    def __init__(self) -> None:
        self.messages: list[Any] = []
        self.sent: list[Any] = []

    def post(self, message: Any) -> None:
        self.messages.append(message)

    def receive(self, timeout: float | None) -> list[Any]:
        taken, self.messages = self.messages, []
        return taken

    def send(self, messages: Sequence[Any]) -> None:
        self.sent += messages


def vocabulary(path: Path) -> Vocabulary:
    from septet.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(path)
    tokens = map(tokenizer.token_bytes, range(tokenizer.vocab_size))
    return Vocabulary.of(tokens, tokenizer.special_ids, tokenizer.eos_token_ids, tokenizer.as_json())


def run(args: argparse.Namespace, words: Vocabulary, structured: Structured | None) -> tuple[float, Clock]:
    """-> (tokens per second of the clock, the clock)."""
    n_rows, steps, vocab = args.rows, args.steps, len(words)
    clock = Clock()
    rows = Rows(n_rows, N_PROMPT + steps + 8, torch.device("cpu"))
    device = Device(clock, rows, n_rows, vocab, args.forward_ms / 1000)
    nothing: Any = None
    runner = Runner(nothing, nothing, [], rows, Staging(torch.device("cpu")))
    stand_in: Any = device
    runner.graphs = stand_in
    runner.fetch = type("Copy", (TimedCopy,), {"device": device})
    grammars = Grammars(vocab)
    constraints = runner.constraints = Constraints(grammars, vocab, torch.device("cpu"))
    constraints.overlaps = args.overlap == "on"
    masks = constraints.library = TimedMasks(clock, args.threads)
    masks.constraints = constraints
    box, limits = (
        Box(),
        SchedulerLimits(
            max_num_seqs=n_rows, max_num_batched_tokens=n_rows * N_PROMPT, max_model_len=N_PROMPT + steps + 8
        ),
    )
    scheduler = Scheduler(limits, KVCache(n_rows * (N_PROMPT + steps + 8) + 1), vocab)
    loop = EngineLoop(scheduler, LocalExecutor(runner, depth=2), box, box, grammars=grammars)
    grammars.notify = box.post
    grammars.max_lanes = args.lanes or args.threads  # this machine's CPUs say nothing
    dice = random.Random(0)
    requests = []
    for i in range(n_rows):
        prompt = tuple(dice.randrange(1000, vocab) for _ in range(N_PROMPT))
        params = SamplingParams(max_tokens=steps, ignore_eos=True, seed=i, structured=structured)
        requests.append(Request(id=f"request-{i}", tokens=prompt, params=params, eos_token_ids=words.eos))
    box.messages += [Teach(words), Submit(tuple(requests))]
    while scheduler.stats.running < n_rows:
        loop.turn()
    return _timed(loop, scheduler, clock)


def _timed(loop: EngineLoop, scheduler: Scheduler, clock: Clock) -> tuple[float, Clock]:
    executor: Any = loop.executor
    parts = ((scheduler, "plan"), (scheduler, "commit"), (executor, "launch"), (executor.runner, "_masks"))
    for owner, name in parts:
        setattr(owner, name, _part(clock, name.removeprefix("_"), getattr(owner, name)))
    gc.collect()
    gc.disable()
    clock.parts.clear()
    made, began = scheduler.stats.generated_tokens, clock.now()
    while scheduler.stats.running:
        with clock.part("turn"):
            loop.turn()
    gc.enable()
    return (scheduler.stats.generated_tokens - made) / (clock.now() - began), clock


def _part(clock: Clock, name: str, wrapped: Any) -> Any:
    def timed(*args: Any) -> Any:
        with clock.part(name):
            return wrapped(*args)

    return timed


def report(clock: Clock, rate: float, base: float | None) -> dict[str, Any]:
    parts = {name: [1e6 * seconds for seconds in values] for name, values in clock.parts.items()}
    figures: dict[str, Any] = {"tokens_per_s": round(rate), "ratio": None if base is None else round(rate / base, 3)}
    print(f"  {rate:9.0f} tokens/s" + ("" if base is None else f", {rate / base:.3f} of free"))
    for name, values in sorted(parts.items()):
        mean, at = sum(values) / len(values), np.percentile(values, (50, 99, 100))
        figures[name] = {
            "mean_us": round(mean, 1),
            **dict(zip(("p50_us", "p99_us", "max_us"), at.round(1), strict=True)),
        }
        print(f"    {name:16} mean {mean:8.1f}  p50 {at[0]:8.1f}  p99 {at[1]:8.1f}  max {at[2]:8.1f} us")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--forward-ms", type=float, default=1.3)
    parser.add_argument("--threads", type=int, default=14)
    parser.add_argument("--overlap", choices=("on", "off"), default="on", help="masks are made beside the loop")
    parser.add_argument("--lanes", type=int, help="of one grammar (as many as threads)")
    parser.add_argument("--schema", type=json.loads, default=ENDLESS, help="must not end before so many steps")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    words = vocabulary(args.tokenizer)
    print(f"{args.rows} rows, {len(words)} tokens, forward {args.forward_ms} ms, {args.threads} threads")
    free, clock = run(args, words, None)
    figures = {"free": report(clock, free, None)}
    bound, clock = run(args, words, Structured.json_schema(args.schema))
    figures["constrained"] = report(clock, bound, free)
    if args.json:
        args.json.write_text(json.dumps({**{k: str(v) for k, v in vars(args).items()}, **figures}, indent=1))


if __name__ == "__main__":
    main()
