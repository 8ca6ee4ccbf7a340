"""The native CPU library: finding, loading and typing its C functions; which path of instructions to use.

Called by `native/pack.py`, the tape and the benchmarks; built by `csrc/build.py` when Septet is installed. ctypes
releases the GIL during each call. Nothing is kept here: who loads a library passes it on. Must not know torch.
"""

from __future__ import annotations

import ctypes
import os
import shutil
from ctypes import POINTER, c_char_p, c_double, c_float, c_int, c_int64, c_void_p
from pathlib import Path
from typing import TYPE_CHECKING

from septet.errors import InvalidRequest, SeptetError
from septet.machine import usable_cpus

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["PATHS", "Library", "NativeUnavailable", "Pool", "choose_path", "load", "signature"]

PATHS = ("portable", "avx2", "avx512")  # number = index, as in csrc/cpu.h
ABI = 1  # csrc/api.h
FILE = Path(__file__).parent / "libseptet_native.so"

_SIGNATURES: dict[str, tuple[object, list[object]]] = {
    "septet_abi": (c_int, []),
    "septet_best_path": (c_int, []),
    "septet_has_path": (c_int, [c_int]),
    "septet_has_bf16": (c_int, []),
    "septet_pool_create": (c_void_p, [c_int, c_int]),
    "septet_pool_release": (None, [c_void_p]),
    "septet_pool_active": (c_int, [c_void_p]),
    "septet_arena_create": (c_void_p, []),
    "septet_arena_release": (None, [c_void_p]),
    "septet_pack": (c_void_p, [c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int, c_int, POINTER(c_char_p)]),
    "septet_packed_release": (None, [c_void_p]),
    "septet_packed_bytes": (c_int64, [c_void_p]),
    "septet_packed_rows": (c_int, [c_void_p, c_void_p, c_int64, c_void_p, c_int64]),
    "septet_linear": (c_int, [c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_int64, c_void_p]),
    "septet_probe_bandwidth": (c_double, [c_void_p, c_int64, c_int]),
    "septet_bench_linear": (c_double, [c_void_p, POINTER(c_void_p), c_int, POINTER(c_float), c_int64, c_void_p, c_int]),
    "septet_bench_barrier": (c_double, [c_void_p, c_int]),
}


class NativeUnavailable(SeptetError):
    """The native library is not there or does not fit; str() says why and what to do."""

    kind = "native_unavailable_error"


class Library(ctypes.CDLL):
    """The loaded library: its functions are attributes, typed. Handles are plain integers (see csrc/api.h)."""

    def has_path(self, path: str) -> bool:
        """Can this CPU run it?"""
        return bool(self.septet_has_path(PATHS.index(path)))

    @property
    def paths(self) -> list[str]:
        """Paths that this CPU can run, slowest first."""
        return [path for path in PATHS if self.has_path(path)]


def signature(library: Library, name: str, result: object, arguments: list[object]) -> None:
    """Declare a C function of `library`. NativeUnavailable if it has none of that name."""
    try:
        function = getattr(library, name)
    except AttributeError:
        raise NativeUnavailable(f"the native library lacks {name}: {_REBUILD}") from None
    function.restype, function.argtypes = result, arguments


_REBUILD = "build it again with `python csrc/build.py`, or install Septet again"


def load(file: Path = FILE) -> Library:
    """Load the library. NativeUnavailable, with the reason and the way out, if it is absent, foreign or outdated."""
    if not file.exists():
        compiler = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
        why = _REBUILD if compiler else "no C++ compiler was found: install g++ or clang++, then install Septet again"
        raise NativeUnavailable(f"the native CPU library was not built; {why}")
    try:
        library = Library(str(file))
        abi = library.septet_abi()
    except (OSError, AttributeError) as error:
        raise NativeUnavailable(f"the native CPU library can't be loaded ({error}); {_REBUILD}") from None
    if abi != ABI:
        raise NativeUnavailable(f"the native CPU library has interface {abi}, Septet needs {ABI}; {_REBUILD}")
    for name, (result, arguments) in _SIGNATURES.items():
        signature(library, name, result, arguments)
    return library


def choose_path(library: Library, wanted: str = "", environ: Mapping[str, str] = os.environ) -> tuple[str, str]:
    """-> (path, the reason). `wanted`, or else SEPTET_CPU_PATH, forces one; InvalidRequest if this CPU lacks it."""
    forced = wanted or environ.get("SEPTET_CPU_PATH", "")
    if not forced:
        return library.paths[-1], f"the best this CPU has of {', '.join(PATHS)}"
    origin = "asked for" if wanted else "SEPTET_CPU_PATH"
    if forced not in PATHS:
        raise InvalidRequest(f"{origin}: CPU path {forced!r} is none of {', '.join(PATHS)}", param="SEPTET_CPU_PATH")
    if not library.has_path(forced):
        have = ", ".join(library.paths)
        raise InvalidRequest(f"{origin}: this CPU lacks path {forced!r}; it has {have}", param="SEPTET_CPU_PATH")
    return forced, origin


class Pool:
    """The compute threads: `threads` of them (0 = as many as affinity and quota give), the calling thread included.

    One caller at a time. Workers sleep between calls.
    """

    def __init__(self, library: Library, threads: int = 0, *, pin: bool = True) -> None:
        self.library = library
        self.threads = threads or usable_cpus()
        self.handle: int | None = library.septet_pool_create(self.threads, int(pin))
        if not self.handle:
            raise NativeUnavailable(f"can't start {self.threads} compute threads")

    @property
    def active(self) -> int:
        """Threads of the last call: fewer than `threads` while other programs take the CPUs from some of them."""
        return int(self.library.septet_pool_active(self.handle))

    def close(self) -> None:
        """End the workers. The pool is of no use after that."""
        handle, self.handle = self.handle, None
        if handle:
            self.library.septet_pool_release(handle)

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            self.close()
