"""Engines as processes: started on loopback in a session of their own, awaited, and stopped with all that they started.

Used by `measure.py`. A port that is taken, an engine that ends or never serves: SeptetError with one line.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any

import httpx
import psutil

from septet.errors import SeptetError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from septet.bench.harness.targets import Target

__all__ = ["Running", "running"]

LOOPBACK, GRACE_S = "127.0.0.1", 30.0


@dataclass
class Running:
    """A server that is up. `process` is None where it was before us."""

    target: Target
    url: str  # with /v1
    start_s: float = 0.0
    process: subprocess.Popen[bytes] | None = None
    log: IO[bytes] | None = None
    model: str = ""  # its name in requests
    seen: dict[int, psutil.Process] = field(default_factory=dict)  # of the tree, by pid

    def tree(self) -> list[psutil.Process]:
        """The processes alive now. Those seen once are remembered: a worker that outlives its parent is found."""
        if self.process is not None:
            with contextlib.suppress(psutil.Error):
                root = psutil.Process(self.process.pid)
                self.seen.update((p.pid, p) for p in (root, *root.children(recursive=True)))
        return [p for p in self.seen.values() if p.is_running()]

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
        yield _found(target)
        return
    port = _port(port)
    with tempfile.TemporaryFile() as log:
        command = [word.replace("{port}", str(port)) for word in target.command]
        more = {name: value.replace("{port}", str(port)) for name, value in target.environment.items()}
        try:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                       env={**os.environ, **more}, start_new_session=True)  # fmt: skip
        except OSError as error:
            raise SeptetError(f"{target.title} can't be started: {error}") from None
        server = Running(target, f"http://{LOOPBACK}:{port}/v1", process=process, log=log)
        try:
            began = time.perf_counter()
            _await(server, f"http://{LOOPBACK}:{port}{target.ready}", wait_s)
            server.start_s = time.perf_counter() - began
            server.model = _model_name(server) if target.served_name else target.model
            yield server
        finally:
            stop(server)


def _found(target: Target) -> Running:
    server = Running(target, f"{target.url}/v1")
    server.model = _model_name(server) if target.served_name else target.model
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


def _await(server: Running, url: str, wait_s: float) -> None:
    deadline, pause = time.monotonic() + wait_s, 0.05
    with httpx.Client(trust_env=False, timeout=5.0) as http:
        while True:
            if death := server.death():
                raise SeptetError(f"{death} (before it served)")
            with contextlib.suppress(httpx.HTTPError):
                if http.get(url).status_code == 200:
                    return
            if time.monotonic() > deadline:
                raise SeptetError(f"{server.target.title} did not serve within {wait_s:g} s{server._last_words()}")
            server.tree()
            time.sleep(pause)
            pause = min(1.0, pause * 1.3)


def _model_name(server: Running) -> str:
    target = server.target
    headers = {"Authorization": f"Bearer {target.api_key}"} if target.api_key else {}
    try:
        answer = httpx.get(f"{server.url}/models", trust_env=False, timeout=20.0, headers=headers)
        answer.raise_for_status()
        listed: Any = answer.json()["data"]
        return str(listed[0]["id"])
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        raise SeptetError(f"{target.title}: {server.url}/models names no model: {error}") from None


def stop(server: Running) -> None:
    """Asks the whole group, waits, then ends what is left of the tree, workers in sessions of their own included."""
    process = server.process
    assert process is not None
    server.tree()
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_S)
    _, left = psutil.wait_procs([p for p in server.seen.values() if p.is_running()], timeout=1)
    for p in left:
        with contextlib.suppress(psutil.Error):
            p.terminate()
    _, left = psutil.wait_procs(left, timeout=5)
    for p in left:
        with contextlib.suppress(psutil.Error):
            p.kill()
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    psutil.wait_procs(left, timeout=5)
