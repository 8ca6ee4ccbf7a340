"""One run of one workload against one server: who asks when, and what came back.

Used by `measure.py`. Closed workloads: `streams` clients share the list of requests. Open ones: each comes at its time.
Beside the answers it notes how busy and how late this client was itself.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from septet.bench.harness.client import Address, Sample, ask, settle
from septet.bench.harness.interrupt import cancelling

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from septet.bench.harness.launch import Running
    from septet.bench.harness.prompts import Ask

__all__ = ["Run", "drive"]

LOST_AFTER = 3  # answers broken one after the other: the server is gone
LOOK_S = 0.01
MOST_KEPT = 64 << 20  # bytes of answers not yet read


@dataclass
class Run:
    """What came of it; `samples` in the order of their ends."""

    began: float = 0.0
    wall_s: float = 0.0
    samples: list[Sample] = field(default_factory=list)
    expected: int = 0
    lost: str = ""  # the server went away in the middle of it
    interrupted: bool = False
    busy: float = 0.0  # the share of the time that this client's thread computed
    lags: list[float] = field(default_factory=list)  # seconds by which its loop woke too late
    kept: int = 0
    broken: int = 0  # one after the other
    stop: Callable[[], object] = lambda: None

    def take(self, sample: Sample, server: Running) -> None:
        self.samples.append(sample)
        self.kept += sum(len(piece) for _, piece in sample.pieces)
        if self.kept > MOST_KEPT:
            settle(sample)
        self.broken = self.broken + 1 if sample.broken else 0
        if sample.broken and (self.broken >= LOST_AFTER or server.death()):
            self.lost = self.lost or f"{server.target.title}: {sample.error}"
            self.stop()

    def settle(self) -> None:
        for sample in self.samples:
            settle(sample)


def drive(
    server: Running, asks: list[Ask], *, streams: int, timed: bool, timeout_s: float, told: Callable[[], object]
) -> Run:
    """`timed`: each request at its own time; else `streams` at once. `told` is called at each answer. Interrupted: what
    had come by then."""
    run = asyncio.run(_drive(server, asks, streams, timed, timeout_s, told))
    run.settle()
    run.wall_s = max((s.last for s in run.samples if s.ok), default=time.perf_counter()) - run.began
    return run


async def _drive(
    server: Running, asks: list[Ask], streams: int, timed: bool, timeout_s: float, told: Callable[[], object]
) -> Run:
    run = Run(expected=sum(len(one.turns) for one in asks))
    address, here = Address(server.url, server.target.api_key), asyncio.current_task()
    assert here is not None
    loop, probe = asyncio.get_running_loop(), asyncio.create_task(_probe(run.lags))
    began, cpu = time.perf_counter(), time.thread_time()
    run.began = began

    def converse(one: Ask, due: float | None) -> Any:
        return _converse(one, due, server, address, run, timeout_s, told)

    async def client(queue: Iterator[Ask]) -> None:
        for one in queue:
            await converse(one, None)

    work: asyncio.Future[list[Any]]
    if timed:
        run.began += min(0.5, 0.001 * len(asks))  # time to make the tasks
        work = asyncio.gather(*(converse(one, run.began + one.at) for one in asks))
    else:
        queue = iter(asks)
        work = asyncio.gather(*(client(queue) for _ in range(min(streams, len(asks)))))
    run.stop = work.cancel
    try:
        with cancelling(lambda: loop.call_soon_threadsafe(here.cancel)):
            await work
    except asyncio.CancelledError:
        run.interrupted = not run.lost
        here.uncancel()
    finally:
        probe.cancel()
    run.busy = (time.thread_time() - cpu) / (time.perf_counter() - began)
    return run


async def _probe(lags: list[float]) -> None:
    while True:
        began = time.perf_counter()
        await asyncio.sleep(LOOK_S)
        lags.append(time.perf_counter() - began - LOOK_S)


async def _converse(
    one: Ask, due: float | None, server: Running, address: Address, run: Run, timeout_s: float,
    told: Callable[[], object],
) -> None:  # fmt: skip
    """Turn after turn, each with the answers that this server gave before. A turn that fails ends the conversation."""
    said: list[dict[str, str]] = []
    for turn in one.turns:
        said.append({"role": "user", "content": turn})
        sample = await ask(address, body(server, said, one), due=due, timeout_s=timeout_s)
        due = None
        if len(one.turns) > 1:
            settle(sample)
        run.take(sample, server)
        told()
        if not sample.ok:
            return
        said.append({"role": "assistant", "content": sample.text})


def body(server: Running, said: list[dict[str, str]], one: Ask) -> dict[str, Any]:
    fixed = {} if one.fields else server.target.fixed  # an answer of a given form ends where the form ends
    return {
        "model": server.model,
        "messages": said,
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": one.output,
        "temperature": 0,
        **fixed,
        **one.fields,
    }
