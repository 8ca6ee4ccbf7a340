"""What `make setup` promises of an installation: the package is found from anywhere, the native library is there."""

from __future__ import annotations

import platform
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_a_script_beside_the_clone_finds_the_package(tmp_path: Path) -> None:
    """A directory called septet (the clone) comes first on the path of a script beside it, and must not hide us."""
    (tmp_path / "septet").mkdir()
    script = tmp_path / "script.py"
    script.write_text("from septet import SamplingParams\nprint(SamplingParams.__name__)\n")
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout == "SamplingParams\n", done.stderr


def test_the_native_library_is_built_where_there_is_a_compiler() -> None:
    build = runpy.run_path(str(ROOT / "csrc" / "build.py"))
    try:
        build["find_compiler"]()
    except build["BuildError"]:
        pytest.skip("no C++ compiler")
    assert build["OUTPUT"].is_file()


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="other CPUs have no such paths")
def test_a_path_that_the_compiler_does_not_know_is_left_out_alone(tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\ncase "$*" in *-mavx512bf16*) exit 1;; esac\n')
    compiler.chmod(0o755)
    build = runpy.run_path(str(ROOT / "csrc" / "build.py"))
    left_out = build["unknown_paths"](str(compiler), False)
    assert left_out == ["_avx512bf16"]
    assert build["flags"](Path("linear_avx512bf16.cpp"), False, left_out) is None
    for source in ("linear_avx512.cpp", "linear_avx2.cpp", "cpu.cpp"):
        assert "-DSEPTET_NO_AVX512BF16" in build["flags"](Path(source), False, left_out)
