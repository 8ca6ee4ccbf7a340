"""`septet bench` against a real HTTP server without a model: workloads, processes, deaths, reports, comparisons."""

from __future__ import annotations

import os
import signal
import socket
import sys
from contextlib import suppress
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from click.testing import CliRunner

from septet.bench.harness.document import read
from septet.bench.harness.figures import UNITS
from septet.bench.harness.launch import running
from septet.bench.harness.markdown import markdown, with_interval
from septet.bench.harness.measure import Measurement
from septet.bench.harness.prompts import asks
from septet.bench.harness.published import amount, nearest, reference
from septet.bench.harness.report import html
from septet.bench.harness.results import Results
from septet.bench.harness.targets import Target, known, target
from septet.bench.harness.workload import Workload, load, names
from septet.cli.main import main
from septet.errors import InvalidRequest, SeptetError

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
SERVE = """
import asyncio, json, os, subprocess, sys
sys.path.insert(0, {root!r})
import tests.echo_server as echo
echo.bind = lambda host, port: bind(host, int(sys.argv[1]))
from septet.serve.app import bind
{more}
sys.exit(asyncio.run(echo.main({{"model": "echo:256:2"}})))
"""
ORPHAN = "child = subprocess.Popen(['sleep', '600'], start_new_session=True); open({path!r}, 'w').write(str(child.pid))"
DEATH = "import threading; threading.Timer({after}, lambda: os._exit(7)).start()"
SMALL = Workload(name="small", title="Small", about="", kind="closed", streams=(1, 3), requests=4, prompt=8, output=6,
                 ttft_ms=60_000, tpot_ms=60_000)  # fmt: skip


def echo(tmp_path: Path, name: str, more: str = "") -> Target:
    script = tmp_path / f"{name}.py"
    script.write_text(SERVE.format(root=str(ROOT), more=more))
    return Target(name=name, title=name, model="echo", command=(sys.executable, str(script), "{port}"),
                  ready="/health", fixed={"ignore_eos": True})  # fmt: skip


HEAD: dict[str, Any] = {"command": "bench", "commit": "abc", "date": "2026-01-01", "machine": {"cpu": ["a CPU"],
        "allowed_cores": 2}, "libraries": {}, "seed": 0, "rounds": 1, "scale": 1.0,
        "price": {"usd_per_hour": 3.6, "by": "given"}, "limits": {}}  # fmt: skip


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Two engines in two rounds, one of which leaves a worker behind, and one that is not installed."""
    path = tmp_path_factory.mktemp("bench")
    pid = path / "pid"
    targets = [
        echo(path, "first", ORPHAN.format(path=str(pid))),
        Target(name="absent", title="absent", model="", missing="not installed"),
    ]
    results = Results(dict(HEAD))
    Measurement(targets, [SMALL], results, path / "results.json", rounds=2).run()
    document = read(path / "results.json")
    document["orphan"] = int(pid.read_text())
    yield document
    with suppress(ProcessLookupError):
        os.kill(document["orphan"], signal.SIGKILL)


# -- workloads --------------------------------------------------------------------------------------------------------
def test_every_workload_of_the_package_says_what_it_is() -> None:
    assert {"single", "batch", "mixed", "prefix", "agents", "structured", "prefill", "replay", "arrivals"} <= set(
        names()
    )
    assert load("batch").streams == (1, 32, 64, 128, 256)
    assert load("agents").turns == 5
    for name in names():
        work = load(name)
        assert work.about
        for point in work.points():
            made = asks(work, point, 0, 0)
            assert made == asks(work, point, 0, 0)
            assert made != asks(work, point, 0, 1), "each round has prompts of its own"
            small = work.scaled(0.05)
            assert len(asks(small, small.points()[0], 0, 0)) <= len(made)


def test_prompts_of_a_group_share_their_beginning_and_nothing_else() -> None:
    work = load("prefix")
    made = [one.turns[0] for one in asks(work, work.points()[0], 1, 0)]
    assert len(made) == 10
    assert len({text.partition("\n")[0] for text in made}) == 1
    assert len(made[0].partition("\n")[0].split()) == 2048
    assert len(set(made)) == 10


def test_a_ramp_is_slow_first_and_fast_last() -> None:
    work = replace(load("ramp"), requests=400)
    times = [one.at for one in asks(work, work.points()[0], 0, 0)]
    half = times[-1] / 2
    assert sum(t < half for t in times) == pytest.approx(100, abs=30)  # a quarter of them in the first half


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("kind = 'closed'\nabout = ''", "title is missing"),
        ("title = 't'\nabout = ''\nkind = 'odd'", "kind is 'odd'"),
        ("title = 't'\nabout = ''\nkind = 'open'\nrates = [-1.0]", "rates is"),
        ("title = 't'\nabout = ''\nkind = 'closed'\nstreams = [0]", "streams is"),
        ("title = 't'\nabout = ''\nkind = 'closed'\nrequests = 1e9", "requests is"),
        ("title = 't'\nabout = ''\nkind = 'closed'\nspeed = 3", "no field 'speed'"),
        ("title =", "is no TOML"),
    ],
)
def test_a_wrong_workload_is_named(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(InvalidRequest, match=says):
        load(str(path))


# -- targets ----------------------------------------------------------------------------------------------------------
def test_what_is_not_installed_is_said_to_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    for name in set(known()) - {"septet"}:
        found = target(f"{name}:some/model", {}, {})
        assert "not installed" in found.missing, name
        assert not found.command
    with pytest.raises(InvalidRequest, match="no engine 'vlm'; there are septet, vllm"):
        target("vlm:x", {}, {})
    with pytest.raises(InvalidRequest, match="vllm needs a model"):
        target("vllm", {}, {})


def test_names_of_models_may_hold_colons_and_arguments_come_last() -> None:
    found = target("septet:gemma3:270m", {}, {"septet": "--max-num-seqs 4"})
    assert found.model == "gemma3:270m"
    assert found.command[:5] == (sys.executable, "-m", "septet.cli.main", "serve", "gemma3:270m")
    assert found.command[-2:] == ("--max-num-seqs", "4")


# -- measuring --------------------------------------------------------------------------------------------------------
def test_figures_of_a_real_server(measured: dict[str, Any]) -> None:
    assert not measured["partial"]
    assert [(t["name"], t["status"]) for t in measured["targets"]] == [("first", "measured"), ("absent", "missing")]
    assert [(p["label"], len(p["runs"])) for p in measured["points"]] == [("1 at once", 2), ("3 at once", 2)]
    for point in measured["points"]:
        f = point["figures"]
        assert all(run["output_tokens"] == 4 * 6 and run["failed"] == 0 for run in point["runs"])
        assert f["answer_tokens"]["median"] == 6
        assert f["e2e_ms"]["median"] >= 12, "six steps of 2 ms"
        assert 1 < f["tpot_ms"]["median"] < f["e2e_ms"]["median"] / 5
        assert f["ttft_ms"]["low"] <= f["ttft_ms"]["median"] <= f["ttft_ms"]["high"]
        assert f["goodput_s"]["median"] == f["requests_s"]["median"], "the targets are lax"
        assert 20 < f["memory_mib"]["median"] < 2000
    alone, three = ([sum(run["e2e_ms"]) / 1e3 - run["wall_s"] for run in p["runs"]] for p in measured["points"])
    assert max(alone) <= 0, "one after the other"
    assert max(three) > 0, "answers overlap"


def test_no_process_outlives_the_measurement(measured: dict[str, Any]) -> None:
    assert not psutil.pid_exists(measured["orphan"]) or psutil.Process(measured["orphan"]).status() == "zombie"


def test_an_engine_that_dies_in_mid_run_leaves_its_results_and_the_others(tmp_path: Path) -> None:
    work = replace(SMALL, streams=(1,), requests=2, output=2)
    endless = replace(SMALL, name="endless", streams=(2,), requests=4000, output=200)
    dying = echo(tmp_path, "dying", DEATH.format(after=4))
    results = Results(dict(HEAD))
    Measurement([dying], [work, endless], results, tmp_path / "results.json", rounds=1).run()
    document = read(tmp_path / "results.json")
    assert document["partial"]
    [state] = document["targets"]
    assert state["status"] == "partial"
    assert state["why"].startswith("dying ended with code 7")
    assert "endless, 2 at once, round 1" in state["why"]
    assert "\n" not in state["why"]
    assert [(p["workload"], p["partial"]) for p in document["points"]] == [("small", False), ("endless", True)]
    assert document["points"][0]["figures"]["output_tokens_s"]["median"] > 0
    assert "PARTIAL" in markdown(document)
    assert "PARTIAL" in html(document)


def test_a_taken_port_and_an_engine_that_ends_at_once_are_one_line_each(tmp_path: Path) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        port = sock.getsockname()[1]
        results = Results(dict(HEAD))
        Measurement([echo(tmp_path, "late")], [SMALL], results, tmp_path / "r.json", port=port).run()
    assert results.targets["late"]["status"] == "failed"
    assert f"port {port} of 127.0.0.1 is taken" in results.targets["late"]["why"]
    broken = Target(name="b", title="Broken", model="", command=(sys.executable, "-c", "raise SystemExit('no model')"))
    with pytest.raises(SeptetError, match="Broken ended with code 1: no model"), running(broken):
        pass


# -- reports ----------------------------------------------------------------------------------------------------------
def test_reports_hold_every_figure_and_nothing_from_elsewhere(measured: dict[str, Any]) -> None:
    page, text = html(measured), markdown(measured)
    for point in measured["points"]:
        for name, found in point["figures"].items():
            assert UNITS[name] in page
            assert f"<td>{with_interval(found)}</td>" in page
            assert f"| {with_interval(found)} |" in text
    assert page.count("<svg") >= 6
    assert "$" in page, "the cost"
    for word in ("<script", "http://", "https://", "url(", "@import", "src="):
        assert word not in page
    assert "not installed" in page
    for entry in reference()["entries"]:
        assert amount(entry) in unescape(page)


# -- published --------------------------------------------------------------------------------------------------------
def test_published_figures_have_sources_and_their_contradictions_are_flagged() -> None:
    entries = {e["id"]: e for e in reference()["entries"]}
    assert len(entries) == len(reference()["entries"]) > 90
    for e in entries.values():
        assert e["source"].startswith("The published comparison of seven engines, February 2026: ")
        assert "/" not in e["source"].partition(": ")[0]
    for engine in ("tensorrt-llm", "sglang", "vllm", "tgi"):
        ttft, tbt, whole = (entries[f"{engine}-llama-70b-h100-one-request-{m}"] for m in ("ttft", "tbt", "100-tokens"))
        sum_ms = ttft["value"] + 99 * tbt["value"]
        assert whole["value"] > sum_ms
        assert any(f"{sum_ms:,} ms, not {whole['value']:,}" in flag for flag in whole["flags"])
    flagged = [e["id"] for e in entries.values() if e["flags"]]
    assert "vllm-llama-70b-h100-128-tokens-in-ttft" in flagged
    for doubt in reference()["doubts"]:
        assert set(doubt["entries"]) <= set(entries)


def test_published_figures_stand_beside_what_septet_measured() -> None:
    measured = nearest(ROOT / "benchmarks" / "results" / "h100")
    assert "in 2 runs (8B on one H100 instead of 7B on an A100" in measured["vllm-llama-7b-a100-batch-32-throughput"]
    assert not any("h100-batch-64" in entry for entry in measured), "an 8B is no measurement of a 70B"
    assert nearest(ROOT / "tests") == {}
    said = CliRunner().invoke(main, ["bench", "published"])
    assert said.exit_code == 0
    assert "28 ms and 99 tokens at 15 ms each are 1,513 ms, not 1,800" in said.output
    assert 0 < said.output.count("Septet measured") <= len(measured)
