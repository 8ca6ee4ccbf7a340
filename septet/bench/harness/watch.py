"""What an engine takes while it is measured: memory of its processes, the GPU's memory and power. A thread that looks.

Used by `measure.py`. Where a machine does not tell (no nvidia-smi, no power, a server that is not ours, GPUs shared
with another engine that is up): None.
"""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from septet.bench.harness.launch import Running

__all__ = ["Watch", "gpu_now"]

EVERY_S = 0.5


class Watch:
    """As a context: `memory_mib` is the peak, `energy_j` what the GPUs took meanwhile."""

    def __init__(self, server: Running, gpu_before_mib: float | None = None, *, gpus: bool = True) -> None:
        self.server, self.gpu_before = server, gpu_before_mib
        self.memory_mib: float | None = None
        self.gpu_mib: float | None = None
        self.energy_j: float | None = None
        self._done = threading.Event()
        self._has_gpu = gpus and server.process is not None and shutil.which("nvidia-smi") is not None
        self._before: tuple[float, float] | None = None
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join(10)
        if self._has_gpu and not self._thread.is_alive():
            self._note_gpu()  # the time since the last look counts, too

    def _look(self) -> None:
        while True:
            if self._has_gpu:
                self._note_gpu()
            self._note_memory()
            if self._done.wait(EVERY_S):
                return

    def _note_memory(self) -> None:
        total = sum(_proportional(p) for p in self.server.tree())
        if total:
            self.memory_mib = max(self.memory_mib or 0.0, total / 2**20)

    def _note_gpu(self) -> None:
        memory, power = gpu_now()
        now = time.perf_counter()
        if memory is not None and self.gpu_before is not None:
            self.gpu_mib = max(self.gpu_mib or 0.0, memory - self.gpu_before)
        if power is not None and self._before is not None:
            then, watts = self._before
            self.energy_j = (self.energy_j or 0.0) + (power + watts) / 2 * (now - then)
        self._before = None if power is None else (now, power)


def _proportional(process: psutil.Process) -> int:
    """Bytes, those shared with others counted once among them (Linux); elsewhere the resident set."""
    try:
        return int(getattr(process.memory_full_info(), "pss", 0) or process.memory_info().rss)
    except (psutil.Error, OSError):
        return 0


def gpu_now() -> tuple[float | None, float | None]:
    """(MiB in use, watts), of all NVIDIA GPUs of this machine."""
    query = ["nvidia-smi", "--query-gpu=memory.used,power.draw", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, check=True, timeout=10).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return None, None
    columns = list(zip(*(line.split(",") for line in lines if line.strip()), strict=False))
    return (_sum(columns[0]), _sum(columns[1])) if len(columns) == 2 else (None, None)


def _sum(cells: tuple[str, ...]) -> float | None:
    try:
        return sum(float(cell) for cell in cells)
    except ValueError:  # "[N/A]"
        return None
