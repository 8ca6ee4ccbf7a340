"""Two real models on one server within a budget that holds one; an engine that is killed; no orphans."""

from __future__ import annotations

import itertools
import os
import signal
import time
from typing import TYPE_CHECKING, Any

import httpx

from tests.e2e.serving import start

if TYPE_CHECKING:
    from pathlib import Path


def ask(root: str, model: str, **more: Any) -> httpx.Response:
    body = {"model": model, "prompt": "The capital of France is", "max_tokens": 4, "temperature": 0, **more}
    return httpx.post(f"{root}/v1/completions", json=body, timeout=240)


def test_a_budget_for_one_of_two(smollm2_path: Path, gemma3_path: Path) -> None:
    flags = ("--kernels", "native", "--max-model-len", "2048", "--memory-budget", "900M", "--kv-cache-memory", "64M")
    server = start("smollm2", "gemma3:270m", *flags)
    try:
        assert server.children() == []  # nothing is loaded before it is asked for
        first = ask(server.root, "smollm2").json()["choices"][0]["text"]
        [engine] = server.children()
        stream = httpx.Client(timeout=240)
        # Long enough to be under way whatever the machine; it is left in the middle.
        body = {"model": "smollm2", "prompt": "Once", "max_tokens": 2000, "stream": True, "ignore_eos": True}
        with stream.stream("POST", f"{server.root}/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            refused = ask(server.root, "gemma3:270m")  # smollm2 is in use
            assert refused.status_code == 503
            assert "smollm2 holds" in refused.json()["error"]["message"]
            assert sum(1 for line in itertools.islice(lines, 80) if line.startswith("data:")) >= 40  # it goes on
        deadline = time.monotonic() + 120
        while ask(server.root, "gemma3:270m").status_code != 200:  # smollm2 may leave once the stream's end is seen
            assert time.monotonic() < deadline
            time.sleep(0.1)
        [other] = server.children()
        assert other != engine
        os.kill(other, signal.SIGKILL)
        deadline = time.monotonic() + 60
        while httpx.get(f"{server.root}/api/ps").json()["models"] and time.monotonic() < deadline:
            time.sleep(0.05)
        assert ask(server.root, "smollm2").json()["choices"][0]["text"] == first
        assert ask(server.root, None).status_code == 200  # type: ignore[arg-type]
        engines = server.children()
        assert len(engines) == 1
    finally:
        assert server.stop() == 0
    for pid in engines:
        assert not os.path.exists(f"/proc/{pid}")
