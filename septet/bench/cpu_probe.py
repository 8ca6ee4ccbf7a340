"""What this machine can read from memory per second, with as many threads as the engine would use.

    python -m septet.bench.cpu_probe

Called by the CPU table beside every run (bandwidth of shared machines changes within minutes), by `septet doctor`, and
by hand. Without the native library numpy reads instead, in as many threads: a little less than the machine could.
"""

from __future__ import annotations

import statistics
import time
from concurrent.futures import ThreadPoolExecutor

from septet.errors import SeptetError
from septet.machine import available_memory, usable_cpus

__all__ = ["bandwidth_gb_s", "numpy_bandwidth_gb_s", "probe"]

N_BYTES, REPEATS = 512 << 20, 5
SHORT_BYTES = 128 << 20
ROOM = 8  # the probe takes at most this part of free memory, twice


def bandwidth_gb_s(n_bytes: int = N_BYTES, repeats: int = REPEATS) -> float:
    """Read bandwidth in GB/s (1e9), median of several passes over a buffer far larger than the caches."""
    from septet.kernels.native.library import Pool, load

    library = load()
    pool = Pool(library)
    try:
        rate: float = library.septet_probe_bandwidth(pool.handle, n_bytes, repeats)
    finally:
        pool.close()
    return rate / 1e9


def numpy_bandwidth_gb_s(n_bytes: int = N_BYTES, repeats: int = REPEATS) -> float:
    """The same without native code: each thread takes the largest word of its part."""
    import numpy as np

    threads = usable_cpus()
    parts = np.array_split(np.ones(n_bytes // 8, dtype=np.int64), threads)
    seconds = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(repeats):
            began = time.perf_counter()
            list(pool.map(np.max, parts))
            seconds.append(time.perf_counter() - began)
    return n_bytes / statistics.median(seconds) / 1e9


def probe() -> dict[str, object]:
    """A short probe, whatever is there: {"gb_s": float, "by": "native" | "numpy", "mib": size of the buffer}."""
    room = (available_memory() or SHORT_BYTES * ROOM) // ROOM
    n_bytes = min(SHORT_BYTES, max(1 << 20, room))
    try:
        rate, how = bandwidth_gb_s(n_bytes, 3), "native"
    except SeptetError:
        rate, how = numpy_bandwidth_gb_s(n_bytes, 3), "numpy"
    return {"gb_s": round(rate, 1), "by": how, "mib": n_bytes >> 20}


if __name__ == "__main__":
    print(f"{bandwidth_gb_s():.1f} GB/s")
