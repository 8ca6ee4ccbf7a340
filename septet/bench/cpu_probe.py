"""What this machine can read from memory per second, with as many threads as the engine would use.

    python -m septet.bench.cpu_probe

Called by the CPU table beside every run (bandwidth of shared machines changes within minutes) and by hand.
"""

from __future__ import annotations

__all__ = ["bandwidth_gb_s"]

N_BYTES, REPEATS = 512 << 20, 5


def bandwidth_gb_s() -> float:
    """Read bandwidth in GB/s (1e9), median of several passes over a buffer far larger than the caches."""
    from septet.kernels.native.library import Pool, load

    library = load()
    pool = Pool(library)
    try:
        rate: float = library.septet_probe_bandwidth(pool.handle, N_BYTES, REPEATS)
    finally:
        pool.close()
    return rate / 1e9


if __name__ == "__main__":
    print(f"{bandwidth_gb_s():.1f} GB/s")
