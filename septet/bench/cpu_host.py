"""What stands beside every figure: the machine, the libraries, the commit.

Called by the CPU benchmarks for their JSON and by `septet doctor`. Standard library only, no torch; reads /proc and
package metadata, changes nothing.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import subprocess
from pathlib import Path

from septet.machine import available_memory, cpu_quota, usable_cpus

__all__ = ["commit", "libraries", "machine"]

LIBRARIES = ("torch", "triton", "numpy", "tokenizers", "safetensors", "llguidance", "msgspec", "starlette", "uvicorn")
FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "asimd", "asimddp", "sve")
CPUINFO = Path("/proc/cpuinfo")


def machine(cpuinfo: Path = CPUINFO) -> dict[str, object]:
    """CPUs by name, count, affinity and quota; the features that kernels care for; free memory in bytes."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except (OSError, UnicodeError):
        lines = []
    names = {line.partition(":")[2].strip() for line in lines if line.startswith("model name")}
    flags = {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.split()}
    quota = cpu_quota()
    return {
        "cpu": sorted(names) or [platform.processor() or platform.machine()],
        "architecture": platform.machine(),
        "cores": os.cpu_count() or 1,
        "allowed_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "cgroup_quota": quota if quota is not None and math.isfinite(quota) else None,
        "threads": usable_cpus(),
        "features": [flag for flag in FEATURES if flag in flags],
        "free_memory": available_memory(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def libraries() -> dict[str, str | None]:
    """Versions of what Septet stands on; None: not installed. Imports none of them."""
    found: dict[str, str | None] = {}
    for name in ("septet", *LIBRARIES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def commit() -> str:
    """Of the checkout this file lies in; "unknown" outside of one."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"
