"""Signs of life of an engine process: a stopped one falls silent, a stuck one says how long, a busy one moves."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from types import SimpleNamespace

import pytest

from septet.config import EngineConfig
from septet.engine import pulse as pulses
from septet.engine.client import ProcessClient
from septet.engine.pulse import Pulse, SharedPulse
from septet.errors import EngineDead
from septet.request import Request, SamplingParams


def request(n: int) -> Request:
    return Request(id="r", tokens=(1, 2, 3), params=SamplingParams(max_tokens=n, seed=1, ignore_eos=True))


def test_a_stopped_engine_falls_silent_a_slow_step_does_not_and_a_killed_one_is_told() -> None:
    async def go() -> None:
        client = await ProcessClient.start(EngineConfig(model="echo:100:700"))
        try:
            events = client.generate(request(3))
            await anext(events)  # a step of 0.7 s
            seen = client.pulse()
            assert seen is not None
            assert seen.silent_s < 0.6
            assert seen.moves(silent_s=0.6, stuck_s=5)
            os.kill(client.info.pid, signal.SIGSTOP)
            await asyncio.sleep(0.8)
            stopped = client.pulse()
            assert stopped is not None
            assert not stopped.moves(silent_s=0.6, stuck_s=5)
            begun = time.monotonic()
            client.kill("it does not move")
            with pytest.raises(EngineDead, match="does not move"):
                async for _ in events:
                    pass
            assert time.monotonic() - begun < 2
            assert client.pulse() is None
        finally:
            await client.close()

    asyncio.run(go())


def test_a_loop_that_has_work_and_finishes_no_step_is_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulses, "BEAT_S", 0.01)
    loop = SimpleNamespace(idle=True, clock=SimpleNamespace(progress_at=1.0))
    shared = SharedPulse.create()
    stop = shared.beat(loop)  # type: ignore[arg-type]
    try:
        time.sleep(0.1)
        assert shared.read().stuck_s == 0
        loop.idle = False
        time.sleep(0.2)
        assert shared.read().stuck_s > 0.1
        loop.clock.progress_at = 2.0
        time.sleep(0.05)
        assert shared.read().stuck_s < 0.05
    finally:
        stop.set()
        time.sleep(0.05)
        shared.close()
        shared.close()


def test_limits_of_a_pulse() -> None:
    assert Pulse(1.0, 100.0).moves(silent_s=2, stuck_s=200)
    assert not Pulse(3.0, 0.0).moves(silent_s=2, stuck_s=200)
    assert not Pulse(0.0, 201.0).moves(silent_s=2, stuck_s=200)
