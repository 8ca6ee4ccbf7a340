"""Drain, cut, second signal, dead engine: the real server process over a scripted engine, by real sockets."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import httpx
import pytest

from septet.errors import InvalidRequest
from septet.serve.app import bind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@dataclass
class Running:
    popen: subprocess.Popen[str]
    root: str
    lines: list[str] = field(default_factory=list)
    begun: threading.Event = field(default_factory=threading.Event)
    idle: int = 0  # sockets, nobody connected

    def stream(self) -> threading.Thread:
        """A reader of one streamed answer; returns when its first event is there."""

        def read() -> None:
            body = {"prompt": "x", "stream": True, "max_tokens": 20}
            with httpx.stream("POST", self.root + "/v1/completions", json=body, timeout=60) as response:
                for line in response.iter_lines():
                    self.lines.append(line)
                    self.begun.set()

        thread = threading.Thread(target=read)
        thread.start()
        assert self.begun.wait(20)
        return thread


@contextmanager
def running(pace_s: float, drain_s: float, die_after_s: float = 0, timeout_s: float = 30) -> Iterator[Running]:
    command = [sys.executable, "-m", "tests.fake_server", *map(str, (pace_s, drain_s, die_after_s, timeout_s))]
    popen = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert popen.stdout is not None
        yield Running(popen, f"http://127.0.0.1:{int(popen.stdout.readline())}")
    finally:
        popen.kill()
        popen.wait()


def test_drain_finishes_open_streams_takes_no_new_ones_and_exits_with_zero() -> None:
    with running(0.1, 30) as server:
        reader = server.stream()
        server.popen.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        with pytest.raises(httpx.ConnectError):
            httpx.get(server.root + "/health")
        reader.join(30)
        assert "data: [DONE]" in server.lines
        assert not any('"error"' in line for line in server.lines)
        assert server.popen.wait(20) == 0


def test_a_stream_that_outlives_the_drain_is_cut_with_an_event() -> None:
    with running(1.0, 1) as server:
        reader = server.stream()
        begun = time.monotonic()
        server.popen.send_signal(signal.SIGTERM)
        server.popen.wait(15)
        reader.join(5)
        assert time.monotonic() - begun < 10
        assert any('"engine_dead_error"' in line for line in server.lines)


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(sig: int) -> None:
    with running(2.0, 60) as server:
        server.stream()
        begun = time.monotonic()
        server.popen.send_signal(sig)
        time.sleep(0.5)
        assert server.popen.poll() is None
        server.popen.send_signal(sig)
        server.popen.wait(15)
        assert time.monotonic() - begun < 10


def test_a_dead_engine_is_told_by_health_and_the_server_exits_non_zero() -> None:
    with running(0.1, 5, die_after_s=1) as server:
        server.stream().join(10)
        assert any('"engine_dead_error"' in line for line in server.lines)
        assert httpx.get(server.root + "/health").status_code == 503
        assert server.popen.wait(20) == 1


def send(server: Running, *parts: bytes, wait_s: float = 5) -> bytes:
    """Raw bytes to the server; what it answers before it closes or falls silent."""
    port = int(server.root.rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port), timeout=wait_s) as connection:
        got = b""
        try:
            for part in parts:
                connection.sendall(part)
            while chunk := connection.recv(65536):
                got += chunk
        except (TimeoutError, ConnectionError):
            pass
    return got


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def chunked(n: int, size: int) -> Iterator[bytes]:
    return (b"%x\r\n%b\r\n" % (size, b"x" * size) for _ in range(n))


@pytest.mark.parametrize(
    ("what", "parts", "statuses"),
    [
        (
            "header of a megabyte",
            lambda: [b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 2**20],
            (400, 431),
        ),
        ("ten thousand headers", lambda: [b"GET /health HTTP/1.1\r\n" + b"A: b\r\n" * 20_000 + b"\r\n"], (400, 431)),
        ("no host", lambda: [b"GET /health HTTP/1.1\r\n\r\n"], (400,)),
        ("two hosts", lambda: [b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: b\r\n\r\n"], (400,)),
        ("not HTTP", lambda: [b"\x16\x03\x01" * 100 + b"\r\n\r\n"], (400,)),
        ("two lengths", lambda: [HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}"], (400,)),
        ("a length of many digits", lambda: [HEAD + b"Content-Length: " + b"9" * 40 + b"\r\n\r\n"], (400,)),
        ("a negative length", lambda: [HEAD + b"Content-Length: -1\r\n\r\n"], (400,)),
        ("20 MB announced", lambda: [HEAD + b"Content-Length: 20000000\r\n\r\n"], (413,)),
        (
            "20 MB in chunks",
            lambda: [HEAD + b"Transfer-Encoding: chunked\r\n\r\n", *chunked(20_000, 1000)],
            (413,),
        ),
        (
            "many tiny chunks",
            lambda: [HEAD + b"Transfer-Encoding: chunked\r\n\r\n", *chunked(20_000, 1), b"0\r\n\r\n"],
            (400,),
        ),
    ],
)
def test_hostile_bytes(server: Running, what: str, parts: Callable[[], list[bytes]], statuses: tuple[int, ...]) -> None:
    answer = send(server, *parts())
    status = int(answer.split(b" ", 2)[1]) if answer else None
    assert status in statuses or (status is None and statuses[0] == 413), (what, answer[:200])  # or a plain close
    assert httpx.get(server.root + "/health").status_code == 200


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(0.01, 1) as server:
        yield server


# -- connections of which nothing comes -------------------------------------------------------------------------------
def open_sockets(server: Running) -> int:
    n = 0
    for fd in os.listdir(f"/proc/{server.popen.pid}/fd"):
        with suppress(FileNotFoundError):  # closed meanwhile
            n += os.readlink(f"/proc/{server.popen.pid}/fd/{fd}").startswith("socket:")
    return n


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not (seen := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return seen


@pytest.fixture(scope="module")
def impatient() -> Iterator[Running]:
    with running(0.05, 1, timeout_s=0.4) as server:
        server.idle = open_sockets(server)
        yield server


def settled(server: Running) -> int:
    """Its sockets once nobody is connected: those of the test before may still be closing."""
    assert wait_for(lambda: open_sockets(server) <= server.idle, 20)
    return server.idle


def cut(connection: socket.socket) -> bytes:
    """What the server sent until it closed the connection; fails if it does not."""
    connection.settimeout(20)
    parts = []
    with suppress(ConnectionResetError):
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\nHost: local"])
def test_a_connection_without_a_whole_head_is_cut(impatient: Running, sent: bytes) -> None:
    before = settled(impatient)
    port = int(impatient.root.rsplit(":", 1)[1])
    connections = [socket.create_connection(("127.0.0.1", port)) for _ in range(5)]
    try:
        for connection in connections:
            with suppress(OSError):  # a slow machine: cut already
                connection.sendall(sent)
        for connection in connections:
            cut(connection)
        assert wait_for(lambda: open_sockets(impatient) <= before, 20)
    finally:
        for connection in connections:
            connection.close()


def test_a_half_head_after_an_answer_is_cut_too(impatient: Running) -> None:
    before = settled(impatient)
    port = int(impatient.root.rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: local")
        cut(connection)
    assert wait_for(lambda: open_sockets(impatient) <= before, 20)


def test_a_long_answer_is_no_idle_connection(impatient: Running) -> None:
    begun = time.monotonic()
    impatient.lines.clear()
    impatient.begun.clear()
    impatient.stream().join(20)  # 20 tokens, 50 ms apart: longer than two looks
    assert time.monotonic() - begun > 0.9
    assert "data: [DONE]" in impatient.lines


def test_a_reader_that_takes_nothing_is_cut(impatient: Running) -> None:
    before = settled(impatient)
    port = int(impatient.root.rsplit(":", 1)[1])
    body = json.dumps({"prompt": ["x"] * 8, "n": 128, "stream": True, "logprobs": 20, "max_tokens": 20}).encode()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", port))
        connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        connection.settimeout(20)
        assert connection.recv(1, socket.MSG_PEEK), "the answer has begun"
        assert wait_for(lambda: open_sockets(impatient) <= before, 60)
        assert b"[DONE]" not in cut(connection)
    assert httpx.get(impatient.root + "/health").status_code == 200


def test_a_taken_port_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InvalidRequest, match=f"port {port}.*--port"):
            bind("127.0.0.1", port)
    with pytest.raises(InvalidRequest, match="no-such-host"):
        bind("no-such-host.invalid", 0)
