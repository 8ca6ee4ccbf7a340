"""`python -m septet.engine.workshop`: compile kernels in processes of their own. The other side of `compilers.py`.

Imports torch, Triton and the kernels while the engine does, without a GPU's context: the target is told. Then it forks
a child for each job, so that each has an interpreter to itself and what breaks in one is one job's. Lines of JSON:

    in    {"target": 90} | {"job", "module", "name", "data", "launcher"?} | {"end"}     its end is ours
    out   {"job", "what", "seconds", "error"}                                           of each job, in any order

`data` is Triton's specialization data. A launcher is the C code that hands a kernel's arguments to the driver, which
Triton has a C compiler build at the first launch of each list of types.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import json
import os
import select
import signal
import sys
import time
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from septet.engine.compilers import JOB_S, kernel_directory

__all__ = ["NoCard", "main"]

LIBRARIES = (
    "triton.backends.nvidia.driver",
    "triton.compiler.code_generator",
    "torch",
    "septet.kernels.triton",
    "septet.kernels.triton.attention",
    "septet.kernels.triton.sample",
)
DRIVER = -1  # the job that builds Triton's own door to the driver; nobody asks for it, the engine would build it first
MAX_ERROR = 300


class NoCard:
    """What Triton asks a driver for when it compiles, and no more."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self._target


@dataclass(slots=True)
class Child:
    pid: int
    job: dict[str, Any]
    began: float


class Workshop:
    """Jobs in, children out. `turn` takes in what has come, and starts what may start."""

    def __init__(self, limit: int, answers: int) -> None:
        self._limit = limit
        self._answers = answers
        self._target: int | None = None
        self._open = True
        self._ready = False  # the libraries are loaded
        self._text = b""
        self._waiting: list[dict[str, Any]] = []
        self._children: dict[int, Child] = {}  # by the pipe on which it says what went wrong

    @property
    def busy(self) -> bool:
        return self._open or bool(self._waiting) or bool(self._children)

    def load(self) -> None:
        """The libraries, one by one: what does not need all of them begins before."""
        for name in LIBRARIES:
            importlib.import_module(name)
            self.turn(0)
        while self._target is None and self._open:
            self.turn(None)
        if self._target is None:
            self._leave()
        else:
            _prepare(self._target)
        gc.freeze()
        self._ready = True
        self.turn(0)

    def turn(self, wait_s: float | None) -> None:
        ready, _, _ = select.select([0, *self._children], [], [], wait_s)
        for fd in ready:
            if fd == 0:
                self._read()
            else:
                self._reap(fd)
        while self._ready and self._waiting and len(self._children) < self._limit:
            job = max(self._waiting, key=_weight)
            self._waiting.remove(job)
            self._fork(job)

    def _read(self) -> None:
        got = os.read(0, 1 << 16)
        if not got:
            self._leave()
        *lines, self._text = (self._text + got).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if "target" in message:
                self._target = message["target"]
                kernel_directory(f"sm{self._target}")
                self._fork({"job": DRIVER})
            elif "end" in message:
                self._open = False
            else:
                self._waiting.append(message)

    def _leave(self) -> None:
        """The engine has gone, or wants no more."""
        for child in self._children.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGKILL)
        os._exit(0)

    def _fork(self, job: dict[str, Any]) -> None:
        ours, theirs = os.pipe()
        pid = os.fork()
        if pid == 0:
            signal.alarm(JOB_S)  # the default action ends this process, wherever it is
            code = 1
            try:
                os.close(ours)
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                _work(job)
                code = 0
            except BaseException as error:
                os.write(theirs, f"{type(error).__name__}: {error}".encode(errors="replace")[:MAX_ERROR])
            finally:
                os._exit(code)
        os.close(theirs)
        self._children[ours] = Child(pid, job, time.monotonic())

    def _reap(self, fd: int) -> None:
        """A child has said something or is gone; what it says is short, and the last it does."""
        child = self._children.pop(fd)
        error = os.read(fd, MAX_ERROR).decode(errors="replace")
        os.close(fd)
        _, status = os.waitpid(child.pid, 0)
        if os.WIFSIGNALED(status):
            error = f"it was ended by {signal.Signals(os.WTERMSIG(status)).name}"
        if child.job["job"] == DRIVER:
            return
        what = f"launcher of {child.job['name']}" if "launcher" in child.job else child.job["name"]
        seconds = round(time.monotonic() - child.began, 3)
        answer = {"job": child.job["job"], "what": what, "seconds": seconds, "error": error or None}
        os.write(self._answers, json.dumps(answer).encode() + b"\n")


def _weight(job: dict[str, Any]) -> int:
    """What takes long should begin early. Kernels of many arguments are the long ones."""
    return 0 if "launcher" in job else len(job["data"])


def _prepare(target: int) -> None:
    """What every child would otherwise find out for itself."""
    from triton.compiler.compiler import make_backend
    from triton.runtime import JITFunction, driver
    from triton.runtime.cache import triton_key

    card = NoCard(target)
    driver.set_active(card)
    triton_key()
    backend = make_backend(card.get_current_target())
    backend.hash()
    backend.parse_options({}).hash()
    for name, module in list(sys.modules.items()):
        if name.startswith("septet.kernels.triton"):
            for value in vars(module).values():
                if isinstance(value, JITFunction):
                    value.cache_key  # noqa: B018 (kept by the function)


def _work(job: dict[str, Any]) -> None:
    """One job, in its own process; its results are files in Triton's store."""
    if job["job"] == DRIVER:
        from triton.backends.nvidia.driver import CudaUtils

        CudaUtils()
        return
    from triton.runtime import JITFunction

    kernel = getattr(importlib.import_module(job["module"]), job["name"])
    if not isinstance(kernel, JITFunction):
        raise TypeError(f"{job['name']} is not a kernel")
    if "launcher" in job:
        _build_launcher(kernel, json.loads(job["data"]))
    else:
        kernel.preload(job["data"])


def _build_launcher(kernel: Any, data: dict[str, Any]) -> None:
    """Triton's, for the types of this kernel's arguments; of a kernel without scratch memory, which does not matter to
    the code. It can't be loaded where there is no driver, but it is kept before that is tried."""
    from triton.backends.nvidia.driver import CudaLauncher
    from triton.compiler import ASTSource

    constants = dict(zip(map(tuple, data["constant_keys"]), data["constant_vals"], strict=True))
    metadata = SimpleNamespace(
        tensordesc_meta=None, global_scratch_size=0, global_scratch_align=1, profile_scratch_size=0,
        profile_scratch_align=1, launch_cooperative_grid=False, launch_pdl=False, num_ctas=1,
    )  # fmt: skip
    with contextlib.suppress(ImportError):
        CudaLauncher(ASTSource(kernel, data["signature"], constants), metadata)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m septet.engine.workshop", description=__doc__)
    parser.add_argument("--limit", type=int, required=True, help="children at a time")
    parser.add_argument("--nice", type=int, default=0)
    given = parser.parse_args()
    gc.disable()
    answers = os.dup(1)
    os.dup2(2, 1)  # whatever is printed goes to the log
    os.nice(given.nice)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    workshop = Workshop(given.limit, answers)
    workshop.load()
    while workshop.busy:
        workshop.turn(None)


if __name__ == "__main__":
    main()
    os._exit(0)  # the libraries are not taken down: nobody needs that
