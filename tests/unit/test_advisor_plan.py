"""Plans hold together: they fit, they meet what they say, they grow with demand, and impossible ones say why."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from septet.advisor.capacity import Demand, make_plan, paged_waste, static_waste
from septet.advisor.estimate import QUANTS
from septet.advisor.hardware import hardware, known_models, model_shape
from septet.cli.main import main
from septet.errors import InvalidRequest, OutOfMemory
from septet.geometry import parameter_count


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
        with pytest.raises(OutOfMemory, match="does not fit"):
            make_plan(model, config, hardware(card), demand)
        return
    plan = make_plan(model, config, hardware(card), demand)
    for option in plan.options:
        if not option.batch:
            assert option.why_not
            continue
        assert option.batch * (demand.prompt + demand.output) <= option.kv_tokens
        assert option.devices == option.replicas * option.tp
        assert option.meets == (option.tpot_ms <= demand.tpot_ms and option.ttft_ms <= demand.ttft_ms)
    cheapest = [o.usd_per_hour for o in plan.options if o.meets]
    assert not cheapest or plan.best.usd_per_hour == min(cheapest)
    assert plan.best.replicas * plan.best.batch >= plan.active


def test_ten_thousand_users_of_a_70b() -> None:
    config, _ = model_shape("llama-70b")
    plan = make_plan("llama-70b", config, hardware("h100"), Demand(users=10_000, shared=512))
    assert plan.best.meets
    assert plan.best.tp >= 2, "70B in bf16 or fp8 needs several cards"
    more = make_plan("llama-70b", config, hardware("h100"), Demand(users=20_000, shared=512))
    assert 1.8 < more.best.usd_per_hour / plan.best.usd_per_hour < 2.2
    unshared = make_plan("llama-70b", config, hardware("h100"), Demand(users=10_000))
    assert unshared.best.usd_per_hour > plan.best.usd_per_hour
    assert {known for known, _ in plan.notes} >= {"arithmetic", "rule of thumb", "fact"}


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
    text = CliRunner().invoke(main, ["plan", "llama-8b", "--users", "1000"]).output
    assert "an hour" in text
    assert "[rule of thumb]" in text
    assert "known are" in CliRunner().invoke(main, ["plan", "llama-8b", "--hardware", "abacus"]).output
    assert "llama-70b" in CliRunner().invoke(main, ["plan", "nobody", "--users", "1"]).output
    assert CliRunner().invoke(main, ["plan", "x", "--list-hardware"]).output.count("data sheet") > 5
