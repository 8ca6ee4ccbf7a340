"""The processes that compile kernels: when they are started before anybody knows a kernel, and how they end."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import pytest

from septet.engine import compilers
from septet.engine.missed import differences

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compilers._Early, "begun", False)
    monkeypatch.setattr(compilers._Early, "compilers", None)
    monkeypatch.setattr(compilers, "CARDS", (str(tmp_path),))  # it is there
    return tmp_path


def test_started_early_where_nothing_is_compiled_yet_and_ended_unused() -> None:
    compilers.begin_early()
    begun = compilers._Early.compilers
    assert begun is not None
    compilers.begin_early()
    assert compilers._Early.compilers is begun, "once"
    compilers.announce(90)
    compilers.discard()
    assert begun._popen.poll() is not None
    assert list(begun.finish()) == [], "what has ended answers nothing, and nobody waits"
    compilers.discard()
    assert "torch" not in sys.modules


def test_not_where_a_rehearsal_has_ended(here: Path) -> None:
    (here / "rehearsed-0123456789abcdef-first").touch()
    compilers.begin_early()
    assert compilers._Early.compilers is None


def test_not_where_no_gpu_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilers, "CARDS", ("/dev/no-such-card",))
    compilers.begin_early()
    assert compilers._Early.compilers is None


def test_they_leave_with_the_engine() -> None:
    made = compilers.Compilers(1)
    read, write = made._popen.stdout, made._popen.stdin
    assert read is not None
    assert write is not None
    write.close()  # as when the engine is killed
    assert read.read() == b""
    assert made._popen.wait(60) == 0
    with pytest.raises(ProcessLookupError):
        os.killpg(made._popen.pid, 0)


def test_what_a_missed_kernel_has_of_its_own() -> None:
    known = [{"x": "*bf16", "n": "i32", "BLOCK": "16"}, {"x": "*bf16 [16]", "n": "i32", "BLOCK": "32"}]
    assert differences(known, {"x": "*bf16 [16]", "n": "1", "BLOCK": "32"}) == "n i32 -> 1"
    assert differences(known, dict(known[0])) == "the same, with other options"
