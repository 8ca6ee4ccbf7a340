"""Where captured steps read their grammar masks: static buffers on the device, one line of words a constrained row.

Owned by `graphs.py` through its `Machine`, filled before a captured `draw` from what `constraints.py` made on the host.
A draw is one op that reads no words for rows without a mask (`Ops.draw_write`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from septet.grammar.masks import mask_words

if TYPE_CHECKING:
    from torch import Tensor

    from septet.engine.constraints import TokenMasks

__all__ = ["MaskBuffers"]


class MaskBuffers:
    """`set` before each draw; what `lines` gives is part of what is captured."""

    def __init__(self, max_rows: int, device: torch.device) -> None:
        self.line = torch.full((max_rows,), -1, dtype=torch.int64, device=device)  # which words a row follows
        self.words: Tensor | None = None  # (max_rows, words) int32, once the vocabulary is seen
        self.n_set = 0  # rows of `line` that may not be -1

    def lines(self, n_rows: int, vocab: int) -> tuple[Tensor, Tensor]:
        """-> words (max_rows, words) int32 and line (n_rows,) int64, as `Ops.draw_write` takes them."""
        return self._words(mask_words(vocab)), self.line[:n_rows]

    def set(self, masks: TokenMasks | None) -> None:
        """For the draws from here on, in stream order; None: no row has a mask. Nobody waits."""
        n_rows = 0 if masks is None else len(masks.line)
        if n_rows < self.n_set:
            self.line[n_rows : self.n_set].fill_(-1)
        self.n_set = n_rows
        if masks is not None:
            n_masks, width = masks.words.shape
            self._words(width)[:n_masks].copy_(masks.words, non_blocking=True)
            self.line[:n_rows].copy_(masks.line, non_blocking=True)

    def _words(self, width: int) -> Tensor:
        if self.words is None:
            self.words = torch.zeros(len(self.line), width, dtype=torch.int32, device=self.line.device)
        return self.words
