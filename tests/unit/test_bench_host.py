"""What the benchmarks share: others' CPU is what is left of all, jobs end with all they started, heads are whole."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from septet.bench import host

if TYPE_CHECKING:
    from pathlib import Path

# Starts a process that has no mind to end, writes its pid to a file, then does what it is told.
FAMILY = """
import pathlib, signal, subprocess, sys, time
quiet = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", quiet], stdout=subprocess.PIPE)
child.stdout.readline()
pathlib.Path(sys.argv[1]).write_text(str(child.pid))
print("ready", flush=True)
if sys.argv[2] == "stay":
    time.sleep(600)
"""


def gone(pid: int) -> bool:
    """Ended, or ended and not yet waited for by whoever inherited it; looks for a while."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as file:
            if file.read().rpartition(")")[2].split()[0] not in "ZX":
                time.sleep(0.02)
                continue
        return True
    return False


def test_neighbours_are_those_who_are_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four seconds of two CPUs, busy for six CPU seconds: two of them ours, one of a process that runs all along."""
    monkeypatch.setattr(host, "_all_s", iter((10.0, 16.0)).__next__)
    monkeypatch.setattr(host, "_ours_s", iter((1.0, 3.0)).__next__)
    monkeypatch.setattr(host.time, "perf_counter", iter((0.0, 4.0)).__next__)
    monkeypatch.setattr(host.os, "cpu_count", lambda: 2)
    worked = iter((0.5, 1.5))
    monkeypatch.setattr(host, "cpu_seconds", lambda pid: next(worked) if pid == 7 else 0.0)
    assert host.Neighbours(7).share() == pytest.approx(3 / 8)


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="Linux tells a process's time there")
def test_a_processs_time_is_what_it_worked() -> None:
    before, began = host.cpu_seconds(os.getpid()), time.process_time()
    while time.process_time() < began + 0.2:
        pass
    assert 0.15 < host.cpu_seconds(os.getpid()) - before < 5


@pytest.mark.parametrize("how", ["leave", "stay"])
def test_a_job_ends_with_all_that_it_started(tmp_path: Path, how: str) -> None:
    told = tmp_path / "pid"
    command = [sys.executable, "-c", FAMILY, str(told), how]
    if how == "leave":
        assert host.run_job(command, 60, stdout=subprocess.DEVNULL).returncode == 0
    else:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.stdout.close()
        host.stop(process)
        assert process.returncode == -signal.SIGTERM
    assert gone(int(told.read_text()))


def test_a_job_past_its_time_is_stopped() -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        host.run_job([sys.executable, "-c", "import time; time.sleep(600)"], 0.2)
    assert host.run_job([sys.executable, "-c", "print(input())"], 60, input="said", stdout=subprocess.PIPE, text=True
                        ).stdout == "said\n"  # fmt: skip


def test_every_results_file_tells_where_it_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host.sys, "argv", ["engine_steps.py", "--steps", "7", "a b"])
    path = tmp_path / "new" / "figures.json"
    host.write_results(path, host.head("engine_steps"), figures=[1.5])
    found = json.loads(path.read_text())
    assert set(found) == {"benchmark", "command", "commit", "date", "machine", "libraries", "figures"}
    assert found["command"] == "python -m septet.bench.engine_steps --steps 7 'a b'"
    assert found["machine"]["cpu"]
    assert found["libraries"]["septet"]
