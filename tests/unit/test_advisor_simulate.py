"""The simulation: everybody is answered once, the clock is right, the same seed gives the same figures."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from septet.advisor.arrivals import Arrival, Lengths, poisson, read_trace
from septet.advisor.simulate import ROUTERS, Fleet, simulate
from septet.advisor.summary import percentile, summarise
from septet.cli.main import main
from septet.errors import InvalidRequest

if TYPE_CHECKING:
    from pathlib import Path

    from septet.advisor.estimate import Work


@dataclass(frozen=True)
class Clockwork:
    """10 ms a step, 1 ms more for each prompt token."""

    def step_s(self, work: Work) -> float:
        return 0.010 + 0.001 * work.prefill


def fleet(**more: object) -> Fleet:
    settings = {"step_model": Clockwork(), "kv_slots": 4096, "max_num_seqs": 16, "max_num_batched_tokens": 64}
    return Fleet(**{**settings, "max_model_len": 512, **more})  # type: ignore[arg-type]


def drawn(n: int, rate: float = 20.0, **more: int) -> list[Arrival]:
    return list(poisson(n, rate, Lengths(**{"prompt": 40, "output": 12, **more}), seed=3))


def test_one_request_to_the_millisecond() -> None:
    out = simulate(fleet(), [Arrival(1.0, prompt=100, output=5)])
    (served,) = out.served
    assert served.ttft == pytest.approx(0.010 + 0.064 + 0.010 + 0.036)  # two chunks: 64 and 36 tokens
    assert served.end - served.first == pytest.approx(4 * 0.010)
    assert served.tpot == pytest.approx(0.010)
    assert out.steps == 6


def test_whole_prompts_hold_the_others_up() -> None:
    others = [Arrival(0.0, prompt=10, output=100)]
    long = [Arrival(0.05, prompt=400, output=1)]
    cut = simulate(fleet(), others + long)
    whole = simulate(fleet(chunked_prefill=False), others + long)
    assert cut.served[1].ttft == pytest.approx(whole.served[1].ttft + 6 * 0.010)  # seven steps instead of one


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("prefill_replicas", [0, 2])
def test_everybody_is_answered_once_and_again_the_same(router: str, prefill_replicas: int) -> None:
    arrivals = drawn(150, prefix=32, groups=5)
    many = fleet(replicas=3, router=router, prefill_replicas=prefill_replicas, hand_over_s=1e-5)
    first, second = simulate(many, arrivals), simulate(many, arrivals)
    assert [(s.first, s.end) for s in first.served] == [(s.first, s.end) for s in second.served]
    assert len(first.served) == 150
    for served, arrival in zip(first.served, arrivals, strict=True):
        assert arrival.at < served.first <= served.end
        assert not served.refused
    assert first.busy_s <= first.replicas * first.seconds + 1e-6


def test_a_shared_prefix_is_computed_once() -> None:
    arrivals = drawn(100, rate=5.0, prefix=200)
    with_cache, without = simulate(fleet(), arrivals), simulate(fleet(prefix_caching=False), arrivals)
    assert with_cache.hit_rate > 0.6
    assert without.hit_rate == 0.0
    assert summarise(with_cache).ttft_ms["p50"] < summarise(without).ttft_ms["p50"] / 2


def test_prefixes_stay_with_their_replica() -> None:
    arrivals = drawn(200, rate=10.0, prefix=200, groups=12)
    small = {"replicas": 4, "kv_slots": 1500}
    hits = {router: simulate(fleet(router=router, **small), arrivals).hit_rate for router in ROUTERS}
    assert hits["prefix"] > hits["round-robin"] + 0.05


def test_what_can_not_fit_is_refused_alone() -> None:
    out = simulate(fleet(), [Arrival(0.0, 600, 4), Arrival(0.1, 60, 4)])
    assert "context" in out.served[0].refused
    assert out.served[1].end > 0
    found = summarise(out)
    assert (found.requests, found.refused, found.goodput) == (2, 1, 0.5)


def test_percentiles() -> None:
    assert percentile([], 0.5) == 0.0
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([0.0, 10.0], 0.9) == 9.0


def test_bursts_keep_the_rate() -> None:
    for burst in (1.0, 5.0):
        arrivals = list(poisson(20_000, 50.0, Lengths(), seed=1, burst=burst))
        assert arrivals[-1].at == pytest.approx(400, rel=0.05)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 2 is no JSON"),
        ("[]", "line 2 is no JSON object"),
        ('{"timestamp": 1, "input_length": 5}', "output_length is missing"),
        ('{"timestamp": -1, "input_length": 5, "output_length": 1}', "timestamp is -1"),
        ('{"timestamp": 1, "input_length": "5", "output_length": 1}', 'input_length is "5"'),
        (
            '{"timestamp": 1, "input_length": 5, "output_length": 1, "prefix_id": "a", "prefix_length": 9}',
            "longer than",
        ),
    ],
)
def test_a_bad_trace_is_told_by_line(tmp_path: Path, line: str, says: str) -> None:
    good = '{"timestamp": 5, "input_length": 5, "output_length": 1, "prefix_id": "a", "prefix_length": 3}'
    path = tmp_path / "trace.jsonl"
    path.write_text(f"{good}\n{line}\n")
    with pytest.raises(InvalidRequest, match=says.replace("[", r"\[")):
        read_trace(path)
    path.write_text(good + "\n" + good.replace("5,", "7,", 1) + "\n")
    assert [(a.at, a.prefix_id) for a in read_trace(path)] == [(0.0, 1), (2.0, 1)]


def test_the_command(tmp_path: Path) -> None:
    run = CliRunner().invoke(main, ["simulate", "llama-1b", "--requests", "40", "--json"])
    assert run.exit_code == 0, run.output
    found = json.loads(run.output)
    assert found["requests"] == 40
    assert found["ttft_ms"]["p50"] > 0
    assert "rate" in CliRunner().invoke(main, ["simulate", "llama-1b", "--rate", "-1"]).output
