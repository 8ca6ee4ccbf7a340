"""The life of a server with a real engine: bad starts, an engine that is killed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.e2e.serving import command, start

if TYPE_CHECKING:
    from pathlib import Path


def failed(*arguments: str) -> tuple[int, str]:
    done = subprocess.run(command("serve", *arguments), capture_output=True, text=True, timeout=240, check=False)
    return done.returncode, done.stderr


def test_a_taken_port_is_told_before_the_model_is_loaded() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        begun = time.monotonic()
        code, words = failed("no-such-model-at-all", "--port", str(port))
    assert code == 1
    assert f"port {port}" in words
    assert "Traceback" not in words
    assert time.monotonic() - begun < 90


def test_a_missing_or_broken_model_ends_with_one_line(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + b"\0" * 20)
    for model in ("no-such-model-at-all", str(broken)):
        code, words = failed(model, "--port", "0")
        assert code == 1, words
        assert "Traceback" not in words
        assert "Error:" in words


@pytest.fixture
def body() -> dict[str, Any]:
    return {"prompt": "Count: one two three", "max_tokens": 20, "ignore_eos": True, "stream": True, "temperature": 0}


def ready(root: str) -> bool:
    return httpx.get(root + "/ready", timeout=60).status_code == 200


def lines_of(url: str, body: dict[str, Any], begun: threading.Event, into: list[str]) -> None:
    with httpx.stream("POST", url + "/completions", json=body, timeout=120) as response:
        for line in response.iter_lines():
            into.append(line)
            begun.set()


def test_a_killed_engine_is_told_to_all_and_the_server_exits_non_zero(smollm2_path: Path, body: dict[str, Any]) -> None:
    running = start("smollm2", "--max-model-len", "4096")
    try:
        begun, got = threading.Event(), list[str]()
        body["max_tokens"] = 4000  # under way when the engine is killed, whatever the machine
        reader = threading.Thread(target=lines_of, args=(running.url, body, begun, got))
        reader.start()
        assert begun.wait(120)
        (engine,) = running.children()
        os.kill(engine, signal.SIGKILL)
        reader.join(60)
        assert any('"engine_dead_error"' in line for line in got)
        with suppress(httpx.TransportError):  # it leaves some seconds later
            assert httpx.get(running.root + "/health").status_code == 503
        assert running.popen.wait(120) == 1
    finally:
        running.popen.kill()


def test_with_restart_engine_a_killed_engine_is_started_again_and_keys_are_asked_for(
    smollm2_path: Path, body: dict[str, Any]
) -> None:
    key = "a-key-of-this-test"
    running = start("smollm2", "--max-model-len", "256", "--restart-engine", "--access-log", "json", "--api-key", key)
    try:
        (engine,) = running.children()
        os.kill(engine, signal.SIGKILL)
        deadline = time.monotonic() + 240
        while (now := running.children()) == [engine] or not now or not ready(running.root):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        body |= {"stream": False, "max_tokens": 2}
        assert httpx.post(running.url + "/completions", json=body, timeout=60).status_code == 401
        headers = {"authorization": f"Bearer {key}"}
        assert httpx.post(running.url + "/completions", json=body, timeout=60, headers=headers).status_code == 200
        assert running.stop() == 0
        assert not any(key in line for line in running.lines)
        assert any('"status":200' in line and '"output_tokens":2' in line for line in running.lines)
    finally:
        running.popen.kill()
