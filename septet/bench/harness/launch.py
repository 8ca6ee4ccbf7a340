"""Engines as processes: started on loopback in a session of their own, awaited, and stopped with all that they started.

Used by `measure.py`. A port that is taken, an engine that ends or never serves: SeptetError with one line. A shell
waits beside each engine and ends its group should this process die without a word.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any

import psutil

from septet.bench.harness.interrupt import hurried, shielded
from septet.bench.host import dismiss, guard, tell
from septet.errors import SeptetError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from septet.bench.harness.targets import Target

__all__ = ["Running", "running"]

LOOPBACK, GRACE_S, MOST = "127.0.0.1", 30.0, 1 << 20
VERSIONS = ("/version", "/api/version", "/props", "/info")  # where engines tell theirs


@dataclass
class Running:
    """A server that is up. `process` is None where it was before us."""

    target: Target
    url: str  # with /v1
    start_s: float = 0.0
    process: subprocess.Popen[bytes] | None = None
    guard: subprocess.Popen[bytes] | None = None
    log: IO[bytes] | None = None
    model: str = ""  # its name in requests
    version: str = ""  # as it says itself
    warmed: set[tuple[str, str]] = field(default_factory=set)  # workloads and points
    seen: dict[int, psutil.Process] = field(default_factory=dict)  # of the tree, by pid

    def tree(self) -> list[psutil.Process]:
        """The processes alive now. Those seen once are remembered: a worker that outlives its parent is found."""
        if self.process is not None:
            with contextlib.suppress(psutil.Error):
                root = psutil.Process(self.process.pid)
                self.seen.update((p.pid, p) for p in (root, *root.children(recursive=True)))
        return _left(self)

    def death(self, wait_s: float = 0.0) -> str:
        """How it ended; '' while it runs or where it is not ours. A process's sockets close a little before it ends."""
        if self.process is None:
            return ""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(wait_s)
        if (code := self.process.returncode) is None:
            return ""
        how = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
        return f"{self.target.title} ended {how}{self._last_words()}"

    def _last_words(self) -> str:
        if self.log is None:
            return ""
        self.log.seek(max(0, self.log.seek(0, os.SEEK_END) - 4000))
        lines = [line for line in self.log.read().decode(errors="replace").splitlines() if line.strip()]
        return f": {lines[-1].strip()[:300]}" if lines else ""


@contextlib.contextmanager
def running(target: Target, port: int = 0, wait_s: float = 900) -> Iterator[Running]:
    """Up and ready; stopped at the end whatever happened. `port` 0: a free one."""
    if not target.command:
        yield _named(Running(target, f"{target.url}/v1"))
        return
    server: Running | None = None
    with tempfile.TemporaryFile() as log:
        try:
            with shielded():
                server = _start(target, _port(port), log)
            began = time.perf_counter()
            _await(server, server.url.removesuffix("/v1") + target.ready, wait_s)
            server.start_s = time.perf_counter() - began
            yield _named(server)
        finally:
            if server is not None:
                stop(server)


def _start(target: Target, port: int, log: IO[bytes]) -> Running:
    command = [word.replace("{port}", str(port)) for word in target.command]
    more = {name: value.replace("{port}", str(port)) for name, value in target.environment.items()}
    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                   env={**os.environ, **more}, start_new_session=True)  # fmt: skip
    except OSError as error:
        raise SeptetError(f"{target.title} can't be started: {error}") from None
    server = Running(target, f"http://{LOOPBACK}:{port}/v1", process=process, log=log)
    server.guard = guard(process.pid)
    return server


def _named(server: Running) -> Running:
    server.model = _model_name(server) if server.target.served_name else server.target.model
    server.version = _version(server)
    return server


def _port(wanted: int) -> int:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((LOOPBACK, wanted))
        except OSError as error:
            raise SeptetError(
                f"port {wanted} of {LOOPBACK} is taken ({error.strerror}); free it, or give --port 0 for any"
            ) from None
        return int(sock.getsockname()[1])


def _get(server: Running, url: str, wait_s: float) -> bytes:
    """OSError where that is no answer of 200."""
    key = server.target.api_key
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"} if key else {})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with contextlib.closing(opener.open(request, timeout=wait_s)) as answer:
        return answer.read(MOST)  # type: ignore[no-any-return]


def _await(server: Running, url: str, wait_s: float) -> None:
    deadline, pause = time.monotonic() + wait_s, 0.05
    while True:
        if death := server.death():
            raise SeptetError(f"{death} (before it served)")
        with contextlib.suppress(OSError, http.client.HTTPException):
            _get(server, url, 5.0)
            return
        if time.monotonic() > deadline:
            raise SeptetError(f"{server.target.title} did not serve within {wait_s:g} s{server._last_words()}")
        server.tree()
        time.sleep(pause)
        pause = min(1.0, pause * 1.3)


def _model_name(server: Running) -> str:
    try:
        listed: Any = json.loads(_get(server, f"{server.url}/models", 20.0))["data"]
        return str(listed[0]["id"])
    except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
        why = getattr(error, "reason", "") or error
        raise SeptetError(f"{server.target.title}: /v1/models names no model: {why}") from None


def _version(server: Running) -> str:
    """'' where it tells none."""
    for path in VERSIONS:
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
            told = json.loads(_get(server, server.url.removesuffix("/v1") + path, 5.0))
            if isinstance(told, dict) and (found := told.get("version") or told.get("build_info")):
                return str(found)[:100]
    return ""


def stop(server: Running) -> None:
    """Asks the whole group, waits, then ends what is left of the tree, workers in sessions of their own included. Not
    broken off by a signal; one more makes it quick."""
    process = server.process
    assert process is not None
    with shielded():
        server.tree()
        for number, grace_s in ((signal.SIGTERM, GRACE_S), (signal.SIGTERM, 5.0), (signal.SIGKILL, 10.0)):
            _tell(server, number, all_of_them=grace_s < GRACE_S)
            deadline = time.monotonic() + grace_s
            while time.monotonic() < deadline and not (hurried() and number != signal.SIGKILL):
                if process.poll() is not None and (not _left(server) or grace_s == GRACE_S):
                    break
                time.sleep(0.05)
            if process.poll() is not None and not hurried():
                psutil.wait_procs(_left(server), timeout=1)
        _tell(server, signal.SIGKILL, all_of_them=True)
        dismiss(server.guard)


def _tell(server: Running, number: int, *, all_of_them: bool) -> None:
    assert server.process is not None
    tell(server.process.pid, number)
    for p in _left(server) if all_of_them else []:
        with contextlib.suppress(psutil.Error):
            p.send_signal(number)


def _left(server: Running) -> list[psutil.Process]:
    found = []
    for p in server.seen.values():
        with contextlib.suppress(psutil.Error):
            if p.is_running() and p.status() != psutil.STATUS_ZOMBIE:
                found.append(p)
    return found
