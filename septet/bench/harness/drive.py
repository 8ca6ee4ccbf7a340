"""One run of one workload against one server: who asks when, and what came back.

Used by `measure.py`. Closed workloads: `streams` clients share the list of requests. Open ones: each comes at its time.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from septet.bench.harness.client import Sample, ask, connect

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import httpx

    from septet.bench.harness.launch import Running
    from septet.bench.harness.prompts import Ask

__all__ = ["Run", "drive"]


@dataclass
class Run:
    """What came of it; `samples` in the order of their ends."""

    wall_s: float = 0.0
    samples: list[Sample] = field(default_factory=list)
    expected: int = 0
    lost: str = ""  # the server went away in the middle of it


def drive(
    server: Running, asks: list[Ask], *, streams: int, timed: bool, timeout_s: float, told: Callable[[], object]
) -> Run:
    """`timed`: each request at its own time; else `streams` at once. `told` is called at each answer."""
    return asyncio.run(_drive(server, asks, streams, timed, timeout_s, told))


async def _drive(
    server: Running, asks: list[Ask], streams: int, timed: bool, timeout_s: float, told: Callable[[], object]
) -> Run:
    run = Run(expected=sum(len(one.turns) for one in asks))
    began = time.perf_counter()
    async with connect(server.url, server.target.api_key, timeout_s) as http:
        if timed:
            work = [_at(began, one, server, http, run, told) for one in asks]
        else:
            queue = iter(asks)
            work = [_client(queue, server, http, run, told) for _ in range(min(streams, len(asks)))]
        await asyncio.gather(*work)
    run.wall_s = max((s.last for s in run.samples if s.ok), default=time.perf_counter()) - began
    return run


async def _at(
    began: float, one: Ask, server: Running, http: httpx.AsyncClient, run: Run, told: Callable[[], object]
) -> None:
    await asyncio.sleep(began + one.at - time.perf_counter())
    if not run.lost:
        await _converse(one, server, http, run, told)


async def _client(
    queue: Iterator[Ask], server: Running, http: httpx.AsyncClient, run: Run, told: Callable[[], object]
) -> None:
    for one in queue:
        if run.lost:
            return
        await _converse(one, server, http, run, told)


async def _converse(one: Ask, server: Running, http: httpx.AsyncClient, run: Run, told: Callable[[], object]) -> None:
    """Turn after turn, each with the answers that this server gave before. A turn that fails ends the conversation."""
    said: list[dict[str, str]] = []
    for turn in one.turns:
        said.append({"role": "user", "content": turn})
        sample = await ask(http, body(server, said, one))
        run.samples.append(sample)
        told()
        if sample.lost:
            run.lost = run.lost or f"{server.target.title}: {sample.error}"
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
