"""`septet simulate` held against the real engine: `python -m septet.bench.simulated [MODEL] [--json PATH] [--speed]`.

Starts the engine as `septet serve` does, in a process of its own, and is its only client (token ids, no text, no HTTP).
Measures short runs, fits a `Calibration`, replays a Poisson trace with shared prefixes in real time at a share of the
throughput that the simulation reaches with everybody there at once, simulates the same trace with the same limits, and
prints predicted against measured percentiles. The trace is not among the runs that were fitted. With echo:1000:20 for a
model the steps of the real engine sleep 20 ms, so that scheduling and queues are checked on a busy machine, too.
`--speed` needs no engine: how many requests and row-steps a second the simulation itself does.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import statistics
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from septet.advisor.arrangement import fitting
from septet.advisor.arrivals import Arrival, Lengths, poisson
from septet.advisor.calibrate import Calibration, bends, fit
from septet.advisor.estimate import Estimator, Work
from septet.advisor.hardware import hardware, model_shape
from septet.advisor.parallel import simulate_apart
from septet.advisor.simulate import Fleet, Outcome, Served, simulate
from septet.advisor.summary import summarise
from septet.bench.cpu_host import machine
from septet.bench.host import Neighbours, head
from septet.machine import usable_cpus

if TYPE_CHECKING:
    from septet.engine.client import EngineClient

RESULT = Path("benchmarks/results/cpu/simulated.json")
DECODES = ((1, 16), (2, 16), (4, 16), (8, 16), (16, 16), (32, 16), (4, 384), (16, 256))  # (rows, prompt)
PREFILLS = (32, 128, 512)  # tokens
STEPS, REPEATS = 40, 3
LENGTHS = Lengths(prompt=96, output=48, prefix=128, groups=4)


@dataclass
class Driver:
    """The engine's one client: sends token ids and writes down when the answers came."""

    client: EngineClient
    dice: random.Random = field(default_factory=lambda: random.Random(7))
    number: itertools.count[int] = field(default_factory=itertools.count)

    def prompt(self, n: int) -> list[int]:
        return [self.dice.randrange(256, self.client.info.vocab_size) for _ in range(n)]

    async def answer(self, tokens: list[int], n_out: int) -> list[float]:
        """Send now -> the time of each token; what arrives together has one time."""
        from septet.request import Request, SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=n_out, ignore_eos=True, seed=0)
        request = Request(id=f"r{next(self.number)}", tokens=tuple(tokens), params=params)
        times: list[float] = []
        async for update in self.client.generate(request):
            if update.error is not None:
                raise RuntimeError(f"the engine refused a request of the benchmark: {update.error}")
            times += [time.perf_counter()] * len(update.tokens)
        return times

    async def decode(self, rows: int, n_prompt: int) -> tuple[Work, float]:
        """Steps with `rows` answers under way: from the last one's first token to the first one's end."""
        answers = await asyncio.gather(*(self.answer(self.prompt(n_prompt), STEPS) for _ in range(rows)))
        begin, end = max(a[0] for a in answers), min(a[-1] for a in answers)
        counts = [sum(1 for t in a if begin < t <= end) for a in answers]
        steps = statistics.median(counts)
        done = n_prompt + STEPS - steps / 2  # its mean context meanwhile
        return Work(rows, round(rows * done)), (end - begin) / steps

    async def prefill(self, n: int) -> tuple[Work, float]:
        began = time.perf_counter()
        times = await self.answer(self.prompt(n), 1)
        return Work.of([], [(0, n)]), times[0] - began


async def calibrate(driver: Driver, name: str) -> tuple[Calibration, list[dict[str, object]]]:
    """Medians of each kind of step, and what is fitted to them."""
    await driver.prefill(512)
    await driver.decode(4, 16)
    runs: list[list[tuple[Work, float]]] = []
    for rows, n_prompt in DECODES:
        runs.append([await driver.decode(rows, n_prompt) for _ in range(REPEATS)])
    for n in PREFILLS:
        runs.append([await driver.prefill(n) for _ in range(2 * REPEATS)])
    samples = [(run[0][0], statistics.median(s for _, s in run)) for run in runs]
    step, row, token, context, pair = fit(samples)
    info, host = driver.client.info, machine()
    made = Calibration(
        model=name,
        machine=f"{host['cores']} cores, {', '.join(str(c) for c in host['cpu'])}, {info.kernels}",  # type: ignore[attr-defined]
        step=step, row=row, prompt_token=token, context_token=context, pair=pair,
        kv_slots=info.num_kv_slots - 1,
        max_num_seqs=info.max_num_seqs,
        max_num_batched_tokens=info.max_num_batched_tokens,
        max_model_len=info.max_model_len,
        overlap={name: value for name, value, _ in info.choices}.get("overlap", "on") == "on",
    )  # fmt: skip
    made = bends(made, samples)
    shown: list[dict[str, object]] = []
    for work, seconds in samples:
        shown.append({**asdict(work), "measured_ms": 1e3 * seconds, "fitted_ms": 1e3 * made.step_s(work)})
        print(
            f"  {work.rows:3} rows, {work.context:5} context, {work.prefill:4} prompt tokens: {1e3 * seconds:7.2f} ms, "
            f"fitted {1e3 * made.step_s(work):7.2f}"
        )
    return made, shown


def fleet(c: Calibration) -> Fleet:
    return Fleet(
        step_model=c,
        kv_slots=c.kv_slots,
        max_num_seqs=c.max_num_seqs,
        max_num_batched_tokens=c.max_num_batched_tokens,
        max_model_len=c.max_model_len,
        overlap=c.overlap,
    )


def make_trace(c: Calibration, load: float, seconds: float, seed: int) -> tuple[list[Arrival], float]:
    """Poisson at `load` times what the simulation answers a second with everybody there at once."""
    crowd = [replace(a, at=0.0) for a in poisson(300, 1.0, LENGTHS, seed)]
    rate = load * len(crowd) / simulate(fleet(c), crowd).seconds
    return list(poisson(max(20, round(rate * seconds)), rate, LENGTHS, seed)), rate


async def replay(driver: Driver, trace: list[Arrival]) -> Outcome:
    """In real time. Times are from the moment at which a request was due."""
    prefixes = {a.prefix_id: driver.prompt(a.prefix) for a in trace}
    prompts = [prefixes[a.prefix_id] + driver.prompt(a.prompt - a.prefix) for a in trace]
    before, began = await driver.client.stats(), time.perf_counter()

    async def one(arrival: Arrival, tokens: list[int]) -> Served:
        await asyncio.sleep(began + arrival.at - time.perf_counter())
        times = [t - began for t in await driver.answer(tokens, arrival.output)]
        return Served(arrival.at, arrival.prompt, arrival.output, times[0], times[-1])

    served = await asyncio.gather(*(one(a, tokens) for a, tokens in zip(trace, prompts, strict=True)))
    seconds, after = time.perf_counter() - began, await driver.client.stats()
    return Outcome(
        list(served),
        seconds,
        steps=after.steps - before.steps,
        prompt_tokens=after.prompt_tokens - before.prompt_tokens,
        cached_tokens=after.cached_tokens - before.cached_tokens,
        preemptions=after.preemptions - before.preemptions,
    )


def compare(predicted: Outcome, measured: Outcome) -> list[dict[str, object]]:
    said, seen = summarise(predicted), summarise(measured)
    pairs = [
        (f"{name} {q} ms", getattr(said, field_)[q], getattr(seen, field_)[q])
        for name, field_ in (("TTFT", "ttft_ms"), ("TPOT", "tpot_ms"))
        for q in ("mean", "p50", "p90", "p95", "p99")
    ]
    pairs += [("hit rate %", 100 * said.hit_rate, 100 * seen.hit_rate), ("steps", predicted.steps, measured.steps)]
    pairs.append(("output tokens/s", said.output_tokens_per_s, seen.output_tokens_per_s))
    print(f"  {'':16}{'predicted':>11}{'measured':>11}{'error':>8}")
    found: list[dict[str, object]] = []
    for name, a, b in pairs:
        error = 100 * (a / b - 1) if b else 0.0
        print(f"  {name:16}{a:11.2f}{b:11.2f}{error:+7.1f}%")
        found.append(
            {"figure": name, "predicted": round(a, 3), "measured": round(b, 3), "error_percent": round(error, 1)}
        )
    return found


async def validate(args: argparse.Namespace) -> dict[str, object]:
    from septet.config import EngineConfig
    from septet.engine.client import ProcessClient
    from septet.hub.pull import resolve

    path = args.model if Path(args.model).exists() or args.model.startswith("echo:") else str(resolve(args.model).path)
    settings = EngineConfig(
        model=path, device="cpu", kernels="native", max_model_len=1024, max_num_seqs=32, num_kv_slots=8192
    )
    cpus = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cpus[: args.cpus or len(cpus)])  # inherited by the engine, which counts its threads by it
    client = await ProcessClient.start(settings)
    os.sched_setaffinity(0, cpus)
    try:
        driver = Driver(client)
        others = Neighbours(client.info.pid)
        made, steps = await calibrate(driver, args.model)
        if args.calibration is not None:
            made.save(args.calibration)
        runs = []
        for seed in range(args.seed, args.seed + args.traces):
            trace, rate = make_trace(made, args.load, args.seconds, seed)
            print(f"  trace {seed}: {len(trace)} requests at {rate:.2f}/s, {args.load:.0%} of what it can answer")
            before, others = others.share(), Neighbours(client.info.pid)
            measured = await replay(driver, trace)
            during = others.share()
            _, again = await driver.decode(4, 16)
            drift = again / made.step_s(Work(4, 4 * (16 + STEPS // 2)))
            print(
                f"  other programs took {before:.0%} of the CPUs before and {during:.0%} during the trace; a step of "
                f"4 rows afterwards took {drift:.2f} times what was calibrated"
            )
            figures = compare(simulate(fleet(made), trace), measured)
            runs.append(
                {"seed": seed, "requests": len(trace), "rate": rate, "others_before": round(before, 3),
                 "others_during": round(during, 3), "drift": round(drift, 3), "figures": figures}
            )  # fmt: skip
    finally:
        await client.close()
    return {
        "calibration": asdict(made),
        "engine_cpus": args.cpus or len(cpus),
        "steps": steps,
        "load": args.load,
        "lengths": asdict(LENGTHS),
        "runs": runs,
    }


def speed(requests: int) -> dict[str, object]:
    """The simulation's own rate: llama-8b on H100s, 512 + 128 tokens on average, 20 requests/s a replica; one replica
    on one core, then as many replicas as there are cores."""
    config, weights = model_shape("llama-8b")
    model = Estimator(config, hardware("h100"), "bf16", 1, weights)
    found: dict[str, object] = {}
    for cores in sorted({1, usable_cpus()}):
        trace = list(poisson(cores * requests, cores * 20.0, Lengths(), seed=0))
        longest = max(a.prompt + a.output for a in trace)
        slots = fitting(model, max_num_seqs=256, max_model_len=longest, max_num_batched_tokens=8192)
        many = Fleet(step_model=model, kv_slots=slots, max_model_len=longest + 1, replicas=cores, router="round-robin")
        began, neighbours = time.perf_counter(), Neighbours()
        outcome = simulate_apart(many, trace, cores)
        seconds = time.perf_counter() - began
        others = neighbours.share()
        rows = sum(a.output for a in trace)
        million = 1e6 / len(trace) * seconds / 60
        found[f"{cores} cores"] = {"requests": len(trace), "row_steps": rows, "steps": outcome.steps,
                                   "seconds": round(seconds, 2), "million_minutes": round(million, 1),
                                   "others": round(others, 3)}  # fmt: skip
        print(
            f"  {cores} cores: {len(trace):,} requests, {rows:,} row-steps in {seconds:.1f} s: "
            f"{len(trace) / seconds:,.0f} requests/s, {rows / seconds:,.0f} row-steps/s, a million in {million:.1f} "
            f"min; other programs took {others:.0%} of the CPUs"
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2", help="a name of the catalogue or a path")
    parser.add_argument("--load", type=float, default=0.6, help="share of the highest throughput")
    parser.add_argument("--seconds", type=float, default=40.0, help="length of a trace")
    parser.add_argument("--traces", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cpus", type=int, help="of the engine [all]; on one, its threads wait for nobody's neighbour")
    parser.add_argument("--speed", action="store_true", help="only the simulation's own rate")
    parser.add_argument("--requests", type=int, default=10_000, help="with --speed: for each core")
    parser.add_argument("--calibration", type=Path, help="write it there, for septet simulate --calibration")
    parser.add_argument("--json", type=Path, default=RESULT)
    args = parser.parse_args()
    name = "speed" if args.speed else "scheduling" if args.model.startswith("echo:") else "validation"
    measured = speed(args.requests) if args.speed else asyncio.run(validate(args))
    found = json.loads(args.json.read_text()) if args.json.exists() else {"benchmark": "simulated"}
    found[name] = {**head("simulated"), **measured}
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
