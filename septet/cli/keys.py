"""`septet key new NAME`: an API key, and what `--api-key-file` must hold of it."""

from __future__ import annotations

import click

__all__ = ["key"]


@click.group()
def key() -> None:
    """API keys for `septet serve --api-key-file`."""


@key.command()
@click.argument("name")
@click.option("--requests-per-minute", type=click.IntRange(min=0), default=0, help="0: no limit.")
@click.option("--tokens-per-minute", type=click.IntRange(min=0), default=0, help="Prompt and output. 0: no limit.")
@click.option("--max-concurrent", type=click.IntRange(min=0), default=0, help="Requests under way. 0: no limit.")
@click.option("--role", type=click.Choice(["user", "admin"]), default="user", help="admin: may change models [user].")
@click.option("--weight", type=click.FloatRange(0.01, 100), default=1.0, help="Share of a busy engine [1].")
def new(
    name: str, requests_per_minute: int, tokens_per_minute: int, max_concurrent: int, role: str, weight: float
) -> None:
    """Make a key for NAME. It is shown once, on standard error; its hash goes to standard output:

    septet key new alice >> keys.toml
    """
    from septet.errors import InvalidRequest
    from septet.serve.keys import digest_of, new_key

    if not 0 < len(name) <= 64 or not name.isprintable() or set(name) & set('"\\'):
        raise InvalidRequest("a key's name has 1 to 64 printable characters, no quotes or backslashes", param="name")
    made = new_key()
    click.echo(f'[[key]]\nname = "{name}"\nsha256 = "{digest_of(made).hex()}"')
    for field, value in (
        ("requests_per_minute", requests_per_minute),
        ("tokens_per_minute", tokens_per_minute),
        ("max_concurrent", max_concurrent),
    ):
        if value:
            click.echo(f"{field} = {value}")
    if role != "user":
        click.echo(f'role = "{role}"')
    if weight != 1.0:
        click.echo(f"weight = {weight:g}")
    click.echo()
    click.echo(f"the key of {name}, shown once: {made}", err=True)
