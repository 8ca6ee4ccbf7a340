"""What every benchmark needs of its host: CPU times, other programs' share, jobs that end whole, a results file's head.

Called by the commands of this room. A job has a session of its own and is stopped with all that it started; a shell
waits beside it and ends it should this process die without a word. Standard library only, no torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from septet.bench.cpu_host import commit, libraries, machine
from septet.bench.gpu_limits import gpu

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = [
    "Neighbours",
    "cpu_seconds",
    "dismiss",
    "guard",
    "head",
    "run_job",
    "served",
    "stop",
    "tell",
    "write_results",
]

GUARD = 'read word && exit 0; kill -s TERM -- "-$1"; sleep 10; kill -s KILL -- "-$1"'
BUSY = (0, 1, 2, 5, 6)  # columns of /proc/stat: user, nice, system, hard and soft interrupts


# -- results ----------------------------------------------------------------------------------------------------------
def head(benchmark: str, command: str = "") -> dict[str, Any]:
    """What stands before the figures of a results file. `benchmark`: the module's name in this room."""
    return {
        "benchmark": benchmark,
        "command": command or shlex.join(["python", "-m", f"septet.bench.{benchmark}", *sys.argv[1:]]),
        "commit": os.environ.get("SEPTET_COMMIT") or commit(),  # given where the tree is a copy without its history
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {**machine(), **gpu()},
        "libraries": libraries(),
    }


def write_results(path: Path, about: dict[str, Any], **found: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**about, **found}, indent=1) + "\n")


# -- CPU time ---------------------------------------------------------------------------------------------------------
def cpu_seconds(pid: int) -> float:
    """User and system time of a process and its threads so far (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Neighbours:
    """The share of the machine's CPUs that other programs took: all programs' time without this process's, that of its
    children that have ended, and that of `pids`, which run all along. 0 where the machine doesn't tell (not Linux)."""

    def __init__(self, *pids: int) -> None:
        self.pids = pids
        self.began, self.at = time.perf_counter(), self._others()

    def share(self) -> float:
        """Since this was made."""
        wall = (time.perf_counter() - self.began) * (os.cpu_count() or 1)
        return max(0.0, self._others() - self.at) / wall

    def _others(self) -> float:
        return _all_s() - _ours_s() - sum(cpu_seconds(pid) for pid in self.pids)


def _all_s() -> float:
    try:
        columns = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
        return sum(int(columns[i]) for i in BUSY) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return 0.0


def _ours_s() -> float:
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime


# -- jobs and servers -------------------------------------------------------------------------------------------------
def guard(pid: int) -> subprocess.Popen[bytes] | None:
    """A shell that ends the group of `pid` when this process is gone; one line on its input sends it home."""
    command = ["/bin/sh", "-c", GUARD, "septet-bench-guard", str(pid)]
    quiet = subprocess.DEVNULL
    with contextlib.suppress(OSError):  # no shell: no guard
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, start_new_session=True)
    return None


def tell(pid: int, number: int) -> bool:
    """A signal to a group; whether anybody was there."""
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        return False
    except PermissionError:  # only what has ended and not been waited for, on some systems
        pass
    return True


def stop(process: subprocess.Popen[Any], grace_s: float = 15.0) -> None:
    """Asks the leader, whose part it is to end the others; after its end, or in `grace_s`, ends what is left of the
    group."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace_s)
    tell(process.pid, signal.SIGKILL)
    process.wait()


def run_job(command: Sequence[str], timeout_s: float, **more: Any) -> subprocess.CompletedProcess[Any]:
    """`subprocess.run` whose process has a session of its own and is stopped whole: at its end, on time, and on
    whatever breaks the waiting off."""
    text = more.pop("input", None)
    if text is not None:
        more["stdin"] = subprocess.PIPE
    process = subprocess.Popen(command, start_new_session=True, **{"stdin": subprocess.DEVNULL, **more})
    beside = guard(process.pid)
    try:
        out, err = process.communicate(text, timeout=timeout_s)
    finally:
        stop(process)
        dismiss(beside)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def dismiss(beside: subprocess.Popen[bytes] | None) -> None:
    """The guarded have ended: so may the guard."""
    if beside is not None:
        beside.communicate(b"done\n")


@contextlib.contextmanager
def served(model: str, flags: Sequence[str], grace_s: float = 60.0) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`septet serve MODEL` on a free loopback port -> (its address, its process). What it says while it serves is said
    here too, but for a line each request; so its pipe never fills. Its own exit code is left to the caller."""
    command = [sys.executable, "-m", "septet.cli.main", "serve", model, "--port", "0", *flags]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True
    )
    beside = guard(process.pid)
    try:
        yield _address(process), process
    finally:
        stop(process, grace_s)
        dismiss(beside)


def _address(process: subprocess.Popen[str]) -> str:
    said: list[str] = []
    assert process.stderr is not None
    for line in process.stderr:
        said.append(line)
        if found := re.search(r"at (http://\S+)/v1", line):
            later = (line for line in process.stderr if " access id=" not in line)
            threading.Thread(target=sys.stderr.writelines, args=(later,), daemon=True).start()
            return found[1]
    raise RuntimeError(f"the server ended: {''.join(said)[-800:]}")
