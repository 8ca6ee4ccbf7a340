"""ProcessClient against children that misbehave: each is a small script in the place of `python -m septet.engine`."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import textwrap
import time
from typing import TYPE_CHECKING

import pytest

from septet.config import EngineConfig
from septet.engine import spawn
from septet.engine.client import ProcessClient
from septet.engine.spawn import EngineProcess
from septet.errors import EngineDead, InvalidRequest, ModelNotFound, SeptetError
from septet.request import Request, SamplingParams
from septet.session.start import start_session

if TYPE_CHECKING:
    from septet.engine.messages import Update

PRELUDE = """
import os, signal, socket, sys, time
from septet.engine.messages import *
from septet.engine.wire import BlockingEnd, Disconnected
sock = socket.socket(fileno=int(sys.argv[sys.argv.index("--fd") + 1]))
end = BlockingEnd(sock)
(config,) = end.receive(None)
info = EngineInfo(config.model, 10, 100, 4, 64, 128, 0, 0, "none", "none", "echo", os.getpid(), 0.0)
def until(kind):
    while True:
        for message in end.receive(None):
            if isinstance(message, kind):
                return message
"""
CONFIG = EngineConfig(model="echo:")
REQUEST = Request(id="r", tokens=(1,), params=SamplingParams(max_tokens=9, seed=0))


@pytest.fixture
def child(monkeypatch):
    """child(code): the next engine is this script, after PRELUDE; gives the list of processes that were started."""
    started: list[subprocess.Popen] = []
    real = subprocess.Popen

    def replace(code: str) -> list[subprocess.Popen]:
        def popen(command, **options):
            fd = command[command.index("--fd") + 1]
            script = PRELUDE + textwrap.dedent(code)
            started.append(real([sys.executable, "-c", script, "--fd", fd], **options))
            return started[-1]

        monkeypatch.setattr(spawn.subprocess, "Popen", popen)
        return started

    yield replace
    for popen in started:
        assert popen.returncode is not None, "a child was left behind"


def go(coroutine, limit_s: float = 20.0):
    """Run it; anything asyncio complains about (a task or an exception that nobody saw) fails the test."""
    complaints = []

    async def main():
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        try:
            return await asyncio.wait_for(coroutine, limit_s)
        finally:
            gc.collect()
            await asyncio.sleep(0)

    result = asyncio.run(main())
    assert complaints == []
    return result


async def failing_start(**options) -> SeptetError:
    with pytest.raises(SeptetError) as caught:
        await ProcessClient.start(CONFIG, **options)
    return caught.value


async def read(client: ProcessClient, pause_s: float = 0.0) -> tuple[list[Update], EngineDead | None]:
    """All updates of REQUEST, read at that pace, and how it ended if not by itself."""
    updates = []
    try:
        async for update in client.generate(REQUEST):
            updates.append(update)
            await asyncio.sleep(pause_s)
    except EngineDead as error:
        return updates, error
    return updates, None


# -- starting ---------------------------------------------------------------------------------------------------------
def test_a_fatal_while_loading_comes_as_its_own_class(child):
    child("end.send([Fatal('no such model: x', 'not_found_error')]); sys.exit(1)")
    error = go(failing_start())
    assert type(error) is ModelNotFound
    assert str(error) == "no such model: x"


def test_a_child_that_exits_at_once_says_how(child):
    child("sys.exit(3)")
    error = go(failing_start())
    assert type(error) is EngineDead
    assert "exited with code 3" in str(error)


def test_a_child_killed_while_loading_says_by_what(child):
    child("os.kill(os.getpid(), signal.SIGKILL)")
    assert "SIGKILL (out of memory?)" in str(go(failing_start()))


def test_a_child_that_never_is_ready_is_ended_at_the_deadline(child):
    (started := child("time.sleep(60)"))
    began = time.monotonic()
    error = go(failing_start(deadline_s=1.0))
    assert isinstance(error, EngineDead)
    assert "not ready after 1 s" in str(error)
    assert time.monotonic() - began < 5
    assert started[0].returncode == -signal.SIGKILL


def test_a_cancelled_start_leaves_no_child(child):
    started = child("time.sleep(60)")

    async def main():
        task = asyncio.ensure_future(ProcessClient.start(CONFIG))
        await asyncio.sleep(0.3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    go(main())
    assert started[0].returncode == -signal.SIGKILL


def test_garbage_in_the_place_of_the_info(child):
    child("sock.sendall(b'HTTP/1.1 200 OK\\r\\n\\r\\n' * 10); time.sleep(60)")
    error = go(failing_start())
    assert type(error) is EngineDead
    assert "garbage" in str(error)


# -- running ----------------------------------------------------------------------------------------------------------
def test_garbage_while_streaming_ends_every_stream_and_the_child(child):
    started = child("""
        end.send([info])
        until(Submit)
        end.send([Update("r", (1, 2)), Update("unknown", (3,))])
        time.sleep(0.2)
        sock.sendall(b"\\x00\\x00\\x00\\x05hello")
        time.sleep(60)
    """)
    deaths = []

    async def main():
        client = await ProcessClient.start(CONFIG, on_death=deaths.append)
        updates, error = await read(client)
        assert [update.tokens for update in updates] == [(1, 2)]
        assert "garbage" in str(error)
        assert client.dead
        with pytest.raises(EngineDead):
            await client.stats()
        with pytest.raises(EngineDead):
            await anext(client.generate(REQUEST))
        client.abort(["r"])  # harmless
        await client.close()

    go(main())
    assert len(deaths) == 1
    assert started[0].returncode == -signal.SIGKILL


def test_output_before_the_death_is_delivered_first(child):
    child("end.send([info]); until(Submit); end.send([Update('r', (1,))]); end.send([Update('r', (2,))]); sys.exit(4)")

    async def main():
        client = await ProcessClient.start(CONFIG)
        updates, error = await read(client, pause_s=0.3)  # the engine is dead before the second one is taken
        assert [token for update in updates for token in update.tokens] == [1, 2]
        assert "exited with code 4" in str(error)
        await client.close()

    go(main())


def test_last_words_are_the_reason(child):
    child("end.send([info]); until(Submit); end.send([Fatal('the device is on fire')]); sys.exit(1)")
    deaths = []

    async def main():
        client = await ProcessClient.start(CONFIG, on_death=deaths.append)
        with pytest.raises(EngineDead, match=r"^the device is on fire$"):
            await anext(client.generate(REQUEST))
        await client.close()

    go(main())
    assert [str(death) for death in deaths] == ["the device is on fire"]


def test_a_closed_connection_alone_is_a_death_too(child):
    started = child("end.send([info]); until(Submit); sock.shutdown(2); time.sleep(60)")

    async def main():
        client = await ProcessClient.start(CONFIG)
        began = time.monotonic()
        with pytest.raises(EngineDead, match="closed its connection"):
            await anext(client.generate(REQUEST))
        assert time.monotonic() - began < 2
        await client.close()

    go(main())
    assert started[0].returncode == -signal.SIGKILL


def test_close_ends_a_child_that_does_not_listen(child, monkeypatch):
    monkeypatch.setattr("septet.engine.client.CLOSE_GRACE_S", 0.3)
    started = child("signal.signal(signal.SIGTERM, signal.SIG_IGN); end.send([info]); time.sleep(60)")

    async def main():
        client = await ProcessClient.start(CONFIG)
        waiting = asyncio.ensure_future(anext(client.generate(REQUEST)))
        await asyncio.sleep(0.1)
        await asyncio.gather(client.close(), client.close())
        with pytest.raises(EngineDead):
            await waiting
        await client.close()

    go(main())
    assert started[0].returncode == -signal.SIGKILL


def test_a_request_too_large_to_send_is_refused_alone(child, monkeypatch):
    child("end.send([info]); until(Shutdown)")

    async def main():
        client = await ProcessClient.start(CONFIG)
        monkeypatch.setattr("septet.engine.wire.MAX_FRAME", 10_000)
        huge = Request(id="h", tokens=(70_000,) * 10_000, params=REQUEST.params)
        with pytest.raises(InvalidRequest, match="too large"):
            await anext(client.generate(huge))
        odd = Request(id="o", tokens=(2**70,), params=REQUEST.params)
        with pytest.raises(InvalidRequest):
            await anext(client.generate(odd))
        assert not client.dead
        await client.close()

    go(main())


def test_a_slow_reader_costs_one_merged_update(child):
    child("""
        end.send([info])
        until(Submit)
        for n in range(20_000):
            end.send([Update("r", (n,), cached_tokens=7 if n == 0 else 0)])
        end.send([Update("r", (-1,), finish_reason="stop", stop_token=-1)])
        until(Shutdown)
    """)

    async def main():
        client = await ProcessClient.start(CONFIG)
        updates = []
        async for update in client.generate(REQUEST):
            updates.append(update)
            mailbox = client._open["r"]
            for _ in range(100):
                assert len(mailbox._waiting) <= 64
                await asyncio.sleep(0.01)
        await client.close()
        assert [token for update in updates for token in update.tokens] == [*range(20_000), -1]
        assert updates[0].cached_tokens == 7
        assert updates[-1].stop_token == -1
        assert len(updates) < 10

    go(main(), 60)


# -- the child's environment ------------------------------------------------------------------------------------------
def test_the_child_gets_thread_counts_and_the_users_choice_stays():
    env = spawn._child_env({"OMP_NUM_THREADS": "7"})
    assert env["OMP_NUM_THREADS"] == "7"
    assert int(env["MKL_NUM_THREADS"]) >= 1


def test_the_child_finds_this_package_from_any_directory(tmp_path):
    code = "import septet; print(septet.__file__)"
    env = spawn._child_env({"PATH": os.environ["PATH"]})
    (tmp_path / "septet").mkdir()
    (tmp_path / "septet" / "__init__.py").write_text("raise SystemExit('the wrong one')")
    out = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert out.stdout.strip() == spawn.septet.__file__


def test_one_that_nobody_takes_leaves_nothing():
    engine = EngineProcess.spawn(warm=True)
    engine.discard()
    assert engine.popen.returncode == -signal.SIGKILL
    assert engine.sock.fileno() == -1
    with pytest.raises(ValueError, match="closed"):
        engine.pulse.read()


@pytest.mark.parametrize("wrong", [{"tool_call_parser": "nobody's"}, {"no_such_option": 1}])
def test_one_that_was_started_ahead_ends_with_a_session_that_never_begins(wrong, tmp_path):
    class Ahead:
        discarded = False

        def discard(self):
            self.discarded = True

    model = tmp_path / "empty.gguf"
    model.write_bytes(b"GGUF")
    engine = Ahead()
    with pytest.raises(SeptetError):
        go(start_session(str(model), engine=engine, **wrong))
    assert engine.discarded


def test_one_that_was_started_ahead_takes_the_configuration():
    async def main():
        engine = EngineProcess.spawn()
        client = await ProcessClient.start(EngineConfig(model="echo:77"), process=engine)
        assert (client.info.vocab_size, client.info.pid) == (77, engine.popen.pid)
        await client.close()
        assert engine.popen.returncode == 0

    go(main())


def test_exit_reasons():
    popen = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    ours = EngineProcess(popen, None, None)
    assert ours.exit_reason() is None
    popen.terminate()
    popen.wait()
    assert ours.exit_reason() == "it was killed by SIGTERM"
