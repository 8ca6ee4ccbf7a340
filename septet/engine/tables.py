"""The rows of an engine that computes on this host: the tables of `rows.py` as numpy arrays, and what a row asks for.

Owned by `native.py`; the tape reads and writes them by address. `Rows.over` gives the same memory to the runner where a
request needs torch. Follows `septet/step.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from septet.request import SamplingParams
    from septet.step import Join, PlanRow

__all__ = ["TABLES", "RowInfo", "Tables"]

TABLES = ("tokens", "slot_of", "temperature", "top_k", "top_p", "min_p", "seed")


@dataclass(slots=True)
class RowInfo:
    """The host's side of a row: what the sampler must know beyond the plain values. Not changed after birth."""

    params: SamplingParams
    n_prompt: int
    end_ids: tuple[int, ...]  # eos and stop ids, forbidden before min_tokens
    filters: bool = field(init=False)  # needs top-k, top-p or min-p
    penalises: bool = field(init=False)
    unadjusted: bool = field(init=False)  # its logits are drawn from as they are, or after top-k, top-p and min-p
    plain: bool = field(init=False)  # temperature and seed are all it needs: the captured sampler serves it
    masked: bool = field(init=False)  # these and the mask of its grammar, which also minds min_tokens

    @classmethod
    def of(cls, join: Join) -> RowInfo:
        end_ids = tuple(dict.fromkeys((*join.eos_token_ids, *join.params.stop_token_ids)))
        return cls(join.params, join.n_prompt, end_ids)

    def __post_init__(self) -> None:
        p = self.params
        self.filters = not p.greedy and (p.top_k > 0 or p.top_p < 1.0 or p.min_p > 0.0)
        self.penalises = p.repetition_penalty != 1.0 or p.presence_penalty != 0.0 or p.frequency_penalty != 0.0
        adjusts = self.penalises or p.logit_bias or p.min_tokens
        self.unadjusted = not (adjusts or p.logprobs is not None or p.structured is not None)
        self.plain = not self.filters and self.unadjusted
        others = self.filters or self.penalises or p.logit_bias or p.logprobs is not None
        self.masked = p.structured is not None and not others


class Tables:
    """Line r of every array belongs to row r; the last line is scratch. Columns are positions (`rows.py`)."""

    def __init__(self, max_rows: int, max_len: int) -> None:
        lines = max_rows + 1
        self.tokens = np.zeros((lines, max_len + 1), dtype=np.int32)
        self.slot_of = np.zeros((lines, max_len + 1), dtype=np.int32)
        self.temperature = np.zeros(lines, dtype=np.float32)
        self.top_k = np.zeros(lines, dtype=np.int64)
        self.top_p = np.ones(lines, dtype=np.float32)
        self.min_p = np.zeros(lines, dtype=np.float32)
        self.seed = np.zeros(lines, dtype=np.int64)
        self.info: list[RowInfo | None] = [None] * max_rows

    def join(self, joins: Sequence[Join]) -> None:
        """Replace all state of the joining rows."""
        for join in joins:
            row, params = join.row, join.params
            self.info[row] = RowInfo.of(join)
            self.temperature[row] = 0.0 if params.greedy else params.temperature
            self.top_p[row], self.min_p[row] = params.top_p, params.min_p
            self.top_k[row], self.seed[row] = max(params.top_k, 0), params.seed or 0
            self.tokens[row, : len(join.tokens)] = join.tokens
            self.slot_of[row, : len(join.slots)] = join.slots

    def write(self, plan_rows: Sequence[PlanRow]) -> None:
        """Tokens that the host gives: forced ones, which nobody sampled."""
        for row in plan_rows:
            if row.tokens:
                self.tokens[row.row, row.start : row.start + row.n] = row.tokens
