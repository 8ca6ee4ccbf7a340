"""`septet run MODEL [PROMPT]`: the command. What it does is in `terminal.py`, imported while the engine starts."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from septet.cli.engine_options import engine_options
from septet.engine.spawn import EngineProcess

if TYPE_CHECKING:
    from septet.structured import Structured

__all__ = ["run"]

MAX_STDIN = 64 * 2**20  # bytes


@click.command()
@click.argument("model")
@click.argument("prompt", required=False)
@click.option("--system", help="System message.")
@click.option("--temperature", type=float, default=0.7, show_default=True, help="0: always the likeliest token.")
@click.option("--top-p", type=float, default=1.0, show_default=True, help="Likeliest tokens up to this probability.")
@click.option("--top-k", type=int, default=0, help="This many of the likeliest tokens. 0: off.")
@click.option("--max-tokens", type=int, default=None, help="[default: up to the context's end]")
@click.option("--seed", type=int, default=None, help="The same seed gives the same answer.")
@click.option(
    "--schema", type=click.Path(exists=True, dir_okay=False), help="JSON schema that answers follow (a file)."
)
@click.option("--stats/--no-stats", default=True, help="TTFT, tokens/s and the cache's share after each answer.")
@engine_options
def run(
    model: str,
    prompt: str | None,
    system: str | None,
    temperature: float,
    top_p: float,
    top_k: int,
    max_tokens: int | None,
    seed: int | None,
    schema: str | None,
    stats: bool,
    **options: Any,
) -> None:
    """Ask MODEL one PROMPT, or chat with it.

    MODEL is a name (see `septet list`), a Hugging Face repo (org/name[:file.gguf]) or a path. Without PROMPT, and
    with nothing on standard input, a chat begins.
    """
    from septet.errors import InvalidRequest
    from septet.request import SamplingParams

    params = SamplingParams(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        max_tokens=max_tokens,
        seed=seed,
        structured=_schema(schema) if schema else None,
    )
    opening = [{"role": "system", "content": system}] if system else []
    if prompt is None and not sys.stdin.isatty():
        prompt = _standard_input()
    elif prompt is not None and not prompt.strip():
        raise InvalidRequest("the prompt is empty", param="prompt")
    engine = EngineProcess.spawn(warm=True)  # it need not wait for what is imported from here on
    from septet.cli import terminal

    if prompt is None:
        terminal.converse(model, opening, params, stats, options, engine)
    else:
        question = {"role": "user", "content": prompt}
        terminal.ask_once(model, [*opening, question], params, stats, options, engine)


def _schema(path: str) -> Structured:
    from pathlib import Path

    from septet.errors import InvalidRequest
    from septet.structured import Structured

    try:
        return Structured.json_schema(Path(path).read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{path} is not UTF-8: {error}", param="schema") from None


def _standard_input() -> str:
    from septet.errors import InvalidRequest

    data = sys.stdin.buffer.read(MAX_STDIN + 1)
    if len(data) > MAX_STDIN:
        raise InvalidRequest(f"the prompt on standard input is larger than {MAX_STDIN} bytes", param="prompt")
    try:
        text = data.decode().strip()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the prompt on standard input is not UTF-8: {error}", param="prompt") from None
    if not text:
        raise InvalidRequest("the prompt on standard input is empty", param="prompt")
    return text
