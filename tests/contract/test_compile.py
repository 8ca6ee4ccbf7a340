"""Every Triton kernel compiles for Hopper in bfloat16, fits its shared memory and moves data the fast way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARED_BYTES = 227 * 1024  # per block on compute capability 9.0


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, int]]:
    pytest.importorskip("triton.backends.nvidia")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).parent / "compile_for_hopper.py"
    done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_all_kernels_fit(compiled: dict[str, dict[str, int]]) -> None:
    assert len(compiled) == 24
    assert {name: facts for name, facts in compiled.items() if facts["shared_bytes"] > SHARED_BYTES} == {}


def test_attention_hardly_spills_registers(compiled: dict[str, dict[str, int]]) -> None:
    """None of it, but for two that were measured to be faster so: 256 rows of queries, the first turn in registers."""
    few = {"attention prefill": 80, "decode 32 rows of parts": 16}
    kernels = {name: facts for name, facts in compiled.items() if name.startswith(("attention", "decode", "prefix"))}
    assert len(kernels) == 12
    assert {name: facts for name, facts in kernels.items() if facts["spilled_bytes"] > few.get(name, 0)} == {}


@pytest.mark.parametrize("name", ["attention prefill", "attention mixed", "decode 128 rows, norms, window, cap"])
def test_keys_and_values_are_on_their_way_while_others_are_used(compiled: dict[str, dict[str, int]], name: str) -> None:
    """The loop waits for all but its newest copies: too few stages would make it wait for all."""
    assert compiled[name]["turns_ahead"], compiled[name]


def test_attention_gathers_in_wide_asynchronous_copies(compiled: dict[str, dict[str, int]]) -> None:
    kernels = {name: facts for name, facts in compiled.items() if name.startswith("attention")}
    assert len(kernels) == 5
    for name, facts in kernels.items():
        assert facts["async_copies"] >= 8, f"{name}: {facts}"
        assert facts["mma"] > 0 if "decode" in name else facts["wgmma"] > 0, f"{name}: {facts}"


def test_skinny_products_use_warp_groups_and_pipelines(compiled: dict[str, dict[str, int]]) -> None:
    for name in ("skinny 32 rows", "skinny 64 rows, pair"):
        assert compiled[name]["async_copies"] >= 8, compiled[name]
        assert compiled[name]["wgmma"] > 0, compiled[name]


@pytest.mark.parametrize(
    "name", ["norm", "act", "embed", "qkv", "gumbel", "merge", "gemv", "gemv, pair", "decode 1 row"]
)
def test_elementwise_kernels_load_16_bytes(compiled: dict[str, dict[str, int]], name: str) -> None:
    assert compiled[name]["wide_loads"] > 0, compiled[name]
