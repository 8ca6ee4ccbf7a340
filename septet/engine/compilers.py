"""Processes that compile kernels for the engine, since threads that compile wait for each other: the engine's side.

Started by `process.py` before the libraries are imported, where kernels will probably have to be compiled, else by
`rehearsal.py`, which tells them the kernels one by one. What they make goes to Triton's store of compiled kernels, and
is read from there. Standard library only: `workshop.py` is the other side, which describes the lines both speak. If
they fail or take too long, kernels are compiled where they are needed.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from septet.machine import usable_cpus

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["JOB_S", "Compilers", "announce", "begin_early", "discard", "kernel_directory", "take"]

JOB_S = 60  # seconds that one kernel may take; then it is left to its first launch
GRACE_S = 15.0  # beyond that for the processes to start and to answer
MAX_PROCESSES = 32
PIPE_BYTES = 1 << 20  # what an unprivileged process may have: kernels are told faster than they are compiled
CARDS = ("/dev/nvidiactl", "/dev/dxg")  # there is one where there is a GPU
FIRST = "first"  # part of a rehearsal, see there

log = logging.getLogger(__name__)


def kernel_directory(card: str) -> Path | None:
    """Where compiled kernels stay, by Triton's version and card: in our store, unless the user has said where. None:
    nowhere that can be written."""
    import triton

    directory = _given_directory() or _kernels() / f"triton-{triton.__version__}-{card}"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        log.info("compiled kernels stay where Triton keeps them: %s", error.strerror)
        return None
    os.environ["TRITON_CACHE_DIR"] = str(directory)
    return directory


def _given_directory() -> Path | None:
    given = os.environ.get("TRITON_CACHE_DIR")
    return Path(given) if given else None


def _kernels() -> Path:
    from septet.hub.store import home_directory

    return home_directory() / "kernels"


class Compilers:
    """One parent process, and a child of it for each kernel. `target` first, then `tell`, then `finish`; `close` in any
    case. Not for two threads at once, but for `close`."""

    def __init__(self, limit: int | None = None, nice: int = 0) -> None:
        """`limit`: kernels at a time. Raises OSError."""
        limit = min(max(usable_cpus() - 1, 1), MAX_PROCESSES) if limit is None else limit
        self._popen = subprocess.Popen(
            [sys.executable, "-P", "-m", "septet.engine.workshop", "--limit", str(limit), "--nice", str(nice)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},  # it forks, so it has one thread
            process_group=0,  # ended as a whole
        )
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        self._to, self._from = self._popen.stdin.fileno(), self._popen.stdout.fileno()
        with contextlib.suppress(OSError):
            fcntl.fcntl(self._to, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        self._target: int | None = None
        self._launchers: dict[tuple[str, ...], int] = {}
        self._jobs = 0
        self._broken = self._closed = False
        self.seconds: dict[int, float] = {}  # of each job that is over
        self.late = False  # `finish` has waited long enough

    def target(self, capability: int) -> None:
        """Which GPU (90 = compute capability 9.0). What any kernel of it needs is compiled at once."""
        if self._target is None:
            self._target = capability
            self._send({"target": capability})

    def tell(self, kernel: Any, data: str) -> int:
        """A Triton function and what to compile it for (its specialization data) -> the job's number. Functions with
        the same types of arguments share the code that launches them: a job of its own."""
        name = {"module": kernel.__module__, "name": kernel.__name__, "data": data}
        types = tuple("*" if str(t).startswith("*") else str(t) for t in json.loads(data)["signature"].values())
        if types not in self._launchers:
            self._launchers[types] = self._next({**name, "launcher": True})
        return self._next(name)

    def _next(self, job: dict[str, Any]) -> int:
        self._jobs += 1
        self._send({**job, "job": self._jobs})
        return self._jobs

    def _send(self, line: dict[str, Any]) -> None:
        left = json.dumps(line).encode() + b"\n"
        try:
            while left and not self._broken:
                left = left[os.write(self._to, left) :]
        except OSError as error:
            self._broken = True
            log.debug("the processes that compile are gone: %s", error.strerror)

    def finish(self) -> Iterator[int]:
        """No more jobs: -> the number of each that is over, as they end, until all are or the time is up."""
        self._send({"end": True})
        left, deadline = b"", time.monotonic() + JOB_S + GRACE_S
        while len(self.seconds) < self._jobs and not self._closed:
            wait = deadline - time.monotonic()
            if wait <= 0 or not select.select([self._from], [], [], wait)[0]:
                self.late = True
                return
            got = os.read(self._from, 1 << 16)
            if not got:
                return
            *lines, left = (left + got).split(b"\n")
            for line in lines:
                answer = json.loads(line)
                if answer["error"]:
                    log.debug("%s: %s", answer["what"], answer["error"])
                self.seconds[answer["job"]] = answer["seconds"]
                yield answer["job"]

    def close(self) -> None:
        """End it, whatever it does."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.wait()
        self._broken = self._closed = True
        for pipe in (self._popen.stdin, self._popen.stdout):
            if pipe is not None:
                pipe.close()


# -- started before it is sure that they are needed ------------------------------------------------------------------
class _Early:
    compilers: Compilers | None = None
    begun = False


def begin_early() -> None:
    """Once: start them if there is a GPU, and no rehearsal has ended in the store of kernels yet."""
    if _Early.begun:
        return
    _Early.begun = True
    if not any(map(os.path.exists, CARDS)) or _rehearsed():
        return
    with contextlib.suppress(OSError):
        _Early.compilers = Compilers()


def _rehearsed() -> bool:
    given = _given_directory()
    where = given.glob(f"rehearsed-*-{FIRST}") if given else _kernels().glob(f"triton-*/rehearsed-*-{FIRST}")
    return next(where, None) is not None


def announce(capability: int) -> None:
    """The GPU is known, though not ready."""
    if _Early.compilers is not None:
        _Early.compilers.target(capability)


def take() -> Compilers:
    """The early ones if there are any, else new ones. Raises OSError."""
    early, _Early.compilers = _Early.compilers, None
    return early if early is not None else Compilers()


def discard() -> None:
    """Nobody has taken the early ones, or will."""
    early, _Early.compilers = _Early.compilers, None
    if early is not None:
        early.close()
