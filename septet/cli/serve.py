"""`septet serve [MODEL...]`: the HTTP server of one model, of several, or of all that are pulled.

Takes the address first, then starts the engine, prints what was decided and why, and serves until a signal. One model
is loaded at start and stays; more are loaded and unloaded by the pool (`many.py`).
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import click

from septet.cli.many import KeepAlive, Many, pool_of
from septet.cli.server_options import server_options, take_server
from septet.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from septet.cli.server_options import Server
    from septet.session.session import Session

__all__ = ["engine_options", "serve"]

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


@click.command()
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@click.option(
    "--keep-alive", type=KeepAlive(), help="How long an idle model stays loaded: 5m, 300, -1 = for ever [5m]."
)
@click.option("--memory-budget", type=Bytes(), default=0, help="For all loaded models, as 4G [0: auto].")
@click.option("--preload", multiple=True, metavar="MODEL", help="Load at start, and keep.")
@click.option("--manage/--no-manage", default=None, help="Clients may pull, create and delete models [on loopback].")
@server_options
@click.option("--tool-call-parser", default="auto", show_default=True, help="How the model writes tool calls.")
@click.option("--reasoning-parser", default="auto", show_default=True, help="How it writes thoughts; none: as content.")
@click.option("--enable-auto-tool-choice", is_flag=True, hidden=True, help="As vLLM's; always on here.")
@engine_options
def serve(
    models: tuple[str, ...],
    keep_alive: float | None,
    memory_budget: int,
    preload: tuple[str, ...],
    manage: bool | None,
    enable_auto_tool_choice: bool,
    **options: Any,
) -> None:
    """Serve models over HTTP: the APIs of OpenAI, Ollama and others (docs/api.md).

    MODEL is a name (see `septet list`), a Hugging Face repo (org/name[:file.gguf]) or a path. One is loaded now and
    stays. Several, or all in the store if none is named, are loaded when they are asked for and unloaded when idle.
    """
    from septet.serve.guard import is_loopback

    server = take_server(options)
    if manage and models:
        raise InvalidRequest("--manage is for a server of the store: start it without naming a model", param="manage")
    many = Many(
        names=models,
        keep_alive_s=keep_alive,
        budget=memory_budget,
        preload=preload,
        manages=is_loopback(server.settings.host) if manage is None else manage,
    )
    sys.exit(asyncio.run(_serve(many, server, options)))


async def _serve(many: Many, server: Server, options: dict[str, Any]) -> int:
    from septet.serve.app import Service, bind, serve_forever

    settings = server.settings
    sock = bind(settings.host, settings.port)
    try:
        async with _models(many, server, options) as models:
            service = Service(models, settings, server.keys)
            port = sock.getsockname()[1]
            shown = f"[{settings.host}]" if ":" in settings.host else settings.host
            root = f"http{'s' if settings.ssl_certfile else ''}://{shown}:{port}"

            def ready() -> None:
                names = ", ".join(service.names) or "no model yet (septet pull smollm2)"
                click.echo(f"serving {names} at {root}/v1 (pid {_pid()})", err=True)
                if settings.page:
                    click.echo(f"chat and scope: {root}/", err=True)

            with server.around(service):
                return await serve_forever(service, sock, ready)
    finally:
        sock.close()


@asynccontextmanager
async def _models(many: Many, server: Server, options: dict[str, Any]) -> AsyncIterator[Any]:
    """One session that stays, or the pool."""
    names = server.settings.served_names
    if many.wanted:
        if names:
            raise InvalidRequest("--served-model-name is for one model that stays loaded", param="served_model_name")
        async with pool_of(many, options) as pool:
            yield pool
        return
    from septet.cli.run import started

    async with started(many.names[0], options) as session:
        print_choices(session)
        if not server.restarts:
            yield session
            return
        from septet.serve.restart import RestartedModel
        from septet.session.start import start_session

        restarted = RestartedModel(session, names, lambda: start_session(many.names[0], **options))
        try:
            yield restarted
        finally:
            await restarted.close()


def _pid() -> int:
    import os

    return os.getpid()


def print_choices(session: Session) -> None:
    """Every resolved setting with its reason, on standard error."""
    choices = session.client.info.choices
    wide = max((len(name) for name, _, _ in choices), default=0)
    broad = max((len(value) for _, value, _ in choices), default=0)
    for name, value, reason in choices:
        click.echo(f"  {name:<{wide}}  {value:<{broad}}  {reason}", err=True)
