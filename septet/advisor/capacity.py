"""Capacity planning: how many devices a workload needs, in which arrangement, at what cost.

Called by `septet plan`. Arithmetic (`estimate.py`, or a calibration) says what each arrangement does under the load;
the cheapest ones are then simulated (`simulate.py`), with more replicas until the 95th percentiles meet the targets.
`notes.py` explains the answer.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from septet.advisor.arrangement import Arrangement, of_calibration, of_card
from septet.advisor.arrivals import Lengths, poisson
from septet.advisor.estimate import QUANTS, Estimator, Work
from septet.advisor.simulate import Fleet, Outcome, simulate
from septet.advisor.summary import summarise
from septet.errors import InvalidRequest, OutOfMemory

if TYPE_CHECKING:
    from septet.advisor.calibrate import Calibration
    from septet.advisor.hardware import Hardware
    from septet.config import ModelConfig

__all__ = ["Checked", "Demand", "Option", "Plan", "make_plan", "plan_of_calibration"]

BUSY = 0.8  # of a replica's streams in use on average: queueing explodes beyond
TRIES = 12  # simulations of one plan
MORE = 0.05  # replicas after a simulation that missed
WARM = 0.3  # of the simulated requests, which come before the load is what it will be


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """Users who each send a prompt, read the answer, and think."""

    users: int
    prompt: int = 1024  # tokens, history included
    output: int = 256
    shared: int = 0  # tokens of the prompt that are found in the prefix cache
    think_s: float = 30.0  # from an answer's end to the next prompt
    ttft_ms: float = 500.0  # targets of the 95th percentile
    tpot_ms: float = 50.0

    def __post_init__(self) -> None:
        for name in ("users", "prompt", "output"):
            if getattr(self, name) < 1:
                raise InvalidRequest(f"{name} must be at least 1, not {getattr(self, name)}", param=name)
        for name in ("think_s", "ttft_ms", "tpot_ms"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise InvalidRequest(f"{name} must be a number from 0 on, not {getattr(self, name)}", param=name)
        if not 0 <= self.shared < self.prompt:
            raise InvalidRequest(f"shared must be from 0 to prompt - 1, not {self.shared}", param="shared")


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One arrangement, as many times as the demand needs it. Times are means under the planned load, by arithmetic."""

    quant: str
    tp: int
    pp: int
    weights_gib: float  # per replica
    kv_tokens: int  # that a replica's pool holds
    streams: int  # that a replica takes at most
    rows: float  # that are open at a replica on average
    tpot_ms: float
    ttft_ms: float
    queue_ms: float  # of it, before the step that computes the prompt
    prefill_share: float  # of a replica's time
    replicas: int
    devices: int
    requests_per_s: float  # of all
    tokens_per_s: float  # of all, output
    usd_per_hour: float
    usd_per_million: float  # output tokens, under this demand
    meets: bool
    why_not: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """What the simulation of one replica of the chosen option said."""

    requests: int
    ttft_ms: float
    ttft_p95_ms: float
    tpot_ms: float
    tpot_p95_ms: float
    goodput_share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    model: str
    hardware: str
    demand: Demand
    best: Option
    options: tuple[Option, ...]
    checked: Checked | None
    runnable: Option | None  # the cheapest that this release of Septet runs, where that is another one
    active: int  # streams that are open at a time
    notes: tuple[tuple[str, str], ...] = field(default=())  # (how it is known, statement)

    def data(self) -> dict[str, Any]:
        return asdict(self)


def make_plan(
    name: str,
    config: ModelConfig,
    card: Hardware,
    demand: Demand,
    weights: int | None = None,
    *,
    quants: tuple[str, ...] = (),
    max_devices: int = 0,
    check: bool = True,
) -> Plan:
    """The cheapest arrangement that meets the targets, or the one that comes closest, said to miss them.

    weights: bytes of the model's file, whose quantisation is then the only one considered. check: simulate.
    """
    from septet.advisor.notes import notes, runs

    if demand.prompt + demand.output > config.max_position:
        raise InvalidRequest(
            f"{demand.prompt} + {demand.output} tokens are beyond the model's {config.max_position}", param="prompt"
        )
    tps = [tp for tp in (1, 2, 4, 8) if tp <= card.per_node and config.num_heads % tp == 0]
    wanted = ("bf16",) if weights else quants or tuple(QUANTS)
    if "fp8" in wanted and not card.fp8_tflops:
        if quants == ("fp8",):
            raise InvalidRequest(f"{card.title} has no fp8", param="quant")
        wanted = tuple(q for q in wanted if q != "fp8")
    found: list[tuple[Option, Arrangement | None]] = []
    for pp in (1, 2, 4):  # a pipeline only where nothing else holds the model
        found += [_option(Estimator(config, card, q, tp, weights), demand, card, pp)
                  for q in wanted for tp in (tps if pp == 1 else tps[-1:])]  # fmt: skip
        if any(arrangement for _, arrangement in found):
            break
    kept = [(o, a) for o, a in found if a and not 0 < max_devices < o.devices]
    if not kept:
        least = min(o.weights_gib for o, _ in found)
        fits = [o.devices for o, a in found if a]
        raise OutOfMemory(
            f"{name} under this demand needs {min(fits)} devices at least, not {max_devices}" if fits else
            f"{name} does not fit {tps[-1] * pp} x {card.title} in any of {', '.join(wanted)}: {least:.0f} GiB of "
            "weights at least; choose another machine or model"
        )  # fmt: skip
    best, arrangement, checked = _choose(kept, demand, card, check, max_devices)
    able = [o for o, a in kept if o.meets and runs(card, o)]
    runnable = min(able, key=lambda o: o.usd_per_hour, default=None)
    active = max(1, math.ceil(best.rows * best.replicas))
    return Plan(
        model=name, hardware=card.name, demand=demand, best=best, options=tuple(o for o, _ in found), checked=checked,
        runnable=None if runs(card, best) else runnable, active=active,
        notes=notes(name, config, card, demand, best, arrangement),
    )  # fmt: skip


def plan_of_calibration(measured: Calibration, card: Hardware, demand: Demand, check: bool = True) -> Plan:
    """With the step times and limits that were measured on a machine; `card` for its price."""
    from septet.advisor.notes import notes_of_calibration

    arrangement = of_calibration(measured, demand.prompt + demand.output)
    option = _enough(arrangement, demand, card)
    best, _, checked = _choose([(option, arrangement)], demand, card, check, 0)
    return Plan(
        model=measured.model, hardware=measured.machine, demand=demand, best=best, options=(option,), checked=checked,
        runnable=None, active=max(1, math.ceil(best.rows * best.replicas)),
        notes=notes_of_calibration(measured, card, demand, best),
    )  # fmt: skip


# -- one arrangement --------------------------------------------------------------------------------------------------
def _option(model: Estimator, demand: Demand, card: Hardware, pp: int) -> tuple[Option, Arrangement | None]:
    try:
        arrangement = of_card(model, demand.prompt + demand.output, pp)
    except OutOfMemory:
        none = Option(
            quant="file" if model.weights else model.quant, tp=model.tp, pp=pp, weights_gib=model.weight_bytes / 2**30,
            kv_tokens=0, streams=0, rows=0.0, tpot_ms=0.0, ttft_ms=0.0, queue_ms=0.0, prefill_share=0.0, replicas=0,
            devices=0, requests_per_s=0.0, tokens_per_s=0.0, usd_per_hour=0.0, usd_per_million=0.0, meets=False,
            why_not="does not fit",
        )  # fmt: skip
        return none, None
    return _enough(arrangement, demand, card), arrangement


def _enough(arrangement: Arrangement, demand: Demand, card: Hardware) -> Option:
    """With the fewest replicas that meet the targets; where none do, the fewest that have streams for all."""
    within = _fewest(lambda n: _at_load(arrangement, demand, card, n).meets, demand.users)
    if within is None:
        roomy = _fewest(
            lambda n: _at_load(arrangement, demand, card, n).rows <= BUSY * arrangement.streams, demand.users
        )
        within = roomy or demand.users
    return _at_load(arrangement, demand, card, within)


def _fewest(good: Any, most: int) -> int | None:
    """The least n from 1 to `most` with good(n), which stays good; None: not even `most`."""
    if not good(most):
        return None
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if good(middle) else (middle, high)
    return high


def _at_load(arrangement: Arrangement, demand: Demand, card: Hardware, replicas: int) -> Option:
    """The users of one replica each wait, read and think; as many answers are open as their stay is of that cycle."""
    users, low, high = demand.users / replicas, 0.0, demand.users / replicas
    for _ in range(50):
        rows = (low + high) / 2
        queue, own, step, _ = _times(arrangement, demand, rows)
        stay = queue + own + step * demand.output
        low, high = (rows, high) if rows < users * stay / (stay + demand.think_s) else (low, rows)
    queue, own, step, share = _times(arrangement, demand, high)
    ttft, tpot, stay = 1e3 * (queue + own), 1e3 * step, queue + own + step * demand.output
    rate = demand.users / (stay + demand.think_s)
    devices = replicas * arrangement.devices
    misses = [
        f"TPOT {tpot:.0f} ms" * (tpot > demand.tpot_ms),
        f"TTFT {ttft:,.0f} ms" * (ttft > demand.ttft_ms),
        "too few streams" * (high > BUSY * arrangement.streams),
    ]
    return Option(
        quant=arrangement.quant, tp=arrangement.tp, pp=arrangement.pp, weights_gib=arrangement.weights / 2**30,
        kv_tokens=arrangement.kv_tokens, streams=arrangement.streams, rows=high, tpot_ms=tpot, ttft_ms=ttft,
        queue_ms=1e3 * queue, prefill_share=share, replicas=replicas, devices=devices, requests_per_s=rate,
        tokens_per_s=rate * demand.output, usd_per_hour=devices * card.usd_per_hour,
        usd_per_million=devices * card.usd_per_hour / (rate * demand.output * 3600) * 1e6,
        meets=not any(misses), why_not=" and ".join(m for m in misses if m),
    )  # fmt: skip


def _times(a: Arrangement, demand: Demand, rows: float) -> tuple[float, float, float, float]:
    """(the way there and the wait for the step under way and for those before it, the step that computes the prompt, a
    step with what it computes of prompts on average, prompts' share of the time), seconds, with `rows` answers open."""
    lane = max(1.0, rows / a.pp)  # of each of the batches that go through a pipeline
    fresh = demand.prompt - demand.shared
    context, begins = lane * (demand.prompt + demand.output / 2), rows / a.pp / demand.output
    pairs, step_s = fresh * (demand.shared + fresh / 2), a.step_model.step_s
    step = step_s(Work(lane, context, begins * fresh, begins * pairs))
    own = step_s(Work(lane, context, fresh, pairs))
    used = min(rows / a.streams, 0.95)
    queue = a.request_s + min(1.0, rows) * step * (1.5 if a.overlap else 0.5) + own * begins * used / (2 * (1 - used))
    return queue, own, step, max(0.0, 1 - step_s(Work(lane, context)) / step)


# -- the choice -------------------------------------------------------------------------------------------------------
def _choose(
    kept: list[tuple[Option, Arrangement]], demand: Demand, card: Hardware, check: bool, max_devices: int
) -> tuple[Option, Arrangement, Checked | None]:
    """The cheapest first; one whose simulation misses comes again with more replicas."""
    good = [(o.usd_per_hour, o.devices, i, o, a) for i, (o, a) in enumerate(kept) if o.meets]
    if not good:
        option, arrangement = min(kept, key=lambda pair: (pair[0].ttft_ms / max(demand.ttft_ms, 1e-9)
                                                          + pair[0].tpot_ms / max(demand.tpot_ms, 1e-9)))  # fmt: skip
        return option, arrangement, _simulated(arrangement, option, demand) if check else None
    heapq.heapify(good)
    if not check:
        return good[0][3], good[0][4], None
    last = None
    for _ in range(TRIES):
        if not good:
            break
        _, _, i, option, arrangement = heapq.heappop(good)
        checked = _simulated(arrangement, option, demand)
        if checked.ttft_p95_ms <= demand.ttft_ms and checked.tpot_p95_ms <= demand.tpot_ms:
            return option, arrangement, checked
        last = option, arrangement, checked
        more = _at_load(arrangement, demand, card, option.replicas + math.ceil(option.replicas * MORE))
        if more.replicas <= demand.users and not 0 < max_devices < more.devices:
            heapq.heappush(good, (more.usd_per_hour, more.devices, i, more, arrangement))
    assert last is not None
    option, arrangement, checked = last
    why = f"simulated p95: TTFT {checked.ttft_p95_ms:,.0f} ms, TPOT {checked.tpot_p95_ms:.0f} ms"
    return replace(option, meets=False, why_not=why), arrangement, checked


def _simulated(a: Arrangement, option: Option, demand: Demand) -> Checked:
    """One replica (of a pipeline: one batch of it) under its share of the requests, which come at random."""
    lanes = option.replicas * a.pp
    n = min(max(round(12 * option.rows / a.pp), 300), 1500)
    lengths = Lengths(prompt=demand.prompt - demand.shared, output=demand.output, prefix=demand.shared, spread=False)
    fleet = Fleet(
        step_model=a.step_model,
        kv_slots=a.kv_tokens // a.pp,
        max_num_seqs=max(1, a.streams // a.pp),
        max_num_batched_tokens=a.step_tokens,
        request_s=a.request_s,
        overlap=a.overlap,
        max_model_len=demand.prompt + demand.output + 1,
    )
    outcome = simulate(fleet, poisson(n, option.requests_per_s / lanes, lengths, seed=1))
    steady = Outcome(outcome.served[round(WARM * n) :], seconds=outcome.seconds)
    found = summarise(steady, ttft_ms=demand.ttft_ms, tpot_ms=demand.tpot_ms)
    return Checked(
        requests=len(steady.served), ttft_ms=found.ttft_ms["mean"], ttft_p95_ms=found.ttft_ms["p95"],
        tpot_ms=found.tpot_ms["mean"], tpot_p95_ms=found.tpot_ms["p95"], goodput_share=found.goodput_share,
    )  # fmt: skip
