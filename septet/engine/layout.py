"""Compact rows to the layout of a step, on the device, without a word back to the host.

Called by the runner (eager) and inside captured steps; see `kernels.ops.Layout` for what the fields mean.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from septet.kernels.ops import Layout

if TYPE_CHECKING:
    from torch import Tensor

    from septet.engine.rows import Rows
    from septet.kernels.ops import Ops

__all__ = ["lay_out", "lay_out_decode"]


def lay_out(
    rows: Rows, row: Tensor, start: Tensor, n: Tensor, slots: Tensor, max_q: int, max_kv: int
) -> tuple[Tensor, Layout]:
    """row, start, n (R,) int64, slots (T,) int64 -> token ids (T,) int64 and the layout. Extends `rows.slot_of`.

    The sum of n must be T. Shapes and host integers alone decide what runs, so it can be captured.
    """
    n_tokens = slots.shape[0]
    q_start = torch.nn.functional.pad(n.cumsum(0), (1, 0))
    at = torch.arange(n_tokens, device=n.device)
    of = torch.searchsorted(q_start[1:], at, right=True)  # (T,) which of the R rows; those of no tokens are passed over
    positions = start[of] + at - q_start[of]
    token_row = row[of]
    rows.slot_of[token_row, positions] = slots.int()
    ids = rows.tokens[token_row, positions].long()
    layout = Layout(positions, slots, row, q_start.int(), (start + n).int(), rows.slot_of, max_q, max_kv)
    return ids, layout


def lay_out_decode(
    ops: Ops, rows: Rows, row: Tensor, start: Tensor, slots: Tensor, max_kv: int
) -> tuple[Tensor, Layout]:
    """One token a row: row, start, slots (R,) int64. Fixed shapes and no data-dependent step, so it can be captured."""
    ids, kv_len = ops.place_write(rows.tokens, rows.slot_of, row, start, slots)
    q_start = rows.count[: row.shape[0] + 1]
    return ids, Layout(start, slots, row, q_start, kv_len, rows.slot_of, 1, max_kv)
