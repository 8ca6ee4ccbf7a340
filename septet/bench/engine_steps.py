"""Engine CPU time per step without a model: `python -m septet.bench.engine_steps [--json PATH]`.

Times `Scheduler.plan` and `Scheduler.commit` apart, at 1, 64 and 256 decoding rows, over an EchoExecutor that checks
nothing; a figure to keep an eye on (aim: plan + commit below 150 us at 64 rows and 500 us at 256). CPU time of the
thread, so that other processes do not count; the median is the figure, p99 shows the pauses.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from septet.bench.host import head, write_results
from septet.engine.echo import EchoExecutor
from septet.engine.scheduler import Scheduler, SchedulerLimits
from septet.kv.cache import KVCache
from septet.request import Request, SamplingParams

if TYPE_CHECKING:
    from septet.engine.executor import PendingStep

__all__ = ["Figure", "main", "measure"]

ROWS = (1, 64, 256)
PROMPT = 128  # tokens, all different: no prefix is shared
VOCAB = 32_000


@dataclass(frozen=True, slots=True)
class Figure:
    """Microseconds of host time per step, with `rows` decoding rows and `depth` steps in flight."""

    rows: int
    depth: int
    steps: int
    plan_us: float  # median
    commit_us: float  # median
    step_us: float  # median of plan + commit
    step_p99_us: float


def measure(rows: int, depth: int, steps: int) -> Figure:
    """Run `steps` decode steps of `rows` sequences after their prefill."""
    length = PROMPT + steps + 64
    limits = SchedulerLimits(max_num_seqs=rows, max_num_batched_tokens=max(512, 2 * rows), max_model_len=length)
    scheduler = Scheduler(limits, KVCache(rows * length + 1), VOCAB)
    executor = EchoExecutor(depth, VOCAB, verify=False)
    for i in range(rows):
        prompt = tuple((i * 7919 + j * 104_729) % VOCAB for j in range(PROMPT))
        scheduler.submit(Request(id=f"request-{i}", tokens=prompt, params=SamplingParams(seed=i)))
    in_flight: deque[PendingStep] = deque()
    while scheduler.stats.last_step_tokens != rows or scheduler.stats.last_step_rows != rows:
        _turn(scheduler, executor, in_flight)
    gc.collect()
    gc.disable()  # as the engine's loop does while it is busy
    times = [_turn(scheduler, executor, in_flight) for _ in range(steps)]
    gc.enable()
    plan_us = statistics.median(plan for plan, _ in times) * 1e6
    commit_us = statistics.median(commit for _, commit in times) * 1e6
    both = sorted((plan + commit) * 1e6 for plan, commit in times)
    p99 = both[min(len(both) - 1, len(both) * 99 // 100)]
    return Figure(rows, depth, steps, *(round(us, 1) for us in (plan_us, commit_us, statistics.median(both), p99)))


def _turn(scheduler: Scheduler, executor: EchoExecutor, in_flight: deque[PendingStep]) -> tuple[float, float]:
    """One turn of the engine's loop: seconds in plan and in commit."""
    start = time.thread_time()
    plan = scheduler.plan()
    plan_s = time.thread_time() - start
    if plan is not None:
        in_flight.append(executor.launch(plan))
    if plan is not None and len(in_flight) < executor.depth:
        return plan_s, 0.0
    result = in_flight.popleft().result()
    start = time.thread_time()
    scheduler.commit(result)
    return plan_s, time.thread_time() - start


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Engine CPU time per decode step, without a model.")
    parser.add_argument("--steps", type=int, default=1000, help="decode steps per figure (default 1000)")
    parser.add_argument("--depth", type=int, default=2, choices=(1, 2), help="steps in flight (default 2)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args(argv)
    print(f"{'rows':>5} {'plan us':>9} {'commit us':>10} {'step us':>9} {'p99 us':>9}")
    figures = []
    for rows in ROWS:
        figure = measure(rows, args.depth, args.steps)
        figures.append(asdict(figure))
        print(
            f"{rows:5d} {figure.plan_us:9.1f} {figure.commit_us:10.1f} {figure.step_us:9.1f} {figure.step_p99_us:9.1f}"
        )
    if args.json:
        write_results(args.json, {**head("engine_steps"), "depth": args.depth}, figures=figures)


if __name__ == "__main__":
    main()
