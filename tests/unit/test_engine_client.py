"""One contract for both clients over the echo engine, and what happens when somebody leaves, fails or is killed.

T1, T3, T5, T6, T8 name the fault tests of the engine: cancel at each moment, random aborts, kill -9 of the engine, kill
-9 of its parent, a step that raises.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from septet.config import EngineConfig
from septet.engine.client import EngineClient, InlineClient, ProcessClient
from septet.engine.echo import EchoExecutor, next_token
from septet.engine.messages import EngineInfo, Update
from septet.engine.scheduler import Scheduler, SchedulerLimits
from septet.errors import EngineDead, InvalidRequest
from septet.kv.cache import KVCache
from septet.request import FinishReason, Request, SamplingParams

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

VOCAB = 500
CONFIG = EngineConfig(
    model=f"echo:{VOCAB}:1",
    max_num_seqs=16,
    max_num_batched_tokens=64,
    max_model_len=512,
    num_kv_slots=4000,
    max_waiting=100,
)
KINDS = {"process": ProcessClient.start, "inline": InlineClient.start}


def request(id: str, n_prompt: int = 5, max_tokens: int = 10, seed: int = 0, **params) -> Request:
    tokens = tuple((seed * 31 + i) % VOCAB for i in range(n_prompt))
    return Request(id=id, tokens=tokens, params=SamplingParams(max_tokens=max_tokens, seed=seed, **params))


def expected(request: Request) -> list[int]:
    """What a quiet engine answers."""
    tokens, n = list(request.tokens), len(request.tokens)
    while len(tokens) - n < request.params.max_tokens:
        tokens.append(next_token(tokens, n, request.params, request.eos_token_ids, VOCAB))
        if tokens[-1] in request.params.stop_token_ids:
            break
    return tokens[n:]


async def read(client: EngineClient, request: Request) -> tuple[list[int], Update]:
    """All tokens and the last update."""
    tokens: list[int] = []
    async for update in client.generate(request):
        tokens += update.tokens
    return tokens, update


async def settle(client: EngineClient, limit_s: float = 2.0) -> None:
    """Within the limit nothing runs, waits or holds a slot."""
    deadline = time.monotonic() + limit_s
    while True:
        stats = await client.stats()
        if stats.running == stats.waiting == stats.slots_leased == 0:
            assert stats.slots_free + stats.slots_cached == stats.slots_total
            assert stats.audit_failures == 0
            return
        assert time.monotonic() < deadline, stats
        await asyncio.sleep(0.01)


@pytest.fixture(params=KINDS)
def run(request):
    """run(body): `await body(client)` with a client of each kind, then close it."""

    def go(body: Callable[[EngineClient], Awaitable[None]], config: EngineConfig = CONFIG, limit_s: float = 30) -> None:
        async def main():
            client = await KINDS[request.param](config)
            try:
                await body(client)
            finally:
                await client.close()
            assert client.dead

        asyncio.run(asyncio.wait_for(main(), limit_s))

    return go


# -- the contract -----------------------------------------------------------------------------------------------------
def test_tokens_and_the_last_update(run):
    async def body(client):
        assert (client.info.vocab_size, client.info.max_num_seqs, client.info.kernels) == (VOCAB, 16, "echo")
        asked = request("a", max_tokens=20)
        tokens, last = await read(client, asked)
        assert tokens == expected(asked)
        assert last.finish_reason is FinishReason.LENGTH
        await settle(client)

    run(body)


def test_a_stop_id_ends_and_is_named(run):
    async def body(client):
        stop = expected(request("x"))[3]
        tokens, last = await read(client, request("a", stop_token_ids=(stop,)))
        assert tokens == expected(request("x"))[:4]
        assert (last.finish_reason, last.stop_token) == (FinishReason.STOP, stop)

    run(body)


def test_many_at_once_each_get_their_own(run):
    async def body(client):
        asked = [request(f"r{i}", 1 + i % 40, 1 + i % 30, seed=i) for i in range(90)]
        results = await asyncio.gather(*(read(client, one) for one in asked))
        assert [tokens for tokens, _ in results] == [expected(one) for one in asked]
        await settle(client)

    run(body)


def test_the_second_time_the_prompt_comes_from_the_cache(run):
    async def body(client):
        first, second = request("a", 100), request("b", 100)
        await read(client, first)
        updates = [update async for update in client.generate(second)]
        assert sum(update.cached_tokens for update in updates) == 99
        assert (await client.stats()).hit_rate == pytest.approx(99 / 200)

    run(body)


def test_a_refusal_is_an_update_with_its_kind(run):
    async def body(client):
        tokens, last = await read(client, request("long", 600))
        assert tokens == []
        assert (last.finish_reason, last.error_kind) == (FinishReason.ERROR, "invalid_request_error")
        assert "600" in last.error
        asked = request("fine")
        assert (await read(client, asked))[0] == expected(asked)

    run(body)


def test_a_full_queue_refuses_and_the_others_finish(run):
    async def body(client):
        asked = [request(f"r{i}", 20, 20, seed=i) for i in range(150)]
        results = await asyncio.gather(*(read(client, one) for one in asked))
        kinds = [last.error_kind for _, last in results if last.error]
        assert kinds
        assert set(kinds) == {"overloaded_error"}
        assert all(
            tokens == expected(one) for one, (tokens, last) in zip(asked, results, strict=True) if not last.error
        )

    run(body)


def test_an_id_in_use_is_refused_and_the_first_goes_on(run):
    async def body(client):
        asked = request("same", max_tokens=200)
        first = asyncio.ensure_future(read(client, asked))
        await asyncio.sleep(0.02)
        with pytest.raises(InvalidRequest, match="running already"):
            await anext(client.generate(request("same")))
        assert (await first)[0] == expected(asked)

    run(body)


def test_abort_gives_a_last_update(run):
    async def body(client):
        stream = client.generate(request("a", max_tokens=400))
        await anext(stream)
        client.abort(["a", "unknown"])
        client.abort(["a"])
        updates = [update async for update in stream]
        assert updates[-1].finish_reason is FinishReason.ABORT
        await settle(client)

    run(body)


def test_close_ends_what_runs_and_is_repeatable(run):
    async def body(client):
        waiting = asyncio.ensure_future(read(client, request("a", max_tokens=500)))
        await asyncio.sleep(0.05)
        await asyncio.gather(client.close(), client.close())
        assert (await waiting)[1].finish_reason is FinishReason.ABORT
        with pytest.raises(EngineDead):
            await read(client, request("b"))
        with pytest.raises(EngineDead):
            await client.stats()
        client.abort(["a"])

    run(body)


def test_a_bad_setting_is_its_own_error():
    async def start(kind, config):
        with pytest.raises(InvalidRequest, match="max_num_batched_tokens"):
            await KINDS[kind](config)

    for kind in KINDS:
        asyncio.run(start(kind, EngineConfig(model="echo:", max_num_seqs=64, max_num_batched_tokens=8)))


# -- T1: cancel at each moment ----------------------------------------------------------------------------------------
async def cancel_after(client: EngineClient, one: Request, n_tokens: int, delay_s: float = 0.0) -> None:
    """Read so many tokens, wait, then cancel the reading task."""
    heard = asyncio.Event()

    async def reader():
        n = 0
        if n_tokens == 0:
            heard.set()
        async for update in client.generate(one):
            n += len(update.tokens)
            if n >= n_tokens:
                heard.set()

    task = asyncio.ensure_future(reader())
    await heard.wait()
    await asyncio.sleep(delay_s)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


MOMENTS = {  # prompt, max_tokens, read so many tokens, then wait so many seconds; whether there is something to abort
    "just sent": (5, 400, 0, 0.0, True),
    "before admission": (5, 400, 0, 0.0005, True),
    "in prefill": (500, 12, 0, 0.003, True),  # 64 tokens per step of 1 ms
    "after the first token": (5, 400, 1, 0.0, True),
    "mid-stream": (5, 400, 7, 0.003, True),
    "at the last token": (5, 4, 3, 0.0, False),
    "after the last token": (5, 4, 4, 0.0, False),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_t1_cancel_frees_everything(run, moment):
    n_prompt, max_tokens, n_tokens, delay_s, unfinished = MOMENTS[moment]

    async def body(client):
        for i in range(3):
            await cancel_after(client, request(f"c{i}", n_prompt, max_tokens, seed=i), n_tokens, delay_s)
        await settle(client, 1.0)
        finished = (await client.stats()).finished
        assert sum(finished.values()) == 3
        if unfinished:
            assert finished == {"abort": 3}
        asked = request("next", 30)
        assert (await read(client, asked))[0] == expected(asked)
        assert (await client.stats()).audit_failures == 0

    run(body)


def test_t1_cancel_twice_and_after_the_end(run):
    async def body(client):
        stream = client.generate(request("a", max_tokens=400))
        await anext(stream)
        await stream.aclose()
        await stream.aclose()
        client.abort(["a"])
        with pytest.raises(InvalidRequest, match="running already"):  # until the engine has let it go
            await read(client, request("a"))
        await settle(client)
        asked = request("a", max_tokens=7)
        stream = client.generate(asked)
        tokens = [token async for update in stream for token in update.tokens]
        assert tokens == expected(asked)
        await stream.aclose()
        client.abort(["a"])
        await settle(client)

    run(body)


def test_t1_a_reader_that_breaks_out_aborts(run):
    async def body(client):
        async def look() -> None:
            async for _ in client.generate(request("a", max_tokens=500)):
                break

        await look()
        await settle(client, 1.0)
        assert (await client.stats()).finished.get("abort") == 1

    run(body)


def test_t1_cancelled_while_queued_behind_others(run):
    async def body(client):
        long = [asyncio.ensure_future(read(client, request(f"l{i}", max_tokens=300, seed=i))) for i in range(16)]
        await asyncio.sleep(0.05)
        queued = [asyncio.ensure_future(read(client, request(f"q{i}", seed=i))) for i in range(40)]
        await asyncio.sleep(0.02)
        assert (await client.stats()).waiting == 40
        for task in queued:
            task.cancel()
        await asyncio.gather(*queued, return_exceptions=True)
        assert (await client.stats()).waiting == 0
        assert [tokens for tokens, _ in await asyncio.gather(*long)] == [
            expected(request(f"l{i}", max_tokens=300, seed=i)) for i in range(16)
        ]
        await settle(client)

    run(body)


# -- T3: 64 streams, random aborts -------------------------------------------------------------------------------------
async def random_stream(client: EngineClient, i: int, rng: random.Random) -> bool:
    """One stream that may be left at any moment, its tokens held against a quiet run. Whether it survived."""
    one = request(f"s{i}", rng.choice((3, 30, 200)), rng.randrange(1, 80), seed=rng.randrange(8))
    leave_after = rng.choice((None, None, 0.0, 0.002, 0.02, 0.1))
    await asyncio.sleep(rng.random() * 0.2)
    task = asyncio.ensure_future(read(client, one))
    if leave_after is not None:
        await asyncio.sleep(leave_after)
        if rng.random() < 0.5:
            task.cancel()
        else:
            client.abort([one.id])
    try:
        tokens, last = await task
    except asyncio.CancelledError:
        return False
    if last.finish_reason is FinishReason.ABORT:
        assert tokens == expected(one)[: len(tokens)]
        return False
    assert tokens == expected(one)
    return True


def test_t3_survivors_of_random_aborts_equal_a_quiet_run(run):
    async def body(client):
        rng = random.Random(3)
        survived = await asyncio.gather(*(random_stream(client, i, random.Random(rng.random())) for i in range(64)))
        assert 10 < sum(survived) < 60
        await settle(client)
        await asyncio.sleep(0.3)  # idle: the engine audits itself
        stats = await client.stats()
        assert stats.audit_failures == stats.failed_steps == 0
        assert stats.kv_waste < 0.01

    run(body)


# -- an engine under our hands: gates and faults in the executor -------------------------------------------------------
class Hands:
    """An executor around the verifying echo whose steps wait for `gate` and fail where `fault(plan)` says so."""

    def __init__(self, depth: int) -> None:
        self.inner = EchoExecutor(depth, VOCAB, verify=True)
        self.depth = depth
        self.gate = threading.Event()
        self.gate.set()
        self.fault: Callable = lambda plan: None

    def launch(self, plan):
        pending = self.inner.launch(plan)
        where = self.fault(plan)
        if where == "launch":
            raise RuntimeError("the device coughed at 0xdeadbeef")
        return Held(self, pending, where)

    def spare(self, busy):
        return self.inner.spare(busy)

    def close(self):
        self.gate.set()
        self.inner.close()


class Held:
    def __init__(self, hands, pending, where) -> None:
        self.hands, self.pending, self.where = hands, pending, where

    def result(self):
        assert self.hands.gate.wait(20)
        if self.where == "result":
            raise MemoryError("out of memory")
        return self.pending.result()


@contextlib.asynccontextmanager
async def in_hands(depth: int) -> AsyncIterator[tuple[InlineClient, Hands]]:
    limits = SchedulerLimits(max_num_seqs=8, max_num_batched_tokens=32, max_model_len=256)
    info = EngineInfo("hands", VOCAB, 256, 8, 32, 1000, 0, 0, "none", "none", "echo", os.getpid(), 0.0)
    hands = Hands(depth)
    client = InlineClient(Scheduler(limits, KVCache(1001), VOCAB), hands, info, strict=True)
    try:
        yield client, hands
    finally:
        hands.gate.set()
        await client.close()
    client.loop.scheduler.audit()


@pytest.mark.parametrize("depth", [1, 2])
def test_cancel_while_a_step_is_held_then_its_result_is_dropped(depth):
    async def main():
        async with in_hands(depth) as (client, hands):
            hands.gate.clear()
            prefill = asyncio.ensure_future(read(client, request("prefill", 200, 5)))
            other = asyncio.ensure_future(read(client, request("other", 3, 30, seed=1)))
            await asyncio.sleep(0.05)  # steps are in flight, none can end
            prefill.cancel()
            with pytest.raises(asyncio.CancelledError):
                await prefill
            hands.gate.set()
            assert (await other)[0] == expected(request("other", 3, 30, seed=1))
            await settle(client)

    asyncio.run(asyncio.wait_for(main(), 20))


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("where", ["launch", "result"])
def test_t8_a_step_that_raises_ends_its_requests_alone(depth, where):
    async def main():
        async with in_hands(depth) as (client, hands):
            hands.fault = lambda plan: where if any(row.request == "bad" for row in plan.rows) else None
            victim = asyncio.ensure_future(read(client, request("victim", 3, 60, seed=1)))
            await asyncio.sleep(0.005)
            tokens, last = await read(client, request("bad"))
            assert tokens == []
            assert (last.finish_reason, last.error_kind) == (FinishReason.ERROR, "internal_error")
            assert "0x" not in last.error
            tokens, last = await victim  # shared the step, or had ended before it
            assert last.finish_reason in (FinishReason.ERROR, FinishReason.LENGTH)
            assert tokens == expected(request("victim", 3, 60, seed=1))[: len(tokens)]
            await settle(client)
            for i in range(20):
                asked = request(f"n{i}", 40, 10, seed=i)
                assert (await read(client, asked))[0] == expected(asked)
            assert 1 <= (await client.stats()).failed_steps <= depth  # both steps in flight may hold it
            await settle(client)

    asyncio.run(asyncio.wait_for(main(), 20))


def test_a_device_that_is_broken_for_good_is_a_death_with_a_reason():
    async def main():
        async with in_hands(1) as (client, hands):
            hands.fault = lambda plan: "result"
            for i in range(15):
                assert (await read(client, request(f"r{i}")))[1].finish_reason is FinishReason.ERROR
            with contextlib.suppress(EngineDead):
                await read(client, request("last"))
            with pytest.raises(EngineDead, match="16 steps failed in a row"):
                await read(client, request("after"))
            assert client.dead

    asyncio.run(asyncio.wait_for(main(), 20))


# -- T5, T6: kill -9 ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("n_streams", [0, 16], ids=["idle", "loaded"])
def test_t5_kill_the_engine(n_streams):
    async def main():
        deaths: list[EngineDead] = []
        client = await ProcessClient.start(CONFIG, on_death=deaths.append)
        streams = [asyncio.ensure_future(read(client, request(f"r{i}", 5, 500, seed=i))) for i in range(n_streams)]
        await asyncio.sleep(0.05)
        began = time.monotonic()
        os.kill(client.info.pid, signal.SIGKILL)
        for result in await asyncio.gather(*streams, return_exceptions=True):
            assert isinstance(result, EngineDead)
            assert "SIGKILL" in str(result)
        while not deaths:
            await asyncio.sleep(0.005)
        assert time.monotonic() - began < 2.0
        assert client.dead
        with pytest.raises(EngineDead):
            await read(client, request("late"))
        await client.close()
        assert len(deaths) == 1

    asyncio.run(asyncio.wait_for(main(), 20))


PARENT = """
import asyncio, sys
from septet.config import EngineConfig
from septet.engine.client import ProcessClient
from septet.request import Request, SamplingParams

async def main():
    client = await ProcessClient.start(EngineConfig(model="echo:100:" + sys.argv[1]))
    print(client.info.pid, flush=True)
    params = SamplingParams(max_tokens=4000, seed=0)
    async for _ in client.generate(Request(id="a", tokens=(1,), params=params)):
        pass
    await asyncio.sleep(60)

asyncio.run(main())
"""


def alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


@pytest.mark.parametrize("step_ms", ["1", "30000"], ids=["streaming", "inside a long step"])
@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGINT])
def test_t6_kill_the_parent_and_the_engine_exits(step_ms, sig):
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, step_ms], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        pid = int(parent.stdout.readline())
        time.sleep(0.2)
        assert alive(pid)
        parent.send_signal(sig)
        parent.wait(10)
        deadline = time.monotonic() + 5
        while alive(pid) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not alive(pid)
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()


def test_signals_of_the_engine():
    """SIGINT is the parent's business; SIGTERM ends the engine in order, code 0, every request answered."""

    async def main():
        client = await ProcessClient.start(CONFIG)
        stream = client.generate(request("a", max_tokens=500))
        await anext(stream)
        os.kill(client.info.pid, signal.SIGINT)
        await asyncio.sleep(0.1)
        assert (await client.stats()).running == 1
        os.kill(client.info.pid, signal.SIGTERM)
        updates = [update async for update in stream]
        assert updates[-1].finish_reason is FinishReason.ABORT
        await client.close()
        assert client._process.popen.returncode == 0

    asyncio.run(asyncio.wait_for(main(), 20))


def test_an_idle_engine_uses_no_cpu():
    async def main():
        client = await ProcessClient.start(CONFIG)
        await read(client, request("a"))
        await asyncio.sleep(0.5)

        def ticks() -> int:
            fields = Path(f"/proc/{client.info.pid}/stat").read_text().rpartition(")")[2].split()
            return int(fields[11]) + int(fields[12])

        before = ticks()
        await asyncio.sleep(1.0)
        assert ticks() - before <= 2  # of 100 a second
        await client.close()

    asyncio.run(asyncio.wait_for(main(), 20))


def test_start_up_imports_no_torch():
    code = "import sys, septet.engine.client, septet.engine.process; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
