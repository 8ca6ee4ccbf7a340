"""What a GPU workload must read and compute at least, and how long a known card needs for that.

Called by `gpu_workloads.py` for the limits beside its figures. Standard library only.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

from septet.geometry import DTYPE_BYTES, flops_per_token, kv_bytes_per_token, weight_bytes

if TYPE_CHECKING:
    from septet.config import ModelConfig

__all__ = ["Card", "decode_bytes", "gpu", "limits"]


@dataclass(frozen=True, slots=True)
class Card:
    """Measured, not the data sheet's: a large copy's read rate, cuBLAS's best bf16 rate."""

    bytes_per_s: float
    flops: float


CARDS = {"H100": Card(3.11e12, 792e12)}


def gpu() -> dict[str, str]:
    """Name and driver of the first GPU, {} where the driver's tool is not there."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        line = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return {}
    return dict(zip(("gpu", "driver", "memory"), (part.strip() for part in line.split(",")), strict=False))


def decode_bytes(config: ModelConfig, rows: int, context: int, dtype: str = "bfloat16") -> int:
    """Read by one decode step: every weight that multiplies, and the keys and values of all rows."""
    lookup = 0 if config.tie_embeddings else config.vocab_size * config.hidden_size * DTYPE_BYTES[dtype]
    return weight_bytes(config, dtype) - lookup + rows * context * kv_bytes_per_token(config, dtype)


def limits(config: ModelConfig, card: Card) -> dict[str, float]:
    """The figures of W1, W2 and W7 that the card's memory and matrix units allow, under the figures' own names."""

    def prefill_s(tokens: int, context: int) -> float:
        read = decode_bytes(config, 0, 0) / card.bytes_per_s
        return max(read, tokens * flops_per_token(config, context) / card.flops)

    found = {
        "w1_ttft128_ms": 1e3 * prefill_s(128, 64),
        "w1_tpot_ms": 1e3 * decode_bytes(config, 1, 256) / card.bytes_per_s,
        "w7_prefill_tok_s": 8 * 4096 / prefill_s(8 * 4096, 2048),
    }
    for rows in (32, 64, 128, 256):
        seconds = prefill_s(rows * 128, 64) + 255 * decode_bytes(config, rows, 256) / card.bytes_per_s
        found[f"w2_b{rows}_tok_s"] = rows * 256 / seconds
    return found
