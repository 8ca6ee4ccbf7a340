"""The scheduler's counters and the gauges of one moment, as `EngineStats`. Times are the loop's business."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from septet.engine.messages import STEP_TOKENS, EngineStats

if TYPE_CHECKING:
    from septet.kv.cache import KVCache

__all__ = ["Tally"]


@dataclass(slots=True)
class Tally:
    """Counters since start; names as in `EngineStats`."""

    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    computed_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    finished: Counter[str] = field(default_factory=Counter)
    last_step_rows: int = 0
    last_step_tokens: int = 0
    last_step_prefill_tokens: int = 0
    step_tokens: list[int] = field(default_factory=lambda: [0] * (len(STEP_TOKENS) + 1))
    prefill_steps: int = 0
    mixed_steps: int = 0
    kv_waste_sum: float = 0.0  # over steps
    kv_waste_max: float = 0.0

    def step(self, n_rows: int, n_tokens: int, n_prefill_tokens: int, unused: int, leased: int) -> None:
        """One plan was made. `unused` of the `leased` slots are neither computed nor being computed."""
        self.steps += 1
        self.computed_tokens += n_tokens
        self.last_step_rows, self.last_step_tokens = n_rows, n_tokens
        self.last_step_prefill_tokens = n_prefill_tokens
        self.step_tokens[bisect_left(STEP_TOKENS, n_tokens)] += 1
        self.prefill_steps += n_prefill_tokens > 0
        self.mixed_steps += 0 < n_prefill_tokens < n_tokens
        waste = unused / leased if leased else 0.0
        self.kv_waste_sum += waste
        self.kv_waste_max = max(self.kv_waste_max, waste)

    def decodes(self, steps: int, n_rows: int) -> None:
        """So many steps alike were taken, each a token of `n_rows` rows, nothing unused (simulations)."""
        self.steps += steps
        self.computed_tokens += steps * n_rows
        self.generated_tokens += steps * n_rows
        self.last_step_rows = self.last_step_tokens = n_rows
        self.last_step_prefill_tokens = 0
        self.step_tokens[bisect_left(STEP_TOKENS, n_rows)] += steps

    def stats(self, cache: KVCache, running: int, waiting: int, unused: int) -> EngineStats:
        return EngineStats(
            running=running,
            waiting=waiting,
            slots_total=cache.capacity,
            slots_free=cache.free,
            slots_cached=cache.cached,
            slots_leased=cache.leased,
            slots_pinned=cache.pinned,
            slots_used=cache.leased - unused,
            kv_waste=self.kv_waste_sum / self.steps if self.steps else 0.0,
            kv_waste_max=self.kv_waste_max,
            steps=self.steps,
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            computed_tokens=self.computed_tokens,
            generated_tokens=self.generated_tokens,
            preemptions=self.preemptions,
            finished=dict(self.finished),
            last_step_rows=self.last_step_rows,
            last_step_tokens=self.last_step_tokens,
            last_step_prefill_tokens=self.last_step_prefill_tokens,
            step_tokens=tuple(self.step_tokens),
            prefill_steps=self.prefill_steps,
            mixed_steps=self.mixed_steps,
        )
