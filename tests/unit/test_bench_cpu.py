"""The CPU benchmarks' own parts: rounds add up, ratios point the right way, the load clients count what they get."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

import pytest

from septet.bench.cpu_table import Entry, read, run_json, table
from septet.bench.http_load import Side, ask_server, line, row_of, through_server
from septet.bench.perplexity import cut, perplexity

if TYPE_CHECKING:
    from pathlib import Path


def test_rounds_add_up_and_the_table_shows_medians(tmp_path: Path) -> None:
    entry = Entry(n_bytes=100_000_000, probe_gb_s=[20.0, 30.0, 40.0], others=[0.0, 0.5, 0.1])
    for rate in (100.0, 300.0, 210.0):
        entry.note("septet", {"tg128": rate, "cold_s": 1.0, "torch_s": 0.75})
        entry.note("llama_cpp", {"tg128": rate / 3, "cold_s": 0.5})
    entry.note("vllm_cpu", {"tg128": 21.0, "cold_s": 60.0})
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"files": {"smollm2 Q4_1": asdict(entry)}, "runs": [{"commit": "abc"}]}))
    entries, runs = read(path)
    assert entries == {"smollm2 Q4_1": entry}
    assert runs == [{"commit": "abc"}]
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table(entries).splitlines()[2:]]
    speed, cold, torch = rows
    assert speed[2:] == ["210", "70", "3.00x", "21", "10.00x", "70% of 30 GB/s", "10%"]
    assert cold[2:] == ["1.00", "0.50", "0.50x", "60", "60.00x", "", ""]
    assert torch[2:] == ["0.75", "-", "-", "-", "-", "", ""]


def test_what_the_server_costs_is_the_median_of_the_rounds() -> None:
    """A machine that is slow in the second round, and for one side of the third."""
    http = Side([90, 9, 95], [5.0] * 3, [150.0] * 3)
    session = Side([100, 10, 900], [4.0] * 3, [50.0] * 3)
    row = row_of(8, {"http": http, "session": session})
    assert row["cost"] == pytest.approx(0.1)
    assert row["http"]["tokens_s"] == 90
    assert "the server costs 10.0%" in line(row)


def test_load_clients_read_whole_streams_and_count_their_tokens() -> None:
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.fake_server", "0.001", "1"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        url = f"http://127.0.0.1:{int(server.stdout.readline())}"
        rate, waits = asyncio.run(through_server(url, 3, 20, 0))  # its answers have 20 tokens, whoever asks
        assert 0 < rate < 60 / 0.02
        assert all(0.001 <= wait < 60 / rate for wait in waits)
        with pytest.raises(RuntimeError, match="60 tokens where 63"):
            asyncio.run(through_server(url, 3, 21, 0))
        with pytest.raises(RuntimeError, match="404"):
            asyncio.run(ask_server(url, {}, "/v1/nothing"))
    finally:
        server.terminate()
        server.wait(20)


class Letters:
    """A token a letter; 0 begins a text."""

    bos_token_id = 0

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [0] * add_special_tokens + [ord(letter) for letter in text]


def test_windows_begin_with_bos_and_lose_nothing() -> None:
    windows = cut(Letters(), "abcdefgh", 4)
    assert windows == [[0, 97, 98, 99], [0, 100, 101, 102], [0, 103, 104]]
    assert cut(Letters(), "abcd", 4) == [[0, 97, 98, 99]]  # one letter alone predicts little
    assert perplexity([[-1.0, -2.0], [-3.0]]) == pytest.approx(7.389056)


def test_a_peer_may_speak_after_its_figures() -> None:
    told = "print('up'); print('{\"b8\": 1.5}'); print('bye')"
    assert run_json([sys.executable, "-c", told]) == {"b8": 1.5}
    with pytest.raises(RuntimeError, match="printed no figures: bye"):
        run_json([sys.executable, "-c", "print('bye')"])
