"""What `septet run` does: an answer in the terminal, or a conversation.

With a prompt the answer streams to standard output and the figures go to standard error. Without, an interactive chat:
/reset, /help, /exit; Ctrl-C stops the answer, Ctrl-D leaves. `started` serves `septet serve` as well.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from septet.engine.spawn import EngineProcess

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from septet.request import SamplingParams
    from septet.session.events import Usage
    from septet.session.session import Session

__all__ = ["Stats", "ask_once", "converse", "started", "stream_answer"]

HELP = """\
  /reset   forget the conversation
  /help    this text
  /exit    leave (or Ctrl-D)
  Ctrl-C   stop the answer"""


@dataclass(slots=True)
class Stats:
    """What one answer took."""

    ttft_s: float
    decode_s: float  # first to last token
    usage: Usage

    def line(self) -> str:
        prompt, cached, output = self.usage.prompt_tokens, self.usage.cached_tokens, self.usage.completion_tokens
        speed = f"{(output - 1) / self.decode_s:.1f} tokens/s" if output > 1 and self.decode_s > 0 else "- tokens/s"
        share = f"{cached} of {prompt} prompt tokens from cache ({100 * cached / prompt:.0f} %)"
        return f"TTFT {self.ttft_s:.3f} s | {speed} | {output} tokens | {share}"


# -- engine start -----------------------------------------------------------------------------------------------------
@asynccontextmanager
async def started(model: str, options: dict[str, Any], engine: EngineProcess | None = None) -> AsyncIterator[Session]:
    """A session for the block, started under a spinner and closed after it. The engine's process comes first: it loads
    its libraries while this one imports its own and finds the model."""
    engine = engine or EngineProcess.spawn(warm=True)
    try:
        from septet.cli.hub import fetch
        from septet.session.start import start_session

        await asyncio.to_thread(fetch, model)
    except BaseException:
        engine.discard()
        raise
    begun = time.monotonic()
    with _spinner() as phase:
        session = await start_session(model, on_phase=phase, engine=engine, **options)
    if sys.stderr.isatty():
        click.echo(click.style(f"{session.model_name} ready in {time.monotonic() - begun:.1f} s", dim=True), err=True)
    try:
        yield session
    finally:
        await session.close()


class _spinner:
    """A turning mark with the phase beside it, on a terminal; nothing elsewhere. Not rich: its import costs time."""

    def __enter__(self) -> Callable[[str], None]:
        self._phase = "starting"
        self._turning: asyncio.Task[None] | None = None
        if sys.stderr.isatty():
            self._turning = asyncio.create_task(self._turn())
        return self._set

    def __exit__(self, *error: object) -> None:
        if self._turning is not None:
            self._turning.cancel()
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

    def _set(self, phase: str) -> None:
        self._phase = phase

    async def _turn(self) -> None:
        begun = time.monotonic()
        while True:
            for mark in "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏":
                sys.stderr.write(f"\r\x1b[K{mark} {self._phase} ... {time.monotonic() - begun:.0f} s")
                sys.stderr.flush()
                await asyncio.sleep(0.1)


# -- one answer -------------------------------------------------------------------------------------------------------
async def stream_answer(
    session: Session, messages: list[dict[str, str]], params: SamplingParams, write: Callable[[str], None]
) -> tuple[str, Stats]:
    """Stream the answer to `write`; return it whole with its figures."""
    from septet.session.events import Finished, TextDelta, Usage

    asked = time.monotonic()
    first = last = 0.0
    parts: list[str] = []
    usage = Usage(1, 0, 0)
    async with aclosing(session.chat(messages, params)) as events:
        async for event in events:
            if isinstance(event, TextDelta):
                last = time.monotonic()
                first = first or last
                parts.append(event.text)
                write(event.text)
            elif isinstance(event, Finished):
                usage = event.usage
    return "".join(parts), Stats((first or time.monotonic()) - asked, last - first, usage)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _show(stats: Stats) -> None:
    click.echo(click.style(stats.line(), dim=True), err=True)


def ask_once(
    model: str,
    messages: list[dict[str, str]],
    params: SamplingParams,
    stats: bool,
    options: dict[str, Any],
    engine: EngineProcess,
) -> None:
    """Stream one answer to standard output, its figures to standard error. `engine`: started ahead."""
    asyncio.run(_ask_once(model, messages, params, stats, options, engine))


async def _ask_once(
    model: str,
    messages: list[dict[str, str]],
    params: SamplingParams,
    stats: bool,
    options: dict[str, Any],
    engine: EngineProcess,
) -> None:
    async with started(model, options, engine) as session:
        _, figures = await stream_answer(session, messages, params, _write)
        _write("\n")
        if stats:
            _show(figures)


# -- conversation -----------------------------------------------------------------------------------------------------
def converse(
    model: str,
    opening: list[dict[str, str]],
    params: SamplingParams,
    stats: bool,
    options: dict[str, Any],
    engine: EngineProcess,
) -> None:
    """Chat until the end of input. `engine`: started ahead."""
    asyncio.run(_converse(model, opening, params, stats, options, engine))


async def _converse(
    model: str,
    opening: list[dict[str, str]],
    params: SamplingParams,
    stats: bool,
    options: dict[str, Any],
    engine: EngineProcess,
) -> None:
    async with started(model, options, engine) as session:
        ask = _reader()
        messages = list(opening)
        click.echo("Type a message; /help for commands.", err=True)
        while (line := await ask()) is not None:
            command = line.strip()
            if not command:
                continue
            if command in ("/exit", "/quit", "/bye"):
                return
            if command == "/reset":
                messages = list(opening)
                click.echo("conversation forgotten", err=True)
            elif command.startswith("/"):
                click.echo(HELP if command == "/help" else f"no command {command}\n{HELP}", err=True)
            else:
                await _turn(session, messages, line, params, stats)


async def _turn(
    session: Session, messages: list[dict[str, str]], line: str, params: SamplingParams, stats: bool
) -> None:
    """One question and its answer, kept in `messages`. A stopped answer is kept as far as it came."""
    from septet.errors import EngineDead, SeptetError

    said: list[str] = []

    def write(text: str) -> None:
        said.append(text)
        _write(text)

    asked = [*messages, {"role": "user", "content": line}]
    try:
        _, figures = await _interruptible(stream_answer(session, asked, params, write))
    except asyncio.CancelledError:
        click.echo("\n(stopped)", err=True)
    except EngineDead:
        raise
    except SeptetError as error:
        click.echo(f"error: {error.message} (/reset forgets the conversation)", err=True)
        return
    else:
        _write("\n")
        if stats:
            _show(figures)
    messages[:] = [*asked, {"role": "assistant", "content": "".join(said)}]


async def _interruptible(work: Any) -> Any:
    """Run `work`; Ctrl-C cancels it (CancelledError) and leaves the program running."""
    task = asyncio.ensure_future(work)
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, task.cancel)
    try:
        return await task
    finally:
        loop.remove_signal_handler(signal.SIGINT)


def _reader() -> Callable[[], Any]:
    """Reads a line with editing and a history file; None at the end (Ctrl-D)."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory

    prompt: PromptSession[str] = PromptSession(history=FileHistory(str(_history_file())))

    async def ask() -> str | None:
        while True:
            with suppress(KeyboardInterrupt):
                try:
                    return await prompt.prompt_async(">>> ")
                except EOFError:
                    return None
            click.echo("(Ctrl-D or /exit leaves)", err=True)

    return ask


def _history_file() -> Path:
    from septet.hub.store import home_directory

    home = home_directory()
    home.mkdir(parents=True, exist_ok=True)
    path = home / "run_history"
    path.touch(mode=0o600, exist_ok=True)
    return path
