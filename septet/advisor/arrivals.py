"""Who comes when: requests of a trace file, or drawn from an arrival process. Deterministic from a seed.

Used by `simulate.py` and the benchmark's replay. A trace is JSON lines: {"timestamp": seconds or ms (see `read_trace`),
"input_length": tokens, "output_length": tokens} and, where prompts share a beginning, "prefix_id" with "prefix_length".
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from septet.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["Arrival", "Lengths", "poisson", "read_trace"]


@dataclass(frozen=True, slots=True)
class Arrival:
    at: float  # seconds from the start
    prompt: int  # tokens
    output: int  # tokens
    prefix_id: int = 0  # 0: shares nothing
    prefix: int = 0  # tokens that all prompts of this prefix_id begin with


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Mean lengths; each is drawn from an exponential around it, cut to 1/8 .. 4 times (`spread`), or fixed."""

    prompt: int = 512
    output: int = 128
    prefix: int = 0
    groups: int = 1  # of requests with a prefix of their own
    spread: bool = True

    def __post_init__(self) -> None:
        for name, least in (("prompt", 1), ("output", 1), ("prefix", 0), ("groups", 1)):
            if getattr(self, name) < least:
                raise InvalidRequest(f"{name} must be at least {least}, not {getattr(self, name)}", param=name)

    def draw(self, rng: random.Random, at: float) -> Arrival:
        def length(mean: int) -> int:
            if not self.spread:
                return mean
            return max(1, round(min(max(rng.expovariate(1 / mean), mean / 8), 4 * mean)))

        group = 1 + rng.randrange(self.groups) if self.prefix else 0
        return Arrival(at, self.prefix + length(self.prompt), length(self.output), group, self.prefix)


def poisson(n: int, rate: float, lengths: Lengths, seed: int, burst: float = 1.0) -> Iterator[Arrival]:
    """n requests, `rate` a second on average. burst > 1: half of the time at `burst` times the rate of the other half
    (phases of ten mean gaps times 20), as far as queues notice."""
    if not (math.isfinite(rate) and rate > 0):
        raise InvalidRequest(f"rate must be a number above 0, not {rate}", param="rate")
    if not (math.isfinite(burst) and burst >= 1):
        raise InvalidRequest(f"burst must be a number from 1 on, not {burst:g}", param="burst")
    if n < 1:
        raise InvalidRequest(f"requests must be at least 1, not {n}", param="requests")
    rng = random.Random(seed)
    at, phase_s = 0.0, 200 / rate
    for _ in range(n):
        high = int(at / phase_s) % 2 == 0
        now = rate * (2 * burst / (1 + burst) if high else 2 / (1 + burst))
        at += rng.expovariate(now)
        yield lengths.draw(rng, at)


def read_trace(path: Path, *, scale: float = 1.0) -> list[Arrival]:
    """In order of time; the first one comes at 0. Timestamps are seconds, times `scale` (0.001 where they are ms).

    InvalidRequest names the line and the field that is missing or wrong.
    """
    if not (math.isfinite(scale) and scale > 0):
        raise InvalidRequest(f"time scale must be a number above 0, not {scale:g}", param="time_scale")
    found: list[Arrival] = []
    ids: dict[str, int] = {}
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    found.append(_entry(line, f"{path.name} line {number}", ids, scale))
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{path.name} is no text in UTF-8: {error.reason}", param="trace") from None
    if not found:
        raise InvalidRequest(f"{path.name} holds no requests", param="trace")
    found.sort(key=lambda a: a.at)
    first = found[0].at
    return [Arrival(a.at - first, a.prompt, a.output, a.prefix_id, a.prefix) for a in found]


def _entry(line: str, where: str, ids: dict[str, int], scale: float) -> Arrival:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise InvalidRequest(f"{where} is no JSON: {error}", param="trace") from None
    if not isinstance(entry, dict):
        raise InvalidRequest(f"{where} is no JSON object", param="trace")

    def number(name: str, least: float, default: float | None = None) -> float:
        value = entry.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < least:
            shown = "is missing" if value is None else f"is {json.dumps(value)[:40]}"
            raise InvalidRequest(f"{where}: {name} {shown}; a number from {least:g} on is needed", param="trace")
        return float(value)

    prompt, output = int(number("input_length", 1)), int(number("output_length", 1))
    name, prefix = entry.get("prefix_id"), int(number("prefix_length", 0, 0))
    if prefix > prompt:
        raise InvalidRequest(f"{where}: prefix_length {prefix} is longer than input_length {prompt}", param="trace")
    group = ids.setdefault(str(name), len(ids) + 1) if name is not None and prefix else 0
    return Arrival(number("timestamp", 0) * scale, prompt, output, group, prefix if group else 0)
