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
from typing import TYPE_CHECKING

from septet.geometry import DTYPE_BYTES, flops_per_token
from septet.hub.gguf import GGUFFile
from septet.machine import available_memory, cpu_quota, usable_cpus

if TYPE_CHECKING:
    from septet.config import ModelConfig

__all__ = ["bytes_per_token", "commit", "libraries", "machine"]

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


def bytes_per_token(path: Path, config: ModelConfig) -> tuple[int, list[str]]:
    """(bytes of weights that one token reads, their types, those with the most bytes first).

    Of an embedding that is not the head as well, a token reads one row.
    """
    if path.is_dir():
        return flops_per_token(config) // 2 * DTYPE_BYTES[config.dtype], [config.dtype]
    with GGUFFile.open(path) as file:
        tied = "output.weight" not in file.tensors
        read = [info for info in file.tensors.values() if tied or info.name != "token_embd.weight"]
    by_kind: dict[str, int] = {}
    for info in read:
        by_kind[info.kind] = by_kind.get(info.kind, 0) + info.n_bytes
    return sum(by_kind.values()), sorted(by_kind, key=lambda kind: -by_kind[kind])
