"""Figures, comparisons and documents of `septet bench`: few runs, damage, other inputs."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

from septet.bench.harness.client import Sample
from septet.bench.harness.compare import compare
from septet.bench.harness.drive import Run
from septet.bench.harness.figures import figure, figures
from septet.bench.harness.limits import Limit
from septet.bench.harness.markdown import about, markdown
from septet.bench.harness.report import html
from septet.bench.harness.results import Results, run_of
from septet.bench.harness.targets import Target, fitted, target
from septet.bench.harness.workload import Workload, load
from septet.cli.main import main
from septet.config import ModelConfig
from septet.errors import InvalidRequest

if TYPE_CHECKING:
    from pathlib import Path

WORK = Workload(name="w", title="W", about="", kind="closed", streams=(2,), requests=4, prompt=8, output=10)


def samples(tpot_s: float, n: int = 4, tokens: int = 10, asked: int = 10) -> list[Sample]:
    one = Sample(sent=1.0, first=1.1, last=1.1 + tpot_s * (tokens - 1), tokens=tokens, asked=asked, counted=True)
    return [replace(one) for _ in range(n)]


def document(*tpots: float, work: Workload = WORK, model: str = "m", **head: Any) -> dict[str, Any]:
    """Of a target "t" whose runs had these seconds per token."""
    told = {"command": "bench", "commit": "c", "date": "2026-01-01", "machine": {"cpu": ["a"], "allowed_cores": 2},
            "seed": 0, "rounds": len(tpots), "scale": 1.0, "price": None, "limits": {}, **head}  # fmt: skip
    results = Results(told, workloads={work.name: work.data()}, finished=True)
    results.targets["t"] = {"name": "t", "title": "T", "model": model, "status": "measured", "why": "", "start_s": [],
                            "served_model": model, "version": "", "command": []}  # fmt: skip
    for number, tpot in enumerate(tpots):
        run = Run(wall_s=0.1 + 9 * tpot, samples=samples(tpot), expected=4)
        results.add("t", work, work.points()[0], run_of(run, work, number), None)
    return json.loads(json.dumps(results.document()))  # type: ignore[no-any-return]


# -- figures ----------------------------------------------------------------------------------------------------------
def test_few_runs_have_a_range_and_many_an_interval() -> None:
    assert figure([[5.0]], 50) == {"median": 5.0, "low": None, "high": None, "n": 1, "runs": 1}
    three = figure([[10.0, 10.2], [11.0, 11.2], [9.0, 9.2]], 50)
    assert (three["low"], three["high"], three["runs"]) == (9.1, 11.1, 3)
    six = figure([[10.0] * 50, [11.0] * 50, [9.0] * 50, [10.0] * 50, [10.0] * 50, [10.0] * 50], 50)
    assert six["median"] == 10.0
    assert 9.0 <= six["low"] <= 10.0 <= six["high"] <= 11.0  # type: ignore[operator]
    assert "lowest to highest of the 3 runs" in about(document(0.1, 0.1, 0.1))[1]
    assert "95 % bootstrap" in about(document(*[0.1] * 6))[1]
    assert "one run can't tell" in about(document(0.1))[1]


def test_a_run_counts_alike_however_many_requests_it_has() -> None:
    uneven = figure([[1.0] * 1000, [2.0] * 10, [3.0] * 10], 50)
    assert uneven["median"] == pytest.approx(2.0, abs=0.05)


def test_memory_is_the_highest_peak() -> None:
    runs = [{**document(0.1)["points"][0]["runs"][0], "memory_mib": mib} for mib in (100.0, 300.0, 200.0)]
    found = figures(runs)["memory_mib"]
    assert (found["median"], found["low"], found["high"]) == (300.0, 100.0, 300.0)


def test_short_answers_are_seen_where_lengths_vary() -> None:
    run = Run(wall_s=1.0, samples=[*samples(0.1, 1, 10, 10), *samples(0.1, 1, 20, 40)], expected=2)
    assert run_of(run, WORK, 0)["short"] == 1


def test_a_busy_or_late_client_is_said() -> None:
    for run, bound in ((Run(busy=0.97), True), (Run(busy=0.3, lags=[0.05] * 20), True), (Run(busy=0.3), False)):
        results = Results({"limits": {}})
        run.wall_s, run.samples, run.expected = 1.0, samples(0.1), 4
        results.add("t", WORK, WORK.points()[0], run_of(run, WORK, 0), None)
        told = results.document()
        assert told["points"][0]["client"]["bound"] is bound
        assert any("lower bound" in note for note in told["notes"]) is bound


def test_the_limit_counts_memory_and_where_known_computing() -> None:
    config = ModelConfig(
        architecture="llama", vocab_size=1000, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4,
        num_kv_heads=4, head_dim=16, norm_eps=1e-5, max_position=512,
    )  # fmt: skip
    limit = Limit("m", 1.0, "known", 10**6, config)
    work = replace(WORK, prompt=4096, output=16)
    kv = 2 * 2 * 4 * 16 * 2  # bytes a token: keys and values, layers, heads, width, float16
    assert limit.tokens_s(work, 2) == pytest.approx(2e9 / (10**6 + 2 * (4096 + 8) * kv))
    bound = replace(limit, flops=1e9).tokens_s(work, 2)
    assert bound is not None
    assert bound < limit.tokens_s(work, 2) / 10  # type: ignore[operator]
    assert limit.tokens_s(load("arrivals"), 1) is None


# -- comparisons ------------------------------------------------------------------------------------------------------
def verdicts(a: dict[str, Any], b: dict[str, Any]) -> dict[str, str]:
    return {change.figure: change.verdict(5.0) for change in compare(a, b)[0]}


def test_worse_is_beyond_the_threshold_with_intervals_apart() -> None:
    before = document(0.100, 0.101, 0.102)
    assert set(verdicts(before, before).values()) == {""}
    found = verdicts(before, document(0.120, 0.121, 0.122))
    assert (found["tpot_ms"], found["output_tokens_s"], found["ttft_ms"]) == ("worse", "worse", "")
    assert verdicts(document(0.120, 0.121, 0.122), before)["tpot_ms"] == "better"
    assert verdicts(before, document(0.100, 0.120, 0.140))["tpot_ms"] == "", "the intervals overlap"
    assert verdicts(before, document(0.103, 0.104, 0.104))["tpot_ms"] == "", "apart, but little"
    assert verdicts(document(0.1), document(0.2))["tpot_ms"] == "can't tell"


def test_what_is_not_there_is_no_regression_and_what_appears_counts() -> None:
    before, after = document(0.1, 0.1), document(0.1, 0.1)
    del after["points"][0]["figures"]["ttft_ms"]
    changes, gone, notes = compare(before, after)
    assert "ttft_ms" not in {change.figure for change in changes}
    assert not gone
    assert any("ttft_ms is not measured in the second" in note for note in notes)
    for name, median in (("output_tokens_s", 0.0), ("failed_share", 0.5)):
        other = document(0.1, 0.1)
        other["points"][0]["figures"][name] = {"median": median, "low": median, "high": median, "n": 2, "runs": 2}
        assert verdicts(before, other)[name] == "worse"
        assert verdicts(other, before)[name] == "better"


def test_what_else_differs_is_said() -> None:
    before = document(0.1, 0.1)
    after = document(0.1, 0.1, 0.1, model="other", seed=9)
    told = "\n".join(compare(before, after)[2])
    for word in ("another served model: m and other", "seed 0 and 9", "2 and 3 rounds", "one of 6 figures"):
        assert word in told
    with pytest.raises(InvalidRequest, match="workload w is not the same and not compared: output 10 and 20"):
        compare(before, document(0.1, 0.1, work=replace(WORK, output=20)))


def test_the_command_ends_with_1_where_something_became_worse(tmp_path: Path) -> None:
    files = {name: tmp_path / f"{name}.json" for name in ("fast", "slow", "none", "bad")}
    fast, slow = document(0.1, 0.1), document(0.2, 0.2)
    none = {**fast, "points": [{**fast["points"][0], "target": "u"}, *document(0.1, 0.1)["points"]]}
    for name, told in (("fast", fast), ("slow", slow), ("none", none)):
        files[name].write_text(json.dumps(told))

    def done(*words: str) -> tuple[int, str]:
        found = CliRunner().invoke(main, ["bench", "compare", *words])
        return found.exit_code, found.output

    code, said = done(str(files["fast"]), str(files["slow"]))
    assert code == 1, said
    assert said.count("REGRESSION") == 1, "one line a point"
    assert done(str(files["fast"]), str(files["slow"]), "--threshold", "150")[0] == 0
    assert done(str(files["fast"]), str(files["slow"]), "--figure", "ttft_ms")[0] == 0
    assert done(str(files["fast"]), str(files["slow"]), "--figure", "speed")[0] == 2
    assert done(str(files["slow"]), str(files["fast"]))[0] == 0
    assert done(str(files["none"]), str(files["fast"])) == (1, done(str(files["none"]), str(files["fast"]))[1])
    assert "GONE u, w" in done(str(files["none"]), str(files["fast"]))[1]
    for damage, says in (
        ("[]", "holds no results"),
        ('{"format": "septet-bench/1"}', "format 'septet-bench/1'"),
        ('{"format": "septet-bench/2"}', "is damaged: Object missing required field"),
        (json.dumps({**fast, "scale": "x"}), "$.scale"),
        ("{", "can't be read"),
    ):
        files["bad"].write_text(damage)
        for words in (["compare", str(files["fast"]), str(files["bad"])], ["report", str(files["bad"])]):
            found = CliRunner().invoke(main, ["bench", *words])
            assert found.exit_code in (1, 2), found.output
            assert says in found.output
            assert not found.exception or isinstance(found.exception, SystemExit)


# -- inputs -----------------------------------------------------------------------------------------------------------
def test_names_of_others_are_no_markup() -> None:
    told = document(0.1, 0.1)
    told["targets"][0]["served_model"] = "<script>x</script>|[a](http://b)\nrow"
    text, page = markdown(told), html(told)
    assert "<script>" not in text + page
    [row] = [line for line in text.splitlines() if line.startswith("| t | ") and "script" in line]
    assert row.replace("\\|", "").count("|") == 5
    assert "\\[a\\](http" in row


def test_engines_get_the_room_that_the_workloads_need() -> None:
    one = Target(name="x", title="x", model="", command=("x", "--ctx", "{tokens}", "--parallel", "{slots}", "{port}"),
                 environment={"N": "{context}"})  # fmt: skip
    found = fitted(one, [replace(WORK, streams=(1, 8), prompt=4096, output=16)])
    assert found.command == ("x", "--ctx", str(8 * 5632), "--parallel", "8", "{port}")
    assert found.environment == {"N": "5632"}
    many = fitted(one, [replace(WORK, streams=(256,), prompt=4096, output=16)])
    assert int(many.command[2]) <= 131_072


def test_a_program_given_takes_the_first_word(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import septet.bench.harness.targets as targets

    tool = tmp_path / "tool"
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    entry = {"title": "T", "launch": [["tool"]], "ready": "/", "named": "served", "fixed": {}}
    monkeypatch.setattr(targets, "known", lambda: {"t": entry})
    assert target("t:m", {"t": str(tool)}, {}).command == (str(tool),)
    assert "not installed: tool not found" in target("t:m", {}, {}).missing


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("kind = 'agents'\nrates = [1.0]", "kind 'agents' does not use rates"),
        ("kind = 'open'\nrates = [1.0]\nturns = 3", "kind 'open' does not use turns"),
        ("kind = 'closed'\nschema = {}", "schema is empty"),
    ],
)
def test_fields_that_a_kind_does_not_use_are_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f"title = 't'\nabout = ''\n{text}")
    with pytest.raises(InvalidRequest, match=says):
        load(str(path))


@pytest.mark.parametrize(
    "words",
    [
        ["--time-scale", "-1"], ["--time-scale", "nan"], ["--start-timeout", "-1"], ["--request-timeout", "nan"],
        ["--scale", "nan"], ["--price", "inf"], ["--workload", "agents", "--streams", "2"],
        ["--together", "--port", "8000", "--target", "septet:a", "--target", "septet:b"],
    ],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused(words: list[str], tmp_path: Path) -> None:
    found = CliRunner().invoke(main, ["bench", *words, "--out", str(tmp_path / "out")])
    assert found.exit_code == 2, found.output
    assert not (tmp_path / "out").exists()
