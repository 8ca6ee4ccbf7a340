"""The simulation: everybody is answered once, the clock is right, the same seed gives the same figures."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from septet.advisor.arrivals import Arrival, Lengths, poisson, read_trace
from septet.advisor.calibrate import Calibration, bends, fit, load
from septet.advisor.estimate import Work
from septet.advisor.parallel import independent, simulate_apart
from septet.advisor.simulate import ROUTERS, Fleet, simulate
from septet.advisor.summary import percentile, summarise
from septet.cli.main import main
from septet.errors import InvalidRequest

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Clockwork:
    """10 ms a step, 1 ms more for each prompt token."""

    def step_s(self, work: Work) -> float:
        return 0.010 + 0.001 * work.prefill


def fleet(**more: object) -> Fleet:
    settings = {"step_model": Clockwork(), "kv_slots": 4096, "max_num_seqs": 16, "max_num_batched_tokens": 64}
    return Fleet(**{**settings, "max_model_len": 512, **more})  # type: ignore[arg-type]


def drawn(n: int, rate: float = 20.0, **more: int) -> list[Arrival]:
    return list(poisson(n, rate, Lengths(**{"prompt": 40, "output": 12, **more}), seed=3))  # type: ignore[arg-type]


def test_one_request_to_the_millisecond() -> None:
    out = simulate(fleet(), [Arrival(1.0, prompt=100, output=5)])
    (served,) = out.served
    assert served.ttft == pytest.approx(0.010 + 0.064 + 0.010 + 0.036)  # two chunks: 64 and 36 tokens
    assert served.end - served.first == pytest.approx(4 * 0.010)
    assert served.tpot == pytest.approx(0.010)
    assert out.steps == 6


def test_with_overlap_who_comes_waits_for_the_step_that_is_planned_already() -> None:
    others = [Arrival(0.0, prompt=10, output=100)]
    late = [Arrival(0.2251, prompt=10, output=1)]
    plain, overlapped = (simulate(fleet(overlap=on), others + late).served[1] for on in (False, True))
    assert plain.ttft == pytest.approx(0.230 - 0.2251 + 0.020)  # the first prompt's step took 20 ms, the others 10
    assert overlapped.ttft == pytest.approx(plain.ttft + 0.010)
    alone = simulate(fleet(overlap=True), [Arrival(0.0, 10, 1), Arrival(0.015, 10, 1)]).served[1]
    assert alone.ttft == pytest.approx(0.005 + 0.020), "nothing is planned behind the last step"


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
    assert (found.requests, found.refused, found.goodput_share) == (2, 1, 0.5)


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


def test_replicas_apart_are_the_same_replicas() -> None:
    arrivals = drawn(150, rate=60.0, prefix=32, groups=7)
    for router in ("round-robin", "prefix"):
        many = fleet(replicas=3, router=router)
        assert independent(many, arrivals)
        together, apart = simulate(many, arrivals), simulate_apart(many, arrivals)
        assert apart.served == together.served
        assert (apart.steps, apart.cached_tokens, apart.seconds) == (
            together.steps,
            together.cached_tokens,
            together.seconds,
        )
        assert apart.busy_s == pytest.approx(together.busy_s)
    loaded = drawn(20)  # no prefixes: the router of prefixes then looks at the load
    assert not independent(fleet(replicas=3, router="prefix"), loaded)
    assert not independent(fleet(replicas=3), loaded)
    assert not independent(fleet(replicas=3, router="round-robin", prefill_replicas=1), loaded)


def test_processes_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("septet.advisor.parallel.WORTH_TOKENS", 1)
    many = fleet(step_model=CALIBRATION, replicas=2, router="round-robin")
    arrivals = drawn(60)
    assert simulate_apart(many, arrivals, processes=2) == simulate_apart(many, arrivals)


def test_handed_over_to_the_millisecond() -> None:
    """One replica computes the prompt and the first token, the other one the rest, after the keys have travelled."""
    apart = fleet(prefill_replicas=1, hand_over_s=0.001)
    arrivals = [Arrival(0.0, prompt=50, output=4), Arrival(5.0, prompt=50, output=1), Arrival(9.0, 300, 3)]
    served = simulate(apart, arrivals).served
    assert served[0].ttft == pytest.approx(0.010 + 0.050)
    assert served[0].end - served[0].first == pytest.approx(0.050 + 3 * 0.010)
    assert served[1].end == served[1].first == pytest.approx(5.0 + 0.010 + 0.050)
    assert served[2].end - served[2].first == pytest.approx(0.300 + 2 * 0.010)  # no chunks where nothing is computed


def test_decoding_apart_is_not_held_up_by_prompts() -> None:
    arrivals = [Arrival(0.0, prompt=10, output=60)] + [Arrival(0.1 + i / 10, prompt=400, output=1) for i in range(4)]
    one = simulate(fleet(replicas=2), arrivals).served[0]
    mixed = simulate(fleet(), arrivals).served[0]
    apart = simulate(fleet(prefill_replicas=1), arrivals)
    assert apart.served[0].tpot == pytest.approx(0.010, rel=0.03)
    assert mixed.tpot > 1.5 * apart.served[0].tpot
    assert one.tpot <= mixed.tpot
    assert apart.prompt_tokens == sum(a.prompt for a in arrivals)  # counted once, where they are computed


CALIBRATION = Calibration(
    model="m", machine="a bench", step=0.004, row=0.001, prompt_token=0.0005, context_token=1e-6, pair=1e-7,
    kv_slots=4096, max_num_seqs=16, max_num_batched_tokens=64, max_model_len=512, bends=((1.0, 1.0), (8.0, 1.25)),
)  # fmt: skip


def test_a_fit_finds_the_constants_and_none_below_zero() -> None:
    works = [Work(r, 40 * r, 0, 0.0) for r in (1, 4, 16)] + [Work.of([], [(0, n)]) for n in (32, 128, 512)]
    works += [Work(4, 2000, 0, 0.0), Work.of([50] * 8, [(200, 64)])]
    straight = replace(CALIBRATION, bends=())
    found = fit([(work, straight.step_s(work)) for work in works])
    assert found == pytest.approx([0.004, 0.001, 0.0005, 1e-6, 1e-7], rel=1e-6)
    falling = [(work, 0.1 - 0.002 * work.rows) for work in works[:3]]  # more rows, less time: no constant says so
    assert min(fit(falling)) == 0.0
    with pytest.raises(InvalidRequest, match="more than 0 s"):
        fit([(works[0], 0.0)])


def test_bends_go_through_the_measured_decode_steps() -> None:
    """Steps that do not grow evenly with rows, whose context is read at a rate of its own."""
    steps = {1: 0.005, 2: 0.007, 4: 0.015, 16: 0.045}
    samples = [(Work(rows, 20 * rows), s + 2e-6 * 20 * rows) for rows, s in steps.items()]
    samples += [(Work(4, 1600), 0.015 + 2e-6 * 1600), (Work(16, 4800), 0.045 + 2e-6 * 4800)]
    bent = bends(replace(CALIBRATION, bends=()), samples)
    assert bent.context_token == pytest.approx(2e-6)
    for work, seconds in samples:
        assert bent.step_s(work) == pytest.approx(seconds)
    assert bent.step_s(Work(3, 0)) == pytest.approx((0.007 / 6 + 0.015 / 8) / 2 * 7), "half-way between the factors"
    assert bent.step_s(Work(64, 0)) == pytest.approx(0.045 / 20 * 68), "level beyond the last"
    assert bent.step_s(Work.of([], [(0, 8)])) == CALIBRATION.step_s(Work.of([], [(0, 8)])), "prompts alone do not bend"


@pytest.mark.parametrize(
    ("change", "says"),
    [({"row": -1.0}, "row can't be -1"), ({"kv_slots": 1.5}, "kv_slots can't be 1.5"), ({"row": None}, "row can't be"),
     ({"step": 0, "row": 0}, "takes no time"), ({"extra": 1}, "unknown: extra"),
     ({"bends": [[2, 1], [1, 1]]}, "bends are pairs"), ({"bends": [[1, "x"]]}, "bends are pairs"),
     ({"bends": 5}, "bends are pairs"), ({"overlap": 1}, "overlap is true or false")],
)  # fmt: skip
def test_a_bad_calibration_is_told_by_field(tmp_path: Path, change: dict[str, object], says: str) -> None:
    path = tmp_path / "c.json"
    CALIBRATION.save(path)
    assert load(path) == CALIBRATION
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(InvalidRequest, match=says):
        load(path)
    path.write_text("{")
    with pytest.raises(InvalidRequest, match=r"c\.json is no calibration"):
        load(path)


def called(*args: str) -> str:
    run = CliRunner().invoke(main, ["simulate", *args])
    assert run.exit_code == 0, run.output
    return run.output


def test_the_same_seed_gives_the_same_bytes() -> None:
    given = ["llama-1b", "--requests", "60", "--rate", "50", "--prefix", "64", "--groups", "3", "--json"]
    assert called(*given, "--seed", "5") == called(*given, "--seed", "5")
    assert called(*given, "--seed", "5") != called(*given, "--seed", "6")


def test_the_command_replays_a_trace_on_a_calibration(tmp_path: Path) -> None:
    trace, measured = tmp_path / "t.jsonl", tmp_path / "c.json"
    CALIBRATION.save(measured)
    line = '{{"timestamp": {}, "input_length": 64, "output_length": 3, "prefix_id": "a", "prefix_length": 40}}\n'
    trace.write_text(line.format(70_000) + line.format(71_000))
    given = ["m", "--trace", str(trace), "--time-scale", "0.001", "--calibration", str(measured)]
    found = json.loads(called(*given, "--json"))
    assert (found["requests"], found["steps"]) == (2, 6)
    first = CALIBRATION.step_s(Work.of([], [(0, 64)]))
    second = CALIBRATION.step_s(Work.of([], [(40, 24)]))  # the first one's prefix is in the cache
    assert found["ttft_ms"]["mean"] == pytest.approx(1e3 * (first + second) / 2)
    assert found["hit_rate"] == pytest.approx(40 / 128)
    assert "m on 1 x a bench" in called(*given)
    refused = CliRunner().invoke(main, ["simulate", *given, "--prefill-replicas", "1"])
    assert refused.exit_code == 1
    assert "leave --prefill-replicas out" in refused.output
    trace.write_text("{}\n")
    assert "t.jsonl line 1: input_length is missing" in CliRunner().invoke(main, ["simulate", *given]).output


def test_the_command(tmp_path: Path) -> None:
    run = CliRunner().invoke(main, ["simulate", "llama-1b", "--requests", "40", "--json"])
    assert run.exit_code == 0, run.output
    found = json.loads(run.output)
    assert found["requests"] == 40
    assert found["ttft_ms"]["p50"] > 0
    assert "rate" in CliRunner().invoke(main, ["simulate", "llama-1b", "--rate", "-1"]).output


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--burst -1", "burst must be"), ("--burst 0", "burst must be"), ("--prompt 0", "prompt must be"),
        ("--prompt -5", "prompt must be"), ("--output 0", "output must be"), ("--prefix -10", "prefix must be"),
        ("--groups 0 --prefix 10", "groups must be"), ("--tp 0", "--tp"), ("--tp 3", "allow 1, 2, 4, 8"),
        ("--tp 64", "allow 1, 2, 4, 8"), ("--ttft -1", "--ttft"), ("--price nan", "--price"),
        ("--quant fp8 --hardware a100", "no fp8"), ("--rate -1", "rate must be"), ("--hardware abacus", "known are"),
        ("--trace {trace} --time-scale -1", "time scale must be"), ("--trace {trace} --time-scale nan", "time scale"),
        ("--trace {bytes}", "no text in UTF-8"), ("--requests 0", "--requests"), ("--replicas 0", "--replicas"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(tmp_path: Path, words: str, says: str) -> None:
    (tmp_path / "t.jsonl").write_text('{"timestamp": 1, "input_length": 5, "output_length": 1}')
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe\x00")
    words = words.format(trace=tmp_path / "t.jsonl", bytes=tmp_path / "b.jsonl")
    run = CliRunner().invoke(main, ["simulate", "llama-1b", "--requests", "3", *words.split()])
    assert run.exit_code in (1, 2)
    assert says in run.output
    assert "Traceback" not in run.output
    assert run.exception is None or isinstance(run.exception, SystemExit)
