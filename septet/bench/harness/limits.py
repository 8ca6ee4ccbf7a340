"""The most tokens a second that a machine's memory allows for a model: what "share of the physical limit" divides by.

Used by `measure.py`. A decode step reads the weights once, and the keys and values of each stream; prompts cost nothing
here, so the limit is never too low.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from septet.errors import SeptetError
from septet.geometry import kv_bytes_per_token

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

    def tokens_s(self, work: Workload, streams: int) -> float | None:
        """None where arrivals, not the machine, set the pace."""
        if work.kind not in ("closed", "agents"):
            return None
        context = work.prefix + work.turns * (work.prompt + work.output) / 2
        kv = streams * context * kv_bytes_per_token(self.config, "float16")
        return streams * self.read_gb_s * 1e9 / (self.weights + kv)

    def data(self) -> dict[str, Any]:
        return {"model": self.model, "read_gb_s": self.read_gb_s, "by": self.by, "weights_bytes": self.weights}


def find(model: str, gpu: str | None) -> Limit | str:
    """Of a model on this machine, or why it is not known."""
    from septet.bench.cpu_host import bytes_per_token
    from septet.bench.cpu_probe import probe
    from septet.bench.gpu_limits import CARDS
    from septet.hub.model_config import read_model_config
    from septet.hub.pull import resolve

    try:
        path = Path(resolve(model, pull=False).path)
        config = read_model_config(path)
        weights, _ = bytes_per_token(path, config)
    except SeptetError as error:
        return f"no physical limit: {error.message}"
    if gpu is None:
        found = probe()
        return Limit(model, float(str(found["gb_s"])), f"probed just before ({found['by']})", weights, config)
    for name, card in CARDS.items():
        if name in gpu:
            return Limit(model, card.bytes_per_s / 1e9, f"measured on an {name}", weights, config)
    return f"no physical limit: the read rate of {gpu} is not known here"
