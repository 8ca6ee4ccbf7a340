"""The client and the processes of `septet bench`: answers, its own lateness, and that no engine stays behind."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from septet.bench.harness import watch
from septet.bench.harness.client import Address, Sample, ask, settle
from septet.bench.harness.document import read
from septet.bench.harness.drive import drive
from septet.bench.harness.launch import Running, running
from septet.bench.harness.prompts import Ask
from septet.bench.harness.targets import at_url
from tests.bench_stub import chat, event, http, stub, text

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[2]


def asked(url: str, **given: Any) -> Sample:
    async def once() -> Sample:
        body = {"max_tokens": 4, "messages": []}
        return await ask(Address(url, None), body, **{"due": None, "timeout_s": 20.0, **given})

    sample = asyncio.run(once())
    settle(sample)
    return sample


# -- answers ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (http(chat(4)), ""),
        (b"HTTP/1.1 200 OK\r\n\r\n" + chat(4), ""),  # until the connection ends
        (http(b'{"error": {"message": "no\\nroom"}}', "503 Busy"), "HTTP 503: no room"),
        (http(b"<html>", "404 Not Found"), "HTTP 404: <html>"),
        (http(text("a")), "the stream ended before the answer did"),
        (http(text("a"), length=1000), "the stream ended before the answer did"),
        (http(b"data: [DONE]\n\n"), "the answer is empty"),
        (http(b"data: {]\n\n"), "no stream of OpenAI's form"),
        (http(event(choices=[{"delta": {"content": 7}}])), "no stream of OpenAI's form"),
        (http(event(error={"message": "out of memory"})), "out of memory"),
        (b"hello\r\n\r\n", "no answer in HTTP"),
        (b"", "the connection was closed without an answer"),
    ],
)
def test_every_answer_is_a_sample(answer: bytes, says: str) -> None:
    with stub(lambda _: answer) as url:
        found = asked(url)
    assert found.error.startswith(says) if says else not found.error
    if not says:
        assert (found.tokens, found.counted, found.prompt_tokens, found.ended) == (4, True, 5, "length")
        assert found.text == "a a a b"
        assert found.sent < found.first <= found.last


def test_an_event_in_pieces_counts_when_it_is_whole() -> None:
    whole = b'data: {"choices": [{"delta": {"content": "gr\xc3\xbcn"}}]}\n\ndata: [DONE]\n\n'
    cut = whole.index(b"\xc3") + 1
    sample = Sample(status=200, pieces=[(1.0, whole[:cut]), (2.0, whole[cut:])])
    settle(sample)
    assert (sample.text, sample.first, sample.tokens, sample.error) == ("grün", 2.0, 1, "")


def test_nobody_there_and_nobody_speaking_are_one_line() -> None:
    found = asked("http://127.0.0.1:9/v1")
    assert found.error.startswith("no connection")
    assert found.broken
    with stub(lambda _: b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n") as url:
        assert asked(url).broken
    assert "\n" not in found.error


# -- time -------------------------------------------------------------------------------------------------------------
def test_a_request_counts_from_the_moment_it_was_due_however_late_this_client_is() -> None:
    with stub(lambda _: http(chat(4))) as url:
        due = time.perf_counter() - 0.5
        found = asked(url, due=due)
    assert found.sent == due
    assert found.late >= 0.5
    assert found.ttft_ms >= 500


def test_a_client_that_is_held_up_is_told_from_one_that_waits() -> None:
    def hold() -> None:
        end = time.thread_time() + 0.02
        while time.thread_time() < end:
            pass

    with stub(lambda asked: http(chat(asked["max_tokens"]))) as url, running(at_url(url, None, None)) as server:
        assert (server.model, server.version) == ("stub", "1.2.3")
        asks = [Ask(0.0, ("hello",), 3)] * 20
        held = drive(server, asks, streams=4, timed=False, timeout_s=20, told=hold)
        free = drive(server, asks, streams=4, timed=False, timeout_s=20, told=lambda: None)
        waits = [Ask(i * 0.05, ("hello",), 3) for i in range(10)]
        idle = drive(server, waits, streams=1, timed=True, timeout_s=20, told=lambda: None)
    assert [len(r.samples) for r in (held, free, idle)] == [20, 20, 10]
    assert all(s.ok and s.tokens == 3 == s.asked for s in [*held.samples, *free.samples])
    assert max(held.lags) > 0.015, "twenty milliseconds went by without a look"
    assert held.busy > 2 * idle.busy
    assert idle.wall_s >= 0.45, "at their own times"


def test_a_server_that_goes_away_ends_the_run_soon() -> None:
    left = [5]

    def answer(asked: dict[str, Any]) -> bytes:
        left[0] -= 1
        return http(chat(asked["max_tokens"])) if left[0] >= 0 else b""

    with stub(answer) as url:
        server = Running(at_url(url, "stub", None), url, model="stub")
        run = drive(server, [Ask(0.0, ("hi",), 3)] * 500, streams=2, timed=False, timeout_s=20, told=lambda: None)
    assert sum(s.ok for s in run.samples) == 5
    assert len(run.samples) < 20
    assert "closed without an answer" in run.lost
    assert not run.interrupted


# -- what is looked at ------------------------------------------------------------------------------------------------
def test_gpus_are_those_of_engines_started_here_and_count_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    told = iter([(100.0, 50.0)] * 1000)
    monkeypatch.setattr(watch, "gpu_now", lambda: next(told))
    monkeypatch.setattr(watch.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(watch, "EVERY_S", 60.0)
    elsewhere = Running(at_url("http://h/v1", "m", None), "http://h/v1")
    with watch.Watch(elsewhere, 40.0) as seen:
        pass
    assert (seen.energy_j, seen.gpu_mib, seen.memory_mib) == (None, None, None)
    with subprocess.Popen(["sleep", "60"]) as process:
        here = Running(at_url("http://h/v1", "m", None), "", process=process)
        with watch.Watch(here, 40.0, gpus=False) as seen:
            pass
        assert seen.energy_j is None
        began = time.perf_counter()
        with watch.Watch(here, 40.0) as seen:
            time.sleep(0.1)
        spent = time.perf_counter() - began
        process.kill()
    assert seen.gpu_mib == 60.0
    assert seen.energy_j is not None
    assert 0 < seen.energy_j <= 50 * spent, "the time after the only look in between counts too"


# -- processes --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("signals", "stubborn", "code"),
    [
        ((signal.SIGTERM,), False, 143),
        ((signal.SIGHUP,), False, 129),
        ((signal.SIGINT, signal.SIGINT), True, 130),
        ((signal.SIGKILL,), False, -9),
    ],
)
def test_no_engine_is_left_behind(tmp_path: Path, signals: tuple[int, ...], stubborn: bool, code: int) -> None:
    (tmp_path / "long.toml").write_text("title='l'\nabout=''\nkind='closed'\nrequests=100000\nprompt=4\noutput=10\n")
    served = tmp_path / "served"
    words = [sys.executable, "-m", "tests.bench_stub", "{port}", str(served), *(["--stubborn"] if stubborn else [])]
    program = (
        "import septet.cli.bench as b\n"
        "from septet.bench.harness.targets import Target\n"
        f"b._targets = lambda *_: [Target(name='up', title='up', model='', command={tuple(words)!r})]\n"
        f"b.bench(['--workload', {str(tmp_path / 'long.toml')!r}, '--out', {str(tmp_path / 'out')!r}])"
    )

    def background() -> None:
        for number in (signal.SIGINT, signal.SIGHUP):  # ignored, and so by the child, where tests run under nohup
            signal.signal(number, signal.SIG_DFL)
        if signal.SIGTERM in signals:  # as a shell's `&` in a script: SIGTERM must work all the same
            signal.signal(signal.SIGINT, signal.SIG_IGN)

    bench = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, preexec_fn=background, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    try:
        wait_for(lambda: served.exists() and int(served.read_text().split()[1]) > 20, bench)
        engine = psutil.Process(int(served.read_text().split()[0]))
        bench.send_signal(signals[0])
        for number in signals[1:]:
            wait_for(lambda: (tmp_path / "out" / "results.json").exists(), bench)  # the first one has been seen
            bench.send_signal(number)
        told, _ = bench.communicate(timeout=25)  # a stubborn engine is given longer, unless one asks twice
        assert bench.returncode == code, told
    finally:
        bench.kill()
        bench.wait()
    wait_for(lambda: not alive(engine))
    if code > 0:
        assert "interrupted: what was measured is kept" in told
        assert "written: " in told
        document = read(tmp_path / "out" / "results.json")
        assert document["partial"]
        [point] = document["points"]
        assert point["partial"]
        assert len(point["runs"][0]["ttft_ms"]) > 10, "answers of the run under way are kept"


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for(what: Callable[[], bool], bench: subprocess.Popen[str] | None = None) -> None:
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline
        assert bench is None or bench.poll() is None, "it ended too soon"
        time.sleep(0.02)
