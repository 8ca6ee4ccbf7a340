"""A real `septet serve` process for end-to-end tests: start, find its address, stop. Loopback and a free port only."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field


@dataclass
class Server:
    popen: subprocess.Popen[str]
    url: str = ""  # http://127.0.0.1:PORT/v1
    lines: list[str] = field(default_factory=list)
    reader: threading.Thread | None = None  # of the lines

    @property
    def root(self) -> str:
        return self.url.removesuffix("/v1")

    def stop(self, sig: int = signal.SIGTERM, wait_s: float = 120) -> int:
        """Its exit code; all it has said is in `lines` then."""
        if self.popen.poll() is None:
            self.popen.send_signal(sig)
        try:
            code = self.popen.wait(wait_s)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            raise
        if self.reader is not None:
            self.reader.join(wait_s)
        return code

    def children(self) -> list[int]:
        """Process ids of the engine (Linux)."""
        with open(f"/proc/{self.popen.pid}/task/{self.popen.pid}/children") as file:
            return [int(pid) for pid in file.read().split()]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "septet.cli.main", *arguments]


def start(model: str, *flags: str, wait_s: float = 240) -> Server:
    """Returns when the server says that it serves; raises with its output if it ends before."""
    popen = subprocess.Popen(
        command("serve", model, "--port", "0", *flags),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    server, ready = Server(popen), threading.Event()

    def read() -> None:
        assert popen.stderr is not None
        for line in popen.stderr:
            server.lines.append(line)
            if found := re.search(r"at (http://[^ ]+/v1) ", line):
                server.url = found[1]
                ready.set()
        ready.set()

    server.reader = threading.Thread(target=read, daemon=True)
    server.reader.start()
    deadline = time.monotonic() + wait_s
    while not ready.wait(0.2):
        if time.monotonic() > deadline:
            popen.kill()
            raise TimeoutError("the server was not ready: " + "".join(server.lines))
    if not server.url:
        raise RuntimeError(f"the server ended with {popen.wait()}: " + "".join(server.lines))
    return server
