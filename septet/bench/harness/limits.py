"""The most tokens a second that a machine allows for a model: what "share of the physical limit" divides by.

Used by `measure.py`. A decode step reads the weights once, and the keys and values of each stream; prompts cost no
reading here. Where the rate of a card's matrix units is known, every token in and out that isn't shared is computed
with it, and the lower limit counts. Both may be too high, never too low (for bf16; narrower types compute faster).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from septet.errors import SeptetError
from septet.geometry import flops_per_token, kv_bytes_per_token

if TYPE_CHECKING:
    from septet.bench.harness.workload import Workload
    from septet.config import ModelConfig

__all__ = ["Limit", "find"]


@dataclass(frozen=True, slots=True)
class Limit:
    model: str
    read_gb_s: float
    by: str  # how that is known
    weights: int  # bytes that a step reads
    config: ModelConfig
    flops: float | None = None  # of the matrix units, bf16; None: not known, memory alone is the limit

    def tokens_s(self, work: Workload, streams: int) -> float | None:
        """None where arrivals, not the machine, set the pace."""
        if work.kind not in ("closed", "agents"):
            return None
        said = (work.turns - 1) / 2 * (work.prompt + work.output)  # before, in the average turn
        context = work.prefix + said + work.prompt + work.output / 2
        kv = streams * context * kv_bytes_per_token(self.config, "float16")
        memory = streams * self.read_gb_s * 1e9 / (self.weights + kv)
        if self.flops is None:
            return memory
        return min(memory, self.flops / flops_per_token(self.config) * work.output / (work.prompt + work.output))

    def data(self) -> dict[str, Any]:
        return {"model": self.model, "read_gb_s": self.read_gb_s, "by": self.by, "weights_bytes": self.weights,
                "flops": self.flops}  # fmt: skip


@cache
def _probed() -> tuple[float, str]:
    from septet.bench.cpu_probe import probe

    found = probe()
    return float(str(found["gb_s"])), f"probed just before ({found['by']})"


def find(model: str, gpu: str | None) -> Limit | str:
    """Of a model on this machine, or why it is not known."""
    from septet.bench.cpu_host import bytes_per_token
    from septet.bench.gpu_limits import CARDS
    from septet.hub.model_config import read_model_config
    from septet.hub.pull import resolve

    try:
        path = Path(resolve(model, pull=False).path)
        config = read_model_config(path)
        weights, _ = bytes_per_token(path, config)
    except SeptetError as error:
        return f"no physical limit for {model}: {error.message}"
    if gpu is None:
        return Limit(model, *_probed(), weights, config)
    for name, card in CARDS.items():
        if name in gpu:
            return Limit(model, card.bytes_per_s / 1e9, f"measured on an {name}", weights, config, card.flops)
    return f"no physical limit for {model}: the read rate of {gpu} is not known here"
