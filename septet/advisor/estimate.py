"""How long a step takes on a machine, by arithmetic with a few constants that measurement has set.

Used by `capacity.py` and `simulate.py`. A step reads its weights once and multiplies them with all its tokens (on GPUs
the two overlap, imperfectly: the root of the sum of their squares), reads the keys and values of its decoding rows,
attends within its prompts, and pays for each layer's launches. The constants are fits to `benchmarks/results/h100`:
twelve figures of two shapes, the worst 10 % off (tests/unit/test_advisor_estimate.py). Elsewhere they are assumed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

from septet.geometry import DTYPE_BYTES, flops_per_token, kv_bytes_per_token, parameter_count

if TYPE_CHECKING:
    from collections.abc import Iterable

    from septet.advisor.hardware import Hardware
    from septet.config import ModelConfig

__all__ = ["QUANTS", "REQUEST_S", "Estimator", "StepModel", "Work"]

QUANTS = {"bf16": 2.0, "fp8": 1.0, "int8": 1.0, "int4": 0.53}  # bytes per weight, scales included
READ_SHARE = 0.97  # of the read rate, weights
KV_SHARE = 0.78  # of the read rate, keys and values of scattered slots
COMPUTE_SHARE = 0.92  # of the matrix rate, products
ATTENTION_SHARE = 0.38  # of the matrix rate, prompts' attention
LAYER_S = {1: 11e-6, 2: 25e-6}  # launches of a layer, one token and more
HOST_S, HOST_ROW_S = 0.2e-3, 6e-6  # scheduling, launching, reading back: overlaps the device
ROW_S = 1.2e-6  # of a decoding row: its logits, its draw
REQUEST_S = 1.7e-3  # of a request: client, processes, host (one of 128 tokens on a 1B and an 8B, first token)
LINK_LATENCY_S = 10e-6  # of an all-reduce


@dataclass(frozen=True, slots=True)
class Work:
    """What a step computes; on average, where numbers are not whole."""

    rows: float = 0  # decoding rows
    context: float = 0  # tokens of context that these rows read, summed
    prefill: float = 0  # prompt tokens
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


class _Terms(NamedTuple):
    """Seconds: of a step, of each token, of each token or pair that attention reads."""

    reading: float  # of the weights
    token: float  # computed
    head: float  # of it, what a prompt's token does without
    context: float
    pair: float
    elementwise: float  # of a prompt's token
    one: float  # launches of a step of one token
    several: float
    link: float


@dataclass(frozen=True, slots=True)
class Estimator:
    """tp: devices that share each layer. weights: bytes of the file, if it is known; else by `quant`."""

    config: ModelConfig
    hardware: Hardware
    quant: str = "bf16"
    tp: int = 1
    weights: int | None = None

    _terms: _Terms = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_terms", self._make_terms())

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
        rows, prefill, t = work.rows, work.prefill, self._terms
        tokens = rows + prefill
        if not tokens:
            return 0.0
        computing = tokens * t.token - prefill * t.head
        if self.hardware.kind == "cpu":  # its cores do one or the other
            device = t.reading + computing
        else:
            device = (t.reading**2 + computing**2) ** 0.5
        device += work.context * t.context + work.pairs * t.pair + prefill * t.elementwise
        device += (t.one if tokens == 1 else t.several) + tokens * t.link + ROW_S * rows
        return max(device, HOST_S + HOST_ROW_S * rows)

    def _make_terms(self) -> _Terms:
        h, c = self.hardware, self.config
        read, dense = h.read_gb_s * 1e9 * self.tp, h.bf16_tflops * 1e12 * self.tp
        rate = (h.fp8_tflops * 1e12 * self.tp if self.quant == "fp8" and h.fp8_tflops else dense) * COMPUTE_SHARE
        lookup = 0 if c.tie_embeddings else c.vocab_size * c.hidden_size * self.weight_bytes // parameter_count(c)
        latency, link = self._link_s()
        return _Terms(
            reading=(self.weight_bytes - lookup) / (read * READ_SHARE),
            token=flops_per_token(c) / rate,
            head=c.vocab_size * c.hidden_size * 2 / rate,  # prompts sample once
            context=self.kv_bytes / (read * KV_SHARE),
            pair=4 * c.num_layers * c.num_heads * c.head_dim / (dense * ATTENTION_SHARE),
            elementwise=self._elementwise_bytes() / read,
            one=c.num_layers * LAYER_S[1] + latency,
            several=c.num_layers * LAYER_S[2] + latency,
            link=link,
        )

    def _elementwise_bytes(self) -> int:
        """Of one prompt token: activation, norms with residual, rotation and KV write, each read and written once."""
        c = self.config
        qkv = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
        return c.num_layers * DTYPE_BYTES["bfloat16"] * (3 * c.intermediate_size + 8 * c.hidden_size + 2 * qkv)

    def _link_s(self) -> tuple[float, float]:
        """Two all-reduces a layer: of a step, and more for each token."""
        if self.tp == 1:
            return 0.0, 0.0
        moved = 2 * (self.tp - 1) / self.tp * self.config.hidden_size * DTYPE_BYTES["bfloat16"]
        reduces = 2 * self.config.num_layers
        return reduces * LINK_LATENCY_S, reduces * moved / (self.hardware.link_gb_s * 1e9)
