"""The progress bar of a batch: prompts done, tokens per second in and out. Terminal only; used by `LLM`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["progress"]

Advance = Callable[[int, int, bool], None]
"""(new prompt tokens, new output tokens, a prompt has finished)"""


@contextmanager
def progress(n_prompts: int, shown: bool) -> Iterator[Advance]:
    """A bar on standard error; hidden where that is no terminal, or when not `shown`."""
    if not shown or not sys.stderr.isatty():
        yield lambda prompt_tokens, output_tokens, finished: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("prompts"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[speed]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("prompts", total=n_prompts, speed="")
        started = time.monotonic()
        totals = [0, 0]  # prompt tokens, output tokens
        due = started

        def advance(prompt_tokens: int, output_tokens: int, finished: bool) -> None:
            totals[0] += prompt_tokens
            totals[1] += output_tokens
            nonlocal due
            now = time.monotonic()
            if now < due and not finished:
                return
            due, seconds = now + 0.1, max(now - started, 1e-6)
            speed = f"in {totals[0] / seconds:.0f} tok/s, out {totals[1] / seconds:.0f} tok/s"
            bar.update(task, advance=1 if finished else 0, speed=speed)

        yield advance
