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

from septet.cli.engine_options import Bytes, engine_options
from septet.cli.many import KeepAlive, Many, pool_of
from septet.cli.server_options import server_options, take_server
from septet.engine.spawn import EngineProcess
from septet.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from septet.cli.server_options import Server
    from septet.session.session import Session

__all__ = ["serve"]


@click.command()
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@click.option(
    "--keep-alive", type=KeepAlive(), help="How long an idle model stays loaded: 5m, 300, -1 = for ever [5m]."
)
@click.option("--memory-budget", type=Bytes(), default=0, help="For all loaded models, as 4G [0: auto].")
@click.option("--preload", multiple=True, metavar="MODEL", help="Load at start; stays unless --keep-alive.")
@click.option("--manage/--no-manage", default=None, help="Clients may pull, create and delete models [on loopback].")
@click.option("--model", "--model-path", "also", multiple=True, hidden=True, help="As other servers'; MODEL here.")
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
    also: tuple[str, ...],
    **options: Any,
) -> None:
    """Serve models over HTTP: the APIs of OpenAI, Ollama and others (docs/api.md).

    MODEL is a name (see `septet list`), a Hugging Face repo (org/name[:file.gguf]) or a path. One is loaded now and
    stays. Several, or all in the store if none is named, are loaded when they are asked for and unloaded when idle.
    """
    from septet.serve.guard import is_loopback

    models += also
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
    settings = server.settings
    engine = None if many.wanted else EngineProcess.spawn(warm=True)  # loads its libraries while this one does
    try:
        from septet.serve.app import Service, bind, serve_forever

        sock = bind(settings.host, settings.port)
    except BaseException:
        if engine is not None:
            engine.discard()
        raise
    try:
        async with _models(many, server, options, engine) as models:
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
async def _models(
    many: Many, server: Server, options: dict[str, Any], engine: EngineProcess | None
) -> AsyncIterator[Any]:
    """One session that stays, over `engine`, or the pool."""
    names = server.settings.served_names
    if many.wanted:
        if names:
            raise InvalidRequest("--served-model-name is for one model that stays loaded", param="served_model_name")
        async with pool_of(many, options) as pool:
            yield pool
        return
    from septet.cli.terminal import started

    async with started(many.names[0], options, engine) as session:
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
