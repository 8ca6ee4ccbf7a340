"""`septet plan MODEL`: how many devices for so many users, in which arrangement, at what cost, and why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from septet.advisor.capacity import Option, Plan

__all__ = ["plan"]


def _list_hardware(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if not wanted or ctx.resilient_parsing:
        return
    from septet.advisor.hardware import all_hardware

    for h in all_hardware():
        known = "measured" if h.measured else "data sheet, derated"
        click.echo(
            f"{h.name:8} {h.title:30} {h.memory_mib / 1024:6.0f} GiB {h.read_gb_s:7.0f} GB/s "
            f"{h.bf16_tflops:7.1f} TFLOP/s  ${h.usd_per_hour:.2f}/h  {known}"
        )
    ctx.exit()


@click.command()
@click.argument("model")
@click.option("--hardware", "machine", default="h100", show_default=True, help="Machine; --list-hardware names them.")
@click.option("--list-hardware", is_flag=True, is_eager=True, expose_value=False, callback=_list_hardware,
              help="Show the machines that are known, with their rates, and leave.")  # fmt: skip
@click.option("--users", type=int, default=100, show_default=True, help="Concurrent users.")
@click.option("--prompt", type=int, default=1024, show_default=True, help="Tokens of a prompt, history included.")
@click.option("--output", type=int, default=256, show_default=True, help="Tokens of an answer.")
@click.option(
    "--shared", type=int, default=0, show_default=True, help="Tokens of the prompt found in the prefix cache."
)
@click.option("--think", type=float, default=30.0, show_default=True, help="Seconds from an answer to the next prompt.")
@click.option("--ttft", type=float, default=500.0, show_default=True, help="Target: 95 % of first tokens within so "
              "many ms.")  # fmt: skip
@click.option("--tpot", type=float, default=50.0, show_default=True, help="Target: 95 % of answers within so many ms "
              "per token after it.")  # fmt: skip
@click.option("--quant", "quants", multiple=True, type=click.Choice(["bf16", "fp8", "int8", "int4"]),
              help="Consider these alone [all].")  # fmt: skip
@click.option("--devices", type=click.IntRange(1), help="At most so many devices.")
@click.option("--calibration", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Measured step times "
              "and limits of one machine (septet.bench.simulated --calibration), instead of --hardware.")  # fmt: skip
@click.option("--price", type=float, help="USD per device and hour [the table's assumption].")
@click.option("--check/--no-check", default=True, show_default=True, help="Simulate what is chosen.")
@click.option("--json", "as_json", is_flag=True, help="The plan as JSON.")
@click.pass_context
def plan(ctx: click.Context, model: str, machine: str, price: float | None, as_json: bool, **given: Any) -> None:
    """Plan capacity for MODEL: a known shape (llama-70b), a model of the store, a .gguf file, or a directory with
    config.json.

    \b
    septet plan llama-70b --hardware h100 --users 10000 --shared 512
    septet plan smollm2 --calibration here.json --users 20
    """
    from dataclasses import replace

    from septet.advisor.calibrate import load
    from septet.advisor.capacity import Demand, make_plan, plan_of_calibration
    from septet.advisor.hardware import hardware, model_shape

    demand = Demand(users=given["users"], prompt=given["prompt"], output=given["output"], shared=given["shared"],
                    think_s=given["think"], ttft_ms=given["ttft"], tpot_ms=given["tpot"])  # fmt: skip
    card = hardware("cpu" if given["calibration"] else machine)
    if price is not None:
        if not 0 <= price < 1e6:
            raise click.BadParameter(f"{price:g} is no price per hour", param_hint="--price")
        card = replace(card, usd_per_hour=price)
    if given["calibration"] is not None:
        refuse_beside_calibration(ctx, "machine", "quants", "devices")
        measured = load(given["calibration"])
        measured.refuse_other(model)
        made, title = plan_of_calibration(measured, card, demand, given["check"]), measured.machine
    else:
        config, weights = model_shape(model)
        title = card.title
        made = make_plan(model, config, card, demand, weights, quants=given["quants"],
                         max_devices=given["devices"] or 0, check=given["check"])  # fmt: skip
    click.echo(json.dumps(made.data(), indent=1) if as_json else "\n".join(_lines(made, title)))


def refuse_beside_calibration(ctx: click.Context, *names: str) -> None:
    """Options that a calibration takes the place of."""
    for parameter in ctx.command.params:
        source = ctx.get_parameter_source(parameter.name or "")
        if parameter.name in names and source is click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError(f"{parameter.opts[0]} and --calibration exclude each other: it was measured there")


def _lines(made: Plan, title: str) -> list[str]:
    d, b, c = made.demand, made.best, made.checked
    lines = [
        f"{made.model} on {title}, {d.users:,} users ({d.prompt:,} tokens in, {d.shared:,} of them cached, "
        f"{d.output:,} out, {d.think_s:g} s to think): {b.requests_per_s:,.1f} requests/s, answers under "
        f"way {made.active:,}",
        "",
        ("" if b.meets else "NO ARRANGEMENT MEETS THE TARGETS; the closest: ") + _arranged(b),
    ]
    lines.append(
        f"  arithmetic, mean: TTFT {b.ttft_ms:,.0f} ms, TPOT {b.tpot_ms:.1f} ms; {b.rows:,.0f} of {b.streams} streams "
        "in use"
    )
    if c is not None:
        lines.append(
            f"  simulated: TTFT mean {c.ttft_ms:,.0f}, p95 {c.ttft_p95_ms:,.0f} ms (target {d.ttft_ms:,.0f}); TPOT "
            f"mean {c.tpot_ms:.1f}, p95 {c.tpot_p95_ms:.1f} ms (target {d.tpot_ms:g}); {c.goodput_share:.0%} of "
            f"{c.requests:,} requests within both"
        )
    lines += [
        f"  {b.tokens_per_s:,.0f} output tokens/s in all, {b.tokens_per_s / b.replicas:,.0f} a replica",
        f"  {b.weights_gib:.1f} GiB of weights and a pool of {b.kv_tokens:,} tokens a replica",
        f"  ${b.usd_per_hour:,.2f} an hour, ${b.usd_per_million:.2f} per million output tokens of this demand",
    ]
    if made.runnable is not None:
        r = made.runnable
        lines += ["", f"What this release of Septet runs itself: {_arranged(r)}, ${r.usd_per_hour:,.2f} an hour "
                  "(arithmetic alone)"]  # fmt: skip
    head = (
        f"  {'weights':8} {'tp':>3} {'pp':>3} {'open':>7} {'TPOT ms':>8} {'TTFT ms':>8} {'replicas':>9} {'devices':>9}"
    )
    lines += ["", f"All arrangements, by arithmetic (means):\n{head} {'$/h':>13}"]
    lines += [_row(option, (option.quant, option.tp, option.pp) == (b.quant, b.tp, b.pp)) for option in made.options]
    if not any(o == b for o in made.options):
        lines.append("  (the chosen one has more replicas than its row: the simulation of fewer missed the targets)")
    return [*lines, "", *(f"  [{known}] {statement}" for known, statement in made.notes)]


def _arranged(o: Option) -> str:
    devices = f"{o.devices // o.replicas} device{'s' * (o.devices > o.replicas)}"
    split = f" (tp {o.tp}{f', pp {o.pp}' if o.pp > 1 else ''})" if o.devices > o.replicas else ""
    many = "1 replica" if o.replicas == 1 else f"{o.replicas:,} replicas"
    kind = "as measured" if o.quant == "measured" else "the file's weights" if o.quant == "file" else o.quant
    return f"{many} of {devices}{split}, {kind}: {o.devices:,} device{'s' * (o.devices > 1)} in all"


def _row(o: Option, best: bool) -> str:
    head = f"{'>' if best else ' '} {o.quant:8} {o.tp:>3} {o.pp:>3}"
    if not o.streams:
        return f"{head}  {o.why_not}"
    return (
        f"{head} {o.rows:>7,.1f} {o.tpot_ms:>8,.1f} {o.ttft_ms:>8,.0f} {o.replicas:>9,} {o.devices:>9,} "
        f"{o.usd_per_hour:>13,.2f}  {o.why_not}"
    ).rstrip()
