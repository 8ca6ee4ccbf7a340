"""The soak in short form (`make test-slow`): many streams of the real model, and every promise of the tool held."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_one_of_many_streams_ends_and_nothing_stays_behind(tmp_path: Path, smollm2_path: Path) -> None:
    figures = tmp_path / "soak.json"
    command = [sys.executable, "-m", "septet.bench.soak", "--streams", "64", "--seconds", "40", "--max-growth", "0.15"]
    command += ["--max-slope", "200"]  # of twenty seconds: what loads once is in them
    command += [
        "--flags",
        "--kernels native --num-kv-slots 4096",
    ]  # touched whole within seconds; libraries load on first use
    done = subprocess.run([*command, "--json", str(figures)], capture_output=True, text=True, check=False)
    told = json.loads(figures.read_text())
    assert done.returncode == 0, told["verdict"]
    assert told["complete"] > 64
    assert told["broken"] == 0
    assert told["http_process_share"] < 0.10
