"""The GPU's context, made while Python imports torch: each takes its time, and neither needs the other.

Called by `process.py` before the model comes in, and by `build.py`, which asks whether there may be a GPU at all.
Standard library only; what fails here is left to torch to say.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import threading
import time
from functools import cache
from pathlib import Path

from septet.engine import compilers

__all__ = ["gpu_driver", "wake_gpu"]


MAJOR, MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
log = logging.getLogger(__name__)


@cache
def gpu_driver() -> bool:
    """Whether a GPU's driver is installed, NVIDIA's or AMD's: without one torch sees no GPU, and need not be asked."""
    if Path("/dev/kfd").exists():
        return True
    with contextlib.suppress(OSError):
        ctypes.CDLL("libcuda.so.1")
        return True
    return False


@cache
def wake_gpu() -> threading.Thread:
    """Begin to make the primary context of the first visible GPU, if there is one; torch takes that same context. Once:
    later calls do nothing."""
    thread = threading.Thread(target=_wake, name="wake-gpu", daemon=True)
    thread.start()
    return thread


def _wake() -> None:
    began = time.perf_counter()
    there = _retain_primary_context()
    log.debug("the GPU's context: %s after %.3f s", "made" if there else "none", time.perf_counter() - began)


def _retain_primary_context(library: str = "libcuda.so.1") -> bool:
    with contextlib.suppress(OSError, AttributeError):
        cuda = ctypes.CDLL(library)  # calls release the interpreter's lock
        device, context = ctypes.c_int(), ctypes.c_void_p()
        if cuda.cuInit(0) == 0 and cuda.cuDeviceGet(ctypes.byref(device), 0) == 0:
            _announce(cuda, device)
            return bool(cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device) == 0)
    return False


def _announce(cuda: ctypes.CDLL, device: ctypes.c_int) -> None:
    major, minor = ctypes.c_int(), ctypes.c_int()
    known = cuda.cuDeviceGetAttribute(ctypes.byref(major), MAJOR, device) == 0
    if known and cuda.cuDeviceGetAttribute(ctypes.byref(minor), MINOR, device) == 0:
        compilers.announce(10 * major.value + minor.value)
