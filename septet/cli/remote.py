"""`septet ps` and `septet stop`: a running server, asked over HTTP.

Standard library only: these are commands of a moment. Speaks the server's Ollama dialect. The address is `--server` or
SEPTET_SERVER, a key SEPTET_API_KEY.
"""

from __future__ import annotations

import http.client
import json
import os
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

import click

from septet.errors import InvalidRequest, OfflineError, SeptetError

__all__ = ["ps", "stop"]

TIMEOUT_S = 30.0
MAX_ANSWER = 2**24

_server = click.option(
    "--server", envvar="SEPTET_SERVER", default="http://127.0.0.1:8000", show_default=True, help="Of the server."
)


@click.command()
@_server
def ps(server: str) -> None:
    """List the models that a running server has loaded."""
    rows = [("NAME", "MEMORY", "CONTEXT", "IN USE", "UNTIL")]
    for model in _ask(server, "GET", "/api/ps")["models"]:
        users = model.get("users", 0)
        rows.append(
            (
                str(model["name"]).removesuffix(":latest"),
                f"{model['size'] / 2**20:.0f} MiB",
                str(model["context_length"]),
                f"{users} request{'' if users == 1 else 's'}",
                "in use" if users else _until(str(model["expires_at"])),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@click.command()
@click.argument("model")
@_server
def stop(model: str, server: str) -> None:
    """Unload MODEL from a running server, as soon as nobody uses it."""
    _ask(server, "POST", "/api/generate", {"model": model, "keep_alive": 0})
    click.echo(f"{model} is unloaded, or will be once nobody uses it")


def _until(expires_at: str) -> str:
    left_s = (datetime.fromisoformat(expires_at.replace("Z", "+00:00")) - datetime.now(UTC)).total_seconds()
    if left_s > 365 * 86400:
        return "stays"
    return f"{left_s / 60:.0f} min" if left_s >= 90 else f"{max(0, left_s):.0f} s"


def _ask(server: str, method: str, path: str, body: Any = None) -> Any:
    """The server's JSON answer. Its own error's words are raised."""
    parts = urlsplit(server if "://" in server else f"http://{server}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InvalidRequest(f"{server} is no address of a server; write http://127.0.0.1:8000", param="server")
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    key = next(iter(os.environ.get("SEPTET_API_KEY", "").split()), None)
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
    connection = kind(parts.hostname, parts.port, timeout=TIMEOUT_S)
    try:
        connection.request(method, path, json.dumps(body) if body is not None else None, headers)
        response = connection.getresponse()
        told = json.loads(response.read(MAX_ANSWER))
    except (OSError, http.client.HTTPException) as error:
        raise OfflineError(f"no server answers at {server} ({error}); start one: septet serve") from None
    except ValueError:
        raise SeptetError(f"what answers at {server} is no Septet server") from None
    finally:
        connection.close()
    if response.status >= 400:
        said = told.get("error") if isinstance(told, dict) else None
        words = said.get("message") if isinstance(said, dict) else said
        raise SeptetError(f"the server refused: {words or response.status}")
    return told
