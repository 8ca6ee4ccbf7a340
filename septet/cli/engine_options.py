"""The engine's flags, the same on every command that starts one. Imports click alone."""

from __future__ import annotations

from typing import Any

import click

__all__ = ["Bytes", "engine_options"]

_SIZES = {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


class Bytes(click.ParamType):
    """A number of bytes, with an optional unit: 512M, 4GiB, 1073741824."""

    name = "bytes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        text = value.strip().lower().removesuffix("b").removesuffix("i")
        unit = _SIZES.get(text[-1:], 1)
        number = text[:-1] if unit > 1 else text
        try:
            size = round(float(number) * unit)
        except (ValueError, OverflowError):
            size = -1
        if size < 0:
            self.fail(f"{value!r} is no number of bytes; write 512M or 4G", param, ctx)
        return size


_COUNT = click.IntRange(min=0)


def _choice(flag: str, values: str, help: str) -> Any:
    return click.option(flag, type=click.Choice(values.split()), default="auto", show_default=True, help=help)


_ENGINE_OPTIONS = (
    click.option("--max-model-len", type=_COUNT, metavar="N", default=0, help="Tokens per request [0: the model's]."),
    click.option("--max-num-seqs", type=_COUNT, metavar="N", default=0, help="Requests per step [0: auto]."),
    click.option("--max-num-batched-tokens", type=_COUNT, metavar="N", default=0, help="Tokens per step [0: auto]."),
    click.option(
        "--max-waiting",
        type=click.IntRange(min=1),
        metavar="N",
        default=4096,
        show_default=True,
        help="Queued requests.",
    ),
    click.option("--num-kv-slots", type=_COUNT, metavar="N", default=0, help="Tokens the KV pool holds [0: auto]."),
    click.option("--kv-cache-memory", type=Bytes(), default=0, help="Bytes for the KV pool, as 512M or 4G [0: auto]."),
    click.option(
        "--gpu-memory-utilization",
        "memory_utilization",
        type=float,
        default=0.9,
        show_default=True,
        help="Share of the GPU's memory to fill.",
    ),
    click.option(
        "--enable-prefix-caching/--no-enable-prefix-caching",
        default=True,
        show_default=True,
        help="Compute a shared beginning of prompts once.",
    ),
    _choice("--dtype", "auto float32 bfloat16 float16", "Of activations and the KV pool."),
    _choice("--device", "auto cpu cuda", "Where the model runs."),
    click.option("--enforce-eager", is_flag=True, help="No captured steps."),
    _choice("--overlap", "auto on off", "Plan a step while the one before it runs."),
    click.option(
        "--stream-gap-ms",
        type=click.IntRange(min=-1, max=10_000),
        metavar="N",
        default=-1,
        help="Tokens that follow others within N ms leave with the next ones [-1: auto; 0: each at once].",
    ),
    _choice("--load-format", "auto dummy", "dummy: random weights, nothing is read."),
    _choice("--kernels", "auto reference triton native", "Which versions of the numeric operations."),
)


def engine_options(command: Any) -> Any:
    """The engine's flags, the same on every command that starts one."""
    for option in reversed(_ENGINE_OPTIONS):
        command = option(command)
    return command
