"""Compiles the native CPU library: `python csrc/build.py [--emulate-avx512] [OUTPUT]`, and setup.py while installing.

Owns the compiler's flags and which file gets which instruction set. Every csrc/*.cpp is part of the library; on x86-64
a name ending in _avx2, _avx512 or _avx512bf16 is compiled for that path, all the rest for the plain architecture, so
that the library runs on any CPU and chooses at run time; a path whose flags the compiler does not know is left out.
Objects are kept in build/native and made again when a source or header is newer. Standard library only; must not know
torch or the package.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
OUTPUT = HERE.parent / "septet" / "kernels" / "native" / "libseptet_native.so"
OBJECTS = HERE.parent / "build" / "native"
COMMON = ["-std=c++17", "-O3", "-fPIC", "-pthread", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=off"]
WARN = ["-Wall", "-Wextra"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
# GCC 12 takes its own headers' undefined vectors for a fault of ours (GCC bug 105593).
AVX512 = [
    *AVX2,
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
    "-mavx512f",
    "-mavx512bw",
    "-mavx512dq",
    "-mavx512vl",
    "-mavx512vnni",
]
PATHS = {"_avx2": AVX2, "_avx512": AVX512, "_avx512bf16": [*AVX512, "-mavx512bf16"]}


X86 = platform.machine() in ("x86_64", "AMD64")
NOTHING = ["-x", "c++", "-fsyntax-only", os.devnull]  # a source to try flags with

# -O1: compiles in seconds, and GCC 12 at -O3 gets the emulation (not our kernels: -O2 and the sanitizers agree) wrong.
EMULATED = ["-O1", "-DSEPTET_EMULATE", *AVX2, "-include", str(HERE / "emulated_avx512.h")]  # for tests only


class BuildError(Exception):
    """No compiler, or it failed: str() says which and shows its words."""


def find_compiler() -> str:
    for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++"):
        if name and (found := shutil.which(name)):
            return found
    raise BuildError("no C++ compiler found (looked for $CXX, c++, g++, clang++); install g++ or clang++")


def own_flags(suffix: str, emulate: bool) -> list[str]:
    return EMULATED if emulate and suffix != "_avx2" else PATHS[suffix]


def unknown_paths(compiler: str, emulate: bool) -> list[str]:
    """Suffixes of the paths whose flags this compiler refuses; none where the architecture has no such paths."""

    def refused(suffix: str) -> bool:
        options = own_flags(suffix, emulate)
        return subprocess.run([compiler, *options, *NOTHING], capture_output=True).returncode != 0

    return [suffix for suffix in PATHS if refused(suffix)] if X86 else []


def flags(source: Path, emulate: bool, left_out: list[str]) -> list[str] | None:
    """Compiler flags of a source; None = not for this architecture or this compiler."""
    suffix = next((s for s in PATHS if source.stem.endswith(s)), None)
    common = [*COMMON, *WARN, *(f"-DSEPTET_NO{missing.upper()}" for missing in left_out)]
    if suffix is None:
        return common + (["-DSEPTET_EMULATE"] if emulate else [])
    return common + own_flags(suffix, emulate) if X86 and suffix not in left_out else None


def compile_one(
    compiler: str, source: Path, objects: Path, newest_header: float, emulate: bool, left_out: list[str]
) -> Path | None:
    options = flags(source, emulate, left_out)
    if options is None:
        return None
    key = hashlib.sha256(" ".join([compiler, *options]).encode()).hexdigest()[:8]
    target = objects / f"{source.stem}-{key}.o"
    if not target.exists() or target.stat().st_mtime <= max(source.stat().st_mtime, newest_header):
        partial = target.with_suffix(f".{os.getpid()}.tmp.o")
        run([compiler, *options, "-c", str(source), "-o", str(partial)])
        os.replace(partial, target)
    return target


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stderr.strip()}")
    if done.stderr.strip():
        print(done.stderr.strip(), file=sys.stderr)


def build(output: Path = OUTPUT, objects: Path = OBJECTS, *, emulate: bool = False) -> Path:
    """Compile what is out of date, link to `output` (replaced in one step). BuildError if that can't be done.

    emulate: AVX-512 in plain C++ (emulated_avx512.h), so that its path can be tested anywhere.
    """
    compiler = find_compiler()
    objects.mkdir(parents=True, exist_ok=True)
    newest = max(h.stat().st_mtime for h in HERE.glob("*.h"))
    sources = sorted(HERE.glob("*.cpp"))
    left_out = unknown_paths(compiler, emulate)
    if left_out:
        names = ", ".join(suffix[1:] for suffix in left_out)
        print(f"native library built without {names}: {compiler} does not know the flags", file=sys.stderr)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as threads:
        made = list(threads.map(lambda s: compile_one(compiler, s, objects, newest, emulate, left_out), sources))
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_suffix(f".{os.getpid()}.tmp")
    run([compiler, "-shared", "-pthread", *(str(o) for o in made if o), "-o", str(partial)])
    os.replace(partial, output)
    return output


if __name__ == "__main__":
    arguments = sys.argv[1:]
    emulated = "--emulate-avx512" in arguments
    places = [Path(a) for a in arguments if not a.startswith("--")]
    try:
        print(build(places[0] if places else OUTPUT, emulate=emulated))
    except BuildError as error:
        sys.exit(f"native library not built: {error}")
