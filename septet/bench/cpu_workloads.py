"""Septet's side of the CPU workloads, through the engine: scheduler, executor, runner, sampler; no text, no HTTP.

    python -m septet.bench.cpu_workloads --model smollm2 [--kernels native] [--repeats 3] [--json PATH] [--profile]

Prefill of 512 tokens, one stream of 128 tokens after 16, 8 and 32 streams of 64 steps after 16 tokens; medians over
repeats, in tokens per second. Prompts are random ids, other ones at each repeat, so that no prefix is cached.
`--json -` prints the figures as the last line; `--profile` shows where each workload's time goes on the native tape.
Called by the CPU table (`cpu_table.py`) in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from septet.bench.host import head, write_results

if TYPE_CHECKING:
    from septet.engine.process import Engine

__all__ = ["Workload", "measure"]


@dataclass(frozen=True)
class Workload:
    """`streams` requests of `n_prompt` tokens at once, `n_out` tokens each; n_out 1 = the prefill is timed."""

    streams: int
    n_prompt: int
    n_out: int

    @property
    def is_prefill(self) -> bool:
        return self.n_out == 1


WORKLOADS = {
    "pp512": Workload(1, 512, 1),
    "tg128": Workload(1, 16, 129),
    "b8": Workload(8, 16, 65),
    "b32": Workload(32, 16, 65),
}


def run(engine: Engine, prompts: list[list[int]], n_out: int) -> list[float]:
    """Answer all prompts greedily -> the time (s) at which each step was committed, the start first."""
    from septet.request import Request, SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=n_out, ignore_eos=True, seed=0)
    scheduler, executor = engine.scheduler, engine.executor
    for i, prompt in enumerate(prompts):
        scheduler.submit(Request(id=f"{time.perf_counter_ns()}-{i}", tokens=tuple(prompt), params=params))
    left, times = len(prompts), [time.perf_counter()]
    while left:
        plan = scheduler.plan()
        assert plan is not None, "the scheduler has requests but no plan"
        for update in scheduler.commit(executor.launch(plan).result()):
            assert update.error is None, update.error
            left -= update.finish_reason is not None
        times.append(time.perf_counter())
    return times


def measure(engine: Engine, work: Workload, dice: random.Random, vocab: int) -> float:
    """Tokens per second of one run: of the prompt, or of the decode steps after all prompts."""
    prompts = [[dice.randrange(256, vocab) for _ in range(work.n_prompt)] for _ in range(work.streams)]
    times = run(engine, prompts, work.n_out)
    if work.is_prefill:
        return work.n_prompt / (times[-1] - times[0])
    steps = work.n_out - 1  # every stream decodes in each of the last `steps` steps
    return work.streams * steps / (times[-1] - times[-1 - steps])


class Clock:
    """The time of the tape's phases from here on, prompts and all."""

    def __init__(self, engine: Engine) -> None:
        self.tape = engine.executor.tape  # type: ignore[attr-defined]
        self.tape.times()
        self.began = time.perf_counter()

    def table(self) -> str:
        total = time.perf_counter() - self.began
        rows = sorted(self.tape.times().items(), key=lambda row: -sum(row[1]))
        rows.append(("outside the tape", (total - sum(map(sum, (times for _, times in rows))), 0.0)))
        lines = (
            f"  {work / total:6.1%} {wait / total:6.1%}  {label}" for label, (work, wait) in rows if work + wait > 0.0
        )
        return "\n".join([f"  {total:.2f} s: working, waiting for the other threads", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a name of the catalogue or a path")
    parser.add_argument("--kernels", default="native")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=list(WORKLOADS), choices=list(WORKLOADS))
    parser.add_argument("--profile", action="store_true", help="time by kind of phase (native kernels)")
    parser.add_argument("--json", help="write the figures there; - prints them")
    args = parser.parse_args()

    from septet.machine import thread_env, usable_cpus

    os.environ.update(thread_env(os.environ, usable_cpus()))  # before torch loads, as the engine process does
    from septet.config import EngineConfig
    from septet.engine.process import build_engine
    from septet.hub.pull import resolve

    path = args.model if Path(args.model).exists() else str(resolve(args.model).path)
    settings = EngineConfig(
        model=path, device="cpu", kernels=args.kernels, max_model_len=1024, max_num_seqs=32, num_kv_slots=16384
    )
    engine = build_engine(settings)
    for setting in ("kernels", "dtype", "kv_dtype"):
        print(*(f"{name}: {value} ({why})" for name, value, why in engine.info.choices if name == setting))
    dice, figures = random.Random(0), {}
    for name in args.only:
        clock = Clock(engine) if args.profile else None
        values = [measure(engine, WORKLOADS[name], dice, engine.info.vocab_size) for _ in range(args.repeats)]
        figures[name] = round(statistics.median(values), 1)
        print(f"{name}: {figures[name]} tokens/s, median of {', '.join(f'{v:.0f}' for v in values)}")
        if clock is not None:
            print(clock.table())
    if args.json == "-":
        print(json.dumps(figures))
    elif args.json:
        write_results(Path(args.json), head("cpu_workloads"), figures=figures)


if __name__ == "__main__":
    main()
