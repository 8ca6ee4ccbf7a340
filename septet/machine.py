"""What this machine lets us use: CPUs by affinity and cgroup quota, memory by what is free and the cgroup's limit.

Owned by the base room; read by the engine's start-up (thread counts) and by `build` (pool sizes, figures for the user).
Reads /proc and /sys only, standard library only. Values are read when asked, never cached: a quota can change.
"""

from __future__ import annotations

import ctypes
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["available_memory", "cpu_quota", "give_back_memory", "thread_env", "usable_cpus"]

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")


def cpu_quota(proc: Path = PROC, sys_fs: Path = CGROUPS) -> float | None:
    """CPUs that the control groups of this process grant, in cores; None = no limit (or no cgroups here).

    The tightest limit from this group up to the root counts. cgroup v2: `cpu.max` holds "quota period" or "max period";
    v1: `cpu.cfs_quota_us` (-1 = none) over `cpu.cfs_period_us` (Linux, admin-guide/cgroup-v2 and sched-bwc).
    """
    limits = []
    for group in _groups("cpu", proc, sys_fs):
        quota = _read(group / "cpu.max").split()
        if not quota:
            quota = [*_read(group / "cpu.cfs_quota_us").split(), *_read(group / "cpu.cfs_period_us").split()]
        if len(quota) == 2 and quota[0].isdigit() and quota[1].isdigit() and int(quota[1]) > 0:
            limits.append(int(quota[0]) / int(quota[1]))
    return min((limit for limit in limits if limit > 0), default=None)


def usable_cpus() -> int:
    """Threads worth starting: CPUs this process may run on, less what the quota takes away; at least 1."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return max(1, min(cpus, math.ceil(quota))) if quota is not None else cpus


def thread_env(environ: Mapping[str, str], cpus: int) -> dict[str, str]:
    """Thread settings to add to `environ` before numeric libraries load; what the user set stays.

    OpenMP's threads sleep where they wait: spinning on a core that a busy neighbour needs slows every step many times
    over. (The native kernels have threads of their own.)
    """
    wanted = {**dict.fromkeys(THREAD_VARIABLES, str(cpus)), "OMP_WAIT_POLICY": "PASSIVE"}
    return {name: value for name, value in wanted.items() if name not in environ}


def available_memory(proc: Path = PROC, sys_fs: Path = CGROUPS) -> int:
    """Bytes this process can still allocate without swapping: MemAvailable, or less where a cgroup's limit is nearer.

    A group's room is its limit less its use, file pages that can be dropped (`inactive_file`) not counted as use.
    """
    room = [_field(_read(proc / "meminfo"), "MemAvailable:") * 1024]
    for group in _groups("memory", proc, sys_fs):
        for limit_file, use_file in (
            ("memory.max", "memory.current"),  # v2
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),  # v1
        ):
            limit, use = _read(group / limit_file).strip(), _read(group / use_file).strip()
            if limit.isdigit() and use.isdigit():
                stat = _read(group / "memory.stat")
                droppable = _field(stat, "total_inactive_file") or _field(stat, "inactive_file")
                room.append(max(0, int(limit) - int(use) + droppable))
    return min(room)


def give_back_memory() -> None:
    """Return freed memory to the system, where the C library can. Takes milliseconds: after large work, in a thread."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def _field(text: str, name: str) -> int:
    """The number after `name` at the start of a line; 0 if there is none."""
    for line in text.splitlines():
        words = line.split()
        if len(words) >= 2 and words[0] == name and words[1].isdigit():
            return int(words[1])
    return 0


def _groups(controller: str, proc: Path, sys_fs: Path) -> Iterator[Path]:
    """Directories of a controller for this process, innermost first, in v2 and v1 hierarchies."""
    for line in _read(proc / "self" / "cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            top = sys_fs  # v2
        elif controller in controllers.split(","):
            top = next((d for d in (sys_fs / controller, sys_fs / controllers) if d.is_dir()), sys_fs)
        else:
            continue
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for n in range(len(parts), -1, -1):  # inside a container the inner directories may not exist: the root counts
            yield top.joinpath(*parts[:n])


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeError):
        return ""
