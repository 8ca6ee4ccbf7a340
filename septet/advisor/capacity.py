"""Capacity planning: how many devices a workload needs, in which arrangement, at what cost, and why.

Called by `septet plan`. Memory is what `engine/sizing.py` would allocate, time what `estimate.py` says; every statement
of a plan carries how it is known. A replica is a group of `tp` devices that run one engine.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from septet.advisor.estimate import QUANTS, Estimator, Work
from septet.config import EngineConfig
from septet.engine.sizing import resolve_sizes
from septet.errors import InvalidRequest, OutOfMemory

if TYPE_CHECKING:
    from septet.advisor.hardware import Hardware
    from septet.config import ModelConfig

__all__ = ["Demand", "Option", "Plan", "fitting", "make_plan", "paged_waste", "static_waste"]

BUSY = 0.8  # of a replica's streams in use at the peak: queueing explodes beyond (M/G/1)
BATCHES = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512)
STEP_TOKENS = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """Users who each send a prompt, read the answer, and think."""

    users: int
    prompt: int = 1024  # tokens, history included
    output: int = 256
    shared: int = 0  # tokens of the prompt that are found in the prefix cache
    think_s: float = 30.0  # from an answer's end to the next prompt
    ttft_ms: float = 500.0  # target of the 95th percentile
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
    """One arrangement. Times are of a loaded replica: `batch` x BUSY streams decode while new prompts are computed."""

    quant: str
    tp: int
    weights_gib: float  # per replica
    kv_tokens: int  # that a replica's pool holds
    batch: int  # streams of a replica
    tpot_ms: float
    ttft_ms: float  # mean wait for the step under way and in the queue, then the prompt's own steps
    tokens_per_s: float  # of a replica, at BUSY
    prefill_share: float  # of its time
    replicas: int
    devices: int
    usd_per_hour: float
    usd_per_million: float  # output tokens, at the planned load
    meets: bool
    why_not: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    model: str
    hardware: str
    demand: Demand
    best: Option
    options: tuple[Option, ...]
    requests_per_s: float
    active: int  # streams that are open at a time
    notes: tuple[tuple[str, str], ...] = field(default=())  # (how it is known, statement)

    def data(self) -> dict[str, Any]:
        return asdict(self)


def static_waste(longest: int, actual: float) -> float:
    """Share of a slot of `longest` tokens that a sequence of `actual` leaves empty: one slot per sequence."""
    return (longest - actual) / longest


def paged_waste(actual: int, block: int) -> float:
    """Share of a sequence's blocks that its last block leaves empty. (The published form, (B - T mod B) / B, is a share
    of that one block, and says a whole block where T is a multiple of B.)"""
    held = -(-actual // block) * block
    return (held - actual) / held


def fitting(model: Estimator, *, max_num_seqs: int, max_model_len: int, max_num_batched_tokens: int) -> int:
    """Tokens that the KV pool of one replica holds. OutOfMemory says what is missing."""
    settings = EngineConfig(
        model="",
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        max_num_batched_tokens=max_num_batched_tokens,
    )
    shard = _shard(model.config, model.tp)
    sizes = resolve_sizes(
        settings,
        shard,
        device="cpu" if model.hardware.kind == "cpu" else "cuda",
        dtype="bfloat16",
        weights=model.weight_bytes // model.tp,
        free=model.hardware.memory_mib << 20,
    )
    return sizes.num_kv_slots


def make_plan(name: str, config: ModelConfig, card: Hardware, demand: Demand, weights: int | None = None) -> Plan:
    """The cheapest arrangement that meets the targets, or the one that comes closest, said to miss them.

    weights: bytes of the model's file, whose quantisation is then the only one considered.
    """
    tps = [tp for tp in (1, 2, 4, 8) if tp <= card.per_node and config.num_heads % tp == 0]
    quants = ["bf16"] if weights else [q for q in QUANTS if q != "fp8" or card.fp8_tflops]
    options = [_option(Estimator(config, card, q, tp, weights), demand) for q in quants for tp in tps]
    fits = [option for option in options if option.batch]
    if not fits:
        raise OutOfMemory(
            f"{name} does not fit {tps[-1]} x {card.title} in any of {', '.join(quants)}: "
            f"{min(o.weights_gib for o in options):.0f} GiB of weights at least; choose another machine or model"
        )
    best = min(fits, key=lambda o: (not o.meets, o.usd_per_hour if o.meets else o.ttft_ms + o.tpot_ms, o.tp))
    cycle = _stay_s(best, demand) + demand.think_s
    rate = demand.users / cycle
    active = max(1, math.ceil(demand.users * _stay_s(best, demand) / cycle))
    return Plan(
        model=name,
        hardware=card.name,
        demand=demand,
        best=best,
        options=tuple(options),
        requests_per_s=rate,
        active=active,
        notes=_notes(config, card, demand, best, rate),
    )


def _option(model: Estimator, demand: Demand) -> Option:
    length = demand.prompt + demand.output
    empty: dict[str, Any] = {"quant": model.quant, "tp": model.tp, "weights_gib": model.weight_bytes / 2**30}
    none: dict[str, Any] = {
        "kv_tokens": 0,
        "batch": 0,
        "tpot_ms": 0.0,
        "ttft_ms": 0.0,
        "tokens_per_s": 0.0,
        "prefill_share": 0.0,
    }
    none |= {"replicas": 0, "devices": 0, "usd_per_hour": 0.0, "usd_per_million": 0.0}
    try:
        held = fitting(model, max_num_seqs=256, max_model_len=length, max_num_batched_tokens=STEP_TOKENS)
    except OutOfMemory:
        return Option(**empty, **none, meets=False, why_not="does not fit")
    found = [_loaded(model, demand, batch, held) for batch in BATCHES if batch * length <= held]
    if not found:
        return Option(**empty, **none, meets=False, why_not="no room for one request beside the weights")
    good = [option for option in found if option.meets]
    return min(good, key=lambda o: o.usd_per_hour) if good else min(found, key=lambda o: o.ttft_ms + o.tpot_ms)


def _loaded(model: Estimator, demand: Demand, batch: int, held: int) -> Option:
    """A replica in its steady state: each stream that ends is followed by another one's prompt."""
    rows = max(1, round(batch * BUSY))
    fresh = demand.prompt - demand.shared
    context = rows * (demand.prompt + demand.output // 2)
    share = rows / demand.output  # prompts that begin in a step
    pairs = fresh * (demand.shared + fresh / 2)
    step = model.step_s(Work(rows, context, round(share * fresh), share * pairs))
    alone = model.step_s(Work(rows, context))
    own = model.step_s(Work(rows, context, fresh, pairs))  # the step that computes a whole prompt
    used = rows / batch
    wait = step / 2 + own * share * used / (2 * max(1 - used, 0.05))
    tpot, ttft = 1e3 * step, 1e3 * (wait + own)
    stay = (ttft + tpot * demand.output) / 1e3
    active = demand.users * stay / (stay + demand.think_s)
    replicas = max(1, math.ceil(active / rows))
    hourly = replicas * model.tp * model.hardware.usd_per_hour
    produced = demand.users / (stay + demand.think_s) * demand.output * 3600
    misses = [f"TPOT {tpot:.0f} ms" * (tpot > demand.tpot_ms), f"TTFT {ttft:.0f} ms" * (ttft > demand.ttft_ms)]
    return Option(
        quant=model.quant,
        tp=model.tp,
        weights_gib=model.weight_bytes / 2**30,
        kv_tokens=held,
        batch=batch,
        tpot_ms=tpot,
        ttft_ms=ttft,
        tokens_per_s=rows / step,
        prefill_share=max(0.0, 1 - alone / step),
        replicas=replicas,
        devices=replicas * model.tp,
        usd_per_hour=hourly,
        usd_per_million=hourly / produced * 1e6,
        meets=not any(misses),
        why_not=" and ".join(m for m in misses if m),
    )


def _stay_s(option: Option, demand: Demand) -> float:
    """From sending a prompt to the last token."""
    return (option.ttft_ms + option.tpot_ms * demand.output) / 1e3


def _shard(config: ModelConfig, tp: int) -> ModelConfig:
    """What one of `tp` devices holds of each layer."""
    from dataclasses import replace

    return replace(
        config,
        num_heads=config.num_heads // tp,
        num_kv_heads=max(config.num_kv_heads // tp, 1),
        intermediate_size=config.intermediate_size // tp,
    )


def _notes(
    config: ModelConfig, card: Hardware, demand: Demand, best: Option, rate: float
) -> tuple[tuple[str, str], ...]:
    length = demand.prompt + demand.output
    lowest = max(1, math.ceil(best.replicas * 0.2))
    measured = "measured" if card.measured and best.tp == 1 and best.quant == "bf16" else "arithmetic"
    known = {
        "measured": "step times are within 15 % of measured ones on this card (bf16, one device)",
        "arithmetic": "step times are arithmetic here, not checked by measurement: "
        + (
            "this machine's rates are derated data-sheet values" if not card.measured else f"{best.quant}, tp {best.tp}"
        ),
    }
    splits = rate >= 1000 and 0.2 <= best.prefill_share <= 0.8
    runs = best.quant == "bf16" and best.tp == 1
    return (
        (measured, known[measured]),
        (
            "fact",
            "this release of Septet runs this arrangement"
            if runs
            else "this release of Septet runs one device an engine, in bf16 or a GGUF file's own blocks: "
            f"{best.quant} with tp {best.tp} is a capacity to plan with, not yet a command",
        ),
        ("arithmetic", f"a sequence of {length} tokens: reserving the model's {config.max_position} for each wastes "
         f"{static_waste(config.max_position, length):.0%}; blocks of 16 waste {paged_waste(length, 16):.2%}; "
         "slots of one token waste nothing"),
        ("arithmetic", f"prompts take {best.prefill_share:.0%} of a loaded replica's time"),
        ("rule of thumb", "separate pools for prefill and decode "
         + ("pay here: more than 1,000 requests/s and both phases take a fair share" if splits else
            f"do not pay here: {rate:.1f} requests/s (published threshold about 1,000)"
            + ("" if rate >= 1000 else ", coordination eats the gain"))),
        ("rule of thumb", f"scale between {lowest} and {math.ceil(best.replicas * 1.25)} replicas by queue depth: one "
         f"more when more than {max(1, best.batch // 8)} requests wait at a replica for a minute, one less below half "
         f"of {best.batch} streams for ten"),
    )  # fmt: skip
