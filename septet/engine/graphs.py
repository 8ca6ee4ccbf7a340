"""Captured decode steps: one CUDA graph per batch size, sampling included, replayed over named static buffers.

Called by the runner for steps in which every row computes one token. Rows beyond the batch are padded with the scratch
row, position 0 and slot 0. Two graphs per size: the forward pass up to the logits, and the plain sampler (temperature
and seed), so that a step that needs more than plain sampling replays the first and samples eagerly. Graphs of all sizes
share one memory pool; the largest is captured first.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from septet.engine.layout import lay_out_decode
from septet.layers.batch import ForwardBatch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from septet.engine.rows import RowInfo
    from septet.engine.runner import Runner
    from septet.models.registry import Model
    from septet.step import PlanRow

__all__ = ["DecodeGraphs", "bucket_sizes"]


def bucket_sizes(max_rows: int) -> list[int]:
    """Sizes to capture: 1, 2, 4, multiples of 8 to 64, of 16 to 256, of 32 beyond; none over max_rows."""
    sizes = [1, 2, 4, *range(8, 65, 8), *range(80, 257, 16), *range(288, 1025, 32)]
    return sorted({*(s for s in sizes if s < max_rows), max_rows})


@dataclass(slots=True)
class StepBuffers:
    """Inputs and outputs of the captured step of one size B; static addresses."""

    row: Tensor  # (B,) int64
    start: Tensor  # (B,) int64
    slots: Tensor  # (B,) int64
    logits: Tensor  # (B, V)
    tokens: Tensor  # (B,) int64


@dataclass(slots=True)
class Captured:
    buffers: StepBuffers
    forward: torch.cuda.CUDAGraph
    sampler: torch.cuda.CUDAGraph


class DecodeGraphs:
    def __init__(self, runner: Runner, model: Model, sizes: Sequence[int], max_kv: int) -> None:
        self.runner = runner
        self.model = model
        self.sizes = sorted(sizes)
        self.max_kv = max_kv
        self.inputs = torch.zeros(3, self.sizes[-1], dtype=torch.int64, device=runner.staging.device)
        self.captured: dict[int, Captured] = {}
        self.pool = torch.cuda.graph_pool_handle()

    def fits(self, n_rows: int) -> bool:
        return 0 < n_rows <= self.sizes[-1]

    def serves(self, info: RowInfo) -> bool:
        """Can the captured sampler draw this row's token?"""
        return info.plain

    @torch.inference_mode()
    def capture_all(self) -> None:
        """Largest first, so that the smaller ones fit into its memory; the collector sleeps meanwhile."""
        gc.collect()
        gc.disable()
        try:
            for size in reversed(self.sizes):
                self._capture(size)
        finally:
            gc.enable()

    def run(self, rows: Sequence[PlanRow], sample: bool) -> StepBuffers:
        """Replay the step for these rows; with `sample`, tokens are drawn and written back to the rows' state."""
        size = next(s for s in self.sizes if s >= len(rows))
        step = self.captured.get(size) or self._capture(size)
        pad = size - len(rows)
        scratch = self.runner.rows.scratch
        flat = [row.row for row in rows] + [scratch] * pad
        flat += [row.start for row in rows] + [0] * pad
        flat += [row.slots[0] for row in rows] + [0] * pad
        (sent,) = self.runner.staging.send([np.array(flat, dtype=np.int64)])
        self.inputs[:, :size].copy_(sent.view(3, size))
        step.forward.replay()
        if sample:
            step.sampler.replay()
        return step.buffers

    def _capture(self, size: int) -> Captured:
        row, start, slots = self.inputs[:, :size]
        row.fill_(self.runner.rows.scratch)
        start.zero_()
        slots.zero_()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # once outside, so that kernels are compiled and handles exist
            self._sample(row, start, self._forward(row, start, slots))
        torch.cuda.current_stream().wait_stream(stream)
        forward, sampler = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(forward, pool=self.pool):
            logits = self._forward(row, start, slots)
        with torch.cuda.graph(sampler, pool=self.pool):
            tokens = self._sample(row, start, logits)
        self.captured[size] = Captured(StepBuffers(row, start, slots, logits, tokens), forward, sampler)
        return self.captured[size]

    def _forward(self, row: Tensor, start: Tensor, slots: Tensor) -> Tensor:
        runner = self.runner
        ids, layout = lay_out_decode(runner.rows, row, start, slots, self.max_kv)
        hidden = self.model.hidden(ForwardBatch(ids, layout, runner.kv, start))
        return self.model.logits(hidden)

    def _sample(self, row: Tensor, start: Tensor, logits: Tensor) -> Tensor:
        rows = self.runner.rows
        tokens = self.runner.ops.gumbel_argmax(logits.float(), rows.temperature[row], rows.seed[row], start + 1)
        rows.tokens[row, start + 1] = tokens.clamp(min=0).int()
        return tokens
