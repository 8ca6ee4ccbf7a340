"""Faults, by real processes: an engine that dies, stops, talks garbage; full disks; floods; clients that leave.

Rows T1 to T21 of docs/security.md that one machine can show without a model. Each test is followed by a request that
must still be answered, unless the server is to end.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from septet.engine.client import InlineClient
from septet.engine.echo import EchoExecutor
from septet.engine.scheduler import Scheduler, SchedulerLimits
from septet.kv.cache import KVCache
from septet.serve.app import Service, Settings, create_app
from tests import fakes
from tests.unit.test_serve_openai import ask

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TEXT = "/v1/completions"


@dataclass
class Running:
    popen: subprocess.Popen[str]
    root: str
    engine: int
    stderr: list[str] = field(default_factory=list)

    def ask(self, **fields: Any) -> httpx.Response:
        headers = fields.pop("headers", {})
        body = {"prompt": "x", "max_tokens": 3, "ignore_eos": True} | fields
        return httpx.post(self.root + TEXT, json=body, timeout=30, headers=headers)

    def figure(self, name: str) -> float:
        found = re.search(rf"^{re.escape(name)}(?:\{{[^}}]*\}})? (\S+)", self.get("/metrics").text, re.MULTILINE)
        assert found is not None, name
        return float(found[1])

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.root + path, timeout=10)

    def idle(self) -> bool:
        """Nothing of any request is left in the engine."""
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "septet:kv_slots_leased")
        return all(self.figure(name) == 0 for name in names)


@contextmanager
def running(**options: Any) -> Iterator[Running]:
    command = [sys.executable, "-m", "tests.echo_server", json.dumps(options)]
    popen = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert popen.stdout is not None
    assert popen.stderr is not None
    lines: list[str] = []
    threading.Thread(target=lines.extend, args=(popen.stderr,), daemon=True).start()
    engine = 0
    try:
        port, engine = map(int, popen.stdout.readline().split())
        yield Running(popen, f"http://127.0.0.1:{port}", engine, lines)
    finally:
        popen.kill()
        popen.wait()
        assert within(10, lambda: not alive(engine)), "an orphan"


def within(seconds: float, condition: Callable[[], Any]) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    settings = {"max_waiting": 8, "max_waiting_tokens": 3000, "write_timeout_s": 2.0}
    with running(engine={"max_num_seqs": 4, "max_waiting": 64, "num_kv_slots": 4000}, settings=settings) as server:
        yield server
        assert server.popen.poll() is None
        assert server.figure("septet:audit_failures_total") == 0


def stream(server: Running, into: list[str], begun: threading.Event, **fields: Any) -> threading.Thread:
    def read() -> None:
        body = {"prompt": "x", "stream": True, "max_tokens": 2000, "ignore_eos": True} | fields
        try:
            with httpx.stream("POST", server.root + TEXT, json=body, timeout=60) as response:
                into.append(str(response.status_code))
                for line in response.iter_lines():
                    into.append(line)
                    if line:
                        begun.set()
        except httpx.HTTPError as error:
            into.append(repr(error))
        begun.set()

    thread = threading.Thread(target=read)
    thread.start()
    return thread


def streaming(server: Running, **fields: Any) -> tuple[threading.Thread, list[str]]:
    lines, begun = list[str](), threading.Event()
    thread = stream(server, lines, begun, **fields)
    assert begun.wait(20)
    return thread, lines


# -- T1, T2, T3: who leaves takes nothing along -----------------------------------------------------------------------
@pytest.mark.parametrize("streamed", [True, False])
def test_clients_that_leave_in_every_phase_free_everything_within_a_second(server: Running, streamed: bool) -> None:
    body = {"prompt": "y" * 1200, "max_tokens": 1500, "ignore_eos": True, "stream": streamed}
    for patience in (0.001, 0.02, 0.06, 0.15, 0.4):  # accepted, queued, in prefill, in the middle
        _leave(server, patience, body)
    assert within(1.5, server.idle)
    assert server.ask().status_code == 200


def test_those_who_stay_get_the_same_text_whoever_leaves(server: Running) -> None:
    fields: dict[str, Any] = {"prompt": "the one who stays", "max_tokens": 40, "seed": 7, "temperature": 1.0}
    quiet = server.ask(**fields).json()["choices"][0]["text"]
    leavers = []
    for i in range(6):
        thread = threading.Thread(target=_leave, args=(server, 0.05 + 0.07 * i))
        thread.start()
        leavers.append(thread)
    assert server.ask(**fields).json()["choices"][0]["text"] == quiet
    for thread in leavers:
        thread.join()
    assert within(3, server.idle)


def _leave(server: Running, after_s: float, body: dict[str, Any] | None = None) -> None:
    """Ask, and be gone without having read a byte."""
    data = json.dumps(body or {"prompt": "z", "max_tokens": 2000}).encode()
    head = (
        f"POST {TEXT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n"
    )
    with socket.create_connection(("127.0.0.1", int(server.root.rsplit(":", 1)[1]))) as connection:
        connection.sendall(head.encode() + b"\r\n" + data)
        time.sleep(after_s)


# -- T11: past the limits ---------------------------------------------------------------------------------------------
def test_past_the_limit_of_requests_the_refusal_is_fast_has_a_time_and_the_rest_finish(server: Running) -> None:
    answers: list[httpx.Response] = []
    threads = [threading.Thread(target=lambda: answers.append(server.ask(max_tokens=25))) for _ in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    codes = [answer.status_code for answer in answers]
    assert len(codes) == 24
    assert set(codes) == {200, 429}
    assert codes.count(200) >= 12, "4 run and 8 wait"
    refused = next(a for a in answers if a.status_code == 429)
    assert refused.json()["error"]["type"] == "overloaded_error"
    assert 0 < int(refused.headers["retry-after-ms"]) <= 60_000
    assert refused.elapsed.total_seconds() < 1
    assert server.figure("septet:refused_total") > 0
    assert within(3, server.idle)


def test_past_the_limit_of_prompt_tokens_too(server: Running) -> None:
    running_ones = [streaming(server, max_tokens=100) for _ in range(4)]
    waiting, lines = threading.Event(), list[str]()
    first = stream(server, lines, waiting, prompt="a" * 2500, max_tokens=2)  # waits: all rows are taken
    assert within(5, lambda: server.figure("vllm:num_requests_waiting") == 1)
    refused = server.ask(prompt="b" * 600)
    assert refused.status_code == 429
    assert "tokens" in refused.json()["error"]["message"]
    for thread, _ in running_ones:
        thread.join(30)
    first.join(30)
    assert "data: [DONE]" in lines


# -- T12: time is over ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("how", [{"headers": {"x-request-timeout": "0.3"}}, {"timeout": 0.3}])
def test_a_deadline_ends_a_request_with_a_typed_error_and_frees_it(server: Running, how: dict[str, Any]) -> None:
    begun = time.monotonic()
    answer = server.ask(max_tokens=2000, **how)
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "deadline_exceeded"
    assert answer.headers["x-should-retry"] == "false"
    assert 0.25 < time.monotonic() - begun < 1.5
    assert within(1, server.idle)
    _, lines = streaming(server, **{k: v for k, v in how.items() if k == "timeout"} or {"timeout": 0.3})
    assert within(3, lambda: lines[-1] == "data: [DONE]" or lines[-2:-1] == ["data: [DONE]"])
    assert any("deadline_exceeded" in line for line in lines)


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "soon", "1e9"])
def test_a_deadline_that_is_none_is_refused(server: Running, value: str) -> None:
    answer = server.ask(headers={"x-request-timeout": value})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "X-Request-Timeout"


# -- T16: probes ------------------------------------------------------------------------------------------------------
def test_a_flood_of_probes_costs_the_engine_nothing(server: Running) -> None:
    before = server.figure("septet:steps_total")
    with httpx.Client() as http:
        begun = time.monotonic()
        for _ in range(150):
            for path in ("/live", "/ready", "/progressing", "/health"):
                assert http.get(server.root + path).status_code == 200
        assert time.monotonic() - begun < 6, "40 ms more each would be Nagle's delay"
    assert server.figure("septet:steps_total") == before


# -- T5, T6, T7, T17: the engine dies, stops, talks garbage -----------------------------------------------------------
def test_a_killed_engine_ends_its_requests_at_once_and_is_started_again() -> None:
    with running(restart=True) as server:
        thread, lines = streaming(server)
        begun = time.monotonic()
        os.kill(server.engine, signal.SIGKILL)
        thread.join(2)
        assert not thread.is_alive(), "an open request must hear of it within 2 s"
        assert any("engine_dead_error" in line for line in lines)
        assert time.monotonic() - begun < 2
        assert server.get("/live").status_code == 200
        assert within(15, lambda: server.get("/ready").status_code == 200)
        assert server.ask().status_code == 200
        assert server.figure("septet:engine_restarts_total") == 1
        server.popen.send_signal(signal.SIGTERM)
        assert server.popen.wait(15) == 0


def test_while_the_engine_starts_again_requests_are_refused_and_one_that_keeps_dying_is_given_up() -> None:
    with running(restart=True) as server:
        codes = set()
        for _ in range(4):
            children = f"/proc/{server.popen.pid}/task/{server.popen.pid}/children"
            assert within(15, lambda: server.get("/ready").status_code == 200)
            with open(children) as file:
                os.kill(int(file.read().split()[0]), signal.SIGKILL)
            assert within(2, lambda: server.get("/ready").status_code == 503)
            codes.add(server.ask().status_code)
        assert codes <= {200, 503}  # 200: the new engine was faster than the question
        assert server.popen.wait(20) == 1


def test_without_a_restart_the_server_says_so_and_exits_non_zero() -> None:
    with running() as server:
        thread, lines = streaming(server)
        os.kill(server.engine, signal.SIGKILL)
        thread.join(2)
        assert any("engine_dead_error" in line for line in lines)
        assert within(2, lambda: server.get("/health").status_code == 503)
        assert server.get("/live").status_code == 200
        assert server.popen.wait(15) == 1


def test_a_stopped_engine_is_no_progress_while_a_long_step_is_and_it_is_ended_in_the_end() -> None:
    settings = {"silent_s": 0.8, "kill_silent_s": 2.0}
    with running(model="echo:256:1200", settings=settings, restart=True) as server:
        _, lines = streaming(server)
        for _ in range(8):  # in the middle of a step of 1.2 s
            assert server.get("/progressing").status_code == 200
            time.sleep(0.1)
        os.kill(server.engine, signal.SIGSTOP)
        assert within(2, lambda: server.get("/progressing").status_code == 503)
        assert server.get("/live").status_code == 200
        assert within(4, lambda: any("did not move" in line for line in lines))
        assert within(15, lambda: server.get("/progressing").status_code == 200 and server.get("/ready").is_success)
        assert not alive(server.engine)


def test_when_the_server_is_killed_the_engine_leaves_by_itself() -> None:
    with running() as server:
        streaming(server)
        server.popen.kill()
        assert within(5, lambda: not alive(server.engine))


# -- T13: leaving -----------------------------------------------------------------------------------------------------
def test_a_drain_says_what_it_waits_for() -> None:
    with running(settings={"drain_s": 20}) as server:
        thread, lines = streaming(server, max_tokens=30)
        server.popen.send_signal(signal.SIGTERM)
        thread.join(15)
        assert "data: [DONE]" in lines
        assert server.popen.wait(10) == 0
        assert any("draining: 1 generations" in line for line in server.stderr)


def test_a_watched_scope_does_not_hold_up_a_drain() -> None:
    with running(settings={"drain_s": 20}) as server, httpx.stream("GET", server.root + "/scope") as scope:
        assert next(scope.iter_lines()).startswith("data: ")
        server.popen.send_signal(signal.SIGTERM)
        assert server.popen.wait(5) == 0


# -- T14: a full disk -------------------------------------------------------------------------------------------------
def test_a_full_disk_costs_log_lines_and_no_request() -> None:
    with running(access_log_file="/dev/full") as server:
        for _ in range(5):
            assert server.ask().status_code == 200
        assert within(5, lambda: server.figure("septet:dropped_log_lines_total") >= 5)


# -- against an engine of this process --------------------------------------------------------------------------------
def test_two_hundred_requests_that_run_out_of_time_leave_the_next_one_as_it_was() -> None:
    """T2, over the real scheduler: steps of 2 ms, rows for 16, and 200 answers of which none has the time to end."""

    async def go() -> None:
        limits = SchedulerLimits(max_num_seqs=16, max_num_batched_tokens=256, max_model_len=200)
        scheduler = Scheduler(limits, KVCache(1001), 257)
        engine = InlineClient(scheduler, EchoExecutor(vocab_size=257, step_s=0.002), fakes.info(), strict=True)
        app = create_app(Service(fakes.session(engine), Settings()))  # type: ignore[arg-type]
        transport = httpx.ASGITransport(app)
        try:
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8000", timeout=120) as http:

                async def ask(text: str, n: int, **headers: str) -> httpx.Response:
                    body = {"prompt": text, "max_tokens": n, "ignore_eos": True, "seed": 1}
                    return await http.post("/v1/completions", json=body, headers=headers)

                before = (await ask("hello", 8)).json()["choices"]
                late = await asyncio.gather(*(ask(f"{i}", 190, **{"x-request-timeout": "0.2"}) for i in range(200)))
                assert {answer.status_code for answer in late} == {504}
                assert (await ask("hello", 8)).json()["choices"] == before
                stats = await engine.stats()
                assert (stats.running, stats.waiting, stats.slots_leased) == (0, 0, 0)
        finally:
            await engine.close()

    asyncio.run(asyncio.wait_for(go(), 200))


@pytest.mark.parametrize("jump", [-1e7, 1e7])
def test_a_clock_that_jumps_ends_no_request(jump: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """T20: months forth or back in the middle of an answer with a deadline; times that are told stay sane."""
    client, true = fakes.FakeClient("hello"), time.time

    async def pause() -> None:
        monkeypatch.setattr(time, "time", lambda: true() + jump)
        await asyncio.sleep(0)

    client.pause = pause
    service = Service(fakes.session(client), Settings(request_timeout_s=60))
    body = {"prompt": "x", "max_tokens": 5}
    answer = ask(create_app(service), "POST", "/v1/completions", json=body, headers={"x-request-timeout": "60"})
    assert answer.status_code == 200
    total = next(
        sample.value
        for family in service.metrics.registry.collect()
        for sample in family.samples
        if sample.name == "vllm:e2e_request_latency_seconds_sum"
    )
    assert 0 <= total < 60
