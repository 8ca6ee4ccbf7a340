"""How long a step takes on a machine, by arithmetic with a few constants that measurement has set.

Used by `capacity.py` and `simulate.py`. A step reads its weights once and multiplies them with all its tokens (the two
overlap, imperfectly: the root of the sum of their squares), reads the keys and values of its decoding rows, attends
within its prompts, and pays for each layer's launches. The constants are fits to `benchmarks/results/h100`: 24 figures
of two shapes, the worst 10 % off (tests/unit/test_advisor_estimate.py). Elsewhere they are assumed, not checked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from septet.geometry import DTYPE_BYTES, flops_per_token, kv_bytes_per_token, parameter_count

if TYPE_CHECKING:
    from collections.abc import Iterable

    from septet.advisor.hardware import Hardware
    from septet.config import ModelConfig

__all__ = ["QUANTS", "Estimator", "StepModel", "Work"]

QUANTS = {"bf16": 2.0, "fp8": 1.0, "int8": 1.0, "int4": 0.53}  # bytes per weight, scales included
READ_SHARE = 0.97  # of the read rate, weights
KV_SHARE = 0.78  # of the read rate, keys and values of scattered slots
COMPUTE_SHARE = 0.92  # of the matrix rate, products
ATTENTION_SHARE = 0.38  # of the matrix rate, prompts' attention
LAYER_S = {1: 11e-6, 2: 25e-6}  # launches of a layer, one token and more
HOST_S, HOST_ROW_S = 0.2e-3, 6e-6  # scheduling, launching, reading back: overlaps the device
ROW_S = 1.2e-6  # of a decoding row: its logits, its draw
LINK_LATENCY_S = 10e-6  # of an all-reduce


@dataclass(frozen=True, slots=True)
class Work:
    """What a step computes."""

    rows: int = 0  # decoding rows
    context: int = 0  # tokens of context that these rows read, summed
    prefill: int = 0  # prompt tokens
    pairs: float = 0.0  # (token, position attended to) of the prompts, summed

    @classmethod
    def of(cls, decoding: Iterable[int], chunks: Iterable[tuple[int, int]]) -> Work:
        """decoding: context of each row; chunks: (start, n) of each."""
        contexts, parts = list(decoding), list(chunks)
        pairs = sum(n * (start + (n + 1) / 2) for start, n in parts)
        return cls(len(contexts), sum(contexts), sum(n for _, n in parts), pairs)


class StepModel(Protocol):
    """Seconds of a step; `simulate.py` runs on any."""

    def step_s(self, work: Work) -> float: ...


@dataclass(frozen=True, slots=True)
class Estimator:
    """tp: devices that share each layer. weights: bytes of the file, if it is known; else by `quant`."""

    config: ModelConfig
    hardware: Hardware
    quant: str = "bf16"
    tp: int = 1
    weights: int | None = None

    @property
    def weight_bytes(self) -> int:
        """Of the whole model."""
        return self.weights or round(parameter_count(self.config) * QUANTS[self.quant])

    @property
    def kv_bytes(self) -> int:
        """Of one token, on all devices together; KV heads can't be divided below one."""
        per_device = max(self.config.num_kv_heads // self.tp, 1) * self.tp / self.config.num_kv_heads
        return round(kv_bytes_per_token(self.config, "bfloat16") * per_device)

    def step_s(self, work: Work) -> float:
        """Seconds, device and host overlapped."""
        tokens = work.rows + work.prefill
        if not tokens:
            return 0.0
        h, c = self.hardware, self.config
        read = h.read_gb_s * 1e9 * self.tp
        rate = (h.fp8_tflops if self.quant == "fp8" and h.fp8_tflops else h.bf16_tflops) * 1e12 * self.tp
        lookup = 0 if c.tie_embeddings else c.vocab_size * c.hidden_size * self.weight_bytes // parameter_count(c)
        reading = (self.weight_bytes - lookup) / (read * READ_SHARE)
        head = c.vocab_size * c.hidden_size * 2  # prompts sample once
        computing = (tokens * flops_per_token(c) - work.prefill * head) / (rate * COMPUTE_SHARE)
        device = (reading**2 + computing**2) ** 0.5
        device += work.context * self.kv_bytes / (read * KV_SHARE)
        device += (
            4
            * c.num_layers
            * c.num_heads
            * c.head_dim
            * work.pairs
            / (h.bf16_tflops * 1e12 * self.tp * ATTENTION_SHARE)
        )
        device += self._elementwise_bytes() * work.prefill / read
        device += c.num_layers * LAYER_S[min(tokens, 2)] + ROW_S * work.rows + self._link_s(tokens)
        return max(device, HOST_S + HOST_ROW_S * work.rows)

    def _elementwise_bytes(self) -> int:
        """Of one prompt token: activation, norms with residual, rotation and KV write, each read and written once."""
        c = self.config
        qkv = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
        return c.num_layers * DTYPE_BYTES["bfloat16"] * (3 * c.intermediate_size + 8 * c.hidden_size + 2 * qkv)

    def _link_s(self, tokens: int) -> float:
        """Two all-reduces a layer."""
        if self.tp == 1:
            return 0.0
        moved = 2 * (self.tp - 1) / self.tp * tokens * self.config.hidden_size * DTYPE_BYTES["bfloat16"]
        return 2 * self.config.num_layers * (LINK_LATENCY_S + moved / (self.hardware.link_gb_s * 1e9))
