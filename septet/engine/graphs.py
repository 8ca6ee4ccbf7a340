"""Captured steps: decode steps by rows, small chunks by tokens, each replayed as CUDA graphs over static buffers.

Called by the runner for plans whose rows want one token each, or none. Two graphs per shape: the forward pass up to the
logits, and the plain sampler (temperature and seed), so that a step that needs more replays the first and samples
eagerly. Graphs share one memory pool, which the largest shapes have sized: outputs are read before the next replay, so
that nothing is kept between steps. A few shapes are captured at the start, the others as traffic asks for them or in
pauses (`spare`); meanwhile a larger one stands in, or the step runs eagerly.
"""

from __future__ import annotations

import gc
import logging
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from septet.engine.buckets import MAX_CHUNKS, MIN_SHARING, Shape, stand_in
from septet.engine.common import Sharing
from septet.engine.masked import MaskBuffers
from septet.engine.static import DecodeStep, Machine, input_length, static_step

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from septet.engine.buckets import Shapes
    from septet.engine.constraints import TokenMasks
    from septet.engine.rows import RowInfo
    from septet.engine.runner import Runner
    from septet.engine.staging import Staging
    from septet.engine.static import StaticStep
    from septet.models.registry import Model
    from septet.step import PlanRow

__all__ = ["Capture", "CudaCapture", "StepGraphs"]

EAGER_S = 0.3  # seconds that captures may take at the start, beyond the first shapes
QUICK_S = 0.1  # what a capture takes at most if no kernel has to be compiled
BUSY_SHARE = 0.1  # of the time under traffic that captures may take, while shapes are missing
MIN_PAUSE_S = 0.002  # between looks at what is wanted, over BUSY_SHARE
MIN_WANTED = 2  # times that a shape was asked for before it is captured under traffic; 1 for mixed ones, which are few

log = logging.getLogger(__name__)


class Capture(Protocol):
    def __call__(self, step: StaticStep) -> tuple[Callable[[], None], Callable[[], None]]:
        """-> replays of `step.forward` and `step.draw`."""
        ...


class CudaCapture:
    """Records on one side stream, into one memory pool."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream()

    def __call__(self, step: StaticStep) -> tuple[Callable[[], None], Callable[[], None]]:
        collecting = gc.isenabled()
        gc.disable()  # what a collection frees must not be freed into a capture
        try:
            self.stream.wait_stream(torch.cuda.current_stream())
            began = time.perf_counter()
            with torch.cuda.stream(self.stream):  # once outside, so that kernels are compiled and handles exist
                step.forward()
                step.draw()
                self.stream.synchronize()
                ran = time.perf_counter()
                forward, draw = self._record(step.forward), self._record(step.draw)
            torch.cuda.current_stream().wait_stream(self.stream)
            log.debug("%s: run %.3f s, recorded %.3f s", step.shape, ran - began, time.perf_counter() - ran)
        finally:
            if collecting:
                gc.enable()
        step.logits = _unowned(step.logits)  # its place in the pool may serve other graphs, which run later
        return forward, draw

    def _record(self, part: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # Other threads (weights, grammars) may talk to the device meanwhile.
        graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
        try:
            part()
        finally:
            graph.capture_end()
        return graph.replay


class _Span:
    """Device memory that somebody else owns (`__cuda_array_interface__`, version 3)."""

    def __init__(self, tensor: Tensor) -> None:
        n_bytes = tensor.numel() * tensor.element_size()
        self.__cuda_array_interface__ = {
            "shape": (n_bytes,),
            "typestr": "|u1",
            "data": (tensor.data_ptr(), False),
            "version": 3,
        }


def _unowned(tensor: Tensor) -> Tensor:
    """A view of a contiguous tensor that does not keep its memory from being used again."""
    assert tensor.is_contiguous()
    alias = torch.as_tensor(_Span(tensor), device=tensor.device)
    return alias.view(tensor.dtype).view(tensor.shape)


@dataclass(slots=True)
class Captured:
    """One shape, ready to be replayed."""

    step: StaticStep
    staging: Staging
    forward: Callable[[], None]
    draw: Callable[[], None]

    def run(self, rows: Sequence[PlanRow], sample: bool) -> StaticStep:
        """Replay it for these rows; with `sample`, tokens are drawn and written back to the rows' state. What it says
        is valid until the next replay of any shape."""
        step = self.step
        self.staging.fill(step.inputs, lambda out: step.pack(rows, out))
        self.forward()
        if sample:
            step.machine.masks.set(None)
            self.draw()
        return step

    def draw_masked(self, masks: TokenMasks | None) -> None:
        """After `run` without `sample`: as that would have drawn, but under these masks."""
        self.step.machine.masks.set(masks)
        self.draw()


class StepGraphs:
    def __init__(self, runner: Runner, model: Model, shapes: Shapes, capture: Capture) -> None:
        self.shapes = shapes
        self.capture = capture
        self.captured: dict[Shape, Captured] = {}
        self.wanted: Counter[Shape] = Counter()  # asked for and not there
        self.broken = False  # a capture failed under way: what is captured serves on
        self.compiled: Callable[[], bool] = lambda: True  # a capture will not wait for a compiler
        self.staging = runner.staging
        self.sharing = runner.sharing = Sharing()
        self._todo = shapes.usual()
        self._not_before = 0.0  # monotonic
        longest = input_length(Shape(False, shapes.max_tokens, shapes.max_rows, shapes.max_len))
        device = runner.staging.device
        inputs = torch.zeros(longest, dtype=torch.int64, device=device)
        tokens = torch.zeros(shapes.max_rows, dtype=torch.int64, device=device)
        masks = MaskBuffers(shapes.max_rows, device)
        self.machine = Machine(model, runner.ops, runner.kv, runner.rows, inputs, tokens, masks)

    @torch.inference_mode()
    def capture_first(self) -> None:
        """The first shapes, then the usual ones while that is quick: as long as their kernels are compiled already."""
        for shape in self.shapes.first():
            self._capture(shape)
        began = last = time.monotonic()
        while self._todo and self.compiled() and last - began < EAGER_S:
            shape = self._todo.pop(0)
            if shape not in self.captured:
                self._capture(shape)
            last, before = time.monotonic(), last
            if last - before > QUICK_S:
                break

    def find(self, rows: Sequence[PlanRow], decode: bool) -> Captured | None:
        """What can be replayed for rows that sample one token each or none; None: run eagerly. decode: each computes
        and samples one token."""
        n_shared = 0
        if decode:
            shape = self.shapes.decode(len(rows)) if len(rows) <= self.shapes.max_rows else None
            if shape is not None and len(rows) >= MIN_SHARING and (n_shared := self.sharing.of(rows)):
                shape = shape._replace(shared=True)
        else:
            n_tokens, context = sum([row.n for row in rows]), max([row.start + row.n for row in rows])
            shape = self.shapes.chunk(n_tokens, len(rows), context)
        if shape is None:
            return None
        if shape not in self.captured:
            self.wanted[shape] += 1
            shape = stand_in(shape, self.captured)
        if shape is None:
            return None
        found = self.captured[shape]
        if isinstance(found.step, DecodeStep):
            found.step.n_shared = n_shared
        return found

    def serves(self, info: RowInfo | None) -> bool:
        """Can the captured sampler draw this row's token? (None: nobody has joined it.)"""
        return info is not None and info.plain

    def serves_masked(self, info: RowInfo | None) -> bool:
        """The same, if it is given the row's mask."""
        return info is not None and (info.plain or info.masked)

    def due(self, busy: bool) -> bool:
        """Would `spare` capture something now? Then nothing of an earlier step may be needed any more."""
        if self.broken or (busy and not self.wanted):
            return False
        return not busy or (time.monotonic() >= self._not_before and self.compiled())

    @torch.inference_mode()
    def spare(self, busy: bool) -> bool:
        """Capture one more shape if it is time for that; between steps. False: nothing is left for a pause."""
        if self.due(busy):
            self._capture_next(busy)
        return not self.broken and bool(self._todo or self.wanted)

    def _capture_next(self, busy: bool) -> None:
        began = time.monotonic()
        shape = self._next(busy)
        if shape is not None:
            try:
                self._capture(shape)
            except Exception as error:
                self.broken = True
                log.warning("a step of %s could not be captured, and no more will be: %s", shape, error)
        now = time.monotonic()
        self._not_before = now + max(now - began, MIN_PAUSE_S) / BUSY_SHARE

    def _next(self, busy: bool) -> Shape | None:
        """Most wanted first; in a pause also what nobody has asked for yet."""
        if sum([not shape.decode for shape in self.captured]) >= MAX_CHUNKS:
            self.wanted = Counter({shape: n for shape, n in self.wanted.items() if shape.decode})
            self._todo = [shape for shape in self._todo if shape.decode]
        for shape, count in self.wanted.most_common():
            if count >= MIN_WANTED or not busy or (shape.rows > 1 and not shape.decode):
                return shape
        while self._todo and not busy:
            shape = self._todo.pop(0)
            if shape not in self.captured:
                return shape
        return None

    def _capture(self, shape: Shape) -> None:
        del self.wanted[shape]
        step = static_step(self.machine, shape)
        self.staging.fill(step.inputs, lambda out: step.pack([], out))
        self.captured[shape] = Captured(step, self.staging, *self.capture(step))
