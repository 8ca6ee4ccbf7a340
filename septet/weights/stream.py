"""Tensors from files to a device by several threads at once: read, copied and handed over while the model is built.

Used by the sources in `load.py` where the device is a GPU. Each thread reads pieces (`preadv`, which does not hold the
interpreter) into pinned memory of its own and sends them on a stream of its own. Tensors start in the order that is
expected, at most `ahead` bytes before somebody takes them; one that is asked for out of turn comes next. Knows files
and bytes, no formats, names' meanings or layers.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from septet.errors import ModelFileError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from torch import Tensor

__all__ = ["Span", "WeightStream"]

PIECE = 16 << 20  # bytes
AHEAD = 2 << 30
BUFFERS = 2  # pieces of one thread under way: one is read while the other travels


@dataclass(frozen=True, slots=True)
class Span:
    """Where a tensor's bytes lie."""

    name: str
    path: Path
    offset: int
    n_bytes: int


@dataclass(slots=True, eq=False)
class _Job:
    span: Span
    data: Tensor | None = None  # (n_bytes,) uint8 on the device, from the start on
    ready: torch.cuda.Event | None = None  # earlier users of that memory have ended
    next_piece: int = 0  # bytes handed to threads
    left: int = 0  # bytes not yet on their way
    sent: list[torch.cuda.Event] = field(default_factory=list)


class WeightStream:
    def __init__(self, spans: Iterable[Span], device: torch.device, threads: int, *, ahead: int = AHEAD) -> None:
        self.device = device
        self._ahead = ahead
        self._jobs = {span.name: _Job(span, left=span.n_bytes) for span in spans}
        self._order = deque(self._jobs)  # not yet started
        self._open: deque[_Job] = deque()  # started, with pieces that nobody has
        self._waiting = 0  # bytes started and not taken
        self._error: Exception | None = None
        self._closed = False
        self._change = threading.Condition()
        self._files: dict[Path, int] = {}
        self.bytes_read = 0
        self._threads = [threading.Thread(target=self._run, name=f"weights-{i}", daemon=True) for i in range(threads)]
        for thread in self._threads:
            thread.start()

    def __contains__(self, name: str) -> bool:
        return name in self._jobs

    def take(self, name: str) -> Tensor:
        """(n_bytes,) uint8 on the device, in stream order; each once. ModelFileError if it can't be read."""
        with self._change:
            job = self._jobs.pop(name)
            if job.data is None:
                if name in self._order:
                    self._order.remove(name)
                self._begin(job, urgent=True)
            self._change.wait_for(lambda: job.left == 0 or self._error is not None)
            if self._error is not None:
                raise self._error
            self._waiting -= job.span.n_bytes
            self._change.notify_all()
        for event in job.sent:
            torch.cuda.current_stream().wait_event(event)
        assert job.data is not None
        return job.data

    def close(self) -> None:
        """End the threads. What was taken stays."""
        with self._change:
            self._closed = True
            self._change.notify_all()
        for thread in self._threads:
            thread.join()
        self._jobs.clear()
        for file in self._files.values():
            os.close(file)
        self._files.clear()

    # -- under the lock -----------------------------------------------------------------------------------------------
    def _begin(self, job: _Job, *, urgent: bool) -> None:
        """Give it memory and let threads have its pieces."""
        job.data = torch.empty(job.span.n_bytes, dtype=torch.uint8, device=self.device)
        if job.data.is_cuda:
            job.ready = torch.cuda.Event()
            job.ready.record(torch.cuda.default_stream())
        self._waiting += job.span.n_bytes
        if job.span.path not in self._files:
            self._files[job.span.path] = os.open(job.span.path, os.O_RDONLY | os.O_CLOEXEC)
        if job.span.n_bytes:
            (self._open.appendleft if urgent else self._open.append)(job)
        self._change.notify_all()

    def _next(self) -> tuple[_Job, int, int] | None:
        """A piece to read: (job, begin, end). Waits for one; None: the end."""
        with self._change:
            while not self._closed and self._error is None:
                if self._open:
                    job = self._open[0]
                    begin, end = job.next_piece, min(job.next_piece + PIECE, job.span.n_bytes)
                    job.next_piece = end
                    if end == job.span.n_bytes:
                        self._open.popleft()
                    return job, begin, end
                if self._order and self._may_begin(self._jobs[self._order[0]]):
                    self._begin(self._jobs[self._order.popleft()], urgent=False)
                else:
                    self._change.wait()
        return None

    def _may_begin(self, job: _Job) -> bool:
        return self._waiting == 0 or self._waiting + job.span.n_bytes <= self._ahead

    # -- a thread -----------------------------------------------------------------------------------------------------
    @torch.inference_mode()  # as the model is built: either may allocate what the other writes
    def _run(self) -> None:
        try:
            lane = _Lane(self.device)
            while (piece := self._next()) is not None:
                job, begin, end = piece
                assert job.data is not None
                event = lane.send(self._files[job.span.path], job.span.offset + begin, job.data[begin:end], job.ready)
                with self._change:
                    job.left -= end - begin
                    self.bytes_read += end - begin
                    if event is not None:
                        job.sent.append(event)
                    if job.left == 0:
                        self._change.notify_all()
        except Exception as error:
            with self._change:
                if self._error is None and not self._closed:
                    self._error = _as_file_error(error)
                self._change.notify_all()


class _Lane:
    """One thread's buffers and stream."""

    def __init__(self, device: torch.device) -> None:
        self.pinned = device.type == "cuda"
        self.buffers = [torch.empty(PIECE, dtype=torch.uint8, pin_memory=self.pinned) for _ in range(BUFFERS)]
        self.busy: list[torch.cuda.Event | None] = [None] * BUFFERS
        self.stream = torch.cuda.Stream() if self.pinned else None
        self.turn = 0

    def send(self, file: int, offset: int, target: Tensor, ready: torch.cuda.Event | None) -> torch.cuda.Event | None:
        """File bytes to `target`; what it returns says when they are there (None: they are)."""
        self.turn = (self.turn + 1) % BUFFERS
        buffer, before = self.buffers[self.turn][: len(target)], self.busy[self.turn]
        if before is not None:
            before.synchronize()
        _read(file, offset, buffer)
        if self.stream is None:
            target.copy_(buffer)
            return None
        with torch.cuda.stream(self.stream):
            if ready is not None:
                self.stream.wait_event(ready)
            target.copy_(buffer, non_blocking=True)
            event = torch.cuda.Event()
            event.record(self.stream)
        self.busy[self.turn] = event
        return event


def _read(file: int, offset: int, buffer: Tensor) -> None:
    view = buffer.numpy().data
    while len(view):
        n = os.preadv(file, [view], offset)
        if n == 0:
            raise ModelFileError("the model's file ended early: it was cut short while it was read")
        view, offset = view[n:], offset + n


def _as_file_error(error: Exception) -> Exception:
    return ModelFileError(f"can't read the model's file: {error.strerror}") if isinstance(error, OSError) else error
