"""What a plan rests on, in words: each statement with how it is known.

Called by `capacity.py`. measured, arithmetic, rule of thumb, published, fact: nothing else is said.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from septet.advisor.arrangement import paged_waste, static_waste

if TYPE_CHECKING:
    from septet.advisor.arrangement import Arrangement
    from septet.advisor.calibrate import Calibration
    from septet.advisor.capacity import Demand, Option
    from septet.advisor.hardware import Hardware
    from septet.config import ModelConfig

__all__ = ["notes", "notes_of_calibration", "runs"]

Notes = tuple[tuple[str, str], ...]
BLOCK = 16  # tokens, of the published formula
SPLIT_RATE = 1000  # requests a second, published


def runs(card: Hardware, option: Option) -> bool:
    """Does this release of Septet run it?"""
    return not card.septet_lacks and option.devices == option.replicas and option.quant in ("bf16", "file", "measured")


def notes(
    name: str, config: ModelConfig, card: Hardware, demand: Demand, best: Option, arrangement: Arrangement
) -> Notes:
    length = demand.prompt + demand.output
    kv = round(arrangement.step_model.kv_bytes)  # type: ignore[attr-defined]
    return (
        *_times_known(card, best, length),
        _memory_known(card, best),
        ("arithmetic", f"a token's keys and values take {kv:,} bytes (16 bits, whatever the weights are); a replica's "
         f"pool of {best.kv_tokens:,} tokens could hold one sequence of {min(best.kv_tokens, config.max_position):,}, "
         f"or {best.kv_tokens // length} of {length:,}"),
        *_waste(config.max_position, length),
        *_shape(demand, best, best.requests_per_s),
        *_weights(best),
        *_what_runs(name, card, best),
        ("arithmetic", f"${card.usd_per_hour:g} per device and hour is an assumption (--price); whole hours of all "
         "devices are counted, and users as many as at the peak"),
        *_published(name, best, demand),
    )  # fmt: skip


def notes_of_calibration(measured: Calibration, card: Hardware, demand: Demand, best: Option) -> Notes:
    return (
        ("measured", f"the constants of a step and the pool of {best.kv_tokens:,} tokens: {measured.model} on "
         f"{measured.machine}, fitted to short runs"),
        ("arithmetic", "everything made of them: times under load, the queue, replicas, cost; HTTP and text are not in "
         "it"),
        *_waste(measured.max_model_len, demand.prompt + demand.output),
        *_shape(demand, best, best.requests_per_s),
        ("arithmetic", f"${card.usd_per_hour:g} per machine and hour is an assumption (--price)"),
    )  # fmt: skip


def _times_known(card: Hardware, best: Option, length: int) -> Notes:
    if not card.measured:
        return (("arithmetic", f"times rest on data-sheet rates of {card.title}, derated as an H100 reaches its "
                 "own; nothing was measured there"),)  # fmt: skip
    if card.kind == "cpu":
        return (("measured", "one, 8 and 32 streams and a prompt of a 135M in 4-bit blocks were within 15 % of "
                 f"measured ones on {card.title}; other CPUs differ: `python -m septet.bench.simulated MODEL "
                 "--calibration FILE` measures this one"),)  # fmt: skip
    if best.quant != "bf16" or best.devices != best.replicas:
        return (("arithmetic", f"memory and matrix rates of {card.title} are measured; {best.quant} weights, tp "
                 f"{best.tp} and pp {best.pp} are not, nor the links between devices"),)  # fmt: skip
    said = "steps, prompts and batches of Llama 1B and 8B shapes were within 15 % of measured ones on this card"
    beyond = "" if length <= 4096 else f"; sequences of {length:,} tokens are beyond the 4,096 that were measured"
    missed = "ten prompts at once that share 4,096 tokens took a 1B 1.6 times as long as is predicted"
    return ("measured", said + beyond), ("measured", missed)


def _memory_known(card: Hardware, best: Option) -> tuple[str, str]:
    if card.name == "h100" and best.quant == "bf16" and best.devices == best.replicas:
        return "measured", "memory: the pool of an 8B on this card came out within 3 % of what the engine allocated"
    return "arithmetic", "memory is what the engine's own sizing would allocate; not compared with an engine here"


def _waste(longest: int, length: int) -> Notes:
    expected = (BLOCK - 1) / 2 / (length + (BLOCK - 1) / 2)
    last = (BLOCK - length % BLOCK) / BLOCK
    return (
        ("arithmetic", f"a slot of {longest:,} tokens for each sequence of {length:,} would waste "
         f"{static_waste(longest, length):.0%} = (T_max - T) / T_max, one of {2 * length:,} "
         f"{static_waste(2 * length, length):.0%}; blocks of {BLOCK} waste {expected:.2%} on average over lengths "
         f"({paged_waste(length, BLOCK):.2%} at exactly {length:,}; the published (B - T mod B) / B = {last:.0%} is a "
         "share of the last block); slots of one token waste nothing"),
    )  # fmt: skip


def _shape(demand: Demand, best: Option, rate: float) -> Notes:
    """How the load is spread, split and scaled."""
    lowest, highest = max(1, math.ceil(best.replicas * 0.2)), math.ceil(best.replicas * 1.25)
    waiting = max(2, best.streams // 16)
    pays = rate >= SPLIT_RATE and 0.2 <= best.prefill_share <= 0.8
    why = (
        f"{rate:,.1f} requests/s (published threshold about {SPLIT_RATE:,}): coordination eats the gain"
        if rate < SPLIT_RATE
        else f"prompts take {best.prefill_share:.0%} of the time, too uneven a share"
    )
    prefills = max(1, round(best.replicas * best.prefill_share))
    split = (
        f"pay here ({rate:,.0f} requests/s, prompts take {best.prefill_share:.0%} of the time): about {prefills} of "
        f"the {best.replicas} replicas for prompts; published gain 20 to 30 % of the devices, `septet simulate "
        "--prefill-replicas` tries it"
        if pays
        else f"do not pay here: {why}"
    )
    routing = (
        ("rule of thumb", f"route by prefix: {demand.shared:,} tokens of each prompt are counted as found in the cache")
        if demand.shared
        else ("rule of thumb", "route to the least loaded replica: no shared prefix was given (--shared)")
    )
    return (
        ("arithmetic", f"TTFT {best.ttft_ms:,.0f} ms = {best.queue_ms:,.0f} ms in the queue + "
         f"{best.ttft_ms - best.queue_ms:,.0f} ms for the step that computes the prompt; prompts take "
         f"{best.prefill_share:.0%} of a replica's time"),
        routing,
        ("rule of thumb", f"separate pools for prefill and decode {split}"),
        ("rule of thumb", f"scale between {lowest} and {highest} replicas by queue depth: one more when more than "
         f"{waiting} requests wait at a replica for a minute, one less when all have been below half of "
         f"{math.ceil(best.rows)} open answers for ten"),
    )  # fmt: skip


def _weights(best: Option) -> Notes:
    if best.quant in ("int8", "int4"):
        loss = "; 4 bits are no free speed-up: measure the quality on your own data" if best.quant == "int4" else ""
        return (("rule of thumb", f"{best.quant} weights are read packed and multiplied at the 16-bit rate{loss}"),)
    if best.quant == "fp8":
        return (("rule of thumb", "fp8 weights and products run at the card's fp8 rate; measure the quality"),)
    return ()


def _what_runs(name: str, card: Hardware, best: Option) -> Notes:
    if card.septet_lacks:
        return (("fact", f"this release of Septet is not for this machine: {card.septet_lacks}"),)
    if not runs(card, best):
        return (("fact", "this release of Septet runs one device an engine, in 16 bits or a file's own blocks: "
                 f"{best.quant} with tp {best.tp} and pp {best.pp} is a capacity to plan with, not yet a command"),
                )  # fmt: skip
    tested = "" if card.name in ("h100", "cpu") else " (not tested on this card)"
    return (("fact", f"each replica: septet serve {name} --max-num-seqs {best.streams}{tested}"),)


def _published(name: str, best: Option, demand: Demand) -> Notes:
    if "70b" not in name.lower():
        return ()
    return (
        ("published", "for 10,000 users of a 70B (February 2026): 4 H100 a replica, 4 to 20 replicas, TTFT below 100 "
         "ms (p95 below 200), 680 to 850 tokens/s a node. 20 such nodes are 17,000 tokens/s: "
         f"{17_000 / 10_000:.1f} for each user if all read at once. This demand makes "
         f"{best.tokens_per_s:,.0f} tokens/s in all, {best.tokens_per_s / best.replicas:,.0f} a replica"),
    )  # fmt: skip
