"""`septet serve` with several models, or with all that are pulled: the pool that loads and unloads them.

Used by `serve.py`. Standard error says what is loaded and what was decided for it.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from septet.durations import seconds_of
from septet.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from septet.serve.pool import ModelPool
    from septet.session.session import Session

__all__ = ["KeepAlive", "Many", "pool_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Many:
    """What the command line says of the pool."""

    names: tuple[str, ...]  # () = all that are pulled
    keep_alive_s: float | None = None
    budget: int = 0  # bytes; 0 = a share of what is free
    preload: tuple[str, ...] = ()
    manages: bool = True  # whether clients may pull, create and delete

    @property
    def wanted(self) -> bool:
        """One model with nothing else asked for is loaded at start and stays."""
        return len(self.names) != 1 or self.keep_alive_s is not None or self.budget > 0 or bool(self.preload)


class KeepAlive(click.ParamType):
    """A duration as Ollama takes it: 300, 5m, 1h30m; negative = for ever."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            return seconds_of(value, "keep-alive")
        except InvalidRequest as error:
            self.fail(error.message, param, ctx)


@asynccontextmanager
async def pool_of(many: Many, options: dict[str, Any]) -> AsyncIterator[ModelPool]:
    """The pool, closed after the block. Models of the command line are fetched first."""
    from septet.cli.hub import fetch
    from septet.serve.library import EngineLoader, NamedShelf, StoreShelf, default_budget
    from septet.serve.pool import DEFAULT_KEEP_ALIVE_S, ModelPool

    engine = dict(options)
    parsers = {name: engine.pop(name) for name in ("tool_call_parser", "reasoning_parser")}
    models = [await asyncio.to_thread(fetch, name) for name in many.names]
    budget = many.budget or await asyncio.to_thread(default_budget, engine)
    pool = ModelPool(
        NamedShelf(models) if models else StoreShelf(),
        EngineLoader(engine, parsers, _tell),
        budget=budget,
        keep_alive_s=DEFAULT_KEEP_ALIVE_S if many.keep_alive_s is None else many.keep_alive_s,
        manages=many.manages and not models,
    )
    how = "as asked" if many.budget else "three quarters of the free memory; --memory-budget sets another"
    click.echo(f"  memory_budget  {budget >> 20} MiB  {how}", err=True)
    try:
        for name in many.preload:
            async with pool.use(name, keep_alive_s=-1 if many.keep_alive_s is None else None):
                pass
        yield pool
    finally:
        await pool.close()


def _tell(session: Session) -> None:
    from septet.cli.serve import print_choices

    click.echo(f"loaded {session.model_name} in {session.client.info.load_s:.1f} s", err=True)
    print_choices(session)
