"""One replica: devices that share a model, how much they hold, and what of a sequence's memory is wasted.

Used by `capacity.py` and `septet simulate`. Memory is what `engine/sizing.py` would allocate on each device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from septet.advisor.estimate import REQUEST_S
from septet.config import EngineConfig
from septet.engine.sizing import CPU_SEQS, CPU_STEP_TOKENS, GPU_SEQS, GPU_STEP_TOKENS, resolve_sizes
from septet.errors import InvalidRequest, OutOfMemory

if TYPE_CHECKING:
    from septet.advisor.calibrate import Calibration
    from septet.advisor.estimate import Estimator, StepModel
    from septet.advisor.hardware import Hardware
    from septet.config import ModelConfig

__all__ = [
    "Arrangement",
    "check_tp",
    "engine_limits",
    "fitting",
    "of_calibration",
    "of_card",
    "paged_waste",
    "static_waste",
]  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrangement:
    """`tp` devices share each layer, `pp` such groups share the layers and work on as many batches in turn."""

    quant: str  # of the weights: QUANTS, "file" (as the file holds them) or "measured"
    tp: int
    pp: int
    step_model: StepModel
    weights: int  # bytes of a replica
    kv_tokens: int  # that a replica's pool holds
    streams: int  # at most
    step_tokens: int
    request_s: float = 0.0  # from a client to the scheduler and back
    overlap: bool = False  # step N + 1 is planned while N runs

    @property
    def devices(self) -> int:
        return self.tp * self.pp


def engine_limits(card: Hardware) -> tuple[int, int]:
    """(sequences, tokens of a step) that an engine has there by default."""
    return (CPU_SEQS, CPU_STEP_TOKENS) if card.kind == "cpu" else (GPU_SEQS, GPU_STEP_TOKENS)


def check_tp(config: ModelConfig, card: Hardware, tp: int) -> None:
    if tp < 1 or tp > card.per_node or config.num_heads % tp:
        good = [n for n in (1, 2, 4, 8) if n <= card.per_node and config.num_heads % n == 0]
        raise InvalidRequest(
            f"tp {tp}: {card.title} and {config.num_heads} heads allow {', '.join(map(str, good))}", param="tp"
        )


def fitting(
    model: Estimator, *, max_num_seqs: int, max_model_len: int, max_num_batched_tokens: int, pp: int = 1
) -> int:
    """Tokens that the KV pool of one replica holds. OutOfMemory says what is missing."""
    settings = EngineConfig(
        model="",
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        max_num_batched_tokens=max_num_batched_tokens,
    )
    c, tp, each = model.config, model.tp, model.weight_bytes // (model.tp * pp)
    shard = replace(
        c,
        num_heads=c.num_heads // tp,
        num_kv_heads=max(c.num_kv_heads // tp, 1),
        intermediate_size=c.intermediate_size // tp,
        num_layers=-(-c.num_layers // pp),
    )
    free = model.hardware.memory_mib << 20
    try:
        sizes = resolve_sizes(settings, shard, device="cpu" if model.hardware.kind == "cpu" else "cuda",
                              dtype="bfloat16", weights=each, free=free)  # fmt: skip
    except OutOfMemory:
        raise OutOfMemory(
            f"{each / 2**30:.1f} GiB of weights on each device and one sequence of {max_model_len} tokens do not fit "
            f"{model.hardware.title} ({free / 2**30:.0f} GiB): more devices (--tp), smaller weights (--quant) or a "
            "shorter sequence"
        ) from None
    return sizes.num_kv_slots


def of_card(model: Estimator, length: int, pp: int = 1) -> Arrangement:
    """For sequences of `length` tokens. OutOfMemory: does not fit."""
    seqs, step = engine_limits(model.hardware)
    held = fitting(model, max_num_seqs=seqs, max_model_len=length, max_num_batched_tokens=step, pp=pp)
    return Arrangement(
        quant="file" if model.weights else model.quant,
        tp=model.tp,
        pp=pp,
        step_model=model,
        weights=model.weight_bytes,
        kv_tokens=held,
        streams=min(seqs * pp, held // length),
        step_tokens=step,
        request_s=REQUEST_S,
        overlap=model.hardware.kind != "cpu",
    )


def of_calibration(measured: Calibration, length: int) -> Arrangement:
    """A machine as it was measured."""
    if length >= measured.max_model_len:
        raise InvalidRequest(
            f"the calibration's engine takes {measured.max_model_len} tokens a sequence, not {length}", param="prompt"
        )
    return Arrangement(
        quant="measured",
        tp=1,
        pp=1,
        step_model=measured,
        weights=0,
        kv_tokens=measured.kv_slots,
        streams=min(measured.max_num_seqs, measured.kv_slots // length),
        step_tokens=measured.max_num_batched_tokens,
        overlap=measured.overlap,
    )


def static_waste(longest: int, actual: float) -> float:
    """Share of a slot of `longest` tokens that a sequence of `actual` leaves empty: one slot per sequence."""
    return (longest - actual) / longest


def paged_waste(actual: int, block: int) -> float:
    """Share of a sequence's blocks that its last block leaves empty. (The published form, (B - T mod B) / B, is a share
    of that one block, and says a whole block where T is a multiple of B.)"""
    held = math.ceil(actual / block) * block
    return (held - actual) / held
