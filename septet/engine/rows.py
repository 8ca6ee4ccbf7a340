"""What the device remembers of each running request between steps: its tokens, where their KV lies, how to sample.

Owned by the runner; follows `septet/step.py`. Line r of every tensor belongs to row r; the last line is scratch for the
padded rows of captured steps. Column p of `tokens` and `slot_of` is position p; one column more than the longest
request, so that the token sampled at the very end has a place.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from septet.engine.staging import floats

if TYPE_CHECKING:
    from collections.abc import Sequence

    from septet.engine.staging import Staging
    from septet.request import SamplingParams
    from septet.step import Join, PlanRow

__all__ = ["RowInfo", "Rows"]


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

    def __post_init__(self) -> None:
        p = self.params
        self.filters = not p.greedy and (p.top_k > 0 or p.top_p < 1.0 or p.min_p > 0.0)
        self.penalises = p.repetition_penalty != 1.0 or p.presence_penalty != 0.0 or p.frequency_penalty != 0.0
        adjusts = self.penalises or p.logit_bias or p.min_tokens
        self.unadjusted = not (adjusts or p.logprobs is not None or p.structured is not None)
        self.plain = not self.filters and self.unadjusted
        others = self.filters or self.penalises or p.logit_bias or p.logprobs is not None
        self.masked = p.structured is not None and not others


class Rows:
    def __init__(self, max_rows: int, max_len: int, device: torch.device) -> None:
        shape = (max_rows + 1, max_len + 1)
        self.scratch = max_rows  # the padding row
        self.tokens = torch.zeros(shape, dtype=torch.int32, device=device)
        self.slot_of = torch.zeros(shape, dtype=torch.int32, device=device)
        self.temperature = torch.zeros(max_rows + 1, dtype=torch.float32, device=device)
        self.top_k = torch.zeros(max_rows + 1, dtype=torch.int64, device=device)
        self.top_p = torch.ones(max_rows + 1, dtype=torch.float32, device=device)
        self.min_p = torch.zeros(max_rows + 1, dtype=torch.float32, device=device)
        self.seed = torch.zeros(max_rows + 1, dtype=torch.int64, device=device)
        self.count = torch.arange(max_rows + 2, dtype=torch.int32, device=device)  # q_start of one token a row
        self.info: list[RowInfo | None] = [None] * max_rows

    def join(self, joins: Sequence[Join], staging: Staging) -> None:
        """Replace all state of the joining rows, with one copy to the device."""
        if not joins:
            return
        for join in joins:
            end_ids = tuple(dict.fromkeys((*join.eos_token_ids, *join.params.stop_token_ids)))
            self.info[join.row] = RowInfo(join.params, join.n_prompt, end_ids)
        params = [join.params for join in joins]
        sent = staging.send(
            [
                np.array([j.row for j in joins], dtype=np.int64),
                floats([0.0 if p.greedy else p.temperature for p in params]),
                floats([p.top_p for p in params]),
                floats([p.min_p for p in params]),
                np.array([max(p.top_k, 0) for p in params], dtype=np.int64),
                np.array([p.seed or 0 for p in params], dtype=np.int64),
                *(np.array(part, dtype=np.int64) for join in joins for part in (join.tokens, join.slots)),
            ]
        )
        rows, temperature, top_p, min_p, top_k, seed, *prompts = sent
        self.temperature[rows] = temperature.view(torch.float64).float()
        self.top_p[rows] = top_p.view(torch.float64).float()
        self.min_p[rows] = min_p.view(torch.float64).float()
        self.top_k[rows], self.seed[rows] = top_k, seed
        for join, tokens, slots in zip(joins, prompts[::2], prompts[1::2], strict=True):
            self.tokens[join.row, : len(tokens)] = tokens
            if join.slots:
                self.slot_of[join.row, : len(slots)] = slots

    def write(self, plan_rows: Sequence[PlanRow], staging: Staging) -> None:
        """Tokens that the host gives: forced ones, which nobody sampled."""
        given = [row for row in plan_rows if row.tokens]
        if given:
            rows, at, tokens = _flat([(row.row, row.tokens) for row in given])
            at += np.repeat(np.array([row.start for row in given], dtype=np.int64), [row.n for row in given])
            row, position, token = staging.send([rows, at, tokens])
            self.tokens[row, position] = token.int()


def _flat(parts: list[tuple[int, tuple[int, ...]]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[(row, values)] -> (row, position, value) of every value, each int64."""
    lengths = [len(values) for _, values in parts]
    rows = np.repeat(np.array([row for row, _ in parts], dtype=np.int64), lengths)
    at = np.concatenate([np.arange(n, dtype=np.int64) for n in lengths])
    values = np.concatenate([np.array(v, dtype=np.int64) for _, v in parts])
    return rows, at, values
