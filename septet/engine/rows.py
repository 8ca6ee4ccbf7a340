"""What the device remembers of each running request between steps: its tokens, where their KV lies, how to sample.

Owned by the runner; follows `septet/step.py`. Line r of every tensor belongs to row r; the last line is scratch for the
padded rows of captured steps. Column p of `tokens` and `slot_of` is position p; one column more than the longest
request, so that the token sampled at the very end has a place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from septet.engine.staging import floats
from septet.engine.tables import TABLES, RowInfo

if TYPE_CHECKING:
    from collections.abc import Sequence

    from septet.engine.staging import Staging
    from septet.engine.tables import Tables
    from septet.step import Join, PlanRow

__all__ = ["RowInfo", "Rows"]


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

    @classmethod
    def over(cls, tables: Tables) -> Rows:
        """The same memory under torch's name, and the same `info`."""
        rows = cls(len(tables.info), 0, torch.device("cpu"))
        for name in TABLES:
            setattr(rows, name, torch.from_numpy(getattr(tables, name)))
        rows.info = tables.info
        return rows

    def join(self, joins: Sequence[Join], staging: Staging) -> None:
        """Replace all state of the joining rows, with one copy to the device."""
        if not joins:
            return
        for join in joins:
            self.info[join.row] = RowInfo.of(join)
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
