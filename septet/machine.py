"""What this machine lets us use: CPUs by affinity and cgroup quota.

Owned by the base room; read by the engine's start-up (thread counts) and by `build` (figures for the user). Reads /proc
and /sys only, standard library only. Values are read when asked, never cached: a container's quota can change.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["cpu_quota", "thread_env", "usable_cpus"]

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


def cpu_quota(proc: Path = Path("/proc"), sys_fs: Path = Path("/sys/fs/cgroup")) -> float | None:
    """CPUs that the control groups of this process grant, in cores; None = no limit (or no cgroups here).

    The tightest limit from this group up to the root counts. cgroup v2: `cpu.max` holds "quota period" or "max period";
    v1: `cpu.cfs_quota_us` (-1 = none) over `cpu.cfs_period_us` (Linux, admin-guide/cgroup-v2 and sched-bwc).
    """
    limits = []
    for group in _groups(proc, sys_fs):
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


def thread_env(environ: dict[str, str], cpus: int) -> dict[str, str]:
    """Thread settings to add to `environ` before numeric libraries load; what the user set stays."""
    return {name: str(cpus) for name in THREAD_VARIABLES if name not in environ}


def _groups(proc: Path, sys_fs: Path) -> Iterator[Path]:
    """Directories of the CPU controller for this process, innermost first, for v2 and v1 hierarchies."""
    for line in _read(proc / "self" / "cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            top = sys_fs  # v2
        elif "cpu" in controllers.split(","):
            top = next((d for d in (sys_fs / "cpu", sys_fs / "cpu,cpuacct") if d.is_dir()), sys_fs)
        else:
            continue
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for n in range(len(parts), -1, -1):  # inside a container the inner directories may not exist: the root counts
            yield top.joinpath(*parts[:n])


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
