"""`septet simulate MODEL`: the real scheduler and cache over a virtual clock, for a trace or an arrival process."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from septet.advisor.arrangement import check_tp, engine_limits, fitting
from septet.advisor.calibrate import load
from septet.advisor.estimate import REQUEST_S, Estimator
from septet.advisor.simulate import Fleet
from septet.errors import InvalidRequest

if TYPE_CHECKING:
    from septet.advisor.arrivals import Arrival
    from septet.advisor.calibrate import Calibration

__all__ = ["simulate"]


@click.command()
@click.argument("model")
@click.option("--hardware", "machine", default="h100", show_default=True, help="Machine (septet plan --list-hardware).")
@click.option("--quant", type=click.Choice(["bf16", "fp8", "int8", "int4"]), default="bf16", show_default=True)
@click.option("--tp", type=click.IntRange(1), default=1, show_default=True, help="Devices that share each layer.")
@click.option("--replicas", type=click.IntRange(1, 100_000), default=1, show_default=True)
@click.option("--router", type=click.Choice(["round-robin", "least-loaded", "prefix"]), default="least-loaded",
              show_default=True)  # fmt: skip
@click.option(
    "--prefill-replicas",
    type=click.IntRange(0, 100_000),
    default=0,
    show_default=True,
    help="Prefill apart from decode.",
)
@click.option("--enable-prefix-caching/--no-enable-prefix-caching", "caching", default=True, show_default=True)
@click.option("--chunked-prefill/--no-chunked-prefill", "chunked", default=True, show_default=True)
@click.option("--trace", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="JSON lines: timestamp, "
              "input_length, output_length, prefix_id, prefix_length.")  # fmt: skip
@click.option(
    "--time-scale", type=float, default=1.0, show_default=True, help="Of timestamps: 0.001 where they are ms."
)
@click.option(
    "--requests",
    type=click.IntRange(1, 100_000_000),
    default=1000,
    show_default=True,
    help="Without a trace: how many.",
)
@click.option("--rate", type=float, default=10.0, show_default=True, help="Requests a second (Poisson).")
@click.option("--burst", type=float, default=1.0, show_default=True, help="Rate of busy phases over quiet ones.")
@click.option("--prompt", type=int, default=512, show_default=True, help="Mean tokens, the prefix not counted.")
@click.option("--output", type=int, default=128, show_default=True, help="Mean tokens.")
@click.option("--prefix", type=int, default=0, show_default=True, help="Shared tokens before each prompt.")
@click.option("--groups", type=int, default=1, show_default=True, help="Different prefixes.")
@click.option("--ttft", type=float, default=500.0, show_default=True, help="Target in ms, for goodput.")
@click.option("--tpot", type=float, default=50.0, show_default=True, help="Target in ms, for goodput.")
@click.option("--calibration", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="Measured step times and limits (python -m septet.bench.simulated --calibration), instead of "
              "--hardware, --quant and --tp.")  # fmt: skip
@click.option("--price", type=float, help="USD per device and hour [the table's assumption].")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True)
@click.pass_context
def simulate(
    ctx: click.Context, model: str, machine: str, quant: str, tp: int, price: float | None, as_json: bool, **given: Any
) -> None:
    """Simulate serving MODEL (a known shape, a model of the store, a .gguf file or a directory with config.json).

    \b
    septet simulate llama-8b --rate 20 --requests 2000 --prefix 1024 --groups 8
    septet simulate smollm2 --calibration here.json --rate 2 --requests 500
    """
    from septet.advisor.arrivals import Lengths, poisson, read_trace
    from septet.advisor.hardware import hardware, model_shape
    from septet.advisor.parallel import simulate_apart
    from septet.advisor.summary import summarise
    from septet.cli.plan import refuse_beside_calibration
    from septet.machine import usable_cpus

    for name in ("ttft", "tpot", "price"):
        value = price if name == "price" else given[name]
        if value is not None and not 0 <= value < 1e9:
            raise click.BadParameter(f"{value:g}: a number from 0 on is needed", param_hint=f"--{name}")
    if given["trace"] is not None:
        arrivals = read_trace(given["trace"], scale=given["time_scale"])
    else:
        lengths = Lengths(
            prompt=given["prompt"], output=given["output"], prefix=given["prefix"], groups=given["groups"]
        )
        arrivals = list(poisson(given["requests"], given["rate"], lengths, given["seed"], given["burst"]))
    if given["calibration"] is not None:
        refuse_beside_calibration(ctx, "machine", "quant", "tp")
        measured = load(given["calibration"])
        measured.refuse_other(model)
        card, tp, fleet = hardware("cpu"), 1, _measured_fleet(measured, given)
        title, known = f"{measured.model} on {fleet.replicas} x {measured.machine}", "measured on this machine"
    else:
        config, weights = model_shape(model)
        card = hardware(machine)
        check_tp(config, card, tp)
        if quant == "fp8" and not card.fp8_tflops:
            raise InvalidRequest(f"{card.title} has no fp8", param="quant")
        fleet = _estimated_fleet(Estimator(config, card, quant, tp, weights), arrivals, given)
        held = "the file's weights" if weights else quant
        title = f"{model} on {fleet.replicas + fleet.prefill_replicas} x {tp} {card.title}, {held}"
        fitted = card.measured and tp == 1 and quant == "bf16" and weights is None
        known = "fitted to measurements" if fitted else "arithmetic"
    if price is not None:
        card = replace(card, usd_per_hour=price)
    began = time.perf_counter()
    outcome = simulate_apart(fleet, arrivals, usable_cpus())
    took = time.perf_counter() - began
    found = summarise(outcome, ttft_ms=given["ttft"], tpot_ms=given["tpot"], usd_per_hour=tp * card.usd_per_hour)
    if as_json:  # nothing of this machine's clock: the same seed gives the same bytes
        click.echo(json.dumps({**found.data(), "steps": outcome.steps}, indent=1))
        return
    click.echo(f"{title}, {fleet.kv_slots:,} KV tokens each")
    click.echo("\n".join(found.lines()))
    click.echo(
        f"  simulated in {took:.1f} s ({outcome.steps:,} steps); step times are {known}; ${card.usd_per_hour:g} per "
        f"device and hour is {'an assumption' if price is None else 'as given'}"
    )


def _chosen(given: dict[str, Any]) -> dict[str, Any]:
    """What a fleet takes from the options as it is."""
    names = {"replicas": "replicas", "router": "router", "caching": "prefix_caching", "chunked": "chunked_prefill",
             "prefill_replicas": "prefill_replicas"}  # fmt: skip
    return {field: given[option] for option, field in names.items()}


def _estimated_fleet(step_model: Estimator, arrivals: list[Arrival], given: dict[str, Any]) -> Fleet:
    longest = max(a.prompt + a.output for a in arrivals)
    seqs, step = engine_limits(step_model.hardware)
    return Fleet(
        step_model=step_model,
        kv_slots=fitting(step_model, max_num_seqs=seqs, max_model_len=longest, max_num_batched_tokens=step),
        max_num_seqs=seqs,
        max_num_batched_tokens=step,
        max_model_len=longest + 1,
        request_s=REQUEST_S,
        overlap=step_model.hardware.kind != "cpu",
        hand_over_s=step_model.kv_bytes / (step_model.hardware.link_gb_s * 1e9),
        **_chosen(given),
    )


def _measured_fleet(measured: Calibration, given: dict[str, Any]) -> Fleet:
    if given["prefill_replicas"]:
        raise InvalidRequest(
            "a calibration says nothing of a link between machines: leave --prefill-replicas out", param="calibration"
        )
    return Fleet(
        step_model=measured,
        kv_slots=measured.kv_slots,
        max_num_seqs=measured.max_num_seqs,
        max_num_batched_tokens=measured.max_num_batched_tokens,
        max_model_len=measured.max_model_len,
        overlap=measured.overlap,
        **_chosen(given),
    )
