"""Plans hold together: they fit, they meet what they say, they grow with demand, and impossible ones say why."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from septet.advisor.arrangement import paged_waste, static_waste
from septet.advisor.calibrate import Calibration
from septet.advisor.capacity import BUSY, Demand, make_plan, plan_of_calibration
from septet.advisor.estimate import QUANTS
from septet.advisor.hardware import hardware, known_models, model_shape
from septet.cli.main import main
from septet.errors import InvalidRequest, OutOfMemory
from septet.geometry import parameter_count

if TYPE_CHECKING:
    from pathlib import Path


def fits(model: str, card: str) -> bool:
    """Four-bit weights on all devices of a node, with a tenth to spare."""
    h, (config, _) = hardware(card), model_shape(model)
    return parameter_count(config) * QUANTS["int4"] < 0.8 * h.per_node * h.memory_mib * 2**20


@pytest.mark.parametrize("model", known_models())
@pytest.mark.parametrize("card", ["h100", "a100", "rtx4090", "m3max"])
def test_a_plan_fits_and_counts(model: str, card: str) -> None:
    config, _ = model_shape(model)
    demand = Demand(users=500)
    if (model, card) in (("llama-70b", "rtx4090"), ("llama-70b", "m3max")) and not fits(model, card):
        with pytest.raises(OutOfMemory, match=r"does not fit|needs"):
            make_plan(model, config, hardware(card), replace(demand, users=1), max_devices=1, check=False)
        return
    plan = make_plan(model, config, hardware(card), demand, check=False)
    for option in plan.options:
        if not option.streams:
            assert option.why_not
            continue
        assert option.streams * (demand.prompt + demand.output) <= option.kv_tokens
        assert option.devices == option.replicas * option.tp * option.pp
        assert option.requests_per_s * demand.output == pytest.approx(option.tokens_per_s)
        roomy = option.rows <= BUSY * option.streams
        assert option.meets == (option.tpot_ms <= demand.tpot_ms and option.ttft_ms <= demand.ttft_ms and roomy)
        stay_s = (option.ttft_ms + demand.output * option.tpot_ms) / 1e3
        assert option.rows * option.replicas == pytest.approx(option.requests_per_s * stay_s, rel=1e-6), "Little's law"
    cheapest = [o.usd_per_hour for o in plan.options if o.meets]
    assert not cheapest or plan.best.usd_per_hour == min(cheapest)
    assert plan.runnable is None or (plan.runnable.tp, plan.runnable.pp) == (1, 1)


def test_ten_thousand_users_of_a_70b() -> None:
    """The answer is simulated, and meets what it says; the arithmetic grows with the demand."""
    config, _ = model_shape("llama-70b")
    demand = Demand(users=10_000, shared=512)
    plan = make_plan("llama-70b", config, hardware("h100"), demand, quants=("fp8",))
    assert plan.best.meets
    assert plan.best.tp >= 2, "70B in bf16 or fp8 needs several cards"
    checked = plan.checked
    assert checked is not None
    assert checked.ttft_ms <= checked.ttft_p95_ms <= demand.ttft_ms
    assert checked.tpot_ms <= checked.tpot_p95_ms <= demand.tpot_ms
    assert checked.goodput_share > 0.9
    cost = {}
    for name, other in (("same", demand), ("twice", replace(demand, users=20_000)), ("new", Demand(users=10_000))):
        cost[name] = make_plan("llama-70b", config, hardware("h100"), other, check=False).best.usd_per_hour
    assert 1.8 < cost["twice"] / cost["same"] < 2.2
    assert cost["new"] > cost["same"]
    assert {known for known, _ in plan.notes} >= {"arithmetic", "rule of thumb", "fact", "published"}


def test_few_users_get_the_whole_engine() -> None:
    config, _ = model_shape("llama-1b")
    plan = make_plan("llama-1b", config, hardware("h100"), Demand(users=50))
    assert plan.best.replicas == 1
    assert plan.best.streams > 100
    assert plan.checked is not None
    assert plan.checked.ttft_p95_ms < 500


def test_a_demand_that_nothing_meets_is_said_to_be_missed() -> None:
    config, _ = model_shape("llama-8b")
    plan = make_plan("llama-8b", config, hardware("h100"), Demand(users=100, tpot_ms=0.1), check=False)
    assert not plan.best.meets
    assert "TPOT" in plan.best.why_not


def test_a_model_larger_than_a_node_is_cut_into_a_pipeline() -> None:
    config, _ = model_shape("llama-70b")
    plan = make_plan("llama-70b", config, hardware("rtx4090"), Demand(users=10), check=False, quants=("bf16",))
    assert plan.best.pp > 1
    assert plan.best.devices == plan.best.replicas * plan.best.tp * plan.best.pp


def test_what_a_plan_says_of_septet_is_true_of_the_card() -> None:
    config, _ = model_shape("llama-1b")
    said = {
        card: dict(make_plan("llama-1b", config, hardware(card), Demand(users=5), check=False, quants=("bf16",)).notes)
        for card in ("h100", "mi300x", "m3max")
    }
    assert "septet serve llama-1b" in said["h100"]["fact"]
    assert "not for this machine" in said["mi300x"]["fact"]
    assert "not for this machine" in said["m3max"]["fact"]
    file = make_plan("x.gguf", config, hardware("h100"), Demand(users=5), 10**9, check=False)
    assert {o.quant for o in file.options} == {"file"}
    assert "measured" not in dict(file.notes), "nothing packed was measured on this card"


MEASURED = Calibration(
    model="m", machine="a bench", step=0.01, row=0.001, prompt_token=0.0005, context_token=1e-6, pair=1e-7,
    kv_slots=8192, max_num_seqs=32, max_num_batched_tokens=512, max_model_len=1024,
)  # fmt: skip


def test_a_calibration_is_planned_with(tmp_path: Path) -> None:
    demand = Demand(users=40, prompt=100, output=50, think_s=20, ttft_ms=1000)
    plan = plan_of_calibration(MEASURED, hardware("cpu"), demand)
    assert plan.best.meets
    assert (plan.best.streams, plan.best.quant) == (32, "measured")
    assert [known for known, _ in plan.notes][:2] == ["measured", "arithmetic"]
    with pytest.raises(InvalidRequest, match="1024 tokens"):
        plan_of_calibration(MEASURED, hardware("cpu"), Demand(users=1))
    MEASURED.save(tmp_path / "c.json")
    words = [
        "plan",
        "m",
        "--users",
        "5",
        "--prompt",
        "100",
        "--output",
        "50",
        "--calibration",
        str(tmp_path / "c.json"),
    ]
    assert "m on a bench, 5 users" in CliRunner().invoke(main, words).output
    assert "exclude each other" in CliRunner().invoke(main, [*words, "--hardware", "h100"]).output
    assert "is of 'm', not of 'n'" in CliRunner().invoke(main, ["plan", "n", *words[2:]]).output


def test_waste_formulas() -> None:
    assert static_waste(4096, 1024) == 0.75
    assert paged_waste(1024, 16) == 0.0
    assert paged_waste(1025, 16) == pytest.approx(15 / 1040)
    assert all(paged_waste(n, 1) == 0.0 for n in range(1, 50))


@pytest.mark.parametrize(
    "bad",
    [{"users": 0}, {"users": 5, "shared": 1024}, {"users": 5, "think_s": -1.0}, {"users": 5, "ttft_ms": float("nan")}],
)
def test_impossible_demands_are_refused_by_name(bad: dict[str, float]) -> None:
    with pytest.raises(InvalidRequest) as error:
        Demand(**bad)  # type: ignore[arg-type]
    assert error.value.param in bad


def test_the_command() -> None:
    run = CliRunner().invoke(main, ["plan", "llama-8b", "--users", "1000", "--json"])
    assert run.exit_code == 0, run.output
    assert json.loads(run.output)["best"]["meets"] is True
    text = CliRunner().invoke(main, ["plan", "llama-8b", "--users", "1000", "--no-check"]).output
    assert "an hour" in text
    assert "[rule of thumb]" in text
    assert "known are" in CliRunner().invoke(main, ["plan", "llama-8b", "--hardware", "abacus"]).output
    assert "llama-70b" in CliRunner().invoke(main, ["plan", "nobody", "--users", "1"]).output
    assert CliRunner().invoke(main, ["plan", "--list-hardware"]).output.count("data sheet") > 5
