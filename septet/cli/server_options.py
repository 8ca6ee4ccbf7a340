"""Flags of `septet serve` that concern the server and not the engine: who may ask, how much, what is logged.

Used by `serve.py`, which knows models and engines. Turns flags into `Settings`, `Keys`, an access log and traces; every
wrong value is told before a model is loaded.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from septet.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from septet.serve.keys import Keys
    from septet.serve.service import Service, Settings

__all__ = ["Server", "server_options", "take_server"]

_SECONDS = click.FloatRange(min=0)
_FILE = click.Path(dir_okay=False)

_OPTIONS = (
    click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on."),
    click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one."),
    click.option("--served-model-name", multiple=True, help="Name in the API; again for each alias [the model's]."),
    click.option("--allowed-host", multiple=True, help="Host header to accept besides loopback names."),
    click.option("--allowed-origin", multiple=True, help="Web origin whose pages may use the server."),
    click.option(
        "--api-key",
        multiple=True,
        metavar="KEY",
        envvar="SEPTET_API_KEY",
        help="Ask for this key, from 16 characters [none].",
    ),
    click.option("--api-key-file", type=_FILE, help="Hashed keys with their limits (see `septet key new`)."),
    click.option("--allow-no-key", is_flag=True, help="Serve beyond loopback without any key."),
    click.option("--ssl-certfile", type=_FILE, help="Serve HTTPS with this certificate chain (PEM)."),
    click.option("--ssl-keyfile", type=_FILE, help="Its private key, if not in the same file."),
    click.option(
        "--max-waiting-tokens",
        type=click.IntRange(min=0),
        metavar="N",
        default=0,
        help="Prompt tokens that may wait before more are refused with 429 [0: no limit].",
    ),
    click.option("--request-timeout", type=_SECONDS, default=0.0, help="Seconds each request may take [0: no limit]."),
    click.option(
        "--shutdown-timeout", type=_SECONDS, default=30.0, show_default=True, help="Seconds for open requests."
    ),
    click.option("--stall-timeout", type=_SECONDS, default=60.0, show_default=True, help="End an engine this silent."),
    click.option("--restart-engine", is_flag=True, help="Start the engine again if it dies, instead of ending."),
    click.option(
        "--access-log",
        type=click.Choice(["off", "text", "json"]),
        default="text",
        show_default=True,
        help="One line for each request.",
    ),
    click.option("--access-log-file", type=_FILE, help="Append it to this file [standard error]."),
    click.option("--otlp-traces-endpoint", metavar="URL", help="Send OpenTelemetry traces there (septet[otel])."),
    click.option("--page/--no-page", default=True, help="The chat and the scope at /."),
)
_NAMES = [
    "host",
    "port",
    "served_model_name",
    "allowed_host",
    "allowed_origin",
    "api_key",
    "api_key_file",
    "allow_no_key",
    "ssl_certfile",
    "ssl_keyfile",
    "max_waiting_tokens",
    "request_timeout",
    "shutdown_timeout",
    "stall_timeout",
    "restart_engine",
    "access_log",
    "access_log_file",
    "otlp_traces_endpoint",
    "page",
]


def server_options(command: Any) -> Any:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@dataclass(frozen=True, slots=True)
class Server:
    """What the flags say."""

    settings: Settings
    keys: Keys
    flags: dict[str, Any]

    @property
    def restarts(self) -> bool:
        return bool(self.flags["restart_engine"])

    def read_keys(self) -> Keys:
        from septet.serve.keys import Keys

        path = self.flags["api_key_file"]
        return Keys.load(Path(path) if path else None, self.flags["api_key"])

    @contextlib.contextmanager
    def around(self, service: Service) -> Iterator[None]:
        """The logs and the traces of a service, and its keys again on SIGHUP."""
        import os

        from septet import log
        from septet.serve.access_log import AccessLog
        from septet.serve.tracing import Tracing

        with contextlib.ExitStack() as stack:
            stack.enter_context(log.beside(os.environ.get("SEPTET_LOG_LEVEL", "INFO")))
            if self.flags["access_log"] != "off":
                service.access_log = AccessLog(self.flags["access_log"], self.flags["access_log_file"])
                stack.callback(service.access_log.close)
            if self.flags["otlp_traces_endpoint"]:
                service.tracing = Tracing.to(self.flags["otlp_traces_endpoint"])
                stack.callback(service.tracing.close)
            if self.flags["api_key_file"]:
                self._reread_on_hangup(service)
            yield

    def _reread_on_hangup(self, service: Service) -> None:
        import asyncio
        import signal

        def reread() -> None:
            try:
                service.keys = self.read_keys()
                click.echo(f"{len(service.keys)} API keys read again", err=True)
            except InvalidRequest as error:
                click.echo(f"the API keys stay as they were: {error.message}", err=True)

        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reread)


BESIDE = 1024
"""Requests of batches that an engine may have to hold beside those that the server lets wait."""


def take_server(options: dict[str, Any]) -> Server:
    """Take the server's flags out of `options`; InvalidRequest for what can't be."""
    from septet.serve.guard import is_loopback
    from septet.serve.running import check_tls
    from septet.serve.service import Settings

    flags = {name: options.pop(name) for name in _NAMES}
    settings = Settings(
        host=flags["host"],
        port=flags["port"],
        served_names=flags["served_model_name"],
        allowed_hosts=flags["allowed_host"],
        allowed_origins=flags["allowed_origin"],
        ssl_certfile=flags["ssl_certfile"],
        ssl_keyfile=flags["ssl_keyfile"],
        page=flags["page"],
        max_waiting=options["max_waiting"],
        max_waiting_tokens=flags["max_waiting_tokens"],
        request_timeout_s=flags["request_timeout"],
        drain_s=flags["shutdown_timeout"],
        kill_silent_s=flags["stall_timeout"],
    )
    options["max_waiting"] += BESIDE  # of the engine: the server's own bound comes first
    check_tls(settings)
    server = Server(settings, Server(settings, None, flags).read_keys(), flags)  # type: ignore[arg-type]
    if not len(server.keys) and not is_loopback(settings.host) and not flags["allow_no_key"]:
        raise InvalidRequest(
            f"listening on {settings.host} without a key would let anybody on the network use this server: give "
            "--api-key-file or --api-key, or --allow-no-key if that is meant",
            param="host",
        )
    return server
