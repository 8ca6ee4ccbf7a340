"""`septet plan MODEL`: how many devices for so many users, in which arrangement, at what cost, and why."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from septet.advisor.capacity import Option, Plan

__all__ = ["plan"]


@click.command()
@click.argument("model")
@click.option("--hardware", "machine", default="h100", show_default=True, help="Machine; --list-hardware names them.")
@click.option("--list-hardware", is_flag=True, help="Show the machines that are known, with their rates, and leave.")
@click.option("--users", type=int, default=100, show_default=True, help="Concurrent users.")
@click.option("--prompt", type=int, default=1024, show_default=True, help="Tokens of a prompt, history included.")
@click.option("--output", type=int, default=256, show_default=True, help="Tokens of an answer.")
@click.option(
    "--shared", type=int, default=0, show_default=True, help="Tokens of the prompt found in the prefix cache."
)
@click.option("--think", type=float, default=30.0, show_default=True, help="Seconds from an answer to the next prompt.")
@click.option("--ttft", type=float, default=500.0, show_default=True, help="Target: first token within so many ms.")
@click.option("--tpot", type=float, default=50.0, show_default=True, help="Target: ms per token after it.")
@click.option("--price", type=float, help="USD per device and hour [the table's assumption].")
@click.option("--json", "as_json", is_flag=True, help="The plan as JSON.")
def plan(
    model: str,
    machine: str,
    list_hardware: bool,
    users: int,
    prompt: int,
    output: int,
    shared: int,
    think: float,
    ttft: float,
    tpot: float,
    price: float | None,
    as_json: bool,
) -> None:
    """Plan capacity for MODEL: a known shape (llama-70b), a .gguf file, or a directory with config.json.

    \b
    septet plan llama-70b --hardware h100 --users 10000 --shared 512
    """
    from dataclasses import replace

    from septet.advisor.capacity import Demand, make_plan
    from septet.advisor.hardware import all_hardware, hardware, model_shape

    if list_hardware:
        for h in all_hardware():
            known = "measured" if h.measured else "data sheet, derated"
            click.echo(
                f"{h.name:8} {h.title:30} {h.memory_mib / 1024:6.0f} GiB {h.read_gb_s:7.0f} GB/s "
                f"{h.bf16_tflops:7.1f} TFLOP/s  ${h.usd_per_hour:.2f}/h  {known}"
            )
        return
    config, weights = model_shape(model)
    card = hardware(machine)
    if price is not None:
        if not 0 <= price < 1e6:
            raise click.BadParameter(f"{price:g} is no price per hour", param_hint="--price")
        card = replace(card, usd_per_hour=price)
    demand = Demand(users=users, prompt=prompt, output=output, shared=shared, think_s=think, ttft_ms=ttft, tpot_ms=tpot)
    made = make_plan(model, config, card, demand, weights)
    click.echo(json.dumps(made.data(), indent=1) if as_json else "\n".join(_lines(made, card.title)))


def _lines(made: Plan, title: str) -> list[str]:
    d, b = made.demand, made.best
    return [
        f"{made.model} on {title}, {d.users:,} users ({d.prompt} tokens in, {d.shared} of them cached, {d.output} out, "
        f"{d.think_s:g} s to think): {made.requests_per_s:,.1f} requests/s, {made.active:,} answers under way",
        "",
        ("" if b.meets else "NO ARRANGEMENT MEETS THE TARGETS; the closest: ")
        + f"{b.replicas} replicas of {b.tp} device{'s' * (b.tp > 1)} ({b.devices} in all), {b.quant}, "
        f"up to {b.batch} streams each",
        f"  TTFT {b.ttft_ms:.0f} ms (target {d.ttft_ms:.0f}), TPOT {b.tpot_ms:.1f} ms (target {d.tpot_ms:.0f}), "
        f"{b.tokens_per_s:,.0f} tokens/s a replica",
        f"  {b.weights_gib:.1f} GiB of weights and {b.kv_tokens:,} tokens of KV a replica",
        f"  ${b.usd_per_hour:,.2f} an hour, ${b.usd_per_million:.2f} per million output tokens at this load",
        "",
        f"  {'weights':8}{'tp':>3}{'streams':>9}{'TPOT ms':>9}{'TTFT ms':>9}{'replicas':>10}{'devices':>9}{'$/h':>10}",
        *(_row(option, option is b or option == b) for option in made.options),
        "",
        *(f"  [{known}] {statement}" for known, statement in made.notes),
    ]


def _row(o: Option, best: bool) -> str:
    head = f"{'>' if best else ' '} {o.quant:8}{o.tp:>3}"
    if not o.batch:
        return f"{head}  {o.why_not}"
    times: Any = (
        f"{o.batch:>9}{o.tpot_ms:>9.1f}{o.ttft_ms:>9.0f}{o.replicas:>10,}{o.devices:>9,}{o.usd_per_hour:>10,.2f}"
    )
    return f"{head}{times}  {o.why_not}"
